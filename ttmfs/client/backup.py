"""Synchronous access to the backups of a mount, for programs other than the daemon.

::

    with Backup.create("/mnt/ttm/a", size=1 << 30) as backup:
        handles = backup.backup_pages(pages, 0)     # (n, page_size) of uint8
        backup.copy_pages(pages, handles)
        backup.drop_pages(handles)
        backup.fini()

Pages are reached in one of two ways, with the same results:

- natively (``own_file.py``), by system calls on ``.shmem``, at the speed of a tmpfs. Storing natively is limited by the
  budget alone, not by ``reserve=``. :attr:`Backup.is_native` tells whether this process could open it.
- through the mount (``directory.py``), by requests for ``.image``, page files and ``user.ttmfs.drop``.

Threading: any thread may call any method, but no other method runs during :meth:`Backup.close`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

import numpy as np

from ..errors import BackupAbsent, InvalidArgument, NotSupported, TtmfsError, translated
from ..handles import Uint64Array
from ..model import arguments
from .directory import INTERRUPTIONS, OF_PAGES, OF_THE_MOUNT, REQUEST, Directory
from .own_file import STEP, WORKERS, OwnFile, descriptor_of
from .page_array import PageArray, shrink

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from ..model.arguments import PageBuffer

__all__ = ["Backup", "PageArray", "Residency", "shrink"]

POLL_SECONDS = 0.02
"""How often an interruptible copy looks at its event."""

OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


@dataclass(frozen=True)
class Residency:
    """Where pages are: counts of pages. A page that is partly swapped out counts by its parts, `swapped` rounded up."""

    pages: int
    resident: int
    swapped: int


class Backup:
    """An open backup of a mount. Make it with :meth:`create` or :meth:`open`. A context manager, which closes it.

    Indices begin at 0; handles are index + 1. Every method can raise BackupEnded (someone ended the backup),
    BackupClosed (it was closed here; its pages stay), StoreFailed (the mount or its store failed) and NotPermitted.
    The verbs are those of ``drivers/gpu/drm/ttm/ttm_backup.c``.
    """

    def __init__(self, directory: Directory, *, native: bool) -> None:
        self._directory = directory
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="ttmfs")
        fd = descriptor_of(directory) if native else -1
        self._own_file = None if fd < 0 else OwnFile(fd, directory.page_size, self._threads)
        self._pages: OwnFile | Directory = self._own_file or directory
        self.id = directory.id
        """The inode number of its directory, which no other backup of the mount ever has."""
        self.page_size = directory.page_size
        """Bytes in a page."""

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], size: int | None = None, *, mode: int = 0o777, native: bool = True
    ) -> Self:
        """Make an empty backup of `size` bytes (default: ``backup_size=`` of the mount) and open it.

        ``ttm_backup_shmem_create()``. The size is rounded up to whole pages and takes no memory. The umask limits
        `mode`. Raises BackupExists, NoRoom and InvalidArgument.
        """
        with translated(f"making {os.fspath(path)}", OF_THE_MOUNT):
            # Until all is done the owner needs the right to write.
            backup = cls(Directory.create(path, mode | stat.S_IWUSR), native=native)
            try:
                if size is not None:
                    backup.resize(size)
                if not mode & stat.S_IWUSR:
                    backup.chmod(stat.S_IMODE(backup.status().st_mode) & ~stat.S_IWUSR)
            except BaseException:
                with contextlib.suppress(OSError, TtmfsError):  # another process may have stored pages
                    backup._directory.remove()
                backup.close()
                raise
        return backup

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, native: bool = True) -> Self:
        """Open an existing backup. With `native` false every call goes through the mount. Raises BackupAbsent."""
        with translated(f"opening {os.fspath(path)}", {**OF_THE_MOUNT, errno.ENOENT: BackupAbsent}):
            return cls(Directory.open(path), native=native)

    def close(self) -> None:
        """Close the backup; its pages stay."""
        self._threads.shutdown()
        if self._own_file:
            os.close(self._own_file.fd)
        self._own_file, self._pages = None, self._directory
        self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Backup {self.id}{' (closed)' * (self._directory.fd < 0)}>"

    # --- the six verbs, and their plural forms ---

    def backup_page(self, page: PageBuffer, idx: int, writeback: bool = False) -> int:
        """Copy a page into the backup and return its handle, ``idx + 1``. ``ttm_backup_backup_page()``.

        `page` is a contiguous buffer of page_size bytes; the caller may change it on return. An existing page is
        overwritten. `writeback` asks to push the page to swap now, on a best-effort basis. Raises InvalidArgument and
        NoRoom.
        """
        data, handle = arguments.page(page, self.page_size), arguments.handle_of(idx)
        self._check([(handle - 1, handle)])
        self._store(handle - 1, data, writeback)
        return handle

    def backup_pages(self, pages: NDArray[np.uint8], idx: int, writeback: bool = False) -> Uint64Array:
        """Back up an array of shape (n, page_size), dtype uint8, at n indices from `idx` on. Return their handles.

        If the room ends part way, return the handles of the stored pages; raise NoRoom if there are none.
        """
        data, first = arguments.pages(pages, self.page_size), arguments.handle_of(idx)
        self._check([(first - 1, first - 1 + len(pages))])
        stored = self._store(first - 1, data, writeback) if len(data) else 0
        return np.arange(first, first + stored, dtype=np.uint64)

    def copy_page(self, dst: PageBuffer, handle: int, intr: threading.Event | None = None) -> None:
        """Copy a page back into `dst`, a writable buffer of page_size bytes. ``ttm_backup_copy_page()``.

        The page stays in the backup. Raises PageAbsent, and InterruptedError if `intr` is set before the end. A signal
        handler may set it, or raise an exception, which ends the call too. The caller can then repeat the call.
        """
        data, idx = arguments.destination(dst, self.page_size), arguments.index_of(handle)
        self._copy(data, [(idx, idx + 1)], intr)

    def copy_pages(self, dst: NDArray[np.uint8], handles: Uint64Array, intr: threading.Event | None = None) -> None:
        """Copy pages back into the rows of `dst`, shape (n, page_size), dtype uint8, by n handles, dtype uint64.

        Raises PageAbsent if any handle holds nothing, and InterruptedError as :meth:`copy_page` does. Some rows may
        have been written by then.
        """
        self._copy(arguments.rows(dst, len(handles), self.page_size), arguments.runs(handles), intr)

    def drop(self, handle: int) -> None:
        """Release a page, and its memory at once. A handle that holds nothing is no error. ``ttm_backup_drop()``."""
        idx = arguments.index_of(handle)
        self._drop([(idx, idx + 1)])

    def drop_pages(self, handles: Uint64Array) -> None:
        """Release the pages of an array of handles, dtype uint64, as :meth:`drop` does."""
        self._drop(arguments.runs(handles))

    def fini(self) -> None:
        """End the backup: release every page, remove its directory and close it. ``ttm_backup_fini()``.

        Raises BackupNotEmpty if another process stores a page meanwhile.
        """
        with translated("ending the backup", OF_THE_MOUNT):
            self._directory.end()
        self.close()

    def move(self, store: str) -> None:
        """Give the backup to another store on the same distributed filesystem, and close it. `store` is a path.

        The mount of that store shows the backup within a second. Raises NotSupported, NotPermitted, BackupExists and
        InvalidArgument.
        """
        with translated(f"moving the backup to {store!r} (ttmfs why tells the reason)", OF_THE_MOUNT):
            self._directory.set_attribute("move", store)
        self.close()

    # --- attributes ---

    @property
    def path(self) -> str:
        """Its current path, which changes when it is renamed."""
        return self._directory.path

    def open_file(self, name: str, flags: int) -> int:
        """Return a new descriptor of a file of the backup, ``.image`` or a page. Raises OSError as open(2) does."""
        return self._directory.open_file(name, flags)

    def fileno(self) -> int:
        """Return the descriptor of its own file, which the backup will close. Raises NotSupported."""
        return self._native().fd

    @property
    def is_native(self) -> bool:
        """Whether its own file is open here, so that no page goes through the mount."""
        return self._own_file is not None

    @property
    def shmem_is_open(self) -> bool:
        """Whether a program, this one included, has ``.shmem`` open or mapped, in whatever namespace."""
        with translated("looking who uses the backup", OF_THE_MOUNT):
            return self._directory.number("shmem_open") > 0

    def _native(self) -> OwnFile:
        self._directory.check_open()
        if not self._own_file:
            raise NotSupported("this process does not have the backup's own file")
        return self._own_file

    @property
    def size(self) -> int:
        """Bytes that the backup spans, a multiple of page_size, stored or not."""
        with translated("looking at the backup", OF_THE_MOUNT):
            return self._pages.size

    def status(self) -> os.stat_result:
        """Return the stat(2) of its directory."""
        with translated("looking at the backup", OF_THE_MOUNT):
            return self._directory.status()

    def chmod(self, mode: int) -> None:
        """Change its mode bits."""
        with translated("changing the mode", OF_THE_MOUNT):
            self._directory.chmod(mode)

    def resize(self, size: int) -> None:
        """Change :attr:`size`, rounded up to whole pages. Raises InvalidArgument if pages exist past it."""
        if not isinstance(size, int) or size <= 0:
            raise InvalidArgument(f"a size is a positive number of bytes, not {size!r}")
        with translated("changing the size", OF_THE_MOUNT):
            self._directory.set_attribute("size", str(-(-size // self.page_size) * self.page_size))

    def handles(self) -> Uint64Array:
        """Return the handles of all stored pages, ascending, dtype uint64."""
        found = [np.arange(first + 1, past + 1, dtype=np.uint64) for first, past in self.runs()]
        return np.concatenate(found) if found else np.empty(0, np.uint64)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the runs of stored pages, as (first index, index past the last), ascending."""
        with translated("listing pages", OF_THE_MOUNT):
            yield from self._pages.runs()

    def residency(self) -> Residency:
        """Count the pages in memory, and those swapped out (with ``store=``: on the disk alone)."""
        with translated("counting pages", OF_THE_MOUNT):
            return Residency(*map(self._directory.number, ("pages", "resident", "swapped")))

    def residency_of(self, first: int, past: int) -> Residency:
        """The same for the pages between two indices. Raises NotSupported unless :attr:`is_native`."""
        with translated("counting pages", OF_THE_MOUNT):
            pages, swapped = self._native().residency(first, past)
        return Residency(pages, pages - swapped, swapped)

    def writeback(self) -> None:
        """Push every page to swap now (with ``store=``: to the disk), on a best-effort basis."""
        with translated("writing back", OF_THE_MOUNT):
            os.fsync(self._directory.image(os.O_RDONLY))

    # --- whole ranges ---

    def _check(self, runs: list[tuple[int, int]]) -> None:
        limit = self.size // self.page_size
        for _, past in runs:
            arguments.check_end(past, limit)

    def _store(self, idx: int, data: memoryview, writeback: bool) -> int:
        """Store whole pages from an index on. Return the number stored. Raises NoRoom if that is none.

        If there is no room for pages in one way, the next way stores the rest. Only the mount writes back at once, but
        it does not use the reserve. Where the own file has no room for a range, the mount stores as many pages as fit.
        """
        ways: list[Callable[[int, memoryview], int]] = [self._directory.store]
        if self._own_file:
            ways.insert(0, self._own_file.store)
        if writeback:
            ways.insert(0, partial(self._directory.store, flags=os.O_WRONLY | os.O_SYNC))
        offset, done = idx * self.page_size, 0
        with translated("storing pages", OF_THE_MOUNT):
            for way in ways:
                try:
                    while done < len(data):
                        done += way(offset + done, data[done : done + STEP])
                    break
                except OSError as error:
                    is_final = error.errno not in OUT_OF_ROOM or way is ways[-1]
                    if error.errno in INTERRUPTIONS or (is_final and done < self.page_size):
                        raise
                    if is_final:
                        break
        return done // self.page_size

    def _copy(self, dst: memoryview, runs: list[tuple[int, int]], intr: threading.Event | None) -> None:
        """Copy the pages of runs into `dst`, one after the other."""
        self._check(runs)
        if intr is None:
            self._read(dst, runs)
            return
        step, done = max(1, REQUEST // self.page_size), 0
        for first, past in runs:
            for start in range(first, past, step):
                length = (min(past, start + step) - start) * self.page_size
                dst[done : done + length] = self._read_interruptibly(intr, length, (start, min(past, start + step)))
                done += length

    def _read_interruptibly(self, intr: threading.Event, length: int, run: tuple[int, int]) -> bytearray:
        """Read a run in a thread, into new memory: after an interruption the thread may still write there."""
        if intr.is_set():
            raise InterruptedError(errno.EINTR, "copying pages was interrupted")
        data = bytearray(length)
        future: Future[None] = self._threads.submit(self._read, memoryview(data), [run])
        while not wait_for([future], POLL_SECONDS).done:
            if intr.is_set():
                raise InterruptedError(errno.EINTR, "copying pages was interrupted")
        future.result()
        return data

    def _read(self, dst: memoryview, runs: list[tuple[int, int]]) -> None:
        with translated("copying pages", OF_PAGES):
            self._pages.read(dst, runs)

    def _drop(self, runs: list[tuple[int, int]]) -> None:
        self._check(runs)
        with translated("dropping pages", OF_THE_MOUNT):
            self._pages.drop(runs)
