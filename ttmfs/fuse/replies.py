"""The bodies of answers, packed as the kernel reads them, and how an answer is sent."""

import errno
import os
from collections.abc import Coroutine
from typing import Any

from ..linux.fuse_protocol import ATTR, DIRENT, ENTRY, FOPEN_DIRECT_IO, FOPEN_NOFLUSH, FOPEN_PASSTHROUGH, OPENED
from .kernel_cache import LIFETIME
from .node import Attributes

__all__ = ["NO_ENTRY", "attr", "directory_entry", "empty", "entry", "opened", "send"]

LIFETIME_SECONDS, LIFETIME_NS = int(LIFETIME), round(LIFETIME % 1 * 1e9)

NO_ENTRY = bytes(ENTRY.size)
"""The answer to a lookup of a name that does not exist: no node, no lifetime."""

DIRENT_ALIGNMENT = 8


def _packed(ino: int, attributes: Attributes, page_size: int) -> tuple[int, ...]:
    """The fields of fuse_attr."""
    mode, nlink, size, blocks, uid, gid, atime, mtime, ctime, _ = attributes
    (atime, atime_ns), (mtime, mtime_ns) = divmod(atime, 10**9), divmod(mtime, 10**9)
    ctime, ctime_ns = divmod(ctime, 10**9)
    # a time before 1970 is a negative number of seconds
    return (
        ino, size, blocks, atime & _U64, mtime & _U64, ctime & _U64, atime_ns, mtime_ns, ctime_ns,
        mode, nlink, uid, gid, 0, page_size, 0,
    )  # fmt: skip


_U64 = (1 << 64) - 1


def entry(ino: int, attributes: Attributes, page_size: int) -> bytes:
    """fuse_entry_out: a name's inode and attributes, and how long the kernel may keep both."""
    seconds, ns = (LIFETIME_SECONDS, LIFETIME_NS) if attributes.cacheable else (0, 0)
    return ENTRY.pack(ino, 0, seconds, seconds, ns, ns, *_packed(ino, attributes, page_size))


def attr(ino: int, attributes: Attributes, page_size: int) -> bytes:
    """fuse_attr_out: attributes, and how long the kernel may keep them."""
    seconds, ns = (LIFETIME_SECONDS, LIFETIME_NS) if attributes.cacheable else (0, 0)
    return ATTR.pack(seconds, ns, 0, *_packed(ino, attributes, page_size))


def opened(fh: int, backing: int = 0) -> bytes:
    """fuse_open_out of a file: every read reaches the store, and nothing is cached twice.

    With the number of a backing file, the kernel reads and writes that, and maps it. NOFLUSH: else a close(2) would
    wait for a daemon that is dead, and even a SIGKILL would not end the wait.
    """
    return OPENED.pack(fh, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH if backing else FOPEN_DIRECT_IO, backing)


def directory_entry(name: bytes, ino: int, mode: int, next_offset: int) -> bytes:
    """fuse_dirent: an entry of a listing, padded to whole words."""
    header = DIRENT.pack(ino, next_offset, len(name), mode >> 12)
    return header + name + bytes(-len(name) % DIRENT_ALIGNMENT)


def send(connection: int, *parts: bytes) -> None:
    """Send an answer to the kernel: its header and its body, in one part or two."""
    try:
        os.writev(connection, parts)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):  # nobody waits for it any more
            raise


async def empty(done: Coroutine[Any, Any, None]) -> bytes:
    """An answer without a body, once something is done."""
    await done
    return b""
