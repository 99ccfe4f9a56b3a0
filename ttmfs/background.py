"""Going to the background once the mount answers, and not before."""

import contextlib
import faulthandler
import logging
import logging.handlers
import os
import signal
import sys
import threading
from collections.abc import Callable

from .options import ExitCode
from .session import ENDING

__all__ = ["detach", "prepare"]

ANSWER_SECONDS = 10.0
SYSLOG = "/dev/log"


def prepare(level: str) -> None:
    """Make this process fit to become a daemon, whatever its caller left it with."""
    _open_standard_streams()
    logging.basicConfig(format="mount.py: %(message)s", level=level)
    faulthandler.register(signal.SIGUSR2)  # where does it hang? kill -USR2 shows
    for number in ENDING:  # until the session waits for them
        signal.signal(number, signal.default_int_handler)


def _open_standard_streams() -> None:
    """Open those of descriptors 0, 1 and 2 that the caller closed, so that nothing of ours gets their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 # it is kept


def detach(mountpoint: str) -> Callable[[], None]:
    """Fork. The parent waits until the mount answers and exits; the child gets what it must call when it serves.

    The parent exits with 0 if and only if it has opened a file of the mount. If the child ends before that, the parent
    exits with the child's status; the child has said why on standard error, which it keeps until then.
    """
    mountpoint = os.path.abspath(mountpoint)  # "." would go on meaning the directory that is covered
    answer, question = os.pipe()
    child = os.fork()
    if child:
        os.close(question)
        try:
            code = _wait_for(child, answer, mountpoint)
        except KeyboardInterrupt:
            _end(child)
            code = ExitCode.INTERRUPTED
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
        with contextlib.suppress(BrokenPipeError):  # whoever waited was killed; the mount is no worse for it
            os.write(question, b"\1")
        os.close(question)

    return ready


def _wait_for(child: int, answer: int, mountpoint: str) -> int:
    if not os.read(answer, 1):
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else ExitCode.BUG
    tried, why = threading.Event(), ["no answer"]

    def open_and_close() -> None:
        # The close matters too: it tells the kernel that there is nothing to flush, and that no later close need ask.
        try:
            os.close(os.open(os.path.join(mountpoint, ".stats"), os.O_RDONLY))
            why.clear()
        except PermissionError:  # an answer as well
            why.clear()
        except OSError as error:
            why[:] = [error.strerror or str(error)]
        tried.set()

    threading.Thread(target=open_and_close, daemon=True).start()
    tried.wait(ANSWER_SECONDS)
    if not why:
        return ExitCode.OK
    sys.stderr.write(f"mount.py: {mountpoint} was mounted, but cannot be used: {why[0]}\n")
    _end(child)
    return ExitCode.FAILED


def _end(child: int) -> None:
    """Make the child unmount, and wait until it has. It may have ended already."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)


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
