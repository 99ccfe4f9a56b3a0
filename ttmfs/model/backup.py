"""One backup: the verbs of the TTM shmem backup, and the same for ranges of bytes, which is what a mount needs.

A backup is a sparse file. A page exists if and only if its range holds data (SEEK_DATA); dropping it punches a hole.
The verbs mirror ``drivers/gpu/drm/ttm/ttm_backup.c``; what they promise is numbered in ``docs/contract.md``.

Concurrency: one thread. Between finding out whether a page is there and acting on that nothing is awaited, so each verb
of one page happens at once; of many, `copy_pages` may wait between runs, and `drop_pages` and `fini` let others in
every 16 MiB. Only whoever holds the file itself (``.shmem``) can change it meanwhile. What may wait for swap, or for a
disk that is read, waits in a thread, which touches pages that are there and changes nothing: first the pages are
brought in, then the loop looks again, and copies.

A file on a disk is changed in a thread too, since the kernel makes writers wait for the disk, with the file locked. So
there :meth:`Backup.locked` is taken around each change, and around each look at the file. The loop decides and counts.
The thread has a descriptor of its own, and touches nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial
from typing import TYPE_CHECKING

import trio

from ..errors import InvalidArgument, NoRoom, OutOfBounds, PageAbsent, TtmfsError, from_os_error
from ..linux import system_calls
from ..options import BASE_PAGE_SIZE
from . import arguments
from .progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractAsyncContextManager

    import numpy as np
    from numpy.typing import NDArray

    from ..handles import Uint64Array
    from ..stores.store import Store
    from .arguments import PageBuffer

__all__ = ["Backup"]

STEP = 16 << 20
"""Bytes that are allocated and written at a time. What fallocate(2) is at work on cannot be swapped out meanwhile, so a
long run at once would end in the OOM killer where memory is short; and a pwrite(2) ends just below 2 GiB."""

FEW = 1024
"""Pages that are sooner looked for one by one than by runs, which can be as long as the backup."""

WINDOW = 1 << 20
"""Bytes that are pushed out of memory at a time, in between which others are served."""

BRING_IN_TRIES = 3
"""Pages can be swapped out again before they are copied. After so many tries the copy waits for them itself."""


class Backup:
    """A backup of a pool, as :meth:`ttmfs.Pool.create` and :meth:`ttmfs.Pool.open` give it. Counts are pages.

    After :meth:`fini`, by whomever, every method raises :class:`ttmfs.BackupEnded`. The async methods are trio's, but
    those of one page reach no checkpoint while it is in memory. What follows "by ranges of bytes" is the mount's, and
    may change.
    """

    __slots__ = ("_id", "_page_size", "_store")

    def __init__(self, store: Store, id: int) -> None:
        self._store = store
        self._id = id
        self._page_size = store.page_size

    def __repr__(self) -> str:
        return f"<Backup {self._id}>"

    def locked(self) -> AbstractAsyncContextManager[None]:
        """Wait until no thread changes the backup's file, and keep others from it. In memory no thread ever does."""
        return self._store.locked(self._id)

    # --- the six verbs, and their plural forms ---

    async def backup_page(self, page: PageBuffer, idx: int, writeback: bool = False) -> int:
        """Copy a page into the backup and give its handle, which is ``idx + 1``. ``ttm_backup_backup_page()``.

        `page` is any contiguous buffer of page_size bytes, and the caller's again on return. A page that is there is
        overwritten. `writeback` asks that the page be pushed to swap now; it is best effort and changes no result.
        Raises InvalidArgument (index past the size, wrong length) and NoRoom, which leaves everything as it was.
        """
        data, handle = arguments.page(page, self._page_size), arguments.handle_of(idx)
        self._check_index(handle - 1, 1)
        if not await self._store_pages(handle - 1, data, writeback):
            raise NoRoom("room ended within the page")  # stored over on a disk that writes anew what is there
        return handle

    async def backup_pages(self, pages: NDArray[np.uint8], idx: int, writeback: bool = False) -> Uint64Array:
        """Back up an array of shape (n, page_size), dtype uint8, at n indices from `idx` on; gives their handles.

        If room ends part way, the handles of the pages that were stored; NoRoom if none was.
        """
        import numpy as np  # a daemon does without it

        data, first = arguments.pages(pages, self._page_size), arguments.handle_of(idx)
        self._check_index(first - 1, len(pages))
        stored = 0
        if len(pages):
            stored = await self._store_pages(first - 1, data, writeback)
        return np.arange(first, first + stored, dtype=np.uint64)

    async def _store_pages(self, idx: int, data: memoryview, writeback: bool) -> int:
        """Store whole pages from an index on; gives how many."""
        offset = idx * self._page_size
        await self.bring_in(offset, len(data), to_write=True, abandon=False)
        if self._store.in_memory:
            stored = self.write(offset, data)
        else:
            async with self.locked():
                stored = await self.write_in_thread(offset, data)
        if writeback:
            await self.push_out(offset, stored)
        return stored // self._page_size

    async def copy_page(self, dst: PageBuffer, handle: int, intr: bool = False) -> None:
        """Copy a page back into `dst`, a writable buffer of page_size bytes. ``ttm_backup_copy_page()``.

        The page stays. With `intr` a cancellation may end the call; nothing is lost and it can be repeated. Raises
        PageAbsent if the handle holds nothing, InvalidArgument if it lies past the size.
        """
        if intr:
            await trio.lowlevel.checkpoint_if_cancelled()
        data, idx = arguments.destination(dst, self._page_size), arguments.index_of(handle)
        self._check_index(idx, 1)
        await self.bring_in(idx * self._page_size, self._page_size, abandon=intr)
        async with self.locked():
            if not self.holds(idx):
                raise PageAbsent(f"handle {handle} holds no page")
            self._copy(data, idx)

    async def copy_pages(self, dst: NDArray[np.uint8], handles: Uint64Array, intr: bool = False) -> None:
        """Copy pages back into the rows of `dst`, of shape (n, page_size), dtype uint8, by n handles, dtype uint64.

        Raises PageAbsent if any of them holds nothing; `dst` may have been written to in part by then.
        """
        data = arguments.rows(dst, len(handles), self._page_size)
        row = 0
        for first, past in arguments.runs(handles):
            if intr:
                await trio.lowlevel.checkpoint_if_cancelled()
            self._check_index(first, past - first)
            await self.bring_in(first * self._page_size, (past - first) * self._page_size, abandon=intr)
            async with self.locked():
                if (absent := self._first_absent(first, past)) is not None:
                    raise PageAbsent(f"handle {absent + 1} holds no page")
                self._copy(data[row * self._page_size : (row + past - first) * self._page_size], first)
            row += past - first

    async def drop(self, handle: int) -> None:
        """Release a page; its memory is the system's again on return. Nothing happens if the handle holds none.

        ``ttm_backup_drop()``. Raises InvalidArgument if the handle lies past the size.
        """
        idx = arguments.index_of(handle)
        self._check_index(idx, 1)
        async with self.locked():
            if self._store.in_memory:
                self.drop_range(idx, idx + 1)
            else:
                await self.drop_range_in_thread(idx, idx + 1)

    async def drop_pages(self, handles: Uint64Array) -> None:
        """Release the pages of an array of handles, dtype uint64, as :meth:`drop` does."""
        runs = arguments.runs(handles)
        for first, past in runs:
            self._check_index(first, past - first)
        for first, past in runs:
            await self.drop_run(first, past)

    async def fini(self) -> None:
        """End the backup and release every page that is left. ``ttm_backup_fini()``. No operation may follow."""
        with contextlib.suppress(NoRoom):  # a full XFS may ask for room to punch a hole: the file goes without
            await self.drop_run(0, self.size // self._page_size)  # which takes longest, so not at once with the file
        async with self.locked():
            self._store.remove(self._id)

    # --- what it holds ---

    @property
    def name(self) -> str:
        """Its name in the pool, as of now."""
        return self._store.name_of(self._id)

    @property
    def page_size(self) -> int:
        """Bytes a page."""
        return self._page_size

    @property
    def size(self) -> int:
        """Bytes that it spans, stored or not."""
        try:
            return os.lseek(self._store.descriptor(self._id), 0, os.SEEK_END)  # half of what fstat takes
        except OSError as error:
            raise from_os_error(error, "looking at a backup") from error

    @property
    def pages(self) -> int:
        """How many pages are stored.

        Where pages are larger than the system's, each one is looked for, which takes about 1 us a page.
        """
        if self._store.counts_pages_by_room:
            return -(-self.taken // self._page_size)
        return sum(1 for _ in self._indices())

    async def count_pages(self) -> int:
        """As :attr:`pages`, in slices between which others are served. Pages can come and go meanwhile."""
        if self._store.counts_pages_by_room:
            async with self.locked():
                return self.pages
        work, pages = self._store.waiting.turns.begin(), 0
        for _ in self._indices():
            pages += 1
            if work.is_due():
                await work.rest()
        return pages

    def _indices(self) -> Iterator[int]:
        """The index of every page, ascending."""
        idx, limit = 0, self.size // self._page_size  # what lies past the last whole page is none
        while (found := self._next_data(idx * self._page_size)) is not None:
            idx = found // self._page_size
            if idx >= limit:
                return
            yield idx
            idx += 1

    @property
    def taken(self) -> int:
        """Bytes of room that it takes. In memory a page of which only a part was stored takes the room of that part."""
        return self._store.taken(self._id)

    @property
    def resident(self) -> int:
        """How many of them are in memory. Pages that are so in part count by their parts, rounded down."""
        return max(0, self.pages - self.swapped)

    @property
    def swapped(self) -> int:
        """How many of them are swapped out, or on a disk alone. In part: by their parts, rounded up."""
        fd, out = self._store.descriptor(self._id), 0
        try:
            if self._store.in_memory and (evicted := system_calls.evicted(fd)) is not None:
                return self._share(self.pages, evicted)
            for first, past in self.extents():  # of a disk, holes that were read lie in the page cache, too
                length = (past - first) * self._page_size
                cached, evicted = system_calls.residency(fd, first * self._page_size, length)
                out += evicted if self._store.in_memory else max(0, length // BASE_PAGE_SIZE - cached)
        except OSError as error:
            raise from_os_error(error, "counting resident pages") from error
        return self._share(self.pages, out)

    async def count_swapped(self) -> int:
        """As :attr:`swapped`, in slices between which others are served. Pages can come and go meanwhile."""
        work, out, position = self._store.waiting.turns.begin(), 0, 0
        while True:
            async with self.locked():
                if (start := self._next_data(position)) is None:
                    break
                try:
                    fd = self._store.descriptor(self._id)
                    if self._store.in_memory and (evicted := system_calls.evicted(fd, start, STEP)) is not None:
                        out, position = out + evicted, start + STEP
                    elif found := self.extent(start // self._page_size):
                        position, length = found[1] * self._page_size, (found[1] - found[0]) * self._page_size
                        cached, evicted = system_calls.residency(fd, found[0] * self._page_size, length)
                        out += evicted if self._store.in_memory else max(0, length // BASE_PAGE_SIZE - cached)
                except OSError as error:
                    raise from_os_error(error, "counting resident pages") from error
            if work.is_due():
                await work.rest()
        pages = await self.count_pages() if out else 0
        async with self.locked():
            return self._share(pages, out)

    def _share(self, pages: int, out: int) -> int:
        """Of so many pages those that so many base pages stand for, rounded up."""
        return min(pages, -(-pages * out * BASE_PAGE_SIZE // taken)) if out and (taken := self.taken) else 0

    @property
    def is_empty(self) -> bool:
        """Whether it holds no page. What lies past the last whole page is none."""
        found = self._next_data(0)
        return found is None or found // self._page_size >= self.size // self._page_size

    def holds(self, idx: int) -> bool:
        """Whether the page at an index exists."""
        try:
            return system_calls.is_data(self._store.descriptor(self._id), idx * self._page_size, self._page_size)
        except OSError as error:
            raise from_os_error(error, "looking for a page") from error

    def _next_data(self, offset: int) -> int | None:
        """Where the first data at or after an offset begins; None if there is none."""
        try:
            return system_calls.next_data_start(self._store.descriptor(self._id), offset)
        except OSError as error:
            raise from_os_error(error, "looking for pages") from error

    def extent(self, idx: int) -> tuple[int, int] | None:
        """The first run of pages at or after an index, as (first index, index past the last); None if there is none.

        Takes time in proportion to its length, 10 ms for 262,144 pages: keep it rather than ask for each page.
        """
        try:
            found = system_calls.next_data(self._store.descriptor(self._id), idx * self._page_size)
        except OSError as error:
            raise from_os_error(error, "looking for pages") from error
        return found and (max(idx, found[0] // self._page_size), -(-found[1] // self._page_size))

    def extents(self, first: int = 0, past: int | None = None) -> Iterator[tuple[int, int]]:
        """Every run of pages between two indices, as (first index, index past the last), in ascending order."""
        limit = self.size // self._page_size
        try:
            fd = self._store.descriptor(self._id)
            yield from system_calls.page_runs(fd, self._page_size, first, limit if past is None else min(past, limit))
        except OSError as error:
            raise from_os_error(error, "looking for pages") from error

    def stat(self) -> os.stat_result:
        """The stat of its file: size, blocks of 512 bytes, mode, owner and times are the backup's."""
        try:
            return os.fstat(self._store.descriptor(self._id))
        except OSError as error:
            raise from_os_error(error, "looking at a backup") from error

    # --- by ranges of bytes: what a mount needs beside the verbs ---

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on, fewer at the end of the backup; absent pages read as zeros."""
        try:
            return os.pread(self._store.descriptor(self._id), size, offset)
        except OSError as error:
            raise from_os_error(error, "reading pages") from error

    def overwrite(self, offset: int, data: bytes) -> int:
        """As :meth:`write`, of bytes of one page that is there, which takes no room."""
        return self._write(offset, data[: self._end_of(offset, len(data)) - offset])  # .shmem can have cut the page

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Store bytes, which makes every page that they touch exist. Gives how many were stored.

        That is fewer than given where the backup or the room ends. Raises OutOfBounds past the end and NoRoom if
        nothing could be stored; no page is ever left stored in part.
        """
        return self._write(offset, self._admitted(offset, data))

    async def write_in_thread(self, offset: int, data: bytes | memoryview) -> int:
        """As :meth:`write`, of a backup on a disk, within :meth:`locked`."""
        data = self._admitted(offset, data)
        first, past = offset // self._page_size, -(-(offset + len(data)) // self._page_size)
        try:
            with (
                contextlib.closing(system_calls.Duplicate(self._store.descriptor(self._id))) as file,
                self._store.changing(self._id, first, past, file.fd, adding=True),
            ):
                return await self._store.in_thread(file, self._put, offset, data)
        except OSError as error:
            raise from_os_error(error, "storing pages") from error

    def _admitted(self, offset: int, data: bytes | memoryview) -> bytes | memoryview:
        """What of some bytes may be stored: less where the backup or the room ends."""
        end = self._end_of(offset, len(data))
        first, past = offset // self._page_size, -(-end // self._page_size)  # pages are stored whole
        if (admitted := self._store.admit(self._id, past - first)) < past - first:
            past = self._past_of_room(first, past, admitted)
            end = min(end, past * self._page_size)
            if end <= offset:
                raise self._store.refusal(self._id)
        return data if end == offset + len(data) else data[: end - offset]

    def _end_of(self, offset: int, length: int) -> int:
        """Where a range of bytes ends within the backup. Raises OutOfBounds if it begins past the end."""
        if offset + length <= (size := self.size):
            return offset + length
        if offset >= size:
            raise OutOfBounds(f"the backup ends at byte {size}")
        return size

    def _write(self, offset: int, data: bytes | memoryview) -> int:
        """Store bytes as far as the filesystem has room."""
        fd, end = self._store.descriptor(self._id), offset + len(data)
        try:
            if not self._store.keeps_count:
                if len(data) <= STEP and self._page_size <= self._store.grain:  # nearly always: a call less
                    return os.pwrite(fd, data, offset)
                return self._put(fd, offset, data)
            with self._store.changing(self._id, offset // self._page_size, -(-end // self._page_size)):
                return self._put(fd, offset, data)
        except OSError as error:
            raise from_os_error(error, "storing pages") from error

    def _put(self, fd: int, offset: int, data: bytes | memoryview) -> int:
        """Store bytes in a file, by STEPs. A thread may do it: nothing but the file is touched."""
        if len(data) <= STEP:
            return self._put_step(fd, offset, data)
        view, position, end = memoryview(data), offset, offset + len(data)
        while position < end:
            past = min(end, position // STEP * STEP + STEP)
            try:
                stored = self._put_step(fd, position, view[position - offset : past - offset])
            except OSError:
                if position == offset:
                    raise
                break
            position += stored
            if position < past:
                break
        return position - offset

    def _put_step(self, fd: int, offset: int, data: bytes | memoryview) -> int:
        if not self._store.in_memory:
            return self._write_to_disk(fd, offset, data)
        end = offset + len(data)
        if self._page_size > self._store.grain and (end := self._allocate(fd, offset, end)) < offset + len(data):
            data = data[: end - offset]
        return os.pwrite(fd, data, offset)

    def create_page(self, idx: int) -> None:
        """Store a zero page unless there is a page already. Raises OutOfBounds and NoRoom."""
        if not self._is_there(idx):
            if not self._store.admit(self._id, 1):
                raise self._store.refusal(self._id)
            self._write(idx * self._page_size, b"\0")

    async def create_page_in_thread(self, idx: int) -> None:
        """As :meth:`create_page`, of a backup on a disk, within :meth:`locked`."""
        if not self._is_there(idx):
            await self.write_in_thread(idx * self._page_size, b"\0")

    def _is_there(self, idx: int) -> bool:
        """Whether a page exists that is to be made. Raises OutOfBounds."""
        last = (idx + 1) * self._page_size - 1
        try:  # one look for both, the end and the page: who makes a page was told that there is none
            if os.lseek(self._store.descriptor(self._id), last, os.SEEK_HOLE) != last:
                return True
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise from_os_error(error, "looking for a page") from error
            raise OutOfBounds(f"the backup ends at page {self.size // self._page_size}") from None
        return self._page_size > BASE_PAGE_SIZE and self.holds(idx)  # of which the end may not have been written

    def zero(self, idx: int, start: int) -> None:
        """Make the bytes of a page that is there zeros, from byte `start` of it on."""
        if start < self._page_size:
            self.write(idx * self._page_size + start, bytes(self._page_size - start))

    async def zero_anywhere(self, idx: int, start: int) -> None:
        """As :meth:`zero`, of a backup wherever it is, within :meth:`locked`."""
        if self._store.in_memory:
            self.zero(idx, start)
        elif start < self._page_size:
            await self.write_in_thread(idx * self._page_size + start, bytes(self._page_size - start))

    def drop_range(self, first: int, past: int) -> None:
        """Release the pages from index `first` on, up to before index `past`."""
        try:
            fd = self._store.descriptor(self._id)
            start, end = first * self._page_size, min(past * self._page_size, 2**63 - 1)
            if not self._store.keeps_count:
                system_calls.punch_hole(fd, start, end - start)
                return
            with self._store.changing(self._id, first, past):
                system_calls.punch_hole(fd, start, end - start)
        except OSError as error:
            raise from_os_error(error, "dropping pages") from error

    async def drop_range_in_thread(self, first: int, past: int) -> None:
        """As :meth:`drop_range`, of a backup on a disk, within :meth:`locked`."""
        start, end = first * self._page_size, min(past * self._page_size, 2**63 - 1)
        try:
            with (
                contextlib.closing(system_calls.Duplicate(self._store.descriptor(self._id))) as file,
                self._store.changing(self._id, first, past, file.fd),
            ):
                await self._store.in_thread(file, system_calls.punch_hole, start, end - start)
        except OSError as error:
            raise from_os_error(error, "dropping pages") from error

    async def drop_run(self, first: int, past: int, reached: Callable[[int], object] = lambda _: None) -> None:
        """As :meth:`drop_range`, by STEPs, between which others are served: a million pages take 0.7 s.

        `reached` is told the index up to which all is dropped, each time before others are served.
        """
        while first < past:
            async with self.locked():
                found, end = self._next_data(first * self._page_size), past
                if found is not None:
                    end = min(past, (found // STEP + 1) * STEP // self._page_size)
                if self._store.in_memory:
                    self.drop_range(first, end)  # with what is allocated but holds no data
                else:
                    await self.drop_range_in_thread(first, end)
                reached(end)
            if (first := end) < past:
                await self._store.waiting.turns.rest()

    async def truncate(self, size: int, progress: Progress | None = None) -> None:
        """Drop every page past byte `size` and make the rest of the page that it lies in zeros. Its size stays."""
        whole = self.size
        if size > whole:
            raise OutOfBounds(f"the backup ends at byte {whole}")
        last, rest = divmod(size, self._page_size)
        first, past = last + bool(rest), -(-whole // self._page_size)
        progress = progress or Progress()
        if not progress.done and rest and size < whole:
            async with self.locked():
                if self.holds(last):
                    await self.zero_anywhere(last, rest)
        progress.reach(max(first, progress.done))
        await self.drop_run(progress.done, past, progress.reach)

    def resize(self, size: int) -> None:
        """Change the bytes that the backup spans: to more at any time, to less only over pages that do not exist."""
        if size < self.size and self._next_data(size // self._page_size * self._page_size) is not None:
            raise InvalidArgument(f"pages are stored past byte {size}; drop them first")
        try:
            os.ftruncate(self._store.descriptor(self._id), size)
        except OSError as error:
            raise from_os_error(error, "changing the size of a backup") from error

    # --- between memory and where it is swapped or written to ---

    def is_out(self, offset: int, length: int, *, to_write: bool = False) -> bool:
        """Whether reading or writing a range would have to wait for pages that are not in memory."""
        if not length or (self._store.in_memory and not self._store.swap.used):
            return False
        if to_write:
            offset, length = self._needed_to_write(offset, length)
            if not length:
                return False
        fd = self._store.descriptor(self._id)
        try:
            if self._store.in_memory:
                return system_calls.residency(fd, offset, length)[1] > 0
            end = min(offset + length, os.fstat(fd).st_size)
            base = -(-end // BASE_PAGE_SIZE) - offset // BASE_PAGE_SIZE
            return base > 0 and system_calls.residency(fd, offset, end - offset)[0] < base
        except OSError as error:
            raise from_os_error(error, "asking what is in memory") from error

    async def bring_in(self, offset: int, length: int, *, to_write: bool = False, abandon: bool = True) -> None:
        """Have the pages of a range in memory, waiting for swap or disk in a thread. It waits for nothing else.

        A cancellation ends the wait, unless `abandon` is false.
        """
        if to_write:
            offset, length = self._needed_to_write(offset, length)
        for _ in range(BRING_IN_TRIES):
            if not self.is_out(offset, length):
                return
            self._store.swap.renew_counts()
            with trio.CancelScope(shield=not abandon):
                async with self._store.waiting.page_in(self.stat().st_uid):
                    try:
                        file = system_calls.Duplicate(
                            self._store.descriptor(self._id)
                        )  # it may close its own meanwhile
                    except OSError as error:
                        raise from_os_error(error, "bringing pages in") from error
                    await trio.to_thread.run_sync(
                        _touch,
                        file,
                        offset,
                        length,
                        abandon_on_cancel=abandon,
                        limiter=self._store.waiting.page_ins.limiter,
                    )

    def _needed_to_write(self, offset: int, length: int) -> tuple[int, int]:
        """The range that must be in memory for another to be written, as (offset, length)."""
        if not self._store.in_memory:  # of what is written whole nothing is read
            return (offset, length) if (offset | length) % BASE_PAGE_SIZE else (offset, 0)
        if self._page_size <= self._store.grain:
            return offset, length
        first, past = offset // self._page_size, -(-(offset + length) // self._page_size)
        return first * self._page_size, (past - first) * self._page_size  # to allocate a page brings all of it in

    async def push_out(self, offset: int, length: int) -> None:
        """Push the pages of a range out of memory. Best effort, and never an error: the `writeback` of the verbs."""
        if not self._store.in_memory:
            with contextlib.suppress(TtmfsError, OSError):
                await self._store.sync(self._id)
                with contextlib.closing(system_calls.Duplicate(self._store.descriptor(self._id))) as file:
                    await self._store.in_thread(file, os.posix_fadvise, offset, length, os.POSIX_FADV_DONTNEED)
            return
        end = -(-(offset + length) // BASE_PAGE_SIZE) * BASE_PAGE_SIZE
        offset -= offset % BASE_PAGE_SIZE  # a write opened O_SYNC may begin anywhere
        with contextlib.suppress(TtmfsError, OSError):
            owner = self.stat().st_uid
            while offset < end and system_calls.swap_space()[1]:
                async with self._store.waiting.syncs.turn(owner):
                    offset = await self._push_out_window(offset, end)

    async def _push_out_window(self, offset: int, end: int) -> int:
        """Push the next pages of a range in a tmpfs out of memory, a WINDOW at most. Gives where to go on."""
        fd = self._store.descriptor(self._id)
        found = _resident_run(fd, offset, min(end, os.fstat(fd).st_size), self._page_size)
        if found is None:
            return end
        start, past = found
        if past == start:
            await trio.lowlevel.checkpoint()
            return past
        # On the loop: no one drops a page between our seeing that it is there and its being mapped.
        address, size = system_calls.map_resident(fd, start, past - start), past - start
        run_sync = partial(trio.to_thread.run_sync, limiter=self._store.waiting.syncs.limiter)
        self._store.swap.page_out_begins()
        try:
            await run_sync(system_calls.page_out, address, size)
            if system_calls.residency(self._store.descriptor(self._id), start, size)[0]:
                await run_sync(partial(system_calls.page_out, address, size, from_all_cpus=True))
        finally:
            system_calls.unmap(address, size)
        return past

    async def sync(self, offset: int, length: int) -> None:
        """Have the pages of a range where they last longest: swapped out, or on the disk.

        Of memory best effort and never an error; of a disk, fsync(2) with its errors.
        """
        if self._store.in_memory:
            await self.push_out(offset, length)
        else:
            await self._store.sync(self._id)

    # --- within ---

    def _check_index(self, idx: int, count: int) -> None:
        limit = self.size // self._page_size
        if idx > limit - count:
            raise InvalidArgument(f"index {idx} and {count} pages do not lie within the backup's {limit} pages")

    def _copy(self, dst: memoryview, idx: int) -> None:
        """Fill `dst` from the page at an index on."""
        done = 0
        try:
            while done < len(dst):
                fd = self._store.descriptor(self._id)
                if not (read := os.preadv(fd, [dst[done:]], idx * self._page_size + done)):
                    raise PageAbsent("the backup was made smaller meanwhile")
                done += read
        except OSError as error:
            raise from_os_error(error, "copying a page") from error

    def _past_of_room(self, first: int, past: int, room: int) -> int:
        """The index up to which a range can be stored if so many pages may be added to those that are there."""
        for idx in range(first, past):
            if not self.holds(idx):
                if not room:
                    return idx
                room -= 1
        return past

    def _first_absent(self, idx: int, past: int) -> int | None:
        """The first index of a range that holds no page; None if every one does."""
        if past - idx <= FEW:  # to find a run's end, which may lie far past the range, takes longer
            return next((i for i in range(idx, past) if not self.holds(i)), None)
        while idx < past:
            found = self.extent(idx)
            if found is None or found[0] != idx:
                return idx
            idx = found[1]
        return None

    def _write_to_disk(self, fd: int, offset: int, data: bytes | memoryview) -> int:
        """As pwrite(2), but a page that was absent is stored with all that is given of it, or stays absent.

        A tmpfs sees to that itself. On a full disk ext4 leaves pages of zeros where it refuses to write, and others may
        stop in the middle of a page.
        """
        page_size, start, end = self._page_size, offset, offset + len(data)
        pages = range(offset // page_size, -(-end // page_size))
        absent = [idx for idx in pages if not system_calls.is_data(fd, idx * page_size, page_size)]
        if page_size > self._store.grain:
            end = min(end, self._allocate_on_disk(fd, offset // page_size, -(-end // page_size), absent) * page_size)
            data, absent = memoryview(data)[: end - offset], [idx for idx in absent if idx * page_size < end]
            before = offset % page_size if offset // page_size in absent else 0
            behind = -end % page_size if end // page_size in absent else 0
            if before or behind:  # a part that is never written takes room, in the disk's own map, when it is
                data, offset = b"".join((bytes(before), data, bytes(behind))), offset - before
        position, stop, at_once = offset, offset + len(data), True
        while position < stop:
            past = stop if at_once else min(stop, (position // page_size + 1) * page_size)
            try:
                position += os.pwrite(fd, data[position - offset : past - offset], position)
            except OSError:
                _take_back(fd, page_size, (idx for idx in absent if (idx + 1) * page_size > position))
                if position // page_size in absent:
                    position = max(offset, position // page_size * page_size)
                if at_once:  # some of its pages may find room, one by one
                    at_once = False
                elif position > offset:
                    break
                else:
                    raise
        return min(position, end) - start

    def _allocate_on_disk(self, fd: int, first: int, past: int, absent: list[int]) -> int:
        """Allocate pages of several blocks each between two indices. Gives the index where room ends.

        A hole that was read lies in the page cache, and would look like a page of zeros as soon as it is allocated. So
        what is absent is punched out first.
        """
        page_size = self._page_size
        _take_back(fd, page_size, absent)
        try:
            system_calls.allocate_range(fd, first * page_size, (past - first) * page_size)
            return past
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        _take_back(fd, page_size, absent)  # disks keep what they had found room for
        for idx in range(first, past):
            start = idx * page_size
            try:
                system_calls.allocate_range(fd, start, page_size)
            except OSError:
                if idx in absent:
                    _take_back(fd, page_size, [idx])
                elif os.lseek(fd, start, os.SEEK_HOLE) >= start + page_size:
                    continue  # XFS asks for room even where all is allocated
                if idx == first:
                    raise
                return idx  # what is before it has room and is to be written
        return past

    def _allocate(self, fd: int, offset: int, end: int) -> int:
        """Allocate whole pages of several base pages each in a tmpfs, so that none is stored in part.

        Gives where room ends. What a tmpfs refuses, it refuses whole, and takes back what it had allocated for it.
        """
        page_size = self._page_size
        first, past = offset // page_size * page_size, -(-end // page_size) * page_size
        if sum(system_calls.residency(fd, first, past - first)) * BASE_PAGE_SIZE == past - first:
            return end  # they have it all: fallocate(2) looks at every base page, 95 us for 2 MiB
        try:
            system_calls.allocate_range(fd, first, past - first)
            return end
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
        for start in range(first, past, page_size):
            try:
                system_calls.allocate_range(fd, start, page_size)
            except OSError:
                if start == first:
                    raise
                return start  # what is before it has room and is to be written
        return end


def _take_back(fd: int, page_size: int, absent: Iterable[int]) -> None:
    """Free what a disk has allocated, or caches, of pages that are not to be. Indices ascend."""
    first = past = 0
    for idx in (*absent, -1):
        if idx != past:
            if past > first:
                system_calls.punch_hole(fd, first * page_size, (past - first) * page_size)
            first = idx
        past = idx + 1


def _touch(file: system_calls.Duplicate, offset: int, length: int) -> None:
    """Bring the pages of a range into memory. Reads what is needed for that, and forgets it."""
    with contextlib.suppress(OSError):  # whoever reads the page will meet it
        for position in range(offset - offset % BASE_PAGE_SIZE, offset + length, BASE_PAGE_SIZE):
            if not os.pread(file.fd, 1, position + 1):  # the first byte's reader is counted as a user of the page
                break


def _resident_run(fd: int, offset: int, end: int, page_size: int) -> tuple[int, int] | None:
    """The next run of a tmpfs file's base pages that belong to pages and are in memory, as (start, end); None: no more.

    It may be empty: then go on from its end. Found page by page, a window at a time: to ask where a run of data ends
    takes time in proportion to the whole run.
    """
    found = system_calls.next_data_start(fd, offset)
    if found is None or found >= end:
        return None
    start = past = max(offset, found // page_size * page_size)  # of a large page the beginning may only be allocated
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
