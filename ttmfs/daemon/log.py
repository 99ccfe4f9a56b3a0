"""The daemon's log: the sink that takes its lines, and from when on.

Until the mount answers, lines go to standard error, so that the mounting user sees them. Then they go to the sink that
``log=`` names. :mod:`ttmfs.recovery.log_sink` has the sinks, which the keeper uses too.
"""

import atexit
import contextlib
import logging
import os
import stat

from ..options import AUTO_LOG, ExitCode
from ..recovery import log_sink
from ..recovery.log_sink import JOURNAL, STDERR, SYSLOG, TERMINAL, File, Sink, make_sink
from .mounting import MountError

__all__ = ["begin", "flush", "resolved", "sink_of", "switch"]

FLUSH_SECONDS = 0.5

PRIORITIES = (
    (logging.CRITICAL, log_sink.CRITICAL),
    (logging.ERROR, log_sink.ERROR),
    (logging.WARNING, log_sink.WARNING),
    (logging.INFO, log_sink.INFO),
)


class _Handler(logging.Handler):
    """Gives each record to a sink."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self.sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        priority = next((number for level, number in PRIORITIES if record.levelno >= level), log_sink.DEBUG)
        self.sink.write(priority, self.format(record))


def begin(name: str) -> None:
    """Log to standard error. Lines begin with `name`, except in the journal."""
    logging.basicConfig(handlers=[_Handler(make_sink(TERMINAL, "" if log_sink.is_journal() else name))])
    atexit.register(flush)


def switch(where: str) -> None:
    """Log to another sink from now on. It waits for no file."""
    if where == TERMINAL:
        return
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    root.addHandler(_Handler(make_sink(where, "ttmfs")))


def flush() -> None:
    """Wait a little for lines that are not written yet: this process ends, or executes another program."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Handler):
            handler.sink.flush(FLUSH_SECONDS)


def sink_of(log: str, *, foreground: bool) -> str:
    """The sink that the option ``log=`` means."""
    return log if log != AUTO_LOG else TERMINAL if foreground else SYSLOG


def resolved(log: str, mountpoint: str) -> str:
    """The option ``log=`` for a new mount, with the real path of its file, which is made. Raises MountError."""
    if log == JOURNAL and not _is_socket(log_sink.JOURNAL_SOCKET):
        raise MountError(f"log=journal: there is no journal here ({log_sink.JOURNAL_SOCKET}); use log=FILE or syslog")
    if log == SYSLOG and not _is_socket(log_sink.SYSLOG_SOCKET):
        logging.warning("log=syslog: there is no syslog here (%s): lines are lost", log_sink.SYSLOG_SOCKET)
    if log in (AUTO_LOG, JOURNAL, SYSLOG, STDERR):
        return log
    directory, name = os.path.split(log)
    path = os.path.join(os.path.realpath(directory), name)
    if os.path.commonpath([path, mountpoint]) == mountpoint:
        raise MountError(f"log: {log} lies below the mount point: the daemon would wait for itself; use another file")
    file = File(path, "ttmfs")
    try:
        file.open()
    except OSError as error:
        raise MountError(f"log: {log}: {error.strerror or error}; use another file", ExitCode.USAGE) from None
    finally:
        file.close()
    return path


def _is_socket(path: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISSOCK(os.stat(path).st_mode)
    return False
