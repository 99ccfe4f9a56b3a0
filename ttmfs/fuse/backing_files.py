"""The backing files of a connection: backups' files that the kernel reads and writes without the daemon (Linux 6.9).

The kernel gives each backing file a number, which the answer to an open(2) names. The number belongs to the connection,
not to the daemon. While a file is open, the kernel accepts no other number for it, so every daemon of a connection
answers the same. The numbers are noted in the state before they are used:

- A daemon that is killed before it has noted a number leaves a backing file that nobody knows, and that would keep the
  memory of an ended backup. The kernel gives numbers in ascending order, so the next daemon takes another one, and
  closes those between it and the last one noted.
- A backing file is closed when its backup ends. If the daemon is killed before, the next one does it.

The kernel takes only backing files of daemons that have CAP_SYS_ADMIN outside of all user namespaces. It accesses the
file with the rights that the daemon had when it gave the backing file. (Without CAP_SYS_RESOURCE: that would allow
programs to use what a full filesystem keeps for root.)

Concurrency: one thread.
"""

import contextlib
import fcntl
import os
import struct

from ..errors import NoRoom, translated
from ..linux.fuse_protocol import BACKING_CLOSE, BACKING_MAP, BACKING_OPEN
from ..recovery.state import BACKING, State
from ..stores.backup_files import BackupFiles

__all__ = ["BackingFiles"]

LATEST = 0
"""The row of the state's table that holds the number noted last. Each other row is empty, or holds a backup's id in its
upper half, and the number of its backing file in its lower half."""

ID_SHIFT = 32

NUMBER = struct.Struct("=I")


class BackingFiles:
    """The backing files of one connection."""

    def __init__(self, connection: int, state: State, files: BackupFiles) -> None:
        self._connection = connection
        self._table = state.backing
        self._probe = state.fd
        self._files = files
        self._works: bool | None = None
        rows = self._table.tolist()
        self._rows = {row >> ID_SHIFT: place for place, row in enumerate(rows) if row and place != LATEST}  # by backup
        self._free = [place for place in range(BACKING - 1, LATEST, -1) if not rows[place]]

    def work(self) -> bool:
        """Whether the kernel takes backing files. Finds out at the first call, after FUSE_INIT was answered.

        Then it also closes what the previous daemon was about to note or to close.
        """
        if self._works is None:
            self._works = self._begin()
        return self._works

    def _begin(self) -> bool:
        try:
            latest = self._open(self._probe)
        except OSError:  # an old kernel, or a daemon without CAP_SYS_ADMIN
            return False
        noted = {self._number(place) for place in self._rows.values()}
        for number in range(self._table[LATEST] + 1, latest + 1):
            if number not in noted:
                self._close(number)
        self._table[LATEST] = latest
        for backup in self._rows.keys() - set(self._files.ids_after(0)):
            self.close(backup)
        return True

    def number_of(self, backup: int) -> int:
        """The number of a backup's backing file. Raises BackupEnded, and NoRoom if there are too many."""
        if (place := self._rows.get(backup)) is not None:
            return self._number(place)
        if not self._free:
            raise NoRoom(f"the .shmem of {len(self._rows)} backups were opened, which is the most")
        with translated("opening a backup"):
            # By path only, so that is_open_elsewhere() does not find the backing file itself.
            path = f"/proc/self/fd/{self._files.descriptor(backup)}"
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                number = self._open(fd)
            finally:
                os.close(fd)
        place = self._free.pop()
        self._table[place] = backup << ID_SHIFT | number
        self._table[LATEST] = number
        self._rows[backup] = place
        return number

    def close(self, backup: int) -> None:
        """A backup has ended: let go of its file. Programs that have it open keep it."""
        if (place := self._rows.pop(backup, None)) is not None:
            self._close(self._number(place))
            self._table[place] = 0
            self._free.append(place)

    def _number(self, place: int) -> int:
        return self._table[place] & (1 << ID_SHIFT) - 1

    def _open(self, fd: int) -> int:
        return int(fcntl.ioctl(self._connection, BACKING_OPEN, bytearray(BACKING_MAP.pack(fd, 0, 0)), True))

    def _close(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # it is closed already
            fcntl.ioctl(self._connection, BACKING_CLOSE, NUMBER.pack(number))
