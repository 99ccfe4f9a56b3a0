"""What the kernel keeps of a tmpfs of our own, kept by ourselves for a directory that is not: lock, ids, budget.

::

    DIR/.ttmfs    JSON: format, page_size, grain, tag, next_id. As DIR itself locked (flock) while a mount uses DIR.
    DIR/a         a backup. Its extended attribute user.ttmfs.id is "TAG ID INODE".

An id must not be given out twice, but most filesystems use an inode number again at once. So the ids are ours, counted
up in .ttmfs, and each file carries its own. A mark counts only with the tag of this store and the inode number of this
file: a copy of a backup's file, or one moved here from another store, is marked anew.

A file of someone else's is a backup if it could be one: a regular file of whole pages with one name, not empty, that
may be read and written. Everything else in DIR is not seen, and never changed.

Concurrency: one thread.
"""

import contextlib
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import linux
from .errors import InvalidArgument, NotSupported, StoreBusy
from .options import format_size

__all__ = ["FILE", "Ledger"]

FILE = ".ttmfs"
FORMAT = 1
MARK = "user.ttmfs.id"
FIRST_ID = 2
IDS_AT_ONCE = 1024
"""So many ids are taken from the file at a time. What a daemon did not use of them is lost."""
LENGTH = 256  # of the file, always: it is written anew in its place


class _Counted(NamedTuple):
    """How many pages a file held, and its change time then."""

    pages: int
    ctime_ns: int


class Ledger:
    """The lock, the ids and the counts of the backups in one directory. Owns the descriptor of .ttmfs."""

    def __init__(self, directory: int, page_size: int, *, read_only: bool = False, fd: int | None = None) -> None:
        """Raises StoreBusy if another mount uses the directory, InvalidArgument if its pages have another size.

        With `fd`, .ttmfs as :attr:`fd` had it in a daemon before, both are locked still.
        """
        self._directory = directory
        self._page_size = page_size
        self._read_only = read_only
        self._in_memory = linux.is_tmpfs(directory)
        self._counted: dict[int, _Counted] = {}
        self._holders: dict[int, int] = {}  # inode numbers by id: a mark can be forged, or doubled by a loss of power
        self._settled = False
        self._unmarked: dict[int, int] = {}  # ids by inode number, of files that take no mark: good for this mount
        self.stored = 0  # pages, of the backups counted
        self._fd = self._open() if fd is None else fd
        try:
            kept = self._read()
            if kept["page_size"] != page_size:
                size = format_size(kept["page_size"])
                raise InvalidArgument(f"its pages are of {size}: mount it with page_size={size}")
            self._tag: str = kept["tag"]
            self._next_id = self._last_id = int(kept["next_id"])
            self.grain: int | None = kept.get("grain")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the directory."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    @property
    def fd(self) -> int:
        """The descriptor of .ttmfs. As long as it or the directory's is open somewhere, both are locked."""
        return self._fd

    # --- the file ---

    def _open(self) -> int:
        """Open and lock the file; make it, locked from the beginning, if there is none."""
        access = os.O_RDONLY if self._read_only else os.O_RDWR
        for _ in range(2):
            try:
                fd = os.open(FILE, access | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
                made = False
            except FileNotFoundError:
                if self._read_only:
                    raise InvalidArgument("there is no store in it that could be mounted read-only") from None
                fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
                made = True
            try:
                self._lock(fd)
                if made:
                    self._write(fd, next_id=FIRST_ID, tag=secrets.token_hex(8), grain=None)
                    os.fsync(fd)  # a crash must not leave it without its content
                    os.link(f"/proc/self/fd/{fd}", FILE, dst_dir_fd=self._directory, follow_symlinks=True)
                return fd
            except FileExistsError:  # another mount was quicker
                os.close(fd)
            except BaseException:
                os.close(fd)
                raise
        raise StoreBusy("the store comes and goes; is another mount just ending?")

    def _lock(self, fd: int) -> None:
        """Lock the file, and the directory lest someone removes the file."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreBusy(
                "the store is in use by another mount, or one that was unmounted with files open; "
                "findmnt -t fuse.ttmfs lists mounts, and the .config of each tells its store"
            ) from None

    def _read(self) -> dict[str, Any]:
        try:
            kept = json.loads(os.pread(self._fd, LENGTH, 0))
            if kept["format"] == FORMAT and all(isinstance(kept[key], int) for key in ("page_size", "next_id")):
                return {**kept, "tag": str(kept["tag"])}
        except (ValueError, KeyError, TypeError):
            pass
        raise NotSupported(
            f"its {FILE} is none that this version of ttmfs understands; if no other version made it, "
            "move it away: the backups stay"
        )

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
        if not found.st_size or found.st_size % self._page_size:
            return None
        access = os.R_OK if self._read_only else os.R_OK | os.W_OK
        if not os.access(name, access, dir_fd=self._directory, effective_ids=True, follow_symlinks=False):
            return None
        return self.mark(path, found.st_ino)

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
        if self._next_id == self._last_id and not self._read_only:
            self._write(self._fd, next_id=self._last_id + IDS_AT_ONCE, tag=self._tag, grain=self.grain)
            os.fsync(self._fd)  # before a backup that bears one of them can be on the disk
            self._last_id += IDS_AT_ONCE
        id, self._next_id = self._next_id, self._next_id + 1
        if self._read_only or not self._set_mark(where, id, ino):
            self._unmarked[ino] = id
        self._holders[id] = ino
        return id

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

    def pages(self, id: int, fd: int) -> int:
        """How many pages an open backup holds. They are counted anew if the file was changed by anyone else."""
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
    def changing(self, id: int, fd: int, first: int, past: int) -> Iterator[None]:
        """Around whatever makes pages between two indices of an open backup come or go."""
        if self._in_memory:
            try:
                yield
            finally:
                self.pages(id, fd)
            return
        others = self.pages(id, fd) - self._between(fd, first, past)
        try:
            yield
        finally:
            self._count(id, others + self._between(fd, first, past), os.fstat(fd).st_ctime_ns)

    def _between(self, fd: int, first: int, past: int) -> int:
        return sum(end - start for start, end in linux.page_runs(fd, self._page_size, first, past))

    def _count(self, id: int, pages: int, ctime_ns: int) -> None:
        self.stored += pages - self._counted.get(id, _Counted(0, 0)).pages
        self._counted[id] = _Counted(pages, ctime_ns)
