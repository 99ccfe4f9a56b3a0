"""A store in a directory of the user, on any filesystem that reports holes (`store=DIR`).

Its :class:`DirectoryRecord` keeps the lock and the ids. This module counts pages against the budget.

Concurrency: see :mod:`.store`.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple, Self

import trio

from ..errors import InvalidArgument, NoRoom, NotSupported, StoreBusy, TtmfsError, from_os_error, translated
from ..linux import system_calls
from ..options import Options
from . import temporary_directory
from .backup_files import Throttle
from .directory_record import FILE, DirectoryRecord
from .disk_file import DiskFile
from .store import STORE, Store, check_filesystem
from .tmpfs_file import TmpfsFile

__all__ = ["RECORD", "Directory", "PageCounts", "open_directory"]

RECORD = "ledger"
"""The name under which a keeper holds the descriptor of the directory's record."""

RECOUNT_SECONDS = 1.0
"""Maximum age of page counts after another process changes a file. (A recount takes a fiftieth of the time at most.)"""

_SUITED = "use a directory on tmpfs, ext4, xfs or btrfs, or on CephFS"

_MOST_FILES = 2**62
"""CephFS says -1 where there is no limit."""


class _Counted(NamedTuple):
    """The number of pages of a file, and its change time when they were counted."""

    pages: int
    ctime_ns: int


class PageCounts:
    """Counts the pages of open files, by the ids of their backups."""

    def __init__(self, page_size: int, *, in_memory: bool) -> None:
        self._page_size, self._in_memory = page_size, in_memory
        self._counted: dict[int, _Counted] = {}
        self.total = 0  # pages

    def __contains__(self, id: int) -> bool:
        """Whether this process has counted the pages of a backup."""
        return id in self._counted

    def forget(self, id: int) -> None:
        """Leave out a backup that was ended."""
        self.total -= self._counted.pop(id, _Counted(0, 0)).pages

    def pages(self, id: int, fd: int) -> int:
        """Return the room that an open file takes, in pages. Counts again if another program changed the file.

        In memory this counts blocks, so a page stored in part takes a part. On a disk it counts pages.
        """
        found = os.fstat(fd)
        if self._in_memory:  # only pages take blocks there, and a write by mmap(2) changes no times
            pages = -(-found.st_blocks * 512 // self._page_size)
        elif (known := self._counted.get(id)) and known.ctime_ns == found.st_ctime_ns:
            return known.pages
        else:
            pages = self._between(fd, 0, found.st_size // self._page_size)
        self._set(id, pages, found.st_ctime_ns)
        return pages

    @contextlib.contextmanager
    def changing(self, id: int, fd: int, first: int, past: int, adding: bool) -> Iterator[None]:
        """Wrap a change of pages between two indices of an open file. With `adding` they all count during it."""
        if self._in_memory:
            try:
                yield
            finally:
                self.pages(id, fd)
            return
        others = self.pages(id, fd) - self._between(fd, first, past)
        if adding:
            self._set(id, others + past - first, os.fstat(fd).st_ctime_ns)
        try:
            yield
        finally:
            if id in self._counted:  # otherwise another program removed the file
                self._set(id, others + self._between(fd, first, past), os.fstat(fd).st_ctime_ns)

    def _between(self, fd: int, first: int, past: int) -> int:
        return sum(end - start for start, end in system_calls.page_runs(fd, self._page_size, first, past))

    def _set(self, id: int, pages: int, ctime_ns: int) -> None:
        self.total += pages - self._counted.get(id, _Counted(0, 0)).pages
        self._counted[id] = _Counted(pages, ctime_ns)


class Directory(Store):
    """A store in an existing directory. No other mount may use the directory, but other programs may."""

    is_private = False
    counts_changes = True
    record_type: ClassVar[type[DirectoryRecord]] = DirectoryRecord

    def __init__(
        self,
        directory: int,
        options: Options,
        record: DirectoryRecord,
        *,
        temporary: str | None = None,
        failed: Iterable[int] = (),
    ) -> None:
        self._record, self._temporary = record, temporary
        self._budget = options.size  # bytes; 0: all that the filesystem has
        self._nr_inodes = options.nr_inodes
        self._recounts = Throttle(RECOUNT_SECONDS)
        super().__init__(directory, options, failed)
        self.page_file = TmpfsFile if self.in_memory else DiskFile
        self._counts = self.make_counts()
        self._first_scan()
        record.settle()

    @classmethod
    def open(cls, path: str, options: Options, *, temporary: str | None = None) -> Self:
        """Open an existing directory. Raises InvalidArgument, NotSupported and StoreBusy.

        `temporary` is the directory to remove with everything in it when the store is closed.
        """
        directory = open_directory(path)
        try:
            record = cls._open_record(path, directory, options, read_only=options.ro and temporary is None)
        except BaseException:
            os.close(directory)
            raise
        try:
            cls.check(path, directory, record)
            return cls(directory, options, record, temporary=temporary)
        except BaseException:
            record.close()
            os.close(directory)
            raise

    @classmethod
    def _open_record(cls, path: str, directory: int, options: Options, *, read_only: bool) -> DirectoryRecord:
        try:
            return cls.record_type(directory, options.page_size, read_only=read_only)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise NotSupported(f"store={path}: its filesystem has no O_TMPFILE; {_SUITED}") from error
            hint = {
                errno.EROFS: "; if it has backups, mount it with ro",
                errno.EACCES: "; mount as root, or as the owner of the directory",
            }.get(error.errno or 0, "")
            raise InvalidArgument(f"store={path}: {FILE} cannot be written there: {error.strerror}{hint}") from error
        except (InvalidArgument, NotSupported, StoreBusy) as error:
            raise type(error)(f"store={path}: {error}") from None

    @classmethod
    def check(cls, path: str, directory: int, record: DirectoryRecord) -> None:
        """Refuse a filesystem that cannot tell pages apart. A full one cannot be probed: it must have passed before."""
        if record.read_only:  # a read-only mount must change nothing
            return
        try:
            check_filesystem(directory, record.page_size)
            record.keep_block_size(os.fstatvfs(directory).f_bsize)
        except NoRoom:
            if record.block_size is None:
                raise
        except OSError as error:
            raise from_os_error(error, "writing to the store") from error
        except NotSupported as error:
            raise NotSupported(f"store={path}: {error}; {_SUITED}") from error.__cause__

    def make_counts(self) -> PageCounts:
        """Return what counts the pages of open files."""
        return PageCounts(self.page_size, in_memory=self.in_memory)

    # --- ids ---

    def ids_of(self, entries: "Iterator[os.DirEntry[str]]") -> dict[int, str]:
        names = {}
        for entry in entries:
            with contextlib.suppress(OSError):  # the file was removed just now, or the disk fails there
                found = os.stat(entry.name, dir_fd=self.files.directory, follow_symlinks=False)
                if id := self._record.identify(entry.name, found):
                    names[id] = entry.name
        return names

    def id_of(self, name: str, found: os.stat_result) -> int | None:
        return self._record.identify(name, found)

    def new_id(self, fd: int, found: os.stat_result) -> int:
        return self._record.mark(fd, found.st_ino)

    def is_backup(self, fd: int, id: int) -> bool:
        return self._record.is_marked(fd, id)

    def file_mode(self, mode: int) -> int:
        return mode & ~(
            stat.S_ISUID | stat.S_ISGID
        )  # other users can reach the file, so it must not be a set-id program

    def forget(self, id: int) -> None:
        super().forget(id)
        self._record.forget(id)
        self._counts.forget(id)

    async def prepare_to_create(self) -> None:
        """If no ids are left, take more from the record in a thread, as that waits for the disk."""
        if not self.in_memory and not self._record.ids_left:
            with translated("writing to the store"):
                await trio.to_thread.run_sync(self._record.take_ids, limiter=self.blocking_io.changes.limiter)

    def create(self, name: str, size: int, mode: int, uid: int, gid: int) -> int:
        if self._nr_inodes and 1 + self.files.count >= self._nr_inodes:
            raise NoRoom(
                "the number of backups (nr_inodes=) is used up; end backups, or mount with a larger nr_inodes="
            )
        return super().create(name, size, mode, uid, gid)

    # --- room ---

    def taken(self, id: int) -> int:
        fd = self.files.descriptor(id)
        with translated("counting pages"):
            return os.fstat(fd).st_blocks * 512 if self.in_memory else self._counts.pages(id, fd) * self.page_size

    def counting(
        self, id: int, fd: int, first: int, past: int, adding: bool
    ) -> contextlib.AbstractContextManager[None]:
        return self._counts.changing(id, fd, first, past, adding)

    def admit(self, id: int, pages: int) -> int:
        if self._budget:
            self._recount()
            pages = min(pages, max(0, self._budget // self.page_size - self._counts.total))
        return super().admit(id, pages)

    def _recount(self) -> None:
        """Count the pages of files that other programs changed."""
        if not self._recounts.is_due():
            return
        for id in list(self.files.scan()):
            if id in self.blocking_io.file_locks and id in self._counts:  # we are changing it: the count is right
                continue
            with (
                contextlib.suppress(TtmfsError),
                translated("counting pages"),
            ):  # an error of one file must not stop the rest
                self._counts.pages(id, self.files.descriptor(id))
        self._recounts.done()

    def room(self) -> os.statvfs_result:
        """As statvfs(3). Without a budget, everything that the filesystem has free counts as free."""
        with translated("asking for room"):
            below = self.statvfs_below()
            self._recount()
        stored, left = self._counts.total, below.f_bavail * below.f_frsize // self.page_size
        size = self._budget // self.page_size or stored + left
        free = max(0, size - stored)
        files, files_free = below.f_files, below.f_favail
        if self._nr_inodes:
            files, files_free = self._nr_inodes, max(0, self._nr_inodes - 1 - self.files.count)
        elif files_free < 0:
            files = files_free = _MOST_FILES
        return os.statvfs_result(
            (self.page_size, self.page_size, size, free, min(free, left), files, files_free, files_free,
             below.f_flag, below.f_namemax)
        )  # fmt: skip

    def statvfs_below(self) -> os.statvfs_result:
        """What the filesystem says about its room."""
        return os.fstatvfs(self.files.directory)

    def resize(self, size: int) -> None:
        self._recounts.reset()
        self._recount()
        if size < self._counts.total * self.page_size:
            raise InvalidArgument(f"the budget cannot be {size} bytes: more is stored; drop pages first")
        self._budget = size
        self.remember(size=size)

    # --- the end ---

    @property
    def temporary(self) -> str | None:
        return self._temporary

    def descriptors(self) -> dict[str, int]:
        return {STORE: self.files.directory, RECORD: self._record.fd}

    def close(self, *, leave: bool = False) -> None:
        if self._temporary is not None and not leave:
            temporary_directory.remove(self._temporary)
        self._temporary = None
        self._record.close()
        super().close(leave=leave)


def open_directory(path: str) -> int:
    """Open the directory of a store. Raises InvalidArgument."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        hint = {
            errno.ENOENT: "give an existing directory",
            errno.ENOTDIR: "give an existing directory",
            errno.ESHUTDOWN: "this machine was cut off from that filesystem: unmount that, and mount it again",
            errno.ENOTCONN: "the filesystem there is dead: unmount that, and mount it again",
        }.get(error.errno or 0, "the mounting user must be able to read and write it")
        raise InvalidArgument(f"store={path}: {error.strerror}; {hint}") from None
