"""Bounded tables of recent events: they do not grow with backups, open files or threads. A new daemon starts with none.

Concurrency: one thread.
"""

import time
from collections import OrderedDict
from typing import Generic, TypeVar

from .inodes import backup_of

__all__ = ["KnownRuns", "RecentBackups", "RecentlyUsed"]

RECENTLY_USED = 64
"""Most entries in a `RecentlyUsed`."""

MOST_BACKUPS = 1024
"""Most backups in a `RecentBackups`. If there are more, all backups count as noted."""

ALL = 0
"""In place of a backup's id: every backup."""

T = TypeVar("T")


class RecentlyUsed(Generic[T], OrderedDict[int, T]):
    """Values by file handle or thread. The one set longest ago is forgotten first."""

    def __setitem__(self, key: int, value: T) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > RECENTLY_USED:
            self.popitem(last=False)


class KnownRuns(RecentlyUsed[tuple[int, int, float]]):
    """The runs of pages in which listings are: the index to continue at, the end of the run, and when it was found.

    Finding a run's end takes time in proportion to its length. Doing so at each request makes a listing quadratic.
    """

    def forget_dropped(self, backup: int, first: int, past: int) -> None:
        """Forget the runs that overlap a range of dropped indices, so that no listing shows those pages."""
        for fh, (position, end, _) in list(self.items()):
            if backup_of(fh) == backup and first < end and position < past:
                del self[fh]


class RecentBackups:
    """Backups to which something happened within the last `seconds`. It is false while there are none."""

    __slots__ = ("_seconds", "_until")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[int, float] = {}  # in the order in which they expire

    def __bool__(self) -> bool:
        return bool(self._until)

    def note(self, backup: int = ALL) -> None:
        """Note that it happened to this backup, or to all backups, now."""
        self._prune()
        if len(self._until) >= MOST_BACKUPS:
            self._until.clear()
            backup = ALL
        self._until.pop(backup, None)
        self._until[backup] = time.monotonic() + self._seconds

    def __contains__(self, backup: int) -> bool:
        return bool(self._until) and time.monotonic() <= self.until(backup)  # mostly empty, and asked on hot paths

    def until(self, backup: int) -> float:
        """The time.monotonic() at which the note expires; 0 if there is none."""
        self._prune()
        return max(self._until.get(backup, 0.0), self._until.get(ALL, 0.0))

    def _prune(self) -> None:
        now = time.monotonic()
        while self._until and self._until[first := next(iter(self._until))] < now:
            del self._until[first]
