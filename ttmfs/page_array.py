"""The caller's side of the contract: an array whose slots hold pages, or the handles of pages that had to leave memory.

It does what ``ttm_pool_backup()`` and ``ttm_pool_restore_and_alloc()`` (``drivers/gpu/drm/ttm/ttm_pool.c``) do for the
pages of a buffer object: properties C17 to C21 of ``docs/contract.md``. A slot is a number, as the kernel's a pointer:

    0                  empty
    even               the address of a page in this process
    handle << 1 | 1    a page backed up (``ttmfs.handles``)

The pages lie in one anonymous mapping, page i of the array at i * page_size; one that is backed up or purged is given
back to the system. Page i is backed up at index ``first + i`` of the backup.

One thread at a time may use an array; several arrays may share a backup, at different indices.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .errors import BackupEnded, InvalidArgument, PageAbsent, TtmfsError
from .handles import Uint64Array, handle_to_page_ptr, page_ptr_to_handle

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["PageArray", "shrink"]

BATCH = 256
"""Pages that are backed up or restored by one call at most: so often an interruption is looked for."""


MADV_DONTNEED_LOCKED = 24
"""Since Linux 5.18; Python has no name for it."""


class Store(Protocol):
    """What an array needs of a backup; :class:`ttmfs.client.Backup` is one."""

    @property
    def page_size(self) -> int:
        """Bytes a page."""

    def backup_pages(self, pages: NDArray[np.uint8], idx: int, writeback: bool = False) -> Uint64Array:
        """Store pages at the indices from `idx` on; the handles of those that found room."""

    def copy_pages(self, dst: NDArray[np.uint8], handles: Uint64Array, intr: threading.Event | None = None) -> None:
        """Copy pages back."""

    def drop_pages(self, handles: Uint64Array) -> None:
        """Release pages."""


class PageArray:
    """`count` slots, empty at first, over a backup. Index errors are IndexError, as of any array."""

    def __init__(self, backup: Store, count: int, first: int = 0) -> None:
        self._backup = backup
        self._first = first
        self._size = backup.page_size
        if count < 1 or first < 0 or self._size % mmap.PAGESIZE:
            raise InvalidArgument(f"an array has one slot or more, not {count}, and begins at index 0 or later")
        self._map = mmap.mmap(-1, count * self._size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages = np.frombuffer(self._map, np.uint8).reshape(count, self._size)
        self._slots = np.zeros(count, np.uint64)
        self._addresses = self._pages.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(self._size)
        self._stored = np.zeros(count, np.bool_)  # which may have a page in the backup, whatever came between
        self._destroyed = False

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        return f"<PageArray of {len(self)}: {self.populated} in memory, {self.backed_up} backed up>"

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
        """How many slots hold a handle."""
        return int(np.count_nonzero(self._slots & np.uint64(1)))

    def __getitem__(self, slot: int) -> NDArray[np.uint8]:
        """The page in a slot, as a view of page_size bytes: to read and write until it is backed up or purged.

        An empty slot gets a page of zeros. Raises InvalidArgument for one that is backed up: restore first.
        """
        self._check()
        held = int(self._slots[slot])
        if held & 1:
            raise InvalidArgument(f"slot {slot} is backed up; restore the array first")
        self._slots[slot] = self._addresses[slot]
        view: NDArray[np.uint8] = self._pages[slot]
        return view

    def backup(self, *, writeback: bool = False, purge: bool = False, limit: int | None = None) -> int:
        """Move pages out of memory, at most `limit`; gives how many. ``ttm_pool_backup()``.

        With `purge` they are thrown away and their slots are empty; else they are stored and their slots hold handles.
        Empty slots are skipped. If storing fails part way, slots from there on stay pages, and the number done is given
        if any was, else the error is raised. Raises InvalidArgument if any slot holds a handle already.
        """
        self._check()
        if self.backed_up:
            raise InvalidArgument("the array is backed up already, if only in part; restore it first")
        if limit is not None and limit < 0:
            raise InvalidArgument(f"a limit is a number of pages, not {limit}")
        slots = np.flatnonzero(self._is_page())[:limit]
        if purge:
            for start, past in _runs(slots, len(self)):
                self._release(start, past)
                self._slots[start:past] = 0
            return len(slots)
        done = 0
        for start, past in _runs(slots, BATCH):
            self._stored[start:past] = True
            try:
                handles = self._backup.backup_pages(self._pages[start:past], self._first + start, writeback)
            except (TtmfsError, OSError):
                if done:
                    return done
                raise
            end = start + len(handles)
            self._slots[start:end] = handle_to_page_ptr(handles)
            self._release(start, end)
            done += end - start
            if end < past:
                break
        return done

    def restore(self, intr: threading.Event | None = None) -> int:
        """Bring every page back; gives how many. ``ttm_pool_restore_and_alloc()``.

        Some at once are copied, then dropped, and nothing is copied again. An interruption (InterruptedError, if `intr`
        is set) or any other error keeps what is done: call it again and it goes on there. Raises PageAbsent if a page
        was dropped by someone else; those before it are restored.
        """
        self._check()
        self._drop(self._stored & self._is_page())  # what an interruption left
        done = 0
        for start, past in _runs(np.flatnonzero(self._slots & np.uint64(1)), BATCH):
            if intr is not None and intr.is_set():
                raise InterruptedError(errno.EINTR, "restoring was interrupted")
            try:
                self._restore(start, past, intr)
            except PageAbsent:
                for slot in range(start, past):  # as far as the one that is lost
                    self._restore(slot, slot + 1, intr)
            done += past - start
        return done

    def _restore(self, start: int, past: int, intr: threading.Event | None) -> None:
        handles = page_ptr_to_handle(self._slots[start:past])
        self._backup.copy_pages(self._pages[start:past], handles, intr)
        self._slots[start:past] = self._addresses[start:past]  # from here on the backup is not read again
        self._backup.drop_pages(handles)
        self._stored[start:past] = False

    def destroy(self) -> None:
        """Free pages and drop what is backed up, each exactly once. Nothing is left to be done with the array.

        If dropping fails the error is raised, and it can be called again.
        """
        if self._destroyed:
            return
        with contextlib.suppress(BackupEnded):  # and with it every page
            self._drop(self._stored)
        self._release(0, len(self))
        self._slots[:] = 0
        self._destroyed = True  # the mapping goes when no view of it is left

    def _drop(self, slots: NDArray[np.bool_]) -> None:
        """Drop what some slots may have in the backup."""
        indices = np.flatnonzero(slots)
        if len(indices):
            self._backup.drop_pages(indices.astype(np.uint64) + np.uint64(self._first + 1))
            self._stored[indices] = False

    def _is_page(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self._slots != 0) & (self._slots & np.uint64(1) == 0)
        return found

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
        except (TtmfsError, OSError) as error:
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
