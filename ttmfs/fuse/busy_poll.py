"""Busy polling: the reading loop polls for the next request for a while, and only then sleeps.

Sleeping and waking take longer than a page operation. So after each request the daemon polls the connection for at most
`window`. The window adapts as KVM's halt polling does. It grows if a request comes soon after its end, and becomes 0 if
none comes, so an idle daemon does nothing. Between two polls the daemon yields the CPU, because the kernel often runs
the client on this CPU when it gets its answer.

The daemon does not poll if it may use only one CPU, or while a slow request is in flight. It also stops for a while
after it was preempted: a process that has used up its share of the CPU by polling waits longest.

Concurrency: one thread. Several tasks wait here: one polls, the others sleep. If the polling task is held up by a slow
request, the next request wakes one of the others. Between finding the connection readable and returning nothing is
awaited: the caller reads without a check, and blocks if there is nothing to read.
"""

import os
import select
import signal
import time
from collections.abc import Awaitable, Callable

import trio

__all__ = ["BusyPoll"]

FIRST_WINDOW = 50_000  # ns
HITS, MISSES = 0, 2  # where the counts are

LOST, PAUSE, LONGEST_PAUSE = 300_000, 5_000_000, 160_000_000
"""In ns. An iteration this late means that the process was preempted; polling stops for PAUSE, doubled each time that
it happens again soon. (In a virtual machine, one late iteration means nothing.)"""

TURN, SHORT_TURN = 10_000_000, 500_000
"""The most ns between two turns of trio's other tasks. The short one applies while a slow request is in flight."""

QUICK = 16
"""Requests that may be taken without reading the clock, if they have already arrived."""

BLOCKED_SECONDS, LONGEST_ALARM_SECONDS = 0.02, 1.0
"""Time until a blocked read(2) is interrupted: at first, and at most. (It blocks if the kernel withdraws a request.)"""


class BusyPoll:
    """Waits for a connection to become readable. Times are ns.

    `asleep` waits for that without polling, and gives False if the loop is to end. `longest` bounds the window.
    `under_way` tells whether slow requests are in flight. `counts` has the number and the time of the waits by polling
    that found a request, and the same of those that found none. `alarm` must handle SIGALRM.
    """

    def __init__(
        self,
        connection: int,
        asleep: Callable[[], Awaitable[bool]],
        longest: int,
        under_way: Callable[[], object],
        counts: list[int],
    ) -> None:
        self._asleep = asleep
        self._longest = longest
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._under_way = under_way
        self._counts = counts
        self._window = 0
        self._turn_began = self._idle_since = self._paused_until = self._paused_for = 0
        self._quick = 0  # how often wait() may still return at once
        self._yielding = False  # whether a task that polls lets others run just now
        self._alarm_in = 0.0  # seconds for which the timer was set; 0: it is not

    async def wait(self) -> bool:
        """Wait until a request can be read. Returns False if the loop is to end."""
        if self._quick and not self._under_way() and self._readable.poll(0):
            self._quick -= 1
            self._counts[HITS] += 1
            return True
        if not self._yielding:
            now, others = time.perf_counter_ns(), self._under_way()
            if now > self._turn_began + (SHORT_TURN if others else TURN):
                await self._let_others_run()
                now = self._turn_began
            self._idle_since = now
            if self._found() if others else self._poll():  # others need the interpreter, or their turn
                return True
        while await self._asleep():
            if self._found():  # else another task has read it already
                self._turn_began = time.perf_counter_ns()
                self._adapt(self._turn_began - self._idle_since)
                return True
        return False

    def _poll(self) -> bool:
        """Poll for the window. Returns True as soon as there is a request."""
        readable, give_way, clock, now = self._readable.poll, os.sched_yield, time.perf_counter_ns, self._idle_since
        end = now + (self._window if now > self._paused_until else 0)
        while True:
            found, now = readable(0), clock()
            if now > end + LOST:
                self._pause(now)
            if found:
                self._count(HITS, now)
                self._quick = QUICK
                return True
            if now >= end:
                break
            give_way()
        if end > self._idle_since:
            self._count(MISSES, now)
        return False

    def _count(self, what: int, now: int) -> None:
        """Count a wait by polling that ends now."""
        self._counts[what] += 1
        self._counts[what + 1] += now - self._idle_since

    def _pause(self, now: int) -> None:
        """Stop polling for a while."""
        again = now < self._paused_until + self._paused_for
        self._paused_for = min(2 * self._paused_for, LONGEST_PAUSE) if again else PAUSE
        self._paused_until = now + self._paused_for

    async def _let_others_run(self) -> None:
        """Let trio's other tasks run once."""
        self._yielding = True
        try:
            await trio.lowlevel.checkpoint()
        finally:
            self._yielding = False
        self._turn_began = time.perf_counter_ns()

    def _found(self) -> bool:
        """Whether there is a request. If the kernel withdraws it before the read(2), a signal ends that read(2)."""
        if not self._readable.poll(0):
            return False
        if self._under_way() and not self._alarm_in:
            self._alarm_in = BLOCKED_SECONDS
            signal.setitimer(signal.ITIMER_REAL, self._alarm_in)
        return True

    def alarm(self, *_: object) -> None:
        """Handle SIGALRM: set the timer again, longer, while anything is in flight, so that it makes progress."""
        self._alarm_in = min(2 * self._alarm_in, LONGEST_ALARM_SECONDS) if self._under_way() else 0.0
        signal.setitimer(signal.ITIMER_REAL, self._alarm_in)

    def _adapt(self, waited: int) -> None:
        """Set the window after a request that came later than it."""
        if waited > self._longest:
            self._window = 0
        elif self._window or len(os.sched_getaffinity(0)) > 1:
            self._window = min(self._longest, max(2 * self._window, FIRST_WINDOW))
