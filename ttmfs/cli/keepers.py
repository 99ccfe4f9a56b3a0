"""The keepers of mounts, and what they hold: only processes of root or of the caller.

Anyone can give a process the name and the command line of a keeper. So a process counts only if all its user ids are
root's or the caller's, and if it holds the state of a mount. It is examined through a descriptor of its directory in
/proc, which never refers to another process, even after it has ended.

It imports only the standard library, as :mod:`ttmfs.cli.rescue` does.
"""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["NAME", "Keeper", "daemons", "is_stopped", "keepers", "pids", "process", "servers", "status_of", "stores"]

NAME = "ttmfs-keeper"
STATE = "/memfd:ttmfs-state"
LONGEST_HEADER = 4096  # bytes


class Keeper(NamedTuple):
    """A keeper: its command line, which contains its mount point, and the device number of its mount."""

    pid: int
    words: list[str]
    device: object
    is_stopped: bool


def pids() -> list[int]:
    """The process ids of all processes."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


def status_of(directory: str) -> dict[str, str]:
    """What ``status`` in a process's directory in /proc says, by key."""
    with open(f"{directory}/status", errors="replace", newline="\n") as file:  # the name may contain other line breaks
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


def keepers(user: int = 0) -> list[Keeper]:
    """All keepers of root, of the caller, and of the `user` who serves a mount, by process id.

    A user can imitate a keeper of their own. So do nothing to one that its user could not do.
    """
    found = []
    for pid in pids():
        with contextlib.suppress(OSError), process(pid, user) as directory:
            if _read(f"{directory}/comm").strip() == NAME and (header := _state_header(directory)) is not None:
                words = _read(f"{directory}/cmdline").split("\0")
                found.append(Keeper(pid, words, header.get("device"), _is_stopped(directory)))
    return found


@contextlib.contextmanager
def process(pid: int, user: int = 0) -> Iterator[str]:
    """The directory of a process in /proc, as a path that stays valid. FileNotFoundError if the process has ended.

    PermissionError unless all its user ids are root's, the caller's or the `user`'s: a set-user-ID program has only one
    of root's.
    (The owner of the directory does not count: it is root for every process that is not dumpable.)
    """
    fd = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    directory = f"/proc/self/fd/{fd}"
    try:
        if set(map(int, status_of(directory)["Uid"].split())) not in ({0}, {os.geteuid()}, {user}):
            raise PermissionError(errno.EPERM, "it is another user's")
        yield directory
    except ProcessLookupError:
        raise FileNotFoundError(errno.ENOENT, "it has ended") from None
    finally:
        os.close(fd)


def daemons(keeper: int, user: int = 0) -> list[int]:
    """The daemon of a keeper, see :func:`keepers`: the child that has the state. A standby has none yet."""
    found, children = list[int](), list[int]()
    with contextlib.suppress(OSError), process(keeper, user) as directory:
        children = [int(word) for word in _read(f"{directory}/task/{keeper}/children").split()]
    for child in children:
        with contextlib.suppress(OSError), process(child, user) as directory:
            is_fork = _read(f"{directory}/comm").strip() == NAME  # a child that the keeper has just forked
            found += [child] * (not is_fork and _state_header(directory) is not None)
    return found


def servers(device: str, user: int = 0) -> list[int]:
    """The processes that hold the state of the mount with a device number: its daemon, and its keeper if it has one.

    They are root's, the caller's, or of the `user` who serves it.
    """
    found = []
    for pid in pids():
        with contextlib.suppress(OSError), process(pid, user) as directory:
            if (header := _state_header(directory)) and header.get("device") == device:
                found.append(pid)
    return found


def is_stopped(pid: int, user: int = 0) -> bool:
    """Whether a process of root, of the caller or of the `user` is stopped, for example by SIGSTOP."""
    with contextlib.suppress(OSError), process(pid, user) as directory:
        return _is_stopped(directory)
    return False


def _is_stopped(directory: str) -> bool:
    return status_of(directory)["State"][:1] in ("T", "t")


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return os.fsdecode(file.read())


def _state_header(directory: str) -> dict[str, object] | None:
    """The header of the state of a mount that a process holds, and its user created. None if it holds none."""
    uid = int(status_of(directory)["Uid"].split()[0])
    for name in os.listdir(f"{directory}/fd"):
        path = f"{directory}/fd/{name}"
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if os.readlink(path).startswith(STATE):
                with open(path, "rb") as file:
                    header = json.loads(file.read(LONGEST_HEADER).rstrip(b"\0"))
                    if os.fstat(file.fileno()).st_uid == uid and isinstance(header, dict):
                        return header
    return None


def _is_path_only(directory: str, fd: str) -> bool:
    """Whether a descriptor of a process was opened with O_PATH."""
    with open(f"{directory}/fdinfo/{fd}", encoding="ascii") as file:
        flags = next(line.split()[1] for line in file if line.startswith("flags:"))
    return bool(int(flags, 8) & os.O_PATH)


def stores(directory: str) -> list[str]:
    """The directories that a process has open to read, but its working directory, as paths in its directory in /proc.

    A keeper or a daemon has one, the store. The directory of a log file is open as a path only. PermissionError if this
    process may not examine it.
    """
    here, found = os.stat(f"{directory}/cwd"), []
    for name in os.listdir(f"{directory}/fd"):
        with contextlib.suppress(OSError):
            what = os.stat(f"{directory}/fd/{name}")
            if stat.S_ISDIR(what.st_mode) and not os.path.samestat(what, here) and not _is_path_only(directory, name):
                found.append(f"{directory}/fd/{name}")
    return found
