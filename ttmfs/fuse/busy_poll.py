"""Busy polling: the reading loop polls for the next request for a while, and only then sleeps.

Sleeping and waking take longer than a page operation. So after each request the loop reads again and again for at most
`window`. The window adapts as KVM's halt polling does. It grows if a request comes soon after its end, and becomes 0 if
none comes, so an idle daemon does nothing. Between two reads the daemon yields the CPU, because the kernel often runs
the client on this CPU when it gets its answer.

The daemon does not poll if it may use only one CPU. It also stops for a while after it was preempted: a process that
has used up its share of the CPU by polling waits longest.
"""

import os
import time
from collections.abc import Callable

__all__ = ["BusyPoll"]

FIRST_WINDOW = 50_000  # ns
HITS, MISSES = 0, 2  # where the counts are

LOST, PAUSE, LONGEST_PAUSE = 300_000, 5_000_000, 160_000_000
"""In ns. An iteration this late means that the process was preempted; polling stops for PAUSE, doubled each time that
it happens again soon. (In a virtual machine, one late iteration means nothing.)"""


class BusyPoll:
    """Decides how long to poll. Times are ns.

    `longest` bounds the window; 0: never poll. `counts` has the number and the time of the waits by polling that found
    a request, and the same of those that found none.
    """

    def __init__(self, longest: int, counts: list[int]) -> None:
        self._longest = longest
        self._counts = counts
        self._window = 0
        self._idle_since = self._paused_until = self._paused_for = 0

    def poll(self, read: Callable[[], int | None]) -> int | None:
        """Call `read` for the window. Returns its result as soon as it is not None."""
        clock, give_way = time.perf_counter_ns, os.sched_yield
        self._idle_since = now = clock()
        if not self._window or now <= self._paused_until:
            return None
        end = now + self._window
        while now < end:
            give_way()
            found, now = read(), clock()
            if now > end + LOST:
                self._pause(now)
            if found is not None:
                self._count(HITS, now)
                return found
        self._count(MISSES, now)
        return None

    @property
    def is_off(self) -> bool:
        """Whether no wait is by polling: there is no window, and :meth:`woken` would open none."""
        return not self._window and (not self._longest or len(os.sched_getaffinity(0)) == 1)

    def woken(self) -> None:
        """A request has come after a sleep: set the window after how long it took."""
        if not self._longest:
            return
        if time.perf_counter_ns() - self._idle_since > self._longest:
            self._window = 0
        elif self._window or len(os.sched_getaffinity(0)) > 1:
            self._window = min(self._longest, max(2 * self._window, FIRST_WINDOW))

    def _count(self, what: int, now: int) -> None:
        """Count a wait by polling that ends now."""
        self._counts[what] += 1
        self._counts[what + 1] += now - self._idle_since

    def _pause(self, now: int) -> None:
        """Stop polling for a while."""
        again = now < self._paused_until + self._paused_for
        self._paused_for = min(2 * self._paused_for, LONGEST_PAUSE) if again else PAUSE
        self._paused_until = now + self._paused_for
