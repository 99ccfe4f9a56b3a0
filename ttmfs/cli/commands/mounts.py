"""Finds the mount or the backup at a path, without importing numpy.

A path is resolved once, and its target is kept open. The server of a mount can make the same path lead elsewhere at
any moment. So can anyone who can write to a directory on the path. Answers of a mount are checked, because anyone can
serve one.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...linux import mountinfo
from ...linux.mountinfo import Mounted
from ...quoting import quoted
from ..rescue import open_file
from .child_process import ask
from .command import CommandError, reason

if TYPE_CHECKING:
    from ...client.backup import Backup

__all__ = [
    "LONGEST_STATS", "NoSuchBackup", "Place", "backup_at", "config", "config_of", "failure", "last_refusal", "located",
    "mount_at", "new_backup", "opened", "refusal_of", "root_at", "version_of",
]  # fmt: skip

PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
LONGEST_NUMBER = 18  # digits
LONGEST_CONFIG, LONGEST_STATS = 1 << 16, 1 << 20  # bytes


class NoSuchBackup(CommandError):
    """There is nothing at a path."""


class Place(NamedTuple):
    """An open directory of a ttmfs: the path that the caller gave, the descriptor, and the mount."""

    path: str
    fd: int
    mount: Mounted

    def attribute(self, name: str) -> bytes | None:
        """The value of a user.ttmfs attribute. None if there is none of that name."""
        try:
            return os.getxattr(f"/proc/self/fd/{self.fd}", f"user.ttmfs.{name}")
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return None
            raise

    def private_attribute(self, name: str, what: str) -> bytes | None:
        """As :meth:`attribute`, of one that the daemon refuses to others. `what` it holds, for the CommandError."""
        try:
            return self.attribute(name)
        except OSError as error:
            if error.errno == errno.EPERM:
                text = f"{quoted(self.path)}: only root and the user who mounted it may see {what}"
                raise CommandError(text) from None
            raise failure(error, self.path) from None

    def find_number(self, name: str) -> int | None:
        """The value of an attribute that is a number, if it exists. CommandError if it is not a number."""
        text = self.attribute(name)
        if text is not None and not (text.isdigit() and len(text) <= LONGEST_NUMBER):
            raise CommandError(f"{quoted(self.path)} answers nonsense: user.ttmfs.{name} is {text[:LONGEST_NUMBER]!r}")
        return None if text is None else int(text)

    def number(self, name: str) -> int:
        """The value of an attribute that is a number. OSError if it does not exist."""
        if (found := self.find_number(name)) is None:
            raise OSError(errno.ENODATA, f"there is no user.ttmfs.{name}")
        return found

    @property
    def page_size(self) -> int | None:
        """The page size if this is the root of a mount."""
        return self.find_number("page_size")

    @property
    def is_backup(self) -> bool:
        """Whether it is a backup."""
        return self.attribute("pages") is not None


def mount_at(path: str) -> Mounted:
    """The mount of ttmfs at a mount point, found without touching it. CommandError if there is none."""
    found = {mount.path: mount for mount in mountinfo.mounts()}  # the topmost of several on one path
    try:
        absolute = os.path.abspath(path)
    except FileNotFoundError:
        raise CommandError(f"{quoted(path)}: your working directory has ended; leave it with cd") from None
    above, name = os.path.split(absolute)
    real = ask(path, lambda: os.path.join(os.path.realpath(above), name)).items
    links = ask(path, lambda: os.readlink(absolute) and os.path.realpath(absolute)).items
    for place in absolute, *real, *links:
        if (mount := found.get(place)) and mount.type == mountinfo.TYPE and mount.root == "/":
            return mount
    if any(mount.path in (absolute, *real, *links) for mount in mountinfo.ttmfs_mounts()):
        raise CommandError(
            f"{quoted(path)} is hidden by another mount on the same path; umount {quoted(path)} ends that"
        )
    for place in Path(next(iter(real), absolute)).parents:
        if (mount := found.get(str(place))) and mount.type == mountinfo.TYPE:
            raise CommandError(f"{quoted(path)} is in a mount of ttmfs; give the mount point, {quoted(mount.path)}")
    raise CommandError(f"{quoted(path)} is not a mount of ttmfs; ttmfs doctor shows all mounts")


@contextlib.contextmanager
def opened(name: str, directory: int | None = None, *, follow: bool = True) -> Iterator[int]:
    """A directory, opened to resolve names in it. With `follow` false a symbolic link is refused."""
    try:
        fd = os.open(name, PLACE if follow else PLACE | os.O_NOFOLLOW, dir_fd=directory)
    except NotADirectoryError:
        if _is_link(name, directory):
            raise OSError(errno.ELOOP, "it is a symbolic link; name its target") from None
        raise
    try:
        yield fd
    finally:
        os.close(fd)


def _is_link(name: str, directory: int | None) -> bool:
    try:
        return bool(os.readlink(name, dir_fd=directory))
    except OSError:
        return False


@contextlib.contextmanager
def located(path: str, *, follow: bool = True) -> Iterator[Place | None]:
    """The directory of a ttmfs at a path; None if another directory is there. OSError if it cannot be opened."""
    with opened(path.rstrip("/") or "/", follow=follow) as fd:
        mount = mountinfo.ttmfs_on(os.fstat(fd).st_dev)
        yield Place(path, fd, mount) if mount else None


@contextlib.contextmanager
def root_at(path: str) -> Iterator[Place]:
    """The root of the mount at a path. CommandError if there is none, or it cannot be opened."""
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(located(path))
            if not place or place.page_size is None:
                raise CommandError(f"{quoted(path)} is not a mount point of ttmfs; give MNT, not a backup in it")
        except OSError as error:
            raise failure(error, path) from None
        yield place


@contextlib.contextmanager
def backup_at(path: str, *, native: bool = True) -> "Iterator[Backup]":
    """The backup at a path. CommandError if there is none.

    A symbolic link is not followed, as with rm(1): a stranger can make a link to somebody else's backup.
    """
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(located(path, follow=False))
            if not place or not place.is_backup:
                raise CommandError(
                    f"{quoted(path)} is the root of a mount; name a backup in it, such as {quoted(path.rstrip('/'))}/a"
                    if place and place.page_size else f"{quoted(path)} is not in a mount of ttmfs"
                )  # fmt: skip
        except OSError as error:
            above, name = os.path.split(path)
            if error.errno == errno.ENOTDIR and name.isdecimal():
                raise CommandError(f"{quoted(path)} is a page; name the backup, {quoted(above or '..')}") from None
            if error.errno == errno.ENOENT:
                raise NoSuchBackup(f"{reason(error, path)}; ttmfs ls lists the backups") from None
            hint = "; name a backup, MNT/NAME" if error.errno == errno.ENOTDIR else ""
            raise CommandError(reason(error, path) + hint) from None
        from ...client.backup import Backup
        from ...client.directory import Directory

        yield stack.enter_context(Backup(Directory.open(f"/proc/self/fd/{place.fd}"), native=native))


@contextlib.contextmanager
def new_backup(path: str) -> Iterator[tuple[Place, str]]:
    """The root of a mount, and the name of a new backup in it. CommandError if the path has no such root."""
    above, name = os.path.split(os.path.normpath(path))
    above = above or "."
    if name[:1] == ".":
        raise CommandError(f"{quoted(path)}: names that begin with a dot are reserved")
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(located(above))
            page_size = place and place.page_size
            if page_size is None:
                with contextlib.suppress(OSError), located(path) as itself:
                    if itself and itself.page_size:
                        raise CommandError(
                            f"{quoted(path)} is the root of a mount; name a backup in it, such as {quoted(path)}/a"
                        )
                raise CommandError(f"{quoted(above)} is not a mount of ttmfs; name a backup in the root of one: MNT/a")
        except OSError as error:
            raise failure(error, above) from None
        assert place
        yield place, name


def failure(error: OSError, path: str) -> CommandError:
    """The error for a path in a mount that failed. A dead mount is ENOTCONN."""
    hint = "; ttmfs doctor says what to do" if error.errno == errno.ENOTCONN else ""
    if error.errno == errno.EACCES and _is_closed(mountinfo.mounted_above(os.path.abspath(path))):
        hint = "; without allow_other it is closed to all but the user who mounted it, root included"
    return CommandError(reason(error, path) + hint)


def _is_closed(mount: Mounted | None) -> bool:
    """Whether the kernel shows a mount only to another user, who mounted it."""
    if not mount or mount.type != mountinfo.TYPE:
        return False
    return mount.served_by != os.geteuid() and "allow_other" not in mount.options


def last_refusal(place: Place, number: int | None) -> str:
    """Why the daemon refused this process's last request with an errno; nothing if it does not tell this user."""
    try:
        with opened("." if place.page_size else "..", place.fd) as root:
            found = json.loads(Place(place.path, root, place.mount).attribute("refusals") or "[]")
            name = errno.errorcode.get(number or 0)
            own = [row["reason"] for row in found if row["pid"] == os.getpid() and row["errno"] == name]
            return str(own[-1]) if own else ""
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return ""


def refusal_of(path: str, error: Exception) -> str:
    """Why the daemon refused what this process asked last of the backup at a path; nothing if it does not tell."""
    cause = error if isinstance(error, OSError) else error.__cause__
    with contextlib.suppress(OSError, CommandError), located(os.path.dirname(os.path.normpath(path)) or ".") as root:
        if root and isinstance(cause, OSError):
            return last_refusal(root, cause.errno)
    return ""


def config(mount: int) -> dict[str, Any]:
    """What ``.config`` in the root of a mount says; empty if it cannot be read or is not valid."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open(open_file(".config", mount), "rb") as file:
            found = json.loads(file.read(LONGEST_CONFIG))
        if isinstance(found, dict):
            return found
    return {}


def version_of(mount: int) -> str:
    """The version that serves a mount, from ``.stats`` in its root; "?" if that tells none. Raises OSError."""
    with open(open_file(".stats", mount), "rb") as file:
        built = re.search(rb'ttmfs_build_info\{version="([^"]{1,40})"', file.read(LONGEST_STATS))
    return built[1].decode(errors="replace") if built else "?"


def config_of(backup: "Backup") -> dict[str, Any]:
    """What ``.config`` of a backup's mount says."""
    mount = backup.open_file("..", PLACE)
    try:
        return config(mount)
    finally:
        os.close(mount)
