"""What each user may store (`uid_size=`). Units are pages.

A backup counts towards its owner, not towards the user who writes to it. It counts the room that it takes, and one page
for itself, so that empty backups are not free. Root has no limit. The counts are not kept: they can be taken again.

Concurrency: one thread.
"""

import os
from collections import Counter
from collections.abc import Callable

from ..errors import OverQuota

__all__ = ["UNBOUND", "Quota"]

UNBOUND = 2**63 - 1


class Quota:
    """Counts what each user's backups take, and bounds it."""

    def __init__(self, pages: int, measure: Callable[[int], tuple[os.stat_result, int]]) -> None:
        """`pages` is the limit; 0: none. `measure` gives the stat of a backup's file, and the pages that it takes."""
        self.is_set = pages > 0
        self._limit, self._measure = pages or UNBOUND, measure
        self._counted: dict[int, tuple[int, int]] = {}  # id: owner and pages, with one for the backup itself
        self._taken: Counter[int] = Counter()

    def count(self, id: int) -> None:
        """Count a backup that is new, or whose pages or owner changed."""
        if self.is_set:
            found, pages = self._measure(id)
            self.forget(id)
            self._counted[id] = found.st_uid, pages + 1
            self._taken[found.st_uid] += pages + 1

    def forget(self, id: int) -> None:
        """Leave out a backup that was ended."""
        uid, pages = self._counted.pop(id, (0, 0))
        self._taken[uid] -= pages
        if not self._taken[uid]:
            del self._taken[uid]

    def left(self, uid: int) -> int:
        """How many more pages a user may store."""
        return max(0, self._limit - self._taken[uid]) if uid else UNBOUND

    def admit(self, id: int, pages: int) -> int:
        """As many as the owner of the backup may store."""
        return min(pages, self.left(self._owner(id)))

    def refusal(self, id: int) -> OverQuota | None:
        """The error for a backup that may not store another page; None if it may."""
        return None if self.admit(id, 1) else self._exceeded(self._owner(id))

    def check_owner(self, uid: int, id: int | None = None) -> None:
        """Raise OverQuota if a user may not own another backup: that of `id`, or a new one."""
        if self.left(uid) < (self._counted.get(id, (0, 0))[1] if id is not None else 1):
            raise self._exceeded(uid)

    def _owner(self, id: int) -> int:
        return self._counted.get(id, (0, 0))[0]

    def _exceeded(self, uid: int) -> OverQuota:
        return OverQuota(f"user {uid} has stored all that one user may (uid_size)")
