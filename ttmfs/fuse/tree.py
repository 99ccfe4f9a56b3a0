"""What a mount shows: which names exist, what they are, and what may be done to them.

::

    /                 ROOT    backups: mkdir, rmdir, rename
    /.stats /.config  STATS, CONFIG: texts, made when they are opened (see texts.py)
    /a                handle 0 of the backup
    /a/1 ... /a/N     pages by handle
    /a/.image         IMAGE   every page at its place
    /a/.shmem         SHMEM   a link to the backup's file in the store

Permissions by mode bits are the kernel's (default_permissions, unless root alone is let in); what is refused here is
refused to everyone.

As if once: a request may be carried out twice, by two daemons, if the first died before its answer was read. The VFS
looks names up under the parent's lock before it asks for a change, so a true EEXIST or ENOENT is its own answer; here
mkdir of what is there, rmdir and unlink of what is gone, and a rename that was done already all succeed, and create
never changes a page that is there. That is right only because (1) names that do not exist have no lifetime in the
kernel, (2) nothing is awaited between a change of names and its answer, (3) rename knows no flag but RENAME_NOREPLACE.
(For a second after a bulk drop, while the kernel has the names, unlink tells that the page is gone. A daemon does so
only if it noted the drop, and by then it has carried out again what it had to.)
(A write opened O_SYNC is awaited after the change, and pages dropped in bulk are dropped bit by bit. Meanwhile others
may store anew what was written or dropped: so how far it got is noted in the state, and none of it is done twice.)

Concurrency: one thread. State is read anew at every call; what is kept between calls (listings) can be lost at any
time without harm.
"""

import contextlib
import inspect
import itertools
import os
import secrets
import stat
import time
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from ..errors import (
    AccessDenied,
    BackupAbsent,
    BackupEnded,
    BackupExists,
    InvalidArgument,
    NameTooLong,
    NoRoom,
    NoSuchAttribute,
    NoSuchName,
    NotPermitted,
    NotSupported,
    OutOfBounds,
    PageDropped,
    ReadOnlyEntry,
    TooLong,
    WrongParent,
)
from ..handles import format_ranges, parse_page_name, parse_ranges
from ..linux.system_calls import XATTR_SIZE_MAX
from ..model.backup import Backup
from ..model.pool import NAME_MAX, Pool, bytes_avail
from ..model.progress import Progress
from ..options import parse_size
from .inodes import (
    APPENDED,
    CONFIG,
    FIRST_BACKUP,
    HANDLE_BITS,
    IMAGE,
    MAX_BACKUP_ID,
    MAX_HANDLE,
    READER,
    ROOT,
    SHMEM,
    STATS,
    SYNC,
    backup_of,
    handle_of,
    inode,
    split,
    with_serial,
)
from .kernel_cache import LIFETIME, KernelCache, Recent
from .permissions import Caller, may
from .refusals import Refusals
from .texts import Texts

__all__ = ["WANTED", "Attributes", "Entry", "Tree"]

RENAME_NOREPLACE = 1

WANTED = {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK, os.O_RDWR: os.R_OK | os.W_OK, os.O_ACCMODE: os.R_OK | os.W_OK}
"""The right that open(2) asks for, by access mode."""

TEXTS = {b".stats": STATS, b".config": CONFIG}
HIDDEN = {b".image": IMAGE, b".shmem": SHMEM}

KEPT = 64
"""How many listings under way are kept. One that was lost is made anew from its offset."""

RANGES_AT_ONCE = 256
"""How many ranges of a list, which can have 32,768, are read before others may be served."""

RANGE_BYTES = 64
"""Bytes that a list of handles takes for each of its characters."""

DOUBT_SECONDS = 1.5
"""For so long after a backup's mode or owner changed, the kernel may judge its pages by the old ones: those that the
answer to a truncation said which was under way. It keeps them for LIFETIME."""

OPENING, CHANGING, AFTER_LAST = range(3)
"""The steps of a call by path: a page is opened, or its name removed; then its size or attributes are changed."""

RETRY_SECONDS = 1.0
"""How long a thread may take to ask again for a path that it was told is stale. It does so at once."""

EXTENT_SECONDS = 1.0
"""How long a listing trusts what it knows of the pages to come: so late may it see what .shmem drops."""


class Attributes(NamedTuple):
    """What stat(2) says of an entry, but for its inode number. Blocks are of 512 bytes, times in ns."""

    mode: int
    nlink: int
    size: int
    blocks: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    lasting: bool = True  # whether the kernel may keep them for a while


class Stale(NamedTuple):
    """A thread was told that the page of an inode is gone. It may ask once more in the same call, by the same path.

    `next_step` is the first step that is then answered as if the page were there: AFTER_LAST before it looked it up.
    """

    ino: int
    at: float
    next_step: int
    misses: int  # times that it has looked up and found nothing


Entry = tuple[bytes, int, Attributes, int]
"""One entry of a listing: name, inode, attributes and the offset to go on from. A plain tuple, a third of the time of
a named one. Entries that follow each other often share one Attributes."""


Kept = TypeVar("Kept")


class _Kept(Generic[Kept], OrderedDict[int, Kept]):
    """The values of the file handles, or threads, that were used last."""

    def __setitem__(self, fh: int, value: Kept) -> None:
        super().__setitem__(fh, value)
        self.move_to_end(fh)
        if len(self) > KEPT:
            self.popitem(last=False)


class Tree:
    """The names of a mount over a pool. Names are bytes, as the kernel has them; numbers are inode numbers.

    `texts` makes what STATS and CONFIG hold. `cache` tells the kernel what has changed. `progress` is State.progress.
    """

    def __init__(
        self,
        pool: Pool,
        texts: Mapping[int, Callable[[], Awaitable[bytes]]],
        cache: KernelCache,
        progress: "Callable[..., contextlib.AbstractContextManager[Progress]]",
    ) -> None:
        self.pool = pool
        self._zeros = bytes(pool.page_size)
        self._in_memory = pool.store.in_memory
        self._progress = progress
        self.texts = Texts(texts)
        self._cache = cache
        self.refusals = Refusals()
        # Directories that a daemon before opened are open still: two of one handle would share what is kept of them.
        self._serial = itertools.count(secrets.randbits(HANDLE_BITS))
        self.doubts = Recent(DOUBT_SECONDS)  # backups whose mode or owner changed
        self._bulk_drops = Recent(LIFETIME)  # backups of which pages were dropped in bulk; the kernel has the names yet
        self.stale: _Kept[Stale] = _Kept()  # by thread: what it was told last
        # Of open directories: index to go on from, end of the run of pages that it is in, and when that was looked up.
        self._extents: _Kept[tuple[int, int, float]] = _Kept()

    # --- names ---

    def lookup(self, parent: int, name: bytes) -> tuple[int, Attributes] | None:
        """The inode and attributes of a name; None if there is no such name."""
        if parent == ROOT:
            if ino := TEXTS.get(name):
                return ino, self.attributes(ino)
            with contextlib.suppress(BackupAbsent):
                id = self.pool.store.find(os.fsdecode(name))
                return inode(id, 0), _directory(self.pool.backup(id).stat())
            _check_length(name)
            return None
        id = backup_of(parent)
        if handle := HIDDEN.get(name):
            ino = inode(id, handle)
            return ino, self.attributes(ino)
        handle, backup = parse_page_name(name) or 0, self.pool.backup(id)
        if not 0 < handle <= MAX_HANDLE or not backup.holds(handle - 1):
            _check_length(name)
            return None
        found = backup.stat()
        if handle * self.pool.page_size > found.st_size:  # .shmem can have made it shorter
            return None
        ino = inode(id, handle)
        self._cache.told(ino)
        return ino, self._page(found)

    def attributes(self, ino: int) -> Attributes:
        """The attributes of an inode. Raises PageDropped and BackupEnded if it is no more."""
        id, handle = split(ino)
        if not id:
            return self._attributes_of_own(ino)
        backup = self.pool.backup(id)
        if 0 < handle <= MAX_HANDLE:
            _check_page(backup, handle)
            self._cache.told(ino)
            return self._page(backup.stat())
        if not handle:
            return _directory(backup.stat())
        found = backup.stat()
        if handle == IMAGE:  # every page that comes or goes changes it, and du must agree with ls
            blocks = backup.taken // 512
            return _file(found, found.st_size, blocks)._replace(lasting=False)
        return _file(found, len(self.target(ino)), 0)._replace(mode=stat.S_IFLNK | 0o777, lasting=False)

    def _attributes_of_own(self, ino: int) -> Attributes:
        found = self.pool.store.stat()
        if ino == ROOT:
            return _directory(found)._replace(nlink=2 + self.pool.store.count)
        if ino not in self.texts:
            raise NoSuchName(f"there is no inode {ino}")
        return _file(found, self.texts.size(ino), 0)._replace(mode=stat.S_IFREG | 0o444, lasting=False)

    async def attributes_of_text(self, ino: int) -> Attributes:
        """The attributes of one of the mount's own files, with the size of the text that was made last."""
        if ino in self.texts:
            await self.texts.have(ino)
        return self._attributes_of_own(ino)

    def locked(self, ino: int) -> contextlib.AbstractAsyncContextManager[None]:
        """Around what looks at a backup or changes it, after something was waited for. See :meth:`Backup.locked`."""
        return self.pool.store.locked(backup_of(ino))

    def target(self, ino: int) -> bytes:
        """Where a backup's SHMEM link leads."""
        if handle_of(ino) != SHMEM or not backup_of(ino):
            raise InvalidArgument("this is no link")
        return os.fsencode(self.pool.store.path(self.backup(ino).name))

    def backup(self, ino: int) -> Backup:
        """The backup that an inode or file handle belongs to."""
        return self.pool.backup(backup_of(ino))

    def _page(self, found: os.stat_result) -> Attributes:
        """The attributes of the pages, the same for all, of the backup whose file in the store is `found`."""
        return _file(found, self.pool.page_size, self.pool.page_size // 512)

    # --- making and removing ---

    async def make_backup(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> tuple[int, Attributes]:
        """mkdir(2): a backup of the pool's backup_size. One that is there already is given as it is."""
        _check_length(name)
        if parent != ROOT:
            raise NotPermitted("a backup holds pages, no directories")
        _check_no_dot(name)
        root = self.pool.store.stat()
        if root.st_mode & stat.S_ISGID:  # as every filesystem does it: the group comes down the tree
            gid, mode = root.st_gid, mode | stat.S_ISGID
        size = min(self.pool.backup_size, MAX_HANDLE * self.pool.page_size)
        try:
            backup = await self.pool.create(os.fsdecode(name), size, mode=mode & 0o7777, uid=uid, gid=gid)
        except BackupExists:
            if found := self.lookup(parent, name):
                return found
            raise  # what is there is no backup
        if (id := self.pool.store.find(os.fsdecode(name))) > MAX_BACKUP_ID:
            await backup.fini()
            raise NoRoom(f"all {MAX_BACKUP_ID} inode numbers for backups are used up; mount anew")
        return inode(id, 0), _directory(backup.stat())

    async def remove_backup(self, parent: int, name: bytes) -> None:
        """rmdir(2). One that is gone already is well."""
        if parent != ROOT:
            raise NotPermitted("a backup holds no directories")
        try:
            await self.pool.remove(os.fsdecode(name))
        except BackupAbsent:
            return

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """renameat2(2) of a backup. Pages cannot be renamed."""
        _check_length(new_name)
        if flags & ~RENAME_NOREPLACE:
            raise InvalidArgument("RENAME_NOREPLACE is the only flag of rename known here")
        if parent != ROOT:
            if name in HIDDEN:
                raise NotPermitted(f"{os.fsdecode(name)} belongs to its backup")
            raise WrongParent("a page stays at its index; copy it")
        if name in TEXTS or new_parent != ROOT:
            raise NotPermitted("a backup can only be renamed, within the mount's root")
        _check_no_dot(new_name)
        try:
            await self.pool.rename(os.fsdecode(name), os.fsdecode(new_name), replace=not flags & RENAME_NOREPLACE)
        except BackupAbsent:
            await self.pool.open(os.fsdecode(new_name))

    def create_page(
        self, parent: int, name: bytes, flags: int, caller: Caller | None = None
    ) -> "tuple[int, int, Attributes] | Coroutine[Any, Any, tuple[int, int, Attributes]]":
        """open(2) with O_CREAT: store a zero page unless there is one. Gives file handle, inode and attributes.

        Gives a coroutine in their place only where something must be waited for.

        A `caller` gets what open(2) of the page would give: the kernel has checked the right to create alone, and the
        file handle shows whatever is stored at this handle later. None: root, or mknod(2), which opens nothing.
        """
        _check_length(name)
        if parent == ROOT:
            _check_no_dot(name)
            raise NotPermitted("the root holds backups, no files: make one with mkdir")
        handle = parse_page_name(name)
        if not handle:
            raise InvalidArgument(f"{os.fsdecode(name)!r} is no handle: pages are named 1, 2, 3 and so on")
        if handle > MAX_HANDLE:
            raise OutOfBounds(f"the largest handle is {MAX_HANDLE}")
        id = backup_of(parent)
        backup, ino = self.pool.backup(id), inode(id, handle)
        if caller and not may(backup.stat(), caller, WANTED[flags & os.O_ACCMODE]):
            raise AccessDenied("the backup's mode does not allow its pages to be opened like this")
        if not self._in_memory:
            return self._create_later(backup, ino, flags)
        backup.create_page(handle - 1)
        self._cache.told(ino)
        return _file_handle(ino, flags), ino, self._page(backup.stat())

    async def _create_later(self, backup: Backup, ino: int, flags: int) -> tuple[int, int, Attributes]:
        async with backup.locked():
            await backup.create_page_in_thread(handle_of(ino) - 1)
            self._cache.told(ino)
            return _file_handle(ino, flags), ino, self._page(backup.stat())

    def drop_page(self, parent: int, name: bytes, pid: int = 0) -> "Coroutine[Any, Any, None] | None":
        """unlink(2) by a thread: drop a page. One that is gone already is well, unless the kernel cannot know that.

        Gives a coroutine only where something must be waited for.
        """
        handle = parse_page_name(name) or 0
        if parent == ROOT or name in HIDDEN or not 0 < handle <= MAX_HANDLE:
            raise NotPermitted(f"{os.fsdecode(name)!r} cannot be removed")
        id = backup_of(parent)
        backup = self.pool.backup(id)
        if self._bulk_drops and id in self._bulk_drops and not backup.holds(handle - 1):
            self.as_before_drop(inode(id, handle), pid, OPENING)  # the VFS looks the name up anew, and says ENOENT
        elif self.stale:
            self.stale.pop(pid, None)
        if not self._in_memory:
            return self._drop_later(parent, handle)
        backup.drop_range(handle - 1, handle)
        self._forget_extents(id, handle - 1, handle)
        return None

    async def _drop_later(self, parent: int, handle: int) -> None:
        backup = self.backup(parent)
        async with backup.locked():
            await backup.drop_range_in_thread(handle - 1, handle)
            self._forget_extents(backup_of(parent), handle - 1, handle)

    def _forget_extents(self, id: int, first: int, past: int) -> None:
        """Keep the listings under way from showing pages that were dropped, by range of indices."""
        for fh, (position, end, _) in list(self._extents.items()):
            if backup_of(fh) == id and first < end and position < past:
                del self._extents[fh]

    # --- files ---

    def open(self, ino: int, flags: int, pid: int = 0) -> int:
        """open(2) by a thread: a file handle. O_TRUNC comes as a truncation of its own (see the session's INIT)."""
        id, handle = split(ino)
        if handle == IMAGE:
            self.pool.backup(id).stat()
            if flags & os.O_APPEND:
                ino = inode(id, APPENDED)
        elif not self.pool.backup(id).holds(handle - 1):
            self.as_before_drop(ino, pid, OPENING)
        return _file_handle(ino, flags)

    async def open_text(self, ino: int, flags: int, uid: int) -> int:
        """open(2) of one of the mount's own files: a file handle."""
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise ReadOnlyEntry("this file can only be read")
        if ino not in self.texts:
            raise NoSuchName(f"there is no inode {ino}")
        return await self.texts.open(ino, uid)

    def as_before_drop(self, ino: int, pid: int, step: int) -> Attributes:
        """What a thread is told that asks by path for a page which is gone. PageDropped, but not twice in one call.

        After the first ESTALE the VFS looks the path up anew and asks once more; a second one would reach the caller.
        But a page that was found meanwhile, and has gone again, was there during the call. So what is asked for counts
        as done just before the page was dropped. (What comes by a descriptor is not preceded by looking up.)

        A call may take two requests, such as opening and truncating. Its steps ascend, so a step that does not belongs
        to a later call, which is told the truth.
        """
        told = self.stale.get(pid)
        if (
            not pid
            or not told
            or told.ino != ino
            or step < told.next_step
            or time.monotonic() > told.at + RETRY_SECONDS
        ):
            self.stale[pid] = Stale(ino, time.monotonic(), AFTER_LAST, 0)
            raise _dropped(handle_of(ino))
        self.stale[pid] = told._replace(next_step=step + 1)
        return self._page(self.backup(ino).stat())._replace(lasting=False)

    def note_lookup(self, pid: int, *, found: bool) -> None:
        """A thread has a path looked up. To be told while anything is `stale`.

        The VFS looks up a name that it knew, and if that is gone looks it up once more. So the second miss ends the
        call, or the page is made anew.
        """
        if not (told := self.stale.get(pid)):
            return
        if found:
            self.stale[pid] = told._replace(next_step=OPENING)
        elif not told.misses:
            self.stale[pid] = told._replace(next_step=AFTER_LAST, misses=1)
        else:
            del self.stale[pid]

    def check_access(self, ino: int, wanted: int, caller: Caller) -> None:
        """AccessDenied unless a caller may do what is wanted (R_OK, W_OK) by the mode of now.

        To be asked while there are `doubts`, before a file is opened or cut: then the kernel has decided by what it
        knew. It may know the old mode even after it was told, if it was just changing the page's size.
        """
        id = backup_of(ino)
        if id and id in self.doubts and not may(self.pool.backup(id).stat(), caller, wanted):
            raise AccessDenied("the backup's mode and owner of now do not allow it")

    def read(self, fh: int, offset: int, size: int) -> "bytes | Coroutine[Any, Any, bytes]":
        """read(2). Absent pages of an IMAGE are zeros; a page that was dropped raises PageDropped.

        Gives a coroutine in place of the bytes only where they must be waited for.
        """
        id, handle = split(fh)
        if not id:
            return self.texts.read(fh, offset, size)
        backup = self.pool.backup(id)
        if handle >= IMAGE:
            start = offset
        else:
            page_size = self.pool.page_size
            start, size = (handle - 1) * page_size + offset, max(0, min(size, page_size - offset))
        if backup.is_out(start, size):
            return self._read_later(backup, handle, start, size)
        return self._read_now(backup, handle, start, size)

    async def _read_later(self, backup: Backup, handle: int, start: int, size: int) -> bytes:
        await backup.bring_in(start, size)
        async with backup.locked():
            return self._read_now(backup, handle, start, size)

    def _read_now(self, backup: Backup, handle: int, start: int, size: int) -> bytes:
        data = backup.read(start, size) if size else b""
        if handle < IMAGE and (len(data) < len(self._zeros) or data == self._zeros):
            _check_page(backup, handle)  # else they can only be those of a page that is there
        return data

    def write(self, fh: int, offset: int, data: bytes, *, held: bool = False) -> "int | Coroutine[Any, Any, int]":
        """write(2): bytes stored, fewer than given where the page, the backup or the room ends.

        Gives a coroutine in place of the number only where something must be waited for. `held`: the data is counted.
        """
        if fh & SYNC:
            return self._write_out(fh, offset, data)
        id, handle = split(fh)
        backup, start = self.pool.backup(id), offset
        if handle < IMAGE:
            page_size = self.pool.page_size
            if offset >= page_size:
                raise OutOfBounds(f"a page ends at byte {page_size}")
            data, start = data[: page_size - offset], (handle - 1) * page_size + offset
        elif handle == APPENDED:  # where the kernel takes the end to be, which .shmem may have moved
            raise OutOfBounds("nothing can be appended to .image, which spans the whole backup")
        if not self._in_memory or backup.is_out(start, len(data), to_write=True):
            return self._write_later(backup, handle, start, data, held)
        return self._write_now(backup, handle, start, data)

    async def _write_later(self, backup: Backup, handle: int, start: int, data: bytes, held: bool) -> int:
        holding = self.pool.store.waiting.holding
        with contextlib.nullcontext() if held else holding(backup.stat().st_uid, len(data)):
            await backup.bring_in(start, len(data), to_write=True)
            if not self._in_memory:
                async with backup.locked():
                    if handle < IMAGE:
                        _check_page(backup, handle)
                    return await backup.write_in_thread(start, data)
        return self._write_now(backup, handle, start, data)

    def _write_now(self, backup: Backup, handle: int, start: int, data: bytes) -> int:
        if handle >= IMAGE:
            return backup.write(start, data)
        _check_page(backup, handle)
        return backup.overwrite(start, data)

    async def _write_out(self, fh: int, offset: int, data: bytes) -> int:
        """A write opened O_SYNC: stored, and pushed out of memory."""
        waiting, backup = self.pool.store.waiting, self.backup(fh)
        request = "write", fh, offset, zlib.crc32(data)
        with waiting.holding(backup.stat().st_uid, len(data)), self._progress(*request) as progress:
            if not progress.done:
                stored = self.write(fh & ~SYNC, offset, data, held=True)
                progress.reach(stored if isinstance(stored, int) else await stored)
            start = offset if handle_of(fh) >= IMAGE else (handle_of(fh) - 1) * self.pool.page_size + offset
            await backup.sync(start, progress.done)
            return progress.done

    def as_reader(self, fh: int, caller: Caller) -> int:
        """A file handle just opened to read, marked if its caller may not write there: nor may he sync then.

        The kernel keeps a file locked while it is synced, so that its writers wait.
        """
        found = self.backup(fh).stat() if backup_of(fh) else self.pool.store.stat()
        return fh if caller.uid == found.st_uid or may(found, caller, os.W_OK) else fh | READER

    async def sync(self, fh: int) -> None:
        """fsync(2): of a page, or of the IMAGE all pages, pushed out of memory to where they last."""
        if not backup_of(fh):
            return
        _check_syncs(fh)
        handle, page_size = handle_of(fh), self.pool.page_size
        if handle >= IMAGE:
            await self.backup(fh).sync(0, MAX_HANDLE * page_size)
        else:
            await self.backup(fh).sync((handle - 1) * page_size, page_size)

    async def sync_directory(self, fh: int) -> None:
        """fsync(2) of a directory: what was made, renamed and removed in it lasts."""
        if not self.pool.store.in_memory:
            _check_syncs(fh)
            await self.pool.store.sync(backup_of(fh) or None)

    async def truncate(self, ino: int, size: int, pid: int = 0) -> None:
        """truncate(2) by a thread: bytes of a page past `size` become zeros; pages of an IMAGE past it are dropped."""
        (id, handle), page_size = split(ino), self.pool.page_size
        if not id or not handle or handle == SHMEM:
            raise NotPermitted("this has no size to change")
        backup = self.pool.backup(id)
        if handle != IMAGE:
            if size > page_size:
                raise OutOfBounds(f"a page ends at byte {page_size}")
            await backup.bring_in((handle - 1) * page_size + size, page_size - size, to_write=True)
            async with backup.locked():
                _check_page(backup, handle)
                await backup.zero_anywhere(handle - 1, size)
            return
        await backup.bring_in(size, -size % page_size, to_write=True)  # zeroed, not dropped
        with self._progress("truncate", ino, size, pid) as progress:
            await backup.truncate(size, progress)
            self._forget_extents(id, size // page_size, MAX_HANDLE)
            await self._forget_dropped(id, size // page_size + 1, MAX_HANDLE, directory_locked=False)

    async def _forget_dropped(self, id: int, first: int, last: int, *, directory_locked: bool) -> None:
        """Have the kernel know that pages were dropped, by range of handles. To be awaited before that is answered.

        And before it is forgotten how far it got: whoever repeated it would drop what was stored meanwhile.
        """
        if self._cache.is_complete(id):  # else unlink(2) may be carried out again of a page that it has dropped
            self._bulk_drops.note(id)
        self._cache.forget(inode(id, 0))
        await self._cache.forget_pages(id, first, last, directory_locked=directory_locked)

    def change(self, ino: int, *, mode: int | None = None, uid: int | None = None, gid: int | None = None,
               atime_ns: int | None = None, mtime_ns: int | None = None) -> bool:  # fmt: skip
        """chmod(2), chown(2), utimensat(2). A page's mode and times are its backup's: changing them changes nothing.

        Gives whether pages have changed too. Then :meth:`forget_pages` is to be awaited before that is answered.
        """
        now = self.attributes(ino)
        new_owner = (uid is not None and uid != now.uid) or (gid is not None and gid != now.gid)
        if not stat.S_ISDIR(now.mode):
            if not backup_of(ino):
                raise NotPermitted("this file is the mount's own")
            if new_owner:
                raise NotPermitted("a page's owner is its backup's")
            return False
        times = None
        if atime_ns is not None or mtime_ns is not None:
            times = (now.atime_ns if atime_ns is None else atime_ns, now.mtime_ns if mtime_ns is None else mtime_ns)
        self.pool.store.change(
            backup_of(ino) or None,
            mode=None if mode is None else mode & 0o7777,
            uid=-1 if uid is None or uid == now.uid else uid,
            gid=-1 if gid is None or gid == now.gid else gid,
            times=times,
        )
        if not (id := backup_of(ino)):
            for text in TEXTS.values():
                self._cache.forget(text)
            return False
        if mode is not None or new_owner:
            self.doubts.note(id)
        return mode is not None or new_owner or times is not None

    async def forget_pages(self, ino: int) -> None:
        """Have the kernel ask anew for the attributes of all pages of a backup."""
        await self._cache.forget_pages(backup_of(ino))

    # --- listings ---

    def open_directory(self, ino: int) -> int:
        """opendir(3): a file handle."""
        self.attributes(ino)
        if backup_of(ino):  # a write changes its times, unknown to the kernel; tar compares them with those at the end
            self._cache.forget(ino)
        return with_serial(ino, next(self._serial))

    def listing(self, fh: int, start: int) -> Generator[Entry, None, None]:
        """The entries of an open directory from an offset on; 0 is the beginning. Take as many as are wanted.

        Offsets: 1 and 2 follow "." and "..", then comes 2 + handle, or 2 + id in the root, which ascend.
        """
        id = backup_of(fh)
        if start < 1:
            here = inode(id, 0) if id else ROOT
            yield b".", here, self.attributes(here), 1
        if start < 2:
            yield b"..", ROOT, self._attributes_of_own(ROOT), 2
        if id:
            yield from self._pages(fh, max(0, start - 2))
            return
        if start < 3:
            self.pool.store.look_around()
        for id in self.pool.store.ids_after(start - 2):
            try:
                found = self.pool.store.stat_by_name(id)
            except BackupEnded:  # it went meanwhile
                continue
            yield os.fsencode(self.pool.store.name_of(id)), inode(id, 0), _directory(found), 2 + id

    def _pages(self, fh: int, idx: int) -> Generator[Entry, None, None]:
        """The pages from an index on.

        The run of pages that the listing is in stays with the file handle for a second: looking for its end takes time
        in proportion to its length, and done at every call that would make listing quadratic.
        """
        id, backup = backup_of(fh), self.backup(fh)
        found = backup.stat()
        page, base = self._page(found), inode(id, 0)
        limit = min(found.st_size // self.pool.page_size, MAX_HANDLE)
        position, end, found_at = self._extents.get(fh, (0, 0, 0.0))
        while idx < limit:
            if not position <= idx < end or time.monotonic() > found_at + EXTENT_SECONDS:
                if (run := backup.extent(idx)) is None:
                    return
                (idx, end), found_at = run, time.monotonic()
            handle = idx + 1
            try:
                for handle in range(idx + 1, min(end, limit) + 1):
                    # page_name(), but for the call: a million entries are listed here
                    yield b"%d" % handle, base | handle, page, handle + 2
                handle = end + 1
            finally:  # also when the caller wants no more: then the entry of this handle was not taken
                self._cache.told_run(base | idx + 1, base | handle - 1)
                position = idx = handle - 1
                self._extents[fh] = position, end, found_at

    def close_directory(self, fh: int) -> None:
        """closedir(3)."""
        self._extents.pop(fh, None)

    def close(self, fh: int) -> None:
        """The last close(2) of a file."""
        if fh < FIRST_BACKUP:
            self.texts.close(fh)

    # --- extended attributes ---

    def get_xattr(self, ino: int, name: bytes, uid: int = 0) -> "bytes | Coroutine[Any, Any, bytes]":
        """getxattr(2). Raises NoSuchAttribute if there is none of that name, or it can only be set.

        Gives a coroutine in place of the bytes only for what can take long.
        """
        if (attribute := self._xattrs_at(ino).get(name)) and attribute.get:
            if attribute.private and uid not in (0, os.geteuid()):
                raise NotPermitted("only root and the user who mounted read this: it has names of others'")
            if inspect.iscoroutinefunction(attribute.get):
                return self._look(attribute.get, ino, uid)
            return str(attribute.get(self, ino)).encode()
        raise NoSuchAttribute(f"there is no attribute {os.fsdecode(name)!r} here")

    async def _look(self, get: "Callable[[Tree, int], Awaitable[object]]", ino: int, uid: int) -> bytes:
        looks = self.pool.store.waiting.looks
        async with looks.turn(uid), looks.limiter:
            return str(await get(self, ino)).encode()

    async def set_xattr(self, ino: int, name: bytes, value: bytes, caller: Caller) -> None:
        """setxattr(2), of the few attributes that can be set."""
        if not (attribute := self._xattrs_at(ino).get(name)):
            raise NotSupported(f"there is no attribute {os.fsdecode(name)!r} here, and none can be added")
        if not attribute.set:
            raise NotPermitted(f"{os.fsdecode(name)} can only be read")
        try:
            await attribute.set(self, ino, value.decode("ascii").strip(), caller)
        except ValueError as error:  # what no text, no size or no list of handles is
            raise InvalidArgument(f"{os.fsdecode(name)}: {error}") from None

    def remove_xattr(self, ino: int, name: bytes) -> None:
        """removexattr(2): none can be."""
        if name not in self._xattrs_at(ino):
            raise NoSuchAttribute(f"there is no attribute {os.fsdecode(name)!r} here")
        raise NotPermitted(f"{os.fsdecode(name)} cannot be removed")

    def _xattrs_at(self, ino: int) -> "dict[bytes, _Xattr]":
        if ino == ROOT:
            return _ROOT_XATTRS
        if not backup_of(ino) or handle_of(ino):
            return {}
        return _BACKUP_XATTRS if self.pool.store.counts_pages_by_room else _XATTRS_OF_LARGE_PAGES

    async def set_budget(self, _: int, value: str, caller: Caller) -> None:
        """Change what all backups together may hold."""
        if caller.uid not in (0, os.geteuid()):  # it is the memory of whoever mounted, whoever may write in the root
            raise NotPermitted("only root and the user who mounted change the budget")
        self.pool.resize(parse_size(value))

    async def set_backup_size(self, ino: int, value: str, _: Caller) -> None:
        """Change what a backup spans."""
        size = self.pool.whole_pages(parse_size(value))
        if size > MAX_HANDLE * self.pool.page_size:
            raise InvalidArgument(f"a backup has at most {MAX_HANDLE} pages")
        async with self.backup(ino).locked():
            self.backup(ino).resize(size)
        self._cache.forget(ino)  # its times
        await self._cache.grow(backup_of(ino), size)

    async def map(self, ino: int) -> str:
        """The handles of a backup's pages, as ranges. Pages can come and go while it is made."""
        work, text, reached = self.pool.store.waiting.turns.begin(), bytearray(), 0
        while True:
            async with self.locked(ino):
                for first, past in self.backup(ino).extents(reached):
                    text += format_ranges([(first + 1, past)]).encode() + b","
                    reached = past
                    if len(text) > XATTR_SIZE_MAX + 1:
                        raise TooLong(
                            f"the map has more than {XATTR_SIZE_MAX} bytes; use SEEK_DATA and SEEK_HOLE on .shmem"
                        )
                    if work.is_due():
                        break
                else:
                    return text[:-1].decode()
            await work.rest()

    async def pages(self, ino: int) -> int:
        """How many pages a backup holds."""
        return await self.backup(ino).count_pages()

    async def swapped(self, ino: int) -> int:
        """How many of a backup's pages are swapped out, or on a disk alone."""
        return await self.backup(ino).count_swapped()

    async def resident(self, ino: int) -> int:
        """How many of a backup's pages are in memory."""
        swapped = await self.swapped(ino)
        return max(0, await self.pages(ino) - swapped)

    async def drop_handles(self, ino: int, value: str, caller: Caller) -> None:
        """Drop the pages of ranges of handles."""
        work, parts, ranges = self.pool.store.waiting.turns.begin(), value.split(","), list[tuple[int, int]]()
        for n in range(0, len(parts), RANGES_AT_ONCE):
            ranges += parse_ranges(",".join(parts[n : n + RANGES_AT_ONCE]))
            if work.is_due():
                await work.rest()
        backup = self.backup(ino)
        if max(last for _, last in ranges) > (limit := backup.size // self.pool.page_size):
            raise InvalidArgument(f"the backup's last handle is {limit}")
        held = self.pool.store.waiting.holding(backup.stat().st_uid, RANGE_BYTES * len(value))
        with held, self._progress("drop", ino, value, caller.pid) as progress:
            begun, index = divmod(progress.done, 1 << HANDLE_BITS)  # the range that a daemon before was at, and where

            def reached(end: int) -> None:
                progress.reach((progress.done >> HANDLE_BITS << HANDLE_BITS) + end)

            for number, (first, last) in enumerate(ranges[begun:], begun + 1):
                await backup.drop_run(max(first - 1, index), last, reached)
                index = 0
                self._forget_extents(backup_of(ino), first - 1, last)
                progress.reach(number << HANDLE_BITS)
                if work.is_due():
                    await work.rest()
            lowest, highest = min(ranges)[0], max(last for _, last in ranges)
            await self._forget_dropped(backup_of(ino), lowest, highest, directory_locked=True)


class _Xattr(NamedTuple):
    """How an extended attribute is had and set; None where it is not. A setter's arguments: inode, text, who asks.

    What can take long is got by a coroutine function. What is `private` is for root and the user who mounted.
    """

    get: Callable[[Tree, int], object] | None
    set: Callable[[Tree, int, str, Caller], Awaitable[None]] | None = None
    private: bool = False


_ROOT_XATTRS = {
    b"user.ttmfs.bytes_avail": _Xattr(lambda *_: bytes_avail()),
    b"user.ttmfs.page_size": _Xattr(lambda tree, _: tree.pool.page_size),
    b"user.ttmfs.refusals": _Xattr(lambda tree, _: tree.refusals.text(), private=True),
    b"user.ttmfs.size": _Xattr(lambda tree, _: tree.pool.room().size, Tree.set_budget),
}

_BACKUP_XATTRS = {
    b"user.ttmfs.size": _Xattr(lambda tree, ino: tree.backup(ino).size, Tree.set_backup_size),
    b"user.ttmfs.pages": _Xattr(lambda tree, ino: tree.backup(ino).pages),
    b"user.ttmfs.resident": _Xattr(Tree.resident),
    b"user.ttmfs.swapped": _Xattr(Tree.swapped),
    b"user.ttmfs.map": _Xattr(Tree.map),
    b"user.ttmfs.drop": _Xattr(None, Tree.drop_handles),
}

_XATTRS_OF_LARGE_PAGES = {**_BACKUP_XATTRS, b"user.ttmfs.pages": _Xattr(Tree.pages)}
"""Where pages must be looked for to be counted."""


def _check_length(name: bytes) -> None:
    """Raise NameTooLong as other filesystems do, also for a name that could stand for nothing here."""
    if len(name) > NAME_MAX:
        raise NameTooLong(f"a name has at most {NAME_MAX} bytes")


def _check_no_dot(name: bytes) -> None:
    """Raise NotPermitted for a name in the root that no backup may have. (EINVAL would make mv blame a loop.)"""
    if name[:1] == b".":
        raise NotPermitted("names that begin with a dot are the mount's own")


def _check_page(backup: Backup, handle: int) -> None:
    """Raise PageDropped if a page is no more."""
    if not backup.holds(handle - 1):
        raise _dropped(handle)


def _dropped(handle: int) -> PageDropped:
    return PageDropped(f"handle {handle} holds no page any more")


def _check_syncs(fh: int) -> None:
    if fh & READER:
        raise AccessDenied("to sync a file takes the right to write it: its writers wait meanwhile")


def _directory(found: os.stat_result) -> Attributes:
    """The attributes of a directory with the mode, owner and times of a file or directory of the store."""
    return _attributes(stat.S_IFDIR | found.st_mode & 0o7777, 2, 0, 0, found)


def _file(found: os.stat_result, size: int, blocks: int) -> Attributes:
    """The attributes of a file within a backup whose file in the store is `found`."""
    return _attributes(stat.S_IFREG | found.st_mode & 0o666, 1, size, blocks, found)


def _attributes(mode: int, nlink: int, size: int, blocks: int, found: os.stat_result) -> Attributes:
    times = found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns
    return Attributes._make((mode, nlink, size, blocks, found.st_uid, found.st_gid, *times, True))


def _file_handle(ino: int, flags: int) -> int:
    return ino | SYNC if flags & os.O_DSYNC else ino  # O_SYNC includes O_DSYNC
