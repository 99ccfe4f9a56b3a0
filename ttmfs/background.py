"""Going to the background once the mount answers, and not before."""

import contextlib
import logging
import logging.handlers
import os
import signal
import sys
import threading
from collections.abc import Callable

from .options import ExitCode

__all__ = ["detach"]

ANSWER_SECONDS = 10.0
SYSLOG = "/dev/log"


def detach(mountpoint: str) -> Callable[[], None]:
    """Fork. The parent waits until the mount answers and exits; the child gets what it must call when it serves.

    The parent exits with 0 if and only if it has opened a file of the mount. If the child ends before that, the parent
    exits with the child's status; the child has said why on standard error, which it keeps until then.
    """
    answer, question = os.pipe()
    child = os.fork()
    if child:
        os.close(question)
        try:
            code = _wait_for(child, answer, mountpoint)
        except KeyboardInterrupt:
            code = ExitCode.INTERRUPTED
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGTERM)
                os.waitpid(child, 0)
        sys.stderr.flush()
        os._exit(code)
    os.close(answer)
    os.setsid()

    def ready() -> None:
        os.chdir("/")
        _log_to_syslog()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in 0, 1, 2:
            os.dup2(null, stream)
        os.close(null)
        os.write(question, b"\1")
        os.close(question)

    return ready


def _wait_for(child: int, answer: int, mountpoint: str) -> int:
    if not os.read(answer, 1):
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else ExitCode.BUG
    opened = threading.Event()

    def open_and_close() -> None:
        # The close matters too: it tells the kernel that there is nothing to flush, and that no later close need ask.
        with contextlib.suppress(PermissionError):  # an answer as well
            os.close(os.open(os.path.join(mountpoint, ".stats"), os.O_RDONLY))
        opened.set()

    threading.Thread(target=open_and_close, daemon=True).start()
    if opened.wait(ANSWER_SECONDS):
        return ExitCode.OK
    print(f"mount.py: {mountpoint} is mounted, but does not answer", file=sys.stderr)  # noqa: T201
    return ExitCode.FAILED


def _log_to_syslog() -> None:
    """Send the log to where a daemon's belongs; nowhere if there is no syslog."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    with contextlib.suppress(OSError):
        handler = logging.handlers.SysLogHandler(SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter(f"ttmfs[{os.getpid()}]: %(message)s"))
        root.addHandler(handler)
    if not root.handlers:
        root.addHandler(logging.NullHandler())
