"""Limits on blocking I/O per backup owner: threads, and bytes of pending writes. Locks of files that threads change.

FUSE does not tell who reads or writes, so the owner of the backup counts. Each owner has a limited number of threads,
so that nobody queues behind another's requests.

A thread that changes a file on a disk holds the kernel's lock of that file for as long as the disk takes. Everyone else
who looks at the backup waits for a lock of ours (:class:`FileLocks`): the event loop must never wait in the kernel.

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
"""Threads that bring pages in, for one owner and for all."""

SYNCS, SYNCS_IN_ALL = 10, 100
"""The same of threads that push pages out, to swap or a disk. No reader waits behind these."""

LOOKS, LOOKS_IN_ALL = 4, 64
"""Long answers, of 64 KiB at most, that are made for one caller at a time, and for all."""

CHANGES, CHANGES_IN_ALL = 10, 100
"""The same of threads that change files on a disk. An fsync(2) that takes long takes none of these."""

HELD = 256 << 20
"""Largest sum of pending writes, in bytes. One owner may have half of what the others leave."""

LEAST_HELD = 8 << 20
"""The same when memory is scarce: some writes must go on."""

COPIES = 2
"""How many copies of a pending write the daemon has: libfuse and pyfuse3 hold one each."""

SHARE = 4
"""Pending writes may take one part in SHARE of what the machine and the control group can still give."""

ROOM_SECONDS = 0.1
"""How long an answer to what they can give is used. Asking takes as long as several writes."""


class Threads:
    """Threads for one kind of work, shared among owners."""

    def __init__(self, each: int, in_all: int) -> None:
        self._each = each
        self.limiter = trio.CapacityLimiter(in_all)
        """For :func:`trio.to_thread.run_sync`."""
        self._of_owners: WeakValueDictionary[int, trio.CapacityLimiter] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait until a thread may work for an owner."""
        if (limiter := self._of_owners.get(uid)) is None:
            limiter = self._of_owners[uid] = trio.CapacityLimiter(self._each)
        async with limiter:
            yield


class FileLocks:
    """Locks of backups whose files threads change. One thread works on a backup at a time, first come first served."""

    def __init__(self) -> None:
        self._locks: dict[int, trio.Lock] = {}

    def __contains__(self, id: int) -> bool:
        """Whether a backup is being changed."""
        return id in self._locks

    @contextlib.asynccontextmanager
    async def locked(self, id: int) -> AsyncIterator[None]:
        """Wait until no one else works on a backup, and keep others from it."""
        lock = self._locks.setdefault(id, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._locks.pop(id, None)


class BlockingIO:
    """The requests of one store that wait for swap or a disk."""

    def __init__(self) -> None:
        self.files = FileLocks()
        self.changes = Threads(CHANGES, CHANGES_IN_ALL)
        self.page_ins = Threads(PAGE_INS, PAGE_INS_IN_ALL)
        self.syncs = Threads(SYNCS, SYNCS_IN_ALL)
        self.looks = Threads(LOOKS, LOOKS_IN_ALL)  # these are no threads: the loop does them, in time slices
        self.slices = TimeSlices()
        self._held: Counter[int] = Counter()
        self._largest = 0  # bytes that were ever held
        self._room, self._room_until = 0, 0.0
        self.count = 0
        self.done: Callable[[int], object] = lambda _: None
        """Called for each request that has waited, with the ns that it took."""

    @contextlib.asynccontextmanager
    async def page_in(self, uid: int) -> AsyncIterator[None]:
        """Wait until a thread may bring in pages for an owner, and count that."""
        start = time.perf_counter_ns()
        self.count += 1
        try:
            async with self.page_ins.turn(uid):
                yield
        finally:
            self.count -= 1
            self.done(time.perf_counter_ns() - start)

    def _most_held(self) -> int:
        """Largest sum of pending writes now. What the daemon has once taken for them, it still has."""
        if (now := time.monotonic()) > self._room_until:
            self._room, self._room_until = available() + COPIES * self._largest, now + ROOM_SECONDS
        return min(HELD, max(LEAST_HELD, self._room // SHARE // COPIES))

    @contextlib.contextmanager
    def holding(self, uid: int, size: int) -> Iterator[None]:
        """While data for an owner's backup waits to be written. Raises TooMuchHeld."""
        own, total = self._held[uid], self._held.total()
        if 2 * (own + size) > self._most_held() - (total - own):
            raise TooMuchHeld("too many writes wait for swap or a disk")
        self._held[uid] += size
        self._largest = max(self._largest, total + size)
        try:
            yield
        finally:
            self._held[uid] -= size
            if not self._held[uid]:
                del self._held[uid]
