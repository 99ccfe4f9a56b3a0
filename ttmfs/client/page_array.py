"""The caller's side of the contract: an array whose slots hold pages, or the handles of pages that had to leave memory.

It does what ``ttm_pool_backup()`` and ``ttm_pool_restore_and_alloc()`` (``drivers/gpu/drm/ttm/ttm_pool.c``) do for the
pages of a buffer object: properties C17 to C21 of ``docs/contract.md``. A slot is a number, as the kernel's a pointer:

    0                  empty
    even               the address of a page in this process
    handle << 1 | 1    a page backed up (``ttmfs.handles``)

The pages lie in one anonymous mapping, page i of the array at i * page_size; one that is backed up or purged is given
back to the system. Page i is backed up at index ``first + i`` of the backup.

Beside each slot is noted whether the backup may have a page of it (``_stored``). If the slot holds no handle, that page
was left by an interruption, and is to be dropped. A handle whose page is not stored is *lost*: someone else dropped the
page, and nothing is read or dropped by that handle again.

One thread at a time may use an array; several arrays may share a backup, at different indices.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import BackupClosed, BackupEnded, InvalidArgument, NoRoom, NotPermitted, PageAbsent, TtmfsError
from ..handles import Uint64Array, format_ranges, handle_to_page_ptr, page_ptr_to_handle

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["PageArray", "shrink"]

BATCH = 256
"""Pages that are backed up or restored by one call at most: so often an interruption is looked for."""

REFUSALS = (BackupClosed, BackupEnded, NoRoom, NotPermitted)
"""Errors of storing that say that nothing was stored. After others some may have been."""

MADV_DONTNEED_LOCKED = 24
"""Since Linux 5.18; Python has no name for it."""


class PageStore(Protocol):
    """What an array needs of a backup; :class:`ttmfs.client.Backup` is one. Its errors are TtmfsError.

    Whatever else comes out of it is an exception of a signal handler, and ends what was under way.
    """

    @property
    def page_size(self) -> int:
        """Bytes a page."""

    @property
    def size(self) -> int:
        """Bytes that it spans as of now."""

    def backup_pages(self, pages: NDArray[np.uint8], idx: int, writeback: bool = False) -> Uint64Array:
        """Store pages at the indices from `idx` on; the handles of those that found room."""

    def copy_pages(self, dst: NDArray[np.uint8], handles: Uint64Array, intr: threading.Event | None = None) -> None:
        """Copy pages back."""

    def drop_pages(self, handles: Uint64Array) -> None:
        """Release pages."""


class PageArray:
    """`count` slots, empty at first, over a backup. Index errors are IndexError, as of any array.

    Raises InvalidArgument unless its indices lie within the backup. Destroy it before the backup is closed: what is
    backed up cannot be restored or dropped any more then, and BackupClosed is raised.
    """

    def __init__(self, backup: PageStore, count: int, first: int = 0) -> None:
        self._backup = backup
        self._first = first
        self._size = backup.page_size
        if count < 1 or first < 0 or self._size % mmap.PAGESIZE:
            raise InvalidArgument(f"an array has one slot or more, not {count}, and begins at index 0 or later")
        if (limit := backup.size // self._size) < first + count:
            raise InvalidArgument(
                f"{count} slots from index {first} on do not lie within the backup's {limit} pages; resize it first"
            )
        self._map = mmap.mmap(-1, count * self._size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages = np.frombuffer(self._map, np.uint8).reshape(count, self._size)
        self._slots = np.zeros(count, np.uint64)
        self._addresses = self._pages.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(self._size)
        self._stored = np.zeros(count, np.bool_)  # which may have a page in the backup, whatever came between
        self._destroyed = False

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        lost = f", {self.lost} lost" if self.lost else ""
        return f"<PageArray of {len(self)}: {self.populated} in memory, {self.backed_up} backed up{lost}>"

    @property
    def slots(self) -> Uint64Array:
        """The slots, as of now, dtype uint64. To be read only."""
        view = self._slots.view()
        view.flags.writeable = False
        return view

    @property
    def populated(self) -> int:
        """How many slots hold a page."""
        return int(np.count_nonzero(self._is_page()))

    @property
    def backed_up(self) -> int:
        """How many slots hold a handle by which :meth:`restore` has yet to bring the page back."""
        return int(np.count_nonzero(self._is_handle() & self._stored))

    @property
    def lost(self) -> int:
        """How many slots hold the handle of a page that :meth:`restore` found dropped by someone else."""
        return int(np.count_nonzero(self._is_lost()))

    def __getitem__(self, slot: int) -> NDArray[np.uint8]:
        """The page in a slot, as a view of page_size bytes: to read and write until it is backed up or purged.

        An empty slot gets a page of zeros. Raises InvalidArgument for one that is backed up: restore first; PageAbsent
        for one whose page is lost.
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
        """Move pages out of memory, at most `limit`; gives how many. ``ttm_pool_backup()``.

        With `purge` they are thrown away and their slots are empty; else they are stored and their slots hold handles.
        Empty slots are skipped, and so are those whose page is lost; but a purge empties all of these, uncounted, and
        with a limit of 0 these alone. If storing fails part way, slots from there on stay pages, and the number done is
        given if any was, else the error is raised. Raises InvalidArgument if any page is backed up already.
        """
        self._check()
        if self.backed_up:
            raise InvalidArgument("the array is backed up already, if only in part; restore it first")
        if limit is not None and limit < 0:
            raise InvalidArgument(f"a limit is a number of pages, not {limit}")
        slots = np.flatnonzero(self._is_page())[:limit]
        return self._purge(slots) if purge else self._backup_slots(slots, writeback)

    def _purge(self, slots: NDArray[np.intp]) -> int:
        emptied = self._is_lost()
        emptied[slots] = True
        for start, past in _runs(np.flatnonzero(emptied), len(self)):
            self._release(start, past)  # first: an empty slot is one of zeros
            self._slots[start:past] = 0
        try:
            self._drop()  # what an interruption left
        except TtmfsError:
            if not len(slots):
                raise
        return len(slots)

    def _backup_slots(self, slots: NDArray[np.intp], writeback: bool) -> int:
        if not len(slots):
            return 0
        within = slots[slots < self._within()]
        if not len(within):
            raise InvalidArgument("the pages do not lie within the backup any more: it was made smaller")
        done = 0
        for start, past in _runs(within, BATCH):
            before = self._stored[start:past].copy()
            self._stored[start:past] = True  # an interruption may come before their handles do
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
        """Bring every page back; gives how many. ``ttm_pool_restore_and_alloc()``.

        Some at once are copied, then dropped, and nothing is copied again. An interruption (InterruptedError, if `intr`
        is set) or any other error keeps what is done: call it again and it goes on there. Pages that were dropped by
        someone else do not keep it from restoring all others; at the end PageAbsent names their handles, now and at
        every call, until a purge has emptied their slots.
        """
        self._check()
        self._forget_past_end()
        done = 0
        for start, past in _runs(np.flatnonzero(self._is_handle() & self._stored), BATCH):
            if intr is not None and intr.is_set():
                raise InterruptedError(errno.EINTR, "restoring was interrupted")
            done += self._restore(start, past, intr)
        self._drop()  # what an interruption left; last, so that no page waits for it
        if self.lost:
            runs = _runs(np.flatnonzero(self._is_lost()) + self._first + 1, len(self))
            names = format_ranges([(first, past - 1) for first, past in runs])
            raise PageAbsent(f"someone else dropped the pages of these handles: {names}; a purge empties their slots")
        return done

    def _restore(self, start: int, past: int, intr: threading.Event | None) -> int:
        """Restore a run of slots but for the pages that are lost; gives how many."""
        handles = page_ptr_to_handle(self._slots[start:past])
        try:
            self._backup.copy_pages(self._pages[start:past], handles, intr)
        except TtmfsError as error:
            if past - start > 1:  # for all that come before the page to blame, and for those behind one that is lost
                middle = (start + past) // 2
                return self._restore(start, middle, intr) + self._restore(middle, past, intr)
            if not isinstance(error, PageAbsent):
                raise
            self._stored[start] = False  # its handle may become someone else's
            return 0
        self._slots[start:past] = self._addresses[start:past]  # from here on the backup is not read again
        self._backup.drop_pages(handles)
        self._stored[start:past] = False
        return past - start

    def destroy(self) -> None:
        """Free pages and drop what is backed up, each exactly once. Nothing is left to be done with the array.

        If dropping fails the error is raised, slots stay as they are, and it can be called again.
        """
        if self._destroyed:
            return
        self._drop()
        self._release(0, len(self))
        self._slots[:] = 0
        self._destroyed = True  # the mapping goes when no view of it is left

    def _drop(self) -> None:
        """Drop all that the backup may have of the array."""
        with contextlib.suppress(BackupEnded):  # and with it every page
            self._forget_past_end()
            if len(indices := np.flatnonzero(self._stored)):
                self._backup.drop_pages(indices.astype(np.uint64) + np.uint64(self._first + 1))
        self._stored[:] = False

    def _forget_past_end(self) -> None:
        """What lay past the end of a backup that was made smaller is gone, and asking for it is refused."""
        if self._stored.any():
            self._stored[self._within() :] = False

    def _within(self) -> int:
        """How many slots lie within the backup."""
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
        """Give the memory of slots back to the system; zeros are read there next. Nothing is raised."""
        if past == start:
            return
        for advice in mmap.MADV_DONTNEED, MADV_DONTNEED_LOCKED:  # the second for a process that called mlockall
            try:
                self._map.madvise(advice, start * self._size, (past - start) * self._size)
            except OSError as error:
                if error.errno in (None, errno.EINTR):  # a signal handler's
                    raise
            else:
                return
        self._pages[start:past] = 0  # they are kept

    def _check(self) -> None:
        if self._destroyed:
            raise InvalidArgument("the array was destroyed")


def shrink(arrays: Iterable[PageArray], pages: int, *, writeback: bool = False) -> int:
    """Back up arrays, in the order given, until so many pages have left memory; gives how many have.

    One that is backed up, is empty or fails is passed over, so that it does not stall the walk. If nothing could be
    backed up though there was an array that failed, its error is raised. ``ttm_bo_shrink()``, ``ttm_lru_walk``.
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


def _runs(slots: NDArray[np.intp], longest: int) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, ascending, as (first, past the last), none longer than so many."""
    if not len(slots):
        return []
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    found = []
    for run in np.split(slots, breaks):
        found += [
            (int(run[0]) + n, min(int(run[-1]) + 1, int(run[0]) + n + longest)) for n in range(0, len(run), longest)
        ]
    return found
