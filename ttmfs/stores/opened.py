"""The open backups of a store on a distributed filesystem: files, maps and attributes in memory; and counts of pages.

Concurrency: one thread. Threads work with the files of an :class:`Opened` that has them as its users.
"""

import contextlib
import os
import time
from collections import Counter

from .directory import PageCounts
from .page_map import PageMap

__all__ = ["MapCounts", "Opened"]


class Opened:
    """An open backup: its file, the file of its map, the map, and its attributes."""

    def __init__(self, fd: int, map_fd: int, pages: PageMap) -> None:
        self.fd, self.map_fd, self.map = fd, map_fd, pages
        self.stat = os.fstat(fd)
        self.users = 0
        """Requests and threads that work with the files, which stay open meanwhile."""
        self._changed_ns = 0
        self._is_closed = False

    @property
    def fds(self) -> tuple[int, int]:
        """The descriptors of the file and of its map's."""
        return self.fd, self.map_fd

    @property
    def size(self) -> int:
        """The size of the backup in bytes."""
        return self.stat.st_size

    def look(self) -> None:
        """Ask the filesystem for the attributes again."""
        self.stat = os.fstat(self.fd)

    def changed(self) -> None:
        """Note that pages have changed just now."""
        self._changed_ns = time.time_ns()

    def present_stat(self, page_size: int) -> os.stat_result:
        """The attributes, with the room of the pages that exist."""
        stat = self.stat
        mtime, ctime = max(stat.st_mtime_ns, self._changed_ns), max(stat.st_ctime_ns, self._changed_ns)
        times = [stat.st_atime_ns, mtime, ctime]
        fields = (stat.st_mode, stat.st_ino, stat.st_dev, stat.st_nlink, stat.st_uid, stat.st_gid, self.size)
        more = {f"st_{name}time_ns": ns for name, ns in zip("amc", times, strict=True)}
        more |= {"st_blocks": self.map.count * page_size // 512, "st_blksize": stat.st_blksize}
        return os.stat_result((*fields, *(ns // 10**9 for ns in times)), more)

    def close(self) -> None:
        """Close the files, once no thread works with them."""
        self._is_closed = True
        if not self.users:
            for fd in self.fds:
                with contextlib.suppress(OSError):  # it reports what an earlier write met, whose fsync(2) fails, too
                    os.close(fd)

    def left(self) -> None:
        """A thread works no more with the files."""
        self.users -= 1
        if self._is_closed:
            self.close()


class MapCounts(PageCounts):
    """The pages of all backups, and those that are just being stored."""

    def __init__(self) -> None:
        self._pages: Counter[int] = Counter()
        self._reserved: Counter[int] = Counter()
        self.total = 0

    def __contains__(self, id: int) -> bool:
        return id in self._pages

    def forget(self, id: int) -> None:
        self.total -= self._pages.pop(id, 0)
        self._reserved.pop(id, None)

    def reserve(self, id: int, pages: int) -> None:
        """Have pages count that are to be stored, or (a negative number) no more."""
        self._reserved[id] += pages

    def of(self, id: int, pages: int) -> int:
        """Count a backup that holds this many pages. Returns what counts of it."""
        now = pages + self._reserved[id]
        self.total += now - self._pages[id]
        self._pages[id] = now
        return now
