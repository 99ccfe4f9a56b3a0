"""Who may do what by mode bits, where the kernel is not the one to decide it.

Three cases. A program asks for a backup's descriptor by a socket. A program creates a page and opens it: the kernel
checks the right to create alone. For a moment after a change of a backup's mode or owner, the kernel may judge its
pages by what it knew of them.
"""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Caller", "Someone", "allows", "may", "process"]


class Caller(NamedTuple):
    """Who asks: a user and group, and the thread, which asks for one thing at a time."""

    uid: int
    gid: int
    pid: int


class Someone(NamedTuple):
    """A user with groups, the supplementary ones among them."""

    uid: int
    groups: frozenset[int]


def process(uid: int, gid: int, pid: int) -> Someone:
    """A process, or thread, that acts as a user and group. Its supplementary groups are none if it has gone."""
    groups = {gid}
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        groups.update(map(int, next(line for line in lines if line.startswith("Groups:")).split()[1:]))
    return Someone(uid, frozenset(groups))


def allows(found: os.stat_result, who: Someone, wanted: int) -> bool:
    """Whether mode bits let someone do what is wanted (R_OK, W_OK, X_OK), as generic_permission() decides it."""
    if not who.uid:
        return True
    shift = 6 if who.uid == found.st_uid else 3 if found.st_gid in who.groups else 0
    return found.st_mode >> shift & wanted == wanted


def may(found: os.stat_result, caller: Caller, wanted: int) -> bool:
    """As :func:`allows`, of a caller at the mount.

    FUSE does not tell supplementary groups. /proc is read for them only if they decide: the caller is not the owner,
    and the bits of the group and of others differ.
    """
    uid, gid, _ = caller
    if not uid:
        return True
    if uid == found.st_uid:
        return found.st_mode >> 6 & wanted == wanted
    of_group, of_others = found.st_mode >> 3 & wanted == wanted, found.st_mode & wanted == wanted
    if of_group == of_others or gid == found.st_gid:
        return of_group
    return allows(found, process(*caller), wanted)
