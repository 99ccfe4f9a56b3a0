"""The processes that use backups: open files in the mount, descriptors of the backup's own file, and mappings.

``/proc/PID/fdinfo`` has the inode number of each open file, ``/proc/PID/maps`` the device and inode number of each
mapping. Files of other filesystems are not touched, so a server that hangs delays nothing.

It does not see processes of other PID namespaces, descriptors in transit in a socket, and files registered with
io_uring. Only root sees processes of other users.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from ...fuse.inodes import backup_of
from ...linux import system_calls
from ...linux.mountinfo import ttmfs_on
from ...quoting import quoted
from ..keepers import pids, status_of
from .mounts import config_of
from .terminal import user_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...client.backup import Backup

__all__ = ["BackupIdentity", "User", "Users", "in_a_line"]

MOST_SHOWN = 8  # processes

OPEN, OWN, MAPPED = "open file", "own descriptor", "mapping"


class BackupIdentity(NamedTuple):
    """A backup: the device and inode number of its directory, and of its own file if known."""

    device: int
    ino: int
    own: tuple[int, int] | None
    servers: frozenset[int]  # the daemon and its keeper

    @classmethod
    def of(cls, backup: Backup) -> BackupIdentity:
        """The identity of an open backup. Raises OSError."""
        found, own = backup.status(), _own_file(backup)
        servers = (config_of(backup).get(name) for name in ("daemon_pid", "keeper_pid"))
        return cls(found.st_dev, found.st_ino, own, frozenset(pid for pid in servers if isinstance(pid, int)))


def _own_file(backup: Backup) -> tuple[int, int] | None:
    """The device and inode number of the backup's own file. None if it is not accessible.

    Only root and the daemon's user can follow the link ``.shmem`` to it. The daemon may give others a descriptor.
    """
    mount = ttmfs_on(backup.status().st_dev)
    if mount is None or mount.served_by not in (0, os.geteuid()):
        return None
    directory = backup.open_file(".", os.O_PATH | os.O_DIRECTORY)
    try:
        found = os.stat(".shmem", dir_fd=directory)
    except OSError:
        if not backup.is_native:
            return None
        found = os.fstat(backup.fileno())
    finally:
        os.close(directory)
    return found.st_dev, found.st_ino


class User(NamedTuple):
    """A process that uses a backup, and the number of its uses by kind."""

    pid: int
    uses: Counter[str]

    def __str__(self) -> str:
        uses = ", ".join(f"{count} {use}{'s' * (count != 1)}" for use, count in self.uses.items())
        try:
            status = status_of(f"/proc/{self.pid}")
        except OSError:
            return f"a process that has ended (pid {self.pid}) had {uses}"
        user = user_name(int(status["Uid"].split()[0]))
        return f"{quoted(status['Name'])} (pid {self.pid}, user {quoted(user)}) has {uses}"


class Users:
    """The users of some backups, except this process, the daemons and their keepers."""

    def __init__(self, backups: Iterable[BackupIdentity]) -> None:
        self._found: dict[BackupIdentity, dict[int, User]] = defaultdict(dict)
        self._hidden = 0  # processes that could not be examined
        self._by_directory = {(backup.device, backup_of(backup.ino)): backup for backup in backups}
        self._by_file = {backup.own: backup for backup in self._by_directory.values() if backup.own}
        self._ids = {id for _, id in self._by_directory} | {ino for _, ino in self._by_file}
        for pid in pids():
            if pid != os.getpid():
                self._examine(pid)

    def of(self, backup: BackupIdentity) -> list[User]:
        """The users of one of the backups, by process id."""
        return sorted(self._found[backup].values(), key=lambda user: user.pid)

    def unseen(self) -> str:
        """What was not checked, in a line; nothing if all was."""
        found = []
        if self._hidden:
            advice = "; run it as root to see them" if os.geteuid() else ""
            found.append(f"{self._hidden} processes of other users could not be examined{advice}")
        if len(self._by_file) < len(self._by_directory):
            found.append("only files open in the mount were found, because the file with the pages is not accessible")
        return "; ".join(found)

    def _examine(self, pid: int) -> None:
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                self._examine_descriptor(pid, fd)
            with open(f"/proc/{pid}/maps", "rb") as maps:
                for line in maps:
                    _, _, _, device, ino, *_ = line.split(maxsplit=5)
                    if self._may_be(int(ino)):
                        major, _, minor = device.partition(b":")
                        self._note(pid, os.makedev(int(major, 16), int(minor, 16)), int(ino), is_mapping=True)
        except PermissionError:
            with contextlib.suppress(OSError):
                self._hidden += "VmSize" in status_of(f"/proc/{pid}")  # kernel threads and zombies have no memory
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            pass

    def _examine_descriptor(self, pid: int, fd: str) -> None:
        try:
            with open(f"/proc/{pid}/fdinfo/{fd}", "rb") as file:
                ino = next((int(line[4:]) for line in file if line.startswith(b"ino:")), 0)
            if self._may_be(ino):
                self._note(pid, *system_calls.device_and_inode(f"/proc/{pid}/fd/{fd}"), is_mapping=False)
        except (FileNotFoundError, ProcessLookupError):  # it was closed
            pass

    def _may_be(self, ino: int) -> bool:
        return ino in self._ids or backup_of(ino) in self._ids

    def _note(self, pid: int, device: int, ino: int, *, is_mapping: bool) -> None:
        if backup := self._by_file.get((device, ino)):
            use = OWN
        elif backup := self._by_directory.get((device, backup_of(ino))):
            use = OPEN
        else:
            return
        if pid in backup.servers:
            return
        self._found[backup].setdefault(pid, User(pid, Counter())).uses[MAPPED if is_mapping else use] += 1


def in_a_line(users: list[User]) -> str:
    """A line that names the first MOST_SHOWN of some users."""
    rest = f"; and {len(users) - MOST_SHOWN} more" if len(users) > MOST_SHOWN else ""
    return "; ".join(map(str, users[:MOST_SHOWN])) + rest
