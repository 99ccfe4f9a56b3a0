"""The mounts that this process sees, from proc(5). Nothing here touches a mount: its server may hang or be dead."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "CEPH", "NFS", "TYPE", "Mounted", "filesystem_of", "is_attached", "is_listed", "mounted_above", "mounted_at",
    "mounts", "ttmfs_mounts", "ttmfs_on",
]  # fmt: skip

TYPE = "fuse.ttmfs"
CEPH = frozenset({"ceph", "fuse.ceph-fuse", "fuse.ceph"})
NFS = frozenset({"nfs", "nfs4"})


class Mounted(NamedTuple):
    """A line of mountinfo. `device` is MAJOR:MINOR; `options` are those of the mount and of the filesystem."""

    path: str
    root: str
    type: str
    source: str
    device: str
    options: frozenset[str]

    @property
    def st_dev(self) -> int:
        """The st_dev of the files in it."""
        major, _, minor = self.device.partition(":")
        return os.makedev(int(major), int(minor))

    @property
    def served_by(self) -> int:
        """The uid of the user who mounted a FUSE filesystem and serves it."""
        return next((int(word[8:]) for word in self.options if word.startswith("user_id=")), 0)


def mounts() -> Iterator[Mounted]:
    """Yield the mounts of this process' mount namespace. Of several on one path, the topmost comes last."""
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n")[:-1]:
        before, _, after = line.partition(b" - ")
        kind, source, super_options, *_ = map(_plain, after.split(b" "))
        _, _, device, root, path, options, *_ = map(_plain, before.split(b" "))
        yield Mounted(path, root, kind, source, device, frozenset(f"{options},{super_options}".split(",")))


def filesystem_of(fd: int) -> Mounted | None:
    """Return a mount of the filesystem of an open file, or None if this process sees none."""
    device = os.fstat(fd).st_dev
    return next((mount for mount in mounts() if mount.st_dev == device), None)


def mounted_at(path: str) -> Mounted | None:
    """Return the topmost mount at a real path, or None."""
    return next((mount for mount in reversed(list(mounts())) if mount.path == path), None)


def mounted_above(path: str) -> Mounted | None:
    """Return the mount in which a real path lies, without touching it; None if this process sees none."""
    found = [mount for mount in mounts() if path == mount.path or path.startswith(f"{mount.path.rstrip('/')}/")]
    return max(reversed(found), key=lambda mount: len(mount.path), default=None)


def ttmfs_mounts() -> Iterator[Mounted]:
    """Yield the mounts of ttmfs, without bind mounts of a part of one."""
    return (mount for mount in mounts() if mount.type == TYPE and mount.root == "/")


def ttmfs_on(st_dev: int) -> Mounted | None:
    """Return the ttmfs mount whose files have this st_dev, or None.

    The kernel's list is the only proof: any user can imitate the extended attributes on a file of their own.
    """
    return next((mount for mount in ttmfs_mounts() if mount.st_dev == st_dev), None)


def is_attached(device: str) -> bool:
    """Whether a filesystem is mounted in the mount namespace of this process, or of any process that it may inspect.

    True if /proc cannot be read.
    """
    try:
        if is_listed("self", device):
            return True
        others = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return True
    seen = {os.readlink("/proc/self/ns/mnt")}
    for pid in others:
        with contextlib.suppress(OSError):  # the process ended, or belongs to another user
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in seen and is_listed(pid, device):
                return True
            seen.add(namespace)
    return False


def is_listed(pid: int | str, device: str) -> bool:
    """Whether a filesystem is mounted in the mount namespace of a process. Raises OSError."""
    number, rows = os.fsencode(device), Path(f"/proc/{pid}/mountinfo").read_bytes().split(b"\n")[:-1]
    return any(row.split(b" ", 3)[2] == number for row in rows)


def _plain(word: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), word))
