"""What each user's backups take, so that none takes more than his part (``uid_size=``).

A backup counts for its owner, whoever writes to it, as files do for quotas; by the room that it takes, in pages, and as
one page for itself, so that empty ones are not free. Root is not bound. Nothing of it is kept: it can be counted anew
from the store.

Concurrency: one thread.
"""

from collections import Counter

__all__ = ["UNBOUND", "Quota"]

UNBOUND = 2**63 - 1


class Quota:
    """Pages by user, and how many one may have."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # pages
        self._counted: dict[int, tuple[int, int]] = {}  # id: owner and pages
        self._taken: Counter[int] = Counter()

    def count(self, id: int, uid: int, pages: int) -> None:
        """Note the owner of a backup and how many pages of room it takes now."""
        self.forget(id)
        self._counted[id] = uid, pages
        self._taken[uid] += pages + 1

    def forget(self, id: int) -> None:
        """Leave out a backup that was ended."""
        if counted := self._counted.pop(id, None):
            uid, pages = counted
            self._taken[uid] -= pages + 1
            if not self._taken[uid]:
                del self._taken[uid]

    def left(self, uid: int) -> int:
        """How many pages more a user may have."""
        return max(0, self.limit - self._taken[uid]) if uid else UNBOUND

    def left_for(self, id: int) -> int:
        """How many pages more a backup may have."""
        return self.left(self._counted[id][0]) if id in self._counted else UNBOUND

    def takes(self, id: int) -> int:
        """How many pages a backup counts for."""
        return self._counted[id][1] + 1 if id in self._counted else 0
