"""Backups of a mount for programs on an event loop, asyncio's or trio's: ``ttmfs.client`` in threads, by anyio.

::

    async with await aio.Backup.open("/mnt/ttm/a") as backup:
        handles = await backup.backup_pages(pages, 0)
        await backup.copy_pages(pages, handles)

What a method means, and its errors, are those of the method of the same name in :class:`ttmfs.client.Backup`. The event
loop goes on while a thread waits for the mount, a swap device or a disk.

Cancellation: waiting for a free thread can always be cancelled. Copying back ends soon after a cancellation, and leaves
the pages as they were in the backup; nothing is written to the caller's memory afterwards. Other calls that have begun
are carried out.

Concurrency: any task may call any method of a backup, but no other method runs during ``fini``, ``move`` or ``aclose``.
The limiter bounds the number of threads, and so the calls that are carried out at once.
"""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import TYPE_CHECKING, Generic, Self, TypeVar

try:
    import anyio
    import anyio.to_thread
except ImportError as error:
    raise ImportError("ttmfs.aio needs anyio: pip install 'ttmfs[async]'") from error

from . import backup as synchronous
from . import page_array
from .own_file import WORKERS

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from ..handles import Uint64Array
    from ..model.arguments import PageBuffer

__all__ = ["Backup", "PageArray"]

Result = TypeVar("Result")

POLL_SECONDS = 0.005
"""How often a cancelled call looks whether its thread has ended."""


class Backup:
    """An open backup of a mount. Make it with :meth:`create` or :meth:`open`. ``async with`` closes it."""

    def __init__(self, backup: synchronous.Backup, limiter: anyio.CapacityLimiter | None = None) -> None:
        """Use an open backup. At most 4 of its calls are carried out at once, or as many as a shared `limiter` lets."""
        self.sync = backup
        """The synchronous client's backup, for calls that may block the loop."""
        self._limiter = limiter or anyio.CapacityLimiter(WORKERS)
        self.id, self.page_size = backup.id, backup.page_size

    @classmethod
    async def create(
        cls,
        path: str | os.PathLike[str],
        size: int | None = None,
        *,
        mode: int = 0o777,
        native: bool = True,
        limiter: anyio.CapacityLimiter | None = None,
    ) -> Self:
        """Make an empty backup of `size` bytes (default: ``backup_size=`` of the mount) and open it."""
        make = partial(synchronous.Backup.create, path, size, mode=mode, native=native)
        return cls(await _in_thread(make, limiter, undo=synchronous.Backup.close), limiter)

    @classmethod
    async def open(
        cls, path: str | os.PathLike[str], *, native: bool = True, limiter: anyio.CapacityLimiter | None = None
    ) -> Self:
        """Open an existing backup. Raises BackupAbsent."""
        opened = partial(synchronous.Backup.open, path, native=native)
        return cls(await _in_thread(opened, limiter, undo=synchronous.Backup.close), limiter)

    async def aclose(self) -> None:
        """Close the backup, also in a cancelled scope; its pages stay."""
        with anyio.CancelScope(shield=True):
            await self._run(self.sync.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return repr(self.sync)

    # --- the six verbs, and their plural forms ---

    async def backup_page(self, page: PageBuffer, idx: int, writeback: bool = False) -> int:
        """Copy a page of page_size bytes into the backup and return its handle, ``idx + 1``. Raises NoRoom."""
        return await self._run(partial(self.sync.backup_page, page, idx, writeback))

    async def backup_pages(self, pages: NDArray[np.uint8], idx: int, writeback: bool = False) -> Uint64Array:
        """Back up an array of shape (n, page_size), dtype uint8, from index `idx` on. Return the handles, uint64.

        If the room ends part way, return the handles of the stored pages; raise NoRoom if there are none.
        """
        return await self._run(partial(self.sync.backup_pages, pages, idx, writeback))

    async def copy_page(self, dst: PageBuffer, handle: int) -> None:
        """Copy a page back into `dst`, a writable buffer of page_size bytes. Raises PageAbsent."""
        await _interruptibly(partial(self.sync.copy_page, dst, handle), self._limiter)

    async def copy_pages(self, dst: NDArray[np.uint8], handles: Uint64Array) -> None:
        """Copy pages back into the rows of `dst`, shape (n, page_size), dtype uint8. Raises PageAbsent."""
        await _interruptibly(partial(self.sync.copy_pages, dst, handles), self._limiter)

    async def drop(self, handle: int) -> None:
        """Release a page, and its memory at once. A handle that holds nothing is no error."""
        await self._run(partial(self.sync.drop, handle))

    async def drop_pages(self, handles: Uint64Array) -> None:
        """Release the pages of an array of handles, dtype uint64."""
        await self._run(partial(self.sync.drop_pages, handles))

    async def fini(self) -> None:
        """End the backup: release every page, remove its directory and close it. Raises BackupNotEmpty."""
        await self._run(self.sync.fini)

    async def move(self, store: str) -> None:
        """Give the backup to another store on the same distributed filesystem, and close it. `store` is a path."""
        await self._run(partial(self.sync.move, store))

    # --- attributes ---

    @property
    def is_native(self) -> bool:
        """Whether its own file is open here, so that no page goes through the mount."""
        return self.sync.is_native

    async def get_size(self) -> int:
        """Return the bytes that the backup spans, a multiple of page_size, stored or not."""
        return await self._run(lambda: self.sync.size)

    async def get_path(self) -> str:
        """Return its current path, which changes when it is renamed."""
        return await self._run(lambda: self.sync.path)

    async def status(self) -> os.stat_result:
        """Return the stat(2) of its directory."""
        return await self._run(self.sync.status)

    async def chmod(self, mode: int) -> None:
        """Change its mode bits."""
        await self._run(partial(self.sync.chmod, mode))

    async def resize(self, size: int) -> None:
        """Change its size in bytes, rounded up to whole pages. Raises InvalidArgument if pages exist past it."""
        await self._run(partial(self.sync.resize, size))

    async def handles(self) -> Uint64Array:
        """Return the handles of all stored pages, ascending, dtype uint64."""
        return await self._run(self.sync.handles)

    async def residency(self) -> synchronous.Residency:
        """Count the pages in memory, and those swapped out."""
        return await self._run(self.sync.residency)

    async def residency_of(self, first: int, past: int) -> synchronous.Residency:
        """The same for the pages between two indices. Raises NotSupported unless :attr:`is_native`."""
        return await self._run(partial(self.sync.residency_of, first, past))

    async def writeback(self) -> None:
        """Push every page to swap now, on a best-effort basis."""
        await self._run(self.sync.writeback)

    async def page_array(self, count: int, first: int = 0) -> PageArray:
        """Return an array of `count` empty slots, which uses the indices from `first` on."""
        array = await self._run(partial(page_array.PageArray, self.sync, count, first))
        return PageArray(array, self._limiter)

    async def _run(self, call: Callable[[], Result]) -> Result:
        return await _in_thread(call, self._limiter)


class PageArray:
    """An array of pages and handles: :class:`ttmfs.client.PageArray`. :meth:`Backup.page_array` makes it.

    Calls of different tasks are carried out one after the other. Do not use pages in memory during a call.
    """

    def __init__(self, array: page_array.PageArray, limiter: anyio.CapacityLimiter) -> None:
        self.sync = array
        """The synchronous array, for all that does not block: its pages, slots and counts."""
        self._limiter = limiter
        self._lock = anyio.Lock()

    def __len__(self) -> int:
        return len(self.sync)

    def __getitem__(self, slot: int) -> NDArray[np.uint8]:
        """Return the page in a slot: a view, shape (page_size,), dtype uint8. An empty slot gets a page of zeros."""
        return self.sync[slot]

    async def backup(self, *, writeback: bool = False, purge: bool = False, limit: int | None = None) -> int:
        """Move at most `limit` pages out of memory, or discard them (`purge`). Return their number."""
        call = partial(self.sync.backup, writeback=writeback, purge=purge, limit=limit)
        async with self._lock:
            return await _in_thread(call, self._limiter)

    async def restore(self) -> int:
        """Bring every page back. Return their number. After a cancellation, the next call continues there."""
        async with self._lock:
            return await _interruptibly(self.sync.restore, self._limiter)

    async def destroy(self) -> None:
        """Free every page and drop every backed-up one."""
        async with self._lock:
            await _in_thread(self.sync.destroy, self._limiter)


class _Call(Generic[Result]):
    """A call in a thread, whose end can be waited for after a cancellation."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._begun = threading.Lock()  # held by the thread, or by who found that it had not begun
        self._ended = threading.Event()
        self.results: list[Result] = []

    def run(self) -> Result:
        if not self._begun.acquire(blocking=False):
            raise RuntimeError("the call was cancelled before it began")  # nobody waits for it
        try:
            self.results.append(self._function())
            return self.results[0]
        finally:
            self._ended.set()

    async def end(self) -> None:
        """Return once the call is over, and its arguments are no longer used."""
        if not self._begun.acquire(blocking=False):
            while not self._ended.is_set():  # a thread cannot set an event of anyio
                # asyncio cancels a task again in spite of a shield: the task ends all the same, but later
                with contextlib.suppress(anyio.get_cancelled_exc_class()), anyio.CancelScope(shield=True):
                    await anyio.sleep(POLL_SECONDS)


async def _in_thread(
    function: Callable[[], Result],
    limiter: anyio.CapacityLimiter | None,
    *,
    intr: threading.Event | None = None,
    undo: Callable[[Result], None] | None = None,
) -> Result:
    """Run a function in a thread.

    A cancellation sets `intr`. Without `intr`, anyio delivers a cancellation after the end. One by asyncio itself
    arrives before it, and loses the result, which `undo` undoes.
    """
    call = _Call(function)
    try:
        return await anyio.to_thread.run_sync(call.run, abandon_on_cancel=intr is not None, limiter=limiter)
    except anyio.get_cancelled_exc_class():
        if intr is not None:
            intr.set()
        await call.end()
        if undo:
            for result in call.results:
                undo(result)
        raise


async def _interruptibly(function: Callable[[threading.Event], Result], limiter: anyio.CapacityLimiter) -> Result:
    """Run a function that takes `intr` in a thread. A cancellation interrupts it."""
    intr = threading.Event()
    return await _in_thread(partial(function, intr), limiter, intr=intr)
