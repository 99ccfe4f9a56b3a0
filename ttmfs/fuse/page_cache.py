"""Notes the files whose bytes the kernel may keep in its page cache, and has the kernel forget them after a change.

Files are opened for direct I/O, so read(2) asks the daemon each time. But splice(2), sendfile(2), copy_file_range(2)
and private mappings read through the kernel's page cache. Such a read is seen in its request, which lacks
READ_LOCKOWNER. Its inode is noted, and before the next change of the backup is answered, the kernel forgets the inode's
bytes. So nobody reads what was changed or dropped.

The notes are in the state, so the next daemon knows them.

Concurrency: one thread, except for notifications, which may wait for a reader of the bytes.
"""

import trio

from ..linux.fuse_protocol import INVAL_INODE, NOTIFY_INVAL_INODE
from .inodes import backup_of
from .kernel_cache import notify

__all__ = ["PageCache"]

THREADS = 4


class PageCache:
    """The notes of one mount. `table` is State.cached. It is false while nothing is cached."""

    def __init__(self, connection: int, table: "memoryview[int]") -> None:
        self._connection = connection
        self._table = table
        self._rows = {ino: row for row, ino in enumerate(table) if ino}  # the oldest first, except those found here
        self._free = [row for row, ino in enumerate(table) if not ino]
        self._being_forgotten: list[tuple[int, int]] = []  # (inode, row): the kernel may still have their bytes
        self._limiter = trio.CapacityLimiter(THREADS)

    def __bool__(self) -> bool:
        return bool(self._rows or self._being_forgotten)

    def __contains__(self, backup: int) -> bool:
        return bool(self._inodes_of(backup))

    def _inodes_of(self, backup: int) -> list[int]:
        being_forgotten = [ino for ino, _ in self._being_forgotten]
        return [ino for ino in (*self._rows, *being_forgotten) if backup_of(ino) == backup]

    def note(self, ino: int) -> bool:
        """The kernel is about to get bytes of an inode. Returns False if there is no room: await :meth:`make_room`."""
        if ino not in self._rows:
            if not self._free:
                return False
            row = self._rows[ino] = self._free.pop()
            self._table[row] = ino
        return True

    async def make_room(self) -> None:
        """Have the kernel forget the inode that was noted longest ago."""
        await self._forget([next(iter(self._rows))] if self._rows else [ino for ino, _ in self._being_forgotten])

    async def forget(self, backup: int) -> None:
        """Have the kernel forget the bytes of a backup, which has changed."""
        await self._forget(self._inodes_of(backup))

    async def _forget(self, inodes: list[int]) -> None:
        # A read that is answered from here on is noted anew. Another change meanwhile notifies the kernel once more.
        ours = [(ino, self._rows.pop(ino)) for ino in inodes if ino in self._rows]
        self._being_forgotten += ours
        await trio.to_thread.run_sync(self._notify, inodes, abandon_on_cancel=True, limiter=self._limiter)
        for ino, row in ours:  # only now: a daemon that dies before leaves them to the next
            self._being_forgotten.remove((ino, row))
            self._table[row] = 0
            self._free.append(row)

    def _notify(self, inodes: list[int]) -> None:
        for ino in inodes:
            notify(self._connection, INVAL_INODE.pack(INVAL_INODE.size, NOTIFY_INVAL_INODE, 0, ino, 0, -1))
