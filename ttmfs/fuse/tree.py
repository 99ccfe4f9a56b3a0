"""The names of a mount, and the node for an inode number or file handle. ::

    /                 ROOT           backups
    /.stats /.config  STATS, CONFIG  texts, made when they are opened
    /a                handle 0 of the backup
    /a/1 ... /a/N     its pages, by handle
    /a/.image         IMAGE          page i at byte i * page_size
    /a/.shmem         SHMEM          the backup's file in the store itself, or a link to it

The kernel checks mode bits (default_permissions, unless root alone is let in). Nodes refuse what nobody may do.
"""

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache, partial

from ..errors import NoSuchName
from ..model.pool import Pool
from ..recovery.progress import Progress
from .backing_files import BackingFiles
from .directories import BackupDirectory, Directory, Root
from .inodes import HANDLE_BITS, HANDLE_MASK, IMAGE, MAX_BACKUP_ID, MAX_HANDLE, ROOT, backup_of, split
from .kernel_cache import KernelCache
from .node import Node, Shared
from .texts import Texts

__all__ = ["Tree"]

MOST_BACKUPS = 1024
"""Backups whose nodes are kept for the next request. Making them takes longer than reading a page."""


class Tree:
    """The nodes of a mount over a pool. `make_texts` makes what STATS and CONFIG hold."""

    def __init__(
        self,
        pool: Pool,
        make_texts: Mapping[int, Callable[[], Awaitable[bytes]]],
        cache: KernelCache,
        progress: "Callable[..., contextlib.AbstractContextManager[Progress]]",
        *,
        backing: BackingFiles | None = None,
        offers_shmem: bool = True,
    ) -> None:
        self.shared = shared = Shared(pool, cache, progress, backing, offers_shmem)
        self.texts = Texts(shared, make_texts)
        self.root = Root(shared, self.texts)
        self._directory: Callable[[int], BackupDirectory] = lru_cache(MOST_BACKUPS)(partial(BackupDirectory, shared))

    def node(self, ino: int) -> Node:
        """The node of an inode number."""
        id, handle = split(ino)
        if id and 0 < handle <= MAX_HANDLE:
            return self._directory(id).pages
        if not id:
            if ino != ROOT and ino not in self.texts:
                raise NoSuchName(f"there is no inode {ino}")
            return self.root if ino == ROOT else self.texts
        directory = self._directory(id)
        if not handle:
            return directory
        return directory.image if handle == IMAGE else directory.shmem

    def directory(self, number: int) -> Directory:
        """The directory of an inode number, or of a directory's file handle."""
        id = backup_of(number)
        return self._directory(id) if id else self.root

    def file(self, fh: int) -> Node:
        """The node of a file handle."""
        if not (id := fh >> HANDLE_BITS & MAX_BACKUP_ID):  # inlined backup_of(): each read and write calls this
            return self.texts
        directory = self._directory(id)
        handle = fh & HANDLE_MASK
        return directory.pages if handle < IMAGE else directory.image if handle == IMAGE else directory.shmem
