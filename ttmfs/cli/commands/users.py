"""The processes that use backups: open files in the mount, and mappings of ``.shmem``.

``/proc/PID/fdinfo`` has the inode number of each open file, ``/proc/PID/maps`` the device and inode number of each
mapping. Files of other filesystems are not touched, so a server that hangs delays nothing.

It does not see processes of other PID namespaces, descriptors in transit in a socket, and files registered with
io_uring. Only root sees processes of other users. The daemon knows of all that have ``.shmem`` open or mapped, but not
which they are (``user.ttmfs.shmem_open``).
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from ...fuse.inodes import backup_of
from ...linux import system_calls
from ...quoting import quoted
from ..keepers import pids, status_of
from .mounts import config_of
from .terminal import counted, user_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ...client.backup import Backup

__all__ = ["MAPPED", "BackupIdentity", "User", "Users", "in_a_line", "mappings"]

MOST_SHOWN = 8  # processes

OPEN, MAPPED = "open file", "mapping"


class BackupIdentity(NamedTuple):
    """A backup: the device and inode number of its directory."""

    device: int
    ino: int
    servers: frozenset[int]  # the daemon and its keeper

    @classmethod
    def of(cls, backup: Backup) -> BackupIdentity:
        """The identity of an open backup. Raises OSError."""
        found, servers = backup.status(), (config_of(backup).get(name) for name in ("daemon_pid", "keeper_pid"))
        return cls(found.st_dev, found.st_ino, frozenset(pid for pid in servers if isinstance(pid, int)))


def _plural(use: str) -> str:
    return f"{use.removesuffix('y')}ies" if use.endswith("y") else f"{use}s"


class User(NamedTuple):
    """A process that uses a backup, and the number of its uses by kind."""

    pid: int
    uses: Counter[str]

    def __str__(self) -> str:
        uses = ", ".join(f"{count} {_plural(use) if count != 1 else use}" for use, count in self.uses.items())
        try:
            status = status_of(f"/proc/{self.pid}")
        except OSError:
            return f"a process that has ended (pid {self.pid}) had {uses}"
        user = user_name(int(status["Uid"].split()[0]))
        return f"{quoted(status['Name'])} (pid {self.pid}, user {quoted(user)}) has {uses}"


class Mapping(NamedTuple):
    """A mapping of a file in a process' memory: its addresses, and the file."""

    start: int
    past: int
    device: int
    ino: int


def mappings(pid: int) -> Iterator[Mapping]:
    """The mappings of a process, also those without a file, whose inode number is 0. Raises OSError."""
    with open(f"/proc/{pid}/maps", "rb") as maps:
        for line in maps:
            addresses, _, _, device, ino, *_ = line.split(maxsplit=5)
            start, past = (int(address, 16) for address in addresses.split(b"-"))
            major, minor = (int(number, 16) for number in device.split(b":"))
            yield Mapping(start, past, os.makedev(major, minor), int(ino))


class Users:
    """The users of some backups, except this process, the daemons and their keepers."""

    def __init__(self, backups: Iterable[BackupIdentity]) -> None:
        self._found: dict[BackupIdentity, dict[int, User]] = defaultdict(dict)
        self._hidden = 0  # processes that could not be examined
        self._by_directory = {(backup.device, backup_of(backup.ino)): backup for backup in backups}
        self._ids = {id for _, id in self._by_directory}
        for pid in pids():
            if pid != os.getpid():
                self._examine(pid)

    def of(self, backup: BackupIdentity) -> list[User]:
        """The users of one of the backups, by process id."""
        return sorted(self._found[backup].values(), key=lambda user: user.pid)

    def unseen(self) -> str:
        """What was not checked, in a line; nothing if all was."""
        advice = "; run it as root to see them" if os.geteuid() else ""
        hidden = counted(self._hidden, "process of another user", "processes of other users")
        return f"{hidden} could not be examined{advice}" if self._hidden else ""

    def _examine(self, pid: int) -> None:
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                self._examine_descriptor(pid, fd)
            for mapping in mappings(pid):
                if self._may_be(mapping.ino):
                    self._note(pid, mapping.device, mapping.ino, is_mapping=True)
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
        return backup_of(ino) in self._ids

    def _note(self, pid: int, device: int, ino: int, *, is_mapping: bool) -> None:
        backup = self._by_directory.get((device, backup_of(ino)))
        if backup and pid not in backup.servers:
            self._found[backup].setdefault(pid, User(pid, Counter())).uses[MAPPED if is_mapping else OPEN] += 1


def in_a_line(users: list[User]) -> str:
    """A line that names the first MOST_SHOWN of some users."""
    rest = f"; and {len(users) - MOST_SHOWN} more" if len(users) > MOST_SHOWN else ""
    return "; ".join(map(str, users[:MOST_SHOWN])) + rest
