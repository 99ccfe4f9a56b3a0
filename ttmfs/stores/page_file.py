"""The base of each kind of backup file. It is read and written by ranges of bytes and of page indices.

A page exists if any of its range is data (SEEK_DATA); dropping it punches a hole.

A method that stores or drops returns its result, or a coroutine for it where the kind of file needs a thread;
:func:`finished` accepts both.

Concurrency: one thread. No method awaits between checking whether a page exists and acting on that, so each call for
one page is atomic. :meth:`PageFile.drop_run` lets other tasks run every 16 MiB. Only a program that has the file itself
(``.shmem``) can change it during a call. Work that may wait for swap, or for reading a disk, has two steps: a thread
brings existing pages in, and changes nothing; then the loop checks again, and copies.
"""

from __future__ import annotations

import contextlib
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from ..errors import InvalidArgument, NoData, OutOfBounds, from_os_error, translated
from ..linux import system_calls
from ..linux.splice import FileRange
from ..options import BASE_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from .store import Store
    from .time_slices import TimeSlices

__all__ = ["STEP", "PageFile", "allocated_until", "finished", "free_pages"]

STEP = 16 << 20
"""Bytes that are allocated, written or dropped at a time."""

BRING_IN_TRIES = 3
"""Pages can be swapped out again before they are copied. After this many tries the copy waits for them on the loop."""

T = TypeVar("T")


async def finished(result: T | Coroutine[Any, Any, T]) -> T:
    """Return the result of a method that may have returned a coroutine."""
    return await result if isinstance(result, Coroutine) else result


class PageFile(ABC):
    """The file of one backup. After the end of the backup every method raises :class:`ttmfs.BackupEnded`."""

    __slots__ = ("_files", "_store", "id", "page_size")

    def __init__(self, store: Store, id: int) -> None:
        self._store = store
        self.id = id
        self.page_size = store.page_size
        self._files = store.files

    # --- the part that each kind of file implements ---

    @abstractmethod
    def locked(self) -> AbstractAsyncContextManager[None]:
        """Wait until no thread changes the file, and lock it. To be held around each check and each change."""

    @abstractmethod
    def overwrite(self, offset: int, data: bytes | memoryview) -> int | Coroutine[Any, Any, int]:
        """As :meth:`write`, within one existing page, which takes no more room."""

    @abstractmethod
    def write(self, offset: int, data: bytes | memoryview) -> int | Coroutine[Any, Any, int]:
        """Store bytes, and so create every page that they touch. Returns how many bytes were stored.

        These are fewer than `data` has if the backup or the room ends. Raises OutOfBounds past the end, and NoRoom if
        nothing could be stored. No page is ever stored in part.
        """

    @abstractmethod
    def create_page(self, idx: int) -> Coroutine[Any, Any, None] | None:
        """Store a page of zeros, unless the page exists. Raises OutOfBounds and NoRoom."""

    @abstractmethod
    def drop_range(self, first: int, past: int) -> Coroutine[Any, Any, None] | None:
        """Release the pages from index `first` to before index `past`."""

    @abstractmethod
    def is_out(self, offset: int, length: int, *, to_write: bool = False) -> bool:
        """Whether reading or writing a range would wait for pages that are not in memory."""

    @abstractmethod
    def _needed_to_write(self, offset: int, length: int) -> tuple[int, int]:
        """Return the (offset, length) that must be in memory before a range is written."""

    @abstractmethod
    async def push_out(self, offset: int, length: int) -> None:
        """Push the pages of a range out of memory: the `writeback` of the verbs. Best effort: it raises no error."""

    @abstractmethod
    async def sync(self, offset: int, length: int) -> None:
        """Move the pages of a range to swap (best effort), or write them to the disk."""

    @abstractmethod
    def _base_pages_out(self) -> Iterator[int]:
        """Yield, for one part of the file after another, the number of base pages that are not in memory."""

    # --- size and pages ---

    @property
    def descriptor(self) -> int:
        """The descriptor of the file, until the next request. The store may close it then."""
        return self._files.descriptor(self.id)

    @property
    def slices(self) -> TimeSlices:
        """For work in steps, between which other requests are served."""
        return self._store.blocking_io.slices

    @property
    def size(self) -> int:
        """Size in bytes, with absent pages."""
        try:
            return os.lseek(self._files.descriptor(self.id), 0, os.SEEK_END)  # takes half as long as fstat(2)
        except OSError as error:
            raise from_os_error(error, "looking at a backup") from error

    def stat(self) -> os.stat_result:
        """Return the stat of the file. Size, blocks of 512 bytes, mode, owner and times are those of the backup."""
        try:
            return os.fstat(self._files.descriptor(self.id))
        except OSError as error:
            raise from_os_error(error, "looking at a backup") from error

    @property
    def taken(self) -> int:
        """Bytes of room that it takes. In memory a page that was stored in part takes the room of that part."""
        return self._store.taken(self.id)

    @property
    def is_empty(self) -> bool:
        """Whether no page exists."""
        return next(self._indices(), None) is None

    def holds(self, idx: int) -> bool:
        """Whether the page at an index exists."""
        try:
            return system_calls.is_data(self._files.descriptor(self.id), idx * self.page_size, self.page_size)
        except OSError as error:
            raise from_os_error(error, "looking for a page") from error

    def _next_data(self, offset: int) -> int | None:
        """Return the offset of the first data at or after an offset; None if there is none."""
        with translated("looking for pages"):
            return system_calls.next_data_start(self._files.descriptor(self.id), offset)

    def extent(self, idx: int) -> tuple[int, int] | None:
        """Return the first run of pages at or after an index, as (first index, index past the last), or None.

        The time grows with the length of the run, 10 ms for 262,144 pages: keep the result, do not call it per page.
        """
        try:
            found = system_calls.next_data(self._files.descriptor(self.id), idx * self.page_size)
        except OSError as error:
            raise from_os_error(error, "looking for pages") from error
        return found and (max(idx, found[0] // self.page_size), -(-found[1] // self.page_size))

    def seek(self, offset: int, whence: int) -> int:
        """Return the first offset from `offset` on with data (SEEK_DATA), or in a hole (SEEK_HOLE). Raises NoData."""
        try:
            return os.lseek(self._files.descriptor(self.id), offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise NoData(f"there is no data from byte {offset} on") from None
            raise from_os_error(error, "looking for data") from error

    def first_absent(self, first: int, past: int) -> int | None:
        """Return the first index of a range without a page; None if every page exists."""
        with translated("looking for pages"):
            return system_calls.first_absent(self._files.descriptor(self.id), self.page_size, first, past)

    def extents(self, first: int = 0, past: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield the runs of pages between two indices, as (first index, index past the last), ascending."""
        limit = self.size // self.page_size
        with translated("looking for pages"):
            fd = self._files.descriptor(self.id)
            yield from system_calls.page_runs(fd, self.page_size, first, limit if past is None else min(past, limit))

    def _indices(self) -> Iterator[int]:
        """Yield the index of every page, ascending. Bytes past the last whole page do not count as a page."""
        idx, limit = 0, self.size // self.page_size
        while (found := self._next_data(idx * self.page_size)) is not None:
            idx = found // self.page_size
            if idx >= limit:
                return
            yield idx
            idx += 1

    @property
    def pages(self) -> int:
        """The number of existing pages. If pages are larger than blocks, this takes 1 us a page."""
        if self._store.counts_pages_by_room:
            return -(-self.taken // self.page_size)
        return sum(1 for _ in self._indices())

    async def count_pages(self) -> int:
        """As :attr:`pages`, in time slices. Pages can come and go during the count."""
        if self._store.counts_pages_by_room:
            async with self.locked():
                return self.pages
        return await self._store.blocking_io.slices.total((1 for _ in self._indices()), self.locked)

    @property
    def swapped(self) -> int:
        """The number of pages that are swapped out, or only on a disk. Parts of pages count; the sum is rounded up."""
        with translated("counting resident pages"):
            return self._pages_of(sum(self._base_pages_out()), self.pages)

    async def count_swapped(self) -> int:
        """As :attr:`swapped`, in time slices. Pages can come and go during the count."""
        with translated("counting resident pages"):
            out = await self._store.blocking_io.slices.total(self._base_pages_out(), self.locked)
        pages = await self.count_pages()
        async with self.locked():
            return self._pages_of(out, pages)

    def _pages_of(self, out: int, pages: int) -> int:
        """Convert a number of base pages to pages, rounded up."""
        return min(pages, -(-pages * out * BASE_PAGE_SIZE // taken)) if out and (taken := self.taken) else 0

    # --- reading ---

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, or fewer at the end of the backup. Absent pages read as zeros."""
        try:
            return os.pread(self._files.descriptor(self.id), size, offset)
        except OSError as error:
            raise from_os_error(error, "reading pages") from error

    def part(self, offset: int, size: int) -> FileRange:
        """The bytes that :meth:`read` would return, unread."""
        try:
            return FileRange(self._files.descriptor(self.id), offset, max(0, min(size, self.size - offset)))
        except OSError as error:
            raise from_os_error(error, "reading pages") from error

    async def read_out(self, offset: int, size: int) -> bytes:
        """As :meth:`read`, and wait for swap or disk."""
        await self.bring_in(offset, size)
        async with self.locked():
            return self.read(offset, size)

    def read_into(self, dst: memoryview, offset: int) -> int | Coroutine[Any, Any, int]:
        """Fill `dst` from an offset on. Returns the number of bytes read: fewer at the end of the backup."""
        done = 0
        try:
            while done < len(dst):
                if not (read := os.preadv(self._files.descriptor(self.id), [dst[done:]], offset + done)):
                    break
                done += read
        except OSError as error:
            raise from_os_error(error, "copying a page") from error
        return done

    async def bring_in(self, offset: int, length: int, *, to_write: bool = False, abandon: bool = True) -> None:
        """Bring the pages of a range into memory, and wait for swap or disk in a thread.

        A cancellation ends the wait, unless `abandon` is false.
        """
        if to_write:
            offset, length = self._needed_to_write(offset, length)
        for _ in range(BRING_IN_TRIES):
            if not self.is_out(offset, length):
                return
            self._store.swap.renew_counts()
            blocking_io = self._store.blocking_io
            with trio.CancelScope(shield=not abandon):
                async with blocking_io.page_in(self.stat().st_uid):
                    with translated("bringing pages in"):
                        file = system_calls.Duplicate(
                            self._files.descriptor(self.id)
                        )  # the store may close its descriptor
                    await trio.to_thread.run_sync(
                        _touch, file, offset, length, abandon_on_cancel=abandon, limiter=blocking_io.page_ins.limiter
                    )

    # --- storing and dropping ---

    def _admitted(self, offset: int, data: bytes | memoryview) -> bytes | memoryview:
        """Return the bytes that may be stored: `data`, cut where the backup or the room ends."""
        end = self._end_of(offset, len(data))
        first, past = offset // self.page_size, -(-end // self.page_size)  # pages are stored whole
        if (admitted := self._store.admit(self.id, past - first)) < past - first:
            past = self._end_of_room(first, past, admitted)
            end = min(end, past * self.page_size)
            if end <= offset:
                raise self._store.refusal(self.id)
        return data if end == offset + len(data) else data[: end - offset]

    def _end_of(self, offset: int, length: int) -> int:
        """Return the end of a range of bytes within the backup. Raises OutOfBounds if it begins past the end."""
        if offset + length <= (size := self.size):
            return offset + length
        if offset >= size:
            raise OutOfBounds(f"the backup ends at byte {size}; ttmfs resize makes it longer")
        return size

    def _end_of_room(self, first: int, past: int, room: int) -> int:
        """Return the index before which a range can be stored, if `room` pages may be added."""
        for idx in range(first, past):
            if not self.holds(idx):
                if not room:
                    return idx
                room -= 1
        return past

    def _exists(self, idx: int) -> bool:
        """Whether a page already exists, before it is created. Raises OutOfBounds."""
        last = (idx + 1) * self.page_size - 1
        try:  # one call checks the end and the page, which rarely exists
            if os.lseek(self._files.descriptor(self.id), last, os.SEEK_HOLE) != last:
                return True
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise from_os_error(error, "looking for a page") from error
            limit = self.size // self.page_size
            raise OutOfBounds(f"the backup ends at page {limit}; ttmfs resize makes it longer") from None
        return self.page_size > BASE_PAGE_SIZE and self.holds(idx)  # a large page can exist without its end

    def zero(self, idx: int, start: int) -> int | Coroutine[Any, Any, int]:
        """Overwrite an existing page with zeros, from its byte `start` on."""
        rest = self.page_size - start
        return self.write(idx * self.page_size + start, bytes(rest)) if rest else 0

    async def drop_run(self, first: int, past: int, reached: Callable[[int], object] = lambda _: None) -> None:
        """As :meth:`drop_range`, in STEPs with other requests served in between: a million pages take 0.7 s.

        Calls `reached` after each step with the index before which everything is dropped.
        """
        while first < past:
            async with self.locked():
                found, end = self._next_data(first * self.page_size), past
                if found is not None:
                    end = min(past, (found // STEP + 1) * STEP // self.page_size)
                await finished(self.drop_range(first, end))  # also frees allocated blocks that hold no data
                reached(end)
            if (first := end) < past:
                await self._store.blocking_io.slices.rest()

    async def truncate(self, size: int, done: int = 0, reached: Callable[[int], object] = lambda _: None) -> None:
        """Drop every page past byte `size`, and zero the rest of the page at `size`. The size of the file stays.

        `done` is the progress of an earlier try: the last index passed to `reached`.
        """
        whole = self.size
        if size > whole:
            raise OutOfBounds(f"the backup ends at byte {whole}; ttmfs resize makes it longer")
        last, rest = divmod(size, self.page_size)
        first, past = last + bool(rest), -(-whole // self.page_size)
        if not done and rest and size < whole:
            async with self.locked():
                if self.holds(last):
                    await finished(self.zero(last, rest))
        reached(first := max(first, done))
        await self.drop_run(first, past, reached)

    def resize(self, size: int) -> None:
        """Change the size in bytes. It can become smaller only if no pages are stored past it."""
        if size < self.size and self._next_data(size // self.page_size * self.page_size) is not None:
            raise InvalidArgument(f"pages are stored past byte {size}; drop them first")
        self.set_size(size)

    def set_size(self, size: int) -> None:
        """Change the size in bytes. It drops what is stored past it, all at once."""
        with translated("changing the size of a backup"):
            os.ftruncate(self._files.descriptor(self.id), size)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2) of the file."""
        with translated("allocating or freeing a part of a backup"):
            system_calls.fallocate(self._files.descriptor(self.id), mode, offset, length)

    def is_open_elsewhere(self) -> bool:
        """Whether another process has the file open or mapped, in this PID namespace or another."""
        with translated("looking who has a backup open"):
            return system_calls.is_open_elsewhere(self._files.descriptor(self.id))


def _touch(file: system_calls.Duplicate, offset: int, length: int) -> None:
    """Bring the pages of a range into memory: read a byte of each."""
    with contextlib.suppress(OSError):  # the read of the page will report the error
        for position in range(offset - offset % BASE_PAGE_SIZE, offset + length, BASE_PAGE_SIZE):
            if not os.pread(file.fd, 1, position + 1):  # the reader of the first byte counts as a user of the page
                break


def allocated_until(fd: int, page_size: int, first: int, past: int, absent: Sequence[int] = ()) -> int:
    """Allocate pages of several blocks each between two indices. Returns the index where room ends.

    On a disk, this first punches out the pages that are `absent`: a hole that was read is in the page cache, and would
    look like a page of zeros once it is allocated. A tmpfs frees what it allocated before it failed.
    """
    free_pages(fd, page_size, absent)
    try:
        system_calls.allocate_range(fd, first * page_size, (past - first) * page_size)
        return past
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
    free_pages(fd, page_size, absent)  # a disk keeps the blocks that it allocated before it failed
    for idx in range(first, past):
        start = idx * page_size
        try:
            system_calls.allocate_range(fd, start, page_size)
        except OSError:
            if idx in absent:
                free_pages(fd, page_size, [idx])
            elif os.lseek(fd, start, os.SEEK_HOLE) >= start + page_size:
                continue  # XFS needs room even for an allocated range
            if idx == first:
                raise
            return idx  # the pages before it are allocated
    return past


def free_pages(fd: int, page_size: int, indices: Iterable[int]) -> None:
    """Free the blocks and the page cache of pages that must be absent. The indices ascend."""
    first = past = 0
    for idx in (*indices, -1):
        if idx != past:
            if past > first:
                system_calls.punch_hole(fd, first * page_size, (past - first) * page_size)
            first = idx
        past = idx + 1
