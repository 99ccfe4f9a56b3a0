"""The backups of one store by name, and the room for them.

Concurrency: one thread. No method awaits between its checks and its changes, so each method is atomic.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import trio

from ..errors import BackupAbsent, BackupBusy, BackupEnded, BackupNotEmpty, InvalidArgument, NameTooLong
from ..linux import memory
from ..options import TABLE, OptionError, Options, unknown
from ..stores import make_store
from ..stores.page_file import PageFile
from ..stores.store import Store
from .backup import Backup

__all__ = ["NAME_MAX", "Pool", "Room", "bytes_avail", "open_pool"]

bytes_avail = memory.bytes_avail

NAME_MAX = 255

FILES_KEPT = 1024
"""Number of PageFile objects that the pool caches. They hold only the id. Making one takes as long as one SEEK_DATA."""

NAMES_WAIT_SECONDS = 0.5
"""How long renaming or removing a backup waits for a change of its pages to end."""


@dataclass(frozen=True)
class Room:
    """What a pool holds and can still take, at one moment. In bytes, except the counts."""

    size: int  # the budget
    stored: int
    available: int  # the least of what the budget, the memory reserve and the user's quota leave
    backups: int  # count
    files: int  # count; all inodes of the store, as in nr_inodes; 0: no limit
    files_free: int  # count

    @property
    def free(self) -> int:
        """Bytes of the budget that are not used."""
        return self.size - self.stored


class Pool:
    """Backups by name. :func:`open_pool` makes one for a program; each mount has one, too.

    A mount also uses these parts of the store: `files` (names, ids, attributes), `blocking_io` (limits on blocking I/O)
    and `swap` (whether swap is in use).
    """

    def __init__(self, store: Store, options: Options, backup_size: int = 0) -> None:
        self.page_size = options.page_size
        self.store = store
        """The store, for the code that hands it over to the next daemon."""
        self.files, self.blocking_io, self.swap = store.files, store.blocking_io, store.swap
        self.in_memory = store.in_memory
        self.counts_pages_by_room = store.counts_pages_by_room
        self.change, self.sync = store.change, store.sync
        asked = backup_size or options.backup_size
        self.backup_size = asked or self.whole_pages(store.room().f_blocks * self.page_size)
        self.file: Callable[[int], PageFile] = lru_cache(FILES_KEPT)(partial(store.page_file, store))
        """Returns the file of a backup by id. It does not check that the backup exists; the first use does."""

    # --- backups ---

    async def create(self, name: str, size: int | None = None, *, mode: int = 0o755, uid: int | None = None,
                     gid: int | None = None) -> Backup:  # fmt: skip
        """Make an empty backup of `size` bytes (default: the pool's backup_size). ``ttm_backup_shmem_create()``.

        The size is rounded up to whole pages. An empty backup takes no memory. Raises BackupExists, NoRoom (too many
        backups), InvalidArgument (size, or a name that is empty, begins with a dot or has a slash) and NameTooLong.
        """
        _check_name(name)
        size = self.backup_size if size is None else self.whole_pages(size)
        uid, gid = os.geteuid() if uid is None else uid, os.getegid() if gid is None else gid
        await self.store.prepare_to_create()
        return self._backup(self.store.create(name, size, mode, uid, gid))

    async def open(self, name: str) -> Backup:
        """Return the backup with a name. Raises BackupAbsent."""
        return self._backup(self.files.find(name))

    def _backup(self, id: int) -> Backup:
        return Backup(self.file(id), self.files)

    async def names(self) -> list[str]:
        """Return the names of all backups, oldest first."""
        return [self.files.name_of(id) for id in self.files.scan()]

    async def rename(self, old: str, new: str, *, replace: bool = False) -> None:
        """Give a backup another name. With `replace`, end an empty backup that has it, as rename(2) does.

        Raises BackupAbsent, BackupExists, BackupNotEmpty, InvalidArgument and NameTooLong.
        """
        _check_name(new)
        id, replaced = self.files.find(old), None
        with contextlib.suppress(BackupAbsent):
            replaced = self.files.find(new)
        async with self._locked_soon(id, replaced):
            with contextlib.suppress(BackupAbsent):
                if replace and (now := self.files.find(new)) != id:
                    self._check_empty(now, new)
            self.files.rename(id, new, replace=replace)

    async def remove(self, name: str) -> None:
        """End a backup that holds no pages. Raises BackupNotEmpty and BackupAbsent."""
        id = self.files.find(name)
        async with self._locked_soon(id):
            self._check_empty(id, name)
            self.files.remove(id)

    @contextlib.asynccontextmanager
    async def _locked_soon(self, *ids: int | None) -> AsyncIterator[None]:
        """Lock the files of one or two backups before their names change. Raises BackupBusy if that takes long.

        Until the daemon answers, the kernel blocks every other lookup and change of names in the mount.
        """
        async with contextlib.AsyncExitStack() as locks:
            with trio.move_on_after(NAMES_WAIT_SECONDS) as waiting:
                for id in sorted({id for id in ids if id is not None}):  # always in the same order, against deadlocks
                    await locks.enter_async_context(self.file(id).locked())
            if waiting.cancelled_caught:
                raise BackupBusy("the backup is being written to, and the disk is slow")
            yield

    def whole_pages(self, size: int) -> int:
        """Round a size in bytes up to whole pages. Raises InvalidArgument if it is not a size."""
        if not isinstance(size, int) or not 0 < size <= 2**62:
            raise InvalidArgument(f"a size is a positive number of bytes, not {size!r}")
        return -(-size // self.page_size) * self.page_size

    def _check_empty(self, id: int, name: str) -> None:
        if not self.file(id).is_empty:
            raise BackupNotEmpty(f"the backup {name!r} holds pages; ttmfs fini ends it with them")

    # --- room ---

    def room(self, uid: int = 0) -> Room:
        """Return what is stored and what can be stored now. `uid` is the user of the field `available`."""
        kept = self.store.room()
        size, free = kept.f_blocks * kept.f_frsize, kept.f_bfree * kept.f_frsize
        return Room(
            size=size,
            stored=size - free,
            available=min(kept.f_bavail * kept.f_frsize, self.store.headroom(), self.store.left_for(uid)),
            backups=self.files.count,
            files=kept.f_files,
            files_free=kept.f_ffree,
        )

    async def count_pages(self) -> int:
        """Count the pages of all backups, in time slices."""
        if self.counts_pages_by_room:
            return self.room().stored // self.page_size
        pages = 0
        for id in self.files.ids_after(0):
            with contextlib.suppress(BackupEnded):  # ended during the count
                pages += await self.file(id).count_pages()
        return pages

    def resize(self, size: int) -> None:
        """Change the budget, in bytes. Raises InvalidArgument if more than that is stored."""
        self.store.resize(self.whole_pages(size))

    def close(self, *, leave: bool = False) -> None:
        """Close the store. That releases every page of a private tmpfs, unless another process has it open."""
        self.store.close(leave=leave)


@contextlib.asynccontextmanager
async def open_pool(**options: Any) -> AsyncIterator[Pool]:
    """Open a pool on a private tmpfs, or (``store=``) in a directory. The context closes it.

    `options` are those of ``ttmfs mount``, by name (``ttmfs mount --help``). Sizes (size, backup_size, page_size,
    reserve) are in bytes; store is a path. Raises InvalidArgument, NotSupported and StoreBusy.

    >>> async with ttmfs.open_pool(size=1 << 30) as pool:
    ...     backup = await pool.create("a", size=64 << 20)
    ...     handle = await backup.backup_page(page, 0)
    """
    try:
        for name in options:
            if name not in TABLE:
                raise unknown(name, TABLE)
        checked = Options(**options)
    except OptionError as error:
        raise InvalidArgument(str(error)) from None
    pool = Pool(make_store(checked), checked)
    try:
        yield pool
    finally:
        pool.close()


def _check_name(name: str) -> None:
    if not name or name[0] == "." or "/" in name or "\0" in name:
        raise InvalidArgument(f"{name!r} cannot name a backup: it is empty, begins with a dot or has a slash")
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{name!r} cannot name a backup: {error.reason}") from None
    if length > NAME_MAX:
        raise NameTooLong(f"a backup's name has at most {NAME_MAX} bytes")
