"""A backup's file, by ranges of bytes and of page indices: the base of each way of reading and writing pages.

A page exists if any of its range is data (SEEK_DATA); dropping it punches a hole.

A method that stores or drops gives its result, or a coroutine for it where the kind of file needs a thread;
:func:`finished` takes either.

Concurrency: one thread. Nothing is awaited between finding out whether a page exists and acting on that, so each call
for one page is atomic; :meth:`PageFile.drop_run` lets others in every 16 MiB. Only a program that has the file itself
(``.shmem``) can change it meanwhile. Work that may wait for swap, or for a disk that is read, waits in a thread, which
reads existing pages and changes nothing: first the pages are brought in, then the loop looks again, and copies.
"""

from __future__ import annotations

import contextlib
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from ..errors import InvalidArgument, OutOfBounds, from_os_error, translated
from ..linux import system_calls
from ..options import BASE_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from .store import Store

__all__ = ["STEP", "PageFile", "allocated_until", "finished", "free_pages"]

STEP = 16 << 20
"""Bytes that are allocated, written or dropped at a time."""

BRING_IN_TRIES = 3
"""Pages can be swapped out again before they are copied. After this many tries the copy itself waits for them."""

T = TypeVar("T")


async def finished(result: T | Coroutine[Any, Any, T]) -> T:
    """The result of a method that may have given a coroutine."""
    return await result if isinstance(result, Coroutine) else result


class PageFile(ABC):
    """The file of one backup. After the backup was ended every method raises :class:`ttmfs.BackupEnded`."""

    __slots__ = ("_files", "_store", "id", "page_size")

    def __init__(self, store: Store, id: int) -> None:
        self._store = store
        self.id = id
        self.page_size = store.page_size
        self._files = store.files

    # --- what a kind of file has of its own ---

    @abstractmethod
    def locked(self) -> AbstractAsyncContextManager[None]:
        """Wait until no thread changes the file, and keep others from it. Around each look and each change."""

    @abstractmethod
    def overwrite(self, offset: int, data: bytes) -> int | Coroutine[Any, Any, int]:
        """As :meth:`write`, of bytes of one page that exists, which takes no room."""

    @abstractmethod
    def write(self, offset: int, data: bytes | memoryview) -> int | Coroutine[Any, Any, int]:
        """Store bytes, which makes every page that they touch exist. Gives how many were stored.

        That is fewer than given where the backup or the room ends. Raises OutOfBounds past the end and NoRoom if
        nothing could be stored; no page is ever left stored in part.
        """

    @abstractmethod
    def create_page(self, idx: int) -> Coroutine[Any, Any, None] | None:
        """Store a zero page unless there is a page already. Raises OutOfBounds and NoRoom."""

    @abstractmethod
    def drop_range(self, first: int, past: int) -> Coroutine[Any, Any, None] | None:
        """Release the pages from index `first` up to before index `past`."""

    @abstractmethod
    def is_out(self, offset: int, length: int, *, to_write: bool = False) -> bool:
        """Whether reading or writing a range would wait for pages that are not in memory."""

    @abstractmethod
    def _needed_to_write(self, offset: int, length: int) -> tuple[int, int]:
        """The range that must be in memory for another to be written, as (offset, length)."""

    @abstractmethod
    async def push_out(self, offset: int, length: int) -> None:
        """Push the pages of a range out of memory. Best effort, and never an error: the `writeback` of the verbs."""

    @abstractmethod
    async def sync(self, offset: int, length: int) -> None:
        """Have the pages of a range where they last longest: swapped out (best effort), or on the disk."""

    @abstractmethod
    def _out(self) -> Iterator[int]:
        """The numbers of base pages that are swapped out, or on a disk alone, by parts of the file."""

    # --- what it holds ---

    @property
    def size(self) -> int:
        """Bytes that it spans, stored or not."""
        try:
            return os.lseek(self._files.descriptor(self.id), 0, os.SEEK_END)  # half of what fstat takes
        except OSError as error:
            raise from_os_error(error, "looking at a backup") from error

    def stat(self) -> os.stat_result:
        """The stat of the file: size, blocks of 512 bytes, mode, owner and times are the backup's."""
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
        """Whether it holds no page."""
        return next(self._indices(), None) is None

    def holds(self, idx: int) -> bool:
        """Whether the page at an index exists."""
        try:
            return system_calls.is_data(self._files.descriptor(self.id), idx * self.page_size, self.page_size)
        except OSError as error:
            raise from_os_error(error, "looking for a page") from error

    def _next_data(self, offset: int) -> int | None:
        """Where the first data at or after an offset begins; None if there is none."""
        with translated("looking for pages"):
            return system_calls.next_data_start(self._files.descriptor(self.id), offset)

    def extent(self, idx: int) -> tuple[int, int] | None:
        """The first run of pages at or after an index, as (first index, index past the last); None if there is none.

        Takes time in proportion to its length, 10 ms for 262,144 pages: keep the answer, do not ask for each page.
        """
        try:
            found = system_calls.next_data(self._files.descriptor(self.id), idx * self.page_size)
        except OSError as error:
            raise from_os_error(error, "looking for pages") from error
        return found and (max(idx, found[0] // self.page_size), -(-found[1] // self.page_size))

    def first_absent(self, first: int, past: int) -> int | None:
        """The first index of a range that holds no page; None if every one does."""
        with translated("looking for pages"):
            return system_calls.first_absent(self._files.descriptor(self.id), self.page_size, first, past)

    def extents(self, first: int = 0, past: int | None = None) -> Iterator[tuple[int, int]]:
        """Every run of pages between two indices, as (first index, index past the last), in ascending order."""
        limit = self.size // self.page_size
        with translated("looking for pages"):
            fd = self._files.descriptor(self.id)
            yield from system_calls.page_runs(fd, self.page_size, first, limit if past is None else min(past, limit))

    def _indices(self) -> Iterator[int]:
        """The index of every page, ascending. What lies past the last whole page is no page."""
        idx, limit = 0, self.size // self.page_size
        while (found := self._next_data(idx * self.page_size)) is not None:
            idx = found // self.page_size
            if idx >= limit:
                return
            yield idx
            idx += 1

    @property
    def pages(self) -> int:
        """How many pages exist. Where pages are larger than blocks each one is looked for: 1 us a page."""
        if self._store.counts_pages_by_room:
            return -(-self.taken // self.page_size)
        return sum(1 for _ in self._indices())

    async def count_pages(self) -> int:
        """As :attr:`pages`, in time slices. Pages can come and go meanwhile."""
        if self._store.counts_pages_by_room:
            async with self.locked():
                return self.pages
        return await self._store.blocking_io.slices.total((1 for _ in self._indices()), self.locked)

    @property
    def swapped(self) -> int:
        """How many pages are swapped out, or on a disk alone. Pages that are so in part: by their parts, rounded up."""
        with translated("counting resident pages"):
            return self._share(sum(self._out()), self.pages)

    async def count_swapped(self) -> int:
        """As :attr:`swapped`, in time slices. Pages can come and go meanwhile."""
        with translated("counting resident pages"):
            out = await self._store.blocking_io.slices.total(self._out(), self.locked)
        pages = await self.count_pages()
        async with self.locked():
            return self._share(out, pages)

    def _share(self, out: int, pages: int) -> int:
        """How many of the pages a number of base pages stands for, rounded up."""
        return min(pages, -(-pages * out * BASE_PAGE_SIZE // taken)) if out and (taken := self.taken) else 0

    # --- reading ---

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on, fewer at the end of the backup; absent pages read as zeros."""
        try:
            return os.pread(self._files.descriptor(self.id), size, offset)
        except OSError as error:
            raise from_os_error(error, "reading pages") from error

    def read_into(self, dst: memoryview, offset: int) -> int:
        """Fill `dst` from an offset on. Gives how many bytes were read: fewer at the end of the backup."""
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
        """Have the pages of a range in memory, waiting for swap or disk in a thread. It waits for nothing else.

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
                        file = system_calls.Duplicate(self._files.descriptor(self.id))  # the store may close its own
                    await trio.to_thread.run_sync(
                        _touch, file, offset, length, abandon_on_cancel=abandon, limiter=blocking_io.page_ins.limiter
                    )

    # --- storing and dropping ---

    def _admitted(self, offset: int, data: bytes | memoryview) -> bytes | memoryview:
        """The part of some bytes that may be stored: it is cut where the backup or the room ends."""
        end = self._end_of(offset, len(data))
        first, past = offset // self.page_size, -(-end // self.page_size)  # pages are stored whole
        if (admitted := self._store.admit(self.id, past - first)) < past - first:
            past = self._past_of_room(first, past, admitted)
            end = min(end, past * self.page_size)
            if end <= offset:
                raise self._store.refusal(self.id)
        return data if end == offset + len(data) else data[: end - offset]

    def _end_of(self, offset: int, length: int) -> int:
        """Where a range of bytes ends within the backup. Raises OutOfBounds if it begins past the end."""
        if offset + length <= (size := self.size):
            return offset + length
        if offset >= size:
            raise OutOfBounds(f"the backup ends at byte {size}")
        return size

    def _past_of_room(self, first: int, past: int, room: int) -> int:
        """The index up to which a range can be stored if `room` pages may be added to those that exist."""
        for idx in range(first, past):
            if not self.holds(idx):
                if not room:
                    return idx
                room -= 1
        return past

    def _exists(self, idx: int) -> bool:
        """Whether a page that is to be made exists. Raises OutOfBounds."""
        last = (idx + 1) * self.page_size - 1
        try:  # one look for both, the end and the page: the caller was told that there is no page
            if os.lseek(self._files.descriptor(self.id), last, os.SEEK_HOLE) != last:
                return True
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise from_os_error(error, "looking for a page") from error
            raise OutOfBounds(f"the backup ends at page {self.size // self.page_size}") from None
        return self.page_size > BASE_PAGE_SIZE and self.holds(idx)  # the end of a large page may not be written yet

    def zero(self, idx: int, start: int) -> int | Coroutine[Any, Any, int]:
        """Make the bytes of a page that exists zeros, from byte `start` of it on."""
        rest = self.page_size - start
        return self.write(idx * self.page_size + start, bytes(rest)) if rest else 0

    async def drop_run(self, first: int, past: int, reached: Callable[[int], object] = lambda _: None) -> None:
        """As :meth:`drop_range`, by STEPs, between which others are served: a million pages take 0.7 s.

        `reached` is called with the index up to which all is dropped, each time before others are served.
        """
        while first < past:
            async with self.locked():
                found, end = self._next_data(first * self.page_size), past
                if found is not None:
                    end = min(past, (found // STEP + 1) * STEP // self.page_size)
                await finished(self.drop_range(first, end))  # with what is allocated but holds no data
                reached(end)
            if (first := end) < past:
                await self._store.blocking_io.slices.rest()

    async def truncate(self, size: int, done: int = 0, reached: Callable[[int], object] = lambda _: None) -> None:
        """Drop every page past byte `size`, and make the rest of the page that it lies in zeros. The size stays.

        `done` is how far an earlier try got, which is the last index that `reached` was called with.
        """
        whole = self.size
        if size > whole:
            raise OutOfBounds(f"the backup ends at byte {whole}")
        last, rest = divmod(size, self.page_size)
        first, past = last + bool(rest), -(-whole // self.page_size)
        if not done and rest and size < whole:
            async with self.locked():
                if self.holds(last):
                    await finished(self.zero(last, rest))
        reached(first := max(first, done))
        await self.drop_run(first, past, reached)

    def resize(self, size: int) -> None:
        """Change the bytes that the backup spans: to more at any time, to less only over pages that do not exist."""
        if size < self.size and self._next_data(size // self.page_size * self.page_size) is not None:
            raise InvalidArgument(f"pages are stored past byte {size}; drop them first")
        with translated("changing the size of a backup"):
            os.ftruncate(self._files.descriptor(self.id), size)


def _touch(file: system_calls.Duplicate, offset: int, length: int) -> None:
    """Bring the pages of a range into memory: read a byte of each."""
    with contextlib.suppress(OSError):  # the reader of the page will meet it
        for position in range(offset - offset % BASE_PAGE_SIZE, offset + length, BASE_PAGE_SIZE):
            if not os.pread(file.fd, 1, position + 1):  # the reader of the first byte counts as a user of the page
                break


def allocated_until(fd: int, page_size: int, first: int, past: int, absent: Sequence[int] = ()) -> int:
    """Allocate pages of several blocks each between two indices. Gives the index where room ends.

    Pages that are `absent` on a disk are punched out first: a hole that was read lies in the page cache, and would look
    like a page of zeros as soon as it is allocated. A tmpfs takes back by itself what it refuses in part.
    """
    free_pages(fd, page_size, absent)
    try:
        system_calls.allocate_range(fd, first * page_size, (past - first) * page_size)
        return past
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
    free_pages(fd, page_size, absent)  # disks keep what they had found room for
    for idx in range(first, past):
        start = idx * page_size
        try:
            system_calls.allocate_range(fd, start, page_size)
        except OSError:
            if idx in absent:
                free_pages(fd, page_size, [idx])
            elif os.lseek(fd, start, os.SEEK_HOLE) >= start + page_size:
                continue  # XFS asks for room even where all is allocated
            if idx == first:
                raise
            return idx  # what is before it has room and is to be written
    return past


def free_pages(fd: int, page_size: int, indices: Iterable[int]) -> None:
    """Free what a disk has allocated, or caches, of pages that are to be absent. The indices ascend."""
    first = past = 0
    for idx in (*indices, -1):
        if idx != past:
            if past > first:
                system_calls.punch_hole(fd, first * page_size, (past - first) * page_size)
            first = idx
        past = idx + 1
