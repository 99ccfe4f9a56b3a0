"""A backup's file on a tmpfs. The event loop does all work on it, and its pages can be swapped out.

Concurrency: see :mod:`.page_file`. No thread changes the file.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING

import trio

from ..errors import TtmfsError, from_os_error
from ..linux import system_calls
from ..options import BASE_PAGE_SIZE
from .page_file import STEP, PageFile, allocated_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractAsyncContextManager

__all__ = ["TmpfsFile"]

WINDOW = 1 << 20
"""Bytes pushed out of memory at a time. Other requests are served in between."""

_UNLOCKED = contextlib.nullcontext()


class TmpfsFile(PageFile):
    """A sparse file in memory and swap."""

    __slots__ = ()

    def locked(self) -> AbstractAsyncContextManager[None]:
        return _UNLOCKED

    # --- storing and dropping ---

    def overwrite(self, offset: int, data: bytes | memoryview) -> int:
        end = self._end_of(offset, len(data))  # a user of .shmem may have cut the page
        return self._write(offset, data[: end - offset])

    def write(self, offset: int, data: bytes | memoryview) -> int:
        return self._write(offset, self._admitted(offset, data))

    def create_page(self, idx: int) -> None:
        if not self._exists(idx):
            if not self._store.admit(self.id, 1):
                raise self._store.refusal(self.id)
            self._write(idx * self.page_size, b"\0")

    def drop_range(self, first: int, past: int) -> None:
        try:
            fd = self._files.descriptor(self.id)
            start, end = first * self.page_size, min(past * self.page_size, 2**63 - 1)
            if not self._store.counts_changes:
                system_calls.punch_hole(fd, start, end - start)
                return
            with self._store.changing(self.id, first, past):
                system_calls.punch_hole(fd, start, end - start)
        except OSError as error:
            raise from_os_error(error, "dropping pages") from error

    def _write(self, offset: int, data: bytes | memoryview) -> int:
        """Store as many bytes as the tmpfs has room for."""
        fd, end = self._files.descriptor(self.id), offset + len(data)
        try:
            if not self._store.counts_changes:
                if len(data) <= STEP and self.page_size <= self._store.block_size:  # the usual case, one call less
                    return os.pwrite(fd, data, offset)
                return self._put(fd, offset, data)
            with self._store.changing(self.id, offset // self.page_size, -(-end // self.page_size)):
                return self._put(fd, offset, data)
        except OSError as error:
            raise from_os_error(error, "storing pages") from error

    def _put(self, fd: int, offset: int, data: bytes | memoryview) -> int:
        """Store bytes in STEPs. Pages cannot be swapped out during their fallocate(2), so a long run could end in the
        OOM killer.
        """
        view, position, end = memoryview(data), offset, offset + len(data)
        while position < end:
            past = min(end, position // STEP * STEP + STEP)
            try:
                room = past if self.page_size <= self._store.block_size else self._allocate(fd, position, past)
                position += os.pwrite(fd, view[position - offset : room - offset], position)
            except OSError:
                if position == offset:
                    raise
                break
            if position < past:
                break
        return position - offset

    def _allocate(self, fd: int, offset: int, end: int) -> int:
        """Allocate whole pages, so that none is stored in part. Returns the offset where room ends."""
        page_size = self.page_size
        first, past = offset // page_size * page_size, -(-end // page_size) * page_size
        if sum(system_calls.residency(fd, first, past - first)) * BASE_PAGE_SIZE == past - first:
            return end  # already allocated. fallocate(2) would check every base page, 95 us for 2 MiB
        return min(end, allocated_until(fd, page_size, first // page_size, past // page_size) * page_size)

    # --- memory and swap ---

    def is_out(self, offset: int, length: int, *, to_write: bool = False) -> bool:
        if not length or not self._store.swap.used:
            return False
        if to_write:
            offset, length = self._needed_to_write(offset, length)
        try:
            return system_calls.residency(self._files.descriptor(self.id), offset, length)[1] > 0
        except OSError as error:
            raise from_os_error(error, "asking what is in memory") from error

    def _needed_to_write(self, offset: int, length: int) -> tuple[int, int]:
        if self.page_size <= self._store.block_size:
            return offset, length
        first, past = offset // self.page_size, -(-(offset + length) // self.page_size)
        return first * self.page_size, (past - first) * self.page_size  # allocating a page brings all of it in

    def _base_pages_out(self) -> Iterator[int]:
        position = 0  # in STEPs from data to data, so that the time does not depend on the number of runs
        while (start := self._next_data(position)) is not None:
            yield system_calls.residency(self._files.descriptor(self.id), start, STEP)[1]
            position = start + STEP

    async def push_out(self, offset: int, length: int) -> None:
        end = -(-(offset + length) // BASE_PAGE_SIZE) * BASE_PAGE_SIZE
        offset -= offset % BASE_PAGE_SIZE
        with contextlib.suppress(TtmfsError, OSError):
            owner = self.stat().st_uid
            while offset < end and system_calls.swap_space()[1]:
                async with self._store.blocking_io.syncs.turn(owner):
                    fd = self._files.descriptor(self.id)
                    run = _resident_run(fd, offset, min(end, os.fstat(fd).st_size), self.page_size)
                    start, offset = run or (end, end)
                    if start < offset:
                        await self._push_out_run(fd, start, offset - start)
                    else:
                        await trio.lowlevel.checkpoint()

    async def _push_out_run(self, fd: int, start: int, size: int) -> None:
        address = system_calls.map_resident(fd, start, size)  # on the loop, so that no page is dropped in between
        run_sync = partial(trio.to_thread.run_sync, limiter=self._store.blocking_io.syncs.limiter)
        self._store.swap.page_out_begins()
        try:
            await run_sync(system_calls.page_out, address, size)
            if system_calls.residency(self._files.descriptor(self.id), start, size)[0]:
                await run_sync(partial(system_calls.page_out, address, size, from_all_cpus=True))
        finally:
            system_calls.unmap(address, size)

    async def sync(self, offset: int, length: int) -> None:
        await self.push_out(offset, length)


def _resident_run(fd: int, offset: int, end: int, page_size: int) -> tuple[int, int] | None:
    """Return the next run of base pages in memory that belong to pages, as (start, end), or None.

    After an empty run the caller continues at its end. This probes page by page within one window, because finding the
    end of a run of data takes time in proportion to the whole run.
    """
    found = system_calls.next_data_start(fd, offset)
    if found is None or found >= end:
        return None
    # A large page can begin with allocated blocks without data.
    start = past = max(offset, found // page_size * page_size)
    limit = min(end, start + WINDOW)
    while past < limit and system_calls.is_data(fd, past // page_size * page_size, page_size):
        past = min(limit, (past // page_size + 1) * page_size)
    while start < past:
        cached, _ = system_calls.residency(fd, start, past - start)
        if cached * BASE_PAGE_SIZE == past - start:
            return start, past
        if not cached:
            break
        past = start + max(BASE_PAGE_SIZE, (past - start) // BASE_PAGE_SIZE // 2 * BASE_PAGE_SIZE)
    return past, past
