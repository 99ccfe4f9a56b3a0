"""Becoming the daemon: behind a keeper, and in the background once the mount answers, and not before."""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from ..options import ExitCode, Options
from ..recovery import keeper
from ..recovery.keeper import ENDING, STARTS, Keeper
from . import inherited
from .mounting import MountError, is_automounter
from .service import note_service

__all__ = ["Process", "begin", "prepare"]

FEW_PROCESSES = "ulimit -u and the control group may limit them"

PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


def _priority_of(record: logging.LogRecord) -> int:
    """That of syslog(3)."""
    return next((number for level, number in PRIORITIES if record.levelno >= level), 7)


class _Journal(logging.Formatter):
    """One line an event, its priority before it, as sd-daemon(3) has it."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{_priority_of(record)}>" + " | ".join(super().format(record).splitlines())


def _is_journal() -> bool:
    """Whether standard error leads to the journal (systemd.exec(5): JOURNAL_STREAM)."""
    found = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def prepare() -> None:
    """Make this process fit to become a daemon, whatever its caller left it with."""
    _open_standard_streams()
    handler = logging.StreamHandler()
    handler.setFormatter(_Journal("%(message)s") if _is_journal() else logging.Formatter("mount.py: %(message)s"))
    logging.basicConfig(handlers=[handler])
    faulthandler.register(signal.SIGUSR2)  # where does it hang? kill -USR2 shows
    for number in ENDING:  # until the session waits for them
        signal.signal(number, signal.default_int_handler)
    signal.signal(keeper.RESTART, signal.SIG_IGN)


def _open_standard_streams() -> None:
    """Open those of descriptors 0, 1 and 2 that the caller closed, so that nothing of ours gets their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 # it is kept


@dataclass
class Process:
    """The process that serves a mount, and its keeper."""

    held: dict[str, int]  # the descriptors that the previous daemon left, by the keeper's names for them
    keeper: Keeper | None
    ready: Callable[[], None]  # to be called once requests are answered
    another_keeper: Callable[[], Keeper]  # replaces a keeper that died; raises OSError
    become_keeper: Callable[[dict[str, int]], None]
    """Makes this process, which has no keeper, a keeper that starts the next daemon with these descriptors.

    It does not return.
    """


def begin(source: str, mountpoint: str, options: Options, *, foreground: bool) -> Process:
    """Become what serves: in the background unless in the foreground, and kept by a keeper unless without.

    The process that called exits with 0 if and only if the mount answers; else with the status of the one that serves,
    which has said why on standard error. In the foreground, with a keeper of our own, it becomes that. A process that a
    keeper or a service manager with a store of descriptors has started stays what it is.
    """
    held, kept_by = keeper.inherited(), Keeper.of_environment()
    inherited.drop_the_callers()
    if not held:  # else the mount is there, and goes on with what there is
        inherited.check_limits()
    starts, told = held.pop(STARTS, -1), -1
    log_to = "syslog" if not foreground else "journal" if _is_journal() else "stderr"
    place = mountpoint if held else os.path.realpath(mountpoint)  # of a mount that is there it would ask: of ourselves
    command = _command(source, place, options, foreground)
    about = options.restart_tries, float(options.restart_seconds), log_to, place, command
    if held and not foreground:
        _log_to_syslog()
    if not kept_by:
        try:
            if not foreground:
                told = _detach(alone=not is_automounter(place))
            if options.keeper:
                keeper.become(*about, ready=told)
                kept_by, told = Keeper.of_environment(), -1
        except OSError as error:
            raise MountError(f"no process can be started: {error.strerror}; {FEW_PROCESSES}", ExitCode.SYSTEM) from None

    def ready() -> None:
        if starts >= 0:
            note_service(starts, options.restart_tries, options.restart_seconds)
        if not foreground:
            _leave_terminal()
        if told >= 0:
            with contextlib.suppress(BrokenPipeError):  # whoever waited was killed; the mount is no worse for it
                os.write(told, b"\1")
            os.close(told)

    return Process(held, kept_by, ready, lambda: keeper.another(*about), lambda kept: keeper.become_alone(kept, *about))


def _command(source: str, mountpoint: str, options: Options, foreground: bool) -> list[str]:
    """The command that takes this mount over, whatever its working directory."""
    program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    program[0] = sys.executable
    if len(program) == 1 or program[-2] not in ("-c", "-m"):
        program[-1] = os.path.abspath(program[-1])
    words = ["-f"] * foreground + (["-o", shown] if (shown := options.show()) else [])
    return [*program, *words, "--", source, mountpoint]


def _detach(*, alone: bool) -> int:
    """Fork. The parent exits once it is told that the mount answers; the child gets the pipe to tell it by.

    It gets a session too, if it is to be `alone`.
    """
    answer, question = os.pipe()
    child = os.fork()
    if child:
        os.close(question)
        try:
            if os.read(answer, 1):
                code = int(ExitCode.OK)
            else:
                _, status = os.waitpid(child, 0)
                code = os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else ExitCode.BUG
        except KeyboardInterrupt:
            _end(child)
            code = ExitCode.INTERRUPTED
        sys.stderr.flush()
        os._exit(code)
    os.close(answer)
    if alone:
        os.setsid()
    return question


def _leave_terminal() -> None:
    os.chdir("/")
    _log_to_syslog()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in 0, 1, 2:
        os.dup2(null, stream)
    os.close(null)


def _end(child: int) -> None:
    """Make the child unmount, and wait until it has. It may have ended already."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)


class _Syslog(logging.Handler):
    """The log of a daemon in the background. The library's handler would wait for syslog, and stop the mount."""

    def emit(self, record: logging.LogRecord) -> None:
        keeper.write_to_syslog("ttmfs", _priority_of(record), self.format(record))


def _log_to_syslog() -> None:
    """Send the log to where a daemon's belongs; nowhere while there is no syslog."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    root.addHandler(_Syslog())
