"""Long work on the loop, in slices, between which others are served.

All long work of a mount takes turns: however many ask for it, one slice of it is done at a time. So a request waits for
one slice at most, and not for one of each piece of work that is under way.

Concurrency: one thread.
"""

import time

import trio

__all__ = ["SLICE_SECONDS", "Turns", "Work"]

SLICE_SECONDS = 0.0005
"""How long work goes on before others are served: 25 page requests take as long."""

PASSES = 2
"""How often the loop looks for requests between two slices. It reads one at a time."""


class Turns:
    """The turns of one mount's long work."""

    def __init__(self) -> None:
        self._turn = trio.Lock()  # first come, first served

    async def rest(self) -> None:
        """Let others be served, and other long work have its slice. No cancellation ends it amid a change."""
        with trio.CancelScope(shield=True):
            async with self._turn:
                for _ in range(PASSES):
                    await trio.lowlevel.checkpoint()

    def begin(self) -> "Work":
        """A piece of work that begins now."""
        return Work(self)


class Work:
    """A piece of long work. State is read anew after each :meth:`rest`."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._until = time.monotonic() + SLICE_SECONDS

    def is_due(self) -> bool:
        """Whether the slice is over."""
        return time.monotonic() > self._until

    async def rest(self) -> None:
        """Rest, and begin another slice."""
        await self._turns.rest()
        self._until = time.monotonic() + SLICE_SECONDS
