"""The operations of every file and directory of a mount. By default a node refuses each of them.

A node is an object for one kind of file: the root, the mount's texts, and for each backup its directory, its pages, its
image and its link. Methods take the inode number or the file handle, which contains the page's handle. A node keeps no
state, so it can be made anew at any time.

A method that returns an `Answer` returns a coroutine only where it has to wait.

Concurrency: one thread. State is read anew after every `await`.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

from ..errors import AccessDenied, InvalidArgument, NameTooLong, NotPermitted, NotSupported, ReadOnlyEntry
from ..linux.splice import FileRange
from ..model.pool import NAME_MAX, Pool
from ..recovery.progress import Progress
from .backing_files import BackingFiles
from .inodes import READER
from .kernel_cache import LIFETIME, KernelCache
from .log_level import LogLevel
from .path_retries import PathRetries
from .permissions import Caller, may
from .recent import KnownRuns, RecentBackups
from .recent_requests import RecentRequests
from .refusals import Refusals

__all__ = ["Answer", "Attributes", "Changes", "Node", "Shared"]

MODE_CHANGE_SECONDS = 1.5
"""The kernel may use the old mode or owner of a page for this long: for LIFETIME after the answer to a truncation that
was in flight when they changed."""

T = TypeVar("T")
Answer: TypeAlias = T | Coroutine[Any, Any, T]


class Attributes(NamedTuple):
    """What stat(2) tells of a file, except its inode number. Blocks are of 512 bytes, times in ns."""

    mode: int
    nlink: int
    size: int
    blocks: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    cacheable: bool = True  # whether the kernel may keep them for LIFETIME

    @classmethod
    def of_directory(cls, found: os.stat_result, nlink: int = 2) -> "Attributes":
        """Of a directory with the mode, owner and times of a file or directory of the store."""
        return cls.of_file(found, 0, 0, stat.S_IFDIR | found.st_mode & 0o7777, nlink)

    @classmethod
    def of_file(cls, found: os.stat_result, size: int, blocks: int, mode: int = 0, nlink: int = 1) -> "Attributes":
        """Of a file with the owner and times of a file of the store, and its mode without the x bits."""
        mode, times = (
            mode or stat.S_IFREG | found.st_mode & 0o666,
            (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns),
        )
        return cls._make((mode, nlink, size, blocks, found.st_uid, found.st_gid, *times, True))


class Changes(NamedTuple):
    """What truncate(2), chmod(2), chown(2) or utimensat(2) asks for; None: unchanged."""

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None

    def owner_differs(self, now: Attributes) -> bool:
        """Whether the owner or the group is to change."""
        return self.uid not in (None, now.uid) or self.gid not in (None, now.gid)


@dataclass
class Shared:
    """What the nodes of a mount share. `progress` is State.progress.

    `backing` is None if no file is to be opened in passthrough mode. `offers_shmem`: whether backups have a ``.shmem``.
    """

    pool: Pool
    cache: KernelCache
    progress: "Callable[..., contextlib.AbstractContextManager[Progress]]"
    backing: BackingFiles | None = None
    offers_shmem: bool = True
    log_level: LogLevel = field(default_factory=LogLevel)
    recent_requests: RecentRequests = field(default_factory=RecentRequests)
    refusals: Refusals = field(default_factory=Refusals)
    retries: PathRetries = field(default_factory=PathRetries)
    runs: KnownRuns = field(default_factory=KnownRuns)
    mode_changes: RecentBackups = field(default_factory=lambda: RecentBackups(MODE_CHANGE_SECONDS))
    bulk_drops: RecentBackups = field(default_factory=lambda: RecentBackups(LIFETIME))

    def __post_init__(self) -> None:
        self.zero_page = bytes(self.pool.page_size)

    async def expire_dropped(self, backup: int, first: int, last: int, *, directory_locked: bool) -> None:
        """Tell the kernel that a range of handles was dropped. Await this before the request is answered.

        Also await it before the request's progress is forgotten. Otherwise a daemon that repeats the request would drop
        pages that were stored since.
        """
        self.bulk_drops.note(backup)
        self.cache.expire_directory(backup)
        await self.cache.expire_pages(backup, first, last, directory_locked=directory_locked)


class Node:
    """A file or directory that supports no operation."""

    __slots__ = ("id", "pool", "shared")  # the nodes of a thousand backups are kept

    def __init__(self, shared: Shared, id: int = 0) -> None:
        self.id = id  # of the backup that it belongs to; 0: the mount
        self.shared = shared
        self.pool = shared.pool

    def stat(self) -> os.stat_result:
        """Mode, owner and times: of the backup's file, or of the store's directory for the mount's own."""
        return self.pool.file(self.id).stat() if self.id else self.pool.files.stat()

    def marked_if_reader(self, fh: int, caller: Caller) -> int:
        """A new file handle, marked if the caller may not write the file. Such a caller may not sync it either.

        The kernel keeps a file locked while it is synced, so its writers wait.
        """
        found = self.stat()
        return fh if caller.uid == found.st_uid or may(found, caller, os.W_OK) else fh | READER

    def attributes(self, ino: int) -> Attributes:
        """What stat(2) tells. Raises PageDropped and BackupEnded."""
        raise NotImplementedError

    async def change(self, ino: int, wanted: Changes, caller: Caller, *, by_path: bool) -> Attributes:
        """truncate(2), chmod(2), chown(2), utimensat(2); gives the new attributes."""
        raise NotPermitted("this file is the mount's own")

    def target(self) -> bytes:
        """readlink(2)."""
        raise InvalidArgument("this is not a link")

    def open(self, ino: int, flags: int, caller: Caller) -> Answer[int]:
        """open(2): a file handle. The kernel sends O_TRUNC as a truncation of its own (see the session's INIT)."""
        raise NotPermitted("only files can be opened")

    def backing(self) -> int:
        """The number of the backing file that the kernel is to read and write; 0: it asks the daemon."""
        return 0

    def read(self, fh: int, offset: int, size: int) -> Answer[bytes] | FileRange:
        """pread(2)."""
        raise NotPermitted("only files can be read")

    def write(self, fh: int, offset: int, data: "bytes | memoryview", flags: int, caller: Caller) -> Answer[int]:
        """pwrite(2): the bytes stored, fewer than given where the page, the backup or the room ends.

        `flags` are those of open(2), and O_DSYNC for pwritev2(2) with RWF_DSYNC or RWF_SYNC. `data` is overwritten by
        the next request, so a write that waits copies it first.
        """
        raise ReadOnlyEntry("this file can only be read")

    def seek(self, ino: int, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE."""
        raise InvalidArgument("this file has no holes to look for")

    async def allocate(self, ino: int, mode: int, offset: int, length: int, caller: Caller) -> None:
        """fallocate(2)."""
        raise NotSupported("only the space of .image and .shmem can be allocated or freed")

    async def sync(self, fh: int) -> None:
        """fsync(2)."""

    def close(self, fh: int) -> None:
        """The last close(2) of a file or directory."""


def check_syncs(fh: int) -> None:
    """Raise AccessDenied for a handle that was opened by someone who may not write."""
    if fh & READER:
        raise AccessDenied("syncing a file needs the right to write it, because its writers wait meanwhile")


def check_length(name: bytes) -> None:
    """Raise NameTooLong as other filesystems do, also for a name that could not exist here."""
    if len(name) > NAME_MAX:
        raise NameTooLong(f"a name has at most {NAME_MAX} bytes")
