"""SIGKILL to the daemon at chosen points of every operation (C22), and requests that are to blame for its deaths.

The daemon is mount.py after a script that makes the handlers look for an order in a file: in which handler, at which
point, and what is to be done there. What a caller is told and what is there afterwards is compared with another mount,
where the same was done and no one was killed.
"""

import contextlib
import ctypes
import errno
import functools
import inspect
import itertools
import json
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

from harness import MOUNT_PY, Mount, attribute, count, names, opened, set_attribute, wait_until
from stores import ControlGroup

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 64
"""What a backup spans."""
BUDGET = 160

libc = ctypes.CDLL(None, use_errno=True)


# --- a daemon that obeys orders ---


def obey(path: str) -> None:
    """Make every handler look for an order at a path.

    This source runs before mount.py, in every daemon. An order selects requests by `handler`, and if `holds` is not
    None by the offset of a write. `point` is when it is obeyed: before the request is carried out, after, once its
    answer is noted or sent, or before one of its system calls, by number. `deed` is what is done, `times` how often.
    Each deed is recorded as a line in a file beside the order, and so is each call of a handler that changes something.
    """
    import ctypes
    import functools
    import inspect
    import json
    import os
    import signal
    import sys
    import time
    from collections.abc import Callable, Coroutine
    from typing import Any

    import trio

    from ttmfs.fuse.in_flight import InFlight
    from ttmfs.fuse.operations import Operations, handles_request
    from ttmfs.fuse.page_requests import Kind, PageRequests
    from ttmfs.linux.fuse_protocol import WRITE, WRITE_IN

    os.environ["TTMFS_LOOP"] = "python"  # whose handlers can be replaced

    def do(deed: str) -> None:
        with open(path + ".done", "a") as done:
            done.write(f"{os.getpid()}\n")
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif deed == "read address 0":
            ctypes.string_at(0)
        elif deed == "abort":
            os.abort()
        elif deed == "eat":
            eaten = []
            while True:
                eaten.append(b"x" * (1 << 20))
        elif deed == "hold":
            time.sleep(60)

    def order_for(handler: str, arguments: tuple[Any, ...]) -> dict[str, Any] | None:
        try:
            with open(path) as file:
                order: dict[str, Any] = json.load(file)
        except FileNotFoundError:
            return None
        if order["handler"] != handler:
            return None
        if order["holds"] is not None:
            request, message = arguments
            assert request.opcode == WRITE
            return order if WRITE_IN.unpack_from(message, 40)[1] == order["holds"] else None
        return order

    def take(order: dict[str, Any]) -> None:
        if order["times"] == 1:
            os.rename(path, path + ".taken")  # first, so that the next daemon does not find it

    def look(handler: str, point: str, arguments: tuple[Any, ...]) -> None:
        order = order_for(handler, arguments)
        if order and order["point"] == point:
            take(order)
            do(order["deed"])
        elif order and order["point"] == "answered" and point == "after":
            take(order)
            # The reply is written before trio calls anything.
            trio.lowlevel.current_trio_token().run_sync_soon(do, order["deed"])

    def count_calls(handler: str, arguments: tuple[Any, ...]) -> None:
        order = order_for(handler, arguments)
        if not order or not isinstance(order["point"], int):
            return
        left = order["point"]

        def seen(frame: Any, event: str, argument: Any) -> None:
            nonlocal left
            of_os = event == "c_call" and getattr(argument, "__module__", "") in ("posix", "fcntl")
            modules = "/ttmfs/linux/system_calls.py", "/ttmfs/linux/tmpfs.py"
            if of_os or (event == "call" and frame.f_code.co_filename.endswith(modules)):
                left -= 1
                if not left:
                    sys.setprofile(None)
                    take(order)
                    do(order["deed"])

        sys.setprofile(seen)

    def obeying(name: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        async def rest(answer: Coroutine[Any, Any, Any], arguments: tuple[Any, ...]) -> Any:
            try:
                return await answer
            finally:
                sys.setprofile(None)
                look(name, "after", arguments)

        @functools.wraps(handler)
        def watched(*whole: Any) -> Any:
            arguments = whole[1:] if isinstance(whole[0], Operations) else whole
            look(name, "before", arguments)
            answer = None
            try:
                count_calls(name, arguments)
                answer = handler(*whole)
                return rest(answer, arguments) if inspect.iscoroutine(answer) else answer
            finally:
                if not inspect.iscoroutine(answer):
                    sys.setprofile(None)
                    look(name, "after", arguments)

        return watched

    run_sync = trio.to_thread.run_sync

    async def run_sync_watched(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """Count the system calls of threads as well."""
        profile = sys.getprofile()

        def work(*arguments: Any) -> Any:
            sys.setprofile(profile)
            try:
                return function(*arguments)
            finally:
                sys.setprofile(None)

        return await run_sync(work, *arguments, **more)

    trio.to_thread.run_sync = run_sync_watched  # type: ignore[assignment]

    for name, operation in list(vars(Operations).items()):
        if handler := getattr(operation, "__wrapped__", None):
            setattr(Operations, name, handles_request(obeying(name, handler)))

    made, note_answer = PageRequests.__init__, InFlight.note_answer
    last: list[tuple[str, tuple[Any, ...]]] = []  # the handler that changes something and returned last

    def recorded(kind: Kind) -> Callable[..., Any]:
        handler = obeying(kind.name, kind.handler)
        if not kind.changes:
            return handler

        def called(*arguments: Any) -> Any:
            with open(path + ".calls", "a") as calls:
                calls.write(f"{kind.name}\n")
            last[:] = [(kind.name, arguments)]
            return handler(*arguments)

        return called

    def made_watched(self: PageRequests, *arguments: Any) -> None:
        made(self, *arguments)
        for opcode, kind in self.kinds.items():
            self.kinds[opcode] = kind._replace(handler=recorded(kind))

    def note_watched(self: InFlight, number: int, answer: bytes) -> None:
        note_answer(self, number, answer)
        look(last[0][0], "noted", last[0][1])

    PageRequests.__init__ = made_watched  # type: ignore[method-assign,assignment]
    InFlight.note_answer = note_watched  # type: ignore[method-assign]


class Sides(NamedTuple):
    """Mounts whose daemons are killed, and one mount where the same is done without kills."""

    calm: Mount
    killed: "dict[tuple[str, str], Killed]"
    """By the kind of their store, and the point at which each daemon is killed."""


class Killed(Mount):
    """A mount whose daemons obey orders."""

    def __init__(self, directory: Path, options: str, **more: Any) -> None:
        self.order = directory.parent / f"{directory.name}.order"
        self.done = Path(f"{self.order}.done")
        script = (
            f"import runpy, sys\nsys.argv[0] = {str(MOUNT_PY)!r}\nsys.path.insert(0, {str(MOUNT_PY.parent)!r})\n"
            f"{inspect.getsource(obey)}\nobey({str(self.order)!r})\n"
            f"runpy.run_path({str(MOUNT_PY)!r}, run_name='__main__')\n"
        )
        super().__init__(directory, options, command=(sys.executable, "-W", "error", "-c", script), **more)
        self.expect_restarts()

    def give(self, handler: str, point: str | int, deed: str = "kill", *, holds: Any = None, times: int = 1) -> None:
        """Give an order."""
        assert not self.order.exists()
        text = {"handler": handler, "point": point, "deed": deed, "holds": holds, "times": times}
        new = Path(f"{self.order}.new")
        new.write_text(json.dumps(text))
        new.rename(self.order)

    def deeds(self) -> int:
        """How often an order was obeyed."""
        return len(self.done.read_text().splitlines()) if self.done.exists() else 0

    def calls(self, handler: str) -> int:
        """How often a handler that changes something was called."""
        calls = Path(f"{self.order}.calls")
        return calls.read_text().split().count(handler) if calls.exists() else 0

    @contextlib.contextmanager
    def once(self, handler: str, point: str | int, deed: str = "kill") -> Iterator[None]:
        """Give an order for the time of a ``with``, in which it must be obeyed exactly once."""
        deeds, restarts = self.deeds(), self.restarts()
        self.give(handler, point, deed)
        try:
            yield
            wait_until(lambda: self.deeds() == deeds + 1, f"a kill in {handler}")
            wait_until(lambda: self.restarts() == restarts + 1, "another daemon")
        finally:
            self.order.unlink(missing_ok=True)


def outcome(do: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What a call returns, or the name of its errno."""
    try:
        return do(*arguments, **more)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def picture(mnt: Path) -> dict[str, Any]:
    """All that can be seen of a mount, except times."""
    room = os.statvfs(mnt)
    seen: dict[str, Any] = {"df": (room.f_blocks, room.f_bfree, room.f_files, room.f_ffree)}
    seen["root"] = sorted(names(mnt)), mnt.stat().st_nlink, attribute(mnt, "size")
    for backup in map(mnt.joinpath, names(mnt)):
        found = backup.stat()
        seen[backup.name] = found.st_mode, found.st_uid, found.st_gid, found.st_nlink
        seen[f"{backup.name} says"] = [attribute(backup, name) for name in ("size", "pages", "map")]
        for page in map(backup.joinpath, names(backup)):
            about = page.stat()
            seen[f"{backup.name}/{page.name}"] = (
                about.st_mode,
                about.st_size,
                about.st_uid,
                zlib.crc32(page.read_bytes()),
            )
        seen[f"{backup.name}/.image"] = zlib.crc32((backup / ".image").read_bytes())
    return seen


def clear(mnt: Path) -> None:
    """Empty a mount."""
    for backup in map(mnt.joinpath, names(mnt)):
        os.truncate(backup / ".image", 0)
        backup.rmdir()


def content(seed: int, pages: int = 1) -> bytes:
    return b"".join((seed * 1000 + page).to_bytes(8, "little") * (PAGE // 8) for page in range(pages))


# --- what is done ---

Go = Callable[[Callable[[], Any]], Any]
"""Does the one thing in question, with a kill in it or without, and gives its outcome."""


def renameat2(old: Path, new: Path, flags: int) -> None:
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def close(fd: Any) -> Any:
    """Close a descriptor, whose number is then an outcome like any other."""
    if isinstance(fd, int):
        os.close(fd)
        return "opened"
    return fd


def through(path: Path, go: Go, do: Callable[[int], Any], flags: int = 0) -> Any:
    """Do something with a descriptor, and check that it works afterwards."""
    with opened(path, os.O_RDWR | flags) as fd:
        told = go(lambda: do(fd))
        told = len(told) if isinstance(told, bytes) and len(told) > PAGE else told
        return told, zlib.crc32(os.pread(fd, 8 * PAGE, 0)), os.fstat(fd).st_size, outcome(os.pwrite, fd, b"on", 7)


def fill(a: Path, pages: int) -> None:
    """Leave room for a number of pages."""
    other = a.parent / "other"
    other.mkdir()
    set_attribute(other, "size", BUDGET * PAGE)
    free = BUDGET - count(a, "pages") - pages
    with opened(other / ".image") as image:
        assert os.pwrite(image, content(9, free), 0) == free * PAGE


def write_to_the_last_page(a: Path, go: Go, *, free: int, asked: int, room_at: int = 20) -> Any:
    fill(a, free)
    with opened(a / ".image") as image:
        return go(lambda: os.pwrite(image, content(5, asked), room_at * PAGE))


def create_in_the_last_page(a: Path, go: Go) -> Any:
    fill(a, 1)
    return go(lambda: close(os.open(a / "20", os.O_RDWR | os.O_CREAT | os.O_EXCL)))


def utime(a: Path, go: Go) -> Any:
    return go(lambda: os.utime(a, ns=(10**18 + 1, 10**18 + 2))), a.stat().st_atime_ns, a.stat().st_mtime_ns


def budget(a: Path, go: Go) -> Any:
    mnt = a.parent
    told = go(lambda: set_attribute(mnt, "size", 100 * PAGE)), attribute(mnt, "size"), os.statvfs(mnt).f_blocks
    set_attribute(mnt, "size", BUDGET * PAGE)
    return told


def rename(a: Path, go: Go, *, over: bool = False, flags: int = 0) -> Any:
    """Rename a backup. Its open files stay open."""
    new = a.parent / "new"
    if over:
        new.mkdir()
    with opened(a / "1") as fd:
        told = go(lambda: renameat2(a, new, flags))
        return told, zlib.crc32(os.pread(fd, PAGE, 0)), os.pwrite(fd, b"y", 0)


def rename_over_pages(a: Path, go: Go) -> Any:
    (a.parent / "new").mkdir()
    (a.parent / "new" / "2").touch()
    return go(lambda: os.rename(a, a.parent / "new"))


def remove_backup(a: Path, go: Go) -> Any:
    os.truncate(a / ".image", 0)
    return go(a.rmdir)


def dropped_by_hand(a: Path, go: Go) -> Any:
    """Drop a page while a descriptor of it is open: it is stale, and then refers to the next page."""
    with opened(a / "2") as fd:
        told = go((a / "2").unlink), outcome(os.fstat, fd), outcome(os.pread, fd, 1, 0)
        (a / "2").touch()
        return told, os.pread(fd, 1, 0)


Scenario = Callable[[Path, Go], Any]

COUNTED: dict[str, tuple[str, Scenario]] = {
    "mkdir": ("mkdir", lambda a, go: go(lambda: (a.parent / "b").mkdir(0o2750))),
    "rmdir": ("rmdir", remove_backup),
    "rename": ("rename", rename),
    "rename with RENAME_NOREPLACE": ("rename", lambda a, go: rename(a, go, flags=1)),
    "rename onto an empty backup": ("rename", lambda a, go: rename(a, go, over=True)),
    "create": ("create", lambda a, go: go(lambda: close(os.open(a / "9", os.O_RDWR | os.O_CREAT)))),
    "create with O_EXCL": (
        "create", lambda a, go: go(lambda: close(os.open(a / "9", os.O_RDWR | os.O_CREAT | os.O_EXCL)))
    ),
    "create in the last room": ("create", create_in_the_last_page),
    "mknod": ("mknod", lambda a, go: go(lambda: os.mknod(a / "9", stat.S_IFREG | 0o600))),
    "write of the last room": ("write", lambda a, go: write_to_the_last_page(a, go, free=6, asked=6)),
    "write of more than the last room": ("write", lambda a, go: write_to_the_last_page(a, go, free=6, asked=9)),
    "write over pages into the last room": (
        "write", lambda a, go: write_to_the_last_page(a, go, free=6, asked=20, room_at=0)
    ),
    "truncate of the image": ("setattr", lambda a, go: go(lambda: os.truncate(a / ".image", PAGE + 50))),
    "punch of the image": (
        "fallocate", lambda a, go: through(a / ".image", go, lambda fd: fallocate(fd, 3, 2 * PAGE + 9, 3 * PAGE))
    ),
    "fallocate of the last room": (
        "fallocate", lambda a, go: through(a / ".image", go, lambda fd: fallocate(fd, 0, 20 * PAGE, 9 * PAGE))
    ),
    "unlink": ("unlink", dropped_by_hand),
    "size of all": ("setxattr", budget),
    "drop of handles": ("setxattr", lambda a, go: go(lambda: set_attribute(a, "drop", "2-4,6"))),
}  # fmt: skip
"""What changes names, or how many pages there are: the kernel counts them in a tmpfs, the daemon in a directory."""

CHANGES: dict[str, tuple[str, Scenario]] = {
    "O_TRUNC": ("setattr", lambda a, go: go(lambda: close(os.open(a / "2", os.O_RDWR | os.O_TRUNC)))),
    "write": ("write", lambda a, go: through(a / "2", go, lambda fd: os.pwrite(fd, content(7), 0))),
    "write of a part": ("write", lambda a, go: through(a / "2", go, lambda fd: os.pwrite(fd, b"part", 100))),
    "write past a page's end": (
        "write", lambda a, go: through(a / "2", go, lambda fd: os.pwrite(fd, b"12345", PAGE - 2))
    ),
    "write with O_SYNC": (
        "write", lambda a, go: through(a / "2", go, lambda fd: os.pwrite(fd, content(7), 0), os.O_SYNC)
    ),
    "write with O_APPEND": ("write", lambda a, go: through(a / "2", go, lambda fd: os.write(fd, b"12"), os.O_APPEND)),
    "write of the image": (
        "write", lambda a, go: through(a / ".image", go, lambda fd: os.pwrite(fd, content(7, 50), 3 * PAGE + 5))
    ),
    "write past the image's end": (
        "write", lambda a, go: through(a / ".image", go, lambda fd: os.pwrite(fd, content(7, 9), (PAGES - 3) * PAGE))
    ),
    "ftruncate of a page": ("setattr", lambda a, go: through(a / "2", go, lambda fd: os.ftruncate(fd, 99))),
    "chmod": ("setattr", lambda a, go: go(lambda: a.chmod(0o710))),
    "chown": ("setattr", lambda a, go: go(lambda: os.chown(a, 12, 34))),
    "utime": ("setattr", utime),
    "size of a backup": ("setxattr", lambda a, go: go(lambda: set_attribute(a, "size", 99 * PAGE))),
    "fsync of a page": ("fsync", lambda a, go: through(a / "2", go, os.fsync)),
    "fsync of the image": ("fsync", lambda a, go: through(a / ".image", go, os.fdatasync)),
}  # fmt: skip

LOOKS: dict[str, tuple[str, Scenario]] = {
    "lookup": ("lookup", lambda a, go: go((a / "2").exists)),
    "lookup of nothing": ("lookup", lambda a, go: go((a / "20").exists)),
    "getattr": ("getattr", lambda a, go: through(a / ".image", go, lambda fd: os.fstat(fd).st_size)),
    "open": ("open", lambda a, go: go(lambda: close(os.open(a / "2", os.O_RDWR)))),
    "read": ("read", lambda a, go: through(a / "2", go, lambda fd: os.pread(fd, PAGE, 0))),
    "read of the image": ("read", lambda a, go: through(a / ".image", go, lambda fd: os.pread(fd, PAGES * PAGE, 0))),
    "opendir": ("opendir", lambda a, go: go(lambda: os.listdir(a))),
    "readdir": ("readdir", lambda a, go: go(lambda: os.listdir(a))),
    "readdir of the root": ("readdir", lambda a, go: go(lambda: os.listdir(a.parent))),
    "statfs": ("statfs", lambda a, go: go(lambda: os.statvfs(a).f_blocks)),
    "getxattr": ("getxattr", lambda a, go: go(lambda: attribute(a, "map"))),
    "listxattr": ("listxattr", lambda a, go: go(lambda: os.listxattr(a))),
    "open of the memory": ("open", lambda a, go: go(lambda: close(os.open(a / ".shmem", os.O_RDWR)))),
    "lseek": ("lseek", lambda a, go: through(a / ".image", go, lambda fd: os.lseek(fd, 0, os.SEEK_HOLE))),
    "fsync of a directory": ("fsyncdir", lambda a, go: through_directory(a, go)),
}  # fmt: skip


def through_directory(a: Path, go: Go) -> Any:
    with opened(a, os.O_RDONLY | os.O_DIRECTORY) as fd:
        return go(lambda: os.fsync(fd)), len(os.listdir(fd))


def no_room(a: Path, go: Go) -> Any:
    fill(a, 0)
    with opened(a / ".image") as image:
        return go(lambda: os.pwrite(image, content(5), 20 * PAGE))


def create_without_room(a: Path, go: Go) -> Any:
    fill(a, 0)
    return go((a / "20").touch)


def read_what_was_dropped(a: Path, go: Go) -> Any:
    with opened(a / "2") as fd:
        (a / "2").unlink()
        return go(lambda: os.pread(fd, 1, 0))


REFUSED: dict[str, tuple[str, str, Scenario]] = {
    "mkdir of what is there": ("EEXIST", "lookup", lambda a, go: go((a.parent / "there").mkdir)),
    "O_EXCL of what is there": (
        "EEXIST", "lookup", lambda a, go: go(lambda: os.open(a / "2", os.O_RDWR | os.O_CREAT | os.O_EXCL))
    ),
    "unlink of what is not": ("ENOENT", "lookup", lambda a, go: go((a / "20").unlink)),
    "rmdir of what is not": ("ENOENT", "lookup", lambda a, go: go((a.parent / "b").rmdir)),
    "rename of what is not": ("ENOENT", "lookup", lambda a, go: go(lambda: (a.parent / "b").rename(a.parent / "c"))),
    "rmdir of a backup with pages": ("ENOTEMPTY", "rmdir", lambda a, go: go(a.rmdir)),
    "rename onto a backup with pages": ("ENOTEMPTY", "rename", rename_over_pages),
    "create past the end": ("EFBIG", "create", lambda a, go: go((a / f"{PAGES + 1}").touch)),
    "create of no handle": ("EINVAL", "create", lambda a, go: go((a / "01").touch)),
    "truncate past the end": ("EFBIG", "setattr", lambda a, go: go(lambda: os.truncate(a / "2", PAGE + 1))),
    "write without room": ("ENOSPC", "write", no_room),
    "create without room": ("ENOSPC", "create", create_without_room),
    "unlink of the image": ("EPERM", "unlink", lambda a, go: go((a / ".image").unlink)),
    "mkdir in a backup": ("EPERM", "mkdir", lambda a, go: go((a / "20").mkdir)),
    "chown of a page": ("EPERM", "setattr", lambda a, go: go(lambda: os.chown(a / "2", 12, 34))),
    "drop past the end": ("EINVAL", "setxattr", lambda a, go: go(lambda: set_attribute(a, "drop", "1-9999"))),
    "read of what was dropped": ("ESTALE", "read", read_what_was_dropped),
}  # fmt: skip


# --- the same with and without ---

TMPFS, DIRECTORY = ("tmpfs", "after"), ("directory", "after")
"""On which store, and at which point, the daemon is killed."""

EACH_HANDLER = (
    "mkdir", "rmdir", "rename", "create", "mknod", "write", "unlink", "truncate of the image", "chmod",
    "drop of handles", "size of a backup", "fsync of a page",
)  # fmt: skip
"""Scenarios for all handlers that change anything, and for both ways of dropping pages in bulk."""


@pytest.fixture(scope="module")
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    """A mount without kills, and one for each kind of store and point of a kill."""
    directory = tmp_path_factory.mktemp("sides")
    options = f"size={BUDGET * PAGE},backup_size={PAGES * PAGE},nr_inodes=20,busy_poll=50"

    def made(name: str) -> Path:
        (directory / name).mkdir()
        return directory / name

    with contextlib.ExitStack() as stack:
        killed = {}
        for number, (kind, point) in enumerate(request.param):
            store = f",store={made(f'store{number}')}" if kind == "directory" else ""
            killed[kind, point] = stack.enter_context(Killed(made(f"{kind}-{point}"), options + store))
        yield Sides(stack.enter_context(Mount(made("calm"), options)), killed)


def play(mount: Mount, scenario: Scenario, kill: Callable[[], contextlib.AbstractContextManager[None]]) -> Any:
    """What a scenario's callers get on a mount, and what is visible on it afterwards."""

    def go(do: Callable[[], Any]) -> Any:
        with kill():
            return outcome(do)

    mount.watch_anew()
    try:
        for name in "a", "there":
            (mount.path / name).mkdir()
        with opened(mount.path / "a" / ".image") as image:
            assert os.pwrite(image, content(1, 8), 0) == 8 * PAGE
        told = scenario(mount.path / "a", go)
        return told, picture(mount.path)
    finally:
        clear(mount.path)


def compare(sides: Sides, handler: str, scenario: Scenario) -> Any:
    """Play a scenario on all mounts and check that they agree. Returns what the callers got."""
    told, seen = play(sides.calm, scenario, contextlib.nullcontext)
    with ThreadPoolExecutor() as pool:
        plays = {
            where: pool.submit(play, mount, scenario, functools.partial(mount.once, handler, where[1]))
            for where, mount in sides.killed.items()
        }
    for where, other in plays.items():
        assert other.result()[0] == told, where
        assert other.result()[1] == seen, where
    room = picture(sides.calm.path)["df"]
    assert {where: picture(mount.path)["df"] for where, mount in sides.killed.items()} == dict.fromkeys(plays, room)
    return told


@pytest.mark.parametrize("sides", [(TMPFS, DIRECTORY)], ids=[""], indirect=True)
@pytest.mark.parametrize("name", COUNTED)
def test_c22_a_kill_repeats_no_change_of_names_or_page_counts(sides: Sides, name: str) -> None:
    compare(sides, *COUNTED[name])


@pytest.mark.parametrize("sides", [(TMPFS,)], ids=[""], indirect=True)
@pytest.mark.parametrize("name", CHANGES)
def test_c22_a_kill_repeats_no_change_of_contents_or_attributes(sides: Sides, name: str) -> None:
    compare(sides, *CHANGES[name])


@pytest.mark.parametrize("sides", [(("tmpfs", "before"), ("tmpfs", "answered"))], ids=[""], indirect=True)
@pytest.mark.parametrize("name", EACH_HANDLER)
def test_c22_a_kill_outside_a_handler_repeats_no_change_and_loses_none(sides: Sides, name: str) -> None:
    """Before the handler runs, and after the kernel has the answer, the arguments do not matter."""
    compare(sides, *(COUNTED | CHANGES)[name])


@pytest.mark.parametrize("sides", [(("tmpfs", "noted"), ("directory", "noted"))], ids=[""], indirect=True)
@pytest.mark.parametrize("name", [name for name in EACH_HANDLER if name != "fsync of a page"])
def test_c22_a_request_whose_answer_is_noted_is_answered_and_not_carried_out_again(sides: Sides, name: str) -> None:
    handler, scenario = (COUNTED | CHANGES)[name]
    told, seen = play(sides.calm, scenario, contextlib.nullcontext)
    for (_, point), mount in sides.killed.items():
        calls = list[int]()

        @contextlib.contextmanager
        def kill(mount: Killed = mount, point: str = point, calls: list[int] = calls) -> Iterator[None]:
            before = mount.calls(handler)
            with mount.once(handler, point):
                yield
            calls.append(mount.calls(handler) - before)

        assert play(mount, scenario, kill) == (told, seen)
        assert calls == [1]


@pytest.mark.parametrize("sides", [(TMPFS,)], ids=[""], indirect=True)
@pytest.mark.parametrize("name", LOOKS)
def test_c22_a_kill_during_a_request_that_only_reads_changes_no_answer(sides: Sides, name: str) -> None:
    compare(sides, *LOOKS[name])


@pytest.mark.parametrize("sides", [(DIRECTORY,)], ids=[""], indirect=True)
@pytest.mark.parametrize("name", REFUSED)
def test_c22_a_kill_during_a_refused_request_changes_no_errno(sides: Sides, name: str) -> None:
    number, handler, scenario = REFUSED[name]
    assert compare(sides, handler, scenario) == number


BETWEEN = "mkdir", "rename onto an empty backup", "write of more than the last room"
EVERY = int(os.environ.get("TTMFS_TEST_EVERY_CALL", "9"))
"""At every so manieth system call of an operation."""


@pytest.mark.parametrize("sides", [(("tmpfs", ""), ("directory", ""))], ids=[""], indirect=True)
@pytest.mark.parametrize("name", [*COUNTED, *CHANGES] if EVERY == 1 else BETWEEN)
def test_c22_a_kill_between_two_system_calls_of_a_change_alters_no_result(sides: Sides, name: str) -> None:
    handler, scenario = (COUNTED | CHANGES)[name]
    expected = play(sides.calm, scenario, contextlib.nullcontext)
    with ThreadPoolExecutor() as pool:
        for kills in pool.map(lambda mount: sweep(mount, handler, scenario, expected), sides.killed.values()):
            assert kills


def sweep(mount: Killed, handler: str, scenario: Scenario, expected: Any) -> int:
    """Kill the daemon at one system call after the other until none is left. Returns the number of kills."""
    for call in itertools.count(2, EVERY):
        deeds = mount.deeds()

        @contextlib.contextmanager
        def kill(call: int = call) -> Iterator[None]:
            mount.give(handler, call)
            try:
                yield
            finally:
                mount.order.unlink(missing_ok=True)

        assert play(mount, scenario, kill) == expected, call
        if mount.deeds() == deeds:
            return call // EVERY
    raise AssertionError


# --- two at once, and listings under way ---


RACES: dict[str, tuple[str, str, Callable[[Path, int], Any]]] = {
    "mkdir": ("mkdir", "EEXIST", lambda mnt, _: (mnt / "new").mkdir()),
    "create with O_EXCL": (
        "create", "EEXIST", lambda mnt, _: close(os.open(mnt / "a/9", os.O_RDWR | os.O_CREAT | os.O_EXCL))
    ),
    "rename with RENAME_NOREPLACE": ("rename", "EEXIST", lambda mnt, who: renameat2(mnt / f"b{who}", mnt / "new", 1)),
    "rename of one": ("rename", "ENOENT", lambda mnt, who: os.rename(mnt / "b0", mnt / f"new{who}")),
    "unlink": ("unlink", "ENOENT", lambda mnt, _: (mnt / "a/1").unlink()),
    "rmdir": ("rmdir", "ENOENT", lambda mnt, _: (mnt / "b0").rmdir()),
}  # fmt: skip


def test_c22_one_of_two_callers_that_race_for_a_name_wins(mountpoint: Path) -> None:
    """Both requests are there when the daemon, having made the first one's change, is killed."""
    with Killed(mountpoint, "size=1m,busy_poll=50") as mount, ThreadPoolExecutor(2) as pool:
        for name, (handler, loses, act) in RACES.items():
            for backup in "a", "b0", "b1":
                (mountpoint / backup).mkdir()
            (mountpoint / "a/1").touch()
            with mount.once(handler, "after"):
                told = list(pool.map(lambda who, act=act: outcome(act, mountpoint, who), range(2)))
            assert sorted(map(str, told)) in (sorted([loses, str(won)]) for won in (None, "opened")), (name, told)
            clear(mountpoint)


class Directory:
    """A directory read in pieces, as getdents64(2) returns it, up to its end."""

    def __init__(self, path: Path, room: int = 512) -> None:
        self._fd, self._buffer = os.open(path, os.O_RDONLY | os.O_DIRECTORY), ctypes.create_string_buffer(room)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def piece(self) -> list[str]:
        """The next names; an empty list at the end."""
        size = libc.getdents64(self._fd, self._buffer, len(self._buffer))
        assert size >= 0, os.strerror(ctypes.get_errno())
        found, place = [], 0
        while place < size:
            (length,) = struct.unpack_from("<H", self._buffer, place + 16)
            found.append(self._buffer.raw[place + 19 : place + length].partition(b"\0")[0].decode())
            place += length
        return [name for name in found if name not in (".", "..")]


@pytest.mark.parametrize("kind", ["tmpfs", "directory"])
def test_c22_a_listing_across_a_kill_shows_each_name_once(mountpoint: Path, kind: str) -> None:
    """It lists pages with holes between them, and backups. Entries made or removed meanwhile may or may not show."""
    store = mountpoint.parent / "store"
    store.mkdir()
    options = "size=32m,backup_size=16m" + (f",store={store}" if kind == "directory" else "")
    with Mount(mountpoint, options) as mount:
        mount.expect_restarts()
        for number in range(400):
            (mountpoint / f"backup {number}").mkdir()
        a, expected = mountpoint / "backup 7", []
        with opened(a / ".image") as image:
            for idx in range(0, 3000, 500):
                os.pwrite(image, content(1, 499), idx * PAGE)
                expected += [str(idx + n + 1) for n in range(499)]
        for path, names_there in (a, expected), (mountpoint, [f"backup {number}" for number in range(400)]):
            with Directory(path) as directory:
                found, kills = [], 0
                while piece := directory.piece():
                    found += piece
                    if kills < 3 and len(found) > (kills + 1) * len(names_there) // 4:
                        mount.kill()
                        kills += 1
                assert (found, kills) == (names_there, 3)
        with Directory(a) as directory:
            first = directory.piece()
            mount.kill()
            set_attribute(a, "drop", "1000-2000")
            found = first + list(itertools.chain.from_iterable(iter(directory.piece, [])))
            assert found == [name for name in expected if not 1000 <= int(name) <= 2000]


# --- requests that daemons die of ---


def victims(mount: Killed) -> int:
    """How many daemons an order has killed."""
    return len(set(mount.done.read_text().split())) if mount.done.exists() else 0


REFUSES = r"a request for write is refused, because daemons died while they carried it out"
LAST_WORDS = r"the daemon before died: Fatal Python error: "

DEEDS = {"read address 0": (2, "Segmentation fault"), "abort": (2, "Aborted"), "kill": (4, "")}


@pytest.mark.serial
@pytest.mark.parametrize("deed", DEEDS)
def test_a_request_that_kills_daemons_is_refused_and_others_are_served(mountpoint: Path, deed: str) -> None:
    """Two crashes are enough, since they are its own; anyone may send a SIGKILL. A like request is a new one."""
    most, words = DEEDS[deed]
    with Killed(mountpoint, "size=1m,busy_poll=50") as mount, ThreadPoolExecutor(1) as pool:
        mount.expect_log(REFUSES)
        mount.expect_log(LAST_WORDS)
        for backup in "a", "b":
            (mountpoint / backup).mkdir()
        done, rounds = threading.Event(), itertools.count()

        def others() -> int:
            number = 0
            while not done.is_set():
                data = content(number := next(rounds))
                name = mountpoint / "b" / str(1 + number % 9)
                name.write_bytes(data)
                assert name.read_bytes() == data
            return number

        other = pool.submit(others)
        try:
            with opened(mountpoint / "a" / "1", os.O_RDWR | os.O_CREAT) as fd:
                mount.give("write", "before", deed, holds=666, times=0)
                assert outcome(os.pwrite, fd, b"x", 666) == "EIO"
                assert victims(mount) == mount.restarts() == most
                began = next(rounds)
                wait_until(lambda: next(rounds) > began + 50, "others to be served")
                assert os.pwrite(fd, b"y", 667) == 1, "another request for the same page"
                assert os.pread(fd, 3, 665) == b"\0\0y"
                assert len([line for line in mount.log if re.search(REFUSES, line)]) == 1
                told = [line for line in mount.log if re.search(LAST_WORDS, line)]
                assert len(told) == (most if words else 0)
                assert all(words in line for line in told), told
                assert all("in do <" in line for line in told), "and where"
                mount.order.unlink()
                assert os.pwrite(fd, b"x", 666) == 1, "asked again, it is carried out"
                assert os.pread(fd, 3, 665) == b"\0xy"
                assert victims(mount) == most
        finally:
            mount.order.unlink(missing_ok=True)
            done.set()
            assert other.result(20) > 0


def held(mount: Killed) -> Callable[[], bool]:
    """Whether one more daemon than at the call holds on to a request."""
    before = mount.deeds()
    return lambda: mount.deeds() > before


@pytest.mark.serial
def test_c22_a_request_in_flight_at_each_of_several_kills_is_carried_out(mountpoint: Path) -> None:
    """One request meets three daemons without an answer; another is asked six times, and answered each time."""
    with Killed(mountpoint, "size=1m,busy_poll=50") as mount, ThreadPoolExecutor(1) as pool:
        (mountpoint / "a").mkdir()
        with opened(mountpoint / "a" / "1", os.O_RDWR | os.O_CREAT) as fd:
            for kills in 3, 1, 1, 1, 1, 1, 1:
                is_held = held(mount)
                mount.give("write", "before", "hold")
                told = pool.submit(outcome, os.pwrite, fd, content(kills), 0)
                for left in reversed(range(kills)):
                    wait_until(is_held, "a daemon to hold on to it")
                    if left:
                        mount.give("write", "before", "hold")
                    is_held = held(mount)
                    mount.kill()
                assert told.result(20) == PAGE
                assert os.pread(fd, PAGE, 0) == content(kills)
        assert mount.restarts() == 9


def test_c22_a_kill_loses_neither_a_waiting_request_nor_one_in_flight(mountpoint: Path) -> None:
    """An fsync on a disk and a write of another client are noted at once when the daemon is killed."""
    store = mountpoint.parent / "store"
    store.mkdir()
    with (
        Killed(mountpoint, f"size=1m,busy_poll=50,store={store}") as mount,
        contextlib.ExitStack() as stack,
        ThreadPoolExecutor(8) as pool,
    ):
        (mountpoint / "a").mkdir()
        paths = [mountpoint / "a" / str(handle) for handle in range(1, 8)]
        files = [stack.enter_context(opened(path, os.O_RDWR | os.O_CREAT)) for path in paths]
        for number in range(3):
            is_held = held(mount)
            mount.give("write", "before", "hold", holds=1)
            syncs = []
            for fd in files[1:]:
                os.pwrite(fd, content(number), 0)
                syncs.append(pool.submit(outcome, os.fsync, fd))
            write = pool.submit(outcome, os.pwrite, files[0], content(number)[1:], 1)
            wait_until(is_held, "a daemon to hold on to the write")
            mount.kill()
            assert [sync.result(20) for sync in syncs] == [None] * 6
            assert write.result(20) == PAGE - 1
            assert [os.pread(fd, PAGE, 0)[1:] for fd in files] == [content(number)[1:]] * 7


@pytest.mark.serial
def test_a_request_is_refused_after_two_oom_kills_of_the_daemon(mountpoint: Path) -> None:
    """A kill by the kernel for lack of memory counts as a crash, unlike a kill by another process."""
    with (
        ControlGroup(160 << 20, 0) as group,
        Killed(mountpoint, "size=1m,busy_poll=50,reserve=0", preexec_fn=group.join) as mount,
    ):
        mount.expect_log(REFUSES)
        (mountpoint / "a").mkdir()
        with opened(mountpoint / "a" / "1", os.O_RDWR | os.O_CREAT) as fd:
            os.pwrite(fd, b"before", 0)
            mount.give("write", "before", "eat", holds=666, times=0)
            try:
                assert outcome(os.pwrite, fd, b"x", 666) == "EIO"
            finally:
                mount.order.unlink()
            assert victims(mount) == 2 == group.oom_kills()
            assert os.pread(fd, 7, 0) == b"before\0"
            assert os.pwrite(fd, b"y", 667) == 1
        assert len([line for line in mount.log if re.search(REFUSES, line)]) == 1


FAR = 16 << 20
"""Bytes apart: pages so far from each other are dropped one by one, and others are served in between."""


@pytest.mark.parametrize("way", ["truncate", "drop"])
def test_c22_a_repeated_bulk_drop_keeps_pages_stored_since(mountpoint: Path, way: str) -> None:
    pages = 50_000
    with Mount(mountpoint, "size=2g") as mount:
        mount.expect_restarts()
        (mountpoint / "a").mkdir()
        set_attribute(mountpoint / "a", "size", pages * FAR)
        with opened(mountpoint / "a/.shmem") as file:
            for number in range(pages):
                os.pwrite(file, b"x", number * FAR)
        # Truncating locks the file, and setting an attribute the directory: others take the other way.
        command, other = {
            "truncate": (f"truncate -s 0 {mountpoint}/a/.image", "1"),
            "drop": (f"setfattr -n user.ttmfs.drop -v 1-{pages * FAR // PAGE} {mountpoint}/a", ".image"),
        }[way]
        first = mountpoint / "a" / other

        def dropped() -> bool:
            try:
                with opened(first, os.O_RDONLY) as fd:  # which asks the daemon; a name may be known for a second
                    return os.pread(fd, 1, 0) == b"\0"
            except OSError as error:
                return error.errno in (errno.ENOENT, errno.ESTALE)

        assert not dropped()  # and its name is known now: a locked directory lets no one look names up
        with subprocess.Popen(["bash", "-c", command]) as dropping:
            while not dropped():  # without a pause: it does not take long
                assert dropping.poll() is None, "it ended, and dropped nothing"
            with opened(first, os.O_WRONLY | (other == "1" and os.O_CREAT)) as fd:  # which locks the directory too
                os.pwrite(fd, b"stored anew".ljust(PAGE), 0)
            assert dropping.poll() is None, "it was too fast"
            mount.kill()
            assert dropping.wait(60) == 0
        assert (mountpoint / "a/1").read_bytes() == b"stored anew".ljust(PAGE)
        assert count(mountpoint / "a", "pages") == 1
        assert mount.restarts() == 1
