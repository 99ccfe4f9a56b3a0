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

__all__ = ["NAME", "Keeper", "children", "is_stopped", "keepers", "pids", "process", "status_of", "stores"]

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


def status_of(pid: int) -> dict[str, str]:
    """What /proc/PID/status says of a process, of any user; nothing if it has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        lines = file.read().decode(errors="replace").splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def keepers() -> list[Keeper]:
    """All keepers of root and of the caller, by process id."""
    found = []
    for pid in pids():
        with contextlib.suppress(OSError), process(pid) as place:
            if _read(place, "comm").strip() == NAME.encode() and (state := _state_of(place)) is not None:
                words = os.fsdecode(_read(place, "cmdline")).split("\0")
                found.append(Keeper(pid, words, state.get("device"), _is_stopped(place)))
    return found


@contextlib.contextmanager
def process(pid: int) -> Iterator[int]:
    """A descriptor of the directory of a process in /proc. FileNotFoundError if there is none, or it has ended.

    PermissionError unless all its user ids are root's or the caller's: a set-user-ID program has only one of root's.
    (The owner of the directory does not count: it is root for every process that is not dumpable.)
    """
    place = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        ids = set(map(int, _status(place)["Uid"].split()))
        if ids != {0} and ids != {os.geteuid()}:
            raise PermissionError(errno.EPERM, "it is another user's")
        yield place
    except ProcessLookupError:
        raise FileNotFoundError(errno.ENOENT, "it has ended") from None
    finally:
        os.close(place)


def children(pid: int) -> list[int]:
    """The children of a process of root or of the caller. The child of a keeper is its daemon."""
    with contextlib.suppress(OSError), process(pid) as place:
        return sorted(map(int, _read(place, f"task/{pid}/children").split()))
    return []


def is_stopped(pid: int) -> bool:
    """Whether a process of root or of the caller is stopped, for example by SIGSTOP."""
    with contextlib.suppress(OSError), process(pid) as place:
        return _is_stopped(place)
    return False


def _is_stopped(place: int) -> bool:
    return _status(place)["State"][:1] in ("T", "t")


def _read(place: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=place), "rb") as file:
        return file.read()


def _status(place: int) -> dict[str, str]:
    lines = _read(place, "status").decode(errors="replace").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _state_of(place: int) -> dict[str, object] | None:
    """The header of the state of a mount that a process holds, and its user created. None if it holds none."""
    uid = int(_status(place)["Uid"].split()[0])
    with _held(place) as held:
        for name in os.listdir(held):
            with contextlib.suppress(OSError, ValueError, RecursionError):
                if not os.readlink(name, dir_fd=held).startswith(STATE):
                    continue
                file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=held)
                try:
                    header = json.loads(os.pread(file, LONGEST_HEADER, 0).rstrip(b"\0"))
                    if os.fstat(file).st_uid == uid and isinstance(header, dict):
                        return header
                finally:
                    os.close(file)
    return None


@contextlib.contextmanager
def stores(place: int) -> Iterator[list[int]]:
    """Descriptors (O_PATH) of the directories that a process has open, except its working directory.

    A keeper or a daemon has one, the store. PermissionError if this process may not examine it.
    """
    here, found = os.stat("cwd", dir_fd=place), list[int]()
    try:
        with _held(place) as held:
            for name in os.listdir(held):
                with contextlib.suppress(OSError):
                    file = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=held)
                    found.append(file)
                    what = os.fstat(file)
                    if not stat.S_ISDIR(what.st_mode) or os.path.samestat(what, here):
                        os.close(found.pop())
        yield found
    finally:
        for file in found:
            os.close(file)


@contextlib.contextmanager
def _held(place: int) -> Iterator[int]:
    directory = os.open("fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place)
    try:
        yield directory
    finally:
        os.close(directory)
