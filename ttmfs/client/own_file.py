"""The backup's own file, a sparse file of a tmpfs: how its descriptor is obtained, and its pages by system calls on it.

Threading: any thread may call any method.
"""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import wait
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BackupEnded, PageAbsent
from ..linux import system_calls
from ..linux.memory import Swap
from ..model import arguments
from ..options import BASE_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import ThreadPoolExecutor

    from .directory import Directory

__all__ = ["STEP", "WORKERS", "OwnFile", "descriptor_of", "fill_from", "read_existing"]

STEP = 16 << 20
"""The most bytes that one system call reads or writes, and that one search for zeros covers."""

PARALLEL = 8 << 20
"""The least bytes that several threads read. One thread writes, because only writing takes a lock of the file."""

WORKERS = 4


class OwnFile:
    """A backup's own file. Errors are OSError and TtmfsError; runs and offsets are as in Directory."""

    def __init__(self, fd: int, page_size: int, threads: ThreadPoolExecutor) -> None:
        """Take over a descriptor, open for reading and writing."""
        self.fd = fd
        self._page_size = page_size
        self._threads = threads
        self._swap = Swap()

    @property
    def size(self) -> int:
        """Bytes that the backup spans. Raises BackupEnded."""
        status = os.fstat(self.fd)
        if not status.st_nlink:
            raise BackupEnded("the backup was ended")
        return status.st_size

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the runs of stored pages, ascending."""
        return system_calls.page_runs(self.fd, self._page_size, 0, self.size // self._page_size)

    def store(self, offset: int, data: memoryview) -> int:
        """Store whole pages. Return the number of bytes stored."""
        self._renew_swap_counts()
        if self._page_size > BASE_PAGE_SIZE:  # so that no page is stored in part
            system_calls.allocate_range(self.fd, offset, len(data))
        return os.pwrite(self.fd, data, offset)

    def read(self, dst: memoryview, runs: list[tuple[int, int]]) -> None:
        """Read the pages of runs, one after the other. Raises PageAbsent."""
        read_existing(self, dst, runs, self._page_size)

    def fill(self, dst: memoryview, offset: int) -> None:
        """Fill a buffer; absent pages read as zeros."""
        self._renew_swap_counts()
        workers = min(WORKERS, len(os.sched_getaffinity(0)))
        if len(dst) < PARALLEL or workers == 1:
            fill_from(self.fd, dst, offset)
            return
        share = -(-len(dst) // workers // BASE_PAGE_SIZE) * BASE_PAGE_SIZE
        parts = [(dst[start : start + share], offset + start) for start in range(0, len(dst), share)]
        others = [self._threads.submit(fill_from, self.fd, *part) for part in parts[1:]]
        try:
            fill_from(self.fd, *parts[0])
        finally:
            wait(others)  # they write to the caller's memory
        for other in others:
            other.result()

    def check_present(self, runs: list[tuple[int, int]]) -> None:
        """Raise PageAbsent unless every page of the runs is stored."""
        for first, past in runs:
            if (absent := system_calls.first_absent(self.fd, self._page_size, first, past)) is not None:
                raise PageAbsent(f"handle {absent + 1} holds no page")

    def drop(self, runs: list[tuple[int, int]]) -> None:
        """Drop the pages of runs."""
        for first, past in runs:
            system_calls.punch_hole(self.fd, first * self._page_size, (past - first) * self._page_size)

    def residency(self, first: int, past: int) -> tuple[int, int]:
        """Return the number of pages between two indices, and how many of them are swapped out, rounded up."""
        length = (min(past, self.size // self._page_size) - first) * self._page_size
        if length <= 0:
            return 0, 0
        runs = list(system_calls.page_runs(self.fd, self._page_size, first, past))
        pages = sum(end - start for start, end in runs)
        if not self._swap.used:
            return pages, 0
        size, base_pages = self._page_size, pages * self._page_size // BASE_PAGE_SIZE
        resident = sum(
            system_calls.resident_in_mapping(self.fd, start * size, (end - start) * size) for start, end in runs
        )
        return pages, -(-pages * (base_pages - resident) // base_pages) if resident < base_pages else 0

    def _renew_swap_counts(self) -> None:
        """Refresh the counts of swap before memory is charged to this process' control group."""
        if self._swap.used:
            self._swap.renew_counts()


def read_existing(file: OwnFile | Directory, dst: memoryview, runs: list[tuple[int, int]], page_size: int) -> None:
    """Read the pages of runs of indices into `dst`, one after the other. Raises PageAbsent.

    Only a page of zeros can be absent, so only such pages are checked. If such a page is dropped and stored again
    during the call, zeros can be read in its place.
    """
    done = 0
    for first, past in runs:
        length = (past - first) * page_size
        file.fill(dst[done : done + length], first * page_size)
        done += length
    zeros = list(_zero_pages(dst, runs, page_size))
    if zeros:
        file.check_present([run for _, run in zeros])
    for part, (first, _) in zeros:  # one of them may have been stored after the first read
        file.fill(part, first * page_size)


def _zero_pages(
    data: memoryview, runs: list[tuple[int, int]], page_size: int
) -> Iterator[tuple[memoryview, tuple[int, int]]]:
    """Yield the runs of pages in `data` that are zeros throughout, each with its part of `data`."""
    row, rows = 0, STEP // page_size or 1
    for first, past in runs:
        for start in range(first, past, rows):
            part = data[row * page_size : (row + min(rows, past - start)) * page_size]
            words = np.frombuffer(part, np.uint64).reshape(-1, page_size // 8)
            found = np.flatnonzero(words[:, 0] == 0)
            handles = found[~words[found].any(axis=1)].astype(np.uint64) + np.uint64(start + 1)
            for begin, end in arguments.runs(handles):
                yield part[(begin - start) * page_size : (end - start) * page_size], (begin, end)
            row += len(words)


def fill_from(fd: int, dst: memoryview, offset: int, step: int = STEP) -> None:
    """Fill a buffer from a file, `step` bytes by each system call. Raises PageAbsent past the end."""
    done = 0
    while done < len(dst):
        if not (read := os.preadv(fd, [dst[done : done + step]], offset + done)):
            raise PageAbsent("the backup has become smaller")
        done += read


def descriptor_of(directory: Directory) -> int:
    """Return a descriptor of a backup's own file, for reading and writing; -1 if this process can get none.

    Users who may read and write the backup can open ``.shmem``. It is the file itself, or a link to it, which root and
    the daemon's user can follow. With ``store=`` it is a link that is not followed: there the daemon counts the pages.
    """
    if directory.served_by not in (0, os.geteuid()):  # it cannot be the file itself, and a link could lead anywhere
        return -1
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return directory.open_file(".shmem", flags)
    except OSError as error:
        if error.errno != errno.ELOOP:
            return -1
    try:
        config = os.open(".config", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.mount)
        with open(config, encoding="utf-8") as file:
            if json.load(file).get("store") is not None:
                return -1
        return os.open(".shmem", flags, dir_fd=directory.fd)
    except (OSError, ValueError, AttributeError):
        return -1
