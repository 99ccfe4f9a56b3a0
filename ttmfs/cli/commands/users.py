"""Which processes use backups: open files in the mount, descriptors of the backup's own file, mappings of either.

The kernel tells it in ``/proc/PID``: ``fdinfo`` has the inode number of each open file, ``maps`` the device and inode
number of each mapping. A file of another filesystem is never asked about, so a server that hangs holds nothing up.

What cannot be seen: processes of other users unless root looks, processes of other PID namespaces, descriptors in
transit in a socket, and files registered with io_uring.
"""

from __future__ import annotations

import os
import pwd
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ...fuse.inodes import backup_of
from ...linux import system_calls
from ...linux.mountinfo import ttmfs_on
from ...quoting import quoted
from .mounts import config, opened

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...client.backup import Backup

__all__ = ["Place", "User", "Users", "told"]

SHOWN = 8
"""Processes that are named one by one."""

OPEN, OWN, MAPPED = "open file", "descriptor of its own file", "mapping"
MANY = {OPEN: "open files", OWN: "descriptors of its own file", MAPPED: "mappings"}


class Place(NamedTuple):
    """What the kernel calls a backup: its directory's device and inode number, and those of its own file if known."""

    device: int
    ino: int
    own: tuple[int, int] | None
    servers: frozenset[int]  # processes that have its file open to serve it

    @classmethod
    def of(cls, backup: Backup) -> Place:
        """Raises OSError. The link ``.shmem`` is followed only in a mount that root or the caller serves."""
        directory = backup.open_file(".", os.O_PATH | os.O_DIRECTORY)
        try:
            found = os.fstat(directory)
            mount, own = ttmfs_on(found.st_dev), None
            if mount and mount.served_by in (0, os.geteuid()):
                own = _own_file(directory)
            return cls(found.st_dev, found.st_ino, own, _servers(directory))
        finally:
            os.close(directory)


def _servers(directory: int) -> frozenset[int]:
    with opened("..", directory) as mount:
        found = config(mount)
    pids = (found.get(name) for name in ("daemon_pid", "keeper_pid"))
    return frozenset(pid for pid in pids if isinstance(pid, int))


def _own_file(directory: int) -> tuple[int, int] | None:
    try:
        found = os.stat(".shmem", dir_fd=directory)
    except OSError:  # it leads root and the daemon's user alone; the daemon may give others a descriptor
        from ...client.backup import Backup

        with Backup.open(f"/proc/self/fd/{directory}") as backup:
            if not backup.is_native:
                return None
            found = os.fstat(backup.fileno())
    return found.st_dev, found.st_ino


@dataclass
class User:
    """A process that uses a backup, and in which ways."""

    pid: int
    uses: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        uses = ", ".join(f"{count} {use if count == 1 else MANY[use]}" for use, count in self.uses.items())
        return f"{_command(self.pid)} (pid {self.pid}, user {_owner(self.pid)}) has {uses}"


class Users:
    """The users of some backups, all looked for at once. This process and those that serve are none."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._found: dict[Place, dict[int, User]] = defaultdict(dict)
        self._hidden = 0  # processes that could not be looked at
        self._by_directory = {(place.device, backup_of(place.ino)): place for place in places}
        self._by_file = {place.own: place for place in self._by_directory.values() if place.own}
        self._ids = {id for _, id in self._by_directory} | {ino for _, ino in self._by_file}
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                self._look(int(name))

    def of(self, place: Place) -> list[User]:
        """The users of one of the backups, by their process ids."""
        return sorted(self._found[place].values(), key=lambda user: user.pid)

    def unseen(self) -> str:
        """What could not be looked at, in a line; nothing if all could."""
        found = []
        if self._hidden:
            found.append(f"{self._hidden} processes of other users could not be looked at, root can")
        if len(self._by_file) < len(self._by_directory):
            found.append("the file with the pages is not known here, so only files open in the mount were looked for")
        return "; ".join(found)

    def _look(self, pid: int) -> None:
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                self._look_at_descriptor(pid, fd)
            with open(f"/proc/{pid}/maps", "rb") as maps:
                for line in maps:
                    _, _, _, device, ino, *_ = line.split(maxsplit=5)
                    if self._may_be(int(ino)):
                        major, _, minor = device.partition(b":")
                        self._note(pid, os.makedev(int(major, 16), int(minor, 16)), int(ino), is_mapping=True)
        except PermissionError:
            self._hidden += _has_memory(pid)
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            pass

    def _look_at_descriptor(self, pid: int, fd: str) -> None:
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
        if place := self._by_file.get((device, ino)):
            use = OWN
        elif place := self._by_directory.get((device, backup_of(ino))):
            use = OPEN
        else:
            return
        if pid in place.servers:
            return
        self._found[place].setdefault(pid, User(pid)).uses[MAPPED if is_mapping else use] += 1


def told(users: list[User]) -> str:
    """Users in a line."""
    rest = f"; and {len(users) - SHOWN} more" if len(users) > SHOWN else ""
    return "; ".join(map(str, users[:SHOWN])) + rest


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return quoted(os.fsdecode(file.read().rstrip(b"\n")))
    except OSError:
        return "a process that has ended"


def _owner(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            uid = next(int(line.split()[1]) for line in file if line.startswith(b"Uid:"))
    except OSError:
        return "unknown"
    try:
        return quoted(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def _has_memory(pid: int) -> bool:
    """Whether a process can use anything: kernel threads and the dead have no command line."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False
