"""Work on backups in threads: one thread at a time for each backup, for which a request waits so long and no longer.

A thread that waits for a filesystem cannot be ended. If its request has given up, the thread keeps its backup locked
until it ends, so that what comes after it finds its effect.

Concurrency: one thread calls; the threads touch nothing of this but :func:`trio.lowlevel.TrioToken.run_sync_soon`.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

import outcome
import trio

from ..errors import StoreFailed
from .blocking_io import BlockingIO
from .opened import Opened

__all__ = ["Lanes"]

T = TypeVar("T")


class _Job:
    """Work in a thread, for a request that may not wait for its end."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.result: outcome.Outcome[Any] | None = None
        self.frees: trio.Semaphore | None = None  # the lock of the backup that nobody else frees


class Lanes:
    """A lane for each backup. `patience` is how long a request waits, in seconds."""

    def __init__(self, blocking_io: BlockingIO, patience: float) -> None:
        self._changes, self._patience = blocking_io.changes, patience
        self._locks: dict[int, trio.Semaphore] = {}
        self._working: dict[int, _Job] = {}  # with a backup's lock

    @contextlib.asynccontextmanager
    async def locked(self, id: int) -> AsyncIterator[None]:
        """Wait until no other task and no thread works on a backup, and lock it. Raises StoreFailed after a time."""
        lane = self._locks.setdefault(id, trio.Semaphore(1, max_value=1))
        try:
            lane.acquire_nowait()  # a wait costs a turn of the event loop, even if it is over at once
        except trio.WouldBlock:
            try:
                with trio.fail_after(self._patience):
                    await lane.acquire()
            except trio.TooSlowError:
                raise StoreFailed("the store did not answer an earlier request in time (store_timeout)") from None
        try:
            yield
        finally:
            if job := self._working.get(id):
                job.frees = lane
            else:
                self._free(id, lane)

    def _free(self, id: int, lane: trio.Semaphore) -> None:
        lane.release()
        if lane.value and not lane.statistics().tasks_waiting:
            self._locks.pop(id, None)

    async def in_thread(self, id: int, opened: Opened, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work` in a thread, while the backup is locked. Raises trio.TooSlowError after a time."""
        changes, job = self._changes, _Job()
        token = trio.lowlevel.current_trio_token()

        def ended(result: "outcome.Outcome[T]") -> None:
            changes.limiter.release_on_behalf_of(job)
            opened.left()
            if self._working.get(id) is job:
                del self._working[id]
            if job.frees:
                self._free(id, job.frees)
            job.result = result
            job.ended.set()

        with trio.fail_after(self._patience):
            async with changes.turn(opened.stat.st_uid):
                try:
                    changes.limiter.acquire_on_behalf_of_nowait(job)
                except trio.WouldBlock:
                    await changes.limiter.acquire_on_behalf_of(job)
                opened.users += 1
                self._working[id] = job
                trio.lowlevel.start_thread_soon(
                    partial(work, *arguments), lambda result: token.run_sync_soon(ended, result)
                )
                await job.ended.wait()
        assert job.result
        result: T = job.result.unwrap()
        return result
