"""Finds out why a connection to the kernel ended: by an unmount, or cut off while it was mounted.

read(2) does not tell: it fails with ENODEV after an umount, after an ``umount -f`` that was refused as busy, and after
an abort through /sys/fs/fuse/connections. But an unmount separates the superblock from the connection before it ends
the connection (fuse_sb_destroy()). So a notification about the root inode fails with ENOENT only after an unmount.

Concurrency: one task. Nothing here touches the mount.
"""

import errno
import os
import select

import trio

from ..fuse.inodes import ROOT
from ..linux.fuse_protocol import INVAL_INODE, NOTIFY_INVAL_INODE
from ..linux.mountinfo import is_attached

__all__ = ["has_ended", "was_cut_off"]

INVALIDATE_ROOT = INVAL_INODE.pack(INVAL_INODE.size, NOTIFY_INVAL_INODE, 0, ROOT, -1, 0)
"""The notification that makes the kernel ask for the root's attributes again (FUSE_NOTIFY_INVAL_INODE)."""

FORCED_SECONDS, LOOK_SECONDS = 0.5, 0.05
"""``umount -f`` cuts the connection first, and unmounts a moment later if nothing is open. How long that may take, and
the interval of looks. If it takes longer, the pages are kept."""


def has_ended(connection: int) -> bool:
    """Whether the kernel has ended the connection."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


async def was_cut_off(connection: int, device: str | None) -> bool:
    """Whether the filesystem of a connection that ended is still mounted somewhere.

    `device` is its device number, if known. No other filesystem has that number while the superblock exists. A lazy
    unmount counts as an unmount, even if files are still open.
    """
    end = trio.current_time() + FORCED_SECONDS
    while _has_superblock(connection) and (device is None or is_attached(device)):
        if trio.current_time() >= end:
            return True
        await trio.sleep(LOOK_SECONDS)
    return False


def _has_superblock(connection: int) -> bool:
    try:
        os.write(connection, INVALIDATE_ROOT)
    except OSError as error:
        return error.errno != errno.ENOENT
    return True
