"""The Linux system calls that Python lacks, and sparse files of pages.

Each function raises OSError with the errno and the name of the call. They block only on memory and the
filesystem below, unless their description says more.

The numbers of system calls come from ``include/uapi/asm-generic/unistd.h``. Calls this new have the same number on
every architecture.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import platform
import resource
import signal
import threading
from collections.abc import Iterator

__all__ = [
    "CAP_SYS_RESOURCE",
    "XATTR_SIZE_MAX",
    "Duplicate",
    "allocate_range",
    "device_and_inode",
    "fallocate",
    "first_absent",
    "is_data",
    "is_open_elsewhere",
    "is_tmpfs",
    "lock_memory",
    "map_resident",
    "next_data",
    "next_data_start",
    "outlive_parent",
    "page_out",
    "page_out_in",
    "page_runs",
    "punch_hole",
    "rename",
    "renounce",
    "residency",
    "resident",
    "resident_in_mapping",
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

_CACHESTAT, _PROCESS_MADVISE = 451, 440
_MOVE_PAGES = 279 if platform.machine() == "x86_64" else 239  # the only number here that differs by architecture
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
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
_WINDOW = 1 << 30  # bytes mapped at a time


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# --- files ---


class Duplicate:
    """A duplicate of a file descriptor, which is closed with the last reference to this object.

    So a thread that never starts, or that the loop abandons, leaks no descriptor.
    """

    def __init__(self, fd: int) -> None:
        self.fd = -1
        self.fd = os.dup(fd)

    def close(self) -> None:
        """Close it now, because an exception can hold a reference for long."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    __del__ = close


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    while _libc.fallocate(fd, mode, offset, length) < 0:
        if ctypes.get_errno() != errno.EINTR:  # a signal interrupts shmem_fallocate() of older kernels
            _checked(-1, "fallocate")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free a range of a file. It then reads as zeros, and SEEK_DATA skips it."""
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def allocate_range(fd: int, offset: int, length: int) -> None:
    """Allocate all holes in a range of a file, or (ENOSPC) none. SEEK_DATA skips them until they are written."""
    fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, length)


def is_open_elsewhere(fd: int) -> bool:
    """Whether a file is open by more than this open file description, or mapped from another one. fcntl(2), F_SETLEASE.

    The kernel gives a lease only for a file that nobody else has open. An opener that comes meanwhile waits until the
    lease is given back, and the kernel sends SIGIO, which the caller must ignore.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return True
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def rename(directory: int, old: str, new: str, *, replace: bool) -> None:
    """Rename within one directory. With `replace` false, OSError(EEXIST) if the new name is taken. renameat2(2).

    Distributed filesystems do not know that flag. There nobody else may make names in the directory.
    """
    flags = 0 if replace else _RENAME_NOREPLACE
    try:
        _checked(_libc.renameat2(directory, os.fsencode(old), directory, os.fsencode(new), flags), "renameat2")
    except OSError as error:
        if replace or error.errno != errno.EINVAL:
            raise
        with contextlib.suppress(FileNotFoundError):
            os.stat(new, dir_fd=directory, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)


def next_data_start(fd: int, offset: int) -> int | None:
    """Return the offset of the first data at or after an offset; None if there is none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def next_data(fd: int, offset: int) -> tuple[int, int] | None:
    """Return the first run of data at or after an offset, as (start, end) in bytes; None if there is none.

    Takes time in proportion to the length of the run: 10 ms for 1 GiB of a tmpfs.
    """
    start = next_data_start(fd, offset)
    return None if start is None else (start, os.lseek(fd, start, os.SEEK_HOLE))


def page_runs(fd: int, page_size: int, first: int, past: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of pages between two indices, as (first index, index past the last), ascending.

    A page exists if any part of it is data.
    """
    run = (first, first)
    while run[1] < past and (found := next_data(fd, run[1] * page_size)):
        start, end = max(run[1], found[0] // page_size), min(past, -(-found[1] // page_size))
        if start >= past:
            break
        if start > run[1]:  # otherwise the hole was within a large page
            if run[1] > run[0]:
                yield run
            run = start, end
        else:
            run = run[0], end
    if run[1] > run[0]:
        yield run


FEW_PAGES = 64
"""Up to this number, pages are probed one by one, without a look at the size of the file."""

PROBE_COST = 16
"""Cost of one SEEK_DATA probe, in pages scanned."""


def is_data(fd: int, offset: int, length: int) -> bool:
    """Whether a range contains data. The time does not depend on the length of runs."""
    start = next_data_start(fd, offset)
    return start is not None and start < offset + length


def first_absent(fd: int, page_size: int, first: int, past: int) -> int | None:
    """Return the first index of a range without a page; None if every page exists.

    Pages of a short range are probed one by one: a run can end far past the range, and next_data() scans it to its end.
    """
    count = past - first
    if count <= FEW_PAGES or count * PROBE_COST < os.fstat(fd).st_blocks * 512 // page_size:
        return next((i for i in range(first, past) if not is_data(fd, i * page_size, page_size)), None)
    run = next(page_runs(fd, page_size, first, past), (past, past))
    return None if run == (first, past) else run[1] if run[0] == first else first


def device_and_inode(path: str) -> tuple[int, int]:
    """Return st_dev and st_ino of a path as the kernel remembers them, without a request to the server of a mount."""
    answer = (ctypes.c_uint32 * 64)()  # a struct statx
    _checked(_libc.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_INO, ctypes.byref(answer)), "statx")
    return os.makedev(answer[34], answer[35]), int(ctypes.c_uint64.from_buffer(answer, 32).value)


def is_tmpfs(fd: int) -> bool:
    """Whether a file is in a tmpfs. statfs(2)."""
    answer = (ctypes.c_ulong * 32)()  # a struct statfs, which begins with f_type
    _checked(_libc.fstatfs(fd, ctypes.byref(answer)), "fstatfs")
    return answer[0] & 0xFFFFFFFF == _TMPFS_MAGIC


# --- memory ---


_NO_CACHESTAT = (errno.ENOSYS, errno.EPERM)
"""The errno of cachestat(2) before Linux 6.5, and that of a seccomp filter that does not know the call."""


class _CachestatBuffers(threading.local):
    """The structures of a thread's calls of cachestat(2). Making new ones would take longer than the call."""

    def __init__(self) -> None:
        self.range = (ctypes.c_uint64 * 2)()  # offset and length
        self.counts = (ctypes.c_uint64 * 5)()  # in the page cache, dirty, in writeback, evicted, recently evicted
        self.pointers = ctypes.byref(self.range), ctypes.byref(self.counts)


_buffers = _CachestatBuffers()


def _cachestat(fd: int, offset: int, length: int) -> "ctypes.Array[ctypes.c_uint64] | None":
    """Return the counts of base pages in a range; None without cachestat(2)."""
    buffers = _buffers
    buffers.range[0], buffers.range[1] = offset, length
    if _libc.syscall(_CACHESTAT, fd, *buffers.pointers, 0) < 0:
        if (number := ctypes.get_errno()) in _NO_CACHESTAT:
            return None
        raise OSError(number, f"cachestat: {os.strerror(number)}")
    return buffers.counts


def residency(fd: int, offset: int, length: int) -> tuple[int, int]:
    """Return the numbers of base pages in memory and swapped out in a range of a tmpfs file. Loads no page."""
    if counts := _cachestat(fd, offset, length):
        return counts[0], counts[3]
    first, resident = offset // _PAGE_SIZE, _mincore(fd, offset, length)
    page, evicted = first, 0
    while (found := next_data_start(fd, page * _PAGE_SIZE)) is not None and found < offset + length:
        page = found // _PAGE_SIZE
        evicted += not resident[page - first]
        page += 1
    return sum(resident), evicted


def resident(fd: int, offset: int, length: int) -> int:
    """Return the number of base pages in memory in a range of any file. Loads no page, and waits for no lock."""
    counts = _cachestat(fd, offset, length)
    return counts[0] if counts else sum(_mincore(fd, offset, length))


def resident_in_mapping(fd: int, offset: int, length: int) -> int:
    """Return the number of base pages in memory in a range of a file in a tmpfs. Loads no page.

    Unlike :func:`residency`, this also works on a file of a FUSE mount in passthrough mode.
    """
    return sum(_mincore(fd, offset, length))


def _mincore(fd: int, offset: int, length: int) -> list[int]:
    """Return 1 (in memory) or 0 for each base page that a range touches. For kernels before Linux 6.5.

    The mapping is never read: a read would fill holes.
    """
    found: list[int] = []
    for position in range(offset - offset % _PAGE_SIZE, offset + length, _WINDOW):
        size = min(_WINDOW, offset + length - position)
        address = _map(fd, position, size)
        try:
            vector = ctypes.create_string_buffer(-(-size // _PAGE_SIZE))
            _checked(_libc.mincore(address, size, vector), "mincore")
        finally:
            _libc.munmap(address, size)
        found += (byte & 1 for byte in vector.raw)
    return found


def _map(fd: int, offset: int, length: int) -> int:
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        _checked(-1, "mmap")
    _libc.munlock(address, length)  # pages that lock_memory() locks cannot be swapped out
    return int(address)


def map_resident(fd: int, offset: int, length: int) -> int:
    """Map a range, with its pages present, for :func:`page_out`. Return the address.

    Every page of the range must be data and resident: this call fills holes, and waits for swap. OSError if the file
    has become shorter.
    """
    address = _map(fd, offset, length)
    try:
        _checked(_libc.madvise(address, length, _MADV_POPULATE_READ), "madvise populate")
    except OSError:
        _libc.munmap(address, length)
        raise
    return address


def page_out(address: int, length: int, *, from_all_cpus: bool = False) -> None:
    """Push the pages of a mapping of :func:`map_resident` to swap, on a best-effort basis. It does not restore
    pages that were dropped since the mapping was made.

    It waits for the swap device: call it in a thread.

    A new page is in a list of the CPU that wrote it. MADV_PAGEOUT on another CPU does not find it there. With
    `from_all_cpus` an empty move_pages(2) empties these lists first (64 us on 2 CPUs).
    """
    if from_all_cpus:
        _empty_cpu_lists()
    _libc.madvise(address, length, _MADV_PAGEOUT)


def _empty_cpu_lists() -> None:
    _libc.syscall(ctypes.c_long(_MOVE_PAGES), 0, ctypes.c_long(0), None, (ctypes.c_int * 1)(0), None, 0)


def page_out_in(process: int, address: int, length: int) -> None:
    """Push the pages of another process' mapping to swap, on a best-effort basis. process_madvise(2).

    `process` is a pidfd. Raises OSError: EPERM without the right to trace the process and CAP_SYS_NICE, ESRCH if it has
    ended. It waits for the swap device.
    """
    _empty_cpu_lists()
    for start in range(address, address + length, _WINDOW):
        part = (ctypes.c_ulong * 2)(start, min(_WINDOW, address + length - start))  # a struct iovec
        number, count, flags = (ctypes.c_long(value) for value in (_PROCESS_MADVISE, 1, 0))
        _checked(_libc.syscall(number, process, part, count, _MADV_PAGEOUT, flags), "process_madvise")


def unmap(address: int, length: int) -> None:
    """Remove a mapping of :func:`map_resident`."""
    _libc.munmap(address, length)


def swap_space() -> tuple[int, int]:
    """Return the total and the free swap of the machine, in bytes. sysinfo(2)."""
    answer = (ctypes.c_ulong * 64)()  # a struct sysinfo: words 8, 9 are totalswap, freeswap; 13 begins with mem_unit
    _checked(_libc.sysinfo(ctypes.byref(answer)), "sysinfo")
    unit = ctypes.c_uint32.from_buffer(answer, 13 * ctypes.sizeof(ctypes.c_ulong)).value
    return answer[8] * unit, answer[9] * unit


def lock_memory(limit: int) -> None:
    """Lock the present mappings of this process and, if no limit applies, all future ones. mlockall(2).

    A page is locked at its first use. Mappings of backups are not locked, so that their pages can be swapped out.
    `limit` is RLIMIT_MEMLOCK. A process that locks future mappings gets no more memory at the limit. So under a limit
    only present mappings are locked. OSError(EPERM or ENOMEM) if the limit is too low for them.
    """
    _checked(_libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT), "mlockall")
    if limit != resource.RLIM_INFINITY:
        try:  # a mapping larger than the limit shows whether it applies, in any user namespace
            mmap.mmap(-1, limit + _PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ).close()
        except OSError:
            _checked(_libc.mlockall(_MCL_CURRENT | _MCL_ONFAULT), "mlockall")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGEST_THRESHOLD = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX

HEAP_BYTES = 8 << 20
"""Heap for libfuse's request buffers: 1 MiB for each task that reads requests."""


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends. `parent` is the parent's process id."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # the parent ended before the call
        os.kill(os.getpid(), number)


def outlive_parent() -> None:
    """Undo :func:`die_with`, or what the parent did in its place."""
    _libc.prctl(_PR_SET_PDEATHSIG, 0)


@functools.cache
def touch_heap() -> None:
    """Give malloc(3) HEAP_BYTES of memory with all pages mapped, and keep them mapped after free(3). Once a process.

    If a process is killed while it reads a request from FUSE into unmapped pages, the kernel answers the request with
    EIO: it serves no page faults of a killed process (get_user_pages() in fuse_copy_fill()).

    Threads share this memory: one of their own would be mapped and unmapped for each request of 1 MiB.
    """
    for parameter in _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD:
        _libc.mallopt(parameter, _LARGEST_THRESHOLD)
    _libc.mallopt(_M_ARENA_MAX, 1)
    _libc.malloc.restype = ctypes.c_void_p
    if address := _libc.malloc(ctypes.c_size_t(HEAP_BYTES)):
        ctypes.memset(address, 1, HEAP_BYTES)
        _libc.free(ctypes.c_void_p(address))


# --- capabilities ---


def renounce(capability: int) -> None:
    """Drop one of the first 32 capabilities from this thread and the threads that it starts. capset(2)."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)  # version and process id
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice
    _checked(_libc.capget(ctypes.byref(header), sets), "capget")
    sets[0] &= ~(1 << capability)
    _checked(_libc.capset(ctypes.byref(header), sets), "capset")
