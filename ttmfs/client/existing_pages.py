"""Reading pages from a sparse file, in which absent pages are zeros, and refusing those that do not exist."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from ..errors import PageAbsent
from ..model import arguments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .directory import Directory
    from .own_file import OwnFile

__all__ = ["STEP", "fill_from", "read_existing"]

STEP = 16 << 20
"""Bytes that one system call reads or writes in the backup's own file, and that are searched for zeros at a time."""


def read_existing(file: OwnFile | Directory, dst: memoryview, runs: list[tuple[int, int]], page_size: int) -> None:
    """Read the pages of runs of indices into `dst`, one behind the other. Raises PageAbsent.

    Only a page of zeros can be absent, so only these are looked for. If such a page is dropped and stored again during
    the call, zeros can be read in its place.
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
