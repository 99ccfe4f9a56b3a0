"""Limits on blocking I/O per backup owner: threads, and bytes of pending writes. Locks of files that threads change.

FUSE does not tell who reads or writes, so a request counts for the owner of the backup. Each owner has a limited number
of threads, so that no owner's requests wait for all those of another.

A thread that changes a file on a disk holds the kernel's lock of that file as long as the disk takes. The event loop
must never wait in the kernel, so other tasks that need the file wait for a lock of :class:`FileLocks` first.

Concurrency: one thread.
"""

import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from weakref import WeakValueDictionary

import trio

from ..errors import TooMuchHeld
from ..linux.memory import available
from .time_slices import TimeSlices

__all__ = ["SHARE", "BlockingIO", "FileLocks"]

PAGE_INS, PAGE_INS_IN_ALL = 20, 200
"""Limits on threads that bring pages in: for one owner, and for all."""

SYNCS, SYNCS_IN_ALL = 10, 100
"""Limits on threads that push pages out, to swap or a disk. Reads do not wait for them."""

XATTRS, XATTRS_IN_ALL = 4, 64
"""Limits on extended attributes in the making, of up to 64 KiB each: for one caller, and for all."""

CHANGES, CHANGES_IN_ALL = 10, 100
"""Limits on threads that change files on a disk. fsync(2) runs in the threads of SYNCS."""

MAX_PENDING = 256 << 20
"""Largest sum of pending writes, in bytes. One owner may have half of what the others leave."""

MAX_PENDING_SCARCE = 8 << 20
"""The smallest value of this limit. It applies when memory is scarce, so that some writes continue."""

COPIES = 1
"""Copies of a pending write in the daemon."""

SHARE = 4
"""Pending writes may take 1/SHARE of the available memory of the machine and the control group."""

AVAILABLE_SECONDS = 0.1
"""How long a figure of available memory is used. Reading it takes as long as several writes."""


class LimitPerOwner:
    """A limit on one kind of work that runs at the same time: for each owner, and for all together."""

    def __init__(self, each: int, in_all: int) -> None:
        self._each = each
        self.limiter = trio.CapacityLimiter(in_all)
        """The limit for all together, for :func:`trio.to_thread.run_sync`."""
        self._of_owners: WeakValueDictionary[int, trio.CapacityLimiter] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait until the limit of an owner admits one more."""
        if (limiter := self._of_owners.get(uid)) is None:
            limiter = self._of_owners[uid] = trio.CapacityLimiter(self._each)
        try:
            limiter.acquire_nowait()
        except trio.WouldBlock:
            await limiter.acquire()
        try:
            yield
        finally:
            limiter.release()


class FileLocks:
    """Locks of backups whose files threads change. One thread works on a backup at a time, in order of arrival."""

    def __init__(self) -> None:
        self._locks: dict[int, trio.Lock] = {}

    def __contains__(self, id: int) -> bool:
        """Whether a backup is being changed."""
        return id in self._locks

    @contextlib.asynccontextmanager
    async def locked(self, id: int) -> AsyncIterator[None]:
        """Wait until no other task works on a backup, and lock it."""
        lock = self._locks.setdefault(id, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._locks.pop(id, None)


class BlockingIO:
    """The limits and locks of one store, and the number of requests that wait for swap or a disk."""

    def __init__(self) -> None:
        self.file_locks = FileLocks()
        self.changes = LimitPerOwner(CHANGES, CHANGES_IN_ALL)
        self.page_ins = LimitPerOwner(PAGE_INS, PAGE_INS_IN_ALL)
        self.syncs = LimitPerOwner(SYNCS, SYNCS_IN_ALL)
        self.xattrs = LimitPerOwner(XATTRS, XATTRS_IN_ALL)  # without threads: the loop makes them in time slices
        self.slices = TimeSlices()
        self._pending: Counter[int] = Counter()  # bytes by owner
        self._largest_pending = 0  # the largest sum so far
        self._available, self._available_until = 0, 0.0
        self.waiting = 0
        self.on_page_in: Callable[[int], object] = lambda _: None
        """Called for each request that has waited, with the time in ns."""

    @contextlib.asynccontextmanager
    async def page_in(self, uid: int) -> AsyncIterator[None]:
        """Wait until a thread may bring in pages for an owner, and count the request while it waits or works."""
        start = time.perf_counter_ns()
        self.waiting += 1
        try:
            async with self.page_ins.turn(uid):
                yield
        finally:
            self.waiting -= 1
            self.on_page_in(time.perf_counter_ns() - start)

    def _max_pending(self) -> int:
        """Return the largest sum of pending writes that is allowed now."""
        if (now := time.monotonic()) > self._available_until:
            self._available = available() + COPIES * self._largest_pending  # the heap of the daemon does not shrink
            self._available_until = now + AVAILABLE_SECONDS
        return min(MAX_PENDING, max(MAX_PENDING_SCARCE, self._available // SHARE // COPIES))

    @contextlib.contextmanager
    def pending_write(self, uid: int, size: int) -> Iterator[None]:
        """Count the bytes of a write to an owner's backup while it waits. Raises TooMuchHeld."""
        own, total = self._pending[uid], self._pending.total()
        if 2 * (own + size) > self._max_pending() - (total - own):
            raise TooMuchHeld("too many writes wait for swap or a disk")
        self._pending[uid] += size
        self._largest_pending = max(self._largest_pending, total + size)
        try:
            yield
        finally:
            self._pending[uid] -= size
            if not self._pending[uid]:
                del self._pending[uid]
