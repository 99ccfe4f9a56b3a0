"""The requests that the daemon answers itself: all that read and change pages, names, and what is told of them.

A handler gets a request's header and the whole message, and returns the body of the answer, or a coroutine for it if it
has to wait. The message is overwritten by the next request, so a coroutine has copied what it needs of it. What names,
attributes and pages mean is decided by the tree's nodes.

Concurrency: one thread. A handler that returns a body has run alone.
"""

import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeAlias

from ..errors import NotPermitted, XattrBufferTooSmall
from ..linux import fuse_protocol as fuse
from ..linux.fuse_protocol import Request
from ..linux.splice import FileRange
from ..stores.page_file import finished
from . import replies
from .directories import Created
from .directory_requests import DirectoryRequests
from .inodes import FIRST_BACKUP, ROOT
from .node import Answer, Attributes, Changes
from .page_cache import PageCache
from .tree import Tree
from .xattrs import get_xattr, set_xattr

__all__ = ["Kind", "PageRequests"]

HEADER = fuse.HEADER.size
WRITE_DATA = HEADER + fuse.WRITE_IN.size
CREATE_NAME = HEADER + fuse.CREATE_IN.size

Handler: TypeAlias = Callable[[Request, memoryview], Answer[bytes] | FileRange]


class Kind(NamedTuple):
    """A kind of request: its name in metrics and logs, and its handler."""

    name: str
    handler: Handler
    changes: bool = False
    """It changes something, so it is carried out once: its answer is noted before it is sent."""
    may_be_interrupted: bool = False
    """It changes nothing while it waits, so a signal to its caller may end it."""
    name_at: int = 0
    """Where the message has a name, for the log."""


class PageRequests:
    """The handlers of one mount."""

    def __init__(self, tree: Tree, page_cache: PageCache) -> None:
        self.tree = tree
        self.page_cache = page_cache
        self._page_size = tree.shared.pool.page_size
        self._retries = tree.shared.retries
        directories = DirectoryRequests(tree)
        self.kinds = {
            fuse.LOOKUP: Kind("lookup", self.lookup, name_at=HEADER),
            fuse.GETATTR: Kind("getattr", self.getattr),
            fuse.SETATTR: Kind("setattr", self.setattr, changes=True),
            fuse.MKNOD: Kind("mknod", self.mknod, changes=True, name_at=HEADER + fuse.MKNOD_IN.size),
            fuse.MKDIR: Kind("mkdir", self.mkdir, changes=True, name_at=HEADER + fuse.MKDIR_IN.size),
            fuse.UNLINK: Kind("unlink", self.unlink, changes=True, name_at=HEADER),
            fuse.RMDIR: Kind("rmdir", self.rmdir, changes=True, name_at=HEADER),
            fuse.RENAME: Kind("rename", self.rename, changes=True, name_at=HEADER + fuse.RENAME_IN.size),
            fuse.RENAME2: Kind("rename", self.rename, changes=True, name_at=HEADER + fuse.RENAME2_IN.size),
            fuse.OPEN: Kind("open", self.open, may_be_interrupted=True),
            fuse.READ: Kind("read", self.read, may_be_interrupted=True),
            fuse.WRITE: Kind("write", self.write, changes=True),
            fuse.RELEASE: Kind("release", self.release),
            fuse.FSYNC: Kind("fsync", self.fsync, may_be_interrupted=True),
            fuse.SETXATTR: Kind("setxattr", self.setxattr, changes=True, name_at=HEADER + fuse.SETXATTR_IN.size),
            fuse.GETXATTR: Kind(
                "getxattr", self.getxattr, may_be_interrupted=True, name_at=HEADER + fuse.GETXATTR_IN.size
            ),
            fuse.OPENDIR: Kind("opendir", directories.opendir),
            fuse.READDIR: Kind("readdir", directories.readdir),
            fuse.READDIRPLUS: Kind("readdir", directories.readdir),
            fuse.RELEASEDIR: Kind("releasedir", directories.releasedir),
            fuse.FSYNCDIR: Kind("fsyncdir", directories.fsyncdir, may_be_interrupted=True),
            fuse.CREATE: Kind("create", self.create, changes=True, name_at=CREATE_NAME),
            fuse.FALLOCATE: Kind("fallocate", self.fallocate, changes=True),
            fuse.LSEEK: Kind("lseek", self.lseek),
        }
        tree.shared.recent_requests.names = {opcode: kind.name for opcode, kind in self.kinds.items()}

    def _entry(self, found: tuple[int, Attributes]) -> bytes:
        return replies.entry(*found, self._page_size)

    # --- names and attributes ---

    def lookup(self, request: Request, message: memoryview) -> bytes:
        found = self.tree.directory(request.node).lookup(bytes(message[HEADER:-1]))
        self._retries.looked_up(request.pid, found=found is not None)
        return self._entry(found) if found else replies.NO_ENTRY

    def getattr(self, request: Request, message: memoryview) -> Answer[bytes]:
        ino = request.node
        if ROOT < ino < FIRST_BACKUP:
            return self._text_attr(ino)
        return replies.attr(ino, self.tree.node(ino).attributes(ino), self._page_size)

    async def _text_attr(self, ino: int) -> bytes:
        return replies.attr(ino, await self.tree.texts.latest_attributes(ino), self._page_size)

    def setattr(self, request: Request, message: memoryview) -> Answer[bytes]:
        valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid = fuse.SETATTR_IN.unpack_from(
            message, HEADER
        )

        def moment(given: int, now: int, seconds: int, ns: int) -> int | None:
            if valid & now:
                return time.time_ns()
            return _signed(seconds) * 10**9 + ns if valid & given else None

        wanted = Changes(
            size=size if valid & fuse.FATTR_SIZE else None,
            mode=mode if valid & fuse.FATTR_MODE else None,
            uid=uid if valid & fuse.FATTR_UID else None,
            gid=gid if valid & fuse.FATTR_GID else None,
            atime_ns=moment(fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, atime, atime_ns),
            mtime_ns=moment(fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, mtime, mtime_ns),
        )
        return self._changed(request, wanted, by_path=not valid & fuse.FATTR_FH)

    async def _changed(self, request: Request, wanted: Changes, *, by_path: bool) -> bytes:
        ino = request.node
        attributes = await self.tree.node(ino).change(ino, wanted, request, by_path=by_path)
        return replies.attr(ino, attributes, self._page_size)

    # --- making and removing ---

    def mkdir(self, request: Request, message: memoryview) -> Answer[bytes]:
        mode, _ = fuse.MKDIR_IN.unpack_from(message, HEADER)
        return self._made(request, bytes(message[HEADER + fuse.MKDIR_IN.size : -1]), mode)

    async def _made(self, request: Request, name: bytes, mode: int) -> bytes:
        return self._entry(await self.tree.directory(request.node).make_backup(name, mode, request))

    def rmdir(self, request: Request, message: memoryview) -> Answer[bytes]:
        return replies.empty(self.tree.directory(request.node).remove_backup(bytes(message[HEADER:-1])))

    def rename(self, request: Request, message: memoryview) -> Answer[bytes]:
        if request.opcode == fuse.RENAME2:
            new_parent, flags, _ = fuse.RENAME2_IN.unpack_from(message, HEADER)
            names = message[HEADER + fuse.RENAME2_IN.size : -1]
        else:
            (new_parent,), flags = fuse.RENAME_IN.unpack_from(message, HEADER), 0
            names = message[HEADER + fuse.RENAME_IN.size : -1]
        name, new_name = bytes(names).split(b"\0")
        old, new = self.tree.directory(request.node), self.tree.directory(new_parent)
        return replies.empty(old.rename(name, new, new_name, flags))

    def create(self, request: Request, message: memoryview) -> Answer[bytes]:
        flags, *_ = fuse.CREATE_IN.unpack_from(message, HEADER)
        self._retries.end_call(request.pid)
        made = self.tree.directory(request.node).create_page(bytes(message[CREATE_NAME:-1]), flags, request)
        return self._created(made) if isinstance(made, tuple) else self._created_later(made)

    def _created(self, made: Created) -> bytes:
        fh, ino, attributes = made
        return self._entry((ino, attributes)) + replies.opened(fh)

    async def _created_later(self, made: Coroutine[Any, Any, Created]) -> bytes:
        return self._created(await made)

    def mknod(self, request: Request, message: memoryview) -> Answer[bytes]:
        mode, *_ = fuse.MKNOD_IN.unpack_from(message, HEADER)
        if mode & 0o170000 not in (0, 0o100000):
            raise NotPermitted("a backup holds pages, not devices, pipes or sockets")
        name = bytes(message[HEADER + fuse.MKNOD_IN.size : -1])
        made = self.tree.directory(request.node).create_page(name, 0, None)
        return self._entry(made[1:]) if isinstance(made, tuple) else self._made_later(made)

    async def _made_later(self, made: Coroutine[Any, Any, Created]) -> bytes:
        return self._entry((await made)[1:])

    def unlink(self, request: Request, message: memoryview) -> Answer[bytes]:
        dropped = self.tree.directory(request.node).drop_page(bytes(message[HEADER:-1]), request.pid)
        return replies.empty(dropped) if dropped else b""

    # --- files ---

    def open(self, request: Request, message: memoryview) -> Answer[bytes]:
        flags, _ = fuse.OPEN_IN.unpack_from(message, HEADER)
        node = self.tree.node(request.node)
        fh = node.open(request.node, flags, request)
        return replies.opened(fh, node.backing()) if isinstance(fh, int) else self._opened_later(fh)

    async def _opened_later(self, fh: Coroutine[Any, Any, int]) -> bytes:
        return replies.opened(await fh)

    def read(self, request: Request, message: memoryview) -> Answer[bytes] | FileRange:
        fh, offset, size, flags, *_ = fuse.READ_IN.unpack_from(message, HEADER)
        if flags & fuse.READ_LOCKOWNER or request.node < FIRST_BACKUP:
            return self.tree.file(fh).read(fh, offset, size)
        return self._read_cached(request.node, fh, offset, size)

    async def _read_cached(self, ino: int, fh: int, offset: int, size: int) -> bytes:
        """Read for the kernel's page cache."""
        while True:
            data: bytes | FileRange = await finished(self.tree.file(fh).read(fh, offset, size))
            if self.page_cache.note(ino):  # nothing is awaited from the copy until the answer is sent
                return data if isinstance(data, bytes) else data.read()
            await self.page_cache.make_room()

    def write(self, request: Request, message: memoryview) -> Answer[bytes]:
        fh, offset, size, _, _, flags, _ = fuse.WRITE_IN.unpack_from(message, HEADER)
        data = message[WRITE_DATA : WRITE_DATA + size]
        stored = self.tree.file(fh).write(fh, offset, data, flags, request)
        return fuse.WRITTEN.pack(stored, 0) if isinstance(stored, int) else self._written_later(stored)

    async def _written_later(self, stored: Coroutine[Any, Any, int]) -> bytes:
        return fuse.WRITTEN.pack(await stored, 0)

    def lseek(self, request: Request, message: memoryview) -> bytes:
        _, offset, whence = fuse.LSEEK_IN.unpack_from(message, HEADER)
        return fuse.OFFSET.pack(self.tree.node(request.node).seek(request.node, offset, whence))

    def fallocate(self, request: Request, message: memoryview) -> Answer[bytes]:
        _, offset, length, mode = fuse.FALLOCATE_IN.unpack_from(message, HEADER)
        return replies.empty(self.tree.node(request.node).allocate(request.node, mode, offset, length, request))

    def fsync(self, request: Request, message: memoryview) -> Answer[bytes]:
        (fh,) = fuse.FSYNC_IN.unpack_from(message, HEADER)
        return replies.empty(self.tree.file(fh).sync(fh))

    def release(self, request: Request, message: memoryview) -> bytes:
        (fh,) = fuse.RELEASE_IN.unpack_from(message, HEADER)
        self.tree.file(fh).close(fh)
        return b""

    # --- extended attributes ---

    def getxattr(self, request: Request, message: memoryview) -> Answer[bytes]:
        room, _ = fuse.GETXATTR_IN.unpack_from(message, HEADER)
        name = bytes(message[HEADER + fuse.GETXATTR_IN.size : -1])
        return self._xattr(get_xattr(self.tree.node(request.node), name, request), room)

    async def _xattr(self, coming: Coroutine[Any, Any, bytes], room: int) -> bytes:
        value = await coming
        if not room:
            return fuse.XATTR_SIZE.pack(len(value), 0)
        if len(value) > room:
            raise XattrBufferTooSmall(f"the value has {len(value)} bytes")
        return value

    def setxattr(self, request: Request, message: memoryview) -> Answer[bytes]:
        size, flags = fuse.SETXATTR_IN.unpack_from(message, HEADER)
        name, _, value = bytes(message[HEADER + fuse.SETXATTR_IN.size :]).partition(b"\0")
        return replies.empty(set_xattr(self.tree.node(request.node), name, value[:size], flags, request))


def _signed(number: int) -> int:
    """A signed number of 64 bits that was read as an unsigned one."""
    return number - (number >> 63 << 64)
