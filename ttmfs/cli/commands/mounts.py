"""What a path stands for, a mount of ttmfs or a backup: quick, without numpy.

A path is resolved once, and what it led to is held open: whoever serves a mount, or may write to a directory on the
way, can make the same path lead elsewhere at any moment. What a mount says is checked, as anyone may serve one.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ...linux import mountinfo
from ...linux.mountinfo import Mounted
from ...quoting import quoted
from ..rescue import open_file
from .command import CommandError, reason

if TYPE_CHECKING:
    from ...client.backup import Backup

__all__ = ["NoSuchBackup", "Place", "backup_at", "config", "located", "new_backup", "opened"]

PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
LONGEST_NUMBER = 18  # digits
LONGEST_CONFIG = 1 << 16  # bytes


class NoSuchBackup(CommandError):
    """There is nothing at a path."""


class Place(NamedTuple):
    """A directory of a ttmfs, open: `mount` is the one that it lies in, `path` what the caller calls it."""

    path: str
    fd: int
    mount: Mounted

    def attribute(self, name: str) -> bytes | None:
        """One of ttmfs' own extended attributes; None where there is none of that name."""
        try:
            return os.getxattr(f"/proc/self/fd/{self.fd}", f"user.ttmfs.{name}")
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return None
            raise

    def find_number(self, name: str) -> int | None:
        """One that is a number, if there is one. CommandError if it is anything else."""
        text = self.attribute(name)
        if text is not None and not (text.isdigit() and len(text) <= LONGEST_NUMBER):
            raise CommandError(f"{quoted(self.path)} answers nonsense: user.ttmfs.{name} is {text[:LONGEST_NUMBER]!r}")
        return None if text is None else int(text)

    def number(self, name: str) -> int:
        """One that is a number and must be there."""
        if (found := self.find_number(name)) is None:
            raise OSError(errno.ENODATA, f"there is no user.ttmfs.{name}")
        return found

    @property
    def page_size(self) -> int | None:
        """The page size, if it is the root of a mount."""
        return self.find_number("page_size")

    @property
    def is_backup(self) -> bool:
        """Whether it is a backup."""
        return self.attribute("pages") is not None


@contextlib.contextmanager
def opened(name: str, directory: int | None = None, *, follow: bool = True) -> Iterator[int]:
    """A directory, open to name what is in it. With `follow` false a symbolic link is refused."""
    try:
        fd = os.open(name, PLACE if follow else PLACE | os.O_NOFOLLOW, dir_fd=directory)
    except NotADirectoryError:
        with contextlib.suppress(OSError):
            os.readlink(name, dir_fd=directory)
            raise OSError(errno.ELOOP, "it is a symbolic link; name what it leads to") from None
        raise
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def located(path: str, *, follow: bool = True) -> Iterator[Place | None]:
    """What a path leads to, if it is a directory of a ttmfs. OSError if it is out of reach."""
    with opened(path.rstrip("/") or "/", follow=follow) as fd:
        mount = mountinfo.ttmfs_on(os.fstat(fd).st_dev)
        yield Place(path, fd, mount) if mount else None


@contextlib.contextmanager
def backup_at(path: str, *, native: bool = True) -> "Iterator[Backup]":
    """A backup, open. CommandError unless a path is one.

    A link to one is refused, as by rm(1): a stranger can make a link to a backup of somebody else's.
    """
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(located(path, follow=False))
            if not place or not place.is_backup:
                what = "the root of a mount" if place and place.page_size else "not in a mount of ttmfs"
                raise CommandError(f"{quoted(path)} is no backup: it is {what}")
        except OSError as error:
            kind = NoSuchBackup if error.errno == errno.ENOENT else CommandError
            raise kind(reason(error, path)) from None
        from ...client.backup import Backup
        from ...client.directory import Directory

        yield stack.enter_context(Backup(Directory.open(f"/proc/self/fd/{place.fd}"), native=native))


@contextlib.contextmanager
def new_backup(path: str) -> Iterator[tuple[Place, str]]:
    """The root of a mount, and the name in it of a backup to be made. CommandError unless one could be made there.

    But for the mount's own refusals.
    """
    above, name = os.path.split(os.path.normpath(path))
    above = above or "."
    if name[:1] == ".":
        raise CommandError(f"{quoted(path)}: names that begin with a dot are the mount's own")
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(located(above))
            page_size = place and place.page_size
            if page_size is None:
                with contextlib.suppress(OSError), located(path) as itself:
                    if itself and itself.page_size:
                        raise CommandError(
                            f"{quoted(path)} is the root of a mount: name a backup in it, such as {quoted(path)}/a"
                        )
                raise CommandError(
                    f"{quoted(above)} is no mount of ttmfs: backups lie in the root of one, such as MNT/a"
                )
        except OSError as error:
            hint = "; ttmfs doctor says what to do" if error.errno == errno.ENOTCONN else ""
            raise CommandError(reason(error, above) + hint) from None
        assert place
        yield place, name


def config(mount: int) -> dict[str, Any]:
    """What ``.config`` of a mount says, whose root is open; nothing if it cannot be read, or makes no sense."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open(open_file(".config", mount), "rb") as file:
            found = json.loads(file.read(LONGEST_CONFIG))
        if isinstance(found, dict):
            return found
    return {}
