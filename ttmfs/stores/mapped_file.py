"""A backup's file on a distributed filesystem, which does not tell holes: a map beside it tells which pages exist.

Everything that reads or changes the file happens in a thread, one at a time for each backup and in order. The event
loop looks at the map and at the attributes in memory, and at nothing else. A request waits for `store_timeout=` at
most. Then it fails, and its thread keeps the backup locked until the filesystem answers.

Data is written before its page is marked in the map's file, and a page is unmarked before its data is punched out. So
after a crash an absent page may have data, and :attr:`PageMap.clean` says whether that can be. Absent pages read as
zeros all the same.

Concurrency: as :mod:`.page_file`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from ..errors import NoData, OutOfBounds, StoreFailed, from_os_error
from ..linux import system_calls
from . import page_map
from .disk_file import DiskFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from .distributed import Distributed
    from .opened import Opened
    from .page_map import Change

__all__ = ["MappedFile"]

T = TypeVar("T")


class MappedFile(DiskFile):
    """A file whose pages a map lists."""

    __slots__ = ()
    _store: Distributed

    @property
    def _opened(self) -> Opened:
        return self._store.opened(self.id)

    def locked(self) -> AbstractAsyncContextManager[None]:
        return self._store.locked(self.id)

    # --- size and pages ---

    @property
    def size(self) -> int:
        return self._opened.size

    def stat(self) -> os.stat_result:
        return self._opened.present_stat(self.page_size)

    @property
    def is_empty(self) -> bool:
        return not self._opened.map.count

    def holds(self, idx: int) -> bool:
        return idx in self._opened.map

    def _next_data(self, offset: int) -> int | None:
        found = self._opened.map.next(offset // self.page_size)
        return None if found is None else max(offset, found * self.page_size)

    def extent(self, idx: int) -> tuple[int, int] | None:
        return next(self.extents(idx), None)

    def first_absent(self, first: int, past: int) -> int | None:
        return self._opened.map.first_absent(first, past)

    def extents(self, first: int = 0, past: int | None = None) -> Iterator[tuple[int, int]]:
        limit = self.size // self.page_size
        return self._opened.map.runs(first, limit if past is None else min(past, limit))

    async def count_pages(self) -> int:
        return self.pages

    async def count_swapped(self) -> int:
        out = await self._store.blocking_io.slices.total(self._base_pages_out(), contextlib.nullcontext)
        return self._pages_of(out, self.pages)

    def _exists(self, idx: int) -> bool:
        if idx >= (limit := self.size // self.page_size):
            raise OutOfBounds(f"the backup ends at page {limit}; ttmfs resize makes it longer")
        return self.holds(idx)

    def seek(self, offset: int, whence: int) -> int:
        pages, size = self._opened.map, self.size
        idx = offset // self.page_size
        if offset < size and whence == os.SEEK_HOLE:
            absent = pages.first_absent(idx, size // self.page_size)
            return size if absent is None else max(offset, absent * self.page_size)
        if offset >= size or (found := pages.next(idx)) is None:
            raise NoData(f"there is no data from byte {offset} on")
        return max(offset, found * self.page_size)

    # --- reading ---

    def is_out(self, offset: int, length: int, *, to_write: bool = False) -> bool:
        return length > 0

    async def bring_in(self, offset: int, length: int, *, to_write: bool = False, abandon: bool = True) -> None:
        """Nothing: reading and writing wait in threads of their own."""

    async def read_out(self, offset: int, size: int) -> bytes:
        async with self.locked():
            return await self._read(offset, size)

    async def _read(self, offset: int, size: int) -> bytes:
        opened = self._opened
        size = max(0, min(size, opened.size - offset))
        first, past = offset // self.page_size, -(-(offset + size) // self.page_size)
        runs = [(first, past)]
        if not opened.map.clean and opened.map.first_absent(first, past) is not None:
            runs = list(opened.map.runs(first, past))
        parts = [(max(offset, start * self.page_size), min(offset + size, end * self.page_size)) for start, end in runs]
        return await self._wait("reading pages", opened, _read_parts, offset, size, parts)

    async def read_into(self, dst: memoryview, offset: int) -> int:
        data = await self._read(offset, len(dst))
        dst[: len(data)] = data
        return len(data)

    # --- storing and dropping ---

    async def write(self, offset: int, data: bytes | memoryview) -> int:
        opened, size = self._opened, self.page_size
        await self._make_sure(opened)
        data = self._admitted(offset, data)
        first, past = offset // size, -(-(offset + len(data)) // size)
        start, whole = offset, data
        if not opened.map.clean:  # what an absent page has in the file is not to be seen
            before = offset % size if first not in opened.map else 0
            behind = -(offset + len(data)) % size if past - 1 not in opened.map else 0
            if before or behind:
                start, whole = offset - before, b"".join((bytes(before), data, bytes(behind)))
        with self._store.adding(self.id, first, past), opened.map.doubtful() as doubt:
            marks = opened.map.changed(first, past, present=True)
            written = await self._wait("storing pages", opened, _store, start, whole, marks, self._sync)
            if written < len(whole):
                past = self._kept_of(start + written, first, past)
                marks = opened.map.changed(first, past, present=True)
                doubt.stays = True  # the page after the last one has some of its bytes
                await self._wait("storing pages", opened, _store, 0, b"", marks, self._sync)
            opened.map.set(first, past, present=True)
            opened.changed()
        stored = min(start + written, past * size, offset + len(data)) - offset
        if stored <= 0:
            raise self._store.refusal(self.id)
        return stored

    def _kept_of(self, end: int, first: int, past: int) -> int:
        """The index before which pages of a range exist after a write that ended early, at a byte."""
        idx = end // self.page_size
        return max(first, min(past, idx + (end % self.page_size > 0 and self.holds(idx))))

    async def create_page(self, idx: int) -> None:
        if self._exists(idx):
            return
        opened = self._opened
        await self._make_sure(opened)
        if not opened.map.clean:
            await self.write(idx * self.page_size, bytes(self.page_size))
            return
        if not self._store.admit(self.id, 1):
            raise self._store.refusal(self.id)
        with self._store.adding(self.id, idx, idx + 1), opened.map.doubtful():
            marks = opened.map.changed(idx, idx + 1, present=True)
            await self._wait("storing pages", opened, _store, 0, b"", marks, self._sync)
            opened.map.set(idx, idx + 1, present=True)
            opened.changed()

    async def drop_range(self, first: int, past: int) -> None:
        opened = self._opened
        await self._make_sure(opened)
        past = min(past, opened.size // self.page_size)
        if not (marks := opened.map.changed(first, past, present=False)):
            return
        opened.map.set(first, past, present=False)
        self._store.recount(self.id)
        opened.changed()
        start, length = first * self.page_size, (past - first) * self.page_size
        with opened.map.doubtful() as doubt:
            doubt.stays = not await self._wait("dropping pages", opened, _drop, marks, start, length, self._sync)

    def set_size(self, size: int) -> None:
        super().set_size(size)
        self._opened.look()

    @property
    def _sync(self) -> Callable[[Iterable[int]], None] | None:
        """What makes each change durable; None if fsync(2) does."""
        return self._store.sync_held if self._store.is_durable else None

    async def sync(self, offset: int, length: int) -> None:
        async with self.locked():
            await self._make_sure(self._opened)
        await super().sync(offset, length)

    async def _make_sure(self, opened: Opened) -> None:
        """Write the map whole, if a change failed and nobody knows what its file says."""
        if not opened.map.is_sure:
            await self._wait("writing the map", opened, _rewrite, opened.map.packed())
            opened.map.is_sure = True

    async def _wait(self, what: str, opened: Opened, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work` in a thread, with the open files, for `store_timeout=` at most. Raises StoreFailed."""
        try:
            return await self._store.in_thread(self.id, opened, work, *arguments)
        except OSError as error:
            raise from_os_error(error, what) from error
        except trio.TooSlowError:
            raise StoreFailed(f"{what}: the store did not answer in time (store_timeout)") from None


def _rewrite(opened: Opened, groups: dict[int, bytes]) -> None:
    page_map.rewrite(opened.map_fd, groups)


def _read_parts(opened: Opened, offset: int, size: int, parts: Sequence[tuple[int, int]]) -> bytes:
    """Read parts of a range, as (start, end) in bytes. The rest is zeros."""
    fd = opened.fd
    if parts == [(offset, offset + size)] and len(whole := os.pread(fd, size, offset)) == size:
        return whole
    data = bytearray(size)
    for start, end in parts:
        while start < end and (part := os.pread(fd, end - start, start)):
            data[start - offset : start - offset + len(part)] = part
            start += len(part)
    return bytes(data)


def _store(
    opened: Opened,
    offset: int,
    data: bytes | memoryview,
    marks: Sequence[Change],
    sync: Callable[[Iterable[int]], None] | None,
) -> int:
    """Write data, and then its marks if all of it could be written. Returns the bytes written."""
    fd, map_fd = opened.fds
    done, view = 0, memoryview(data)
    try:
        while done < len(data):
            done += os.pwrite(fd, view[done:], offset + done)
    except OSError:
        if not done:
            raise
        if sync:
            sync([fd])
        return done
    if sync and data:
        sync([fd])
    page_map.write(map_fd, marks)
    if sync and marks:
        sync([map_fd])
    return done


def _drop(
    opened: Opened,
    marks: Sequence[Change],
    start: int,
    length: int,
    sync: Callable[[Iterable[int]], None] | None,
) -> bool:
    """Take marks away, and then punch out the data. False if the filesystem punches no holes."""
    fd, map_fd = opened.fds
    page_map.write(map_fd, marks)
    if sync:
        sync([map_fd])
    try:
        system_calls.punch_hole(fd, start, length)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True
