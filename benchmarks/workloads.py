"""Loops of page operations with as little overhead as possible, and their cost.

Paths are made in advance, and functions are local names. Separate passes check the data, and these are not timed.
"""

import ctypes
import errno
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from systems import System

from ttmfs.cli.commands.page_operations import (
    REQUEST_BYTES,
    Pages,
    buffer,
    create,
    open_read,
    open_write,
    pread,
    pwrite,
    read_image,
    unlink,
    write_image,
)

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
    "pages_of",
    "pause",
    "read_image",
    "store",
    "transfer",
    "write_image",
]

PAUSE_SECONDS = 0.005
AT_EMPTY_PATH, AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, STATX_BYTES = 0x1000, 0x2000, 0x7FF, 256

_libc = ctypes.CDLL(None, use_errno=True)


def pages_of(system: System, directory: Path, count: int) -> Pages:
    """The first `count` pages of a directory."""
    paths = [f"{directory}/{handle}" for handle in range(1, count + 1)]
    return Pages(paths, system.page_size, b"", system.open_flags)


def stat_uncached(pages: Pages) -> None:
    """statx(2) that always asks the filesystem, past the kernel's cache."""
    statx, answer, flags = _libc.statx, ctypes.create_string_buffer(STATX_BYTES), AT_EMPTY_PATH | AT_STATX_FORCE_SYNC
    for fd in pages.held:
        if statx(fd, b"", flags, STATX_BASIC_STATS, answer):
            raise OSError(ctypes.get_errno(), "statx")


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
