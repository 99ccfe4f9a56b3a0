"""The loop that reads the kernel's requests. It runs where trio would sleep.

trio calls an instrument's ``before_io_wait`` when no task can run, with the time that it would sleep. There the loop
reads and answers requests, until trio has something to do: a task's file is ready, a deadline has come, a thread is
done. It waits for all of these at once, in an epoll that holds the connection, pyfuse3's socket and trio's own epoll.
So a request that waits for nothing is read, answered and forgotten without a task.

Concurrency: one thread. Handlers that wait become tasks of the nursery.
"""

import contextlib
import errno
import io
import os
import select
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from ..linux.fuse_protocol import BATCH_FORGET, FORGET, HEADER, INTERRUPT, LARGEST_REQUEST, RESENT, Request
from .busy_poll import BusyPoll
from .requests import Requests
from .through_pyfuse3 import ThroughPyfuse3

if TYPE_CHECKING:
    from .compiled_requests import CompiledRequests

__all__ = ["ReadingLoop"]

TURN, SHORT_TURN = 10_000_000, 500_000
"""The most ns between two looks at what trio's tasks wait for. The short one applies while requests wait in tasks."""


class ReadingLoop(trio.abc.Instrument):
    """Serves one connection. `most_waiting` bounds the requests that wait at once; then no more are read.

    `compiled` makes what answers the plain requests, given the buffer for requests. None: Python answers them.
    """

    def __init__(
        self, connection: int, requests: Requests, others: ThroughPyfuse3, busy_poll: BusyPoll, most_waiting: int,
        compiled: "Callable[[memoryview], CompiledRequests] | None" = None,
    ) -> None:  # fmt: skip
        self._connection = connection
        self._requests = requests
        self._in_flight = requests.in_flight
        self._others = others
        self._busy_poll = busy_poll
        self._most_waiting = most_waiting
        os.set_blocking(connection, False)
        self._file = io.FileIO(connection, "r+b", closefd=False)  # it reads into a buffer, which os.read does not
        self._buffer = memoryview(bytearray(LARGEST_REQUEST))
        self._read_one: Callable[[], int | None] = partial(self._file.readinto, self._buffer)
        self._read_next: Callable[[], int | None] = self._read_one
        self._make_compiled, self._uses_compiled = compiled, compiled is not None
        self._compiled: CompiledRequests | None = None
        self._registered = False  # whether the epoll waits for requests
        self._ended = trio.Event()
        self._error: BaseException | None = None

    async def serve(self) -> None:
        """Serve until the connection ends, or :meth:`end` is called. Then wait for the requests that wait."""
        self._token = trio.lowlevel.current_trio_token()
        (trios,) = _epolls()
        with select.epoll() as self._epoll, contextlib.ExitStack() as at_the_end:
            if self._make_compiled:
                self._compiled = self._make_compiled(self._buffer)
                self._choose()
                at_the_end.callback(self._compiled.close)
            for fd in self._others.socket.fileno(), trios:
                self._epoll.register(fd, select.EPOLLIN)
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._others.serve)
                trio.lowlevel.add_instrument(self)
                try:
                    await self._ended.wait()
                finally:
                    trio.lowlevel.remove_instrument(self)
                    self._others.end()
                if self._error:
                    raise self._error

    def use_compiled(self, wanted: bool) -> bool:
        """Choose what answers plain requests: Python, or the compiled code. Returns whether that does."""
        self._uses_compiled = wanted and self._make_compiled is not None
        self._choose()
        return self._uses_compiled

    def _choose(self) -> None:
        compiled = self._compiled if self._uses_compiled else None
        self._read_next = compiled.answer_plain if compiled else self._read_one

    def end(self) -> None:
        """Read no more."""
        self._token.run_sync_soon(self._ended.set)

    def before_io_wait(self, timeout: float) -> None:
        """Answer requests for as long as trio has nothing to do. It would sleep for `timeout` seconds."""
        try:
            if timeout:
                self._serve_until(time.perf_counter_ns() + int(timeout * 1e9))
            elif length := self._look(0)[0]:  # tasks can run: few requests in between
                self._answer(length)
        except BaseException as error:  # trio would only log it
            self._error = error
            self.end()

    def _serve_until(self, deadline: int) -> None:
        """Answer requests until trio has something to do, or the deadline has come, in ns of perf_counter_ns().

        trio then still sleeps as long as it said, unless one of its files is ready. So it is woken.
        """
        clock, in_flight = time.perf_counter_ns, self._in_flight
        looked_at, length = clock(), None
        while True:
            if length != 0:  # then none is left
                length = self._read()
            if not length and not in_flight.waiting:
                length = self._busy_poll.poll(self._read)
            if length is None:
                length, trio_is_due = self._look(max(0.0, (deadline - clock()) / 1e9))
                self._busy_poll.woken()
                looked_at = clock()
            else:
                trio_is_due = False
            if length:
                self._answer(length)
            now = clock()
            if not trio_is_due and now > looked_at + (SHORT_TURN if in_flight.waiting else TURN):
                length, trio_is_due = self._look(0)
                if length:
                    self._answer(length)
                looked_at = now
            if trio_is_due or now >= deadline:
                self._token.run_sync_soon(_wake, idempotent=True)
                return

    def _look(self, seconds: float) -> tuple[int | None, bool]:
        """Wait for anything. Returns what :meth:`_read` does, and whether a file of trio's is ready."""
        if (self._in_flight.waiting < self._most_waiting) != self._registered:
            self._registered = not self._registered
            if self._registered:
                self._epoll.register(self._connection, select.EPOLLIN)
            else:
                self._epoll.unregister(self._connection)
        length, trio_is_due = None, False
        if seconds and self._compiled and self._uses_compiled and self._registered and self._busy_poll.is_off:
            length = self._read(partial(self._compiled.wait, self._epoll.fileno(), seconds))
            if length is not None:
                return length, False
            seconds = 0  # it has waited
        for fd, _ in self._epoll.poll(seconds):
            if fd == self._connection:
                length = self._read()
            elif fd == self._others.socket.fileno():
                self._others.pass_answers()
            else:
                trio_is_due = True
        return length, trio_is_due

    def _read(self, read: Callable[[], int | None] | None = None) -> int | None:
        """Read the next request into the buffer. Returns its length; None if there is none, or if too many wait.

        0: there were some, and the compiled code has answered them all. `read` reads otherwise than usual.
        """
        if self._in_flight.waiting >= self._most_waiting:
            return None
        try:
            return (read or self._read_next)()
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ECONNABORTED):  # it was unmounted, or cut off
                self.end()
            elif error.errno not in (errno.ENOENT, errno.EINTR):  # its caller was killed meanwhile
                raise
            return None

    def _answer(self, length: int) -> None:
        """Answer the request in the buffer, or have it answered."""
        message = self._buffer[:length]
        request = Request._make(HEADER.unpack_from(message))
        if request.unique & RESENT and self._requests.was_settled(request):
            return
        if kind := self._requests.kinds.get(request.opcode):
            self._requests.carry_out(message, kind, request, self._spawn)
        elif request.opcode == INTERRUPT:
            self._requests.interrupt(message)
        elif request.opcode not in (FORGET, BATCH_FORGET):  # nothing is kept for an inode
            self._others.pass_request(request.unique, message)

    def _spawn(self, function: Callable[..., Coroutine[Any, Any, None]], /, *arguments: Any) -> None:
        self._token.run_sync_soon(self._nursery.start_soon, function, *arguments)


def _wake() -> None:
    """Do nothing: to be called from trio's loop."""


def _epolls() -> list[int]:
    """The descriptors of this process's epolls. In :func:`trio.run` there is one, which trio keeps to itself."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                found.append(int(name))
        except OSError:
            pass  # the listing's own
    return found
