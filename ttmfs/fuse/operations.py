"""The pyfuse3 face: the few requests that the reading loop leaves to pyfuse3. It translates types, and nothing else.

They change nothing, and wait for nothing. Their answers are small (see :mod:`ttmfs.fuse.through_pyfuse3`).
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError, RequestContext, StatvfsData

from ..errors import NotPermitted
from ..model.pool import NAME_MAX
from .metrics import Metrics
from .requests import Failures
from .tree import Tree
from .xattrs import remove_xattr

__all__ = ["Operations"]

log = logging.getLogger(__name__)


def handles_request(handler: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Wrap a handler: map its errors to errno, and count, time and log it.

    If an unforeseen exception left a handler, it would end pyfuse3's loop, and with it the mount.
    """
    name = handler.__name__

    @wraps(handler)
    async def operation(self: "Operations", *arguments: Any) -> Any:
        start = time.perf_counter_ns()
        if self._failures.debug:
            log.debug("%s(%s)", name, arguments[0] if isinstance(arguments[0], int) else "")
        try:
            return handler(self, *arguments)
        except FUSEError:
            raise
        except Exception as error:
            caller = arguments[-1] if isinstance(arguments[-1], RequestContext) else None
            raise FUSEError(self._failures.failed(name, error, caller, f"{arguments[0]}")) from None
        finally:
            self._metrics.count(name, time.perf_counter_ns() - start)

    return operation


class Operations(pyfuse3.Operations):
    """The request handlers of one mount."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, tree: Tree, metrics: Metrics, failures: Failures) -> None:
        super().__init__()
        self.tree = tree
        self.pool = tree.shared.pool
        self._metrics = metrics
        self._failures = failures

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing is kept for an inode. It is not wrapped: it must not raise, and the kernel expects no answer."""

    @handles_request
    def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Asked only if the kernel does not check mode bits. Then root alone is let in, who may not execute files."""
        found = self.tree.node(inode).attributes(inode).mode  # raises if it is gone, though the kernel has its name
        return not mode & os.X_OK or stat.S_ISDIR(found)

    @handles_request
    def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self.tree.node(inode).target()

    @handles_request
    def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        raise NotPermitted("no links can be made here; make them outside of the mount")

    @handles_request
    def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise NotPermitted("no links can be made here; make them outside of the mount")

    @handles_request
    def flush(self, fh: int) -> None:
        raise FUSEError(errno.ENOSYS)  # the kernel then sends no more of these, which saves a round trip a close

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
    def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return ()  # hidden, as in CephFS: a tool that copies all attributes would fail at these

    @handles_request
    def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        remove_xattr(self.tree.node(inode), name)
