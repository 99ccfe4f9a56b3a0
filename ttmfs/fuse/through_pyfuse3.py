"""pyfuse3 as the server of what the daemon does not answer itself, behind a socket pair.

libfuse takes one end for its connection to the kernel. Requests are passed to it as they came, and its answers are
passed on to the kernel. These requests change nothing, and their answers are small.

Concurrency: one thread. libfuse writes its answers in this thread, so it must never find the socket full. MOST_PASSED
answers fit into the smallest buffer that an ordinary user gets.
"""

import socket
from collections import deque

import pyfuse3
import trio

from ..linux.fuse_protocol import ANSWER, RESENT
from . import init_answer, replies
from .in_flight import InFlight

__all__ = ["ThroughPyfuse3"]

MOST_PASSED = 24
"""Requests that pyfuse3 may have at once; others wait. The longest answer is a link's target, 4 KiB at most."""


class ThroughPyfuse3:
    """The requests that pyfuse3 has. A process has one of these: pyfuse3 keeps its session in globals.

    `init` is the kernel's first message. Its answer goes to the kernel unless another daemon has answered it
    (`taken_over`). `passthrough`: whether files may be opened in passthrough mode.
    """

    def __init__(
        self, connection: int, in_flight: InFlight, init: bytes, *, taken_over: bool, passthrough: bool
    ) -> None:
        self._connection = connection
        self._in_flight = in_flight
        self._taken_over, self._passthrough = taken_over, passthrough
        self.initialized = trio.Event()
        """FUSE_INIT is answered: the kernel may send other requests."""
        self._slots: dict[int, int] = {}  # of the requests that pyfuse3 has, by number
        self._waiting: deque[bytes] = deque()
        self.socket, self._libfuse_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.send(init)

    def begin(self, operations: pyfuse3.Operations) -> None:
        """Start pyfuse3's session. libfuse owns its end of the socket pair from here on."""
        pyfuse3.init(operations, f"/dev/fd/{self._libfuse_end.detach()}", set())

    def close(self) -> None:
        """End the session. Nothing is unmounted."""
        pyfuse3.close(unmount=False)
        self.socket.close()

    async def serve(self) -> None:
        """Serve until :meth:`end` is called."""
        await pyfuse3.main(max_tasks=MOST_PASSED)

    def end(self) -> None:
        """Serve no more."""
        pyfuse3.terminate()

    def pass_request(self, unique: int, message: memoryview) -> None:
        """Have pyfuse3 answer a request."""
        number = unique & ~RESENT
        self._in_flight.begin(number)
        self._slots[number] = self._in_flight.wait()
        if len(self._slots) <= MOST_PASSED:
            self.socket.send(message)
        else:
            self._waiting.append(bytes(message))

    def pass_answers(self) -> None:
        """Send the answers that there are to the kernel."""
        while True:
            try:
                answer = self.socket.recv(1 << 17, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not answer:
                return
            if not self.initialized.is_set():
                self.initialized.set()
                if self._taken_over:
                    continue
                answer = init_answer.edited(answer, passthrough=self._passthrough)
            replies.send(self._connection, answer)
            _, _, unique = ANSWER.unpack_from(answer)
            if (slot := self._slots.pop(unique & ~RESENT, None)) is not None:
                self._in_flight.answered(slot)
            if self._waiting:
                self.socket.send(self._waiting.popleft())
