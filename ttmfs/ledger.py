"""What the kernel keeps of a tmpfs of our own, kept by ourselves for a directory that is not: lock, ids, budget.

::

    DIR/.ttmfs    JSON: format, page_size, grain, tag, next_id. Locked (flock) as long as a mount uses DIR.
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
from .errors import InvalidArgument, NotSupported

__all__ = ["FILE", "Ledger", "page_runs"]

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

    def __init__(self, directory: int, page_size: int) -> None:
        """Raises InvalidArgument if another mount uses the directory, or its pages have another size."""
        self._directory = directory
        self._page_size = page_size
        self._in_memory = linux.is_tmpfs(directory)
        self._counted: dict[int, _Counted] = {}
        self._unmarked: dict[int, int] = {}  # ids by inode number, of files that take no mark: good for this mount
        self.stored = 0  # pages, of the backups counted
        self._fd = self._open()
        try:
            kept = self._read()
            if kept["page_size"] != page_size:
                raise InvalidArgument(
                    f"the store holds pages of {kept['page_size']} bytes: mount it with page_size={kept['page_size']}"
                )
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

    # --- the file ---

    def _open(self) -> int:
        """Open and lock the file; make it, locked from the beginning, if there is none."""
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError):
                return self._lock(os.open(FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory))
            made = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
            try:
                self._lock(made)
                self._write(made, next_id=FIRST_ID, tag=secrets.token_hex(8), grain=None)
                os.fsync(made)  # a crash must not leave it without its content
                os.link(f"/proc/self/fd/{made}", FILE, dst_dir_fd=self._directory, follow_symlinks=True)
                return made
            except FileExistsError:  # another mount was quicker
                os.close(made)
            except BaseException:
                os.close(made)
                raise
        raise InvalidArgument("the store comes and goes; is another mount just ending?")

    def _lock(self, fd: int) -> int:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise InvalidArgument("the store is in use by another mount") from None
        return fd

    def _read(self) -> dict[str, Any]:
        try:
            kept = json.loads(os.pread(self._fd, LENGTH, 0))
            if kept["format"] == FORMAT and all(isinstance(kept[key], int) for key in ("page_size", "next_id")):
                return {**kept, "tag": str(kept["tag"])}
        except (ValueError, KeyError, TypeError):
            pass
        raise NotSupported(
            f"the store's {FILE} is none that this version of ttmfs understands; if no other one made it, "
            "move it away: the backups stay"
        )

    def _write(self, fd: int, *, next_id: int, tag: str, grain: int | None) -> None:
        kept = {"format": FORMAT, "page_size": self._page_size, "grain": grain, "tag": tag, "next_id": next_id}
        os.pwrite(fd, json.dumps(kept).ljust(LENGTH - 1).encode() + b"\n", 0)

    def keep_grain(self, grain: int) -> None:
        """Keep what was found out of the filesystem, which cannot be found out again while it is full."""
        if grain != self.grain:
            self._write(self._fd, next_id=self._last_id, tag=self._tag, grain=grain)
            self.grain = grain

    # --- ids ---

    def identify(self, name: str, found: os.stat_result) -> int | None:
        """The id of a file of the directory by its name and stat; None if it is no backup, and cannot be one."""
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            return None
        path = f"/proc/self/fd/{self._directory}/{name}"  # there is no getxattrat(2) before Linux 6.13
        if (id := self._unmarked.get(found.st_ino)) or (id := self._marked(path, found.st_ino)):
            return id
        if not found.st_size or found.st_size % self._page_size:
            return None
        if not os.access(name, os.R_OK | os.W_OK, dir_fd=self._directory, effective_ids=True, follow_symlinks=False):
            return None
        return self.mark(path, found.st_ino)

    def _marked(self, where: str | int, ino: int) -> int | None:
        try:
            tag, id, of = os.getxattr(where, MARK, follow_symlinks=isinstance(where, int)).decode("ascii").split(" ")
            if tag == self._tag and int(of) == ino and FIRST_ID <= int(id) < self._last_id:
                return int(id)
        except (OSError, ValueError):
            pass
        return None

    def mark(self, where: str | int, ino: int) -> int:
        """Give a file, by path or descriptor, an id of its own. Where no mark can be set, it is good for this mount."""
        if self._next_id == self._last_id:
            self._last_id += IDS_AT_ONCE
            self._write(self._fd, next_id=self._last_id, tag=self._tag, grain=self.grain)
        id, self._next_id = self._next_id, self._next_id + 1
        try:
            os.setxattr(where, MARK, f"{self._tag} {id} {ino}".encode(), follow_symlinks=isinstance(where, int))
        except OSError:
            self._unmarked[ino] = id
        return id

    def is_marked(self, fd: int, id: int) -> bool:
        """Whether an open file is the backup of an id."""
        ino = os.fstat(fd).st_ino
        return id in (self._unmarked.get(ino), self._marked(fd, ino))

    def forget(self, id: int) -> None:
        """Leave a backup out that was ended."""
        self.stored -= self._counted.pop(id, _Counted(0, 0)).pages
        self._unmarked = {ino: known for ino, known in self._unmarked.items() if known != id}

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
        return sum(end - start for start, end in page_runs(fd, self._page_size, first, past))

    def _count(self, id: int, pages: int, ctime_ns: int) -> None:
        self.stored += pages - self._counted.get(id, _Counted(0, 0)).pages
        self._counted[id] = _Counted(pages, ctime_ns)


def page_runs(fd: int, page_size: int, first: int, past: int) -> Iterator[tuple[int, int]]:
    """The runs of pages of a file between two indices, as (first index, index past the last), ascending.

    A page is there if any of it is data.
    """
    run = (first, first)
    while run[1] < past and (found := linux.next_data(fd, run[1] * page_size)):
        start, end = max(run[1], found[0] // page_size), min(past, -(-found[1] // page_size))
        if start >= past:
            break
        if start > run[1]:  # else there was a hole within a page of several base pages
            if run[1] > run[0]:
                yield run
            run = start, end
        else:
            run = run[0], end
    if run[1] > run[0]:
        yield run
