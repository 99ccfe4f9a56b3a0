"""A store in a directory on a distributed filesystem, which another machine can take over (`store=DIR`).

The kind of store is chosen by the type of the filesystem and never by a probe: no probe sees what becomes of holes when
a replica is healed. docs/scale-out.md says what each filesystem does.

Concurrency: see :mod:`.mapped_file`. The event loop waits for the filesystem only to make, remove and rename backups.
"""

import contextlib
import errno
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
from .directory_record import FILE, DirectoryRecord, is_locked
from .distributed_record import DistributedRecord, is_map, map_name
from .lanes import Lanes
from .mapped_file import MappedFile
from .new_file import NewFile
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
    files_each = 2
    _counts: MapCounts
    _record: DistributedRecord
    record_type: ClassVar[type[DirectoryRecord]] = DistributedRecord

    def __init__(self, directory: int, options: Options, record: DistributedRecord, *, temporary: str | None = None,
                 failed: Iterable[int] = ()) -> None:  # fmt: skip
        self.is_durable = options.durable == WRITE
        self._patience = options.store_timeout
        self._opened: dict[int, Opened] = {}
        self._maps: dict[int, PageMap] = {}  # also of backups whose files are not open
        self._inos: dict[int, int] = {}  # inode numbers, which name the maps
        self._below = os.fstatvfs(directory)
        self._below_at, self._is_looking = time.monotonic(), False
        super().__init__(directory, options, record, temporary=temporary, failed=failed)
        self._remove_orphans()
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

    @property
    def holder(self) -> dict[str, object]:
        return {f"store_{key}": value for key, value in self._record.more().items() if key in ("host", "counter")}

    def _first_scan(self) -> None:
        """Open each backup, whose map says what it takes of the budget."""
        super()._first_scan()
        for id in self.files.ids_after(0):
            with contextlib.suppress(TtmfsError):
                self.opened(id)

    def _remove_orphans(self) -> None:
        """Remove the maps of files that are gone: a daemon was killed between the two."""
        if self._record.read_only:
            return
        with translated("reading the store"), os.scandir(self.files.directory) as entries:
            found = list(entries)
            known = {map_name(ino) for ino in (*self._inos.values(), *(entry.inode() for entry in found))}
            for entry in found:
                if is_map(entry.name) and entry.name not in known:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.name, dir_fd=self.files.directory)

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
        self._opened[id] = opened = Opened(fd, map_fd, self._maps[id])
        self._inos[id] = opened.stat.st_ino
        opened.map.cut(opened.size // self.page_size)
        self.recount(id)

    def _open_map(self, id: int, fd: int) -> int:
        """Open the map of a backup, or make one in which all pages of the file exist."""
        found, read_only = os.fstat(fd), self._record.read_only
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            map_fd = os.open(map_name(found.st_ino), flags, dir_fd=self.files.directory)
        except FileNotFoundError:
            return self._make_map(id, found)
        try:
            _lock(map_fd)
            if id not in self._maps:
                self._maps[id] = PageMap(page_map.read(map_fd), clean=self._record.was_clean)
        except BaseException:
            os.close(map_fd)
            raise
        return map_fd

    def _make_map(self, id: int, found: os.stat_result) -> int:
        """Make the map of a file that another program made. It gets its name when it is whole, and on the disk."""
        pages, past = PageMap(), found.st_size // self.page_size
        marks = pages.changed(0, past, present=True)
        pages.set(0, past, present=True)
        self._maps[id] = pages
        if self._record.read_only:  # nothing is written
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        new = NewFile(self.files.directory, unnamed=False)
        try:
            _lock(new.fd)
            page_map.write(new.fd, marks)
            os.fsync(new.fd)
            new.link(map_name(found.st_ino))
        except BaseException:
            new.discard()
            raise
        return new.fd

    def may_close(self, id: int) -> bool:
        return not self._opened[id].users

    def close_file(self, id: int, fd: int) -> None:
        self._opened.pop(id).close()

    def new_id(self, fd: int, found: os.stat_result) -> int:
        id = super().new_id(fd, found)
        flags = os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
        os.close(os.open(map_name(found.st_ino), flags, 0o600, dir_fd=self.files.directory))
        self._maps[id], self._inos[id] = PageMap(), found.st_ino
        return id

    def forget(self, id: int) -> None:
        super().forget(id)
        self._maps.pop(id, None)
        if ino := self._inos.pop(id, 0):
            with contextlib.suppress(OSError):
                os.unlink(map_name(ino), dir_fd=self.files.directory)

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
                os.link(map_file, map_file, src_dir_fd=here, dst_dir_fd=there)  # wherever the file is, its map is, too
                try:
                    os.rename(name, name, src_dir_fd=here, dst_dir_fd=there)
                except BaseException:
                    os.unlink(map_file, dir_fd=there)
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

    async def in_thread(self, id: int, opened: Opened, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work` in a thread with open files of a backup that is locked. Raises trio.TooSlowError after a time."""
        return await self._lanes.in_thread(id, opened, work, opened, *arguments)

    # --- durability ---

    async def sync(self, id: int | None) -> None:
        if id in self._failed:
            raise StoreFailed("syncing a backup: it failed before, so pages may be lost; copy out what is there")
        syncs, directory = self.blocking_io.syncs, self.files.directory
        try:
            if id is None:
                with trio.fail_after(self._patience):
                    await trio.to_thread.run_sync(
                        self.sync_held, [directory], limiter=syncs.limiter, abandon_on_cancel=True
                    )
                return
            opened = self.opened(id)
            fds = (*opened.fds, directory)  # the data before the map that says that it is there
            note = partial(self._note_failed, id)
            await self._lanes.in_thread(id, opened, self.sync_held, fds, limit=syncs, on_error=note)
        except trio.TooSlowError:
            raise StoreFailed("syncing a backup: the store did not answer in time (store_timeout)") from None
        except OSError as error:
            raise from_os_error(error, "syncing a backup") from error

    def _note_failed(self, id: int) -> None:
        """Have each later fsync(2) of a backup fail, too."""
        self._failed.add(id)
        self.remember(unsynced=sorted(self._failed)[:MOST_UNSYNCED])

    async def wait_until_lost(self) -> None:
        is_lost = False
        while not is_lost:
            await trio.sleep(LOOK_SECONDS)
            with trio.move_on_after(self._patience):  # the filesystem may answer later, and its lock be ours still
                is_lost = await trio.to_thread.run_sync(self._record.is_lost, abandon_on_cancel=True)

    def sync_held(self, fds: Iterable[int]) -> None:
        """fsync(2) of files, in a thread. Raises OSError also if the store is no longer this machine's.

        A client of CephFS that was evicted, and is connected again, reports success for data that the servers refused.
        """
        for fd in fds:
            os.fsync(fd)
        if self._record.is_lost():
            raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))

    def close(self, *, leave: bool = False) -> None:
        if not leave and self._lanes.is_idle and not self._record.read_only:
            closing = threading.Thread(target=self._close_whole, daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)
            if closing.is_alive():  # it works with the descriptors, which end with the process
                return
        super().close(leave=leave)

    def _close_whole(self) -> None:
        """Have all in the store, and note that. Not if a backup's files were closed meanwhile: they are not synced."""
        with contextlib.suppress(OSError, TtmfsError):
            for opened in self._opened.values():
                if not opened.map.is_sure:
                    page_map.rewrite(opened.map_fd, opened.map.packed())
                if not opened.map.clean:
                    _free_absent(opened, self.page_size)
                self.sync_held(opened.fds)
            if self._opened.keys() == self._maps.keys() and all(pages.clean for pages in self._maps.values()):
                self._record.note_clean()


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
        if is_locked(fd):
            return
        time.sleep(LOCK_SECONDS)
    raise BackupBusy("another machine, or a mount that just ends, has the backup locked")
