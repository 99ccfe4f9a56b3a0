"""Where the lines of the log go: standard error, the journal, syslog, or a file. Daemon and keeper both use it.

No sink waits, and none fails: a log that nobody reads, a full disk or a filesystem that hangs must not stop the mount.
A line that a sink does not take is lost. A file is written by a thread, and lines that it cannot take go to syslog.

The keeper imports this module by its path, so it imports only the standard library.
"""

import _thread
import contextlib
import os
import re
import select
import socket
import stat
import struct
import time
from collections import deque

TERMINAL, STDERR, JOURNAL, SYSLOG = "terminal", "stderr", "journal", "syslog"
"""The sinks beside files. TERMINAL is standard error without the time."""

SYSLOG_SOCKET, JOURNAL_SOCKET = "/dev/log", "/run/systemd/journal/socket"

CRITICAL, ERROR, WARNING, INFO, DEBUG = 2, 3, 4, 6, 7
"""Priorities of syslog(3)."""

LEVELS = {CRITICAL: "critical", ERROR: "error", WARNING: "warning", INFO: "info", DEBUG: "debug"}
LOG_DAEMON = 3 << 3
LONGEST = 60_000  # bytes of a line that journal and syslog get
MOST_LINES = 1000
"""Lines that wait for a file. If there are more, the oldest are lost."""

PIPE_BUF = select.PIPE_BUF
TTMFS = "fuse.ttmfs"
MODE = 0o640


class Sink:
    """Takes lines for a name, such as ``ttmfs``. `write` neither waits nor raises."""

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, priority: int, text: str) -> None:
        """Take a line, with a priority of syslog(3). It may contain line breaks."""
        raise NotImplementedError

    def flush(self, seconds: float) -> None:
        """Wait until the lines are written, but not longer than some seconds."""

    def close(self) -> None:
        """Close its files."""


class StandardError(Sink):
    """Standard error. If that is the journal, each line has its priority in front, as in sd-daemon(3)."""

    def __init__(self, name: str, *, has_time: bool) -> None:
        super().__init__(name)
        self._has_time, self._is_journal = has_time, is_journal()
        self._prefix = f"{name}: " if name else ""
        self._poll = select.poll()
        self._poll.register(2, select.POLLOUT)

    def write(self, priority: int, text: str) -> None:
        if self._is_journal:
            text = f"<{priority}>{self._prefix}{one_line(text)}\n"
        else:
            text = line(priority, self.name, text) if self._has_time else f"{self._prefix}{text}\n"
        data = encoded(text)
        with contextlib.suppress(OSError):
            if (again := _standard_error_again()) >= 0:
                try:
                    os.write(again, data)
                finally:
                    os.close(again)
                return
            for start in range(0, len(data), PIPE_BUF):  # a pipe that is ready takes as much without waiting
                if not any(ready & select.POLLOUT for _, ready in self._poll.poll(0)):
                    return
                os.write(2, data[start : start + PIPE_BUF])


def _standard_error_again() -> int:
    """A descriptor of standard error whose writes do not wait; -1 if it is no terminal or pipe, or another user's.

    poll(2) does not tell how much a terminal takes, and other processes write to the same pipe. O_NONBLOCK of
    descriptor 2 itself would be the caller's, too.
    """
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(2).st_mode) or os.isatty(2):
            return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return -1


class Syslog(Sink):
    """syslog(3). The library's handler would wait for a log that nobody reads."""

    def write(self, priority: int, text: str) -> None:
        send(SYSLOG_SOCKET, encoded(f"<{LOG_DAEMON | priority}>{self.name}[{os.getpid()}]: {text}")[:LONGEST] + b"\0")


class Journal(Sink):
    """The journal, by its own protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

    def write(self, priority: int, text: str) -> None:
        value = encoded(text)[:LONGEST]
        fields = f"PRIORITY={priority}\nSYSLOG_IDENTIFIER={self.name}\nSYSLOG_PID={os.getpid()}\nMESSAGE\n".encode()
        send(JOURNAL_SOCKET, fields + struct.pack("<Q", len(value)) + value + b"\n")


class File(Sink):
    """A file, opened by its name in a directory that stays open: whatever is mounted over the path later.

    The thread of :meth:`start` opens it, because the filesystem may hang. A file that was renamed or removed is made
    again, so logrotate(8) needs no signal. One that cannot be written is reported to syslog once.
    """

    def __init__(self, path: str, name: str) -> None:
        super().__init__(name)
        self._path, self._file = path, os.path.basename(path)
        self._directory = self._fd = -1
        self._failed = False
        self._lines: deque[tuple[int, str, str]] = deque(maxlen=MOST_LINES)
        self._writing = _thread.allocate_lock()
        self._syslog = Syslog(name)

    def write(self, priority: int, text: str) -> None:
        self._lines.append((priority, text, line(priority, self.name, text)))
        self.start()

    def start(self) -> None:
        """Have a thread open the file, and write what waits."""
        if self._writing.acquire(blocking=False):
            try:
                _thread.start_new_thread(self._drain, ())
            except RuntimeError:  # no thread can be started
                self._writing.release()

    def flush(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._writing.acquire(timeout=max(0.0, until - time.monotonic())):
            self._writing.release()
            if not self._lines or time.monotonic() > until:
                return
            self.start()  # lines that came when the thread was about to end

    def open(self) -> None:
        """Open the file now, and wait for it. Raises OSError."""
        if self._directory < 0:
            if lies_in_ttmfs(self._path):
                raise OSError("it lies in a ttmfs, whose daemon must not wait for itself")
            self._directory = os.open(os.path.dirname(self._path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._fd < 0:
            self._fd = self._opened()

    def close(self) -> None:
        for fd in self._directory, self._fd:
            if fd >= 0:
                os.close(fd)
        self._directory = self._fd = -1

    def _drain(self) -> None:
        """Open the file, and write what waits. It runs in a thread, which has the lock."""
        while True:
            self._try_to_write(b"")
            while self._lines:
                priority, text, shown = self._lines.popleft()
                if not self._try_to_write(encoded(shown)):
                    self._syslog.write(priority, text)
            self._writing.release()
            if not self._lines or not self._writing.acquire(blocking=False):
                return

    def _try_to_write(self, data: bytes) -> bool:
        try:
            self.open()
            self._reopen_if_renamed()
            os.write(self._fd, data)
        except OSError as error:
            if not self._failed:
                why = error.strerror or str(error)
                self._syslog.write(ERROR, f"the log file {self._path} cannot be written: {why}")
            self._failed = True
            return False
        self._failed = False
        return True

    def _reopen_if_renamed(self) -> None:
        try:
            named = os.stat(self._file, dir_fd=self._directory, follow_symlinks=False)
            if os.path.samestat(named, os.fstat(self._fd)):
                return
        except FileNotFoundError:
            pass
        fd = self._opened()
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)

    def _opened(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = os.open(self._file, flags | os.O_CREAT | os.O_EXCL, MODE, dir_fd=self._directory)
            os.fchmod(fd, MODE)  # whatever the umask is
        except FileExistsError:
            # With O_CREAT the kernel refuses another user's file in a directory like /tmp (fs.protected_regular).
            fd = os.open(self._file, flags | os.O_CREAT, MODE, dir_fd=self._directory)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(f"{self._file} is not a regular file")
        return fd


def make_sink(where: str, name: str) -> Sink:
    """The sink of a word above, or of the absolute path of a file."""
    if where in (TERMINAL, STDERR):
        return StandardError(name, has_time=where == STDERR)
    if where in (JOURNAL, SYSLOG):
        return Journal(name) if where == JOURNAL else Syslog(name)
    file = File(where, name)
    file.start()
    return file


def lies_in_ttmfs(path: str) -> bool:
    """Whether a real path lies in a ttmfs, by the kernel's list of mounts alone: nothing below the path is touched."""
    found, longest = "", 0
    with open("/proc/self/mountinfo", "rb") as mounts:
        for row in mounts:
            before, _, after = row.partition(b" - ")
            place = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), before.split(b" ")[4])
            if os.fsencode(path).startswith(place.rstrip(b"/") + b"/") and len(place) >= longest:
                found, longest = os.fsdecode(after.split(b" ")[0]), len(place)
    return found == TTMFS


def is_journal() -> bool:
    """Whether standard error leads to the journal (systemd.exec(5): JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):
        found = os.fstat(2)
        return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    return False


def line(priority: int, name: str, text: str) -> str:
    """A line of a file: the time with its zone, the level, the process, and the text."""
    now = time.time()
    local = time.localtime(now)
    zone = time.strftime("%z", local)
    when = f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}.{int(now % 1 * 1000):03}{zone[:3]}:{zone[3:5]}"
    return f"{when} {LEVELS.get(priority, 'info')} {name}[{os.getpid()}]: {one_line(text)}\n"


def one_line(text: str) -> str:
    """A text with its line breaks shown, so that an event is one line."""
    return " | ".join(text.splitlines())


def encoded(text: str) -> bytes:
    """The bytes of a text. Names in it need not be UTF-8."""
    return text.encode(errors="backslashreplace")


def send(address: str, message: bytes) -> None:
    """Send a datagram without waiting. It is lost if nobody takes it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as log:
        log.connect(address)
        log.send(message)
