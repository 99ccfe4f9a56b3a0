"""The two kinds of directory: the root, which holds backups, and a backup, which holds pages.

Repeated requests: two daemons may carry out one request, if the first dies before its answer is read. Before the
kernel asks for a change, it looks the name up under the directory's lock. So the kernel itself answers a true EEXIST or
ENOENT. Here these succeed: mkdir of an existing backup, rmdir and unlink of a missing name, and a rename that was
already done. create never changes an existing page. This is correct only under three conditions:

- Missing names have no lifetime in the kernel.
- Nothing is awaited between a change of names and its answer.
- rename has no flag except RENAME_NOREPLACE.

Concurrency: one thread. State is read anew after every `await`.
"""

import contextlib
import itertools
import os
import secrets
import stat
import time

from ..errors import (
    AccessDenied,
    BackupAbsent,
    BackupEnded,
    BackupExists,
    InvalidArgument,
    NoRoom,
    NotPermitted,
    OutOfBounds,
    WrongParent,
)
from ..handles import parse_page_name
from ..stores.page_file import finished
from .files import Image, Link, Pages, Shmem, page_dropped
from .inodes import (
    CONFIG,
    HANDLE_BITS,
    IMAGE,
    MAX_BACKUP_ID,
    MAX_HANDLE,
    ROOT,
    SHMEM,
    STATS,
    inode,
    with_serial,
)
from .listing import MOST_TOLD, Listing
from .node import Answer, Attributes, Changes, Node, Shared, check_length, check_syncs
from .path_retries import OPEN
from .permissions import OPENED_FOR, Caller, may
from .texts import Texts

__all__ = ["BackupDirectory", "Created", "Directory", "Root"]

RENAME_NOREPLACE = 1

TEXTS = {b".stats": STATS, b".config": CONFIG}
HIDDEN = {b".image": IMAGE, b".shmem": SHMEM}

RUN_SECONDS = 1.0
"""Age at which a listing looks up its run of pages again. It may show pages dropped through .shmem for this long."""

Found = tuple[int, Attributes]
"""The inode number and attributes of a name."""

Created = tuple[int, int, Attributes]
"""File handle, inode number and attributes of a file that was created and opened."""


class Directory(Node):
    """The operations of both kinds. It refuses those that only one kind supports."""

    __slots__ = ()

    _serial = itertools.count(secrets.randbits(HANDLE_BITS))
    """Numbers open directories. Those that an earlier daemon opened are still open, so the first number is random."""

    def lookup(self, name: bytes) -> Found | None:
        """The inode number and attributes of a name; None if there is no such name."""
        raise NotImplementedError

    def entries(self, fh: int, start: int, listing: Listing) -> None:
        """Add the entries after "." and "..", from an offset of 2 or more on. Offsets are 2 + id, or 2 + handle."""
        raise NotImplementedError

    async def make_backup(self, name: bytes, mode: int, caller: Caller) -> Found:
        """mkdir(2)."""
        check_length(name)
        raise NotPermitted("a backup holds pages, not directories")

    async def remove_backup(self, name: bytes) -> None:
        """rmdir(2)."""
        raise NotPermitted("a backup holds no directories")

    async def rename(self, name: bytes, new_parent: "Directory", new_name: bytes, flags: int) -> None:
        """renameat2(2)."""
        raise NotImplementedError

    def create_page(self, name: bytes, flags: int, caller: Caller | None) -> Answer[Created]:
        """open(2) with O_CREAT, or mknod(2)."""
        check_length(name)
        _refuse_dot(name)
        raise NotPermitted("the root holds backups, not files: make one with mkdir")

    def drop_page(self, name: bytes, pid: int) -> Answer[None]:
        """unlink(2) by a thread."""
        raise NotPermitted(f"{os.fsdecode(name)!r} cannot be removed; it ends with its directory")

    async def change(self, ino: int, wanted: Changes, caller: Caller, *, by_path: bool) -> Attributes:
        """chmod(2), chown(2), utimensat(2), of the backup's file or the store's directory."""
        cache = self.shared.cache
        if wanted.size is not None:
            raise NotPermitted("this has no size to change")
        times, (_, mode, uid, gid, atime_ns, mtime_ns) = None, wanted
        async with self.pool.file(self.id).locked() if self.id else contextlib.nullcontext():
            now = self.attributes(ino)
            if atime_ns is not None or mtime_ns is not None:
                times = (now.atime_ns if atime_ns is None else atime_ns, now.mtime_ns if mtime_ns is None else mtime_ns)
            changes_access = mode is not None or wanted.owner_differs(now)
            self.pool.change(
                self.id or None,
                mode=None if mode is None else mode & 0o7777,
                uid=-1 if uid is None or uid == now.uid else uid,
                gid=-1 if gid is None or gid == now.gid else gid,
                times=times,
            )
            if self.id and changes_access:
                self.shared.mode_changes.note(self.id)
            attributes = self.attributes(ino)
        if not self.id:
            for text in TEXTS.values():
                cache.expire(text)
        elif changes_access or times is not None:
            await cache.expire_pages(self.id)
        return attributes

    def open_directory(self, ino: int, caller: Caller) -> int:
        """opendir(3): a file handle."""
        self.stat()  # raises BackupEnded
        if self.id:  # the kernel does not know times that writes changed; tar compares them at the end
            self.shared.cache.expire(ino)
        fh = with_serial(ino, next(self._serial))
        return fh if self.pool.in_memory else self.marked_if_reader(fh, caller)

    def listing(self, fh: int, start: int, listing: Listing) -> None:
        """Add the entries of an open directory from an offset on, as many as there is room for."""
        here = inode(self.id, 0) or ROOT
        if start < 1 and not listing.add(b".", here, self.attributes(here), 1):
            return
        if start < 2:
            root = Attributes.of_directory(self.pool.files.stat(), 2 + self.pool.files.count)
            if not listing.add(b"..", ROOT, root, 2):
                return
        self.entries(fh, max(start, 2), listing)

    async def sync(self, fh: int) -> None:
        """fsync(2): write the names that were made, changed and removed in it to the disk."""
        if not self.pool.in_memory:
            check_syncs(fh)
            await self.pool.sync(self.id or None)


class Root(Directory):
    """The root of the mount: it holds the backups and, hidden, the mount's texts."""

    def __init__(self, shared: Shared, texts: Texts) -> None:
        super().__init__(shared)
        self._texts = texts

    def attributes(self, ino: int) -> Attributes:
        return Attributes.of_directory(self.stat(), 2 + self.pool.files.count)

    def lookup(self, name: bytes) -> Found | None:
        if ino := TEXTS.get(name):
            return ino, self._texts.looked_up(ino)
        with contextlib.suppress(BackupAbsent):
            id = self.pool.files.find(os.fsdecode(name))
            return inode(id, 0), Attributes.of_directory(self.pool.file(id).stat())
        check_length(name)
        return None

    def entries(self, fh: int, start: int, listing: Listing) -> None:
        """The backups, in the order in which they were made."""
        files = self.pool.files
        if start < 3:
            files.scan_if_shared()
        for id in files.ids_after(start - 2):
            with contextlib.suppress(BackupEnded):  # it was removed meanwhile
                attributes = Attributes.of_directory(files.stat(id))
                if not listing.add(os.fsencode(files.name_of(id)), inode(id, 0), attributes, 2 + id):
                    return

    async def make_backup(self, name: bytes, mode: int, caller: Caller) -> Found:
        """A backup of the pool's backup_size. An existing one is returned as it is."""
        check_length(name)
        _refuse_dot(name)
        root, gid = self.stat(), caller.gid
        if root.st_mode & stat.S_ISGID:  # every filesystem passes the group down the tree
            gid, mode = root.st_gid, mode | stat.S_ISGID
        size = min(self.pool.backup_size, MAX_HANDLE * self.pool.page_size)
        try:
            backup = await self.pool.create(os.fsdecode(name), size, mode=mode & 0o7777, uid=caller.uid, gid=gid)
        except BackupExists:
            if found := self.lookup(name):
                return found
            raise  # a file that is not a backup has the name
        if (id := self.pool.files.find(os.fsdecode(name))) > MAX_BACKUP_ID:
            await backup.fini()
            raise NoRoom(f"all {MAX_BACKUP_ID} inode numbers for backups are used up; mount anew")
        return inode(id, 0), Attributes.of_directory(backup.file.stat())

    async def remove_backup(self, name: bytes) -> None:
        """End an empty backup. A missing one is a success."""
        with contextlib.suppress(BackupAbsent):
            await self.pool.remove(os.fsdecode(name))

    async def rename(self, name: bytes, new_parent: Directory, new_name: bytes, flags: int) -> None:
        _check_rename(new_name, flags)
        if name in TEXTS or new_parent is not self:
            raise NotPermitted("a backup can only be renamed, within the mount's root")
        _refuse_dot(new_name)
        try:
            await self.pool.rename(os.fsdecode(name), os.fsdecode(new_name), replace=not flags & RENAME_NOREPLACE)
        except BackupAbsent:
            await self.pool.open(os.fsdecode(new_name))


class BackupDirectory(Directory):
    """A backup: it holds pages by handle and, hidden, its image and its file in the store."""

    __slots__ = ("backup", "image", "pages", "shmem")

    def __init__(self, shared: Shared, id: int) -> None:
        super().__init__(shared, id)
        self.backup = shared.pool.file(id)  # a PageFile: the mount uses no model.Backup
        self.pages, self.image = Pages(shared, id), Image(shared, id)
        backing = shared.backing
        self.shmem = Shmem(shared, id, backing) if backing and backing.work() else Link(shared, id)

    def attributes(self, ino: int) -> Attributes:
        return Attributes.of_directory(self.backup.stat())

    def lookup(self, name: bytes) -> Found | None:
        if handle := HIDDEN.get(name):
            if handle == SHMEM and not self.shared.offers_shmem:
                return None
            ino = inode(self.id, handle)
            return ino, (self.image if handle == IMAGE else self.shmem).attributes(ino)
        handle = parse_page_name(name) or 0
        if not 0 < handle <= MAX_HANDLE or not self.backup.holds(handle - 1):
            check_length(name)
            return None
        found = self.backup.stat()
        if handle * self.pool.page_size > found.st_size:  # a program may have shortened the file through .shmem
            return None
        ino = inode(self.id, handle)
        self.shared.cache.note_page(ino)
        return ino, self.pages.attributes_of(found)

    def entries(self, fh: int, start: int, listing: Listing) -> None:
        backup, runs, base, idx = self.backup, self.shared.runs, inode(self.id, 0), start - 2
        found = backup.stat()
        page = self.pages.attributes_of(found)
        limit = min(found.st_size // self.pool.page_size, MAX_HANDLE)
        position, end, found_at = runs.get(fh, (0, 0, 0.0))
        while idx < limit:
            if not position <= idx < end or time.monotonic() > found_at + RUN_SECONDS:
                if (run := backup.extent(idx)) is None:
                    return
                (idx, end), found_at = run, time.monotonic()
            past = min(end, limit)
            position = listing.add_pages(base, idx + 1, past + 1, page) - 1
            if listing.plus and idx < MOST_TOLD:
                self.shared.cache.note_pages(base | idx + 1, base | min(position, MOST_TOLD))
            runs[fh] = position, end, found_at
            if position < past:  # no more room
                return
            idx = position

    def close(self, fh: int) -> None:
        self.shared.runs.pop(fh, None)

    async def rename(self, name: bytes, new_parent: Directory, new_name: bytes, flags: int) -> None:
        _check_rename(new_name, flags)
        if name in HIDDEN:
            raise NotPermitted(f"{os.fsdecode(name)} belongs to its backup")
        raise WrongParent("a page stays at its index; copy it")

    def create_page(self, name: bytes, flags: int, caller: Caller | None) -> Answer[Created]:
        """open(2) with O_CREAT: store a page of zeros unless there is a page.

        The kernel has checked only the right to create, but the file handle gives access to what is stored there later.
        So `caller` needs the rights that open(2) of the page needs. None stands for mknod(2), which opens nothing.
        """
        check_length(name)
        handle = parse_page_name(name)
        if not handle:
            raise InvalidArgument(f"{os.fsdecode(name)!r} is not a handle: pages are named 1, 2, 3 and so on")
        if handle > MAX_HANDLE:
            raise OutOfBounds(f"the largest handle is {MAX_HANDLE}")
        if caller and caller.uid and not may(self.backup.stat(), caller, OPENED_FOR[flags & os.O_ACCMODE]):
            raise AccessDenied("the backup's mode does not allow its pages to be opened like this")
        if not self.pool.in_memory:
            return self._create_on_disk(handle)
        self.backup.create_page(handle - 1)
        return self._created(handle)

    async def _create_on_disk(self, handle: int) -> Created:
        async with self.backup.locked():
            await finished(self.backup.create_page(handle - 1))
            return self._created(handle)

    def _created(self, handle: int) -> Created:
        ino = inode(self.id, handle)
        self.shared.cache.note_page(ino)
        return ino, ino, self.pages.attributes_of(self.backup.stat())

    def drop_page(self, name: bytes, pid: int) -> Answer[None]:
        """A missing page is a success, unless a bulk drop removed it while the kernel may still have its name.

        Then the answer is ESTALE: the VFS looks the name up anew, and its caller gets ENOENT.
        """
        handle = parse_page_name(name) or 0
        if not 0 < handle <= MAX_HANDLE:
            raise NotPermitted(f"{os.fsdecode(name)!r} cannot be removed; it ends with its directory")
        if self.id in self.shared.bulk_drops and not self.backup.holds(handle - 1):
            ino = inode(self.id, handle)
            if not self.shared.retries.forgives(ino, pid, OPEN):
                raise page_dropped(ino)
        else:
            self.shared.retries.end_call(pid)
        if not self.pool.in_memory:
            return self._drop_on_disk(handle)
        self.backup.drop_range(handle - 1, handle)
        self.shared.runs.forget_dropped(self.id, handle - 1, handle)
        return None

    async def _drop_on_disk(self, handle: int) -> None:
        async with self.backup.locked():
            await finished(self.backup.drop_range(handle - 1, handle))
            self.shared.runs.forget_dropped(self.id, handle - 1, handle)


def _check_rename(new_name: bytes, flags: int) -> None:
    check_length(new_name)
    if flags & ~RENAME_NOREPLACE:
        raise InvalidArgument("RENAME_NOREPLACE is the only flag of rename that ttmfs supports")


def _refuse_dot(name: bytes) -> None:
    """Raise NotPermitted for a name that no backup may have. (EINVAL would make mv blame a loop.)"""
    if name[:1] == b".":
        raise NotPermitted("names that begin with a dot are the mount's own")
