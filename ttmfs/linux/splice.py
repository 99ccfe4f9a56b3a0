"""Answers whose body is a part of a file: the kernel copies it once, from the file to the caller, and not through us.

An answer is one write to the connection, so its header and its body meet in a pipe. A pipe of an unprivileged process
has 256 pages at most, and the header takes one: an answer of 1 MiB does not fit there, and is copied. With
CAP_SYS_RESOURCE a pipe can be larger.

Concurrency: one thread. The pipe is empty between answers.
"""

import contextlib
import errno
import fcntl
import os
from typing import NamedTuple

__all__ = ["LEAST_BYTES", "FileRange", "Splice"]

LEAST_BYTES = 128 << 10
"""From which size on splicing takes less time than copying the bytes through this process."""

PIPE_BYTES = (2 << 20, 1 << 20)
"""The sizes of the pipe to try. The first has room for the longest answer."""

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES_BESIDE = 2
"""Pages of the pipe that are not full: the header's, and one more if the body begins within a page."""


class FileRange(NamedTuple):
    """A part of a file as the body of an answer. The file may turn out to be shorter."""

    fd: int
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes, copied."""
        return os.pread(self.fd, self.size, self.offset)


class Splice:
    """A pipe to the kernel's connection. To be made before CAP_SYS_RESOURCE is renounced."""

    def __init__(self, connection: int) -> None:
        self.connection = connection
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for size in PIPE_BYTES:
            with contextlib.suppress(OSError):  # not allowed, or this user's pipes take too much already
                fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, size)
                break
        room = fcntl.fcntl(self._writer, fcntl.F_GETPIPE_SZ)
        self._most = room - PAGES_BESIDE * PAGE

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._reader)
        os.close(self._writer)

    def send(self, header: bytes, body: FileRange) -> bool:
        """Send an answer. False if nothing was sent: the file is shorter, or the pipe too small."""
        fd, offset, size = body
        if size > self._most:
            return False
        done = 0
        try:
            os.write(self._writer, header)
            while done < size and (moved := os.splice(fd, self._writer, size - done, offset_src=offset + done)):
                done += moved
            if done == size:
                os.splice(self._reader, self.connection, len(header) + size)
                return True
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):  # nobody waits for it any more
                done = size
            elif error.errno != errno.EAGAIN:  # the pipe is full
                raise
        self._empty()
        return done == size

    def _empty(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reader, 1 << 20):
                pass
