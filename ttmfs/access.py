"""Who may do what by mode bits, where the kernel is not the one to decide it.

Two cases: a program asks for a backup's descriptor by a socket; and for a moment after a backup's mode or owner has
changed the kernel may judge its pages by what it knew of them.
"""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Someone", "allows", "process"]


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
