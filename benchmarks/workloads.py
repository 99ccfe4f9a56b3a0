"""Loops of page operations with as little overhead as possible, and their cost.

Paths are made in advance, and functions are local names. Separate passes check the data, and these are not timed.
"""

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from systems import System

__all__ = [
    "EXPECTED",
    "OPERATIONS",
    "REQUEST_BYTES",
    "Cost",
    "Pages",
    "Transfer",
    "buffer",
    "check",
    "check_requests",
    "create",
    "know_names",
    "measure",
    "pause",
    "read_image",
    "store",
    "transfer",
    "write_image",
]

PAUSE_SECONDS = 0.005
REQUEST_BYTES = 1 << 20
AT_EMPTY_PATH, AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, STATX_BYTES = 0x1000, 0x2000, 0x7FF, 256

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Pages:
    """The page files that one system's client works on."""

    paths: list[str]
    size: int
    content: bytes
    flags: int = 0  # for every open(2)
    held: list[int] = field(default_factory=list)  # one descriptor for each operation; only a few differ

    @classmethod
    def of(cls, system: System, directory: Path, count: int) -> Self:
        """The first `count` pages of a directory."""
        paths = [f"{directory}/{handle}" for handle in range(1, count + 1)]
        return cls(paths, system.page_size, b"", system.open_flags)

    def some(self, count: int) -> list[str]:
        """`count` of the paths, spread evenly."""
        return self.paths[:: max(1, len(self.paths) // max(1, count))][:count]

    @contextlib.contextmanager
    def holding(self, different: int) -> Iterator[None]:
        """Keep `different` pages open."""
        descriptors = [os.open(path, os.O_RDWR | self.flags) for path in self.some(different)]
        self.held = list(itertools.islice(itertools.cycle(descriptors), len(self.paths)))
        try:
            yield
        finally:
            self.held = []
            for fd in descriptors:
                os.close(fd)


def _open_each_and_write(pages: Pages, flags: int) -> None:
    open_, write, close, content = os.open, os.write, os.close, pages.content
    flags |= pages.flags
    for path in pages.paths:
        fd = open_(path, flags, 0o644)
        write(fd, content)
        close(fd)


def create(pages: Pages) -> None:
    _open_each_and_write(pages, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def open_read(pages: Pages) -> None:
    open_, read, close, size, flags = os.open, os.read, os.close, pages.size, os.O_RDONLY | pages.flags
    for path in pages.paths:
        fd = open_(path, flags)
        read(fd, size)
        close(fd)


def open_write(pages: Pages) -> None:
    _open_each_and_write(pages, os.O_WRONLY)


def unlink(pages: Pages) -> None:
    remove = os.unlink
    for path in pages.paths:
        remove(path)


def stat_uncached(pages: Pages) -> None:
    """statx(2) that always asks the filesystem, past the kernel's cache."""
    statx, answer, flags = _libc.statx, ctypes.create_string_buffer(STATX_BYTES), AT_EMPTY_PATH | AT_STATX_FORCE_SYNC
    for fd in pages.held:
        if statx(fd, b"", flags, STATX_BASIC_STATS, answer):
            raise OSError(ctypes.get_errno(), "statx")


def pread(pages: Pages) -> None:
    read, size = os.pread, pages.size
    for fd in pages.held:
        read(fd, size, 0)


def pwrite(pages: Pages) -> None:
    write, content = os.pwrite, pages.content
    for fd in pages.held:
        write(fd, content, 0)


OPERATIONS: dict[str, Callable[[Pages], None]] = {
    "create+write+close": create,
    "stat uncached": stat_uncached,
    "pread": pread,
    "pwrite": pwrite,
    "open+read+close": open_read,
    "open+write+close": open_write,
    "unlink": unlink,
}
"""The order matters: each operation needs what the one before it left."""

EXPECTED = {
    "create+write+close": {"create", "write"},
    "stat uncached": {"getattr"},
    "pread": {"read"},
    "pwrite": {"write"},
    "open+read+close": {"open", "read"},
    "open+write+close": {"open", "write"},
    "unlink": {"unlink"},
}
"""ttmfs must have seen exactly one of these requests for each operation. Otherwise a cache answered."""


WALKS = 3
"""Requests that the path walk to ``.stats`` may add: its name and attributes are cached for a second."""


@dataclass(frozen=True)
class Cost:
    """Microseconds of one operation: latency, and the CPU time of the daemon and of the client."""

    latency: float
    daemon: float
    client: float


def know_names(pages: Pages) -> None:
    """Have the kernel look up every name, so that operations within a second need no look-up."""
    for path in pages.paths:
        os.stat(path)


def pause() -> None:
    """Let polling stop, and let the kernel send the releases that no close waits for."""
    time.sleep(PAUSE_SECONDS)


def measure(system: System, operation: str, pages: Pages) -> Cost:
    """Do an operation to each page."""
    act, count = OPERATIONS[operation], len(pages.paths)
    pause()
    daemon, client = system.cpu(), time.process_time_ns()
    start = time.perf_counter_ns()
    act(pages)
    elapsed = time.perf_counter_ns() - start
    client = time.process_time_ns() - client
    pause()
    return Cost(*(ns / count / 1000 for ns in (elapsed, system.cpu() - daemon, client)))


def check(pages: Pages, paths: Sequence[str]) -> None:
    """Check that these pages exist and hold what was written."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            if file.read(pages.size) != pages.content:
                raise RuntimeError(f"{path} does not hold what was written")


def check_requests(operation: str, seen: Counter[str], count: int) -> None:
    for request in EXPECTED[operation]:
        stray = WALKS if request in ("getattr", "lookup") else 0
        if not count <= seen[request] <= count + stray:
            raise RuntimeError(f"{count} times {operation}: the daemon saw {seen[request]} requests {request}")


# --- many pages at once ---

Transfer = Callable[[int, int, mmap.mmap, int], None]


def buffer(size: int) -> mmap.mmap:
    """A page-aligned buffer for direct I/O, with random data."""
    found = mmap.mmap(-1, size)
    for start in range(0, size, REQUEST_BYTES):
        found[start : start + REQUEST_BYTES] = os.urandom(min(REQUEST_BYTES, size - start))
    return found


def write_image(fd: int, size: int, request: mmap.mmap, start: int = 0) -> None:
    """Write `size` bytes of a file, one buffer at a time."""
    write, length = os.pwrite, len(request)
    for offset in range(start, start + size, length):
        if (wrote := write(fd, request, offset)) != length:
            raise OSError(errno.EIO, f"wrote {wrote} of {length} bytes")


def read_image(fd: int, size: int, request: mmap.mmap, start: int = 0) -> None:
    read, buffers, length = os.preadv, [request], len(request)
    for offset in range(start, start + size, length):
        if (got := read(fd, buffers, offset)) != length:
            raise OSError(errno.EIO, f"read {got} of {length} bytes")


def transfer(act: Transfer, fd: int, size: int, request: mmap.mmap, start: int = 0) -> float:
    """The seconds of writing or reading."""
    begin = time.perf_counter_ns()
    act(fd, size, request, start)
    return (time.perf_counter_ns() - begin) / 1e9


def store(backup: Path, pages: int, page_size: int) -> None:
    """Store the first `pages` pages of a backup, in requests of 1 MiB through its image."""
    size = pages * page_size
    whole = size // REQUEST_BYTES * REQUEST_BYTES
    fd = os.open(backup / ".image", os.O_WRONLY)
    try:
        write_image(fd, whole, request := buffer(min(size, REQUEST_BYTES)))
        if size > whole and os.pwrite(fd, request[: size - whole], whole) != size - whole:
            raise OSError(errno.EIO, "a short write")
    finally:
        os.close(fd)
