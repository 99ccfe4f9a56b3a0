"""Loops of page operations with as little overhead as possible, for ``ttmfs bench`` and the project's own benchmarks.

Paths are made in advance, and functions are local names. Nothing here checks the data.
"""

import contextlib
import errno
import itertools
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = [
    "REQUEST_BYTES", "Pages", "buffer", "create", "open_read", "open_write", "pread", "pwrite", "read_image", "unlink",
    "wake_up_microseconds", "write_image",
]  # fmt: skip

REQUEST_BYTES = 1 << 20
WAKE_UPS = 2000


@dataclass
class Pages:
    """The page files of one directory."""

    paths: list[str]
    size: int
    content: bytes
    flags: int = 0  # for every open(2)
    held: list[int] = field(default_factory=list)  # one descriptor for each operation; only a few differ

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
    """Make each page, write it, close it."""
    _open_each_and_write(pages, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def open_read(pages: Pages) -> None:
    """Open each page, read it, close it."""
    open_, read, close, size, flags = os.open, os.read, os.close, pages.size, os.O_RDONLY | pages.flags
    for path in pages.paths:
        fd = open_(path, flags)
        read(fd, size)
        close(fd)


def open_write(pages: Pages) -> None:
    """Open each page, write it, close it."""
    _open_each_and_write(pages, os.O_WRONLY)


def unlink(pages: Pages) -> None:
    """Drop each page."""
    remove = os.unlink
    for path in pages.paths:
        remove(path)


def pread(pages: Pages) -> None:
    """Read each page that is held open."""
    read, size = os.pread, pages.size
    for fd in pages.held:
        read(fd, size, 0)


def pwrite(pages: Pages) -> None:
    """Write each page that is held open."""
    write, content = os.pwrite, pages.content
    for fd in pages.held:
        write(fd, content, 0)


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
    """Read `size` bytes of a file, one buffer at a time."""
    read, buffers, length = os.preadv, [request], len(request)
    for offset in range(start, start + size, length):
        if (got := read(fd, buffers, offset)) != length:
            raise OSError(errno.EIO, f"read {got} of {length} bytes")


def wake_up_microseconds() -> float | None:
    """Microseconds from waking a process on another CPU to its running: half a round through two pipes. The median.

    A page operation of a FUSE filesystem has two of them, unless the daemon polls. None: there is only one CPU.
    """
    here, *others = sorted(os.sched_getaffinity(0))
    if not others:
        return None
    (asked, ask), (answered, answer) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.sched_setaffinity(0, {others[0]})
        os.close(ask)
        while byte := os.read(asked, 1):
            os.write(answer, byte)
        os._exit(0)
    os.sched_setaffinity(0, {here})
    rounds = []
    for _ in range(WAKE_UPS):
        start = time.perf_counter_ns()
        os.write(ask, b".")
        os.read(answered, 1)
        rounds.append(time.perf_counter_ns() - start)
    os.sched_setaffinity(0, {here, *others})
    for fd in asked, ask, answered, answer:
        os.close(fd)
    os.waitpid(child, 0)
    return round(statistics.median(rounds) / 2000, 1)
