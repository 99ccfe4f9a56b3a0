"""Backups of a mount, for programs: the verbs, synchronously, on what ``mkdir`` made there.

::

    with Backup.create("/mnt/ttm/a", size=1 << 30) as backup:
        handles = backup.backup_pages(pages, 0)     # (n, page_size) of uint8
        backup.copy_pages(pages, handles)
        backup.drop_pages(handles)
        backup.fini()

Two ways lead to the pages, with the same results. *Natively* system calls are made on the backup's own file, at the
speed of a tmpfs, whose file it is. Its descriptor comes from the daemon (see ``ttmfs.daemon.descriptor_socket``), for
whom the mode bits let read, write and reach the backup, or through ``.shmem``. Else requests go through the mount:
``.image`` for runs of pages, page files, ``user.ttmfs.drop``. :attr:`Backup.is_native` tells which. Storing natively
asks the budget alone, not ``reserve=``.

Everything may be called from several threads. Nothing here needs trio, or knows of the server.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import json
import mmap
import os
import socket
import stat
import struct
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np

from ..errors import (
    ERRNO,
    BackupAbsent,
    BackupClosed,
    BackupEnded,
    BackupNotEmpty,
    InvalidArgument,
    NoRoom,
    NotPermitted,
    NotSupported,
    PageAbsent,
    StoreFailed,
    TtmfsError,
)
from ..fuse.inodes import MAX_HANDLE, ROOT
from ..handles import Uint64Array, format_ranges, page_name, parse_ranges
from ..linux import system_calls
from ..linux.memory import Swap
from ..linux.mountinfo import ttmfs_on
from ..model import arguments
from ..options import BASE_PAGE_SIZE
from .page_array import PageArray, shrink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from ..model.arguments import PageBuffer

__all__ = ["Backup", "PageArray", "Residency", "shrink"]

PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
"""How directories are opened: to name what is in them, whatever is done to their paths."""

REQUEST = 1 << 20
"""Bytes that one request through the mount carries at most, out of as many pages of memory as that is."""

STEP = 16 << 20
"""Bytes that are stored or copied by one system call on the backup's file."""

PARALLEL = 8 << 20
"""Bytes from which on copying is shared among threads: reading takes no lock of the file, as writing does."""

FEW = 4
"""Pages of a run that are copied one by one through their files, which tell by themselves that they are not there."""

LOOKS = 10
"""To look for a page takes so many times as long as to pass one on the way to the end of its run, which can be far."""

LOOK_SECONDS = 0.02
"""How often a wait that may be ended is looked at."""

ANSWER_SECONDS = 2.0

LONGEST_NUMBER = 18
"""Digits."""

T = TypeVar("T")


@dataclass(frozen=True)
class Residency:
    """Where the pages of a backup, or of a part of it, are. Counts of pages.

    One that is in both places counts by its parts, `swapped` rounded up.
    """

    pages: int
    resident: int
    swapped: int


class Backup:
    """A backup of a mount, open. Make it with :meth:`create` or :meth:`open`; it is a context manager that closes it.

    Counts are pages, indices begin at 0. Every method raises BackupEnded once the backup was ended, by whomever, and
    BackupClosed once it was closed here, which leaves its pages; StoreFailed if the mount or its store fails;
    NotPermitted for want of a right.
    """

    def __init__(self, directory: int, mount: int, *, native: bool) -> None:
        """By descriptors of its directory and of the mount's root, each a PLACE, which are its own from then on."""
        self._directory, self._mount = directory, mount
        self._files: dict[int, int] = {}  # .image, by how it was opened
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._native = -1
        self._swap = Swap()
        self._ended = False
        found = os.fstat(directory)
        self.id = found.st_ino
        """The inode number of its directory, which no other backup of the mount ever has."""
        served = ttmfs_on(found.st_dev)
        if served is None or found.st_ino == ROOT:
            where = "the root of a mount" if served else "in no mount"
            raise InvalidArgument(f"{os.readlink(self._place)} is no backup: it is {where} of ttmfs")
        if os.fstat(mount).st_dev != found.st_dev:
            raise InvalidArgument(f"another mount lies over that of {os.readlink(self._place)}")
        with _translated("asking for the page size"):
            self.page_size = _number(f"/proc/self/fd/{mount}", "page_size")
        if self.page_size < BASE_PAGE_SIZE or self.page_size & self.page_size - 1:
            raise StoreFailed(f"the mount answers nonsense: pages of {self.page_size} bytes")
        if native and served.served_by in (0, os.geteuid()):  # another could give us any file to write to
            self._native = _descriptor(mount, directory, self.id)

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], size: int | None = None, *, mode: int = 0o777, native: bool = True
    ) -> Self:
        """Make an empty backup of `size` bytes (default: the mount's ``backup_size=``), and open it.

        ``ttm_backup_shmem_create()``. The size is rounded up to whole pages and takes no memory. `mode` are its mode
        bits, less the umask. Raises BackupExists, NoRoom and InvalidArgument.
        """
        above, name = os.path.split(os.path.normpath(path))
        with _translated(f"making {os.fspath(path)}"), contextlib.ExitStack() as undo:
            mount = os.open(above or ".", PLACE)
            undo.callback(os.close, mount)
            if ttmfs_on(os.fstat(mount).st_dev) is None:
                raise InvalidArgument(f"{above or '.'} is no mount of ttmfs: backups lie in the root of one")
            os.mkdir(name, mode | stat.S_IWUSR, dir_fd=mount)  # as long as it takes to give it its size
            undo.callback(_remove, name, mount)
            directory = os.open(name, PLACE | os.O_NOFOLLOW, dir_fd=mount)
            undo.callback(os.close, directory)
            backup = cls(directory, mount, native=native)
            if backup.is_native:
                undo.callback(os.close, backup.fileno())
            if size is not None:
                backup.resize(size)
            if not mode & stat.S_IWUSR:
                os.chmod(backup._place, stat.S_IMODE(os.fstat(directory).st_mode) & ~stat.S_IWUSR)
            undo.pop_all()
        return backup

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, native: bool = True) -> Self:
        """Open a backup that there is. With `native` false every call goes through the mount. Raises BackupAbsent."""
        with _translated(f"opening {os.fspath(path)}", absent=BackupAbsent), contextlib.ExitStack() as undo:
            directory = os.open(path, PLACE)
            undo.callback(os.close, directory)
            mount = os.open("..", PLACE, dir_fd=directory)
            undo.callback(os.close, mount)
            backup = cls(directory, mount, native=native)
            undo.pop_all()
        return backup

    def close(self) -> None:
        """Let go of the backup, which stays. Not to be called while another thread works with it."""
        if self._threads:
            self._threads.shutdown()
        for fd in (*self._files.values(), self._native, self._directory, self._mount):
            if fd >= 0:
                os.close(fd)
        self._files.clear()
        self._native = self._directory = self._mount = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Backup {self.id}{' (closed)' * (self._directory < 0)}>"

    # --- the six verbs, and their plural forms ---

    def backup_page(self, page: PageBuffer, idx: int, writeback: bool = False) -> int:
        """Copy a page into the backup and give its handle, which is ``idx + 1``. ``ttm_backup_backup_page()``.

        `page` is any contiguous buffer of page_size bytes, the caller's again on return. A page that is there is
        overwritten. `writeback` asks that it be pushed to swap now; best effort. Raises InvalidArgument and NoRoom.
        """
        data, handle = arguments.page(page, self.page_size), arguments.handle_of(idx)
        self._check_index(idx, 1)
        self._store(idx, data, writeback)
        return handle

    def backup_pages(self, pages: NDArray[np.uint8], idx: int, writeback: bool = False) -> Uint64Array:
        """Back up an array of shape (n, page_size), dtype uint8, at n indices from `idx` on; gives their handles.

        If room ends part way, the handles of the pages that were stored; NoRoom if none was.
        """
        data, first = arguments.pages(pages, self.page_size), arguments.handle_of(idx)
        self._check_index(idx, len(pages))
        stored = self._store(idx, data, writeback) if len(data) else 0
        return np.arange(first, first + stored, dtype=np.uint64)

    def copy_page(self, dst: PageBuffer, handle: int, intr: threading.Event | None = None) -> None:
        """Copy a page back into `dst`, a writable buffer of page_size bytes. ``ttm_backup_copy_page()``.

        The page stays. InterruptedError if `intr` is set by then or while the page is waited for (a signal handler may
        set it, or raise: its exception comes out then); nothing is lost, and it can be repeated. Raises PageAbsent.
        """
        data, idx = arguments.destination(dst, self.page_size), arguments.index_of(handle)
        self._check_index(idx, 1)
        self._copy(data, [(idx, idx + 1)], intr)

    def copy_pages(self, dst: NDArray[np.uint8], handles: Uint64Array, intr: threading.Event | None = None) -> None:
        """Copy pages back into the rows of `dst`, of shape (n, page_size), dtype uint8, by n handles, dtype uint64.

        Raises PageAbsent if any of them holds nothing, and InterruptedError as :meth:`copy_page` does; `dst` may have
        been written to in part by then.
        """
        data, runs = arguments.rows(dst, len(handles), self.page_size), arguments.runs(handles)
        for first, past in runs:
            self._check_index(first, past - first)
        self._copy(data, runs, intr)

    def drop(self, handle: int) -> None:
        """Release a page; its memory is the system's again on return. Nothing happens if the handle holds none."""
        idx = arguments.index_of(handle)
        self._check_index(idx, 1)
        self._drop([(idx, idx + 1)])

    def drop_pages(self, handles: Uint64Array) -> None:
        """Release the pages of an array of handles, dtype uint64, as :meth:`drop` does."""
        runs = arguments.runs(handles)
        for first, past in runs:
            self._check_index(first, past - first)
        self._drop(runs)

    def fini(self) -> None:
        """End the backup and release every page that is left. ``ttm_backup_fini()``. Closes it, too."""
        path = self.path
        with _translated("ending the backup"):
            for _ in range(3):  # another may store pages meanwhile
                os.ftruncate(self._image(os.O_WRONLY), 0)
                try:
                    os.rmdir(os.path.basename(path), dir_fd=self._mount)
                    break
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise
            else:
                raise BackupNotEmpty(f"{path} is being written to")
        self._ended = True
        self.close()

    # --- what it holds ---

    @property
    def path(self) -> str:
        """Where it is, as of now: it may have been renamed."""
        above, name = os.path.split(os.readlink(self._place))
        with contextlib.suppress(OSError):
            if os.stat(name, dir_fd=self._mount, follow_symlinks=False).st_ino == self.id:
                return os.path.join(above, name)
        # The kernel may have dropped the name that it was opened by, as it does with all when modes change.
        with contextlib.suppress(OSError), os.scandir(f"/proc/self/fd/{self._mount}") as entries:
            for entry in entries:
                if entry.inode() == self.id:
                    return os.path.join(above, entry.name)
        raise BackupEnded("the backup was ended")

    def open_file(self, name: str, flags: int) -> int:
        """A new descriptor of a file of the backup, ``.image`` or a page: the caller's. OSError as of open(2)."""
        self._check_open()
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)

    def fileno(self) -> int:
        """The descriptor of its own file, which stays the backup's. Raises NotSupported unless it :attr:`is_native`."""
        self._check_open()
        if not self.is_native:
            raise NotSupported("the backup's own file is not open here")
        return self._native

    @property
    def is_native(self) -> bool:
        """Whether its file itself is open here, so that no request goes through the mount."""
        return self._native >= 0

    @property
    def size(self) -> int:
        """Bytes that it spans, stored or not."""
        with _translated("looking at the backup"):
            if not self.is_native:
                return _number(self._place, "size")
            found = os.fstat(self._native)
        if not found.st_nlink:
            raise BackupEnded("the backup was ended")
        return found.st_size

    def status(self) -> os.stat_result:
        """What stat(2) tells of its directory, whatever has become of its path."""
        with _translated("looking at the backup"):
            self._check_open()
            return os.fstat(self._directory)

    def chmod(self, mode: int) -> None:
        """Change its mode bits, whatever has become of its path."""
        with _translated("changing the mode"):
            os.chmod(self._place, mode)

    def resize(self, size: int) -> None:
        """Change the bytes that it spans, rounded up to whole pages: to less only over pages that do not exist."""
        if not isinstance(size, int) or size <= 0:
            raise InvalidArgument(f"a size is a positive number of bytes, not {size!r}")
        with _translated("changing the size"):
            os.setxattr(self._place, "user.ttmfs.size", str(-(-size // self.page_size) * self.page_size).encode())

    def handles(self) -> Uint64Array:
        """The handles of all pages stored, ascending, dtype uint64."""
        found = [np.arange(first + 1, past + 1, dtype=np.uint64) for first, past in self.runs()]
        return np.concatenate(found) if found else np.empty(0, np.uint64)

    def runs(self) -> Iterator[tuple[int, int]]:
        """The runs of the pages stored, as (first index, index past the last), ascending."""
        with _translated("listing pages"):
            if self.is_native:
                yield from system_calls.page_runs(self._native, self.page_size, 0, self._limit())
                return
            try:
                yield from self._runs_told()
            except ValueError:  # of whoever serves the mount
                raise StoreFailed("the mount answers nonsense: a list of handles that is none") from None

    def _runs_told(self) -> Iterator[tuple[int, int]]:
        """The runs of the pages as the mount tells them. ValueError if they make no sense."""
        try:
            text = os.getxattr(self._place, "user.ttmfs.map").decode()
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            yield from arguments.runs(np.array(sorted(map(int, os.listdir(self._place))), np.uint64))
            return
        end = 0
        for first, last in parse_ranges(text) if text else ():
            if not end < first <= last <= MAX_HANDLE:
                raise ValueError("they do not ascend")
            yield first - 1, last
            end = last

    def residency(self) -> Residency:
        """How many pages are in memory, and how many swapped out (with ``store=``: on the disk alone)."""
        with _translated("counting pages"):
            pages, resident, swapped = (_number(self._place, name) for name in ("pages", "resident", "swapped"))
        return Residency(pages, resident, swapped)

    def residency_of(self, first: int, past: int) -> Residency:
        """The same of the pages between two indices. Raises NotSupported unless it :attr:`is_native`."""
        self._check_open()
        if not self.is_native:
            raise NotSupported("where single pages are is told by the backup's own file alone, which is not open here")
        with _translated("counting pages"):
            length = (min(past, self._limit()) - first) * self.page_size
            if length <= 0:
                return Residency(0, 0, 0)
            there, out = system_calls.residency(self._native, first * self.page_size, length)
            pages = sum(end - start for start, end in system_calls.page_runs(self._native, self.page_size, first, past))
        swapped = -(-pages * out // (there + out)) if out else 0
        return Residency(pages, pages - swapped, swapped)

    def writeback(self) -> None:
        """Push every page on to swap, now (with ``store=``: to the disk). Best effort."""
        with _translated("writing back"):
            os.fsync(self._image(os.O_RDONLY))

    # --- the two ways ---

    def _store(self, idx: int, data: memoryview, writeback: bool) -> int:
        """Store whole pages from an index on; gives how many. NoRoom if none was."""
        offset, done, refused = idx * self.page_size, 0, None
        # Each way stores what the one before found no room for: only the mount asks the reserve, and pushes pages out
        # at once; but it also stores page by page where a file's room ends.
        ways: list[Callable[[int, memoryview], int]] = []
        ways += [partial(self._store_by_mount, os.O_WRONLY | os.O_SYNC)] * writeback
        ways += [self._store_natively] * self.is_native
        ways += [partial(self._store_by_mount, os.O_WRONLY)]
        with _translated("storing pages"):
            for way in ways:
                while done < len(data):
                    try:
                        done += way(offset + done, data[done : done + STEP])
                    except OSError as error:
                        if error.errno in _INTERRUPTIONS:
                            raise
                        refused = error
                        break
                if refused and refused.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
                    break
            if refused and done < self.page_size:
                raise refused
        return done // self.page_size

    def _store_natively(self, offset: int, data: memoryview) -> int:
        self._touching()
        if self.page_size > BASE_PAGE_SIZE:  # so that none is stored in part
            system_calls.allocate_range(self._native, offset, len(data))
        return os.pwrite(self._native, data, offset)

    def _store_by_mount(self, flags: int, offset: int, data: memoryview) -> int:
        file = self._image(flags)
        if length := _whole_pages(data, self.page_size):
            return os.pwrite(file, data[:length], offset)
        aligned = mmap.mmap(-1, REQUEST)
        aligned[:] = data[:REQUEST]
        return os.pwrite(file, aligned, offset)

    def _copy(self, dst: memoryview, runs: list[tuple[int, int]], intr: threading.Event | None) -> None:
        """Fill `dst` from the pages of runs of indices, one behind the other."""
        if intr is None:
            self._read(dst, runs)
            return
        step, done = max(1, REQUEST // self.page_size), 0
        for first, past in runs:
            for start in range(first, past, step):
                if intr.is_set():
                    raise InterruptedError(errno.EINTR, "copying pages was interrupted")
                end = min(past, start + step)
                length = (end - start) * self.page_size
                # Into memory of its own: a copy that is given up may still be under way when the caller uses his again.
                dst[done : done + length] = self._await(partial(self._read, bytearray(length), [(start, end)]), intr)
                done += length

    def _read(self, dst: memoryview | bytearray, runs: list[tuple[int, int]]) -> memoryview:
        """Fill `dst`, and give it."""
        view, done = memoryview(dst), 0
        with _translated("copying pages", absent=PageAbsent):
            if not self.is_native and len(view) <= FEW * self.page_size:
                for idx in (idx for first, past in runs for idx in range(first, past)):
                    self._read_page(view[done : done + self.page_size], idx)
                    done += self.page_size
                return view
            self._read_runs(view, runs)
            # Only zeros can be of no page. Who drops a page meanwhile and stores it again can still have it read so.
            if zeros := list(_zero_pages(view, runs, self.page_size) if runs else ()):
                self._check_present([(first, past) for _, (first, past) in zeros])
                for part, run in zeros:
                    self._read_runs(part, [run])
        return view

    def _read_runs(self, view: memoryview, runs: list[tuple[int, int]]) -> None:
        done = 0
        for first, past in runs:
            part = view[done : done + (past - first) * self.page_size]
            if self.is_native:
                self._read_natively(part, first * self.page_size)
            else:
                self._read_by_mount(self._image(os.O_RDONLY), part, first * self.page_size)
            done += len(part)

    def _read_by_mount(self, file: int, dst: memoryview, offset: int) -> None:
        """Fill a buffer, each page by one request, so that none is read as a mix of two."""
        while dst:
            if length := _whole_pages(dst, self.page_size):
                _fill(file, dst[:length], offset, length)
            else:
                length, aligned = REQUEST, memoryview(mmap.mmap(-1, REQUEST))
                _fill(file, aligned, offset, REQUEST)
                dst[:length] = aligned
            dst, offset = dst[length:], offset + length

    def _check_present(self, runs: list[tuple[int, int]]) -> None:
        """PageAbsent unless every page of some runs is there."""
        if self.is_native:
            for first, past in runs:
                if (absent := self._first_absent(first, past)) is not None:
                    raise PageAbsent(f"handle {absent + 1} holds no page")
            return
        extents = list(self.runs())
        firsts = [first for first, _ in extents]
        for first, past in runs:
            place = bisect.bisect_right(firsts, first) - 1
            end_of_run = max(first, extents[place][1]) if place >= 0 else first
            if end_of_run < past:
                raise PageAbsent(f"handle {end_of_run + 1} holds no page")

    def _first_absent(self, first: int, past: int) -> int | None:
        """The first index of a range that holds no page in the backup's own file; None if every one does."""
        size = self.page_size
        if (past - first) * LOOKS < os.fstat(self._native).st_blocks * 512 // size:
            return next((i for i in range(first, past) if not system_calls.is_data(self._native, i * size, size)), None)
        run = next(system_calls.page_runs(self._native, size, first, past), (past, past))
        return None if run == (first, past) else run[1] if run[0] == first else first

    def _touching(self) -> None:
        """To be called before pages are stored or read natively: that is charged to this process' control group."""
        if self._swap.used:
            self._swap.renew_counts()

    def _read_natively(self, dst: memoryview, offset: int) -> None:
        self._touching()
        workers = min(4, len(os.sched_getaffinity(0)))
        if len(dst) < PARALLEL or workers == 1:
            _fill(self._native, dst, offset, STEP)
            return
        share = -(-len(dst) // workers // BASE_PAGE_SIZE) * BASE_PAGE_SIZE
        parts = [(dst[start : start + share], offset + start) for start in range(0, len(dst), share)]
        others = [self._pool().submit(_fill, self._native, *part, STEP) for part in parts[1:]]
        try:
            _fill(self._native, *parts[0], STEP)
        finally:
            wait_for(others)  # they write to what is the caller's
        for other in others:
            other.result()

    def _read_page(self, dst: memoryview, idx: int) -> None:
        file = self.open_file(page_name(idx + 1).decode(), os.O_RDONLY)
        try:
            self._read_by_mount(file, dst, 0)
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise PageAbsent(f"handle {idx + 1} holds no page any more") from None
            raise
        finally:
            os.close(file)

    def _drop(self, runs: list[tuple[int, int]]) -> None:
        with _translated("dropping pages"):
            if self.is_native:
                for first, past in runs:
                    system_calls.punch_hole(self._native, first * self.page_size, (past - first) * self.page_size)
                return
            part: list[tuple[int, int]] = []
            for first, past in runs:
                part.append((first + 1, past))
                if len(part) >= system_calls.XATTR_SIZE_MAX // len(f"{2**30}-{2**30},"):
                    self._drop_ranges(part)
                    part = []
            if part:
                self._drop_ranges(part)

    def _drop_ranges(self, ranges: list[tuple[int, int]]) -> None:
        os.setxattr(self._place, "user.ttmfs.drop", format_ranges(ranges).encode())

    # --- within ---

    @property
    def _place(self) -> str:
        """A path of the directory, by its descriptor."""
        self._check_open()
        return f"/proc/self/fd/{self._directory}"

    def _check_open(self) -> None:
        if self._directory < 0:
            raise BackupEnded("the backup was ended") if self._ended else BackupClosed("the backup was closed here")

    def _image(self, flags: int) -> int:
        """A descriptor of ``.image``, opened so."""
        with self._lock:
            if flags not in self._files:
                self._files[flags] = self.open_file(".image", flags)
            return self._files[flags]

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(4, thread_name_prefix="ttmfs")
            return self._threads

    def _await(self, work: Callable[[], T], intr: threading.Event) -> T:
        """What `work` gives, unless `intr` is set before: then it goes on in its thread and comes to nothing."""
        future: Future[T] = self._pool().submit(work)
        while not wait_for([future], LOOK_SECONDS).done:
            if intr.is_set():
                raise InterruptedError(errno.EINTR, "copying pages was interrupted")
        return future.result()

    def _limit(self) -> int:
        return self.size // self.page_size

    def _check_index(self, idx: int, count: int) -> None:
        limit = self._limit()
        if idx > limit - count:
            raise InvalidArgument(f"index {idx} and {count} pages do not lie within the backup's {limit} pages")


def _whole_pages(data: memoryview, page_size: int) -> int:
    """How many bytes of a buffer one request through the mount carries, in whole pages.

    0 if that is not even one page, though a copy that begins at a page of memory would do. Of pages that are larger
    than a request, what it carries.
    """
    if len(data) <= REQUEST - BASE_PAGE_SIZE:
        return len(data)
    room = REQUEST - np.frombuffer(data, np.uint8).ctypes.data % BASE_PAGE_SIZE
    return min(len(data), room // page_size * page_size if page_size <= REQUEST else REQUEST)


def _fill(fd: int, dst: memoryview, offset: int, step: int) -> None:
    """Fill a buffer from a file."""
    done = 0
    while done < len(dst):
        if not (read := os.preadv(fd, [dst[done : done + step]], offset + done)):
            raise PageAbsent("the backup was made smaller meanwhile")
        done += read


def _number(place: str, name: str) -> int:
    """An attribute that is a number. StoreFailed if whoever serves the mount says anything else."""
    text = os.getxattr(place, f"user.ttmfs.{name}")
    if not text.isdigit() or len(text) > LONGEST_NUMBER:
        raise StoreFailed(f"the mount answers nonsense: user.ttmfs.{name} is {text[:LONGEST_NUMBER]!r}")
    return int(text)


def _remove(name: str, mount: int) -> None:
    """Take back a backup that was just made, if no one has stored in it."""
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=mount)


def _zero_pages(
    view: memoryview, runs: list[tuple[int, int]], size: int
) -> Iterator[tuple[memoryview, tuple[int, int]]]:
    """Of the pages of some runs, which lie one behind the other in `view`, those that are zeros throughout.

    Gives runs of them: where each lies in `view`, and its indices.
    """
    words, row, rows = np.frombuffer(view, np.uint64).reshape(-1, size // 8), 0, STEP // size or 1
    for first, past in runs:
        for start in range(first, past, rows):
            block = words[row : row + min(rows, past - start)]
            found = np.flatnonzero(block[:, 0] == 0)
            handles = found[~block[found].any(axis=1)].astype(np.uint64) + np.uint64(start + 1)
            for begin, end in arguments.runs(handles):
                at = (row + begin - start) * size
                yield view[at : at + (end - begin) * size], (begin, end)
            row += len(block)


def _descriptor(mount: int, directory: int, id: int) -> int:
    """The descriptor of a backup's own file, to read and to write; -1 if there is none to be had."""
    try:
        config = os.open(".config", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=mount)
        with open(config, encoding="utf-8") as file:
            path = json.load(file).get("descriptors")
        if not path:
            return -1
        with contextlib.suppress(OSError):
            return _handed_over(path, id)
        return os.open(".shmem", os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)
    except (OSError, ValueError):
        return -1


def _handed_over(path: str, id: int) -> int:
    """What the daemon gives for the inode number of a backup's directory. OSError with its errno."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(path)
        connection.send(struct.pack("=Q", id))
        answer, descriptors, _, _ = socket.recv_fds(connection, 4, 1, socket.MSG_CMSG_CLOEXEC)
    if len(answer) != 4 or (number := struct.unpack("=i", answer)[0]) or not descriptors:
        for fd in descriptors:
            os.close(fd)
        raise OSError(number if len(answer) == 4 else errno.EPROTO, "no descriptor")
    return int(descriptors[0])


_MEANINGS = {number: kind for kind, number in ERRNO.items()} | {
    errno.EFBIG: InvalidArgument,  # C10: of the programming interface
    errno.ENOTDIR: InvalidArgument,
    errno.ENOMEM: NoRoom,
    errno.ESTALE: BackupEnded,
    errno.ENOENT: BackupEnded,
    errno.EACCES: NotPermitted,
    errno.EROFS: NotPermitted,
}
"""What the mount means by an errno: the one table read backwards, but for these."""

_INTERRUPTIONS = (None, errno.EINTR)
"""Of an exception of a signal handler's."""

_OUR_OWN = (*_INTERRUPTIONS, errno.EMFILE, errno.ENFILE)
"""What says nothing of the mount, but of this process: it is raised as it is."""


def _meaning(error: OSError, what: str, absent: type[TtmfsError] = BackupEnded) -> TtmfsError:
    """The error that an OSError of the mount stands for."""
    kind = absent if error.errno == errno.ENOENT else _MEANINGS.get(error.errno or 0, StoreFailed)
    return kind(f"{what}: {error.strerror}")


@contextlib.contextmanager
def _translated(what: str, absent: type[TtmfsError] = BackupEnded) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _OUR_OWN:
            raise
        raise _meaning(error, what, absent) from error
