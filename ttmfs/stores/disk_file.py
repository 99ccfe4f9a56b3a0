"""A backup's file on a disk. Threads change it, because the kernel makes writers wait for the disk.

Concurrency: the kernel locks the file during a change. So each change, and each check of the file, holds
:meth:`DiskFile.locked`. The loop decides and counts. The thread has a descriptor of its own, and touches nothing else.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from ..errors import TtmfsError, from_os_error, translated
from ..linux import system_calls
from ..options import BASE_PAGE_SIZE
from .page_file import PageFile, allocated_until, free_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager

__all__ = ["DiskFile"]

T = TypeVar("T")


class DiskFile(PageFile):
    """A sparse file on a disk."""

    __slots__ = ()

    def locked(self) -> AbstractAsyncContextManager[None]:
        return self._store.blocking_io.file_locks.locked(self.id)

    # --- storing and dropping ---

    async def overwrite(self, offset: int, data: bytes | memoryview) -> int:
        return await self.write(offset, data)

    async def write(self, offset: int, data: bytes | memoryview) -> int:
        data = self._admitted(offset, data)
        first, past = offset // self.page_size, -(-(offset + len(data)) // self.page_size)
        with self._changing("storing pages", first, past, adding=True) as file:
            return await self._in_thread(file, _write_whole_pages, self.page_size, self._store.block_size, offset, data)

    async def create_page(self, idx: int) -> None:
        if not self._exists(idx):
            await self.write(idx * self.page_size, b"\0")

    async def drop_range(self, first: int, past: int) -> None:
        start, end = first * self.page_size, min(past * self.page_size, 2**63 - 1)
        with self._changing("dropping pages", first, past) as file:
            await self._in_thread(file, system_calls.punch_hole, start, end - start)

    @contextlib.contextmanager
    def _changing(self, what: str, first: int, past: int, *, adding: bool = False) -> Iterator[system_calls.Duplicate]:
        """Wrap a change of the pages between two indices. Yields a descriptor for the thread."""
        with (
            translated(what),
            contextlib.closing(system_calls.Duplicate(self._files.descriptor(self.id))) as file,
            self._store.changing(self.id, first, past, file.fd, adding=adding),
        ):
            yield file

    async def _in_thread(self, file: system_calls.Duplicate, change: Callable[..., T], *arguments: Any) -> T:
        """Call `change` with the descriptor and the arguments in a thread. Returns its result."""
        changes = self._store.blocking_io.changes
        async with changes.turn(os.fstat(file.fd).st_uid):
            return await trio.to_thread.run_sync(_changed, change, file, arguments, limiter=changes.limiter)

    # --- memory and disk ---

    def is_out(self, offset: int, length: int, *, to_write: bool = False) -> bool:
        if to_write:
            offset, length = self._needed_to_write(offset, length)
        if not length:
            return False
        fd = self._files.descriptor(self.id)
        try:
            end = min(offset + length, os.fstat(fd).st_size)
            base = -(-end // BASE_PAGE_SIZE) - offset // BASE_PAGE_SIZE
            return base > 0 and system_calls.resident(fd, offset, end - offset) < base
        except OSError as error:
            raise from_os_error(error, "asking what is in memory") from error

    def _needed_to_write(self, offset: int, length: int) -> tuple[int, int]:
        reads = (offset | length) % BASE_PAGE_SIZE  # a write of whole base pages reads nothing
        return offset, length if reads else 0

    def _base_pages_out(self) -> Iterator[int]:
        for first, past in self.extents():  # only the pages, as holes that were read are in the page cache, too
            start, length = first * self.page_size, (past - first) * self.page_size
            resident = system_calls.resident(self._files.descriptor(self.id), start, length)
            yield max(0, length // BASE_PAGE_SIZE - resident)

    async def push_out(self, offset: int, length: int) -> None:
        with contextlib.suppress(TtmfsError, OSError):
            await self._store.sync(self.id)
            with contextlib.closing(system_calls.Duplicate(self._files.descriptor(self.id))) as file:
                await self._in_thread(file, os.posix_fadvise, offset, length, os.POSIX_FADV_DONTNEED)

    async def sync(self, offset: int, length: int) -> None:
        await self._store.sync(self.id)


def _changed(change: Callable[..., T], file: system_calls.Duplicate, arguments: tuple[Any, ...]) -> T:
    return change(file.fd, *arguments)  # `file` stays open during the call


def _write_whole_pages(fd: int, page_size: int, block_size: int, offset: int, data: bytes | memoryview) -> int:
    """As pwrite(2), but an absent page gets all its data, or stays absent.

    A tmpfs does that by itself. On a full disk ext4 leaves a page of zeros where a write fails, and other filesystems
    may stop in the middle of a page.
    """
    start, end = offset, offset + len(data)
    first, past = offset // page_size, -(-end // page_size)
    absent = [idx for idx in range(first, past) if not system_calls.is_data(fd, idx * page_size, page_size)]
    if page_size > block_size:
        end = min(end, allocated_until(fd, page_size, first, past, absent) * page_size)
        data, absent = memoryview(data)[: end - offset], [idx for idx in absent if idx * page_size < end]
        before = offset % page_size if first in absent else 0
        behind = -end % page_size if end // page_size in absent else 0
        if before or behind:  # parts left unwritten would need room later, for the filesystem's extents
            data, offset = b"".join((bytes(before), data, bytes(behind))), offset - before
    return min(_write_absent(fd, page_size, offset, data, absent), end) - start


def _write_absent(fd: int, page_size: int, offset: int, data: bytes | memoryview, absent: list[int]) -> int:
    """Write as much as there is room for, and free absent pages that were written in part. Returns the end."""
    position, stop, at_once = offset, offset + len(data), True
    while position < stop:
        past = stop if at_once else min(stop, (position // page_size + 1) * page_size)
        try:
            position += os.pwrite(fd, data[position - offset : past - offset], position)
        except OSError:
            free_pages(fd, page_size, (idx for idx in absent if (idx + 1) * page_size > position))
            if position // page_size in absent:
                position = max(offset, position // page_size * page_size)
            if at_once:  # retry page by page: some may find room
                at_once = False
            elif position > offset:
                break
            else:
                raise
    return position
