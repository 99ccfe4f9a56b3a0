"""The record of a directory on a distributed filesystem: it also names the machine that holds the store.

::

    DIR/.ttmfs             as in :mod:`.directory_record`, and: host, boot_id and counter, the machine that holds the
                           store or held it last, and how often it was taken; clean, whether that one closed it whole
    DIR/.ttmfs-map-INODE   the map of the backup in the file with this inode number (:mod:`.page_map`)

The lock is on the file: two machines can lock one *directory* of CephFS at the same time. A machine that is cut off
loses its lock when the filesystem gives it up (CephFS: evicts it), and another may take the store. It then finds the
lock gone, or another counter.
"""

import errno
import os
import socket
from pathlib import Path
from typing import ClassVar

from ..errors import StoreBusy, TtmfsError
from .directory_record import FILE, Checks, DirectoryRecord, is_locked
from .new_file import remove_unfinished

__all__ = ["DistributedRecord", "is_map", "map_name"]

MAP = ".ttmfs-map-"
LONGEST_HOST = 64

LOST = (errno.EIO, errno.EBADF, errno.ESHUTDOWN, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT)
"""What a client of a distributed filesystem answers that was given up by the servers. (ESHUTDOWN: CephFS.)"""


def map_name(ino: int) -> str:
    """The name of a backup's map, by the inode number of the backup's file."""
    return f"{MAP}{ino}"


def is_map(name: str) -> bool:
    """Whether this is the name of a map."""
    return name.startswith(MAP)


class DistributedRecord(DirectoryRecord):
    """The record of a store that several machines reach, and one holds."""

    format: ClassVar = 2
    length: ClassVar = 512
    checks: ClassVar[Checks] = {
        "host": lambda value: isinstance(value, str),
        "boot_id": lambda value: isinstance(value, str),
        "counter": lambda value: type(value) is int and value >= 0,
        "clean": lambda value: type(value) is bool,
    }

    def __init__(self, directory: int, page_size: int, *, read_only: bool = False, fd: int | None = None) -> None:
        """As :class:`DirectoryRecord`. `fd` comes from the daemon before, on this machine, and has the lock."""
        self._host = socket.gethostname()[:LONGEST_HOST]
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._counter, self._clean = 0, False
        super().__init__(directory, page_size, read_only=read_only, fd=fd)
        self._counter = self.kept["counter"]
        self.was_clean: bool = fd is None and self.kept["clean"]
        """Whether the holder before closed the store, so that no absent page has data."""
        if fd is None and not read_only:
            self._counter += 1
            self._rewrite()
            remove_unfinished(directory)

    def more(self) -> dict[str, object]:
        return {"host": self._host, "boot_id": self._boot_id, "counter": self._counter, "clean": self._clean}

    def _rewrite(self) -> None:
        self._write(self.fd, next_id=self._last_id, tag=self._tag, grain=self.block_size)

    def note_clean(self) -> None:
        """Note that everything is in the store, and that no absent page has data. Waits for the filesystem."""
        if not self.read_only:
            self._clean = True
            self._rewrite()

    def is_lost(self) -> bool:
        """Whether another machine may hold the store. Waits for the filesystem."""
        try:
            return not is_locked(self.fd) or self.read(self.fd)["counter"] != self._counter
        except OSError as error:
            return error.errno in LOST
        except (TtmfsError, ValueError):  # ValueError: the store was closed
            return True

    # --- the file ---

    def _make(self) -> int:
        """Make an empty file with its name. The first mount that locks it writes it."""
        if self.read_only:
            return super()._make()
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
            os.close(os.open(FILE, flags, 0o600, dir_fd=self._directory))
        except FileExistsError:
            pass
        return -1

    def _lock(self, fd: int) -> None:
        if not is_locked(fd):
            raise StoreBusy(f"the store is in use{self._holder(fd)}; unmount it there, or wait with store_wait=SECONDS")
        if not self.read_only and not os.fstat(fd).st_size:
            self.write_first(fd)

    def _holder(self, fd: int) -> str:
        """Who holds the store, for the message."""
        try:
            kept = self.read(fd)
        except (OSError, TtmfsError):
            return " by another mount"
        if (kept["host"], kept["boot_id"]) == (self._host, self._boot_id):
            return " by another mount on this machine, or one that was unmounted with files open"
        return f" by the machine {kept['host']!r}"
