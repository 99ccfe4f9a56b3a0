"""Which mounts of ttmfs there are, and which backups a path stands for: by attributes alone, quick, without numpy."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .command import CommandError, reason
from .terminal import quoted

__all__ = ["Mounted", "attribute", "check_backup", "check_new", "config", "mounts", "number", "page_size_of_mount"]

TYPE = "fuse.ttmfs"


class Mounted(NamedTuple):
    """A mount of ttmfs, as the kernel lists it. `device` is st_dev of what is in it."""

    path: str
    source: str
    device: int
    options: frozenset[str]


def mounts() -> Iterator[Mounted]:
    """All mounts of ttmfs that this process' mount namespace shows, untouched: some may be dead. See proc(5)."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        kind, source, super_options, *_ = after.split(b" ")
        _, _, device, root, path, options, *_ = before.split(b" ")
        if kind == TYPE.encode() and root == b"/":
            major, _, minor = device.partition(b":")
            words = b",".join((options, super_options)).decode(errors="replace").split(",")
            yield Mounted(_plain(path), _plain(source), os.makedev(int(major), int(minor)), frozenset(words))


def _plain(word: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), word))


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
        found = attribute(path, "page_size")
    except OSError as error:
        hint = "; ttmfs doctor says what to do" if error.errno == errno.ENOTCONN else ""
        raise CommandError(reason(error, path) + hint) from None
    return None if found is None else int(found)


def check_backup(path: str) -> None:
    """CommandError unless a path is a backup."""
    try:
        if os.path.isdir(path) and attribute(path, "pages") is not None:
            return
        os.stat(path)
    except OSError as error:
        raise CommandError(reason(error, path)) from None
    what = "the root of a mount" if page_size_of_mount(path) else "not in a mount of ttmfs, or no directory there"
    raise CommandError(f"{quoted(path)} is no backup: it is {what}")


def check_new(path: str) -> None:
    """CommandError unless a backup could be made there, but for the mount's own refusals."""
    above = os.path.dirname(os.path.normpath(path)) or "."
    if page_size_of_mount(above) is None:
        raise CommandError(f"{quoted(above)} is no mount of ttmfs: backups lie in the root of one, such as MNT/a")


def config(path: str) -> dict[str, Any]:
    """What ``.config`` of a mount says; nothing if it cannot be read."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(path, ".config"), encoding="utf-8") as file:
        found = json.load(file)
        if isinstance(found, dict):
            return found
    return {}
