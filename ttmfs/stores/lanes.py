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
from .blocking_io import BlockingIO, LimitPerOwner
from .opened import Opened

__all__ = ["Lanes"]

T = TypeVar("T")


class _Job:
    """Work in a thread, for a request that may not wait for its end."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.result: outcome.Outcome[Any] | None = None
        self.frees: trio.Semaphore | None = None  # the lock of the backup that nobody else frees
        self.is_started = False


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

    @property
    def is_idle(self) -> bool:
        """Whether no thread works with a backup's lock."""
        return not self._working

    async def in_thread(
        self, id: int, opened: Opened, work: Callable[..., T], *arguments: Any,
        limit: LimitPerOwner | None = None, on_error: Callable[[], object] = lambda: None,
    ) -> T:  # fmt: skip
        """Call `work` in a thread. Raises trio.TooSlowError after a time.

        The backup is locked by the caller, and stays so until the thread ends; with a `limit` of its own the work needs
        no lock. `on_error` is called if the thread fails, even if nobody waits for it any more.
        """
        changes, job, locked = limit or self._changes, _Job(), limit is None
        token = trio.lowlevel.current_trio_token()

        def ended(result: "outcome.Outcome[T]") -> None:
            changes.limiter.release_on_behalf_of(job)
            opened.left()
            if locked:
                del self._working[id]
            if job.frees:
                self._free(id, job.frees)
            if isinstance(result, outcome.Error):
                on_error()
            job.result = result
            job.ended.set()

        def deliver(result: "outcome.Outcome[T]") -> None:
            try:
                token.run_sync_soon(ended, result)
            except trio.RunFinishedError:  # nobody is left to hear of it
                opened.left()

        opened.users += 1  # before anything is awaited
        try:
            with trio.fail_after(self._patience):
                async with changes.turn(opened.stat.st_uid):
                    try:
                        changes.limiter.acquire_on_behalf_of_nowait(job)
                    except trio.WouldBlock:
                        await changes.limiter.acquire_on_behalf_of(job)
                    if locked:
                        self._working[id] = job
                    self._start(job, partial(work, *arguments), deliver)
                    await job.ended.wait()
        except BaseException:
            if not job.is_started:
                if self._working.get(id) is job:
                    del self._working[id]
                with contextlib.suppress(RuntimeError):  # it has no token of the limiter
                    changes.limiter.release_on_behalf_of(job)
                opened.left()
            raise
        assert job.result
        result: T = job.result.unwrap()
        return result

    @staticmethod
    def _start(job: _Job, work: Callable[[], T], deliver: "Callable[[outcome.Outcome[T]], None]") -> None:
        try:
            trio.lowlevel.start_thread_soon(work, deliver)
        except RuntimeError as error:
            raise StoreFailed("no thread can be started; ulimit -u may limit them") from error
        job.is_started = True
