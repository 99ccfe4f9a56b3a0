"""The limit on what each user may store (`uid_size=`). Units are pages.

A backup counts towards its owner, not towards the user who writes to it. It counts the room that it takes, and one page
for itself, so that empty backups are not free. Root has no limit. The next daemon counts again.

Concurrency: one thread.
"""

import os
from collections import Counter
from collections.abc import Callable

from ..errors import OverQuota

__all__ = ["UNBOUND", "Quota"]

UNBOUND = 2**63 - 1


class Quota:
    """Counts the room of each user's backups, and limits it."""

    def __init__(self, pages: int, measure: Callable[[int], tuple[os.stat_result, int]]) -> None:
        """`pages` is the limit; 0: none. `measure` returns the stat of a backup's file and its room in pages."""
        self.is_set = pages > 0
        self._limit, self._measure = pages or UNBOUND, measure
        self._counted: dict[int, tuple[int, int]] = {}  # id: owner and pages, including one for the backup itself
        self._taken: Counter[int] = Counter()

    def count(self, id: int) -> None:
        """Count a backup that is new, or whose pages or owner changed."""
        if self.is_set:
            found, pages = self._measure(id)
            self.forget(id)
            self._counted[id] = found.st_uid, pages + 1
            self._taken[found.st_uid] += pages + 1

    def forget(self, id: int) -> None:
        """Stop counting a backup that was ended."""
        uid, pages = self._counted.pop(id, (0, 0))
        self._taken[uid] -= pages
        if not self._taken[uid]:
            del self._taken[uid]

    def left(self, uid: int) -> int:
        """Return how many more pages a user may store."""
        return max(0, self._limit - self._taken[uid]) if uid else UNBOUND

    def admit(self, id: int, pages: int) -> int:
        """Return how many of `pages` more pages the owner of the backup may store."""
        return min(pages, self.left(self._owner(id)))

    def refusal(self, id: int) -> OverQuota | None:
        """Return the error for a backup whose owner may not store another page; None if they may."""
        return None if self.admit(id, 1) else self._exceeded(self._owner(id))

    def check_owner(self, uid: int, id: int | None = None) -> None:
        """Raise OverQuota if a user may not own one more backup: the backup of `id`, or (None) a new one."""
        if self.left(uid) < (self._counted.get(id, (0, 0))[1] if id is not None else 1):
            raise self._exceeded(uid)

    def _owner(self, id: int) -> int:
        return self._counted.get(id, (0, 0))[0]

    def _exceeded(self, uid: int) -> OverQuota:
        return OverQuota(f"user {uid} has stored all that one user may (uid_size)")
