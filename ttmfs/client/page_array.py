"""The caller's side of the contract: an array of slots, each with a page or with the handle of a backed-up page.

It does what ``ttm_pool_backup()`` and ``ttm_pool_restore_and_alloc()`` (``drivers/gpu/drm/ttm/ttm_pool.c``) do for the
pages of a buffer object: properties C17 to C21 of ``docs/contract.md``. A slot is a number, like the kernel's pointer:

    0                  empty
    even               the address of a page in this process
    handle << 1 | 1    a backed-up page (``ttmfs.handles``)

The pages lie in one anonymous mapping, page i of the array at i * page_size. The memory of a page that is backed up or
purged is returned to the system. Page i is backed up at index ``first + i`` of the backup.

For each slot, ``_stored`` notes whether the backup may hold a page of it. If the slot holds no handle, an interruption
left that page, and it is to be dropped. A slot that holds a handle, but no stored page, is *lost*: someone else dropped
the page, and its handle is not used again.

Threading: one thread at a time may use an array. Arrays may share a backup, at different indices.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import BackupClosed, BackupEnded, InvalidArgument, NoRoom, NotPermitted, PageAbsent, TtmfsError
from ..handles import Uint64Array, format_ranges, handle_to_page_ptr, page_ptr_to_handle
from ..model import arguments

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["PageArray", "shrink"]

BATCH = 256
"""The most pages in one call of the backup. Between calls an interruption is noticed."""

REFUSALS = (BackupClosed, BackupEnded, NoRoom, NotPermitted)
"""The errors after which nothing was stored. After other errors some pages may have been."""

MADV_DONTNEED_LOCKED = 24
"""Like MADV_DONTNEED, and also for memory that mlock(2) locked. Python has no name for it."""


class PageStore(Protocol):
    """The part of :class:`ttmfs.client.Backup` that an array uses. Its errors are TtmfsError.

    Any other exception comes from a signal handler, and ends the call.
    """

    @property
    def page_size(self) -> int:
        """Bytes in a page."""

    @property
    def size(self) -> int:
        """Bytes that the backup spans now."""

    def backup_pages(self, pages: NDArray[np.uint8], idx: int, writeback: bool = False) -> Uint64Array:
        """Store pages at the indices from `idx` on. Return the handles of the stored ones."""

    def copy_pages(self, dst: NDArray[np.uint8], handles: Uint64Array, intr: threading.Event | None = None) -> None:
        """Copy pages back."""

    def drop_pages(self, handles: Uint64Array) -> None:
        """Release pages."""


class PageArray:
    """An array of `count` slots, empty at first. It uses the indices of a backup from `first` on.

    Raises InvalidArgument unless these lie within the backup. A wrong slot number is an IndexError, as in any sequence.
    Destroy the array before the backup is closed; afterwards its methods raise BackupClosed.
    """

    def __init__(self, backup: PageStore, count: int, first: int = 0) -> None:
        self._backup = backup
        self._first = first
        self._size = backup.page_size
        if count < 1 or first < 0 or self._size % mmap.PAGESIZE:
            raise InvalidArgument(f"an array needs one slot or more, not {count}, and an index of 0 or more")
        if (limit := backup.size // self._size) < first + count:
            raise InvalidArgument(
                f"{count} slots from index {first} on do not fit into a backup of {limit} pages; resize it first"
            )
        self._map = mmap.mmap(-1, count * self._size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages = np.frombuffer(self._map, np.uint8).reshape(count, self._size)
        self._slots = np.zeros(count, np.uint64)
        self._addresses = self._pages.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(self._size)
        self._stored = np.zeros(count, np.bool_)  # the backup may hold a page of the slot
        self._destroyed = False

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        lost = f", {self.lost} lost" if self.lost else ""
        return f"<PageArray of {len(self)}: {self.populated} in memory, {self.backed_up} backed up{lost}>"

    @property
    def slots(self) -> Uint64Array:
        """The slots, dtype uint64: a read-only view."""
        view = self._slots.view()
        view.flags.writeable = False
        return view

    @property
    def populated(self) -> int:
        """The number of slots that hold a page."""
        return int(np.count_nonzero(self._is_page()))

    @property
    def backed_up(self) -> int:
        """The number of slots that hold a handle, whose pages :meth:`restore` brings back."""
        return int(np.count_nonzero(self._is_handle() & self._stored))

    @property
    def lost(self) -> int:
        """The number of slots whose page :meth:`restore` did not find: someone else dropped it."""
        return int(np.count_nonzero(self._is_lost()))

    def __getitem__(self, slot: int) -> NDArray[np.uint8]:
        """Return the page in a slot: a view, shape (page_size,), dtype uint8, valid until the page is moved or purged.

        An empty slot gets a page of zeros. Raises InvalidArgument if the page is backed up, and PageAbsent if it is
        lost.
        """
        self._check()
        held = int(self._slots[slot])
        if held & 1 and not self._stored[slot]:
            raise PageAbsent(f"slot {slot}: the page of handle {held >> 1} was dropped by someone else")
        if held & 1:
            raise InvalidArgument(f"slot {slot} is backed up; restore the array first")
        self._slots[slot] = self._addresses[slot]
        view: NDArray[np.uint8] = self._pages[slot]
        return view

    def backup(self, *, writeback: bool = False, purge: bool = False, limit: int | None = None) -> int:
        """Move at most `limit` pages out of memory. Return their number. ``ttm_pool_backup()``.

        The pages are stored and their slots hold handles. With `purge` the pages are discarded and their slots are
        empty; a purge also empties the slots of lost pages, which do not count. Empty slots are skipped.

        If storing fails part way, the other slots keep their pages. The error is raised only if no page was stored.
        Raises InvalidArgument if any page is backed up already.
        """
        self._check()
        if self.backed_up:
            raise InvalidArgument("pages of the array are backed up already; restore it first")
        if limit is not None and limit < 0:
            raise InvalidArgument(f"limit must be a number of pages, not {limit}")
        slots = np.flatnonzero(self._is_page())[:limit]
        return self._purge(slots) if purge else self._backup_slots(slots, writeback)

    def _purge(self, slots: NDArray[np.intp]) -> int:
        emptied = self._is_lost()
        emptied[slots] = True
        for start, past in arguments.consecutive(np.flatnonzero(emptied)):
            self._release(start, past)  # before the slots are empty: an empty slot reads as zeros
            self._slots[start:past] = 0
        try:
            self._drop()  # pages that an interruption left
        except TtmfsError:
            if not len(slots):
                raise
        return len(slots)

    def _backup_slots(self, slots: NDArray[np.intp], writeback: bool) -> int:
        if not len(slots):
            return 0
        within = slots[slots < self._count_within()]
        if not len(within):
            raise InvalidArgument("the pages lie past the end of the backup, which has become smaller")
        done = 0
        for start, past in _batches(within):
            before = self._stored[start:past].copy()
            self._stored[start:past] = True  # an interruption can come after storing and before the return
            try:
                handles = self._backup.backup_pages(self._pages[start:past], self._first + start, writeback)
            except TtmfsError as error:
                if isinstance(error, REFUSALS):
                    self._stored[start:past] = before
                if done:
                    return done
                raise
            end = start + len(handles)
            self._stored[end:past] = before[len(handles) :]
            self._slots[start:end] = handle_to_page_ptr(handles)
            self._release(start, end)
            done += end - start
            if end < past:
                break
        return done

    def restore(self, intr: threading.Event | None = None) -> int:
        """Bring every page back. Return their number. ``ttm_pool_restore_and_alloc()``.

        Pages are copied and then dropped, a batch at a time. After an interruption (InterruptedError, if `intr` is set)
        or another error, call it again: it continues there, and copies nothing twice. Lost pages do not keep it from
        restoring the others; at its end it raises PageAbsent with their handles, until a purge empties their slots.
        """
        self._check()
        self._forget_past_end()
        done = 0
        for start, past in _batches(np.flatnonzero(self._is_handle() & self._stored)):
            if intr is not None and intr.is_set():
                raise InterruptedError(errno.EINTR, "restoring was interrupted")
            done += self._restore(start, past, intr)
        self._drop()  # pages that an interruption left; last, because no restored page depends on it
        if self.lost:
            runs = arguments.consecutive(np.flatnonzero(self._is_lost()) + self._first + 1)
            names = format_ranges([(first, past - 1) for first, past in runs])
            raise PageAbsent(f"someone else dropped the pages of these handles: {names}; a purge empties their slots")
        return done

    def _restore(self, start: int, past: int, intr: threading.Event | None) -> int:
        """Restore a run of slots except lost pages. Return the number restored."""
        handles = page_ptr_to_handle(self._slots[start:past])
        try:
            self._backup.copy_pages(self._pages[start:past], handles, intr)
        except TtmfsError as error:
            if past - start > 1:  # restore the pages before the one at fault, and those after a lost one
                middle = (start + past) // 2
                return self._restore(start, middle, intr) + self._restore(middle, past, intr)
            if not isinstance(error, PageAbsent):
                raise
            self._stored[start] = False  # someone else may store a page under its handle
            return 0
        self._slots[start:past] = self._addresses[start:past]  # before dropping: from now on the backup is not read
        self._backup.drop_pages(handles)
        self._stored[start:past] = False
        return past - start

    def destroy(self) -> None:
        """Free every page and drop every backed-up one, each exactly once. Other methods then raise InvalidArgument.

        If dropping fails, the error is raised, the slots stay as they are, and it can be called again.
        """
        if self._destroyed:
            return
        self._drop()
        self._release(0, len(self))
        self._slots[:] = 0
        self._destroyed = True  # the mapping is freed with its last view

    def _drop(self) -> None:
        """Drop every page of the array that the backup may hold."""
        with contextlib.suppress(BackupEnded):  # then its pages are gone
            self._forget_past_end()
            if len(indices := np.flatnonzero(self._stored)):
                self._backup.drop_pages(indices.astype(np.uint64) + np.uint64(self._first + 1))
        self._stored[:] = False

    def _forget_past_end(self) -> None:
        """Forget pages past the end of a backup that has become smaller: they are gone."""
        if self._stored.any():
            self._stored[self._count_within() :] = False

    def _count_within(self) -> int:
        """Return the number of slots that lie within the backup."""
        return max(0, self._backup.size // self._size - self._first)

    def _is_page(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self._slots != 0) & (self._slots & np.uint64(1) == 0)
        return found

    def _is_handle(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self._slots & np.uint64(1) != 0
        return found

    def _is_lost(self) -> NDArray[np.bool_]:
        return self._is_handle() & ~self._stored

    def _release(self, start: int, past: int) -> None:
        """Return the memory of slots to the system. They then read as zeros."""
        if past > start:
            self._map.madvise(MADV_DONTNEED_LOCKED, start * self._size, (past - start) * self._size)

    def _check(self) -> None:
        if self._destroyed:
            raise InvalidArgument("the array was destroyed")


def shrink(arrays: Iterable[PageArray], pages: int, *, writeback: bool = False) -> int:
    """Back up arrays, in the order given, until `pages` pages have left memory. Return how many have.

    Arrays that are backed up or empty, or that fail, are skipped. If all that could be tried failed, the first error is
    raised. ``ttm_bo_shrink()``, ``ttm_lru_walk``.
    """
    done, failure = 0, None
    for array in arrays:
        if done >= pages:
            break
        if array.backed_up:
            continue
        try:
            done += array.backup(writeback=writeback, limit=pages - done)
        except TtmfsError as error:
            failure = failure or error
    if failure and not done:
        raise failure
    return done


def _batches(slots: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Return the runs of consecutive slots, ascending, as (first, past the last), cut at BATCH slots."""
    return [
        (start, min(past, start + BATCH))
        for first, past in arguments.consecutive(slots)
        for start in range(first, past, BATCH)
    ]
