"""A store in a directory on a distributed filesystem, which another machine can take over (`store=DIR`).

The kind of store is chosen by the type of the filesystem and never by a probe: no probe sees what becomes of holes when
a replica is healed. docs/scale-out.md says what each filesystem does.

Concurrency: see :mod:`.mapped_file`. The event loop waits for the filesystem only to make, remove and rename backups.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import outcome
import trio

from ..errors import BackupBusy, BackupExists, InvalidArgument, StoreFailed, TtmfsError, from_os_error, translated
from ..linux import system_calls
from ..options import WRITE, Options, format_size
from . import page_map
from .blocking_io import FileLocks
from .directory import Directory, open_directory
from .directory_record import FILE, DirectoryRecord
from .distributed_record import DistributedRecord, map_name
from .lanes import Lanes
from .mapped_file import MappedFile
from .opened import MapCounts, Opened
from .page_map import PageMap
from .store import MOST_UNSYNCED

__all__ = ["Distributed"]

ROOM_SECONDS = 1.0
"""Maximum age of what the filesystem said about its room."""

LOOK_SECONDS = 2.0
"""The interval of looks whether the store is still this machine's."""

CLOSE_SECONDS = 10.0
"""How long the end of a mount waits until all is written."""

LOCK_TRIES, LOCK_SECONDS = 20, 0.05

T = TypeVar("T")


class Distributed(Directory):
    """A store on a distributed filesystem. No other program may use the directory meanwhile."""

    has_unnamed_files = hands_out_files = False
    _counts: MapCounts
    record_type: ClassVar[type[DirectoryRecord]] = DistributedRecord

    def __init__(self, directory: int, options: Options, record: DistributedRecord, *, temporary: str | None = None,
                 failed: Iterable[int] = ()) -> None:  # fmt: skip
        self.is_durable = options.durable == WRITE
        self._patience = options.store_timeout
        self._opened: dict[int, Opened] = {}
        self._maps: dict[int, PageMap] = {}  # also of backups whose files are not open
        self._is_clean = record.was_clean
        self._shared_record = record
        self._below = os.fstatvfs(directory)
        self._below_at, self._is_looking = time.monotonic(), False
        super().__init__(directory, options, record, temporary=temporary, failed=failed)
        self._lanes = Lanes(self.blocking_io, self._patience)
        self.page_file = MappedFile

    @classmethod
    def check(cls, path: str, directory: int, record: DirectoryRecord) -> None:
        """Nothing: the type of the filesystem says what it can do."""

    def make_counts(self) -> MapCounts:
        return MapCounts()

    @property
    def file_locks(self) -> FileLocks | None:
        return None  # the event loop looks at no file

    # --- open files ---

    def opened(self, id: int) -> Opened:
        """A backup's files. They stay open while a thread works with them. Raises BackupEnded."""
        self.files.descriptor(id)
        return self._opened[id]

    def file_was_opened(self, id: int, fd: int) -> None:
        try:
            _lock(fd)
            map_fd = self._open_map(id, fd)
        except OSError as error:
            raise from_os_error(error, "opening a backup") from error
        self._opened[id] = Opened(fd, map_fd, self._maps[id])
        self.recount(id)

    def _open_map(self, id: int, fd: int) -> int:
        """Open the map of a backup, or make one in which all pages of the file exist."""
        found, directory = os.fstat(fd), self.files.directory
        name, flags = map_name(found.st_ino), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        if self._shared_record.read_only:
            flags = flags & ~os.O_RDWR | os.O_RDONLY
        try:
            map_fd = os.open(name, flags, dir_fd=directory)
        except FileNotFoundError:
            map_fd = os.open(name, os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=directory)
            pages, past = PageMap(), found.st_size // self.page_size
            page_map.write(map_fd, pages.changed(0, past, present=True))
            pages.set(0, past, present=True)
            self._maps[id] = pages
        try:
            _lock(map_fd)
            if id not in self._maps:
                self._maps[id] = PageMap(page_map.read(map_fd), clean=self._is_clean)
        except BaseException:
            os.close(map_fd)
            raise
        return map_fd

    def close_file(self, id: int, fd: int) -> None:
        self._opened.pop(id).close()

    def new_id(self, fd: int, found: os.stat_result) -> int:
        id = super().new_id(fd, found)
        map_fd = os.open(
            map_name(found.st_ino), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600,
            dir_fd=self.files.directory,
        )  # fmt: skip
        os.close(map_fd)
        self._maps[id] = PageMap()
        return id

    def forget(self, id: int) -> None:
        opened = self._opened.get(id)
        super().forget(id)
        self._maps.pop(id, None)
        if opened:
            with contextlib.suppress(OSError):
                os.unlink(map_name(opened.stat.st_ino), dir_fd=self.files.directory)

    def change(self, id: int | None, **changes: Any) -> None:
        super().change(id, **changes)
        if id is not None:
            self.opened(id).look()

    async def move(self, id: int, directory: str) -> None:
        name, here = self.files.name_of(id), self.files.directory
        await self.sync(id)
        map_file = map_name(self.opened(id).stat.st_ino)
        there = open_directory(directory)
        try:
            self._check_target(there, directory, name)
            with translated(f"moving {name!r}"):
                os.rename(map_file, map_file, src_dir_fd=here, dst_dir_fd=there)  # first: without it all pages exist
                try:
                    os.rename(name, name, src_dir_fd=here, dst_dir_fd=there)
                except BaseException:
                    os.rename(map_file, map_file, src_dir_fd=there, dst_dir_fd=here)
                    raise
                for fd in there, here:
                    os.fsync(fd)
        finally:
            os.close(there)
        self.files.forget(id)

    def _check_target(self, there: int, directory: str, name: str) -> None:
        """Raise an error unless a directory is another store, with pages of this size, that lacks a name."""
        here = os.fstat(self.files.directory)
        if os.path.samestat(os.fstat(there), here):
            raise InvalidArgument(f"the backup lies in {directory} already")
        if os.fstat(there).st_dev != here.st_dev:
            raise InvalidArgument(f"{directory} is on another filesystem: save the backup, and load it there")
        try:
            kept = json.loads(Path(f"/proc/self/fd/{there}/{FILE}").read_text())
            fits = (kept["format"], kept["page_size"]) == (DistributedRecord.format, self.page_size)
        except (OSError, ValueError, TypeError, KeyError):
            raise InvalidArgument(f"{directory} is no store yet: mount it once") from None
        if not fits:
            raise InvalidArgument(f"{directory} is not a store with pages of {format_size(self.page_size)}")
        with contextlib.suppress(FileNotFoundError):
            os.stat(name, dir_fd=there, follow_symlinks=False)
            raise BackupExists(f"{directory} has a file {name!r}")

    # --- room ---

    def taken(self, id: int) -> int:
        return self.opened(id).map.count * self.page_size

    def _measure(self, id: int) -> tuple[os.stat_result, int]:
        opened = self.opened(id)
        return opened.stat, self._counts.of(id, opened.map.count)

    def recount(self, id: int) -> None:
        """Note that the number of a backup's pages has changed."""
        self._counts.of(id, self._maps[id].count)
        self._quota.count(id)

    @contextlib.contextmanager
    def adding(self, id: int, first: int, past: int) -> Iterator[None]:
        """Wrap storing the pages between two indices. They all count from the beginning."""
        missing = past - first - self._maps[id].counted(first, past)
        self._counts.reserve(id, missing)
        try:
            self.recount(id)
            yield
        finally:
            self._counts.reserve(id, -missing)
            if id in self._maps:
                self.recount(id)

    def _recount(self) -> None:
        """Nothing: no other program changes the files."""

    def statvfs_below(self) -> os.statvfs_result:
        """What the filesystem says about its room, of a moment ago: a thread asks it."""
        if not self._is_looking and time.monotonic() - self._below_at > ROOM_SECONDS:
            with contextlib.suppress(RuntimeError):  # outside of trio: before the mount serves
                token = trio.lowlevel.current_trio_token()
                self._is_looking = True

                trio.lowlevel.start_thread_soon(
                    partial(os.fstatvfs, self.files.directory),
                    lambda result: token.run_sync_soon(self._looked, result),
                )
        return self._below

    def _looked(self, result: "outcome.Outcome[os.statvfs_result]") -> None:
        self._is_looking, self._below_at = False, time.monotonic()
        with contextlib.suppress(OSError):
            self._below = result.unwrap()

    # --- threads ---

    def locked(self, id: int) -> AbstractAsyncContextManager[None]:
        """Lock a backup for one task and its thread."""
        return self._lanes.locked(id)

    async def in_thread(self, id: int, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work` in a thread, while the backup is locked. Raises trio.TooSlowError after a time."""
        return await self._lanes.in_thread(id, self.opened(id), work, *arguments)

    # --- durability ---

    async def sync(self, id: int | None) -> None:
        if id in self._failed:
            raise StoreFailed("syncing a backup: it failed before, so pages may be lost; copy out what is there")
        fds = [self.files.directory]
        if id is not None:
            opened = self.opened(id)
            fds = [*opened.fds, *fds]  # the data before the map that says that it is there
        try:
            with trio.fail_after(self._patience):
                await trio.to_thread.run_sync(
                    self.sync_held, fds, limiter=self.blocking_io.syncs.limiter, abandon_on_cancel=True
                )
        except trio.TooSlowError:
            raise StoreFailed("syncing a backup: the store did not answer in time (store_timeout)") from None
        except OSError as error:
            if id is not None:
                self._failed.add(id)
                self.remember(unsynced=sorted(self._failed)[:MOST_UNSYNCED])
            raise from_os_error(error, "syncing a backup") from error

    async def wait_until_lost(self) -> None:
        is_lost = False
        while not is_lost:
            await trio.sleep(LOOK_SECONDS)
            with trio.move_on_after(self._patience):  # the filesystem may answer later, and its lock be ours still
                is_lost = await trio.to_thread.run_sync(self._shared_record.is_lost, abandon_on_cancel=True)

    def sync_held(self, fds: Iterable[int]) -> None:
        """fsync(2) of files, in a thread. Raises OSError also if the store is no longer this machine's.

        A client of CephFS that was evicted, and is connected again, reports success for data that the servers refused.
        """
        for fd in fds:
            os.fsync(fd)
        if self._shared_record.is_lost():
            raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))

    def close(self, *, leave: bool = False) -> None:
        if not leave:
            closing = threading.Thread(target=self._close_whole, args=[list(self._opened.values())], daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)
        super().close(leave=leave)

    def _close_whole(self, opened: list[Opened]) -> None:
        with contextlib.suppress(OSError, TtmfsError):
            for file in opened:
                if not file.map.clean:
                    _free_absent(file, self.page_size)
                self.sync_held(file.fds)
            if all(pages.clean for pages in self._maps.values()):
                self._shared_record.note_clean()


def _free_absent(file: Opened, page_size: int) -> None:
    """Punch out all that absent pages may have in the file. Raises OSError if the filesystem punches no holes."""
    idx, past = 0, file.size // page_size
    while idx < past and (first := file.map.first_absent(idx, past)) is not None:
        idx = min(past, file.map.next(first) or past)
        system_calls.punch_hole(file.fd, first * page_size, (idx - first) * page_size)
    file.map.clean = True


def _lock(fd: int) -> None:
    """Lock a file of the store for this machine. Raises BackupBusy."""
    for _ in range(LOCK_TRIES):  # the filesystem frees the locks of a daemon that was killed a moment later
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(LOCK_SECONDS)
    raise BackupBusy("another machine, or a mount that just ends, has the backup locked")
