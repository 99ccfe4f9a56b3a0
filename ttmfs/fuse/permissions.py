"""Permissions by mode bits, in the two cases in which the kernel does not decide them.

- A program creates a page and opens it: the kernel checks only the right to create.
- A backup's mode or owner has just changed: the kernel may still use the old ones for its pages.
"""

import contextlib
import os
from pathlib import Path
from typing import Protocol

__all__ = ["OPENED_FOR", "Caller", "may"]

OPENED_FOR = {
    os.O_RDONLY: os.R_OK,
    os.O_WRONLY: os.W_OK,
    os.O_RDWR: os.R_OK | os.W_OK,
    os.O_ACCMODE: os.R_OK | os.W_OK,
}
"""The right that open(2) asks for, by access mode."""


class Caller(Protocol):
    """The thread that makes a request, and the user and group that it acts as. A thread makes one request at a time."""

    @property
    def uid(self) -> int: ...  # noqa: D102
    @property
    def gid(self) -> int: ...  # noqa: D102
    @property
    def pid(self) -> int: ...  # noqa: D102
    @property
    def unique(self) -> int:
        """The request's number in the kernel."""


def may(found: os.stat_result, caller: Caller, wanted: int) -> bool:
    """Whether mode bits allow a caller what is wanted (R_OK, W_OK), as generic_permission() decides it.

    FUSE does not pass the caller's supplementary groups. They are read from /proc only if they decide: the caller is
    not the owner, and the bits of group and others differ.
    """
    if not caller.uid:
        return True
    of_owner, of_group, of_others = (found.st_mode >> shift & wanted == wanted for shift in (6, 3, 0))
    if caller.uid == found.st_uid:
        return of_owner
    if of_group == of_others or caller.gid == found.st_gid:
        return of_group
    groups = set[int]()
    with contextlib.suppress(OSError, StopIteration, ValueError):  # a thread that has ended has no supplementary groups
        lines = Path(f"/proc/{caller.pid}/status").read_text(errors="replace").splitlines()
        groups.update(map(int, next(line for line in lines if line.startswith("Groups:")).split()[1:]))
    return of_group if found.st_gid in groups else of_others
