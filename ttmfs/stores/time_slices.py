"""Long work on the event loop, in time slices. The loop serves other requests between two slices.

All long work of a mount shares one lock, so a request waits for at most one slice, even with many pieces of long work
in progress.

Concurrency: one thread.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager

import trio

__all__ = ["SLICE_SECONDS", "TimeSlices", "Work"]

SLICE_SECONDS = 0.0005
"""Length of a slice: the time of 25 page requests."""

PASSES = 2
"""Passes of the event loop between two slices. In each it reads at most one request."""


class TimeSlices:
    """Shares the event loop of one mount between its long work and its requests."""

    def __init__(self) -> None:
        self._lock = trio.Lock()  # in order of arrival

    async def rest(self) -> None:
        """Let requests and other long work run. Not cancellable, because a change may be half done."""
        with trio.CancelScope(shield=True):
            async with self._lock:
                for _ in range(PASSES):
                    await trio.lowlevel.checkpoint()

    def begin(self) -> "Work":
        """Start the first slice of a piece of work."""
        return Work(self)

    async def total(self, parts: Iterator[int], locked: Callable[[], AbstractAsyncContextManager[None]]) -> int:
        """Return the sum of numbers that take long to compute. Each slice runs within `locked`."""
        work, total = self.begin(), 0
        while True:
            async with locked():
                for part in parts:
                    total += part
                    if work.slice_is_over():
                        break
                else:
                    return total
            await work.rest()


class Work:
    """A piece of long work. After each :meth:`rest` it must read the state again."""

    def __init__(self, slices: TimeSlices) -> None:
        self._slices = slices
        self._until = time.monotonic() + SLICE_SECONDS

    def slice_is_over(self) -> bool:
        """Whether the slice is over."""
        return time.monotonic() > self._until

    async def rest(self) -> None:
        """End the slice, and start the next one when it is this work's turn."""
        await self._slices.rest()
        self._until = time.monotonic() + SLICE_SECONDS
