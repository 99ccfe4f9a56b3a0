"""Becoming the daemon: behind a keeper, and in the background once the mount answers."""

import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from ..options import ExitCode, Options
from ..recovery import keeper_client
from ..recovery.keeper_client import Keeper
from ..recovery.keeper_protocol import ENDING, RESTART
from ..recovery.log_sink import STDERR
from . import inherited, log
from .mounting import MountError, is_automounter

__all__ = ["Process", "begin", "prepare"]

FEW_PROCESSES = "ulimit -u and the control group may limit them"


@dataclass
class Process:
    """How this process serves: the previous daemon's descriptors, by the keeper's names, and its keeper."""

    held: dict[str, int]
    keeper: Keeper | None
    ready: Callable[[], None]
    """To be called once requests are answered."""
    start_keeper: Callable[[], Keeper]
    """Starts a keeper in place of one that died. Raises OSError."""
    become_keeper: Callable[[dict[str, int]], NoReturn]
    """Makes this process, which has no keeper, the keeper of descriptors. It starts the next daemon."""
    wants_standby: bool
    """Whether the keeper is to keep a standby."""
    log_to: str
    """Where the log goes: a word of ttmfs.recovery.log_sink, or the path of a file."""

    @property
    def has_standby(self) -> bool:
        """Whether the keeper keeps one."""
        return self.wants_standby and self.keeper is not None


def prepare(name: str) -> None:
    """Prepare this process to become a daemon, whatever its caller left it with. Messages begin with `name`."""
    _open_standard_streams()
    log.begin(name)
    faulthandler.register(signal.SIGUSR2)  # where does it hang? kill -USR2 shows
    for number in ENDING:  # until the session waits for them
        signal.signal(number, signal.default_int_handler)
    for number in RESTART, signal.SIGIO:  # the latter: see system_calls.is_open_elsewhere()
        signal.signal(number, signal.SIG_IGN)


def _open_standard_streams() -> None:
    """Open those of descriptors 0, 1 and 2 that the caller closed: no other file may get their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 # it is kept


def begin(source: str, mountpoint: str, options: Options, *, foreground: bool) -> Process:
    """Become the process that serves: in the background if asked to, and behind a keeper if the options say so.

    The process that called exits with 0 if and only if the mount answers; else with the status of the process that
    serves, which has said why on standard error. In the foreground it becomes the keeper, if that is one of our own. A
    process that a keeper started stays what it is. A service manager that stores descriptors has a keeper as the main
    process of its unit, whatever the options say.
    """
    held = keeper_client.inherited()
    started_by = Keeper.found(held)
    inherited.drop_the_callers()
    if not held:  # else the mount is there, and continues with what there is
        inherited.check_limits()
    told = -1
    place = mountpoint if held else os.path.realpath(mountpoint)  # of its own mount a daemon must not ask
    if not held:
        options = replace(options, log=log.resolved(options.log, place))
    log_to = log.sink_of(options.log, foreground=foreground)
    about = log_to, _command(source, place, options, foreground)
    if takes_over := bool(held):
        log.switch(log_to)
    if not started_by:
        if held:
            keeper_client.become_keeper(held, *about)
        try:
            if not foreground:
                told = _detach(alone=not is_automounter(place))
            if options.keeper or keeper_client.is_managed():
                started_by, told = keeper_client.fork_daemon(*about, ready=told), -1
        except OSError as error:
            raise MountError(f"no process can be started: {error.strerror}; {FEW_PROCESSES}", ExitCode.SYSTEM) from None

    return Process(
        held,
        started_by,
        ready=lambda: _tell_ready(told, log_to, foreground=foreground, takes_over=takes_over),
        start_keeper=lambda: keeper_client.start_keeper(*about),
        become_keeper=lambda kept: _become_keeper(kept, *about),
        wants_standby=options.standby,
        log_to=log_to,
    )


def _become_keeper(held: dict[str, int], log_to: str, command: list[str]) -> NoReturn:
    log.flush()
    keeper_client.become_keeper(held, log_to, command)


def _tell_ready(told: int, log_to: str, *, foreground: bool, takes_over: bool) -> None:
    """The mount answers: log where the options say, leave the terminal, and tell the caller."""
    if not takes_over:
        log.switch(log_to)
    if not foreground:
        _leave_terminal(log_to)
    if told >= 0:
        with contextlib.suppress(BrokenPipeError):  # the caller was killed; the mount serves all the same
            os.write(told, b"\1")
        os.close(told)


def _command(source: str, mountpoint: str, options: Options, foreground: bool) -> list[str]:
    """The command that takes this mount over, whatever its working directory."""
    program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    program[0] = sys.executable
    if len(program) == 1 or program[-2] not in ("-c", "-m"):
        program[-1] = os.path.abspath(program[-1])
    words = ["-f"] * foreground + (["-o", shown] if (shown := options.show()) else [])
    return [*program, *words, "--", source, mountpoint]


def _detach(*, alone: bool) -> int:
    """Fork. The parent exits once the mount answers; the child gets the pipe on which to tell it.

    The child gets a session of its own if it is to be `alone`.
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


def _leave_terminal(log_to: str) -> None:
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1) if log_to == STDERR else (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


def _end(child: int) -> None:
    """End the child, and wait until it has unmounted."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
