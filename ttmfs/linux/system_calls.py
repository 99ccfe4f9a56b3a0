"""The few system calls that Python lacks.

Each raises OSError with the errno and what was tried, unless it says otherwise.

Numbers are those of the generic table, the same on every architecture for calls this new
(``include/uapi/asm-generic/unistd.h``). All of it is synchronous: it waits for nothing but memory and the filesystem
below, except where a function says more.

Run as a program, by its path, this file is the helper through which a user without privilege makes and resizes a tmpfs:
what needs a user namespace happens there, and the caller stays outside.
"""

import ctypes
import errno
import mmap
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = [
    "CAP_SYS_RESOURCE",
    "XATTR_SIZE_MAX",
    "Duplicate",
    "allocate_range",
    "device_and_inode",
    "evicted",
    "first_absent",
    "is_data",
    "is_tmpfs",
    "lock_memory",
    "map_resident",
    "new_tmpfs",
    "new_tmpfs_as_user",
    "next_data",
    "next_data_start",
    "page_out",
    "page_runs",
    "punch_hole",
    "rename",
    "renounce",
    "residency",
    "resize_tmpfs",
    "resize_tmpfs_as_user",
    "swap_space",
    "touch_heap",
    "unmap",
]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_FSOPEN, _FSCONFIG, _FSMOUNT, _FSPICK, _CACHESTAT = 430, 431, 432, 433, 451
_MOVE_PAGES, _GENERIC_MOVE_PAGES = {"x86_64": 279}, 239  # the one number here that is not the same everywhere
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = _FSPICK_CLOEXEC = 1
_FSPICK_EMPTY_PATH = 8
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE, _FSCONFIG_CMD_RECONFIGURE = 0, 1, 6, 7
_MOUNT_ATTR = 0x2 | 0x4 | 0x8 | 0x10  # nosuid, nodev, noexec, noatime
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_RENAME_NOREPLACE = 1
_AT_FDCWD, _AT_STATX_DONT_SYNC, _STATX_INO = -100, 0x4000, 0x100
_PR_SET_PDEATHSIG = 1
_TMPFS_MAGIC = 0x01021994
_MADV_PAGEOUT, _MADV_POPULATE_READ = 21, 22
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAPABILITY_VERSION_3 = 0x20080522
XATTR_SIZE_MAX = 65536  # bytes of an extended attribute, include/uapi/linux/limits.h
CAP_SYS_RESOURCE = 24
_MAP_FAILED = ctypes.c_void_p(-1).value
_PAGE_SIZE: int = os.sysconf("SC_PAGE_SIZE")

SCANNED = 10
"""Pages of a run that SEEK_HOLE scans in the time that one SEEK_DATA takes."""


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *arguments: Any) -> int:
    wide = (ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    return _checked(_libc.syscall(ctypes.c_long(number), *wide), what)


# --- the new mount API: fsopen(2) and its kin ---


def new_tmpfs(**options: str | None) -> int:
    """A directory descriptor of a new tmpfs that is mounted nowhere and lives as long as a descriptor of it does.

    `options` are tmpfs' own, None standing for a flag. Needs CAP_SYS_ADMIN over the mount namespace.
    """
    context = _syscall("fsopen", _FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    try:
        for name, value in options.items():
            _configure(context, name, value)
        _syscall("fsconfig create", _FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _syscall("fsmount", _FSMOUNT, context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR)
    finally:
        os.close(context)
    try:  # fsmount's descriptor behaves as O_PATH; an ordinary one can list and be kept by a service manager
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)


def resize_tmpfs(directory: int, **limits: int) -> None:
    """Give a tmpfs other limits: `size`, in bytes, `nr_inodes`. OSError(EINVAL) if it holds more than that already."""
    context = _syscall("fspick", _FSPICK, directory, b"", _FSPICK_EMPTY_PATH | _FSPICK_CLOEXEC)
    try:
        for name, value in limits.items():
            _configure(context, name, str(value))
        _syscall("fsconfig reconfigure", _FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def _configure(context: int, name: str, value: str | None) -> None:
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    text = None if value is None else value.encode()
    _syscall(f"tmpfs option {name}={value}", _FSCONFIG, context, command, name.encode(), text, 0)


# --- the same without privilege: a child in a user namespace of its own does it ---


def new_tmpfs_as_user(**options: str | None) -> tuple[int, int]:
    """As :func:`new_tmpfs`, for anyone who may make user namespaces. Gives the directory and the namespace it is of."""
    words = [name if value is None else f"{name}={value}" for name, value in options.items()]
    here, there = socket.socketpair()
    with here, there:
        _run_helper("make", str(there.fileno()), *words, keep=(there.fileno(),))
        _, descriptors, _, _ = socket.recv_fds(here, 16, 2)
    directory, namespace = descriptors
    return directory, namespace


def resize_tmpfs_as_user(directory: int, namespace: int, **limits: int) -> None:
    """As :func:`resize_tmpfs`, for a tmpfs of :func:`new_tmpfs_as_user`."""
    words = [f"{name}={value}" for name, value in limits.items()]
    _run_helper("resize", str(directory), str(namespace), *words, keep=(directory, namespace))


def _run_helper(*arguments: str, keep: tuple[int, ...]) -> None:
    """Run this file as a program; its exit status is the errno, its standard error what failed."""
    command = [sys.executable, "-I", "-S", __file__, *arguments]
    helper = subprocess.run(command, pass_fds=keep, capture_output=True, text=True, timeout=30, check=False)
    if helper.returncode:
        raise OSError(helper.returncode, helper.stderr.strip() or os.strerror(helper.returncode))


def _helper_main(command: str, *arguments: str) -> None:
    """What the helper does."""
    if command == "make":
        channel, words = int(arguments[0]), arguments[1:]
        uid, gid = os.geteuid(), os.getegid()
        _checked(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "unshare user namespace")
        for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        options = {name: value if equals else None for name, equals, value in (word.partition("=") for word in words)}
        with socket.socket(fileno=channel) as there:
            namespace = os.open("/proc/self/ns/user", os.O_RDONLY)
            socket.send_fds(there, [b"made"], [new_tmpfs(**options), namespace])
    else:
        directory, namespace = map(int, arguments[:2])
        _checked(_libc.setns(namespace, _CLONE_NEWUSER), "setns user namespace")
        _checked(_libc.unshare(_CLONE_NEWNS), "unshare mount namespace")  # fspick asks for rights over it
        resize_tmpfs(directory, **{name: int(value) for name, _, value in (w.partition("=") for w in arguments[2:])})


# --- files ---


class Duplicate:
    """A descriptor of one's own of an open file, closed when no one refers to this any more.

    So it can be given to a thread that may never be started, or be left to itself.
    """

    def __init__(self, fd: int) -> None:
        self.fd = -1
        self.fd = os.dup(fd)

    def close(self) -> None:
        """Close it now: an exception can refer to it for long."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    __del__ = close


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free a range of a file; it reads as zeros afterwards and SEEK_DATA skips it."""
    _checked(_libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length), "fallocate punch")


def allocate_range(fd: int, offset: int, length: int) -> None:
    """Allocate what a range of a file lacks, all of it or (ENOSPC) nothing. It is a hole to SEEK_DATA until written."""
    while _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, length) < 0:
        if ctypes.get_errno() != errno.EINTR:  # any signal, or a suspend of the machine; of tmpfs on older kernels
            _checked(-1, "fallocate")


def rename(directory: int, old: str, new: str, *, replace: bool) -> None:
    """renameat2(2) within one directory; with `replace` false OSError(EEXIST) if the new name is taken."""
    flags = 0 if replace else _RENAME_NOREPLACE
    _checked(_libc.renameat2(directory, os.fsencode(old), directory, os.fsencode(new), flags), "renameat2")


def next_data_start(fd: int, offset: int) -> int | None:
    """Where the first data at or after an offset begins; None if there is none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def next_data(fd: int, offset: int) -> tuple[int, int] | None:
    """The first run of data at or after an offset, as (start, end) in bytes; None if there is none.

    Takes time in proportion to the run's length: 10 ms for 1 GiB of a tmpfs.
    """
    start = next_data_start(fd, offset)
    return None if start is None else (start, os.lseek(fd, start, os.SEEK_HOLE))


def page_runs(fd: int, page_size: int, first: int, past: int) -> Iterator[tuple[int, int]]:
    """The runs of pages of a file between two indices, as (first index, index past the last), ascending.

    A page is there if any of it is data.
    """
    run = (first, first)
    while run[1] < past and (found := next_data(fd, run[1] * page_size)):
        start, end = max(run[1], found[0] // page_size), min(past, -(-found[1] // page_size))
        if start >= past:
            break
        if start > run[1]:  # else there was a hole within a page of several base pages
            if run[1] > run[0]:
                yield run
            run = start, end
        else:
            run = run[0], end
    if run[1] > run[0]:
        yield run


def is_data(fd: int, offset: int, length: int) -> bool:
    """Whether there is data within a range. Takes the same time however long the runs are."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) < offset + length
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False


def first_absent(fd: int, page_size: int, first: int, past: int) -> int | None:
    """The first index of a range that holds no page; None if every page of the range exists.

    A short range is looked at page by page: the run that it lies in can end far past it, and is scanned to its end.
    """
    if (past - first) * SCANNED < os.fstat(fd).st_blocks * 512 // page_size:
        return next((idx for idx in range(first, past) if not is_data(fd, idx * page_size, page_size)), None)
    start, end = next(page_runs(fd, page_size, first, past), (past, past))
    if start > first:
        return first
    return end if end < past else None


def device_and_inode(path: str) -> tuple[int, int]:
    """st_dev and st_ino of what a path leads to, as the kernel knows it: no server is asked, and none waited for."""
    answer = (ctypes.c_uint32 * 64)()  # a struct statx
    _checked(_libc.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_INO, ctypes.byref(answer)), "statx")
    return os.makedev(answer[34], answer[35]), int(ctypes.c_uint64.from_buffer(answer, 32).value)


def is_tmpfs(fd: int) -> bool:
    """Whether a file lies in memory and swap. statfs(2)."""
    answer = (ctypes.c_ulong * 32)()  # a struct statfs, which begins with f_type
    _checked(_libc.fstatfs(fd, ctypes.byref(answer)), "fstatfs")
    return answer[0] & 0xFFFFFFFF == _TMPFS_MAGIC


# --- memory ---


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted"))


_NO_CACHESTAT = (errno.ENOSYS, errno.EPERM)
"""An older kernel, or a filter of system calls (of a container runtime, or a unit) that does not know it."""


class _Asked(threading.local):
    """What a thread asks cachestat(2) and is answered. Kept: to make it anew takes longer than the call."""

    def __init__(self) -> None:
        self.where, self.found = _Range(), _Cachestat()
        self.at_where, self.at_found = ctypes.byref(self.where), ctypes.byref(self.found)


_asked = _Asked()


def residency(fd: int, offset: int, length: int) -> tuple[int, int]:
    """Of a file's range, the numbers of base pages that are in memory and that were evicted. Touches none.

    Of a tmpfs, evicted means swapped out. cachestat(2), Linux 6.5; before that, holes are taken for evicted pages.
    """
    asked = _asked
    asked.where.offset, asked.where.length = offset, length
    if _libc.syscall(_CACHESTAT, fd, asked.at_where, asked.at_found, 0) < 0:
        number = ctypes.get_errno()
        if number not in _NO_CACHESTAT:
            raise OSError(number, f"cachestat: {os.strerror(number)}")
        return _residency_by_mincore(fd, offset, length)
    return asked.found.cache, asked.found.evicted


def evicted(fd: int, offset: int = 0, length: int = 0) -> int | None:
    """Of a range of a tmpfs file (all of it), the number of base pages that are swapped out. None before Linux 6.5.

    Takes time in proportion to what is there, not to how many runs of it there are.
    """
    asked = _asked
    asked.where.offset, asked.where.length = offset, length  # 0: to the end
    if _libc.syscall(_CACHESTAT, fd, asked.at_where, asked.at_found, 0) < 0:
        if (number := ctypes.get_errno()) in _NO_CACHESTAT:
            return None
        raise OSError(number, f"cachestat: {os.strerror(number)}")
    return int(asked.found.evicted)


def _residency_by_mincore(fd: int, offset: int, length: int) -> tuple[int, int]:
    """The same on an older kernel. The mapping is never touched: a read of it would put pages into the holes."""
    cached, window, start = 0, 1 << 30, offset - offset % _PAGE_SIZE
    for position in range(start, offset + length, window):
        size = min(window, offset + length - position)
        address = _map(fd, position, size)
        try:
            vector = ctypes.create_string_buffer(-(-size // _PAGE_SIZE))
            _checked(_libc.mincore(address, size, vector), "mincore")
        finally:
            _libc.munmap(address, size)
        cached += sum(byte & 1 for byte in vector.raw[: -(-size // _PAGE_SIZE)])
    return cached, -(-(offset + length - start) // _PAGE_SIZE) - cached


def _map(fd: int, offset: int, length: int) -> int:
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        _checked(-1, "mmap")
    _libc.munlock(address, length)  # what lock_memory() has locked cannot be swapped out
    return int(address)


def map_resident(fd: int, offset: int, length: int) -> int:
    """Map a range with its pages in the page tables, which is what paging out asks for. Gives the address.

    Every page of it must be data and in memory: this would put a page into a hole, and wait for one that is swapped
    out. OSError if the file has become shorter meanwhile.
    """
    address = _map(fd, offset, length)
    try:
        _checked(_libc.madvise(address, length, _MADV_POPULATE_READ), "madvise populate")
    except OSError:
        _libc.munmap(address, length)
        raise
    return address


def page_out(address: int, length: int, *, from_all_cpus: bool = False) -> None:
    """Push the pages of a mapping of :func:`map_resident` to swap, as far as that is possible.

    Pages that were dropped meanwhile stay so. Can take as long as the swap device does: call it in a thread.

    A page just written waits in a list of the CPU that it was written on, where MADV_PAGEOUT on another does not find
    it. `from_all_cpus` empties these lists first, as every move_pages(2) does, also one of no pages (64 us on 2 CPUs).
    """
    if from_all_cpus:
        number = _MOVE_PAGES.get(platform.machine(), _GENERIC_MOVE_PAGES)
        _libc.syscall(ctypes.c_long(number), 0, ctypes.c_long(0), None, (ctypes.c_int * 1)(0), None, 0)
    _libc.madvise(address, length, _MADV_PAGEOUT)


def unmap(address: int, length: int) -> None:
    """Take away a mapping of :func:`map_resident`."""
    _libc.munmap(address, length)


class _Sysinfo(ctypes.Structure):
    _fields_ = (
        ("uptime", ctypes.c_long),
        ("loads", ctypes.c_ulong * 3),
        *((name, ctypes.c_ulong) for name in ("ram", "ram_free", "shared", "buffers", "swap", "swap_free")),
        ("processes", ctypes.c_ushort),
        ("pad", ctypes.c_ushort),
        *((name, ctypes.c_ulong) for name in ("high", "high_free")),
        ("unit", ctypes.c_uint),
        ("rest", ctypes.c_char * 64),
    )


def swap_space() -> tuple[int, int]:
    """The machine's swap in bytes: all of it, and what is free. sysinfo(2)."""
    answer = _Sysinfo()
    _checked(_libc.sysinfo(ctypes.byref(answer)), "sysinfo")
    return answer.swap * answer.unit, answer.swap_free * answer.unit


def lock_memory(limit: int) -> None:
    """Keep what this process has in memory there, and what it comes to map, from when it is used on. mlockall(2).

    Mappings of stores, which this module makes, are not locked: their pages are to be swapped out. Where `limit`, which
    is RLIMIT_MEMLOCK, holds for this process, only what is mapped by now is locked, for at the limit a process that
    locks all that it maps gets no memory any more. OSError(EPERM or ENOMEM) where the limit is too low for that too.
    """
    _checked(_libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT), "mlockall")
    if limit != resource.RLIM_INFINITY:
        try:  # asking for more than that tells, whatever rights there are in whichever user namespace
            mmap.mmap(-1, limit + _PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ).close()
        except OSError:
            _checked(_libc.mlockall(_MCL_CURRENT | _MCL_ONFAULT), "mlockall")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_THRESHOLD = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX

TOUCHED = 8 << 20
"""Bytes for libfuse to read requests into, 1 MiB for each task that reads them, so that a kill amid that harms none."""


def die_with(parent: int) -> None:
    """Have this process killed when its parent, whose process id is given, ends in whatever way."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


def touch_heap() -> None:
    """Have TOUCHED bytes of memory for malloc(3) that is in the page tables already, and stays there when it is freed.

    A process that is killed while it reads from /dev/fuse into memory that it never touched makes the kernel answer
    that request with EIO: page faults are not served any more. (get_user_pages() for fuse_copy_fill() sees the signal)
    """
    for parameter in _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD:
        _libc.mallopt(parameter, _LARGEST_THRESHOLD)
    _libc.malloc.restype = ctypes.c_void_p
    if address := _libc.malloc(ctypes.c_size_t(TOUCHED)):
        ctypes.memset(address, 1, TOUCHED)
        _libc.free(ctypes.c_void_p(address))


# --- rights ---


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilitySets(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


def renounce(capability: int) -> None:
    """Do without one of the first 32 capabilities, in this thread and those that it starts. capset(2)."""
    header, sets = _CapabilityHeader(_CAPABILITY_VERSION_3, 0), (_CapabilitySets * 2)()
    _checked(_libc.capget(ctypes.byref(header), sets), "capget")
    sets[0].effective &= ~(1 << capability)
    _checked(_libc.capset(ctypes.byref(header), sets), "capset")


if __name__ == "__main__":
    try:
        _helper_main(*sys.argv[1:])
    except OSError as failure:
        sys.stderr.write(str(failure.strerror))
        sys.exit(failure.errno)
