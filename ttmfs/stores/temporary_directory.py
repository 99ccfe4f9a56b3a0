"""Directories in memory that replace the private tmpfs of a user who may not create user namespaces.

They lie in ``$XDG_RUNTIME_DIR`` or ``/dev/shm``, and only their user can enter them. A daemon removes its directory
when the mount ends. The next mount of the same user removes the directories of killed daemons.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..options import Options
from .directory_record import FILE

__all__ = ["candidates", "remove", "store_in"]

PREFIX = "ttmfs-"
MARK = "removed-by-the-next-mount"
"""A file in each of these directories. A store=DIR of the user may have the prefix, but not this file."""


def candidates(options: Options) -> Iterator[str]:
    """Yield a new directory in each suitable place, most room first. The caller removes those it does not use."""
    for place in sorted({os.environ.get("XDG_RUNTIME_DIR") or "/dev/shm", "/dev/shm"}, key=_room, reverse=True):
        with contextlib.suppress(OSError):
            _remove_abandoned(place)
            path = tempfile.mkdtemp(prefix=PREFIX, dir=place)
            try:
                Path(path, MARK).touch()
                os.mkdir(store_in(path))
                os.chown(store_in(path), options.uid or 0, options.gid or 0)
                os.chmod(store_in(path), options.mode or 0)
            except OSError:
                remove(path)
                raise
            yield path


def store_in(path: str) -> str:
    """Return the directory for the backups. The root of the mount has its mode and owner."""
    return os.path.join(path, "store")


def remove(path: str) -> None:
    """Remove the directory with its backups, even if the mode of `store` denies access to the owner."""
    with contextlib.suppress(OSError):
        os.chmod(store_in(path), 0o700)
    shutil.rmtree(path, ignore_errors=True)


def _room(place: str) -> int:
    try:
        found = os.statvfs(place)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _remove_abandoned(place: str) -> None:
    """Remove the directories that no daemon has locked."""
    for path in Path(place).glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            if path.stat(follow_symlinks=False).st_uid == os.geteuid() and (path / MARK).exists():
                fd = os.open(path / "store" / FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(str(path))
                finally:
                    os.close(fd)
