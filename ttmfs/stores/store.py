"""The base class of stores, and the interface that Pool, Backup and PageFile use.

A store is a directory in which each backup is a file. The kinds of stores differ in where they keep ids and the budget
(the abstract methods), and in how they read and write pages (their :class:`PageFile`). docs/architecture.md has a
table of both.

A *page* exists if any of its range is data; :meth:`PageFile.count_pages` tells how many do. *Room* is what the budget,
the quotas, df and du count, in bytes or rounded up to pages.

Concurrency: one thread. Methods that are not async wait only for the filesystem below.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import trio

from ..errors import NoRoom, NotSupported, StoreFailed, TtmfsError, from_os_error, translated
from ..linux import system_calls
from ..linux.memory import Reserve, Swap
from ..options import Options, format_size
from .backup_files import BackupFiles
from .blocking_io import BlockingIO, FileLocks
from .page_file import PageFile
from .quota import UNBOUND, Quota

__all__ = ["STORE", "Store", "check_filesystem"]

STORE = "store"
"""The name under which a keeper holds the descriptor of the directory."""

MOST_UNSYNCED = 200
"""Ids of backups whose fsync failed that fit into the record of the mount's state."""


class Store(ABC):
    """A directory of backups' files. Owns its descriptors; :meth:`close` gives them up."""

    page_file: type[PageFile]
    """How pages of this store are read and written."""
    is_private: bool
    """Whether nobody else makes or removes files in the directory."""
    has_unnamed_files = True
    """Whether the filesystem has O_TMPFILE, and RENAME_NOREPLACE."""
    files_each = 1
    """Descriptors that an open backup takes."""
    hands_out_files = True
    """Whether a program may get a backup's file in the store: whether there is a ``.shmem``."""
    counts_changes: bool
    """Whether ttmfs counts each change of pages itself. Then it gives backups' files to no other process."""

    def __init__(self, directory: int, options: Options, failed: Iterable[int] = ()) -> None:
        """`failed` are the ids of backups with a failed fsync(2)."""
        self.page_size = options.page_size
        self.block_size = os.fstatvfs(directory).f_bsize
        """The smallest unit of data, in bytes. Pages that are larger are allocated before they are written."""
        self.in_memory = system_calls.is_tmpfs(directory)
        """Whether pages are swapped out, rather than written to a disk."""
        self.blocking_io = BlockingIO()
        self.swap = Swap()
        self.files = BackupFiles(directory, self)
        self.remember: Callable[..., object] = lambda **_: None
        """Saves values, by name, for the next daemon."""
        self.ended: Callable[[int], object] = lambda _: None
        """Called with the id of each backup that has ended."""
        self._failed = set(failed)
        self._reserve = Reserve(options.reserve) if self.in_memory else None
        self._quota = Quota(options.uid_size // options.page_size, self._measure)

    def _first_scan(self) -> None:
        """Read the directory for the first time."""
        try:
            for id in list(self.files.scan()):
                with contextlib.suppress(TtmfsError):  # a backup that cannot be opened cannot grow
                    self._quota.count(id)
        except BaseException:
            self.files.close()
            raise

    # --- the part that each kind of store implements ---

    @abstractmethod
    def ids_of(self, entries: "Iterator[os.DirEntry[str]]") -> dict[int, str]:
        """Return the names, by id, of the backups among regular files of the directory."""

    @abstractmethod
    def id_of(self, name: str, found: os.stat_result) -> int | None:
        """Return the id of a regular file by its name and stat; None if it cannot be a backup."""

    @abstractmethod
    def new_id(self, fd: int, found: os.stat_result) -> int:
        """Return the id for a new file, given its descriptor and stat."""

    @abstractmethod
    def is_backup(self, fd: int, id: int) -> bool:
        """Whether an open file is the backup of an id."""

    @abstractmethod
    def taken(self, id: int) -> int:
        """Return the bytes of room that a backup takes, as df and du show them."""

    @abstractmethod
    def room(self) -> os.statvfs_result:
        """Return size, free blocks and free inodes, within the budget."""

    @abstractmethod
    def resize(self, size: int) -> None:
        """Change the budget, in bytes. Raises InvalidArgument if more than that is stored."""

    @abstractmethod
    def descriptors(self) -> dict[str, int]:
        """Return the descriptors that the next daemon needs for the store, by the names that a keeper knows."""

    def file_mode(self, mode: int) -> int:
        """Return the mode of the file for the mode of a backup."""
        return mode

    def file_was_opened(self, id: int, fd: int) -> None:  # noqa: B027 # most kinds have nothing beside the file
        """Note that a backup's file was opened, or made."""

    def may_close(self, id: int) -> bool:
        """Whether nothing works with a backup's open file."""
        return True

    def close_file(self, id: int, fd: int) -> None:
        """Close a backup's file."""
        os.close(fd)

    def forget(self, id: int) -> None:
        """Forget a backup that was ended."""
        self._failed.discard(id)
        self._quota.forget(id)
        self.ended(id)

    async def prepare_to_create(self) -> None:  # noqa: B027 # some kinds need nothing
        """Do the work of the next :meth:`create` that could block the event loop."""

    def counting(
        self, id: int, fd: int, first: int, past: int, adding: bool
    ) -> contextlib.AbstractContextManager[None]:
        """Count a change of pages: the part of :meth:`changing` that depends on the kind."""
        return contextlib.nullcontext()

    # --- the directory and its files ---

    @property
    def directory(self) -> str | None:
        """The path of the directory; None if nobody else can reach it."""
        return None if self.is_private else os.readlink(f"/proc/self/fd/{self.files.directory}")

    @property
    def holder(self) -> dict[str, object]:
        """Which machine holds the store, and how often it was taken; empty if only this machine can reach it."""
        return {}

    @property
    def shares_files(self) -> bool:
        """Whether other processes may get a backup's file to write to: ttmfs does not have to count their changes."""
        return self.in_memory and not self.counts_changes

    @property
    def file_locks(self) -> FileLocks | None:
        """The locks of backups whose files threads change, for which the event loop waits before it looks at a file."""
        return None if self.in_memory else self.blocking_io.file_locks

    @property
    def temporary(self) -> str | None:
        """The directory to remove at the end, if there is one."""
        return None

    def create(self, name: str, size: int, mode: int, uid: int, gid: int) -> int:
        """Make the file of a new backup. Returns its id. Raises BackupExists, NoRoom and OverQuota."""
        self._quota.check_owner(uid)
        id = self.files.create(name, size, mode, uid, gid)
        self._quota.count(id)
        return id

    def change(self, id: int | None, *, mode: int | None = None, uid: int = -1, gid: int = -1,
               times: tuple[int, int] | None = None) -> None:  # fmt: skip
        """As :meth:`BackupFiles.change`. Raises OverQuota if the quota of the new owner is too small."""
        owner_changes = id is not None and uid != -1
        if owner_changes:
            self._quota.check_owner(uid, id)
        self.files.change(id, mode=mode, uid=uid, gid=gid, times=times)
        if id is not None and owner_changes:
            self._quota.count(id)

    def close(self, *, leave: bool = False) -> None:
        """Close every descriptor. Remove a temporary directory, unless (`leave`) the next daemon uses it."""
        fd = self.files.directory
        self.files.close()
        if fd >= 0:
            os.close(fd)

    async def move(self, id: int, directory: str) -> None:
        """Give a backup to another store, without copying its pages. Here the backup has ended then.

        The caller has locked the backup's file. Raises NotSupported, InvalidArgument and BackupExists.
        """
        raise NotSupported("only a store on a distributed filesystem can give a backup to another")

    # --- limits ---

    def admit(self, id: int, pages: int) -> int:
        """Return how many of `pages` more pages a backup may store. The filesystem may have less room."""
        if self._quota.is_set:
            pages = self._quota.admit(id, pages)
        return pages if not self._reserve or self._reserve.admits(pages * self.page_size) else 0

    def refusal(self, id: int) -> NoRoom:
        """Return the error for a backup that was refused another page."""
        if refusal := self._quota.refusal(id):
            return refusal
        room = self.room()
        if self._reserve and room.f_bavail * room.f_frsize >= self.page_size:
            return NoRoom(
                "the memory and swap that are left must stay free (reserve=); free memory, add swap (swapon(8)), or "
                "drop pages"
            )
        return NoRoom("the budget (size=) is used up; drop pages, or give the mount more: ttmfs resize")

    @contextlib.contextmanager
    def changing(self, id: int, first: int, past: int, fd: int = -1, *, adding: bool = False) -> Iterator[None]:
        """Wrap a change of pages between two indices of a backup, if the store `counts_changes`.

        A caller that awaits within it gives an `fd` of the backup's file that stays open. With `adding`, all these
        pages count from the beginning, so that no other request gets the same room.
        """
        fd = self.files.descriptor(id) if fd < 0 else fd
        try:
            with self.counting(id, fd, first, past, adding):
                if adding:
                    self._quota.count(id)
                yield
        finally:
            with contextlib.suppress(TtmfsError):  # another program removed the file
                self._quota.count(id)

    def _measure(self, id: int) -> tuple[os.stat_result, int]:
        return self.files.stat(id), -(-self.taken(id) // self.page_size)

    def left_for(self, uid: int) -> int:
        """Return how many more bytes the quota allows a user to store."""
        return min(UNBOUND, self._quota.left(uid) * self.page_size)

    @property
    def counts_pages_by_room(self) -> bool:
        """Whether the number of pages follows from the room that they take, so that no search is needed.

        It does not in memory if a page has several blocks: a program that has the file can store a part of a page.
        """
        return not self.in_memory or self.page_size <= self.block_size

    def headroom(self) -> int:
        """Return the bytes that can be stored without touching the memory reserve."""
        return self._reserve.headroom() if self._reserve else UNBOUND

    # --- durability ---

    async def wait_until_lost(self) -> None:
        """Wait until another machine may have the store. Where none can, that is without end."""
        await trio.sleep_forever()

    async def sync(self, id: int | None) -> None:
        """fsync(2) of a backup and of its name, or (None) of all names, in a thread.

        After a failure every later call for that backup fails, too: the kernel reports lost pages only once, but
        several callers may rely on the result.
        """
        if id in self._failed:
            raise StoreFailed("syncing a backup: it failed before, so pages may be lost; copy out what is there")
        directory = self.files.directory
        try:
            owner = os.fstat(directory if id is None else self.files.descriptor(id)).st_uid
            async with self.blocking_io.syncs.turn(owner):  # duplicate descriptors only after the wait
                fds = [directory if id is None else self.files.descriptor(id), directory]
                await trio.to_thread.run_sync(
                    _sync, [system_calls.Duplicate(fd) for fd in fds], limiter=self.blocking_io.syncs.limiter
                )
        except OSError as error:
            if id is not None:
                self._failed.add(id)
                self.remember(unsynced=sorted(self._failed)[:MOST_UNSYNCED])
            raise from_os_error(error, "syncing a backup") from error


def _sync(files: list[system_calls.Duplicate]) -> None:
    for file in files:
        os.fsync(file.fd)


def check_filesystem(directory: int, page_size: int) -> None:
    """Raise NotSupported unless "is data" means "was written" for each page of a file; NoRoom if the disk is full."""
    with translated("probing the store"):
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            os.ftruncate(fd, 1024 * page_size)
            os.pwrite(fd, b"\1", 512 * page_size)
            start, end = system_calls.next_data(fd, 0) or (0, 0)
            taken = max(end - start, os.fstat(fd).st_blocks * 512)
            if start != 512 * page_size or taken > page_size:
                raise NotSupported(
                    f"the filesystem cannot tell pages of {format_size(page_size)} apart: a byte was written at "
                    f"{512 * page_size}, data is found from {start} to {end}, and {taken} bytes of room were taken"
                )
            try:
                system_calls.punch_hole(fd, 512 * page_size, page_size)
            except OSError as error:
                raise NotSupported(f"the filesystem cannot punch holes: {error.strerror}") from error
            left = os.fstat(fd).st_blocks * 512
            if left or system_calls.next_data(fd, 0):
                raise NotSupported(f"the filesystem does not free a page that is punched out: {left} bytes stay")
        finally:
            os.close(fd)
