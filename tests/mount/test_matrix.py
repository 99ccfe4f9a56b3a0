"""What each user may do to each entry, compared with a tmpfs that has the same owners and modes.

For every mode of the root and of a backup there are two trees: the mount, and on a tmpfs its *twin*. In the twin
backups are directories, and pages and hidden names are files with the backup's owner and its mode without the x bits.
Each user, a process of its own, does the same in both trees. The answer of the tmpfs is right. Where ttmfs refuses
more, for reasons other than permissions (``docs/semantics.md``), the operation says so with its ``here``. Whether
something changed is read from the mount's own tmpfs, below the daemon.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import stat
import struct
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest
from kept import store_of

from harness import Mount
from stores import ALICE, BOB, CAROL, Place, mounted

DAVE, CREW, CLUB, NOBODYS = 65530, 65531, 65529, 65528

PAGE = 4096
BUDGET, SIZE = 8 << 20, 4 << 20
TEXT = b"x" * PAGE
LONG_AGO = 10**18
"""The time of everything that was not changed, in ns."""

PR_SET_PDEATHSIG = 1
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


class Actor(NamedTuple):
    """A user who tries all operations."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ACTORS = (
    Actor("root", 0, 0),
    Actor("owner", ALICE, ALICE, (CREW, CLUB)),
    Actor("member", BOB, CREW),
    Actor("supplementary member", CAROL, CAROL, (CLUB, CREW)),
    Actor("stranger", DAVE, DAVE, (CLUB,)),
)

ROOTS = {
    "755": (0o755, 0, 0),
    "777": (0o777, 0, 0),
    "1777": (0o1777, 0, 0),
    "member's 1777": (0o1777, BOB, BOB),
    "crew's 2770": (0o2770, 0, CREW),
}
MODES = 0o700, 0o750, 0o711, 0o777, 0o007, 0o2770


# --- operations ---


class View:
    """One of the two trees for an actor: paths in it, and the descriptor that the actor holds."""

    def __init__(self, top: str, actor: Actor) -> None:
        self.top, self.actor = top, actor
        self.own = f"own {actor.name}"
        self.held = -1

    def __call__(self, name: str) -> str:
        return f"{self.top}/{name.replace('OWN', self.own)}"

    def hold(self, name: str, flags: int) -> None:
        """Open something, as long as everyone may."""
        if self.held >= 0:
            os.close(self.held)
        self.held = os.open(self(name), flags)


HELD = {
    "root": ("", os.O_RDONLY),
    "backup": ("a", os.O_RDONLY),
    "backup's path": ("a", os.O_PATH),
    "page": ("a/1", os.O_RDWR),
    "page to read": ("a/1", os.O_RDONLY),
    "page's path": ("a/1", os.O_PATH),
    ".image": ("a/.image", os.O_RDWR),
    ".image's path": ("a/.image", os.O_PATH),
}

Call = Callable[[View], object]


class Operation(NamedTuple):
    """What an actor does. Its value must be the same in both trees.

    `changes` says whether it changes a mount when it is allowed (None: if and as it changes the twin), and `drops` that
    no page is left then, as cannot be seen in the twin; `marks` that it may change the twin alone. `here` is the errno
    of ttmfs where tmpfs has no objection for want of rights; `but_root`: not to root. `held` is what was opened before
    the modes were tightened, see HELD. `inside`: of the root's mode only the x bits count for it.
    """

    name: str
    call: Call
    changes: bool | None = False
    here: int = 0
    drops: bool = False
    marks: bool = False
    but_root: bool = False
    held: str = ""
    inside: bool = False

    @property
    def writes(self) -> bool:
        """Whether it may change a tree."""
        return self.changes is not False or bool(self.here) or self.marks


OPERATIONS: list[Operation] = []


INSIDE = {"backup", "page", ".image", ".shmem"}


def add(name: str, call: Call, of: str = "", **more: Any) -> None:
    OPERATIONS.append(Operation(name, call, inside=of in INSIDE, **more))


@contextlib.contextmanager
def opened(path: str, flags: int, dir_fd: int | None = None) -> Iterator[int]:
    fd = os.open(path, flags, 0o666, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def on(function: Callable[..., object], name: str, *arguments: object, **more: object) -> Call:
    """Call a function with a path, and with further arguments."""
    return lambda view: function(view(name), *arguments, **more)


def between(function: Callable[..., object], old: str, new: str, *arguments: object) -> Call:
    """Call a function with two paths."""
    return lambda view: function(view(old), view(new), *arguments)


def open_and(then: Callable[[int], object], name: str, flags: int) -> Call:
    """Call a function with a descriptor."""

    def call(view: View) -> object:
        with opened(view(name), flags) as fd:
            return then(fd)

    return call


def given(name: str, pair: Callable[[Actor], tuple[int, int]]) -> Call:
    """Give something to an owner and a group that depend on the actor."""
    return lambda view: os.chown(view(name), *pair(view.actor), follow_symlinks=False)


def nothing(_: object) -> None:
    """Leave out a value that differs between the trees."""


def silent(function: Callable[..., object]) -> Callable[..., None]:
    return lambda *arguments, **more: nothing(function(*arguments, **more))


def attributes(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mode, found.st_uid, found.st_gid


def owned(path: str | int, **more: Any) -> tuple[int, int, int]:
    return attributes(os.stat(path, **more))


def shown(directory: str | int) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name[0] != ".")


def begin(fd: int) -> bytes:
    return os.pread(fd, 10, 0)


def write(fd: int) -> int:
    return os.pwrite(fd, b"new", 0)


def empty(fd: int) -> None:
    os.ftruncate(fd, 0)


def reopened(flags: int, fd: int) -> None:
    with opened(f"/proc/self/fd/{fd}", flags):
        pass


def opened_in(flags: int, name: str, fd: int) -> None:
    with opened(name, flags, fd):
        pass


def asked(path: str, mode: int, dir_fd: int | None = None) -> None:
    if not os.access(path, mode, dir_fd=dir_fd):
        raise PermissionError(errno.EACCES, "access(2)")


def rename(old: str, new: str, flags: int = 0) -> None:
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2(2)")


def bind(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def enter(directory: str | int) -> None:
    try:
        os.chdir(directory)
    finally:
        os.chdir("/")


R, W, RW = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
ACL = struct.pack("<I" + "HHI" * 3, 2, 1, 6, 2**32 - 1, 4, 5, 2**32 - 1, 32, 1, 2**32 - 1)
"""user::rw-, group::r-x, other::--x, as system.posix_acl_access has it."""

TREE = {"root": "", "backup": "a", "page": "a/1", ".image": "a/.image", ".stats": ".stats"}
FILES = {what: name for what, name in TREE.items() if what not in ("root", "backup")}
TEXTS = ".stats", ".config"


def looking() -> None:
    for what, name in TREE.items():
        add(f"stat {what}", on(owned, name), of=what)
        for letter, mode in ("r", os.R_OK), ("w", os.W_OK), ("x", os.X_OK):
            add(f"access {letter} of {what}", on(asked, name, mode), of=what)
    add("statfs", on(silent(os.statvfs), ""))
    add("statfs of page", on(silent(os.statvfs), "a/1"), of="page")
    add("stat .config", on(owned, ".config"))
    add("open r .config", open_and(silent(begin), ".config", R))
    add("open w .config", open_and(nothing, ".config", W), here=errno.EACCES)
    add("chmod .config", on(os.chmod, ".config", 0o666), here=errno.EPERM)
    add("list root", on(shown, ""))
    add("list backup", on(shown, "a"), of="backup")
    add("enter backup", on(enter, "a"), of="backup")
    add("stat absent page", on(os.stat, "a/3"), of="backup")
    add("stat absent backup", on(os.stat, "absent"))
    add("stat .shmem itself", on(owned, "a/.shmem", follow_symlinks=False), of=".shmem")
    add("readlink .shmem", on(os.readlink, "a/.shmem"), of=".shmem")
    add("truncate through .shmem", on(os.truncate, "a/.shmem", SIZE), of=".shmem", changes=None)
    for letter, flags in ("r", R), ("w", W), ("rw", RW):
        add(f"open {letter} .shmem", open_and(nothing, "a/.shmem", flags), of=".shmem")


def opening() -> None:
    reads = {"r": R, "r noatime": R | os.O_NOATIME, "r create": R | os.O_CREAT}
    writes = {"w": W, "rw": RW, "append": W | os.O_APPEND, "rw create": RW | os.O_CREAT}
    truncates = {"w trunc": W | os.O_TRUNC, "rw trunc create": RW | os.O_TRUNC | os.O_CREAT}
    for what, name in FILES.items():
        text = what in TEXTS
        writing: dict[str, Any] = {"of": what, "here": errno.EACCES if text else 0}
        changing = writing if text else {"of": what, "changes": True, "drops": what == ".image"}
        for how, flags in reads.items():
            add(f"open {how} {what}", open_and(nothing, name, flags), of=what)
        for how, flags in writes.items():
            add(f"open {how} {what}", open_and(nothing, name, flags), **writing)
        for how, flags in truncates.items():
            add(f"open {how} {what}", open_and(nothing, name, flags), **changing)
        add(f"open r trunc {what}", open_and(nothing, name, R | os.O_TRUNC),
            **changing | {"here": errno.EPERM if text else 0})  # fmt: skip
        add(f"open {what} as a new one", open_and(nothing, name, W | os.O_CREAT | os.O_EXCL), of=what)
        add(f"reopen r {what}'s path", open_and(partial(reopened, R), name, os.O_PATH), of=what)
        add(f"reopen w {what}'s path", open_and(partial(reopened, W), name, os.O_PATH), **writing)
        add(f"reopen rw {what}", open_and(partial(reopened, RW), name, R), **writing)
        add(f"read {what}", open_and(silent(begin) if text else begin, name, R), of=what)
        # Whoever may only read cannot sync it: that would make the owner's writes wait.
        add(f"fsync {what}", open_and(os.fsync, name, RW if what == ".image" else R), of=what)
        if not text:
            add(f"write {what}", open_and(write, name, W), of=what, changes=True)
            add(f"ftruncate {what}", open_and(empty, name, RW), **changing)
        add(f"truncate {what}", on(os.truncate, name, 0), **changing | {"here": errno.EPERM if text else 0})
    for what, name in ("root", ""), ("backup", "a"):
        add(f"open r {what}", open_and(nothing, name, R), of=what)
        add(f"open w {what}", open_and(nothing, name, W), of=what)
        add(f"open r noatime {what}", open_and(nothing, name, R | os.O_NOATIME), of=what)
        add(f"list {what}'s reopened path", open_and(partial(reopened, R | os.O_DIRECTORY), name, os.O_PATH), of=what)
        add(f"fsync {what}", open_and(os.fsync, name, R), of=what)


def making() -> None:
    new = W | os.O_CREAT | os.O_EXCL
    add("create page", open_and(nothing, "a/2", new), changes=True)
    add("create page to read", open_and(nothing, "a/2", R | os.O_CREAT), changes=True)
    add("mknod page", on(os.mknod, "a/2", 0o644), changes=True)
    add("create page 0", open_and(nothing, "a/0", new), here=errno.EINVAL)
    add("create what is no handle", open_and(nothing, "a/x", new), here=errno.EINVAL)
    add("create page past the end", open_and(nothing, f"a/{SIZE // PAGE + 1}", new), here=errno.EFBIG)
    add("create file in root", open_and(nothing, "file", new), here=errno.EPERM)
    add("create hidden file in root", open_and(nothing, ".file", new), here=errno.EPERM)
    add("mknod file in root", on(os.mknod, "new", 0o644), here=errno.EPERM)
    for where, name in ("root", "new"), ("backup", "a/2"):
        more: dict[str, Any] = {"of": where, "here": errno.EPERM}
        add(f"mknod fifo in {where}", on(os.mknod, name, stat.S_IFIFO | 0o644), **more)
        add(f"mknod device in {where}", on(os.mknod, name, stat.S_IFCHR | 0o644, os.makedev(1, 3)), **more)
        add(f"bind in {where}", on(bind, name), **more)
        add(f"symlink in {where}", on(partial(os.symlink, "1"), name), **more)
        for old in "a/1", ".stats":
            add(f"link {old} in {where}", between(os.link, old, name), **more)
    add("unnamed file in root", open_and(nothing, "", W | os.O_TMPFILE), here=errno.EOPNOTSUPP)
    add("unnamed file in backup", open_and(nothing, "a", W | os.O_TMPFILE), of="backup", here=errno.EOPNOTSUPP)
    add("mkdir", on(os.mkdir, "new"), changes=True)
    add("mkdir closed", on(os.mkdir, "new", 0o1700), changes=True)
    add("mkdir hidden", on(os.mkdir, ".new"), here=errno.EPERM)
    add("mkdir of a backup that is there", on(os.mkdir, "a"))
    add("mkdir in backup", on(os.mkdir, "a/2"), of="backup", here=errno.EPERM)
    add("mkdir over page", on(os.mkdir, "a/1"), of="backup")


def removing() -> None:
    add("unlink page", on(os.unlink, "a/1"), changes=True)
    add("unlink absent page", on(os.unlink, "a/3"))
    for name in "a/.image", "a/.shmem", *TEXTS:
        add(f"unlink {name}", on(os.unlink, name), here=errno.EPERM)
    add("unlink backup", on(os.unlink, "a"))
    add("rmdir page", on(os.rmdir, "a/1"))
    add("rmdir full backup", on(os.rmdir, "a"))
    add("rmdir empty backup", on(os.rmdir, "e"), changes=True)
    add("rmdir one's own", on(os.rmdir, "OWN"), changes=True)
    add("rmdir absent", on(os.rmdir, "absent"))
    for old, new in ("a", "new"), ("e", "new"), ("OWN", "new"), ("OWN", "e"), ("e", "OWN"), ("a", "e"), ("a", "OWN"):
        add(f"rename {old} to {new}", between(rename, old, new), changes=True)
        add(f"rename {old} to {new}, not over it", between(rename, old, new, RENAME_NOREPLACE), changes=True)
    for old, new in ("OWN", "a"), ("e", "a"):
        add(f"rename {old} to {new}", between(rename, old, new))
    for old, new, here in (
        *(("a/1", "a/2", errno.EXDEV), ("a/1", "OWN/1", errno.EXDEV), ("a/1", "e/1", errno.EXDEV)),
        *(("a/1", "new", errno.EXDEV), ("a/.image", "a/2", errno.EPERM), ("a/.shmem", "a/2", errno.EPERM)),
        *(("OWN", ".new", errno.EPERM), ("OWN", "a/2", errno.EPERM), ("e", "OWN/2", errno.EPERM)),
        *((".stats", "new", errno.EPERM), (".config", "a/2", errno.EPERM)),
    ):
        add(f"rename {old} to {new}", between(rename, old, new), here=here)
    for old, new in ("a", "e"), ("OWN", "a"):
        add(f"exchange {old} and {new}", between(rename, old, new, RENAME_EXCHANGE), here=errno.EINVAL)


def owning() -> None:
    for mode in 0o641, 0o2705, 0o5701:
        add(f"chmod {mode:o} backup", on(os.chmod, "a", mode), of="backup", changes=True)
        add(f"chmod {mode:o} one's own", on(os.chmod, "OWN", mode), changes=True)
        add(f"chmod {mode:o} root", on(os.chmod, "", mode), changes=True)
    for what, name in FILES.items():
        add(f"chmod {what}", on(os.chmod, name, 0o641), of=what, here=errno.EPERM if what in TEXTS else 0, marks=True)
    ids: dict[str, Callable[[Actor], tuple[int, int]]] = {
        "no one": lambda _: (-1, -1),
        "oneself": lambda actor: (actor.uid, -1),
        "one's group": lambda actor: (-1, actor.gid),
        "root": lambda _: (0, -1),
        "the owner": lambda _: (ALICE, -1),
        "the crew": lambda _: (-1, CREW),
        "the club": lambda _: (-1, CLUB),
        "someone else": lambda _: (DAVE, CAROL),
    }
    for whom, pair in ids.items():
        for what, name in (*TREE.items(), ("one's own", "OWN"), (".shmem", "a/.shmem")):
            here = 0
            if what in TEXTS:
                if whom not in ("no one", "root", "the club"):
                    continue
                here = errno.EPERM
            elif what not in ("root", "backup", "one's own") and whom not in ("no one", "the owner", "the crew"):
                if whom == "oneself":
                    continue  # the owner may, as he gives it to no one else; that is "the owner"
                here = errno.EPERM
            add(f"chown {what} to {whom}", given(name, pair), of=what, changes=None, here=here)
    for what, name in (*TREE.items(), (".shmem", "a/.shmem"), ("one's own", "OWN")):
        more: dict[str, Any] = {
            "of": what,
            "changes": what in ("root", "backup", "one's own"),
            "here": errno.EPERM if what in TEXTS else 0,
            "marks": True,
        }
        add(f"set times of {what}", on(os.utime, name, ns=(5, 5), follow_symlinks=False), **more)
        add(f"touch {what}", on(os.utime, name, follow_symlinks=False), **more)


READABLE = {
    "": {"bytes_avail": b"0", "page_size": b"%d" % PAGE, "size": b"%d" % BUDGET},
    "a": {"size": b"%d" % SIZE, "pages": b"1", "resident": b"1", "swapped": b"0", "map": b"1"},
}
SETTABLE = {("", "size"): b"16m", ("a", "size"): b"2m", ("a", "drop"): b"1"}
UNSTEADY = "bytes_avail", "resident", "swapped"
STRANGE = "user.other", "trusted.other"


def extended() -> None:
    for what, name in ("root", ""), ("backup", "a"):
        for short in *READABLE[name], *(["drop"] if name else []):
            full = f"user.ttmfs.{short}"
            add(f"get {short} of {what}", on(silent(os.getxattr) if short in UNSTEADY else os.getxattr, name, full),
                of=what)  # fmt: skip
            if value := SETTABLE.get((name, short)):
                more = {"here": 0 if name else errno.EPERM, "but_root": not name}  # the budget is root's to change
                add(f"set {short} of {what}", on(os.setxattr, name, full, value),
                    of=what, changes=True, drops=short == "drop", **more)  # fmt: skip
                add(f"remove {short} of {what}", on(os.removexattr, name, full), of=what, here=errno.EPERM)
            elif short not in UNSTEADY:
                add(f"set {short} of {what}", on(os.setxattr, name, full, b"1"), of=what, here=errno.EPERM)
    for what, name in (*TREE.items(), (".shmem", "a/.shmem")):
        add(f"list attributes of {what}", on(silent(os.listxattr), name, follow_symlinks=False), of=what)
        for full in *STRANGE, *(["user.ttmfs.size"] if what in FILES else []):
            add(f"get {full} of {what}", on(os.getxattr, name, full, follow_symlinks=False), of=what)
            add(f"set {full} of {what}", on(os.setxattr, name, full, b"1", follow_symlinks=False),
                of=what, here=errno.EOPNOTSUPP)  # fmt: skip
        add(f"remove user.other of {what}", on(os.removexattr, name, "user.other", follow_symlinks=False), of=what)
    for what, name in ("root", ""), ("backup", "a"), ("page", "a/1"):
        add(f"set list of rights of {what}", on(os.setxattr, name, "system.posix_acl_access", ACL),
            of=what, here=errno.EOPNOTSUPP)  # fmt: skip


def holding() -> None:
    """What is opened before the modes are tightened."""

    def held(name: str, what: str, call: Callable[[int], object], **more: Any) -> None:
        of = "backup" if HELD[what][0] else ""
        add(f"{name} by descriptor of {what}", lambda view: call(view.held), held=what, of=of, **more)

    for what in ("root", "backup", "page", ".image"):
        directory, drops = what in ("root", "backup"), what == ".image"
        if what != "page":  # the kernel trusts what it knew of a page for a second
            held("fstat", what, owned)
            held("touch", what, os.utime, changes=directory, marks=True)
        held("fsync", what, os.fsync)
        held("statfs", what, silent(os.fstatvfs))
        held("chmod", what, lambda fd: os.fchmod(fd, 0o641), changes=directory, marks=True)
        held("set times", what, lambda fd: os.utime(fd, ns=(5, 5)), changes=directory, marks=True)
        if directory:
            held("list", what, shown)
            held("chown", what, lambda fd: os.fchown(fd, -1, CLUB), changes=True)
            held("enter", what, enter)
            held("get size", what, lambda fd: os.getxattr(fd, "user.ttmfs.size"))
            held("set size", what, lambda fd: os.setxattr(fd, "user.ttmfs.size", b"2m"), changes=True,
                 here=errno.EPERM if what == "root" else 0, but_root=what == "root")  # fmt: skip
        else:
            held("chown", what, lambda fd: os.fchown(fd, -1, CLUB), here=errno.EPERM)
            held("read", what, begin)
            held("write", what, write, changes=True)
            held("truncate", what, empty, changes=True, drops=drops)
            for letter, flags in ("r", R), ("w", W), ("rw", RW):
                held(f"reopen {letter}", what, partial(reopened, flags))
                held(f"reopen {letter}", f"{what}'s path", partial(reopened, flags))
            held("reopen w trunc", f"{what}'s path", partial(reopened, W | os.O_TRUNC), changes=True, drops=drops)
    held("fstat", ".image's path", owned)
    held("reopen w", "page to read", partial(reopened, W))
    held("list reopened", "backup's path", partial(reopened, R | os.O_DIRECTORY))
    held("enter", "backup's path", enter)
    held("drop", "backup", lambda fd: os.setxattr(fd, "user.ttmfs.drop", b"1"), changes=True, drops=True)
    held("get map", "backup", lambda fd: os.getxattr(fd, "user.ttmfs.map"))
    for what in "backup", "backup's path":
        held("open page r", what, partial(opened_in, R, "1"))
        held("open page w", what, partial(opened_in, W, "1"))
        held("open .image rw", what, partial(opened_in, RW, ".image"))
        held("create page", what, partial(opened_in, W | os.O_CREAT, "2"), changes=True)
        held("stat page", what, lambda fd: owned("1", dir_fd=fd))
        held("unlink page", what, lambda fd: os.unlink("1", dir_fd=fd), changes=True)
        held("chmod page", what, lambda fd: os.chmod("1", 0o600, dir_fd=fd), marks=True)
        held("access w page", what, lambda fd: asked("1", os.W_OK, dir_fd=fd))
        held("readlink .shmem", what, lambda fd: nothing(os.readlink(".shmem", dir_fd=fd)))
    held("open page r", "root", partial(opened_in, R, "a/1"))
    held("open .stats", "root", partial(opened_in, R, ".stats"))
    held("mkdir", "root", lambda fd: os.mkdir("new", dir_fd=fd), changes=True)
    held("rmdir", "root", lambda fd: os.rmdir("e", dir_fd=fd), changes=True)
    held("rename", "root", lambda fd: os.rename("a", "new", src_dir_fd=fd, dst_dir_fd=fd), changes=True)
    held("chmod backup", "root", lambda fd: os.chmod("a", 0o641, dir_fd=fd), changes=True)


for build in looking, opening, making, removing, owning, extended, holding:
    build()

Result: TypeAlias = tuple[int, object]
"""errno and None, or 0 and the value."""

Tried: TypeAlias = tuple[list[tuple[Result, Result]], Result | None]
"""Results in mount and twin, and the result in the twin of what was not done in the mount yet."""


# --- the actors' processes ---


class Process:
    """An actor's process. It carries out orders and reports the outcomes."""

    def __init__(self, actor: Actor, mount: Path, twin: Path) -> None:
        self.actor = actor
        self._end, other = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there may be threads, but the child asks for no lock
            self._pid = os.fork()
        if not self._pid:
            try:
                self._serve(other, View(str(mount), actor), View(str(twin), actor))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        other.close()

    def _serve(self, end: Connection, mount: View, twin: View) -> None:
        os.setgroups(self.actor.groups)
        os.setresgid(*[self.actor.gid] * 3)
        os.setresuid(*[self.actor.uid] * 3)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.umask(0o022)
        os.chdir("/")
        while order := end.recv():
            what, numbers = order
            operations = [OPERATIONS[number] for number in numbers]
            if what == "hold":
                holding = operations[0]._replace(call=lambda view, held=operations[0].held: view.hold(*HELD[held]))
                end.send([_done(holding, view)[0] for view in (mount, twin)])
            elif what == "try":
                end.send(self._try(operations, mount, twin))
            else:
                end.send(_done(operations[0], mount))
        os._exit(0)

    @staticmethod
    def _try(operations: list[Operation], mount: View, twin: View) -> Tried:
        results: list[tuple[Result, Result]] = []
        for operation in operations:
            on_tmpfs = _done(operation, twin)
            if operation.writes and not on_tmpfs[0]:
                return results, on_tmpfs
            results.append((_done(operation, mount), on_tmpfs))
        return results, None

    def _ask(self, what: str, numbers: list[int]) -> Any:
        self._end.send((what, numbers))
        return self._answer(numbers)

    def _answer(self, numbers: list[int]) -> Any:
        assert self._end.poll(60), f"{self.actor.name} hangs in {OPERATIONS[numbers[0]].name}, or soon after"
        return self._end.recv()

    def hold(self, number: int) -> Callable[[], object]:
        """Let it open what an operation holds; gives what waits until that is done."""
        self._end.send(("hold", [number]))
        return partial(self._answer, [number])

    def attempt(self, numbers: list[int]) -> Tried:
        """Do operations in twin and mount, up to one that could change the twin. That one is done only in the twin."""
        tried: Tried = self._ask("try", numbers)
        return tried

    def do(self, number: int) -> Result:
        """Do the last operation in the mount, too."""
        result: Result = self._ask("do", [number])
        return result

    def end(self) -> None:
        """End the process, and check that all went well."""
        self._end.send(None)
        assert os.waitpid(self._pid, 0)[1] == 0
        self._end.close()


def _done(operation: Operation, view: View) -> Result:
    try:
        return 0, operation.call(view)
    except OSError as error:
        return error.errno or -1, None


# --- the two trees ---

State = dict[str, tuple[object, ...]]
Wanted = dict[str, tuple[int, int, int]]
"""What is to be in the root, and "" for itself: mode, owner, group."""


class Mounted:
    """The mount: how it is put in order, and what it really stores."""

    def __init__(self, top: str) -> None:
        self.top = top
        os.mkdir(f"{top}/a")
        self._below = os.open(
            store_of(json.loads(Path(f"{top}/.config").read_text())["daemon_pid"]), R | os.O_DIRECTORY
        )
        self._inodes: dict[str, int] = {}

    def close(self) -> None:
        os.close(self._below)

    def state(self) -> State:
        """All content, as the mount's own tmpfs has it, without asking the daemon."""
        root = os.fstat(self._below)
        state: State = {"": (*_owned(root), root.st_mtime_ns, os.fstatvfs(self._below).f_blocks)}
        for name in os.listdir(self._below):
            found = os.stat(name, dir_fd=self._below)
            state[name] = (*_owned(found), found.st_mtime_ns, found.st_size, found.st_blocks, self._inode(name, found))
        return state | {"content": (self._content(),)}

    def _inode(self, name: str, found: os.stat_result) -> int:
        """The inode number, or 0 while it is unchanged."""
        return found.st_ino if self._inodes.get(name) != found.st_ino else 0

    def _content(self) -> bytes:
        """The content of the backup's first pages."""
        with contextlib.suppress(FileNotFoundError), opened("a", R, self._below) as fd:
            return os.pread(fd, 3 * PAGE, 0)
        return b""

    def arrange(self, wanted: Wanted) -> None:
        """Bring all of it to what is wanted, and leave alone what is well."""
        known = {inode: name for name, inode in self._inodes.items()}
        found = {name: known.get(os.stat(name, dir_fd=self._below).st_ino) for name in os.listdir(self._below)}
        moved = [(name, was) for name, was in found.items() if name != was]
        for name, was in moved:
            if was:
                os.rename(f"{self.top}/{name}", f"{self.top}/was {was}")
            else:
                os.truncate(f"{self.top}/{name}/.image", 0)
                os.rmdir(f"{self.top}/{name}")
        for _, was in moved:
            if was:
                os.rename(f"{self.top}/was {was}", f"{self.top}/{was}")
        if os.fstatvfs(self._below).f_blocks != BUDGET // PAGE:
            os.setxattr(self.top, "user.ttmfs.size", b"%d" % BUDGET)
        there = os.listdir(self._below)
        for name, (mode, uid, gid) in wanted.items():
            if name and name not in there:
                os.mkdir(f"{self.top}/{name}")
            if name == "a":
                self._fill()
            self._own(name, mode, uid, gid)
        self._inodes = {name: os.stat(name, dir_fd=self._below).st_ino for name in os.listdir(self._below)}

    def _own(self, name: str, mode: int, uid: int, gid: int) -> None:
        path, below = f"{self.top}/{name}", os.stat(name or ".", dir_fd=self._below)
        if given := (below.st_uid, below.st_gid) != (uid, gid):
            os.chown(path, uid, gid)
        if given or stat.S_IMODE(below.st_mode) != mode:
            os.chmod(path, mode)
        if below.st_mtime_ns != LONG_AGO:
            os.utime(path, ns=(LONG_AGO, LONG_AGO))

    def _fill(self) -> None:
        """Make the backup hold one page."""
        found = os.stat("a", dir_fd=self._below)
        if found.st_size != SIZE:
            os.setxattr(f"{self.top}/a", "user.ttmfs.size", b"%d" % SIZE)
        if found.st_blocks != PAGE // 512 or self._content() != TEXT + bytes(2 * PAGE):
            os.truncate(f"{self.top}/a/.image", 0)
            Path(f"{self.top}/a/1").write_bytes(TEXT)

    def chmod(self, root: int, backup: int) -> None:
        os.chmod(f"{self.top}/a", backup)
        os.chmod(self.top, root)


def shmem_mode(mode: int) -> int:
    """The mode of .shmem: the right to read comes only with the right to write."""
    writers = mode & 0o222
    return writers | mode & writers << 1


class Twin:
    """The tree that the mount would be on a tmpfs."""

    def __init__(self, top: str) -> None:
        self.top = top

    def state(self) -> State:
        state: State = {}
        names = ["", *os.listdir(self.top)]
        with contextlib.suppress(FileNotFoundError):
            names += [f"a/{name}" for name in os.listdir(f"{self.top}/a")]
        for name in names:
            path = f"{self.top}/{name}"
            found, extended, content = os.lstat(path), {}, b""
            if not name.startswith("own "):
                extended = {key: os.getxattr(path, key, follow_symlinks=False) for key in _listed(path)}
            if name == "a/1":
                with opened(path, R) as fd:
                    content = os.pread(fd, PAGE, 0)
            state[name] = (found.st_mode, *_owned(found), found.st_mtime_ns, found.st_size, extended, content)
        return state

    def arrange(self, wanted: Wanted, now: State, right: State) -> None:
        """Make anew what is not as in a right state, so all of it if nothing is."""
        names = {*wanted, *TEXTS, *now, *right}
        tops = {name.partition("/")[0] for name in names if name not in right or right[name] != now.get(name)}
        for name in tops & now.keys() - {""}:
            path = f"{self.top}/{name}"
            shutil.rmtree(path) if stat.S_ISDIR(os.lstat(path).st_mode) else os.unlink(path)
        for key in _listed(self.top) if "" in tops else ():
            os.removexattr(self.top, key)
        for name in TEXTS:
            if name in tops:
                os.mknod(f"{self.top}/{name}")
                self._own(name, 0o444, *wanted[""][1:])
        for name, (mode, uid, gid) in wanted.items():
            if name in tops or not name:
                self._make(name, mode, uid, gid)

    def _make(self, name: str, mode: int, uid: int, gid: int) -> None:
        if name:
            os.mkdir(f"{self.top}/{name}")
        if name == "a":
            for file in "a/1", "a/.image":
                Path(f"{self.top}/{file}").write_bytes(TEXT)
                self._own(file, mode & 0o666, uid, gid)
            Path(f"{self.top}/a/.shmem").write_bytes(bytes(SIZE))
            self._own("a/.shmem", shmem_mode(mode), uid, gid)
        for short, value in READABLE.get(name, {}).items():
            os.setxattr(f"{self.top}/{name}", f"user.ttmfs.{short}", value)
        self._own(name, mode, uid, gid)

    def _own(self, name: str, mode: int, uid: int, gid: int) -> None:
        path = f"{self.top}/{name}"
        os.chown(path, uid, gid)
        os.chmod(path, mode)
        os.utime(path, ns=(LONG_AGO, LONG_AGO))

    def chmod(self, root: int, backup: int) -> None:
        files = ("a/1", backup & 0o666), ("a/.image", backup & 0o666), ("a/.shmem", shmem_mode(backup))
        for name, mode in (*files, ("a", backup), ("", root)):
            os.chmod(f"{self.top}/{name}", mode)


def _owned(found: os.stat_result) -> tuple[int, int, int]:
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


def _listed(path: str) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


def seen(top: str) -> dict[str, tuple[object, ...]]:
    """What root sees in the root: names, modes and owners, and the pages of the one backup that has any."""
    view: dict[str, tuple[object, ...]] = {"": owned(top)}
    names = shown(top)
    for name in names:
        pages = shown(f"{top}/{name}") if name == "a" or "a" not in names else []
        view[name] = *owned(f"{top}/{name}"), pages
    return view


class Matrix:
    """Both trees and all actors."""

    def __init__(self, root: tuple[int, int, int], mount: Path, twin: Path) -> None:
        self._root = root
        self._processes = [Process(actor, mount, twin) for actor in ACTORS]
        self._mount, self._twin = Mounted(str(mount)), Twin(str(twin))
        self._wanted: Wanted = {}
        self._wrong: list[str] = []

    def end(self) -> None:
        self._mount.close()
        for process in self._processes:
            process.end()

    def wrong(self, mode: int, inside: bool) -> list[str]:
        """Try all operations, or those that concern the root's mode, with backups of a mode. Returns what was wrong."""
        self._wanted = {f"own {actor.name}": (0o700, actor.uid, NOBODYS) for actor in ACTORS}
        self._wanted |= {"e": (mode, ALICE, CREW), "a": (mode, ALICE, CREW), "": self._root}
        self._mount.arrange(self._wanted)
        self._twin.arrange(self._wanted, self._twin.state(), {})
        self._state, self._twin_state = self._mount.state(), self._twin.state()
        assert seen(self._mount.top) == seen(self._twin.top), "the trees do not begin alike"
        self._wrong = []
        numbers = [number for number, operation in enumerate(OPERATIONS) if inside or not operation.inside]
        for process in self._processes:
            self._try(process, [number for number in numbers if not OPERATIONS[number].held])
        for number in numbers:
            if not OPERATIONS[number].held:
                continue
            rearranged = True
            for count, process in enumerate(self._processes):
                if rearranged:  # what was held may have been made anew
                    self._hold(self._processes[count:], number, mode)
                rearranged = self._try(process, [number])
        assert self._twin.state() == self._twin_state, "the twin is not as it was"
        return self._wrong

    def _hold(self, processes: list[Process], number: int, mode: int) -> None:
        """Let actors open what an operation holds, then tighten the modes."""
        for tree in self._mount, self._twin:
            tree.chmod(0o777, 0o777)
        answers = [wait() for wait in [process.hold(number) for process in processes]]
        assert answers == [[0, 0]] * len(processes), f"to hold {OPERATIONS[number].held} gave {answers}"
        for tree in self._mount, self._twin:
            tree.chmod(self._root[0], mode)

    def _try(self, process: Process, numbers: list[int]) -> bool:
        """Let an actor do operations. Returns whether anything was put in order again."""
        rearranged = False
        while numbers:
            results, pending = process.attempt(numbers)
            operations, numbers = numbers[: len(results)], numbers[len(results) :]
            for number, (got, on_tmpfs) in zip(operations, results, strict=True):
                self._compare(process.actor, OPERATIONS[number], got, on_tmpfs)
            if self._mount.state() != self._state or (not pending and self._twin.state() != self._twin_state):
                names = ", ".join(OPERATIONS[number].name for number in operations)
                self._complain(process.actor, names, "one of these changed something")
                self._arrange()
                rearranged = True
            if pending:
                self._change(process, numbers.pop(0), pending)
                rearranged = True
        return rearranged

    def _compare(self, who: Actor, operation: Operation, got: Result, on_tmpfs: Result) -> None:
        expected = on_tmpfs[0]
        if expected not in (errno.EACCES, errno.EPERM) and not (operation.but_root and not who.uid):
            expected = operation.here or expected
        if got[0] != expected:
            self._complain(who, operation.name, f"{_said(got[0])} instead of {_said(expected)}")
        elif not got[0] and got != on_tmpfs:
            self._complain(who, operation.name, f"{got[1]!r} instead of {on_tmpfs[1]!r}")

    def _change(self, process: Process, number: int, on_tmpfs: Result) -> None:
        """Let an actor do in the mount what may have changed the twin, and compare the two."""
        who, operation = process.actor, OPERATIONS[number]
        got = process.do(number)
        self._compare(who, operation, got, on_tmpfs)
        changed = self._mount.state() != self._state
        if got[0]:
            if changed:
                self._complain(who, operation.name, "refused, and yet something changed")
        elif operation.changes not in (None, changed):
            self._complain(who, operation.name, f"{'something' if changed else 'nothing'} changed")
        elif operation.changes is not False:
            view, expected = seen(self._mount.top), seen(self._twin.top)
            if operation.drops:
                expected["a"] = *expected["a"][:-1], []
            for name in view.keys() | expected.keys():
                if view.get(name) != expected.get(name):
                    self._complain(who, operation.name, f"{name} is {view.get(name)} instead of {expected.get(name)}")
        self._arrange(changed)

    def _arrange(self, changed: bool = True) -> None:
        """Put in order again what was changed."""
        if changed:
            self._mount.arrange(self._wanted)
            assert self._mount.state() == self._state, "the mount is not as it was"
        if (now := self._twin.state()) != self._twin_state:
            self._twin.arrange(self._wanted, now, self._twin_state)

    def _complain(self, who: Actor, what: str, complaint: str) -> None:
        self._wrong.append(f"{who.name}: {what}: {complaint}")


def _said(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "allowed"


# --- the tests ---


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, place: Place) -> Iterator[Matrix]:
    """A matrix for each of the ROOTS."""
    with contextlib.ExitStack() as stack:
        mountpoint = stack.enter_context(place.directory("mount"))
        twin = stack.enter_context(mounted(place.path / "twin", "tmpfs", "size=64m,mode=755"))
        options = f"size={BUDGET},backup_size={SIZE},allow_other,mode=755"
        stack.enter_context(Mount(mountpoint, options, cwd=place.path))
        matrix = Matrix(ROOTS[request.param], mountpoint, twin)
        stack.callback(matrix.end)
        yield matrix


# Of the root's mode only the x bits count within a backup, and for its removal and renaming its own mode does not: so
# not every mode is tried in every root with everything.
FIRST, *OTHERS = ROOTS


@pytest.mark.parametrize("mode", MODES, ids="{:o}".format)
@pytest.mark.parametrize("matrix", [FIRST], indirect=True)
def test_ttmfs_permits_exactly_what_a_tmpfs_permits(matrix: Matrix, mode: int) -> None:
    wrong = matrix.wrong(mode, inside=True)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("mode", [0o750, 0o777], ids="{:o}".format)
@pytest.mark.parametrize("matrix", OTHERS, indirect=True)
def test_ttmfs_permits_what_a_tmpfs_permits_for_other_modes_of_the_root(matrix: Matrix, mode: int) -> None:
    wrong = matrix.wrong(mode, inside=mode == 0o750)
    assert not wrong, "\n".join(wrong)
