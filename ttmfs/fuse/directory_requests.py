"""The handlers of the requests for listings: opening, reading, syncing and closing a directory.

Concurrency: one thread. A handler that returns a body has run alone.
"""

from ..linux import fuse_protocol as fuse
from ..linux.fuse_protocol import Request
from .listing import Listing
from .node import Answer
from .replies import empty
from .tree import Tree

__all__ = ["DirectoryRequests"]

HEADER = fuse.HEADER.size


class DirectoryRequests:
    """The handlers of one mount."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._page_size = tree.shared.pool.page_size

    def opendir(self, request: Request, message: memoryview) -> bytes:
        return fuse.OPENED.pack(self._tree.directory(request.node).open_directory(request.node, request), 0, 0)

    def readdir(self, request: Request, message: memoryview) -> bytes:
        """READDIR and READDIRPLUS."""
        fh, offset, size, *_ = fuse.READ_IN.unpack_from(message, HEADER)
        listing = Listing(size, self._page_size, plus=request.opcode == fuse.READDIRPLUS)
        self._tree.directory(fh).listing(fh, offset, listing)
        return bytes(listing)

    def releasedir(self, request: Request, message: memoryview) -> bytes:
        (fh,) = fuse.RELEASE_IN.unpack_from(message, HEADER)
        self._tree.directory(fh).close(fh)
        return b""

    def fsyncdir(self, request: Request, message: memoryview) -> Answer[bytes]:
        (fh,) = fuse.FSYNC_IN.unpack_from(message, HEADER)
        return empty(self._tree.directory(fh).sync(fh))
