"""Stores of every kind, swap, slow disks and control groups for tests. Each is removed at the end of its ``with``.

A :class:`Site` makes mounts with one kind of store. Mounts of other users are made here too.
"""

import contextlib
import ctypes
import os
import platform
import secrets
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from ceph import Ceph, Client
from harness import MOUNT_PY, REPOSITORY, Mount, mounts_below, run, wait_until
from ttmfs.options import Options
from ttmfs.stores import make_store
from ttmfs.stores.store import Store

KINDS = ("tmpfs", "user", "fallback", "dir-tmpfs", "dir-ext4", "dir-xfs", "dir-btrfs", "dir-ceph")
"""A private tmpfs of root, a private tmpfs of a user, a user without user namespaces, ``store=DIR`` on filesystems."""

FUSE = Path("/dev/fuse")
CGROUP = Path("/sys/fs/cgroup")
ZRAM = Path("/sys/class/zram-control")

UNSHARE, SETRESUID, SETRESGID = {"x86_64": (272, 117, 119), "aarch64": (97, 147, 149)}[platform.machine()]
PR_SET_KEEPCAPS = 8
CAPABILITIES = struct.pack("Ii", 0x20080522, 0)  # a cap_user_header_t, of version 3 and this thread

_libc = ctypes.CDLL(None, use_errno=True)


# --- other users ---

ALICE, BOB, CAROL = 65534, 65533, 65532
"""Unprivileged users. They need no entry in /etc/passwd."""


def as_user(uid: int, **more: Any) -> dict[str, Any]:
    """Arguments of subprocess that run a command as a user, in one group with the same number."""
    return {"user": uid, "group": uid, "extra_groups": [], **more}


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Make this thread, and the processes that it starts, an unprivileged user.

    A user's mount is closed to everyone else, root included, and the kernel checks all three user ids. So all three
    change, in this thread only. The thread keeps the capability to become root again, but not in effect.
    """
    before = ctypes.create_string_buffer(24)
    _check(_libc.capget(CAPABILITIES, before))
    _check(_libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
    try:
        for number in SETRESGID, SETRESUID:
            _check(_libc.syscall(number, uid, uid, uid))
        yield
    finally:
        _check(_libc.capset(CAPABILITIES, before))
        for number in SETRESUID, SETRESGID:
            _check(_libc.syscall(number, 0, 0, 0))
        _check(_libc.prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Place:
    """A directory that every user can reach. It has bind mounts of ttmfs and of its Python.

    Until its end every user may open /dev/fuse, as on most systems. Only this mount namespace sees that, because other
    tests run at the same time.
    """

    def __enter__(self) -> Self:
        self.path = Path(tempfile.mkdtemp(prefix="ttmfs-users-"))
        self.path.chmod(0o755)
        self._bound: list[Path] = []
        try:
            self._open_fuse()
            repository, prefix = self._bind(REPOSITORY, "repository"), Path(sys.prefix)
            if prefix.is_relative_to(REPOSITORY):
                prefix = repository / prefix.relative_to(REPOSITORY)
            elif prefix != Path(sys.base_prefix):
                prefix = self._bind(prefix, "prefix")
        except BaseException:
            self.__exit__()
            raise
        self.python = str(prefix / Path(sys.executable).relative_to(sys.prefix))
        self.mount_command = (self.python, "-W", "error", str(repository / MOUNT_PY.name))
        self.command = shlex.join(self.mount_command)
        return self

    def __exit__(self, *_: object) -> None:
        for path in reversed(self._bound):
            run(f"umount {path}")
        self._device.unlink(missing_ok=True)
        shutil.rmtree(self.path)

    def _open_fuse(self) -> None:
        self._device = Path(f"{FUSE}-{self.path.name}")  # in /dev: other directories may be mounted with nodev
        os.mknod(self._device, stat.S_IFCHR, FUSE.stat().st_rdev)
        self._device.chmod(0o666)
        run(f"mount --bind {self._device} {FUSE}")
        self._bound.append(FUSE)

    def _bind(self, source: Path, name: str) -> Path:
        (self.path / name).mkdir()
        run(f"mount --bind -o ro {shlex.quote(str(source))} {self.path / name}")
        self._bound.append(self.path / name)
        return self.path / name

    @contextlib.contextmanager
    def directory(self, name: str, owner: int = 0) -> Iterator[Path]:
        """An empty directory of a user. It must be empty again at the end."""
        path = self.path / name
        path.mkdir()
        os.chown(path, owner, owner)
        try:
            yield path
        finally:
            left = mounts_below(path)
            for mount in left:  # a failed test left it, and the next test needs the place
                run(f"umount -l {mount}")
            path.rmdir()
        assert not left


class UsersMount(Mount):
    """A mount of ttmfs by Alice, for herself."""

    def __init__(self, place: Place, directory: Path, options: str) -> None:
        super().__init__(directory, options, command=place.mount_command, **as_user(ALICE, cwd=place.path))


WITHOUT_USER_NAMESPACES = """
import ctypes, os, struct, sys
unshare, user, cwd = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
NUMBER, FIRST_ARGUMENT = 0, 16  # offsets in struct seccomp_data
CLONE_NEWUSER, EPERM, DENY, ALLOW = 0x10000000, 1, 0x00050000, 0x7FFF0000
rules = ((LOAD, 0, 0, NUMBER), (EQUAL, 0, 3, unshare), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, CLONE_NEWUSER),
         (RETURN, 0, 0, DENY | EPERM), (RETURN, 0, 0, ALLOW))
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
if ctypes.CDLL(None).prctl(22, 2, struct.pack("H6xQ", len(rules), ctypes.addressof(code))):  # PR_SET_SECCOMP
    sys.exit("no filter")
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
os.chdir(cwd)
os.execv(sys.argv[4], sys.argv[4:])
"""
"""Runs a command as a user who may not make user namespaces. A seccomp filter forbids them, as container runtimes do.
(max_user_namespaces could forbid them to one process only inside a user namespace, where nobody else sees its mounts.)
Root installs the filter, so fusermount3 keeps its set-id bit."""


# --- stores ---


@contextlib.contextmanager
def mounted(path: Path, kind: str, options: str = "", source: str = "none") -> Iterator[Path]:
    """Mount a filesystem on a new directory. The end unmounts it, even if it is in use."""
    path.mkdir()
    run(f"mount -t {kind} {'-o ' + options if options else ''} {shlex.quote(source)} {shlex.quote(str(path))}")
    try:
        yield path
    finally:

        def unmount() -> bool:  # a daemon that has just ended may still use it
            return not subprocess.run(["umount", path], capture_output=True, check=False).returncode

        try:
            wait_until(unmount, f"{path} to be in use no more", 5)
        except AssertionError:
            run(f"umount -l {shlex.quote(str(path))}")
            raise
        finally:
            path.rmdir()


@contextlib.contextmanager
def filesystem(path: Path, kind: str, size: int = 320 << 20, *, options: str = "") -> Iterator[Path]:
    """Mount a new filesystem on a new directory: a tmpfs, or one that ``mkfs`` makes in a sparse image beside it.

    xfs needs 300 MiB at least. ext4 would choose smaller blocks than usual for a filesystem of this size.
    """
    if kind == "tmpfs":
        with mounted(path, kind, f"size={size}"):
            yield path
        return
    image = path.with_name(f"{path.name}.{kind}")
    with image.open("xb") as file:
        file.truncate(size)
    run(f"mkfs.{kind} -q {'-b 4096' if kind == 'ext4' else ''} {options} {shlex.quote(str(image))}")
    try:
        with mounted(path, kind, "loop", str(image)):
            yield path
    finally:
        image.unlink()


class Site:
    """Makes mounts with one kind of store. Each mount has a store of its own.

    Alice owns the mounts of kinds "user" and "fallback". :meth:`acting` makes a test the user who can use them.
    """

    def __init__(self, kind: str, place: Place, mountpoints: Path, stores: Path | None) -> None:
        self.kind = kind
        self.uid = ALICE if kind in ("user", "fallback") else os.geteuid()
        self.kernel_keeps_the_budget = kind in ("tmpfs", "user")
        self.on_disk = kind in ("dir-ext4", "dir-xfs", "dir-btrfs", "dir-ceph")
        self.tells_holes = kind != "dir-ceph"
        """Whether the filesystem of the store tells holes, so that there is a ``.shmem``."""
        self._place, self._mountpoints, self._stores = place, mountpoints, stores
        self._count = 0

    def options(self, text: str) -> str:
        """The argument of ``-o`` for these options and a new store of the kind."""
        if self._stores is None or self.uid == ALICE:
            return text
        self._count += 1
        directory = self._stores / f"store-{self._count}"
        directory.mkdir()
        return f"store={directory},{text}"

    @contextlib.contextmanager
    def mount(self, options: str) -> Iterator[Mount]:
        """A mount with a store of the kind, made by the user of the site."""
        self._count += 1
        path = self._mountpoints / f"mnt-{self._count}"
        path.mkdir()
        os.chown(path, self.uid, self.uid)
        try:
            with self._mount(path, self.options(options)) as mount:
                assert self.kind != "fallback" or os.listdir(self._stores), "it needed no other store"
                yield mount
        finally:
            path.rmdir()

    def _mount(self, path: Path, options: str) -> Mount:
        if self.kind == "user":
            return UsersMount(self._place, path, options)
        if self.kind == "fallback":
            become = (self._place.python, "-I", "-c", WITHOUT_USER_NAMESPACES, UNSHARE, ALICE, self._place.path)
            command = (*map(str, become), *self._place.mount_command)
            return Mount(path, options, command=command, env={**os.environ, "XDG_RUNTIME_DIR": str(self._stores)})
        return Mount(path, options)

    @contextlib.contextmanager
    def store(self, options: str) -> Iterator[tuple[Store, Options]]:
        """A store of the kind for the model layer, without a mount. It belongs to this process, which is root's."""
        parsed = Options.parse(self.options(options))
        with contextlib.closing(make_store(parsed)) as store:
            yield store, parsed

    def acting(self) -> AbstractContextManager[None]:
        """Make this thread the user who owns the mounts."""
        return acting_as(self.uid) if self.uid != os.geteuid() else contextlib.nullcontext()


@contextlib.contextmanager
def site_of(kind: str, place: Place, base: Path) -> Iterator[Site]:
    """A site of one of the KINDS. `base` is an empty directory of root."""
    if kind == "tmpfs":
        yield Site(kind, place, base, None)
    elif kind == "user":
        with place.directory("mounts") as mountpoints:
            yield Site(kind, place, mountpoints, None)
    elif kind == "fallback":
        # ttmfs takes the larger of this and /dev/shm.
        room = mounted(place.path / "runtime", "tmpfs", f"size=100t,mode=0700,uid={ALICE},gid={ALICE}")
        with place.directory("mounts") as mountpoints, room as stores:
            yield Site(kind, place, mountpoints, stores)
            assert not os.listdir(stores), "a store stayed"
    elif kind == "dir-ceph":
        with Ceph() as ceph, Client(ceph, base / "filesystem") as client:
            yield Site(kind, place, base, client.path)
    else:
        with filesystem(base / "filesystem", kind.removeprefix("dir-")) as stores:
            yield Site(kind, place, base, stores)


# --- swap ---


@contextlib.contextmanager
def _swapping(device: str) -> Iterator[None]:
    """Swap to a device, with a higher priority than any other."""
    run(f"mkswap {device} && swapon -p 32000 {device}")
    try:
        yield
    finally:
        run(f"swapoff {device}")


@contextlib.contextmanager
def _loop(directory: Path, size: int) -> Iterator[str]:
    """A loop device with a new file in a directory."""
    file = directory / "swap"
    with file.open("xb") as new:
        new.truncate(size)
    file.chmod(0o600)
    device = run(f"losetup -f --show {shlex.quote(str(file))}").strip()
    try:
        yield device
    finally:
        run(f"losetup -d {device}")
        file.unlink()


@contextlib.contextmanager
def swap(directory: Path, size: int = 256 << 20, *, takes: int = 0) -> Iterator[None]:
    """New swap: a zram device if the kernel has zram, else a file in a directory.

    `takes` limits the memory of the zram device in bytes. 0 means no limit.
    """
    if not ZRAM.is_dir():
        with _loop(directory, size) as device, _swapping(device):
            yield
        return
    number = (ZRAM / "hot_add").read_text().strip()

    def removed() -> bool:
        with contextlib.suppress(OSError):  # another process has it open
            (ZRAM / "hot_remove").write_text(number)
        return not Path(f"/sys/block/zram{number}").exists()

    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        Path(f"/sys/block/zram{number}/mem_limit").write_text(str(takes))
        with _swapping(f"/dev/zram{number}"):
            yield
    finally:
        wait_until(removed, "zram to go")


class ControlGroup:
    """A memory control group, of either version, for the time of a ``with``. :meth:`join` is a preexec_fn.

    `limit` bounds its memory and `swap` its swap, in bytes; None means no bound. If `swaps` is false the kernel does
    not swap out its memory.
    """

    ROOTS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")

    def __init__(self, limit: int, swap: int | None = None, *, swaps: bool = True) -> None:
        self._old = self.ROOTS[0].is_dir()
        self.path = self.ROOTS[not self._old] / f"ttmfs-pressure-{secrets.token_hex(8)}"
        self._limits: dict[str, int] = {"memory.limit_in_bytes" if self._old else "memory.max": limit}
        if swap is not None and self._old:
            self._limits["memory.memsw.limit_in_bytes"] = limit + swap  # of both together
        elif swap is not None:
            self._limits["memory.swap.max"] = swap
        self._swappiness = self.path / "memory.swappiness" if self._old else Path("/proc/sys/vm/swappiness")
        self._swaps = swaps

    def __enter__(self) -> "ControlGroup":
        if not self._old:
            (self.path.parent / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir()
        for name, limit in self._limits.items():
            (self.path / name).write_text(str(limit))
        self._was = self._swappiness.read_text()
        if not self._swaps:
            self._swappiness.write_text("0")
        return self

    def __exit__(self, *_: object) -> None:
        if not self._swaps:
            self._swappiness.write_text(self._was)

        def remove() -> bool:
            with contextlib.suppress(OSError):  # EBUSY until the last member has left
                self.path.rmdir()
            return not self.path.exists()

        wait_until(remove, "the control group to go")

    def join(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def usage(self) -> int:
        """Bytes of memory that the group uses."""
        return int((self.path / ("memory.usage_in_bytes" if self._old else "memory.current")).read_text())

    def shmem(self) -> int:
        """Bytes of shared memory that the group uses. Stored pages are shared memory."""
        rows = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(rows["shmem"])

    def oom_kills(self) -> int:
        text = (self.path / ("memory.oom_control" if self._old else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])


class _Groups:
    """Control groups for memory and block devices, of either version, for one process and the time of a ``with``."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.version = 1 if (CGROUP / "memory").is_dir() else 2
        roots = {"memory": CGROUP / "memory", "blkio": CGROUP / "blkio"} if self.version == 1 else {"": CGROUP}
        rows = (row.split(":", 2)[1:] for row in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
        self._before = {roots[name]: roots[name] / path.lstrip("/") for name, path in rows if name in roots}
        unique = secrets.token_hex(8)  # process ids repeat in other process namespaces
        self.memory, self.io = (roots.get(name, CGROUP) / f"ttmfs-slow-{unique}" for name in ("memory", "blkio"))

    def __enter__(self) -> Self:
        if self.version == 2:
            (CGROUP / "cgroup.subtree_control").write_text("+memory +io")
        for path in {self.memory, self.io}:
            path.mkdir()
            (path / "cgroup.procs").write_text(str(self._pid))
        return self

    def __exit__(self, *_: object) -> None:
        def removed() -> bool:
            for path in {self.memory, self.io}:
                with contextlib.suppress(OSError):  # EBUSY until the last member has left
                    path.rmdir()
            return not self.memory.exists() and not self.io.exists()

        for before in self._before.values():
            with contextlib.suppress(ProcessLookupError):
                (before / "cgroup.procs").write_text(str(self._pid))
        wait_until(removed, "the control groups to go")


class SlowSwap:
    """Swap that is slow to read for one process. Writes, and reads of other processes, have their usual speed."""

    def __init__(self, groups: _Groups) -> None:
        self._groups = groups

    def push_out(self) -> None:
        """Swap out what the process has stored since it joined the group, and drop it from the swap cache.

        Paging out alone leaves pages in the swap cache, where the kernel finds them without a read from the device.
        """
        reclaim, enough = ("memory.force_empty", "0") if self._groups.version == 1 else ("memory.reclaim", "1G")

        def out() -> bool:
            with contextlib.suppress(BlockingIOError):  # the group had less to reclaim
                (self._groups.memory / reclaim).write_text(enough)
            rows = dict(line.split() for line in (self._groups.memory / "memory.stat").read_text().splitlines())
            return rows["shmem"] == "0"

        wait_until(out, "the pages to be swapped out")  # the kernel first passes over pages that were just used
        out()  # again, for pages whose write has only just ended
        time.sleep(0.02)  # the daemon may take this long to notice that swap is in use


@contextlib.contextmanager
def slow_swap(pid: int, directory: Path, reads_a_second: int = 4, size: int = 256 << 20) -> Iterator[SlowSwap]:
    """Swap on a file in a directory. The block layer limits how often a second one process reads from it.

    So each swap-in of the process takes 1 / `reads_a_second` on any machine. The process moves to a control group,
    which push_out needs.
    """
    with _loop(directory, size) as device, _swapping(device), _Groups(pid) as groups:
        number = Path(f"/sys/block/{Path(device).name}/dev").read_text().strip()
        file, limit, none = (
            ("blkio.throttle.read_iops_device", "", "0") if groups.version == 1 else ("io.max", "riops=", "max")
        )
        (groups.io / file).write_text(f"{number} {limit}{reads_a_second}")
        try:
            yield SlowSwap(groups)
        finally:
            (groups.io / file).write_text(f"{number} {limit}{none}")  # pending reads go through now


# --- slow disks ---


@contextlib.contextmanager
def slow_writes(pid: int, filesystem: Path, bytes_a_second: int = 2 << 20) -> Iterator[None]:
    """Slow down the writes of a process to a filesystem on a loop device, and allow few dirty pages.

    So the kernel soon makes writers wait for the disk (dirty throttling), however much memory the machine has. With
    version 2 of control groups, the block layer's limit needs a group for the process.
    """
    source, uuid = run(f"findmnt -no SOURCE,UUID {shlex.quote(str(filesystem))}").split()
    device = Path("/sys/block", Path(source).name)
    number = (device / "dev").read_text().strip()
    dirty, before = {}, {}
    waiting = Path("/sys/fs/btrfs", uuid)  # btrfs can have several devices, and counts dirty pages here
    for name, value in ("strict_limit", "1"), ("max_bytes", str(8 << 20)):  # since Linux 6.2
        if (file := (waiting if waiting.exists() else device) / "bdi" / name).exists():
            dirty[file] = value
    if not dirty:
        dirty = {Path("/proc/sys/vm/dirty_background_bytes"): "4194304", Path("/proc/sys/vm/dirty_bytes"): "8388608"}
    with contextlib.ExitStack() as ended:
        if (CGROUP / "memory").is_dir():
            limit, text, none = CGROUP / "blkio/blkio.throttle.write_bps_device", f"{number} ", "0"
        else:
            limit, text, none = ended.enter_context(_Groups(pid)).io / "io.max", f"{number} wbps=", "max"
        for file, value in dirty.items():
            # The kernel stores bytes as a ratio of the memory. The ratio restores exactly, the bytes may not.
            kept = file.with_name("max_ratio") if file.name == "max_bytes" else file
            before[kept] = kept.read_text()
            file.write_text(value)
        limit.write_text(f"{text}{bytes_a_second}")
        try:
            yield
        finally:
            limit.write_text(f"{text}{none}")
            for file, value in before.items():
                file.write_text(value)
