"""The wrapper round every request handler: it maps errors to errno, counts, times and logs.

An unforeseen exception is EIO to the caller and a traceback in the log, and the mount continues. (If it left a handler,
it would end pyfuse3's loop, and with it the mount.) The wrapper also notes in the state which request is in flight. So
a request that kills daemons is refused after a few deaths (:mod:`ttmfs.recovery.state`).

Concurrency: one thread. A handler that does not wait runs alone, so all these handlers share one slot of the notes.
"""

import errno
import inspect
import logging
import time
import traceback
import zlib
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from types import CoroutineType
from typing import Any, TypeAlias

from pyfuse3 import FUSEError, RequestContext

from ..errors import StoreFailed, TtmfsError, errno_of
from ..model.pool import NAME_MAX
from ..recovery.state import LATEST, POINTS, State, identity
from ..stores.blocking_io import FileLocks
from .inodes import backup_of
from .metrics import BUCKET_OF_LENGTH, TOTAL_NS, Metrics
from .refusals import Refusals

__all__ = ["Requests", "handles_request"]

log = logging.getLogger(__name__)

REFUSED_SCORE = 4
"""Score at which a repeated request is refused. A crash or an OOM kill adds 2, a SIGKILL 1 (see the state)."""

SUSPECT_SECONDS = 10.0
"""Time after its start in which a daemon watches for requests that may have killed the one before."""

LOCKS_ITSELF = {"create", "unlink", "write"}
"""Handlers that take a backup's lock. Every other handler that is a plain function changes nothing."""

Handler: TypeAlias = Callable[..., Any]


def handles_request(handler: Handler) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Wrap a handler, which returns its answer, or a coroutine if it has to wait."""
    name, clock = handler.__name__, time.perf_counter_ns
    kind = zlib.crc32(name.encode())
    identified = len(inspect.signature(handler).parameters) > 2  # by its first two arguments
    only_reads = identified and not inspect.iscoroutinefunction(handler) and name not in LOCKS_ITSELF

    @wraps(handler)
    async def operation(self: Any, *arguments: Any) -> Any:
        start, requests = clock(), self.requests
        notes, suspects, metrics = requests.notes, requests.suspects, requests.metrics
        note = identity(kind, arguments[0], arguments[1]) if identified else kind << POINTS.bit_length()
        try:
            if suspects:
                note = requests.admit(name, note)
            notes[0] = note  # no other handler runs until it waits
            try:
                if requests.locks is not None and only_reads and backup_of(arguments[0]) in requests.locks:
                    answer = requests.call_locked(handler, self, arguments)
                else:
                    answer = handler(self, *arguments)
            finally:
                notes[0] = 0
            return await requests.wait_for(answer, note) if isinstance(answer, CoroutineType) else answer
        except FUSEError:
            raise
        except Exception as error:
            raise FUSEError(requests.failed(name, error, arguments)) from None
        finally:
            if suspects:
                requests.forget_score(note)
            counts, took = metrics.durations[name], clock() - start
            counts[BUCKET_OF_LENGTH[took.bit_length()]] += 1
            counts[TOTAL_NS] += took
            if requests.debug:
                log.debug("%s%s", name, _brief(name, arguments))

    return operation


def _brief(operation: str, arguments: Sequence[Any]) -> str:
    """The arguments of a handler for the log, without page contents."""
    texts = []
    for argument in arguments:
        if isinstance(argument, RequestContext):
            texts.append(f"pid={argument.pid}")
        elif isinstance(argument, bytes) and (operation == "write" or len(argument) > NAME_MAX):
            texts.append(f"<{len(argument)} bytes>")
        else:
            texts.append(repr(argument) if isinstance(argument, int | bytes | None) else type(argument).__name__)
    return f"({', '.join(texts)})"


class Requests:
    """The requests of one mount: those in flight, and those that failed or may have killed a daemon.

    `locks` are the locks of backups that threads change. None: no thread changes a backup.
    """

    def __init__(
        self, state: State, metrics: Metrics, refusals: Refusals, locks: FileLocks | None, *, debug: bool = False
    ) -> None:
        self.notes = state.notes  # what is in flight; slot 0: the request that the loop is handling
        self.suspects = state.suspects()
        self.metrics = metrics
        self.locks = locks
        self.debug = debug
        self.waiting = 0
        self._refusals = refusals
        self._slots = list(range(1, LATEST))
        self._suspected_until = time.monotonic() + SUSPECT_SECONDS
        self._logged: set[tuple[object, ...]] = set()

    async def wait_for(self, answer: Coroutine[Any, Any, Any], note: int) -> Any:
        """The answer of a handler that has to wait. Others may wait at the same time."""
        self.waiting += 1
        slot = self._slots.pop()
        self.notes[slot], self.notes[LATEST] = note, slot
        try:
            return await answer
        finally:
            self.notes[slot] = 0
            self._slots.append(slot)
            self.waiting -= 1

    async def call_locked(self, handler: Handler, operations: Any, arguments: Sequence[Any]) -> Any:
        """The answer of a handler that reads a backup which a thread is changing."""
        assert self.locks is not None
        async with self.locks.locked(backup_of(arguments[0])):
            answer = handler(operations, *arguments)
        return await answer if isinstance(answer, CoroutineType) else answer

    def failed(self, operation: str, error: Exception, arguments: Sequence[Any] = ()) -> int:
        """Count a request that failed, and log it if it shows a fault. Returns its errno."""
        number = errno_of(error) if isinstance(error, TtmfsError) else errno.EIO
        self.metrics.errors[operation, number] += 1
        if not isinstance(error, TtmfsError):
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            if self._is_first(operation, frame.f_code, line):
                brief = _brief(operation, arguments)
                log.exception("%s%s failed unforeseen; callers get EIO (logged once)", operation, brief)
            return number
        self._refusals.note(operation, number, error, arguments[-1] if arguments else None)
        # the errno, not the text: names in it are the caller's choice, and a caller could fill the log
        if isinstance(error, StoreFailed) and self._is_first(operation, getattr(error.__cause__, "errno", None)):
            log.error("%s; callers of %s get EIO (logged once)", error, operation)
        elif self.debug:
            log.debug("%s: %s: %s", operation, errno.errorcode[number], error)
        return number

    def _is_first(self, *cause: object) -> bool:
        """Whether a cause was not logged before."""
        if cause in self._logged:
            return False
        self._logged.add(cause)
        return True

    def admit(self, operation: str, request: int) -> int:
        """The note of a request with its score. Raises FUSEError(EIO) for one that has killed daemons."""
        if time.monotonic() > self._suspected_until:
            self.suspects.clear()
        score = self.suspects.get(request, 0)
        if score >= REFUSED_SCORE:
            self.metrics.errors[operation, errno.EIO] += 1
            if self._is_first(operation, request):
                log.error(
                    "a request for %s is refused, because daemons died while they carried it out; its caller gets EIO",
                    operation,
                )
            raise FUSEError(errno.EIO)
        return request | score

    def forget_score(self, request: int) -> None:
        """Forget the score of a request that was carried out without a death."""
        if self.suspects.get(request & ~POINTS, 0) < REFUSED_SCORE:
            self.suspects.pop(request & ~POINTS, None)
