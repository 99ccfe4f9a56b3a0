"""The daemon's side of the keeper: what it was started with, what it tells its keeper, and how keepers are started.

A keeper holds the kernel's connection, the store's directory and the mount's state. Meanwhile the daemon can be killed
at any instant: clients wait, the keeper starts another daemon, and that one takes over. The keeper is the program
``keeper.py`` beside this file; :mod:`ttmfs.recovery.keeper_protocol` is what both speak. A service manager that stores
descriptors starts the keeper as its unit's main process; then the daemon dies with its keeper.
"""

import contextlib
import math
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from typing import NoReturn

from .keeper_protocol import ENDING, FIRST_DESCRIPTOR, HELD, KEEPER, KEEPER_PID, PATIENCE, RESTART
from .service_manager import ServiceManager

__all__ = ["Keeper", "become_keeper", "extended", "fork_daemon", "inherited", "is_managed", "start_keeper"]

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "keeper.py")
BARRIER_SECONDS = 5.0
EXTEND_SECONDS = 5.0


def inherited() -> "dict[str, int]":
    """The descriptors that a keeper passed to this process, by name. The environment tells it only once."""
    count, names, pid = (os.environ.pop(f"LISTEN_{name}", "") for name in ("FDS", "FDNAMES", "PID"))
    if pid != str(os.getpid()):
        return {}
    numbers = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    for fd in numbers:
        os.set_inheritable(fd, False)
    return dict(zip(names.split(":"), numbers, strict=False))


class Keeper:
    """The keeper of this process.

    `pid` is 0 if it was dead already. `patience` is how many seconds it waits for a sign of life. `is_managed`: whether
    a service manager started it.
    """

    def __init__(self, pid: int, channel: int, patience: float = math.inf, *, is_managed: bool = False) -> None:
        self._channel, self.patience, self.is_managed = channel, patience, is_managed
        self.pid, self._pidfd = pid, -1
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.pid = 0

    @classmethod
    def found(cls, held: "dict[str, int]") -> "Keeper | None":
        """The keeper that started this process, if there is one. Takes its channel out of what it passed."""
        pid, patience = (os.environ.pop(name, "") for name in (KEEPER_PID, PATIENCE))
        if KEEPER not in held:
            return None
        if patience:
            _die_with(int(pid))
        return cls(int(pid), held.pop(KEEPER), float(patience or "inf"), is_managed=bool(patience))

    @property
    def death(self) -> int:
        """A descriptor that becomes readable when the keeper dies; -1 if it is dead."""
        return self._pidfd

    def close(self) -> None:
        """Close the descriptors, and reap the keeper if it was a child of this process."""
        if self.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
        for fd in self._pidfd, self._channel:
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._channel = -1

    def tell(self, *lines: str, descriptors: "tuple[int, ...]" = (), seconds: float = BARRIER_SECONDS) -> None:
        """Send a message, within some seconds. Raises OSError if the keeper does not take it."""
        with socket.socket(fileno=os.dup(self._channel)) as channel:
            channel.settimeout(seconds)
            if descriptors:
                socket.send_fds(channel, ["\n".join(lines).encode()], list(descriptors))
            else:
                channel.send("\n".join(lines).encode())

    def keep(self, descriptors: "dict[str, int]", *lines: str) -> None:
        """Give it descriptors to hold, send lines, and wait until it has handled all of it. Raises OSError."""
        for name, fd in descriptors.items():
            self.tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=(fd,))
        for line in lines:
            self.tell(line)
        handled, barrier = os.pipe()
        try:
            try:
                self.tell("BARRIER=1", descriptors=(barrier,))
            finally:
                os.close(barrier)
            if not _read_in_time(handled):
                raise ConnectionRefusedError("the keeper died")
            _read_in_time(handled)  # its service manager has handled all of it, too
        finally:
            os.close(handled)


@contextlib.contextmanager
def extended(keeper: "Keeper | None") -> Iterator[None]:
    """Have a keeper not give up while this thread waits, and touches nothing of the keeper's."""
    import threading  # only here, since ttmfs-service is to import little

    ended = threading.Event()

    def extend(keeper: Keeper) -> None:
        while not ended.wait(EXTEND_SECONDS):
            with contextlib.suppress(OSError):
                keeper.tell("EXTEND=1")

    if keeper:
        with contextlib.suppress(RuntimeError):  # no thread can be started: then it does not wait longer
            threading.Thread(target=extend, args=[keeper], daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _read_in_time(pipe: int) -> bytes:
    """A byte, or none at the end of the pipe. Raises TimeoutError."""
    poll = select.poll()  # select(2) knows no descriptor above 1023
    poll.register(pipe, select.POLLIN)
    if not poll.poll(BARRIER_SECONDS * 1000):
        raise TimeoutError("the keeper does not answer")
    return os.read(pipe, 1)


def is_managed() -> bool:
    """Whether this process is the main process of a unit whose manager stores descriptors."""
    return bool(ServiceManager.found(os.environ))


def fork_daemon(log: str, command: "list[str]", ready: int) -> Keeper:
    """Fork. The child returns, as the daemon, with its keeper; this process becomes that keeper.

    The keeper writes a byte to `ready` (-1: none) when the daemon serves. Raises OSError if no process can be started.
    """
    (channel, daemons_end), keeper, signals = _channel(), os.getpid(), {*ENDING, RESTART}
    manager = ServiceManager.found(os.environ)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until the keeper handles them
    try:
        daemon = os.fork()
    except OSError:
        os.close(channel)
        os.close(daemons_end)
        raise
    if daemon:
        held = {"channel": channel, KEEPER: daemons_end, "ready": ready}
        _execute_keeper({name: fd for name, fd in held.items() if fd >= 0}, daemon, log, command)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    os.close(channel)
    if ready >= 0:
        os.close(ready)
    if manager:
        _die_with(keeper)
    return Keeper(keeper, daemons_end, manager.watchdog or math.inf, is_managed=bool(manager))


def become_keeper(held: "dict[str, int]", log: str, command: "list[str]") -> NoReturn:
    """Become the keeper of descriptors that this process has. It starts the next daemon."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING, RESTART})  # until the keeper handles them
    channel, daemons_end = _channel()
    _execute_keeper({**held, "channel": channel, KEEPER: daemons_end}, 0, log, command)


def start_keeper(log: str, command: "list[str]") -> Keeper:
    """Start a keeper for this process, whose own died. Raises OSError."""
    held = dict(zip(("channel", KEEPER), _channel(), strict=True))
    try:
        pid = os.posix_spawn(sys.executable, _words(os.getpid(), log, command), os.environ | _passed(held))
        os.set_inheritable(held[KEEPER], False)
        return Keeper(pid, held.pop(KEEPER))
    finally:
        for fd in held.values():
            os.close(fd)


def _die_with(keeper: int) -> None:
    """Have this daemon die with its keeper, for whose unit a service manager then starts another."""
    from ..linux import system_calls  # only here, since ttmfs-service is to import little

    system_calls.die_with(keeper)


def _channel() -> "tuple[int, int]":
    """The keeper's end of a socket pair, and its daemons' end.

    The pair has no name. A stranger who could send to it could send descriptors whose closing takes as long as he
    likes: a socket that lingers, or a file of his own FUSE mount.
    """
    channel, daemons_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return channel.detach(), daemons_end.detach()


def _execute_keeper(held: "dict[str, int]", daemon: int, log: str, command: "list[str]") -> NoReturn:
    try:
        os.execve(sys.executable, _words(daemon, log, command), os.environ | _passed(held))
    finally:
        if daemon:
            os.kill(daemon, signal.SIGKILL)
        os._exit(4)


def _passed(held: "dict[str, int]") -> "dict[str, str]":
    """Make descriptors inheritable. The environment that names them by their present numbers.

    They are not moved to others: a thread that still stores a page must not find another file at its descriptor.
    """
    for fd in held.values():
        os.set_inheritable(fd, True)
    return {HELD: " ".join(f"{name}={fd}" for name, fd in held.items())}


def _words(daemon: int, log: str, command: "list[str]") -> "list[str]":
    return [sys.executable, "-I", "-S", PROGRAM, str(daemon), log, *command]
