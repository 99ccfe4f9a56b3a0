"""A store in a directory on a distributed filesystem, which another machine can take over (`store=DIR`).

The kind of store is chosen by the type of the filesystem and never by a probe: no probe sees what becomes of holes when
a replica is healed. docs/scale-out.md says what each filesystem does.

Concurrency: see :mod:`.mapped_file`. The event loop waits for the filesystem only to make, remove and rename backups.
"""

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, TypeVar

import outcome
import trio

from ..errors import BackupBusy, NotSupported, StoreFailed, TtmfsError, from_os_error
from ..linux import system_calls
from ..linux.mountinfo import filesystem_of
from ..options import WRITE, Options
from . import page_map
from .blocking_io import FileLocks
from .directory import Directory, PageCounts
from .directory_record import DirectoryRecord
from .distributed_record import DistributedRecord, map_name
from .mapped_file import MappedFile
from .page_map import PageMap
from .store import MOST_UNSYNCED

__all__ = ["Distributed", "Opened", "is_distributed"]

ROOM_SECONDS = 1.0
"""Maximum age of what the filesystem said about its room."""

LOOK_SECONDS = 2.0
"""The interval of looks whether the store is still this machine's."""

CLOSE_SECONDS = 10.0
"""How long the end of a mount waits until all is written."""

LOCK_TRIES, LOCK_SECONDS = 20, 0.05

CEPH = {"ceph", "fuse.ceph-fuse", "fuse.ceph"}
NFS = {"nfs", "nfs4"}
REFUSED = {
    "fuse.glusterfs": "after a heal of a replica, GlusterFS shows pages that were dropped, and zeros for pages",
    "fuse.mfs": "MooseFS cannot punch holes",
    "nfs": "only NFS 4.2 can punch holes: mount it with vers=4.2",
}

T = TypeVar("T")


def is_distributed(directory: int) -> bool:
    """Whether a directory is to be such a store. Raises NotSupported where no store can be."""
    found = filesystem_of(directory)
    if found is None or found.type in CEPH:
        return found is not None
    if found.type in NFS and "vers=4.2" in found.options:
        return True
    kind = "nfs" if found.type in NFS else found.type
    if reason := REFUSED.get(kind):
        raise NotSupported(f"{reason}; use a directory on CephFS, tmpfs, ext4, xfs or btrfs")
    return False


class Opened:
    """An open backup: its file, the file of its map, the map, and its attributes."""

    def __init__(self, fd: int, map_fd: int, pages: PageMap) -> None:
        self.fd, self.map_fd, self.map = fd, map_fd, pages
        self.stat = os.fstat(fd)
        self.users = 0  # threads that work with the files
        self._changed_ns = 0
        self._size = self.stat.st_size
        self._is_closed = False

    @property
    def fds(self) -> tuple[int, int]:
        """The descriptors of the file and of its map's."""
        return self.fd, self.map_fd

    @property
    def size(self) -> int:
        """The size of the backup in bytes."""
        return self._size

    def look(self) -> None:
        """Ask the filesystem for the attributes again."""
        self.stat = os.fstat(self.fd)
        self._size = self.stat.st_size

    def changed(self) -> None:
        """Note that pages have changed just now."""
        self._changed_ns = time.time_ns()

    def present_stat(self, page_size: int) -> os.stat_result:
        """The attributes, with the room of the pages that exist."""
        stat = self.stat
        mtime, ctime = max(stat.st_mtime_ns, self._changed_ns), max(stat.st_ctime_ns, self._changed_ns)
        times = [stat.st_atime_ns, mtime, ctime]
        fields = (stat.st_mode, stat.st_ino, stat.st_dev, stat.st_nlink, stat.st_uid, stat.st_gid, self._size)
        more = {f"st_{name}time_ns": ns for name, ns in zip("amc", times, strict=True)}
        more |= {"st_blocks": self.map.count * page_size // 512, "st_blksize": stat.st_blksize}
        return os.stat_result((*fields, *(ns // 10**9 for ns in times)), more)

    def close(self) -> None:
        """Close the files, once no thread works with them."""
        self._is_closed = True
        if not self.users:
            os.close(self.fd)
            os.close(self.map_fd)

    def left(self) -> None:
        """A thread works no more with the files."""
        self.users -= 1
        if self._is_closed:
            self.close()


class _MapCounts(PageCounts):
    """The pages of all backups, and those that are just being stored."""

    def __init__(self) -> None:
        self._pages: Counter[int] = Counter()
        self._reserved: Counter[int] = Counter()
        self.total = 0

    def __contains__(self, id: int) -> bool:
        return id in self._pages

    def forget(self, id: int) -> None:
        self.total -= self._pages.pop(id, 0)
        self._reserved.pop(id, None)

    def reserve(self, id: int, pages: int) -> None:
        """Have pages count that are to be stored, or (a negative number) no more."""
        self._reserved[id] += pages

    def of(self, id: int, pages: int) -> int:
        """Count a backup that holds this many pages. Returns what counts of it."""
        now = pages + self._reserved[id]
        self.total += now - self._pages[id]
        self._pages[id] = now
        return now


class _Job:
    """Work in a thread, for a request that may not wait for its end."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.result: outcome.Outcome[Any] | None = None
        self.frees: trio.Semaphore | None = None  # the lock of the backup that nobody else frees


class Distributed(Directory):
    """A store on a distributed filesystem. No other program may use the directory meanwhile."""

    has_unnamed_files = hands_out_files = False
    _counts: _MapCounts
    record_type: ClassVar[type[DirectoryRecord]] = DistributedRecord

    def __init__(self, directory: int, options: Options, record: DistributedRecord, *, temporary: str | None = None,
                 failed: Iterable[int] = ()) -> None:  # fmt: skip
        self.is_durable = options.durable == WRITE
        self._patience = options.store_timeout
        self._opened: dict[int, Opened] = {}
        self._maps: dict[int, PageMap] = {}  # also of backups whose files are not open
        self._lanes: dict[int, trio.Semaphore] = {}
        self._working: dict[int, _Job] = {}  # with a backup's lock
        self._is_clean = record.was_clean
        self._shared_record = record
        self._below = os.fstatvfs(directory)
        self._below_at, self._is_looking = time.monotonic(), False
        super().__init__(directory, options, record, temporary=temporary, failed=failed)
        self.page_file = MappedFile

    @classmethod
    def check(cls, path: str, directory: int, record: DirectoryRecord) -> None:
        """Nothing: the type of the filesystem says what it can do."""

    def make_counts(self) -> _MapCounts:
        return _MapCounts()

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

    @contextlib.asynccontextmanager
    async def locked(self, id: int) -> AsyncIterator[None]:
        """Wait until no other task and no thread works on a backup, and lock it. Raises StoreFailed after a time."""
        lane = self._lanes.setdefault(id, trio.Semaphore(1, max_value=1))
        try:
            lane.acquire_nowait()  # a wait costs a turn of the event loop, even if it is over at once
        except trio.WouldBlock:
            try:
                with trio.fail_after(self._patience):
                    await lane.acquire()
            except trio.TooSlowError:
                raise StoreFailed("the store did not answer an earlier request in time (store_timeout)") from None
        try:
            yield
        finally:
            if job := self._working.get(id):
                job.frees = lane
            else:
                self._free(id, lane)

    def _free(self, id: int, lane: trio.Semaphore) -> None:
        lane.release()
        if lane.value and not lane.statistics().tasks_waiting:
            self._lanes.pop(id, None)

    async def in_thread(self, id: int, uid: int, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work` in a thread, while the backup is locked. Raises trio.TooSlowError after a time."""
        changes, opened, job = self.blocking_io.changes, self.opened(id), _Job()
        token = trio.lowlevel.current_trio_token()

        def ended(result: "outcome.Outcome[T]") -> None:
            changes.limiter.release_on_behalf_of(job)
            opened.left()
            if self._working.get(id) is job:
                del self._working[id]
            if job.frees:
                self._free(id, job.frees)
            job.result = result
            job.ended.set()

        with trio.fail_after(self._patience):
            async with changes.turn(uid):
                try:
                    changes.limiter.acquire_on_behalf_of_nowait(job)
                except trio.WouldBlock:
                    await changes.limiter.acquire_on_behalf_of(job)
                opened.users += 1
                self._working[id] = job
                trio.lowlevel.start_thread_soon(
                    partial(work, *arguments), lambda result: token.run_sync_soon(ended, result)
                )
                await job.ended.wait()
        assert job.result
        result: T = job.result.unwrap()
        return result

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
