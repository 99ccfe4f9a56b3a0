"""The pyfuse3 face: it translates between pyfuse3's types and the tree's, and does nothing else.

Every handler goes through one wrapper (:mod:`ttmfs.fuse.requests`).
"""

import errno
import itertools
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from contextlib import closing
from typing import Any, TypeAlias

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from ..errors import NotPermitted
from ..model.pool import NAME_MAX
from .directories import Created
from .inodes import FIRST_BACKUP, ROOT
from .kernel_cache import LIFETIME
from .node import Answer, Attributes, Changes
from .requests import Requests, handles_request
from .tree import Tree
from .xattrs import get_xattr, remove_xattr, set_xattr

__all__ = ["Operations"]

MOST_ENTRIES = 500
"""Most entries in one answer to a request for a listing, even if the caller has room for more."""

CreateAnswer: TypeAlias = tuple[FileInfo, EntryAttributes]


class Operations(pyfuse3.Operations):
    """The request handlers of one mount. ``init`` is called when the kernel's first request has come."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, tree: Tree, requests: Requests, *, init: Callable[[], None]) -> None:
        super().__init__()
        self.tree = tree
        self.pool = tree.shared.pool
        self.requests = requests
        self._retries = tree.shared.retries
        self._init = init
        # Used for every answer: pyfuse3 copies what it needs before anything else runs.
        self._answer = self._new_entry()
        self._answered: Attributes | None = None
        self._absent = EntryAttributes()  # inode 0: no such name
        self._absent.entry_timeout = self._absent.attr_timeout = 0.0
        self._file = FileInfo(direct_io=True, keep_cache=False)  # every read reaches the store; nothing is cached twice

    def init(self) -> None:
        self._init()

    def _new_entry(self) -> EntryAttributes:
        """A new answer, with the fields that are the same in every answer."""
        entry = EntryAttributes()
        entry.st_blksize = self.pool.page_size
        return entry

    def _entry(self, ino: int, attributes: Attributes) -> EntryAttributes:
        entry = self._answer
        if attributes != self._answered:
            self._fill(entry, attributes)
            self._answered = attributes
        entry.st_ino = ino
        return entry

    def _fill(self, entry: EntryAttributes, attributes: Attributes) -> None:
        (
            entry.st_mode, entry.st_nlink, entry.st_size, entry.st_blocks, entry.st_uid, entry.st_gid,
            entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns, cacheable,
        ) = attributes  # fmt: skip
        entry.entry_timeout = entry.attr_timeout = LIFETIME if cacheable else 0.0

    def _opened(self, fh: int) -> FileInfo:
        self._file.fh = fh
        return self._file

    def _created(self, created: Created) -> CreateAnswer:
        fh, ino, attributes = created
        return self._opened(fh), self._entry(ino, attributes)

    # --- names ---

    @handles_request
    def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        found = self.tree.directory(parent_inode).lookup(name)
        self._retries.looked_up(ctx.pid, found=found is not None)
        return self._entry(*found) if found else self._absent

    @handles_request
    def getattr(self, inode: int, ctx: RequestContext) -> Answer[EntryAttributes]:
        if ROOT < inode < FIRST_BACKUP:
            return self._text_entry(inode)
        return self._entry(inode, self.tree.node(inode).attributes(inode))

    async def _text_entry(self, inode: int) -> EntryAttributes:
        return self._entry(inode, await self.tree.texts.latest_attributes(inode))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing is kept for an inode. It is not wrapped: it must not raise, and the kernel expects no answer."""

    @handles_request
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        wanted = Changes(
            size=attr.st_size if fields.update_size else None,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._entry(inode, await self.tree.node(inode).change(inode, wanted, ctx, by_path=fh is None))

    @handles_request
    def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Asked only if the kernel does not check mode bits. Then root alone is let in, who may not execute files."""
        found = self.tree.node(inode).attributes(inode).mode  # raises if it is gone, though the kernel has its name
        return not mode & os.X_OK or stat.S_ISDIR(found)

    @handles_request
    def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self.tree.node(inode).target()

    # --- making and removing ---

    @handles_request
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(*await self.tree.directory(parent_inode).make_backup(name, mode, ctx))

    @handles_request
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self.tree.directory(parent_inode).remove_backup(name)

    @handles_request
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        old, new = self.tree.directory(parent_inode_old), self.tree.directory(parent_inode_new)
        await old.rename(name_old, new, name_new, flags)

    @handles_request
    def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> Answer[None]:
        return self.tree.directory(parent_inode).drop_page(name, ctx.pid)

    @handles_request
    def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> Answer[CreateAnswer]:
        self._retries.end_call(ctx.pid)
        made = self.tree.directory(parent_inode).create_page(name, flags, ctx)
        return self._created(made) if isinstance(made, tuple) else self._created_later(made)

    async def _created_later(self, made: Coroutine[Any, Any, Created]) -> CreateAnswer:
        return self._created(await made)

    @handles_request
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        if not stat.S_ISREG(mode):
            raise NotPermitted("a backup holds pages, not devices, pipes or sockets")
        made = self.tree.directory(parent_inode).create_page(name, 0, None)
        return self._created(made if isinstance(made, tuple) else await made)[1]

    @handles_request
    def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        raise NotPermitted("no links can be made here")

    @handles_request
    def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise NotPermitted("no links can be made here")

    # --- files ---

    @handles_request
    def open(self, inode: int, flags: int, ctx: RequestContext) -> Answer[FileInfo]:
        fh = self.tree.node(inode).open(inode, flags, ctx)
        return self._opened(fh) if isinstance(fh, int) else self._opened_later(fh)

    async def _opened_later(self, fh: Coroutine[Any, Any, int]) -> FileInfo:
        return self._opened(await fh)

    @handles_request
    def read(self, fh: int, off: int, size: int) -> Answer[bytes]:
        return self.tree.file(fh).read(fh, off, size)

    @handles_request
    def write(self, fh: int, off: int, buf: bytes) -> Answer[int]:
        return self.tree.file(fh).write(fh, off, buf)

    @handles_request
    def flush(self, fh: int) -> None:
        raise FUSEError(errno.ENOSYS)  # the kernel then sends no more of these, which saves a round trip a close

    @handles_request
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.tree.file(fh).sync(fh)

    @handles_request
    def release(self, fh: int) -> None:
        self.tree.file(fh).close(fh)

    # --- directories ---

    @handles_request
    def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self.tree.directory(inode).open_directory(inode, ctx)

    @handles_request
    def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        filled, last, reply = self._new_entry(), None, pyfuse3.readdir_reply
        with closing(self.tree.directory(fh).listing(fh, start_id)) as entries:
            for name, ino, attributes, next_id in itertools.islice(entries, MOST_ENTRIES):
                if attributes is not last:
                    self._fill(filled, attributes)
                    last = attributes
                filled.st_ino = ino
                if not reply(token, name, filled, next_id):
                    return

    @handles_request
    def releasedir(self, fh: int) -> None:
        self.tree.directory(fh).close(fh)

    @handles_request
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.tree.directory(fh).sync(fh)

    # --- statfs, and extended attributes ---

    @handles_request
    def statfs(self, ctx: RequestContext) -> StatvfsData:
        room, page_size = self.pool.room(ctx.uid), self.pool.page_size
        answer = StatvfsData()
        answer.f_bsize = answer.f_frsize = page_size
        answer.f_blocks = room.size // page_size
        answer.f_bfree = room.free // page_size
        answer.f_bavail = room.available // page_size
        answer.f_files = room.files
        answer.f_ffree = answer.f_favail = room.files_free
        answer.f_namemax = NAME_MAX
        return answer

    @handles_request
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        return await get_xattr(self.tree.node(inode), name, ctx)

    @handles_request
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await set_xattr(self.tree.node(inode), name, value, ctx)

    @handles_request
    def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return ()  # hidden, as in CephFS: a tool that copies all attributes would fail at these

    @handles_request
    def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        remove_xattr(self.tree.node(inode), name)
