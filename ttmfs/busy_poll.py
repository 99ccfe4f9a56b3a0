"""How the reading loop waits for the next request: asking again and again for a while, and only then asleep.

To be put to sleep and woken up takes longer than a page operation. So after each request the connection is polled
without sleeping, for no longer than `window`, which adapts as KVM's halt polling does: it grows when a request came
soon after all, and falls to nothing when none did, so that an idle daemon does nothing. Where all that may run here has
one CPU, polling would keep it from whoever is to send the next request: then there is none.

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

TURN, SHORT_TURN = 10_000_000, 500_000
"""After so many ns of requests without a pause trio's other tasks have their turn; sooner if any waits for a thread."""

BLOCKED_SECONDS = 0.02
"""So late goes on what waits for a thread, if a request was taken back after it was announced, and none follows it."""


class BusyPoll:
    """Waits for a connection to become readable. Times are ns.

    `asleep` waits for that asleep; it gives False if the loop is to end. `longest` bounds the window. SIGALRM must have
    a handler.
    """

    def __init__(self, connection: int, asleep: Callable[[], Awaitable[bool]], longest: int) -> None:
        self._asleep = asleep
        self._longest = longest
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._threads = trio.to_thread.current_default_thread_limiter()
        self._window = 0
        self._turn_began = self._idle_since = 0
        self._polled = False  # whether a task is polling
        self._alarmed = False  # whether the timer runs
        self.calls = 0

    async def wait(self) -> bool:
        """Until a request can be read: True. False if the loop is to end."""
        self.calls += 1
        readable, clock = self._readable.poll, time.perf_counter_ns
        now, threads = clock(), self._threads.borrowed_tokens
        if self._alarmed and not threads:
            self._alarmed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not self._polled:
            if now > self._turn_began + (SHORT_TURN if threads else TURN):
                await self._give_way()
                now = clock()
            self._idle_since = now
            if threads:  # they need the interpreter, so it is not kept busy
                if self._found():
                    return True
            else:
                end = now + self._window
                while True:
                    if readable(0):
                        return True
                    if clock() >= end:
                        break
        while await self._asleep():
            if self._found():  # else another task has read it already
                self._turn_began = clock()
                self._adapt(self._turn_began - self._idle_since)
                return True
        return False

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
        if self._threads.borrowed_tokens and not self._alarmed:
            self._alarmed = True
            signal.setitimer(signal.ITIMER_REAL, BLOCKED_SECONDS, BLOCKED_SECONDS)  # each signal ends a read(2)
        return True

    def _adapt(self, waited: int) -> None:
        """Set the window after a request that came later than it."""
        if waited > self._longest:
            self._window = 0
        elif self._window or len(os.sched_getaffinity(0)) > 1:
            self._window = min(self._longest, max(2 * self._window, FIRST_WINDOW))
