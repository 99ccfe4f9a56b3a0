"""One backup: the six verbs of the TTM shmem backup, and their plural forms.

The verbs mirror ``drivers/gpu/drm/ttm/ttm_backup.c``; ``docs/contract.md`` numbers what they promise. They check the
arguments, and turn pages and handles into ranges of the backup's :class:`~ttmfs.stores.page_file.PageFile`.

Concurrency: one thread. A verb of one page is atomic. Other tasks can run between the runs of `copy_pages`, and
every 16 MiB of `drop_pages` and `fini`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from ..errors import NoRoom, PageAbsent
from ..stores.page_file import finished
from . import arguments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..handles import Uint64Array
    from ..stores.backup_files import BackupFiles
    from ..stores.page_file import PageFile
    from .arguments import PageBuffer

__all__ = ["Backup"]


class Backup:
    """A backup of a pool; :meth:`ttmfs.Pool.create` and :meth:`ttmfs.Pool.open` return it. Counts are pages.

    After :meth:`fini`, by any caller, every method raises :class:`ttmfs.BackupEnded`. The async methods need trio.
    Those of one page reach no checkpoint while the page is in memory.
    """

    __slots__ = ("_files", "file")

    def __init__(self, file: PageFile, files: BackupFiles) -> None:
        self.file = file
        """The backup's file, for the mount. Its methods are not a stable interface."""
        self._files = files

    def __repr__(self) -> str:
        return f"<Backup {self.file.id}>"

    async def backup_page(self, page: PageBuffer, idx: int, writeback: bool = False) -> int:
        """Copy a page into the backup. Returns its handle, ``idx + 1``. ``ttm_backup_backup_page()``.

        `page` is any contiguous buffer of page_size bytes; the caller may reuse it on return. The call overwrites an
        existing page. `writeback` pushes the page to swap now, on a best-effort basis.
        Raises InvalidArgument (index past the size, wrong length) and NoRoom. Both change nothing.
        """
        data, handle = arguments.page(page, self.page_size), arguments.handle_of(idx)
        self._check(handle - 1, 1)
        if not await self._store(handle - 1, data, writeback):
            raise NoRoom("the disk became full within the page")  # a disk may need new blocks to overwrite a page
        return handle

    async def backup_pages(self, pages: NDArray[np.uint8], idx: int, writeback: bool = False) -> Uint64Array:
        """Back up an array of shape (n, page_size), dtype uint8, at n indices from `idx` on.

        Returns the handles of the stored pages: fewer than n if the room ends before. Raises NoRoom if there is none.
        """
        import numpy as np  # not at the top: the daemon does not load numpy

        data, first = arguments.pages(pages, self.page_size), arguments.handle_of(idx)
        self._check(first - 1, len(pages))
        stored = await self._store(first - 1, data, writeback) if len(pages) else 0
        return np.arange(first, first + stored, dtype=np.uint64)

    async def copy_page(self, dst: PageBuffer, handle: int, intr: bool = False) -> None:
        """Copy a page back into `dst`, a writable buffer of page_size bytes. ``ttm_backup_copy_page()``.

        The page stays in the backup. With `intr` a cancellation may end the call; the caller can repeat it. Raises
        PageAbsent if there is no such page, InvalidArgument if the handle lies past the size.
        """
        data, idx = arguments.destination(dst, self.page_size), arguments.index_of(handle)
        await self._copy(data, idx, idx + 1, intr)

    async def copy_pages(self, dst: NDArray[np.uint8], handles: Uint64Array, intr: bool = False) -> None:
        """Copy pages back into the rows of `dst`, of shape (n, page_size), dtype uint8, by n handles, dtype uint64.

        Raises PageAbsent if one of the pages does not exist. Then the call may have written a part of `dst`.
        """
        data = arguments.rows(dst, len(handles), self.page_size)
        for first, past in arguments.runs(handles):
            length = (past - first) * self.page_size
            await self._copy(data[:length], first, past, intr)
            data = data[length:]

    async def drop(self, handle: int) -> None:
        """Release a page and its memory. Does nothing if there is no such page. ``ttm_backup_drop()``.

        Raises InvalidArgument if the handle lies past the size.
        """
        idx = arguments.index_of(handle)
        self._check(idx, 1)
        async with self.file.locked():
            await finished(self.file.drop_range(idx, idx + 1))

    async def drop_pages(self, handles: Uint64Array) -> None:
        """Release the pages of an array of handles, dtype uint64, as :meth:`drop` does."""
        runs = arguments.runs(handles)
        for first, past in runs:
            self._check(first, past - first)
        for first, past in runs:
            await self.file.drop_run(first, past)

    async def fini(self) -> None:
        """End the backup and release all its pages. ``ttm_backup_fini()``. No operation may follow."""
        with contextlib.suppress(NoRoom):  # punching a hole can need room on a full XFS; removing the file does not
            await self.file.drop_run(0, self.size // self.page_size)  # in steps, because releasing pages takes long
        async with self.file.locked():
            self._files.remove(self.file.id)

    # --- properties ---

    @property
    def name(self) -> str:
        """Its current name in the pool."""
        return self._files.name_of(self.file.id)

    @property
    def page_size(self) -> int:
        """Bytes a page."""
        return self.file.page_size

    @property
    def size(self) -> int:
        """Size in bytes, with absent pages."""
        return self.file.size

    @property
    def pages(self) -> int:
        """The number of stored pages. If pages are larger than the system's, this takes about 1 us a page."""
        return self.file.pages

    @property
    def resident(self) -> int:
        """The number of pages in memory. A page counts by the part in memory; the sum is rounded down."""
        return max(0, self.pages - self.swapped)

    @property
    def swapped(self) -> int:
        """The number of pages that are swapped out, or only on a disk. Parts of pages count; the sum is rounded up."""
        return self.file.swapped

    # --- private ---

    def _check(self, first: int, count: int) -> None:
        arguments.check_end(first + count, self.size // self.page_size)

    async def _store(self, idx: int, data: memoryview, writeback: bool) -> int:
        """Store whole pages from an index on. Returns their number."""
        file, offset = self.file, idx * self.page_size
        await file.bring_in(offset, len(data), to_write=True, abandon=False)
        async with file.locked():
            stored = await finished(file.write(offset, data))
        if writeback:
            await file.push_out(offset, stored)
        return stored // self.page_size

    async def _copy(self, dst: memoryview, first: int, past: int, intr: bool) -> None:
        """Copy a run of pages. Raises PageAbsent unless every page of it exists."""
        file, offset = self.file, first * self.page_size
        if intr:
            await trio.lowlevel.checkpoint_if_cancelled()
        self._check(first, past - first)
        await file.bring_in(offset, len(dst), abandon=intr)
        async with file.locked():
            if (absent := file.first_absent(first, past)) is not None:
                raise PageAbsent(f"handle {absent + 1} holds no page")
            if await finished(file.read_into(dst, offset)) < len(dst):
                raise PageAbsent("another process made the backup smaller during the copy")
