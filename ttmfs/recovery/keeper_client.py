"""The daemon's side of the keeper: what it was started with, what it tells its keeper, and how keepers are started.

A keeper holds the kernel's connection, the store's directory and the mount's state. Meanwhile the daemon can be killed
at any instant: clients wait, the keeper starts another daemon, and that one takes over. The keeper is a service manager
that stores descriptors, or the program ``keeper.py`` beside this file. Both speak the protocol of
:mod:`ttmfs.recovery.keeper_protocol`. A service manager says by ``FDSTORE`` in the environment that it stores
descriptors, as systemd does from version 254 on.
"""

import contextlib
import os
import select
import signal
import socket
import sys
from typing import NoReturn

from .keeper_protocol import ENDING, FIRST_DESCRIPTOR, HELD, KEEPER, KEEPER_PID, RESTART

__all__ = ["Keeper", "become_keeper", "fork_daemon", "inherited", "start_keeper"]

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "keeper.py")
BARRIER_SECONDS = 5.0


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
    """The keeper of this process: a service manager, by its address, or one of our own, by a channel and its `pid`."""

    def __init__(self, address: str, pid: "int | None", watchdog: float = 0.0, channel: int = -1) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._channel = channel
        self.pid = pid
        self.watchdog = watchdog  # seconds between two signs of life that are expected; 0: none are
        self._pidfd = -1
        if pid is not None:
            try:
                self._pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                self.pid = 0  # it is dead already

    @classmethod
    def found(cls, held: "dict[str, int]") -> "Keeper | None":
        """The keeper that started this process, if there is one. Takes its channel out of what it passed."""
        address, stores, pid = (os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "FDSTORE", KEEPER_PID))
        patience, watched = (os.environ.pop(name, "") for name in ("WATCHDOG_USEC", "WATCHDOG_PID"))
        if KEEPER in held:
            return cls("", int(pid), channel=held.pop(KEEPER))
        if not address or not stores.isdigit() or stores == "0":
            return None
        if os.environ.get("SYSTEMD_EXEC_PID", str(os.getpid())) != str(os.getpid()):
            return None  # the manager started another process, whose environment this one has
        expected = int(patience) / 2e6 if patience.isdigit() and watched in ("", str(os.getpid())) else 0.0
        return cls(address, None, expected)

    @property
    def death(self) -> "int | None":
        """A descriptor that becomes readable when the keeper dies; -1 if it is dead; None for a service manager."""
        return None if self.pid is None else self._pidfd

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
        if self._channel >= 0:
            sender = socket.socket(fileno=os.dup(self._channel))
        else:
            sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        with sender as channel:
            channel.settimeout(seconds)
            if self._channel < 0:
                channel.connect(self._address)
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
            poll = select.poll()  # select(2) knows no descriptor above 1023
            poll.register(handled, select.POLLIN)
            if not poll.poll(BARRIER_SECONDS * 1000):
                raise TimeoutError("the keeper does not answer")
            if self.pid is not None and not os.read(handled, 1):
                raise ConnectionRefusedError("the keeper died")
        finally:
            os.close(handled)


def fork_daemon(log: str, command: "list[str]", ready: int) -> Keeper:
    """Fork. The child returns, as the daemon, with its keeper; this process becomes that keeper.

    The keeper writes a byte to `ready` (-1: none) when the daemon serves. Raises OSError if no process can be started.
    """
    (channel, daemons_end), keeper, signals = _channel(), os.getpid(), {*ENDING, RESTART}
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
    return Keeper("", keeper, channel=daemons_end)


def become_keeper(held: "dict[str, int]", log: str, command: "list[str]") -> NoReturn:
    """Become the keeper of what this process held as a daemon without a keeper. It starts the next daemon."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING, RESTART})  # until the keeper handles them
    channel, daemons_end = _channel()
    _execute_keeper({**held, "channel": channel, KEEPER: daemons_end}, 0, log, command)


def start_keeper(log: str, command: "list[str]") -> Keeper:
    """Start a keeper for this process, whose own died. Raises OSError."""
    held = dict(zip(("channel", KEEPER), _channel(), strict=True))
    try:
        pid = os.posix_spawn(sys.executable, _words(os.getpid(), log, command), os.environ | _passed(held))
        os.set_inheritable(held[KEEPER], False)
        return Keeper("", pid, channel=held.pop(KEEPER))
    finally:
        for fd in held.values():
            os.close(fd)


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
