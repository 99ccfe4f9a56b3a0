"""How the reading loop waits for the next request: asking again and again for a while, and only then asleep.

To be put to sleep and woken up takes longer than a page operation. So after each request the connection is polled
without sleeping, for no longer than `window`, which adapts as KVM's halt polling does: it grows when a request came
soon after all, and falls to nothing when none did, so that an idle daemon does nothing. Between two looks whoever else
waits for this CPU may have it, above all a client that was put here when it was answered.

There is no polling where all that may run here has one CPU, while a slow request is under way, nor for a while after
another process has kept the CPU: who has used up his share by polling would wait longest for the next turn.

Concurrency: one thread, several tasks that wait here. One of them polls, the others sleep; if it is held up by a slow
request, the next request wakes one of those. Between finding the connection readable and returning nothing is awaited,
since who is returned to reads without looking, and blocks if there is nothing to read.
"""

import os
import select
import signal
import time
from collections.abc import Awaitable, Callable

import trio

__all__ = ["BusyPoll"]

FIRST_WINDOW = 50_000  # ns

LOST, PAUSE, LONGEST_PAUSE = 300_000, 5_000_000, 160_000_000
"""A look that comes so many ns later than it should means that another had the CPU, and so long nothing is polled then,
twice as long each time that it comes again soon: in a virtual machine a lost moment now and then means nothing."""

TURN, SHORT_TURN = 10_000_000, 500_000
"""After so many ns of requests without a pause trio's other tasks have their turn; sooner if a request is under way."""

QUICK = 16
"""So many requests that are there already are taken in a row before the time and all else is looked at."""

BLOCKED_SECONDS, LONGEST_ALARM_SECONDS = 0.02, 1.0
"""So late goes on what is under way, if a request was taken back after it was announced, and none follows it."""


class BusyPoll:
    """Waits for a connection to become readable. Times are ns.

    `asleep` waits for that asleep; it gives False if the loop is to end. `longest` bounds the window. `under_way`
    tells whether requests wait for a thread or for their turn. How often polling found a request, and how often none,
    is counted in `values` at `hits` and `misses`, each with its time behind it. SIGALRM must be handled by `alarm`.
    """

    def __init__(
        self,
        connection: int,
        asleep: Callable[[], Awaitable[bool]],
        longest: int,
        under_way: Callable[[], object],
        values: "memoryview[int]",
        hits: int,
        misses: int,
    ) -> None:
        self._asleep = asleep
        self._longest = longest
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._under_way = under_way
        self._values, self._hits, self._misses = values, hits, misses
        self._window = 0
        self._turn_began = self._idle_since = self._paused_until = self._paused_for = 0
        self._quick = 0  # so often may be returned at once, without a look at anything else
        self._polled = False  # whether a task that polls gives way just now
        self._alarm_in = 0.0  # seconds for which the timer was set; 0: it is not
        self.called = False

    async def wait(self) -> bool:
        """Until a request can be read: True. False if the loop is to end."""
        readable = self._readable.poll
        if self._quick and not self._under_way() and readable(0):
            self._quick -= 1
            self._values[self._hits] += 1
            return True
        self.called, give_way, clock = True, os.sched_yield, time.perf_counter_ns
        now, others = clock(), self._under_way()
        if not self._polled:
            if now > self._turn_began + (SHORT_TURN if others else TURN):
                await self._give_way()
                now = clock()
            self._idle_since = now
            if others:  # they need the interpreter, or their turn
                if self._found():
                    return True
            else:
                end = now + (self._window if now > self._paused_until else 0)
                while True:
                    found, now = readable(0), clock()
                    if now > end + LOST:
                        self._pause(now)
                    if found:
                        self._count(self._hits, now)
                        self._quick = QUICK
                        return True
                    if now >= end:
                        break
                    give_way()
                if end > self._idle_since:
                    self._count(self._misses, now)
        while await self._asleep():
            if self._found():  # else another task has read it already
                self._turn_began = clock()
                self._adapt(self._turn_began - self._idle_since)
                return True
        return False

    def _count(self, found: int, now: int) -> None:
        """Count a wait by polling that ends now."""
        self._values[found] += 1
        self._values[found + 1] += now - self._idle_since

    def _pause(self, now: int) -> None:
        """Poll no more for a while."""
        again = now < self._paused_until + self._paused_for
        self._paused_for = min(2 * self._paused_for, LONGEST_PAUSE) if again else PAUSE
        self._paused_until = now + self._paused_for

    async def _give_way(self) -> None:
        """Let trio's other tasks run once."""
        self._polled = True
        try:
            await trio.lowlevel.checkpoint()
        finally:
            self._polled = False
        self._turn_began = time.perf_counter_ns()

    def _found(self) -> bool:
        """Whether there is a request. Who reads it is not left blocked for long if it is taken back just then."""
        if not self._readable.poll(0):
            return False
        if self._under_way() and not self._alarm_in:
            self._alarm_in = BLOCKED_SECONDS
            signal.setitimer(signal.ITIMER_REAL, self._alarm_in)  # the signal ends a read(2)
        return True

    def alarm(self, *_: object) -> None:
        """Handle SIGALRM: once more, later, as long as anything is under way. (What it interrupts must get on.)"""
        self._alarm_in = min(2 * self._alarm_in, LONGEST_ALARM_SECONDS) if self._under_way() else 0.0
        signal.setitimer(signal.ITIMER_REAL, self._alarm_in)

    def _adapt(self, waited: int) -> None:
        """Set the window after a request that came later than it."""
        if waited > self._longest:
            self._window = 0
        elif self._window or len(os.sched_getaffinity(0)) > 1:
            self._window = min(self._longest, max(2 * self._window, FIRST_WINDOW))
