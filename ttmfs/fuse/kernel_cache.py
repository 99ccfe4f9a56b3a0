"""Notifications that keep the kernel's cache of a mount correct.

The kernel keeps the names and attributes that it is told for LIFETIME seconds, unless an answer says otherwise. If a
request changes something that it does not name, the daemon notifies the kernel before it answers the request.

A notification expires the attributes of one inode (FUSE_NOTIFY_INVAL_INODE with a negative offset). It takes no lock
that a waiting client could hold. The name stays, and with it the mounts on it, the working directories below it and the
overlays over it. The next use by path asks for the attributes; if the page does not exist the answer is ESTALE, for
which the VFS looks the name up anew and gets ENOENT. Expiring a name instead would wait for the lock of its directory,
which the client that waits for the answer may hold.

The kernel is notified only of pages whose attributes it was told lately: blocks of inode numbers are noted.

Concurrency: one thread, except for notifications that may wait for a client.
"""

import errno
import os
import struct
import time
from collections import Counter

import trio

from ..linux.fuse_protocol import INVAL_INODE, NOTIFY_INVAL_INODE
from ..stores.time_slices import TimeSlices
from .inodes import HANDLE_BITS, IMAGE, MAX_HANDLE, inode
from .recent import RecentBackups

__all__ = ["LIFETIME", "KernelCache", "notify"]

LIFETIME = 1.0
"""Seconds for which the kernel may keep a name and its attributes: changes through .shmem may be seen this late."""

KNOWN_SECONDS = 1.25 * LIFETIME
"""Age at which the kernel has forgotten an answer. The lifetime begins when the client receives it."""

BLOCK_BITS = 6
"""Blocks of 64 inodes are noted: clients mostly use neighbouring pages, and a notification takes 2 to 3 us."""

MOST_BLOCKS = 4096
"""Most blocks noted in KNOWN_SECONDS; they take 0.25 MB. If there are more, changes of the largest backups wait."""

FEW_BLOCKS = 64
"""Most blocks of a backup that does not wait when others have too many."""

SETTLE_SECONDS = 0.1
"""The longest wait for a directory's lock. Its holder may itself wait for the file whose truncation waits here."""

INVAL_ENTRY = struct.Struct("<IiQQII")  # fuse_out_header, fuse_notify_inval_entry_out
STORE = struct.Struct("<IiQQQII")  # fuse_out_header, fuse_notify_store_out
NOTIFY_INVAL_ENTRY, NOTIFY_STORE = 3, 4
EXPIRE_ONLY, EXPIRE_SINCE = 1, (7, 38)  # Linux 6.2

BACKUP_SHIFT = HANDLE_BITS - BLOCK_BITS  # from a block to its backup


class KernelCache:
    """The notifications of one connection. `version` is that of the kernel's FUSE protocol.

    `resumed`: another daemon served the connection. For a while it is unknown which pages the kernel was told of.
    """

    def __init__(self, connection: int, version: tuple[int, int], slices: TimeSlices, *, resumed: bool = False) -> None:
        self._connection = connection
        self._slices = slices
        self._expires = version >= EXPIRE_SINCE
        self._blocks: set[int] = set()  # blocks of pages that the kernel was told of since the last rotation
        self._blocks_before: set[int] = set()  # and between the last two rotations
        self._rotate_at = 0.0
        self._incomplete = RecentBackups(KNOWN_SECONDS)  # the kernel may know pages of these that are not noted
        if resumed:
            self._incomplete.note()

    def note_page(self, ino: int) -> None:
        """The kernel is told the attributes of a page."""
        if time.monotonic() >= self._rotate_at or len(self._blocks) >= MOST_BLOCKS:
            self._rotate()
        self._blocks.add(ino >> BLOCK_BITS)

    def note_pages(self, first: int, last: int) -> None:
        """The kernel is told the attributes of a range of pages, by inode number."""
        for block in range(first >> BLOCK_BITS, (last >> BLOCK_BITS) + 1):
            self.note_page(block << BLOCK_BITS)

    def _rotate(self) -> None:
        """Forget old blocks, or those of the largest backups if there are too many."""
        now = time.monotonic()
        if now >= self._rotate_at:
            self._blocks, self._blocks_before = set(), self._blocks if now < self._rotate_at + KNOWN_SECONDS else set()
            self._rotate_at = now + KNOWN_SECONDS
            return
        counts = Counter(block >> BACKUP_SHIFT for block in self._blocks)
        large = {backup for backup, count in counts.items() if count > FEW_BLOCKS}
        if sum(counts[backup] for backup in large) < MOST_BLOCKS // 2:
            large = set(counts)
        for backup in large:
            self._incomplete.note(backup)
        self._blocks = {block for block in self._blocks if block >> BACKUP_SHIFT not in large}

    async def expire_pages(
        self, backup: int, first: int = 1, last: int = MAX_HANDLE, *, directory_locked: bool = True
    ) -> None:
        """A range of a backup's handles has changed or was dropped.

        If the pages that the kernel knows are not all noted, this waits until it has forgotten them by itself. With
        `directory_locked` the client whose request this is holds the directory's lock in the kernel. Otherwise other
        clients may be looking up names there.
        """
        if backup in self._incomplete:
            await trio.sleep(max(0.0, self._incomplete.until(backup) - time.monotonic()))
        low = inode(backup, first if first > 1 else 0)  # with the directory, in the block of the first pages
        high = inode(backup, last)
        noted = self._blocks | self._blocks_before
        blocks = {block for block in noted if low >> BLOCK_BITS <= block <= high >> BLOCK_BITS}
        if blocks and not directory_locked:
            await self._settle(backup)
        work = self._slices.begin()
        for block in blocks:
            start, past = block << BLOCK_BITS, (block + 1) << BLOCK_BITS
            if low <= start and past <= high + 1:
                self._blocks.discard(block)
                self._blocks_before.discard(block)
            for ino in range(max(low, start), min(high + 1, past)):
                self.expire(ino)
            if work.slice_is_over():
                await work.rest()

    async def _settle(self, backup: int) -> None:
        """Wait until the clients have received the answers to their lookups in a backup's directory.

        Before that there may be no inode yet whose attributes could expire: 1 of 90 stat(2) then showed a dropped page.
        Lookups hold the directory's lock, and expiring a name waits for it. `.image` never has a lifetime, so expiring
        it changes nothing. (Linux before 6.2 would drop it, so there it is a name that does not exist.)
        """
        name = b".image" if self._expires else b"."
        header = INVAL_ENTRY.pack(
            INVAL_ENTRY.size + len(name) + 1, NOTIFY_INVAL_ENTRY, 0, inode(backup, 0), len(name), EXPIRE_ONLY
        )
        with trio.move_on_after(SETTLE_SECONDS):
            await trio.to_thread.run_sync(self._notify, header + name + b"\0", abandon_on_cancel=True)

    def expire(self, ino: int) -> None:
        """The attributes of an inode have changed, or it no longer exists."""
        self._notify(INVAL_INODE.pack(INVAL_INODE.size, NOTIFY_INVAL_INODE, 0, ino, -1, 0))

    def expire_directory(self, backup: int) -> None:
        """The times of a backup have changed."""
        self.expire(inode(backup, 0))

    async def grow_image(self, backup: int, size: int) -> None:
        """The image of a backup has become larger.

        The kernel asks for attributes before stat(2), but uses the size that it has for O_APPEND, sendfile(2) and
        copy_file_range(2). It learns a larger one from a byte that is stored in its page cache (FUSE_NOTIFY_STORE);
        that makes no page of the image readable. In a thread, because it waits for a reader of that page.
        """
        header = STORE.pack(STORE.size + 1, NOTIFY_STORE, 0, inode(backup, IMAGE), size - 1, 1, 0)
        await trio.to_thread.run_sync(self._notify, header + b"\0", abandon_on_cancel=True)

    def _notify(self, message: bytes) -> None:
        notify(self._connection, message)


def notify(connection: int, message: bytes) -> None:
    """Send a notification to the kernel."""
    try:
        os.write(connection, message)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # the kernel has no such inode, or no mount, any more
            raise
