"""Long work on the event loop, done in time slices. Between two slices other requests are served.

All long work of a mount shares one lock, so only one slice runs at a time. A request waits for one slice at most,
however many pieces of long work are in progress.

Concurrency: one thread.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager

import trio

__all__ = ["SLICE_SECONDS", "TimeSlices", "Work"]

SLICE_SECONDS = 0.0005
"""Length of a slice. 25 page requests take as long."""

PASSES = 2
"""How often the loop looks for requests between two slices. It reads one at a time."""


class TimeSlices:
    """Shares the event loop of one mount between its long work and its requests."""

    def __init__(self) -> None:
        self._lock = trio.Lock()  # first come, first served

    async def rest(self) -> None:
        """Let requests be served, and other long work have its slice. Not cancellable: a change may be half done."""
        with trio.CancelScope(shield=True):
            async with self._lock:
                for _ in range(PASSES):
                    await trio.lowlevel.checkpoint()

    def begin(self) -> "Work":
        """Start the first slice of a piece of work."""
        return Work(self)

    async def total(self, parts: Iterator[int], locked: Callable[[], AbstractAsyncContextManager[None]]) -> int:
        """The sum of numbers that take long to compute. Each slice runs within `locked`."""
        work, total = self.begin(), 0
        while True:
            async with locked():
                for part in parts:
                    total += part
                    if work.is_due():
                        break
                else:
                    return total
            await work.rest()


class Work:
    """A piece of long work. After each :meth:`rest` its state must be read anew."""

    def __init__(self, slices: TimeSlices) -> None:
        self._slices = slices
        self._until = time.monotonic() + SLICE_SECONDS

    def is_due(self) -> bool:
        """Whether the slice is over."""
        return time.monotonic() > self._until

    async def rest(self) -> None:
        """End the slice, and start the next one when it is this work's turn."""
        await self._slices.rest()
        self._until = time.monotonic() + SLICE_SECONDS
