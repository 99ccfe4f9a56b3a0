"""The record of a directory that is a store: a file with its lock and its ids.

::

    DIR/.ttmfs    JSON: format, page_size, grain (the filesystem's block size, once it was probed), tag, next_id.
                  A mount that uses DIR locks it (flock). Its mode is 0600, so that users who can only read DIR
                  cannot lock it. The mount also tries to lock DIR itself, in case someone removes .ttmfs.
    DIR/a         a backup. Its extended attribute user.ttmfs.id is "TAG ID INODE".

Two backups must never have the same id, but most filesystems reuse inode numbers at once. So .ttmfs counts ids, and
each file has a mark with its own. A mark is valid only with the tag of this store and the inode number of its file. So
the copy of a backup's file, or a file from another store, gets a new mark.

A file of another program counts as a backup if it is a regular file with one name, readable and writable, and holds
whole pages: at least one, at most as many as there are handles. All other files in DIR are hidden and never changed.

Concurrency: one thread; :meth:`DirectoryRecord.take_ids` may run in another.
"""

import contextlib
import fcntl
import json
import os
import re
import reprlib
import secrets
import stat
import threading
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from ..errors import InvalidArgument, NoRoom, NotSupported, StoreBusy
from ..options import format_size
from .new_file import NewFile

__all__ = ["FILE", "Checks", "DirectoryRecord", "is_locked"]

FILE = ".ttmfs"
MARK = "user.ttmfs.id"
FIRST_ID = 2
MAX_ID = 2**32 - 1  # an inode number of the mount has 32 bits for the id
MAX_PAGES = 2**30 - 3
IDS_AT_ONCE = 1024
"""Number of ids taken from the file at a time. Ids that a daemon takes but does not use are lost."""
_TAG = re.compile("[0-9a-f]{16}")

_AWAY = f"move {FILE} away: every backup stays, and the next mount makes another"


def _refused(reason: str) -> NotSupported:
    return NotSupported(
        f"this version of ttmfs cannot read its {FILE} ({reason}); if no other version made it, {_AWAY}"
    )


def _is_number(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most  # True is an int, too


Checks: TypeAlias = dict[str, Callable[[Any], bool]]

_IS_VALID: Checks = {
    "page_size": lambda value: _is_number(value, 512, 1 << 30) and value & (value - 1) == 0,
    "grain": lambda value: value is None or _is_number(value, 1, 1 << 30),
    "tag": lambda value: isinstance(value, str) and _TAG.fullmatch(value) is not None,
    "next_id": lambda value: _is_number(value, FIRST_ID, MAX_ID + IDS_AT_ONCE),
}
"""Maps each key of the file to the check of its value."""


def is_locked(fd: int) -> bool:
    """Try to lock an open file, for all processes that share its descriptor. Returns whether that succeeded."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class DirectoryRecord:
    """The lock of a directory and the ids of its backups. Owns the descriptor of .ttmfs."""

    format: ClassVar = 1
    length: ClassVar = 256
    """Bytes of the file. The size never changes, because the file is overwritten in place."""
    checks: ClassVar[Checks] = {}
    """The check of each key that only this format has."""

    def __init__(self, directory: int, page_size: int, *, read_only: bool = False, fd: int | None = None) -> None:
        """Raises StoreBusy if another mount uses the directory, InvalidArgument if its pages have another size.

        `fd` is the descriptor of .ttmfs that the previous daemon locked.
        """
        self._directory = directory
        self.page_size = page_size
        self.read_only = read_only
        self._holders: dict[int, int] = {}  # inode numbers by id. A mark can be forged, or doubled by a power failure
        self._settled = False
        self._taking = threading.Lock()
        self._unmarked: dict[int, int] = {}  # ids by inode number, of files without a mark: valid for this mount
        self.fd = self._open() if fd is None else fd
        """The descriptor of .ttmfs. The store is locked as long as any process has it open."""
        try:
            self.kept = kept = self.read(self.fd)
            if kept["page_size"] != page_size:
                size = format_size(kept["page_size"])
                raise InvalidArgument(f"its pages are of {size}: mount it with page_size={size}")
        except BaseException:
            self.close()
            raise
        self._tag: str = kept["tag"]
        self._next_id: int = kept["next_id"]
        self._last_id = self._next_id
        self.block_size: int | None = kept["grain"]
        """The block size of the filesystem; None if it never passed the probe."""

    def close(self) -> None:
        """Close the file, which unlocks the directory."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    # --- the file ---

    def _open(self) -> int:
        """Open and lock the file. If there is none, make it, already locked."""
        for _ in range(3):
            fd = -1
            try:
                fd = self._open_existing()
                self._lock(fd)
                if os.path.samestat(os.fstat(fd), os.stat(FILE, dir_fd=self._directory, follow_symlinks=False)):
                    return fd
            except FileNotFoundError:
                if fd < 0 and (fd := self._make()) >= 0:
                    return fd
            except BaseException:
                if fd >= 0:
                    os.close(fd)
                raise
            if fd >= 0:
                os.close(fd)
        raise StoreBusy("the store keeps changing; is another mount just ending?")

    def _open_existing(self) -> int:
        """Open the file, unless a user who may not write the directory could have made it.

        Checks the file before it opens it: opening a FIFO blocks, and opening a device can do anything.
        """
        file = os.open(FILE, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise NotSupported(f"its {FILE} is not a regular file: {_AWAY}")
            if found.st_uid not in (0, os.geteuid(), os.fstat(self._directory).st_uid):
                raise NotSupported(
                    f"its {FILE} belongs to user {found.st_uid}, who is neither you, nor root, nor the owner of the "
                    f"directory: if you trust it, make it yours with chown(1); else {_AWAY}"
                )
            if found.st_nlink > 1:
                raise NotSupported(f"its {FILE} has a second name (hard link), so another store may use it: {_AWAY}")
            fd = os.open(f"/proc/self/fd/{file}", (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC)
        finally:
            os.close(file)
        if not self.read_only and found.st_mode & 0o077:  # a user who can open it can lock it
            with contextlib.suppress(OSError):
                os.fchmod(fd, 0o600)
        return fd

    def _make(self) -> int:
        """Make the file, locked and complete before it gets its name. Returns -1 if another mount was faster."""
        if self.read_only:
            raise InvalidArgument("it contains no store, so it cannot be mounted read-only")
        if not is_locked(self._directory) and self._holds_marked_files():
            raise StoreBusy(
                f"its {FILE} was removed, and the directory is locked, so another mount may use it: lslocks shows "
                "the process. (Every user who can read the directory can lock it.)"
            )
        new = NewFile(self._directory)
        try:
            self._lock(new.fd)
            self.write_first(new.fd)
            new.link(FILE)
        except FileExistsError:
            new.discard()
            return -1
        except BaseException:
            new.discard()
            raise
        return new.fd

    def write_first(self, fd: int) -> None:
        """Write a new file."""
        self._write(fd, next_id=FIRST_ID, tag=secrets.token_hex(8), grain=None)

    def _lock(self, fd: int) -> None:
        """Lock the file, and if possible the directory, in case someone removes the file."""
        if not is_locked(fd):
            raise StoreBusy(
                "the store is in use by another mount, or one that was unmounted with files open; "
                "findmnt -t fuse.ttmfs lists mounts, and the .config of each tells its store"
            )
        is_locked(self._directory)  # not checked: any user who can read the directory can hold this lock

    def _holds_marked_files(self) -> bool:
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_file(follow_symlinks=False) and os.getxattr(
                        self._path(entry.name), MARK, follow_symlinks=False
                    ):
                        return True
        return False

    def read(self, fd: int) -> dict[str, Any]:
        """Read the file. Raises NotSupported, with the reason, if this version cannot have written it."""
        try:
            kept = json.loads(os.pread(fd, self.length, 0))
        except (ValueError, RecursionError):
            raise _refused("it is not JSON") from None
        if not isinstance(kept, dict):
            raise _refused("it is not a JSON object")
        if not _is_number(kept.get("format"), self.format, self.format):
            raise _refused(f"format is {reprlib.repr(kept.get('format'))}, and here {self.format} is needed")
        for key, is_valid in (_IS_VALID | self.checks).items():
            if not is_valid(kept.get(key)):
                raise _refused(f"{key} is {reprlib.repr(kept.get(key))}")
        if (kept["grain"] or 0) > kept["page_size"]:
            raise _refused(f"grain is {kept['grain']}, more than a page")
        return kept

    def _write(self, fd: int, *, next_id: int, tag: str, grain: int | None) -> None:
        kept = {"format": self.format, "page_size": self.page_size, "grain": grain, "tag": tag, "next_id": next_id}
        os.pwrite(fd, json.dumps(kept | self.more()).ljust(self.length - 1).encode() + b"\n", 0)
        os.fsync(fd)  # on the disk before the file gets its name, and before a backup gets a new id

    def more(self) -> dict[str, object]:
        """What only this format has in the file, by key."""
        return {}

    def keep_block_size(self, size: int) -> None:
        """Note that the filesystem passed the probe. While it is full, it cannot be probed again."""
        size = min(size, self.page_size)
        if size != self.block_size:
            self._write(self.fd, next_id=self._last_id, tag=self._tag, grain=size)
            self.block_size = size

    # --- ids ---

    def identify(self, name: str, found: os.stat_result) -> int | None:
        """Return the id of a file in the directory by its name and stat; None if it cannot be a backup."""
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            return None
        path = self._path(name)
        if (id := self._unmarked.get(found.st_ino)) or (id := self._held(path, found.st_ino)):
            return id
        pages, rest = divmod(found.st_size, self.page_size)
        if rest or not 0 < pages <= MAX_PAGES:
            return None
        access = os.R_OK if self.read_only else os.R_OK | os.W_OK
        if not os.access(name, access, dir_fd=self._directory, effective_ids=True, follow_symlinks=False):
            return None
        return self.mark(path, found.st_ino) if self._next_id <= MAX_ID else None

    def _path(self, name: str) -> str:
        return f"/proc/self/fd/{self._directory}/{name}"  # there is no getxattrat(2) before Linux 6.13

    def settle(self) -> None:
        """Note that all files were seen. From now on, marks of other files are invalid."""
        self._settled = True

    def _held(self, path: str, ino: int) -> int | None:
        """Return the id in the mark of a file, unless another file has it."""
        if (id := self._marked(path, ino)) and not self._settled:
            self._holders.setdefault(id, ino)
        return id if id and self._holders.get(id) == ino else None

    def _marked(self, where: str | int, ino: int) -> int | None:
        try:
            tag, id, of = os.getxattr(where, MARK, follow_symlinks=isinstance(where, int)).decode("ascii").split(" ")
            if tag == self._tag and int(of) == ino and FIRST_ID <= int(id) < self._next_id:
                return int(id)
        except (OSError, ValueError):
            pass
        return None

    def mark(self, where: str | int, ino: int) -> int:
        """Give a file (a path or descriptor) an id. If the file cannot be marked, the id is valid for this mount."""
        if self._next_id > MAX_ID:
            raise NoRoom(f"all {MAX_ID} numbers for backups in this store are used up: unmount it, and {_AWAY}")
        if not self.ids_left:
            self.take_ids()
        id, self._next_id = self._next_id, self._next_id + 1
        try:
            if self.read_only:
                raise PermissionError
            os.setxattr(where, MARK, f"{self._tag} {id} {ino}".encode(), follow_symlinks=isinstance(where, int))
        except OSError:
            self._unmarked[ino] = id
        self._holders[id] = ino
        return id

    @property
    def ids_left(self) -> int:
        """The number of ids that are available without waiting for the disk."""
        return IDS_AT_ONCE if self.read_only else self._last_id - self._next_id

    def take_ids(self) -> None:
        """Take more ids from the file, if none is left. Waits for the disk."""
        with self._taking:
            if not self.ids_left:
                self._write(self.fd, next_id=self._last_id + IDS_AT_ONCE, tag=self._tag, grain=self.block_size)
                self._last_id += IDS_AT_ONCE

    def is_marked(self, fd: int, id: int) -> bool:
        """Whether an open file is the backup of an id."""
        ino = os.fstat(fd).st_ino
        return self._holders.get(id) == ino and id in (self._unmarked.get(ino), self._marked(fd, ino))

    def forget(self, id: int) -> None:
        """Leave out a backup that was ended."""
        if self._unmarked.get(ino := self._holders.pop(id, 0)) == id:
            del self._unmarked[ino]
