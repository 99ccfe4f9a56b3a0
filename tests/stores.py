"""Stores of every kind for tests to mount, and swap for them, fast or slow. All of it is taken away again.

A :class:`Site` is where mounts with one kind of store are made. What a mount of another user's needs is here too.
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

from harness import MOUNT_PY, REPOSITORY, Mount, mounts_below, run, wait_until
from ttmfs.options import Options
from ttmfs.stores import make_store
from ttmfs.stores.store import Store

KINDS = ("tmpfs", "user", "fallback", "dir-tmpfs", "dir-ext4", "dir-xfs", "dir-btrfs")
"""Root's private tmpfs, a user's, what a user has who may make no user namespaces, and ``store=DIR`` on filesystems."""

FUSE = Path("/dev/fuse")
CGROUP = Path("/sys/fs/cgroup")
ZRAM = Path("/sys/class/zram-control")

UNSHARE, SETRESUID, SETRESGID = {"x86_64": (272, 117, 119), "aarch64": (97, 147, 149)}[platform.machine()]
PR_SET_KEEPCAPS = 8
CAPABILITIES = struct.pack("Ii", 0x20080522, 0)  # a cap_user_header_t, of version 3 and this thread

_libc = ctypes.CDLL(None, use_errno=True)


# --- other users ---

ALICE, BOB, CAROL = 65534, 65533, 65532
"""Users without privilege, whether the machine knows them or not."""


def as_user(uid: int, **more: Any) -> dict[str, Any]:
    """What makes subprocess run a command as a user, in one group of the same number."""
    return {"user": uid, "group": uid, "extra_groups": [], **more}


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Let this thread, and what it starts, be a user without privilege.

    A user's mount is closed to everyone else, root included, and the kernel looks at all three user ids. So all of them
    are changed, of this thread alone, which keeps the capability to become root again but not in effect.
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
    """A directory that everyone reaches, with ttmfs and its Python in it, wherever these really are.

    As long as it lives everyone may open /dev/fuse, as on most systems.
    """

    def __enter__(self) -> Self:
        self.path = Path(tempfile.mkdtemp(prefix="ttmfs-users-"))
        self.path.chmod(0o755)
        self._bound: list[Path] = []
        self._mode = stat.S_IMODE(FUSE.stat().st_mode)
        FUSE.chmod(0o666)
        try:
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
        FUSE.chmod(self._mode)
        for path in reversed(self._bound):
            run(f"umount {path}")
        shutil.rmtree(self.path)

    def _bind(self, source: Path, name: str) -> Path:
        (self.path / name).mkdir()
        run(f"mount --bind -o ro {shlex.quote(str(source))} {self.path / name}")
        self._bound.append(self.path / name)
        return self.path / name

    @contextlib.contextmanager
    def directory(self, name: str, owner: int = 0) -> Iterator[Path]:
        """An empty directory of someone's, in which nothing may stay."""
        path = self.path / name
        path.mkdir()
        os.chown(path, owner, owner)
        try:
            yield path
        finally:
            left = mounts_below(path)
            for mount in left:  # by a test that failed: it is in the way of the next
                run(f"umount -l {mount}")
            path.rmdir()
        assert not left


class UsersMount(Mount):
    """A ttmfs that Alice mounted for herself."""

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
"""Becomes a command of a user's who may make no user namespaces: a filter of system calls sees to it, as container
runtimes set one up. (To forbid them by max_user_namespaces to one process only takes a user namespace around it, and
its mounts would be seen in there alone.) Set by root, it leaves fusermount3 its set-id bit."""


# --- stores ---


@contextlib.contextmanager
def mounted(path: Path, kind: str, options: str = "", source: str = "none") -> Iterator[Path]:
    """A filesystem mounted on a new directory, gone at the end even if it is in use."""
    path.mkdir()
    run(f"mount -t {kind} {'-o ' + options if options else ''} {shlex.quote(source)} {shlex.quote(str(path))}")
    try:
        yield path
    finally:

        def unmount() -> bool:  # a daemon that has just ended may keep it for a moment
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
    """A new filesystem on a new directory: a tmpfs, or any that ``mkfs`` knows in an image beside it.

    The image is as sparse as the filesystem is empty, and made in 30 ms. xfs asks for 300 MiB at least, and ext4 would
    take smaller blocks than usual for so little.
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
    """Where mounts with one kind of store are made, several at once if need be, each with a store of its own.

    The mounts of kinds "user" and "fallback" are Alice's; :meth:`acting` lets a test be who can use them.
    """

    def __init__(self, kind: str, place: Place, mountpoints: Path, stores: Path | None) -> None:
        self.kind = kind
        self.uid = ALICE if kind in ("user", "fallback") else os.geteuid()
        self.kernel_keeps_the_budget = kind in ("tmpfs", "user")
        self.on_disk = kind in ("dir-ext4", "dir-xfs", "dir-btrfs")
        self._place, self._mountpoints, self._stores = place, mountpoints, stores
        self._count = 0

    def options(self, text: str) -> str:
        """What to give ``-o`` for these options and a new store of the kind."""
        if self._stores is None or self.uid == ALICE:
            return text
        self._count += 1
        directory = self._stores / f"store-{self._count}"
        directory.mkdir()
        return f"store={directory},{text}"

    @contextlib.contextmanager
    def mount(self, options: str) -> Iterator[Mount]:
        """A mount with a store of the kind, as whoever the site's user is."""
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
        """A store of the kind for the model layer, without a mount. It is this process', and so root's."""
        parsed = Options.parse(self.options(options))
        with contextlib.closing(make_store(parsed)) as store:
            yield store, parsed

    def acting(self) -> AbstractContextManager[None]:
        """Be the user whose mounts they are."""
        return acting_as(self.uid) if self.uid != os.geteuid() else contextlib.nullcontext()


@contextlib.contextmanager
def site_of(kind: str, place: Place, base: Path) -> Iterator[Site]:
    """A site of one of the KINDS, with an empty directory of root's at its disposal."""
    if kind == "tmpfs":
        yield Site(kind, place, base, None)
    elif kind == "user":
        with place.directory("mounts") as mountpoints:
            yield Site(kind, place, mountpoints, None)
    elif kind == "fallback":
        # Larger than /dev/shm, so that it is taken.
        room = mounted(place.path / "runtime", "tmpfs", f"size=100t,mode=0700,uid={ALICE},gid={ALICE}")
        with place.directory("mounts") as mountpoints, room as stores:
            yield Site(kind, place, mountpoints, stores)
            assert not os.listdir(stores), "a store stayed"
    else:
        with filesystem(base / "filesystem", kind.removeprefix("dir-")) as stores:
            yield Site(kind, place, base, stores)


# --- swap ---


@contextlib.contextmanager
def _swapping(device: str) -> Iterator[None]:
    """Swap to a device before any other that there is."""
    run(f"mkswap {device} && swapon -p 32000 {device}")
    try:
        yield
    finally:
        run(f"swapoff {device}")


@contextlib.contextmanager
def _loop(directory: Path, size: int) -> Iterator[str]:
    """A loop device over a new file in a directory."""
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
    """Swap of one's own: a new zram device if the kernel has zram, else a file in a directory.

    `takes` is the most memory that zram may use for it, 0 for no limit.
    """
    if not ZRAM.is_dir():
        with _loop(directory, size) as device, _swapping(device):
            yield
        return
    number = (ZRAM / "hot_add").read_text().strip()

    def removed() -> bool:
        with contextlib.suppress(OSError):  # someone is looking at it just now
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
    """A memory control group, of either version, for the time of a ``with``. May be entered by processes as they start.

    `swap` is what it may swap, None for all there is. `swaps` false: the kernel is to leave its memory where it is.
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
            with contextlib.suppress(OSError):  # EBUSY until the last member is gone
                self.path.rmdir()
            return not self.path.exists()

        wait_until(remove, "the control group to go")

    def join(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def usage(self) -> int:
        """Bytes charged to it."""
        return int((self.path / ("memory.usage_in_bytes" if self._old else "memory.current")).read_text())

    def shmem(self) -> int:
        """Bytes of shared memory, and so of pages, that its members allocated and that are there still."""
        rows = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(rows["shmem"])

    def oom_kills(self) -> int:
        text = (self.path / ("memory.oom_control" if self._old else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])


class _Groups:
    """Control groups for memory and block devices, of either version, that a process is moved to for a while."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.version = 1 if (CGROUP / "memory").is_dir() else 2
        roots = {"memory": CGROUP / "memory", "blkio": CGROUP / "blkio"} if self.version == 1 else {"": CGROUP}
        rows = (row.split(":", 2)[1:] for row in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
        self._before = {roots[name]: roots[name] / path.lstrip("/") for name, path in rows if name in roots}
        unique = secrets.token_hex(8)  # other process namespaces have the same process ids
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
                with contextlib.suppress(OSError):  # EBUSY until the last member is gone
                    path.rmdir()
            return not self.memory.exists() and not self.io.exists()

        for before in self._before.values():
            with contextlib.suppress(ProcessLookupError):
                (before / "cgroup.procs").write_text(str(self._pid))
        wait_until(removed, "the control groups to go")


class SlowSwap:
    """Swap that one process reads slowly; everyone writes it, and everyone else reads it, as fast as ever."""

    def __init__(self, groups: _Groups) -> None:
        self._groups = groups

    def push_out(self) -> None:
        """Swap out what the process has stored meanwhile, and forget it.

        Paging out alone leaves it in the swap cache, unless the device is memory: there it is found without a read.
        """
        reclaim, enough = ("memory.force_empty", "0") if self._groups.version == 1 else ("memory.reclaim", "1G")

        def out() -> bool:
            with contextlib.suppress(BlockingIOError):  # there was less than that
                (self._groups.memory / reclaim).write_text(enough)
            rows = dict(line.split() for line in (self._groups.memory / "memory.stat").read_text().splitlines())
            return rows["shmem"] == "0"

        wait_until(out, "the pages to be swapped out")  # those that were just used are passed over at first
        out()  # again, for those whose writing to the device is only now done
        time.sleep(0.02)  # so late the daemon may notice that swap has come into use


@contextlib.contextmanager
def slow_swap(pid: int, directory: Path, reads_a_second: int = 4, size: int = 256 << 20) -> Iterator[SlowSwap]:
    """Swap on a file in a directory, from which a process reads so many times a second and no more.

    So each swap-in of it takes 1 / `reads_a_second`, whatever the machine. The block layer's throttling does that; it
    needs no device mapper. What it stores from now on is charged to a control group of its own, for push_out.
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
            (groups.io / file).write_text(f"{number} {limit}{none}")  # what waits still is read now


# --- slow disks ---


@contextlib.contextmanager
def slow_writes(pid: int, filesystem: Path, bytes_a_second: int = 2 << 20) -> Iterator[None]:
    """Have the disk of a filesystem on a loop device write slowly what a process stores, and let little of it wait.

    So the kernel soon makes writers wait for the disk (dirty throttling), whatever the machine's memory. The block
    layer's throttling does the rest; of version 2 it needs a control group of the process' own.
    """
    source, uuid = run(f"findmnt -no SOURCE,UUID {shlex.quote(str(filesystem))}").split()
    device = Path("/sys/block", Path(source).name)
    number = (device / "dev").read_text().strip()
    dirty, before = {}, {}
    waiting = Path("/sys/fs/btrfs", uuid)  # btrfs can have several devices, so what waits for them is counted there
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
            # Bytes are kept as a part of the memory: as bytes it may be too much for what there is at the end.
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
