"""Who waits for swap or a disk, so that no one's waiting is at the cost of others.

All by the owner of the backup that is waited for: FUSE does not tell who reads or writes. Each owner has so many
threads at most, so that nobody queues behind all that another asks for; and requests that carry data, which the daemon
must hold while they wait, may hold so much in all.

Concurrency: one thread.
"""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from weakref import WeakValueDictionary

import trio

from . import linux
from .errors import TooMuchHeld

__all__ = ["Waiting"]

TURNS = 20
"""Pages of one owner's backups are brought in by so many threads at a time: half of all that trio has."""

HELD = 128 << 20
"""Bytes of writes into one owner's backups that may wait at a time. The daemon needs twice as much for them: libfuse
and pyfuse3 hold a copy each."""

TRIM = 16 << 20
"""If more than so much was held, the memory is given back when the last of it is done with."""


class Waiting:
    """The requests that wait in one store."""

    def __init__(self) -> None:
        self._turns: WeakValueDictionary[int, trio.CapacityLimiter] = WeakValueDictionary()
        self._held: Counter[int] = Counter()
        self._most_held = 0

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait until a thread may work for an owner."""
        if (turns := self._turns.get(uid)) is None:
            turns = self._turns[uid] = trio.CapacityLimiter(TURNS)
        async with turns:
            yield

    @contextlib.contextmanager
    def holding(self, uid: int, size: int) -> Iterator[None]:
        """While data for an owner's backup waits to be written. Raises TooMuchHeld."""
        if self._held[uid] + size > HELD:
            raise TooMuchHeld(f"writes of {HELD >> 20} MiB wait for pages of this owner's backups already")
        self._held[uid] += size
        self._most_held = max(self._most_held, self._held.total())
        try:
            yield
        finally:
            self._held[uid] -= size
            if not self._held[uid]:
                del self._held[uid]
            if not self._held and self._most_held > TRIM:
                self._most_held = 0
                trio.lowlevel.spawn_system_task(_trim)


async def _trim() -> None:
    """Give memory back, once those that held it have ended."""
    await trio.sleep(0.1)
    linux.trim_heap()
