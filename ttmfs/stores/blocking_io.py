"""Who waits for swap or a disk, so that no one's waiting is at the cost of others.

All by the owner of the backup that is waited for: FUSE does not tell who reads or writes. Each owner has so many
threads at most, so that nobody queues behind all that another asks for; and requests that carry data, which the daemon
must hold while they wait, may hold so much in all.

A thread that changes a file on a disk holds the kernel's lock of that file for as long as the disk takes. So whoever
looks at the backup meanwhile waits for a lock of ours, not in the kernel: the loop must never meet that lock.

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
from .turns import Turns

__all__ = ["SHARE", "FileLocks", "Waiting"]

PAGE_INS, PAGE_INS_IN_ALL = 20, 200
"""Pages of one owner's backups are brought in by so many threads at a time, and those of all."""

SYNCS, SYNCS_IN_ALL = 10, 100
"""The same of threads that push pages out, to swap or a disk: nobody who reads waits behind these."""

LOOKS, LOOKS_IN_ALL = 4, 64
"""Long answers, of 64 KiB at most, that are made for one caller at a time, and for all."""

CHANGES, CHANGES_IN_ALL = 10, 100
"""The same of threads that change files on a disk. An fsync(2) that takes long takes none of these."""

HELD = 256 << 20
"""Bytes of writes that may wait at a time. One owner's backups may have half of what the others' leave, so that
something is left for each."""

LEAST_HELD = 8 << 20
"""So many may wait however little memory there is: someone must get on."""

COPIES = 2
"""How often the daemon has what waits: libfuse and pyfuse3 hold a copy each."""

SHARE = 4
"""The part of what the machine and the control group can give, that waiting writes may take: a quarter."""

ROOM_SECONDS = 0.1
"""For so long an answer serves to the question what they can give. To ask takes as long as several writes."""


class Threads:
    """Threads for one kind of work, shared among owners."""

    def __init__(self, each: int, in_all: int) -> None:
        self._each = each
        self.limiter = trio.CapacityLimiter(in_all)
        """For :func:`trio.to_thread.run_sync`."""
        self._turns: WeakValueDictionary[int, trio.CapacityLimiter] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait until one may work for an owner."""
        if (turns := self._turns.get(uid)) is None:
            turns = self._turns[uid] = trio.CapacityLimiter(self._each)
        async with turns:
            yield


class FileLocks:
    """Locks of backups whose files threads change: one at a time, first come first served."""

    def __init__(self) -> None:
        self._locks: dict[int, trio.Lock] = {}

    def __contains__(self, id: int) -> bool:
        """Whether a backup is being changed."""
        return id in self._locks

    @contextlib.asynccontextmanager
    async def locked(self, id: int) -> AsyncIterator[None]:
        """Wait until no one else is at work on a backup, and keep others from it."""
        lock = self._locks.setdefault(id, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._locks.pop(id, None)


class Waiting:
    """The requests that wait in one store."""

    def __init__(self) -> None:
        self.files = FileLocks()
        self.changes = Threads(CHANGES, CHANGES_IN_ALL)
        self.page_ins = Threads(PAGE_INS, PAGE_INS_IN_ALL)
        self.syncs = Threads(SYNCS, SYNCS_IN_ALL)
        self.looks = Threads(LOOKS, LOOKS_IN_ALL)  # which are no threads: the loop does them, in slices
        self.turns = Turns()
        self._held: Counter[int] = Counter()
        self._largest = 0  # bytes that were ever held
        self._room, self._room_until = 0, 0.0
        self.count = 0
        self.done: Callable[[int], object] = lambda _: None
        """Told of each request that has waited, how many ns."""

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
        """How many bytes may wait now. What the daemon has taken once for those before, it still has."""
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
