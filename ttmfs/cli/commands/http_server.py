"""A small HTTP server for one page of text, which anyone may ask for: every wait and every size is bounded.

Concurrency: one thread, because the page is made in child processes, and a process with threads must not fork. While a
page is made, others wait.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Mapping
from email.parser import BytesHeaderParser
from http import HTTPStatus

__all__ = ["Page", "listening", "serve"]

PATIENCE = 10.0
"""Seconds for a whole connection, without those for the page."""

LONGEST_REQUEST = 16 << 10  # bytes
MOST_CONNECTIONS = 64
Page = Callable[[str], tuple[bytes, str]]
"""Makes the page for an Accept header. Returns it with its type."""


def listening(host: str, port: int) -> socket.socket:
    """A listening socket. OSError if there is no such address, or another has it."""
    (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return socket.create_server(address[:2], family=family)


async def serve(listener: socket.socket, path: str, page: Page, ready: Callable[[], object]) -> signal.Signals:
    """Serve a page at a path. `ready` is called first. Returns the signal that ended it: SIGTERM or SIGINT."""
    loop, server = asyncio.get_running_loop(), _Server(path, page)
    received: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in signal.SIGTERM, signal.SIGINT:
        loop.add_signal_handler(number, received.put_nowait, number)
    async with await asyncio.start_server(server.connected, sock=listener, limit=LONGEST_REQUEST):
        ready()
        number = await received.get()
        for task in server.tasks:
            task.cancel()
    return number


class _Server:
    def __init__(self, path: str, page: Page) -> None:
        self.tasks: dict[asyncio.Task[None], None] = {}  # one for each connection, the oldest first
        self._path, self._page = path, page

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.tasks[task] = None
        if len(self.tasks) > MOST_CONNECTIONS:  # a scrape asks at once, so the oldest is none
            next(iter(self.tasks)).cancel()
        try:
            async with asyncio.timeout(PATIENCE):
                request = await reader.readuntil(b"\r\n\r\n")
            writer.write(self._answer(request))
            async with asyncio.timeout(PATIENCE):
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            del self.tasks[task]
            writer.close()

    def _answer(self, request: bytes) -> bytes:
        first, _, rest = request.partition(b"\r\n")
        method, _, target = first.partition(b" ")
        path = target.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET\n")
        if path != self._path.encode():
            return _response(HTTPStatus.NOT_FOUND, f"see {self._path}\n".encode())
        body, kind = self._page(str(BytesHeaderParser().parsebytes(rest).get("Accept", "")))
        return _response(HTTPStatus.OK, body, kind, {"Cache-Control": "no-store"}, is_head=method == b"HEAD")


def _response(
    status: HTTPStatus,
    body: bytes,
    kind: str = "text/plain; charset=utf-8",
    more: Mapping[str, str] | None = None,
    *,
    is_head: bool = False,
) -> bytes:
    headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **(more or {})}
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body * (not is_head)
