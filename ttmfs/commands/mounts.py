"""What a path stands for, a mount of ttmfs or a backup: quick, without numpy."""

import contextlib
import errno
import json
import os
from typing import Any

from .. import mountinfo
from .command import CommandError, reason
from .terminal import quoted

__all__ = ["attribute", "check_backup", "check_new", "config", "is_backup", "number", "page_size_of_mount"]


def is_ttmfs(path: str) -> bool:
    """Whether a path lies in a mount of ttmfs. OSError if it is out of reach."""
    return mountinfo.ttmfs_on(os.stat(path).st_dev) is not None


def attribute(path: str, name: str) -> str | None:
    """One of ttmfs' own extended attributes; None where there is none of that name."""
    try:
        return os.getxattr(path, f"user.ttmfs.{name}").decode()
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def number(path: str, name: str) -> int:
    """One that is a number and must be there."""
    return int(os.getxattr(path, f"user.ttmfs.{name}"))


def page_size_of_mount(path: str) -> int | None:
    """The page size if a path is the root of a ttmfs; None if it is not. CommandError if it is out of reach."""
    try:
        found = attribute(path, "page_size") if is_ttmfs(path) else None
    except OSError as error:
        hint = "; ttmfs doctor says what to do" if error.errno == errno.ENOTCONN else ""
        raise CommandError(reason(error, path) + hint) from None
    return None if found is None else int(found)


def is_backup(path: str) -> bool:
    """Whether a path is a backup. OSError if it is out of reach."""
    return is_ttmfs(path) and os.path.isdir(path) and attribute(path, "pages") is not None


def check_backup(path: str) -> None:
    """CommandError unless a path is a backup."""
    try:
        if is_backup(path):
            return
    except OSError as error:
        raise CommandError(reason(error, path)) from None
    what = "the root of a mount" if page_size_of_mount(path) else "not in a mount of ttmfs, or no directory there"
    raise CommandError(f"{quoted(path)} is no backup: it is {what}")


def check_new(path: str) -> None:
    """CommandError unless a backup could be made there, but for the mount's own refusals."""
    above, name = os.path.split(os.path.normpath(path))
    above = above or "."
    if name[:1] == ".":
        raise CommandError(f"{quoted(path)}: names that begin with a dot are the mount's own")
    if page_size_of_mount(above) is None:
        if os.path.isdir(path) and page_size_of_mount(path):
            raise CommandError(f"{quoted(path)} is the root of a mount: name a backup in it, such as {quoted(path)}/a")
        raise CommandError(f"{quoted(above)} is no mount of ttmfs: backups lie in the root of one, such as MNT/a")


def config(path: str) -> dict[str, Any]:
    """What ``.config`` of a mount says; nothing if it cannot be read."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(path, ".config"), encoding="utf-8") as file:
        found = json.load(file)
        if isinstance(found, dict):
            return found
    return {}
