"""Carries requests out: notes them, maps errors to errno, sends answers, counts, times and logs.

An unforeseen exception is EIO to the caller and a traceback in the log, and the mount continues.

Concurrency: one thread. A handler that does not wait is called, answered and counted before the next request is read.
The others are tasks.
"""

import errno
import logging
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import trio

from ..errors import StoreFailed, TtmfsError, errno_of
from ..linux.fuse_protocol import ANSWER, HEADER, OFFSET, RESENT, Request
from ..linux.splice import FileRange, Splice
from ..stores.blocking_io import FileLocks
from .in_flight import InFlight
from .inodes import backup_of
from .metrics import Metrics
from .page_requests import Kind, PageRequests
from .recent_requests import SAMPLE, SHORT
from .refusals import Refusals
from .replies import send

__all__ = ["Failures", "Requests"]

log = logging.getLogger(__name__)


class Spawn(Protocol):
    """Starts a task, which runs after the present request."""

    def __call__(self, function: Callable[..., Coroutine[Any, Any, None]], /, *arguments: Any) -> None: ...


class Failures:
    """Counts and logs what fails, of one mount."""

    def __init__(self, metrics: Metrics, refusals: Refusals) -> None:
        self.debug = False  # whether each request is logged
        self._metrics = metrics
        self._refusals = refusals
        self._logged: set[tuple[object, ...]] = set()

    def failed(self, operation: str, error: Exception, caller: Any, about: str) -> int:
        """Count a request that failed, and log it if it shows a fault. Returns its errno."""
        number = errno_of(error) if isinstance(error, TtmfsError) else errno.EIO
        self._metrics.errors[operation, number] += 1
        if not isinstance(error, TtmfsError):
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            if self._is_first(operation, frame.f_code, line):
                log.exception("%s(%s) failed unforeseen; callers get EIO (logged once)", operation, about)
            return number
        self._refusals.note(operation, number, error, caller)
        # the errno, not the text: names in it are the caller's choice, and a caller could fill the log
        if isinstance(error, StoreFailed) and self._is_first(operation, getattr(error.__cause__, "errno", None)):
            log.error("%s; callers of %s get EIO (logged once)", error, operation)
        elif self.debug:
            log.debug("%s: %s: %s", operation, errno.errorcode[number], error)
        return number

    def refused(self, operation: str, number: int) -> None:
        """Count a request that is refused because daemons died of it."""
        self._metrics.errors[operation, errno.EIO] += 1
        if self._is_first(operation, number):
            log.error(
                "a request for %s is refused, because daemons died while they carried it out; its caller gets EIO",
                operation,
            )

    def _is_first(self, *cause: object) -> bool:
        """Whether a cause was not logged before."""
        if cause in self._logged:
            return False
        self._logged.add(cause)
        return True


class Requests:
    """The requests of one mount that the daemon answers itself.

    `locks` are those of :attr:`ttmfs.stores.store.Store.file_locks`.
    """

    def __init__(
        self, splice: Splice, handlers: PageRequests, in_flight: InFlight, metrics: Metrics, failures: Failures,
        locks: FileLocks | None,
    ) -> None:  # fmt: skip
        self._connection, self._splice = splice.connection, splice
        self._page_cache = handlers.page_cache
        self.kinds = handlers.kinds
        self.in_flight = in_flight
        self._metrics = metrics
        self._note_recent = handlers.tree.shared.recent_requests.latest.append
        self._failures = failures
        self._locks = locks
        self._interruptible: dict[int, trio.CancelScope] = {}

    def carry_out(self, message: memoryview, kind: Kind, request: Request, spawn: Spawn) -> None:
        """Answer a request, or start a task that will."""
        start, in_flight, number = time.perf_counter_ns(), self.in_flight, request.unique & ~RESENT
        if self._failures.debug:
            name = f"{bytes(message[kind.name_at :]).partition(bytes(1))[0]!r}, " if kind.name_at else ""
            log.debug("%s(%d, %spid=%d)", kind.name, request.node, name, request.pid)
        in_flight.begin(number)
        try:
            if self._locks is not None and not kind.changes and backup_of(request.node) in self._locks:
                answer: Any = self._locked(kind, request, bytes(message))
            else:
                answer = kind.handler(request, message)
            if type(answer) is FileRange:
                if not self._splice.send(self._header(request, answer.size), answer):
                    self._send(request, 0, answer.read())
            elif type(answer) is not bytes:
                spawn(self._finish, kind, request, answer, start, in_flight.wait())
                return
            else:
                if kind.changes:
                    if self._page_cache and backup_of(request.node) in self._page_cache:
                        spawn(self._finish, kind, request, _known(answer), start, in_flight.wait())
                        return
                    in_flight.note_answer(number, answer)
                self._send(request, 0, answer)
        except Exception as error:
            self._send_error(kind, request, error)
        in_flight.end()
        self._count(kind, request, start)

    def was_settled(self, request: Request) -> bool:
        """Answer a request that is sent again if the previous daemon carried it out, or if daemons have died of it."""
        number = request.number
        if (answer := self.in_flight.earlier_answer(number)) is not None:
            self._send(request, 0, answer)
        elif self.in_flight.is_refused(number):
            kind = self.kinds.get(request.opcode)
            self._failures.refused(kind.name if kind else f"opcode {request.opcode}", number)
            self._send(request, errno.EIO)
        else:
            return False
        return True

    async def _locked(self, kind: Kind, request: Request, message: bytes) -> bytes:
        """The answer of a handler that reads a backup which a thread is changing."""
        assert self._locks is not None
        async with self._locks.locked(backup_of(request.node)):
            answer = kind.handler(request, memoryview(message))
        if isinstance(answer, FileRange):
            return answer.read()
        return answer if isinstance(answer, bytes) else await answer

    async def _finish(
        self, kind: Kind, request: Request, answer: Coroutine[Any, Any, bytes], start: int, slot: int
    ) -> None:
        """Wait for an answer, and send it."""
        number, scope = request.number, trio.CancelScope()
        if kind.may_be_interrupted:
            self._interruptible[number] = scope
        try:
            body = None
            with scope:
                body = await answer
                if kind.changes and backup_of(request.node) in self._page_cache:
                    await self._page_cache.forget(backup_of(request.node))
            if body is None:
                self._send(request, errno.EINTR)
            else:
                if kind.changes:
                    self.in_flight.note_answer(number, body)
                self._send(request, 0, body)
        except Exception as error:
            self._send_error(kind, request, error)
        finally:
            self._interruptible.pop(number, None)
            self.in_flight.answered(slot)
            self._count(kind, request, start)

    def interrupt(self, message: memoryview) -> None:
        """FUSE_INTERRUPT: the caller of a request has got a signal. It ends a wait that has changed nothing yet."""
        (unique,) = OFFSET.unpack_from(message, HEADER.size)
        if scope := self._interruptible.get(unique & ~RESENT):
            scope.cancel()

    def _send_error(self, kind: Kind, request: Request, error: Exception) -> None:
        about = f"node {request.node}, {request.length} bytes, pid {request.pid}"
        number = self._failures.failed(kind.name, error, request, about)
        self._send(request, number)

    def _send(self, request: Request, number: int, body: bytes = b"") -> None:
        """Answer a request with an errno, or with 0 and a body."""
        send(self._connection, self._header(request, len(body), number), body)

    def _header(self, request: Request, size: int, number: int = 0) -> bytes:
        return ANSWER.pack(ANSWER.size + size, -number, request.unique)

    def _count(self, kind: Kind, request: Request, start: int) -> None:
        now = time.perf_counter_ns()
        self._metrics.count(kind.name, now - start)
        if now - start > SHORT or not now & SAMPLE:
            self._note_recent((request, now - start, now))


async def _known(answer: bytes) -> bytes:
    return answer
