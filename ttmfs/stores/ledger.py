"""What the kernel keeps of a tmpfs of our own, kept by ourselves for a directory that is not: lock, ids, budget.

::

    DIR/.ttmfs    JSON: format, page_size, grain, tag, next_id. Locked (flock) while a mount uses DIR; of mode 0600, so
                  that no one who may only read DIR can lock it. DIR is locked, too, if no one else holds its lock:
                  that counts if .ttmfs was removed.
    DIR/a         a backup. Its extended attribute user.ttmfs.id is "TAG ID INODE".

An id must not be given out twice, but most filesystems use an inode number again at once. So the ids are ours, counted
up in .ttmfs, and each file carries its own. A mark counts only with the tag of this store and the inode number of this
file: a copy of a backup's file, or one moved here from another store, is marked anew.

A file of someone else's is a backup if it could be one: a regular file of whole pages with one name, not empty and of
no more pages than there are handles, that may be read and written. Everything else in DIR is not seen, and never
changed.

Concurrency: one thread.
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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import InvalidArgument, NoRoom, NotSupported, StoreBusy
from ..linux import system_calls
from ..options import format_size

__all__ = ["FILE", "Ledger"]

FILE = ".ttmfs"
FORMAT = 1
MARK = "user.ttmfs.id"
FIRST_ID = 2
MAX_ID = 2**32 - 1  # what an inode number has room for
MAX_PAGES = 2**30 - 3
IDS_AT_ONCE = 1024
"""So many ids are taken from the file at a time. What a daemon did not use of them is lost."""
FEW_IDS = IDS_AT_ONCE // 2
"""When no more are left, others are taken, ahead of need."""
LENGTH = 256  # of the file, always: it is written anew in its place
_TAG = re.compile("[0-9a-f]{16}")

_AWAY = f"move {FILE} away: every backup stays, and the next mount makes another"


def _refused(reason: str) -> NotSupported:
    return NotSupported(
        f"its {FILE} is none that this version of ttmfs understands ({reason}); if no other version made it, {_AWAY}"
    )


def _is_number(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most  # True is an int, too


_RIGHT: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: _is_number(value, FORMAT, FORMAT),
    "page_size": lambda value: _is_number(value, 512, 1 << 30) and value & (value - 1) == 0,
    "grain": lambda value: value is None or _is_number(value, 1, 1 << 30),
    "tag": lambda value: isinstance(value, str) and _TAG.fullmatch(value) is not None,
    "next_id": lambda value: _is_number(value, FIRST_ID, MAX_ID + IDS_AT_ONCE),
}
"""What each value of the file must be."""


def _is_locked(fd: int) -> bool:
    """Lock an open file for this process and who shares its descriptor. Whether that was possible."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Counted(NamedTuple):
    """How many pages a file held, and its change time then."""

    pages: int
    ctime_ns: int


class Ledger:
    """The lock, the ids and the counts of the backups in one directory. Owns the descriptor of .ttmfs."""

    def __init__(self, directory: int, page_size: int, *, read_only: bool = False, fd: int | None = None) -> None:
        """Raises StoreBusy if another mount uses the directory, InvalidArgument if its pages have another size.

        With `fd`, .ttmfs as :attr:`fd` had it in a daemon before, it is locked still.
        """
        self._directory = directory
        self._page_size = page_size
        self._read_only = read_only
        self._in_memory = system_calls.is_tmpfs(directory)
        self._counted: dict[int, _Counted] = {}
        self._holders: dict[int, int] = {}  # inode numbers by id: a mark can be forged, or doubled by a loss of power
        self._settled = False
        self._taking = threading.Lock()
        self._unmarked: dict[int, int] = {}  # ids by inode number, of files that take no mark: good for this mount
        self.stored = 0  # pages, of the backups counted
        self._fd = self._open() if fd is None else fd
        try:
            kept = self._read()
            if kept["page_size"] != page_size:
                size = format_size(kept["page_size"])
                raise InvalidArgument(f"its pages are of {size}: mount it with page_size={size}")
            self._tag: str = kept["tag"]
            self._next_id: int = kept["next_id"]
            self._last_id = self._next_id
            self.grain: int | None = kept["grain"]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the directory."""
        with self._taking:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    @property
    def fd(self) -> int:
        """The descriptor of .ttmfs. As long as it is open somewhere, the store is locked."""
        return self._fd

    # --- the file ---

    def _open(self) -> int:
        """Open and lock the file; make it, locked from the beginning, if there is none."""
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
        raise StoreBusy("the store comes and goes; is another mount just ending?")

    def _open_existing(self) -> int:
        """Open the file, if it is one that only a user who may write the directory can have put there.

        It is looked at before it is opened: to open a FIFO waits, and to open a device can do anything.
        """
        file = os.open(FILE, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise NotSupported(f"its {FILE} is no regular file: {_AWAY}")
            if found.st_uid not in (0, os.geteuid(), os.fstat(self._directory).st_uid):
                raise NotSupported(
                    f"its {FILE} belongs to user {found.st_uid}, who is neither you, nor root, nor the owner of the "
                    f"directory: if you trust it, make it yours with chown(1); else {_AWAY}"
                )
            if found.st_nlink > 1:
                raise NotSupported(f"its {FILE} has another name, by which another store may use it: {_AWAY}")
            fd = os.open(f"/proc/self/fd/{file}", (os.O_RDONLY if self._read_only else os.O_RDWR) | os.O_CLOEXEC)
        finally:
            os.close(file)
        if not self._read_only and found.st_mode & 0o077:  # whoever may open it may lock it
            with contextlib.suppress(OSError):
                os.fchmod(fd, 0o600)
        return fd

    def _make(self) -> int:
        """Make the file, locked and whole before it has its name; -1 if another mount was quicker."""
        if self._read_only:
            raise InvalidArgument("there is no store in it that could be mounted read-only")
        if not self._has_locked_directory() and self._holds_marked_files():
            raise StoreBusy(
                f"its {FILE} was removed, and the directory is locked, so it may be in use by another mount: lslocks "
                "tells by which process. (Anyone who may read the directory can lock it.)"
            )
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        try:
            self._lock(fd)
            self._write(fd, next_id=FIRST_ID, tag=secrets.token_hex(8), grain=None)
            os.fsync(fd)  # a crash must not leave it without its content
            os.link(f"/proc/self/fd/{fd}", FILE, dst_dir_fd=self._directory, follow_symlinks=True)
        except FileExistsError:
            os.close(fd)
            return -1
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _lock(self, fd: int) -> None:
        """Lock the file, and if possible the directory, in case someone removes the file."""
        if not _is_locked(fd):
            raise StoreBusy(
                "the store is in use by another mount, or one that was unmounted with files open; "
                "findmnt -t fuse.ttmfs lists mounts, and the .config of each tells its store"
            )
        self._has_locked_directory()

    def _has_locked_directory(self) -> bool:
        """Lock the directory. Whoever may read it can hold that lock, so it alone keeps no one out."""
        return _is_locked(self._directory)

    def _holds_marked_files(self) -> bool:
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    path = f"/proc/self/fd/{self._directory}/{entry.name}"
                    if entry.is_file(follow_symlinks=False) and os.getxattr(path, MARK, follow_symlinks=False):
                        return True
        return False

    def _read(self) -> dict[str, Any]:
        """What the file holds. Raises NotSupported, with the reason, if this version cannot have written it."""
        try:
            kept = json.loads(os.pread(self._fd, LENGTH, 0))
        except (ValueError, RecursionError):  # also what is no text
            raise _refused("it is no JSON") from None
        if not isinstance(kept, dict):
            raise _refused("it is no JSON object")
        for key, is_right in _RIGHT.items():
            if not is_right(kept.get(key)):
                raise _refused(f"{key} is {reprlib.repr(kept.get(key))}")
        if (kept["grain"] or 0) > kept["page_size"]:
            raise _refused(f"grain is {kept['grain']}, more than a page")
        return kept

    def _write(self, fd: int, *, next_id: int, tag: str, grain: int | None) -> None:
        kept = {"format": FORMAT, "page_size": self._page_size, "grain": grain, "tag": tag, "next_id": next_id}
        os.pwrite(fd, json.dumps(kept).ljust(LENGTH - 1).encode() + b"\n", 0)

    def keep_grain(self, grain: int) -> None:
        """Keep what was found out of the filesystem, which cannot be found out again while it is full."""
        if grain != self.grain and not self._read_only:
            self._write(self._fd, next_id=self._last_id, tag=self._tag, grain=grain)
            os.fsync(self._fd)
            self.grain = grain

    # --- ids ---

    def identify(self, name: str, found: os.stat_result) -> int | None:
        """The id of a file of the directory by its name and stat; None if it is no backup, and cannot be one."""
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            return None
        path = f"/proc/self/fd/{self._directory}/{name}"  # there is no getxattrat(2) before Linux 6.13
        if (id := self._unmarked.get(found.st_ino)) or (id := self._held(path, found.st_ino)):
            return id
        pages, rest = divmod(found.st_size, self._page_size)
        if rest or not 0 < pages <= MAX_PAGES:
            return None
        access = os.R_OK if self._read_only else os.R_OK | os.W_OK
        if not os.access(name, access, dir_fd=self._directory, effective_ids=True, follow_symlinks=False):
            return None
        return self.mark(path, found.st_ino) if self._next_id <= MAX_ID else None

    def settle(self) -> None:
        """From here on no mark counts but those of files that were seen: every backup has been."""
        self._settled = True

    def _held(self, path: str, ino: int) -> int | None:
        """The id that a file is marked with, if it is no other file's."""
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
        """Give a file, by path or descriptor, an id of its own. Where no mark can be set, it is good for this mount."""
        if self._next_id > MAX_ID:
            raise NoRoom(f"all {MAX_ID} numbers for backups in this store are used up: unmount it, and {_AWAY}")
        if self._next_id == self._last_id and not self._read_only:
            self.take_ids()
        id, self._next_id = self._next_id, self._next_id + 1
        if self._read_only or not self._set_mark(where, id, ino):
            self._unmarked[ino] = id
        self._holders[id] = ino
        return id

    @property
    def ids_left(self) -> int:
        """How many ids can be given out without waiting for the disk."""
        return IDS_AT_ONCE if self._read_only else self._last_id - self._next_id

    def take_ids(self) -> None:
        """Take more ids from the file, if few are left. Waits for the disk; a thread may do it."""
        with self._taking:
            if self._fd >= 0 and self.ids_left <= FEW_IDS:
                self._write(self._fd, next_id=self._last_id + IDS_AT_ONCE, tag=self._tag, grain=self.grain)
                os.fsync(self._fd)  # before a backup that bears one of them can be on the disk
                self._last_id += IDS_AT_ONCE

    def _set_mark(self, where: str | int, id: int, ino: int) -> bool:
        try:
            os.setxattr(where, MARK, f"{self._tag} {id} {ino}".encode(), follow_symlinks=isinstance(where, int))
        except OSError:
            return False
        return True

    def is_marked(self, fd: int, id: int) -> bool:
        """Whether an open file is the backup of an id."""
        ino = os.fstat(fd).st_ino
        return self._holders.get(id) == ino and id in (self._unmarked.get(ino), self._marked(fd, ino))

    def forget(self, id: int) -> None:
        """Leave a backup out that was ended."""
        self.stored -= self._counted.pop(id, _Counted(0, 0)).pages
        if self._unmarked.get(ino := self._holders.pop(id, 0)) == id:
            del self._unmarked[ino]

    # --- counts ---

    def has_counted(self, id: int) -> bool:
        """Whether the pages of a backup were counted by this process."""
        return id in self._counted

    def pages(self, id: int, fd: int) -> int:
        """How many pages of room an open backup takes, which on a disk is the number of its pages.

        They are counted anew if the file was changed by anyone else. In memory a page stored in part takes a part.
        """
        found = os.fstat(fd)
        if self._in_memory:  # nothing but pages takes blocks there, and a mapping changes no times
            pages = -(-found.st_blocks * 512 // self._page_size)
        elif (known := self._counted.get(id)) and known.ctime_ns == found.st_ctime_ns:
            return known.pages
        else:
            pages = self._between(fd, 0, found.st_size // self._page_size)
        self._count(id, pages, found.st_ctime_ns)
        return pages

    @contextlib.contextmanager
    def changing(self, id: int, fd: int, first: int, past: int, *, adding: bool = False) -> Iterator[None]:
        """Around whatever makes pages between two indices of an open backup come or go.

        With `adding` all of them count as there meanwhile.
        """
        if self._in_memory:
            try:
                yield
            finally:
                self.pages(id, fd)
            return
        others = self.pages(id, fd) - self._between(fd, first, past)
        if adding:
            self._count(id, others + past - first, os.fstat(fd).st_ctime_ns)
        try:
            yield
        finally:
            if id in self._holders:  # else it was ended meanwhile by someone who went round us
                self._count(id, others + self._between(fd, first, past), os.fstat(fd).st_ctime_ns)

    def _between(self, fd: int, first: int, past: int) -> int:
        return sum(end - start for start, end in system_calls.page_runs(fd, self._page_size, first, past))

    def _count(self, id: int, pages: int, ctime_ns: int) -> None:
        self.stored += pages - self._counted.get(id, _Counted(0, 0)).pages
        self._counted[id] = _Counted(pages, ctime_ns)
