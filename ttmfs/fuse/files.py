"""The files of a backup: its pages, ``.image``, and ``.shmem``, the backup's file in the store itself.

A durable write waits after it has changed the pages, and a truncation of the image drops pages step by step.
Meanwhile others may store those pages again. So the state notes the progress, and no part is done twice if another
daemon repeats the request.

Concurrency: one thread. State is read anew after every `await`.
"""

import os
import stat

from ..errors import AccessDenied, NoData, NotPermitted, NotSupported, OutOfBounds, PageDropped
from ..linux.splice import LEAST_BYTES, FileRange
from ..linux.system_calls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from ..stores import page_ranges
from ..stores.page_file import STEP, finished
from .backing_files import BackingFiles
from .inodes import HANDLE_MASK, MAX_HANDLE, handle_of
from .node import Answer, Attributes, Changes, Node, Shared, check_syncs
from .path_retries import CHANGE, OPEN
from .permissions import OPENED_FOR, Caller, may

__all__ = ["Image", "Link", "Pages", "Shmem", "page_dropped"]

Data = bytes | memoryview


class _BackupFile(Node):
    """A file of a backup. Subclasses say where in the backup it lies, and whether its page must exist."""

    __slots__ = ("_in_memory", "_page_size", "backup")

    def __init__(self, shared: Shared, id: int) -> None:
        super().__init__(shared, id)
        self.backup = shared.pool.file(id)
        self._page_size = shared.pool.page_size
        self._in_memory = shared.pool.in_memory

    async def change(self, ino: int, wanted: Changes, caller: Caller, *, by_path: bool) -> Attributes:
        """Truncate. Mode and times are those of the backup; changing them here is accepted and does nothing."""
        if wanted.size is not None:
            if by_path:
                self._check_access(os.W_OK, caller)
            await self.truncate(ino, wanted.size, caller)
        async with self.backup.locked():
            now = self.attributes(ino)
        if wanted.owner_differs(now):
            raise NotPermitted("a page's owner is its backup's")
        return now

    async def truncate(self, ino: int, size: int, caller: Caller) -> None:
        """truncate(2)."""
        raise NotPermitted("this has no size to change")

    def _check_access(self, wanted: int, caller: Caller) -> None:
        """Raise AccessDenied unless the present mode allows the wanted access (R_OK, W_OK).

        The kernel checks too, but for a while after a change it may use the old mode. While it truncates the page, this
        happens even after the notification.
        """
        if self.id in self.shared.mode_changes and not may(self.backup.stat(), caller, wanted):
            raise AccessDenied("the present mode and owner of the backup do not allow it")

    def _place(self, fh: int, offset: int, data: Data, flags: int) -> tuple[int, Data]:
        """The position in the backup at which data is written, and the part of the data that fits into this file."""
        raise NotImplementedError

    def _checked(self, fh: int, data: bytes) -> bytes:
        """Bytes that were read just now, if they are of a page that exists."""
        return data

    async def _read_later(self, fh: int, start: int, size: int) -> bytes:
        return self._checked(fh, await self.backup.read_out(start, size))

    def write(self, fh: int, offset: int, data: Data, flags: int, caller: Caller) -> Answer[int]:
        start, placed = self._place(fh, offset, data, flags)
        if flags & os.O_DSYNC:  # O_SYNC includes it
            return self._write_and_sync(fh, start, bytes(placed), caller)
        if not self._in_memory or self.backup.is_out(start, len(placed), to_write=True):
            return self._write_later(fh, start, bytes(placed))
        return self._store(fh, start, placed)

    def _store(self, fh: int, start: int, data: Data) -> Answer[int]:
        """Store bytes whose pages are in memory."""
        return self.backup.write(start, data)

    async def _write_later(self, fh: int, start: int, data: bytes) -> int:
        with self.pool.blocking_io.pending_write(self.backup.stat().st_uid, len(data)):
            return await self._bring_in_and_store(fh, start, data)

    async def _bring_in_and_store(self, fh: int, start: int, data: bytes) -> int:
        await self.backup.bring_in(start, len(data), to_write=True)
        async with self.backup.locked():
            return await finished(self._store(fh, start, data))

    def _check_exists(self, ino: int) -> None:
        """Raise PageDropped if this is a page that does not exist."""

    async def _write_and_sync(self, fh: int, start: int, data: bytes, caller: Caller) -> int:
        """A write that is to be durable: stored, and pushed out of memory."""
        held = self.pool.blocking_io.pending_write(self.backup.stat().st_uid, len(data))
        with held, self.shared.progress(caller.unique) as progress:
            if not progress.done:
                progress.reach(await self._bring_in_and_store(fh, start, data))
            await self.backup.sync(start, progress.done)
            return progress.done


class Pages(_BackupFile):
    """The page files of a backup. A page is found by the handle in the inode number or file handle."""

    __slots__ = ()

    def attributes(self, ino: int) -> Attributes:
        self._check_exists(ino)
        self.shared.cache.note_page(ino)
        return self.attributes_of(self.backup.stat())

    def attributes_of(self, found: os.stat_result) -> Attributes:
        """The attributes of every page of the backup whose file is `found`."""
        return Attributes.of_file(found, self._page_size, self._page_size // 512)

    async def change(self, ino: int, wanted: Changes, caller: Caller, *, by_path: bool) -> Attributes:
        """As for any file of a backup, but a call by path does not fail with a second ESTALE."""
        try:
            return await super().change(ino, wanted, caller, by_path=by_path)
        except PageDropped:
            if not by_path or not self.shared.retries.forgives(ino, caller.pid, CHANGE):
                raise
        return self.attributes_of(self.backup.stat())._replace(cacheable=False)

    async def truncate(self, ino: int, size: int, caller: Caller) -> None:
        """The bytes of the page past `size` become zeros; the page keeps its size."""
        if size > self._page_size:
            raise OutOfBounds(f"a page ends at byte {self._page_size}; .image takes several pages")
        idx = handle_of(ino) - 1
        await self.backup.bring_in(idx * self._page_size + size, self._page_size - size, to_write=True)
        async with self.backup.locked():
            self._check_exists(ino)
            await finished(self.backup.zero(idx, size))

    def open(self, ino: int, flags: int, caller: Caller) -> int:
        if self.shared.mode_changes:
            self._check_access(OPENED_FOR[flags & os.O_ACCMODE], caller)
        if not self.backup.holds((ino & HANDLE_MASK) - 1) and not self.shared.retries.forgives(ino, caller.pid, OPEN):
            raise page_dropped(ino)
        if self._in_memory or flags & os.O_ACCMODE:
            return ino
        return self.marked_if_reader(ino, caller)

    def read(self, fh: int, offset: int, size: int) -> Answer[bytes]:
        page_size = self._page_size
        start, size = ((fh & HANDLE_MASK) - 1) * page_size + offset, max(0, min(size, page_size - offset))
        if self.backup.is_out(start, size):
            return self._read_later(fh, start, size)
        return self._checked(fh, self.backup.read(start, size) if size else b"")

    def _checked(self, fh: int, data: bytes) -> bytes:
        if len(data) < self._page_size or data == self.shared.zero_page:
            self._check_exists(fh)  # an absent page has no other bytes than zeros
        return data

    def _place(self, fh: int, offset: int, data: Data, flags: int) -> tuple[int, Data]:
        page_size = self._page_size
        if offset >= page_size:
            raise OutOfBounds(f"a page ends at byte {page_size}; .image takes several pages")
        return ((fh & HANDLE_MASK) - 1) * page_size + offset, data[: page_size - offset]

    def _store(self, fh: int, start: int, data: Data) -> Answer[int]:
        self._check_exists(fh)
        return self.backup.overwrite(start, data)

    def _check_exists(self, ino: int) -> None:
        if not self.backup.holds((ino & HANDLE_MASK) - 1):
            raise page_dropped(ino)

    def seek(self, ino: int, offset: int, whence: int) -> int:
        """A page is data from its first byte to its last."""
        self._check_exists(ino)
        if offset >= self._page_size:
            raise NoData(f"a page ends at byte {self._page_size}")
        return offset if whence == os.SEEK_DATA else self._page_size

    async def sync(self, fh: int) -> None:
        check_syncs(fh)
        await self.backup.sync((handle_of(fh) - 1) * self._page_size, self._page_size)


class Image(_BackupFile):
    """``.image``: page i at byte i * page_size. Absent pages are zeros; writing stores the pages that it touches."""

    __slots__ = ()

    def attributes(self, ino: int) -> Attributes:
        """The size is the backup's. They are not cached: each page changes the blocks, and du must agree with ls."""
        found = self.backup.stat()
        return Attributes.of_file(found, found.st_size, self.backup.taken // 512)._replace(cacheable=False)

    async def truncate(self, ino: int, size: int, caller: Caller) -> None:
        """Pages past `size` are dropped; the image keeps its size."""
        await self.backup.bring_in(size, -size % self._page_size, to_write=True)  # zeroed, not dropped
        with self.shared.progress(caller.unique) as progress:
            await self.backup.truncate(size, progress.done, progress.reach)
            idx = size // self._page_size
            self.shared.runs.forget_dropped(self.id, idx, MAX_HANDLE)
            await self.shared.expire_dropped(self.id, idx + 1, MAX_HANDLE, directory_locked=False)

    def open(self, ino: int, flags: int, caller: Caller) -> int:
        self._check_access(OPENED_FOR[flags & os.O_ACCMODE], caller)
        return ino if flags & os.O_ACCMODE else self.marked_if_reader(ino, caller)

    def read(self, fh: int, offset: int, size: int) -> Answer[bytes] | FileRange:
        if self.backup.is_out(offset, size):
            return self._read_later(fh, offset, size)
        if size >= LEAST_BYTES and self._in_memory:
            return self.backup.part(offset, size)
        return self.backup.read(offset, size)

    def _place(self, fh: int, offset: int, data: Data, flags: int) -> tuple[int, Data]:
        if flags & os.O_APPEND:  # the end that the kernel knows may be wrong after a truncation through .shmem
            raise OutOfBounds("nothing can be appended to .image, which spans the whole backup")
        return offset, data

    def seek(self, ino: int, offset: int, whence: int) -> int:
        """Pages are data, absent pages are holes. The end of the image counts as a hole."""
        return self.backup.seek(offset, whence)

    async def allocate(self, ino: int, mode: int, offset: int, length: int, caller: Caller) -> None:
        """Store pages of zeros where there are none, or with FALLOC_FL_PUNCH_HOLE drop pages. The image keeps its size.

        Punching drops whole pages, and fills parts of pages with zeros. Other modes are refused, as by tmpfs.
        """
        if mode not in (0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
            raise NotSupported("fallocate(2) of .image knows FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE alone")
        if not mode & FALLOC_FL_PUNCH_HOLE:
            await page_ranges.fill(self.backup, offset, length)
            return
        end = min(offset + length, self.backup.size)
        with self.shared.progress(caller.unique) as progress:
            first, past = await page_ranges.punch(self.backup, offset, end, progress.done, progress.reach)
            self.shared.runs.forget_dropped(self.id, first, past)
            await self.shared.expire_dropped(self.id, first + 1, past, directory_locked=False)

    async def sync(self, fh: int) -> None:
        check_syncs(fh)
        await self.backup.sync(0, MAX_HANDLE * self._page_size)


class Shmem(_BackupFile):
    """``.shmem``: the backup's file in the store. The kernel reads, writes and maps it; the daemon does the rest.

    Neither the size of the backup nor the reserve limits what is stored here, but the budget does.
    """

    __slots__ = ("_backing",)

    def __init__(self, shared: Shared, id: int, backing: BackingFiles) -> None:
        super().__init__(shared, id)
        self._backing = backing

    def attributes(self, ino: int) -> Attributes:
        """Nobody may read who may not write: reading a hole through a mapping stores a page."""
        found = self.backup.stat()
        writers = found.st_mode & 0o222
        mode = stat.S_IFREG | writers | found.st_mode & writers << 1
        return Attributes.of_file(found, found.st_size, found.st_blocks, mode)._replace(cacheable=False)

    async def change(self, ino: int, wanted: Changes, caller: Caller, *, by_path: bool) -> Attributes:
        if wanted.mode is not None:
            raise NotPermitted("the mode of .shmem follows from the backup's: change that")
        return await super().change(ino, wanted, caller, by_path=by_path)

    async def truncate(self, ino: int, size: int, caller: Caller) -> None:
        """The backup spans `size` bytes from now on."""
        backup, page_size = self.backup, self._page_size
        if size > MAX_HANDLE * page_size:
            raise OutOfBounds(f"a backup has at most {MAX_HANDLE} pages")
        await backup.bring_in(size, -size % page_size, to_write=True)
        first, before = -(-size // page_size), backup.size
        with self.shared.progress(caller.unique) as progress:
            await backup.drop_run(max(first, progress.done), -(-before // page_size), progress.reach)
            backup.set_size(size)
            await self._forget_dropped(size // page_size, MAX_HANDLE)
        if size > before:
            await self.shared.cache.grow_image(self.id, size)

    async def _forget_dropped(self, first: int, past: int) -> None:
        self.shared.runs.forget_dropped(self.id, first, past)
        await self.shared.expire_dropped(self.id, first + 1, past, directory_locked=False)

    def open(self, ino: int, flags: int, caller: Caller) -> int:
        return ino

    def backing(self) -> int:
        return self._backing.number_of(self.id)

    def seek(self, ino: int, offset: int, whence: int) -> int:
        return self.backup.seek(offset, whence)

    async def allocate(self, ino: int, mode: int, offset: int, length: int, caller: Caller) -> None:
        """fallocate(2) as on a tmpfs, in steps."""
        work, page_size = self.backup.slices.begin(), self._page_size
        with self.shared.progress(caller.unique) as progress:
            position, end = max(offset, progress.done), offset + length
            while position < end:
                past = min(end, (position // STEP + 1) * STEP)
                self.backup.allocate(mode, position, past - position)
                progress.reach(position := past)
                if work.slice_is_over():
                    await work.rest()
            if mode & FALLOC_FL_PUNCH_HOLE:
                await self._forget_dropped(offset // page_size, -(-end // page_size))

    async def sync(self, fh: int) -> None:
        await self.backup.sync(0, MAX_HANDLE * self._page_size)


class Link(_BackupFile):
    """``.shmem`` where the kernel takes no backing files: a symbolic link to the backup's file in the store."""

    __slots__ = ()

    def attributes(self, ino: int) -> Attributes:
        """The size is the length of the target, which a rename changes."""
        attributes = Attributes.of_file(self.backup.stat(), len(self.target()), 0)
        return attributes._replace(mode=stat.S_IFLNK | 0o777, cacheable=False)

    def target(self) -> bytes:
        return os.fsencode(self.pool.files.path(self.pool.files.name_of(self.id)))


def page_dropped(ino: int) -> PageDropped:
    """The error for a page that was known and does not exist any more."""
    return PageDropped(f"handle {handle_of(ino)} holds no page any more")
