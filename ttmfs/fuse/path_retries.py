"""Decides which repeated calls by path are answered as if a page still existed.

If a page is dropped between the lookup of its path and the request for it, the daemon answers ESTALE. The VFS then
looks the path up anew and asks once more; a second ESTALE would reach the caller. But the lookup found the page, so it
existed during the call. So the second request is answered as if the page had been dropped just after it. (A request by
descriptor always gets ESTALE.)

Concurrency: one thread. If the daemon dies, this is lost, and a caller may see an ESTALE.
"""

import time
from typing import NamedTuple

from .recent import RecentlyUsed

__all__ = ["CHANGE", "OPEN", "PathRetries"]

OPEN, CHANGE, NO_STEP = range(3)
"""The steps of a call by path: the page is opened; then its size or attributes are changed. A step that does not ascend
belongs to a later call, which gets ESTALE."""

RETRY_SECONDS = 1.0
"""The longest time from an ESTALE to the retry. The VFS retries at once."""


class Refused(NamedTuple):
    """The ESTALE that a thread got last. `next_step` is the first step that is answered as if the page existed."""

    ino: int
    at: float
    next_step: int = NO_STEP
    misses: int = 0  # lookups since then that found nothing


class PathRetries:
    """The threads that got an ESTALE and may retry."""

    def __init__(self) -> None:
        self.refused: RecentlyUsed[Refused] = RecentlyUsed()
        """By thread. The requests of all others are answered as if there were no retries."""

    def forgives(self, ino: int, pid: int, step: int) -> bool:
        """Whether a thread's request for a page that does not exist is answered as if it did. Else it gets ESTALE."""
        last = self.refused.get(pid)
        if pid and last and last.ino == ino and step >= last.next_step and time.monotonic() <= last.at + RETRY_SECONDS:
            self.refused[pid] = last._replace(next_step=step + 1)
            return True
        self.refused[pid] = Refused(ino, time.monotonic())
        return False

    def looked_up(self, pid: int, *, found: bool) -> None:
        """The kernel looked up a name for a thread.

        The VFS looks up a name that it knows, and if that is gone looks it up once more. The second miss ends the call.
        """
        if not self.refused or not (last := self.refused.get(pid)):
            return
        if found:
            self.refused[pid] = last._replace(next_step=OPEN)
        elif not last.misses:
            self.refused[pid] = last._replace(next_step=NO_STEP, misses=1)
        else:
            self.end_call(pid)

    def end_call(self, pid: int) -> None:
        """A thread's call has come to its last request."""
        self.refused.pop(pid, None)
