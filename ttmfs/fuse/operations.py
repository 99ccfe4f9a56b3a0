"""The pyfuse3 face: it translates between pyfuse3's types and the tree's.

Every handler goes through one wrapper, which turns the model's errors into errno, counts, times and logs. An unforeseen
exception is EIO to the caller and a traceback in the log; the mount lives on. (Anything but FUSEError that left a
handler would end pyfuse3's loop and with it the mount.) The wrapper also notes in the state which request is carried
out, so that one of which daemons die is refused in the end (:mod:`ttmfs.recovery.state`).
"""

import errno
import inspect
import itertools
import logging
import os
import stat
import time
import zlib
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, closing
from functools import wraps
from types import CoroutineType
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, overload

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from ..errors import NotPermitted, PageDropped, StoreFailed, TtmfsError, errno_of
from ..model.pool import NAME_MAX, Pool
from ..recovery.state import LATEST, POINTS, State, identity
from .inodes import FIRST_BACKUP, IMAGE, ROOT, backup_of, handle_of
from .kernel_cache import LIFETIME
from .metrics import Metrics
from .permissions import Caller
from .tree import CHANGING, WANTED, Attributes, Tree

__all__ = ["Operations"]

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Created: TypeAlias = tuple[FileInfo, EntryAttributes]
Handler: TypeAlias = Callable[Concatenate["Operations", P], T]

CONDEMNED = 4
"""Points against a request (see the state) with which it is not carried out again: two daemons died of it by a fault or
for want of memory, or four were killed at it, which may have been no fault of its."""

MOST_ENTRIES = 500
"""How many entries a request for a listing is answered with at most, whatever room the caller has for them."""

TEXT_GROWTH = 1 << 16
"""Bytes by which a text of the mount's own may be longer than the one before."""

CHANGES = {"create", "unlink", "write"}
"""Handlers that take the lock of a backup themselves. All others that wait for nothing look, and change nothing."""

SUSPECT_SECONDS = 10.0
"""So long after its start a daemon thinks of what the one before may have died of."""


@overload
def guarded(handler: "Handler[P, Coroutine[Any, Any, T]]") -> "Handler[P, Coroutine[Any, Any, T]]": ...
@overload
def guarded(handler: "Handler[P, T | Coroutine[Any, Any, T]]") -> "Handler[P, Coroutine[Any, Any, T]]": ...
def guarded(handler: "Handler[..., Any]") -> "Handler[..., Coroutine[Any, Any, Any]]":
    """The wrapper round every operation. What a handler gives is its answer, or a coroutine if that takes waiting."""
    name, clock = handler.__name__, time.perf_counter_ns
    kind = zlib.crc32(name.encode())
    telling = len(inspect.signature(handler).parameters) > 2  # two arguments tell a request from others of its kind
    looks = telling and not inspect.iscoroutinefunction(handler) and name not in CHANGES

    @wraps(handler)
    async def operation(self: "Operations", *arguments: Any) -> Any:
        start, notes, suspects = clock(), self._notes, self._suspects
        note = identity(kind, arguments[0], arguments[1]) if telling else kind << POINTS.bit_length()
        try:
            if suspects:
                note = self._admitted(name, note)
            notes[0] = note  # until it waits no other handler runs
            try:
                if self._locks is not None and looks and (id := backup_of(arguments[0])) in self._locks:
                    notes[0] = 0
                    answer = await self._waited_for(self._in_lock(self._locks.locked(id), handler, arguments), note)
                else:
                    answer = handler(self, *arguments)
            finally:
                notes[0] = 0
            return await self._waited_for(answer, note) if isinstance(answer, CoroutineType) else answer
        except FUSEError:
            raise
        except TtmfsError as error:
            raise FUSEError(self.refused(name, error, arguments)) from None
        except Exception as error:
            self.unforeseen(name, error, arguments)
            raise FUSEError(errno.EIO) from None
        finally:
            if suspects:
                self._acquit(note)
            values, (total, buckets), took = self._values, self._places[name], clock() - start
            values[total] += took
            values[buckets[took.bit_length()]] += 1
            if self.debug:
                log.debug("%s%s", name, _brief(name, arguments))

    return operation


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid)


def _brief(operation: str, arguments: tuple[Any, ...]) -> str:
    """The arguments of a handler for the log, page contents left out."""

    def brief(argument: Any) -> str:
        if isinstance(argument, RequestContext):
            return f"pid={argument.pid}"
        if isinstance(argument, bytes) and (operation == "write" or len(argument) > NAME_MAX):
            return f"<{len(argument)} bytes>"
        return repr(argument) if isinstance(argument, int | bytes | None) else type(argument).__name__

    return f"({', '.join(map(brief, arguments))})"


class Operations(pyfuse3.Operations):
    """The request handlers of one mount. ``init`` is called when the kernel's first request has come."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        tree: Tree,
        pool: Pool,
        metrics: Metrics,
        state: State,
        *,
        init: Callable[[], None],
        debug: bool,
        suspects: dict[int, int],
    ) -> None:
        super().__init__()
        self.tree = tree
        self.pool = pool
        self.metrics = metrics
        self.debug = debug
        self.under_way = 0  # handlers that wait for something
        self._notes = state.notes  # what is being carried out: slot 0 for what waits for nothing
        self._values, self._places = metrics.values, metrics.places
        self._slots = list(range(1, LATEST))
        self._suspects = suspects  # requests that daemons died of, perhaps
        self._suspected_until = time.monotonic() + SUSPECT_SECONDS
        # Whoever looks at a backup that a thread is changing waits for its lock. None: no thread changes anything.
        self._locks = None if pool.store.in_memory else pool.store.waiting.files
        self._init = init
        self._logged: set[tuple[str, object]] = set()
        # Used for every answer: pyfuse3 copies what it needs before anything else runs.
        self._answer = self._lasting_entry()
        self._answered: Attributes | None = None
        self._absent = EntryAttributes()  # inode 0: there is none
        self._absent.entry_timeout = self._absent.attr_timeout = 0.0
        self._file = FileInfo(direct_io=True, keep_cache=False)  # every read reaches the store, nothing is kept twice

    def init(self) -> None:
        self._init()

    def refused(self, operation: str, error: TtmfsError, arguments: tuple[Any, ...] = ()) -> int:
        """The errno for an error of the model, counted, and logged if someone should look at it."""
        number = errno_of(error)
        self.metrics.count_error(operation, number)
        self.tree.refusals.note(operation, number, error, arguments[-1] if arguments else None)
        cause = operation, getattr(error.__cause__, "errno", None)  # not the text: names in it are the caller's choice
        if isinstance(error, StoreFailed) and cause not in self._logged:
            self._logged.add(cause)
            log.error("%s; callers of %s get EIO (said once)", error, operation)
        elif self.debug:
            log.debug("%s: %s: %s", operation, errno.errorcode[number], error)
        return number

    def unforeseen(self, operation: str, error: Exception, arguments: tuple[Any, ...]) -> None:
        """Log an exception that nobody foresaw, once for each place that it comes from, lest a caller fill the log."""
        self.metrics.count_error(operation, errno.EIO)
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        place = operation, trace and (trace.tb_frame.f_code, trace.tb_lineno)
        if place not in self._logged:
            self._logged.add(place)
            log.exception(
                "%s%s failed unforeseen; callers get EIO (said once)", operation, _brief(operation, arguments)
            )

    def _admitted(self, operation: str, request: int) -> int:
        """The note of a request with what speaks against it. FUSEError(EIO) for one that daemons have died of."""
        if time.monotonic() > self._suspected_until:
            self._suspects.clear()
        points = self._suspects.get(request, 0)
        if points >= CONDEMNED:
            self.metrics.count_error(operation, errno.EIO)
            if (operation, request) not in self._logged:
                self._logged.add((operation, request))
                log.error(
                    "a request for %s is refused: the daemons died that carried it out. Its caller gets EIO", operation
                )
            raise FUSEError(errno.EIO)
        return request | points

    def _acquit(self, request: int) -> None:
        """Forget what speaks against a request that was carried out, and no one died."""
        if self._suspects.get(request & ~POINTS, 0) < CONDEMNED:
            self._suspects.pop(request & ~POINTS, None)

    async def _waited_for(self, answer: "Coroutine[Any, Any, T]", note: int) -> T:
        """The answer of a handler that waits for something, and may be one of many that do."""
        self.under_way += 1
        slot = self._slots.pop()
        self._notes[slot], self._notes[LATEST] = note, slot
        try:
            return await answer
        finally:
            self._notes[slot] = 0
            self._slots.append(slot)
            self.under_way -= 1

    async def _in_lock(
        self, lock: AbstractAsyncContextManager[None], handler: "Handler[..., T]", arguments: tuple[Any, ...]
    ) -> T:
        """The answer of a handler that looks at a backup which a thread is changing."""
        async with lock:
            return handler(self, *arguments)

    def _lasting_entry(self) -> EntryAttributes:
        """An answer to fill, with what is the same in all of them."""
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

    def _created(self, fh: int, ino: int, attributes: Attributes) -> Created:
        return self._opened(fh), self._entry(ino, attributes)

    async def _created_later(self, made: Coroutine[Any, Any, tuple[int, int, Attributes]]) -> Created:
        return self._created(*await made)

    def _opened(self, fh: int) -> FileInfo:
        self._file.fh = fh
        return self._file

    def _fill(self, entry: EntryAttributes, attributes: Attributes) -> None:
        (
            entry.st_mode, entry.st_nlink, entry.st_size, entry.st_blocks, entry.st_uid, entry.st_gid,
            entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns, lasting,
        ) = attributes  # fmt: skip
        entry.entry_timeout = entry.attr_timeout = LIFETIME if lasting else 0.0

    # --- names ---

    @guarded
    def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        found = self.tree.lookup(parent_inode, name)
        if self.tree.stale:
            self.tree.note_lookup(ctx.pid, found=found is not None)
        if not found:
            return self._absent
        return self._entry(*found) if found[0] > FIRST_BACKUP else self._text_name(*found)

    def _text_name(self, ino: int, attributes: Attributes) -> EntryAttributes:
        """The answer for a name of the mount's own: the text that is opened next may be longer than the last.

        sendfile(2) reads as far as the size that the kernel knows, or a short read shows; stat(2) asks for it anew.
        """
        entry = self._lasting_entry()
        self._fill(entry, attributes)
        entry.st_ino, entry.st_size, entry.entry_timeout = ino, attributes.size + TEXT_GROWTH, 0.0
        return entry

    @guarded
    def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes | Coroutine[Any, Any, EntryAttributes]:
        if ROOT < inode < FIRST_BACKUP:
            return self._text_entry(inode)
        return self._entry(inode, self.tree.attributes(inode))

    async def _text_entry(self, inode: int) -> EntryAttributes:
        return self._entry(inode, await self.tree.attributes_of_text(inode))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing is kept for an inode; unguarded, since it must not raise and answers no one."""

    @guarded
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        try:
            if fields.update_size:
                if self.tree.doubts and fh is None:
                    self.tree.check_access(inode, os.W_OK, _caller(ctx))
                await self.tree.truncate(inode, attr.st_size, ctx.pid)
            async with self.tree.locked(inode):
                pages_too = self.tree.change(
                    inode,
                    mode=attr.st_mode if fields.update_mode else None,
                    uid=attr.st_uid if fields.update_uid else None,
                    gid=attr.st_gid if fields.update_gid else None,
                    atime_ns=attr.st_atime_ns if fields.update_atime else None,
                    mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
                )
                attributes = self.tree.attributes(inode)
            if pages_too:
                await self.tree.forget_pages(inode)
        except PageDropped:
            if fh is not None:
                raise
            attributes = self.tree.as_before_drop(inode, ctx.pid, CHANGING)
        return self._entry(inode, attributes)

    @guarded
    def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Asked where the kernel does not look at mode bits itself: of root, who may do all but run what no one may."""
        found = self.tree.attributes(inode).mode  # of what is there: the name may have a lifetime yet
        return not mode & os.X_OK or stat.S_ISDIR(found)

    @guarded
    def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self.tree.target(inode)

    # --- making and removing ---

    @guarded
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(*await self.tree.make_backup(parent_inode, name, mode, ctx.uid, ctx.gid))

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self.tree.remove_backup(parent_inode, name)

    @guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        await self.tree.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    @guarded
    def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> "Coroutine[Any, Any, None] | None":
        return self.tree.drop_page(parent_inode, name, ctx.pid)

    @guarded
    def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> "Created | Coroutine[Any, Any, Created]":
        if self.tree.stale:
            self.tree.stale.pop(ctx.pid, None)  # the call comes to its end: the page is made anew
        made = self.tree.create_page(parent_inode, name, flags, _caller(ctx) if ctx.uid else None)
        return self._created(*made) if isinstance(made, tuple) else self._created_later(made)

    @guarded
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        if not stat.S_ISREG(mode):
            raise NotPermitted("a backup holds pages, no devices, pipes or sockets")
        made = self.tree.create_page(parent_inode, name, 0)
        _, ino, attributes = made if isinstance(made, tuple) else await made
        return self._entry(ino, attributes)

    @guarded
    def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        raise NotPermitted("no links can be made here")

    @guarded
    def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise NotPermitted("no links can be made here")

    # --- files ---

    @guarded
    def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo | Coroutine[Any, Any, FileInfo]:
        if inode < FIRST_BACKUP:
            return self._open_text(inode, flags, ctx.uid)
        if self.tree.doubts:
            self.tree.check_access(inode, WANTED[flags & os.O_ACCMODE], _caller(ctx))
        fh = self.tree.open(inode, flags, ctx.pid)
        if not flags & os.O_ACCMODE and (self._locks is not None or handle_of(inode) == IMAGE):
            fh = self.tree.as_reader(fh, _caller(ctx))
        return self._opened(fh)

    async def _open_text(self, inode: int, flags: int, uid: int) -> FileInfo:
        return self._opened(await self.tree.open_text(inode, flags, uid))

    @guarded
    def read(self, fh: int, off: int, size: int) -> bytes | Coroutine[Any, Any, bytes]:
        return self.tree.read(fh, off, size)

    @guarded
    def write(self, fh: int, off: int, buf: bytes) -> int | Coroutine[Any, Any, int]:
        return self.tree.write(fh, off, buf)

    @guarded
    def flush(self, fh: int) -> None:
        raise FUSEError(errno.ENOSYS)  # the kernel asks no more: a close is a round trip less

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.tree.sync(fh)

    @guarded
    def release(self, fh: int) -> None:
        self.tree.close(fh)

    # --- directories ---

    @guarded
    def opendir(self, inode: int, ctx: RequestContext) -> int:
        fh = self.tree.open_directory(inode)
        return fh if self._locks is None else self.tree.as_reader(fh, _caller(ctx))

    @guarded
    def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        filled, last, reply = self._lasting_entry(), None, pyfuse3.readdir_reply
        with closing(self.tree.listing(fh, start_id)) as entries:
            for name, ino, attributes, next_id in itertools.islice(entries, MOST_ENTRIES):
                if attributes is not last:
                    self._fill(filled, attributes)
                    last = attributes
                filled.st_ino = ino
                if not reply(token, name, filled, next_id):
                    return

    @guarded
    def releasedir(self, fh: int) -> None:
        self.tree.close_directory(fh)

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.tree.sync_directory(fh)

    # --- the whole, and extended attributes ---

    @guarded
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

    @guarded
    def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes | Coroutine[Any, Any, bytes]:
        return self.tree.get_xattr(inode, name, ctx.uid)

    @guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self.tree.set_xattr(inode, name, value, _caller(ctx))

    @guarded
    def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return ()  # hidden, as CephFS' virtual ones are: a tool that copies all it finds would fail at them

    @guarded
    def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self.tree.remove_xattr(inode, name)
