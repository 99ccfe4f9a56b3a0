"""The keeper's part of a standby: a process that has imported everything, and becomes the daemon when that one dies.

The standby is the daemon's command, with STANDBY in its environment: the number of its end of a socket pair. It sends
one message when it is ready, and waits for one: the names of the keeper's descriptors, with the descriptors. If the
keeper ends, the standby reads the end of the socket and exits. :mod:`ttmfs.daemon.standby` is its own part.

Until it is ready, which can take long on a busy machine, the kernel kills it when the keeper ends.

The keeper imports this module by its path, so it imports only the standard library.
"""

import contextlib
import os
import select
import signal
import socket

if __package__:
    from . import keeper_protocol as protocol
else:  # the keeper is run by its path
    import keeper_protocol as protocol  # type: ignore[import-not-found,no-redef]

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
"""Seconds from the time that a daemon serves, or that a standby died, to the start of the next standby. The pause
doubles with each standby in a row that was never ready."""

NICE = 19
PR_SET_PDEATHSIG = 1
END_SECONDS = 1.0


class Standby:
    """The standby of one keeper, if there is one. The keeper polls `channel` and `pidfd`, unless they are -1."""

    def __init__(self, command: "list[str]") -> None:
        self._command = command
        self._socket: socket.socket | None = None
        self.pid, self.pidfd = 0, -1  # of the standby, if there is one
        self._is_ready = False
        self.pause = FIRST_PAUSE

    @property
    def channel(self) -> int:
        """The keeper's end of the socket pair, until the standby is ready."""
        return self._socket.fileno() if self._socket and not self._is_ready else -1

    def start(self) -> None:
        """Start a standby if there is none. Raises OSError if no process can be started."""
        if self.pid:
            return
        keeper = os.getpid()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            try:
                pid = os.fork()
            except OSError:
                here.close()
                raise
            if not pid:
                self._execute(there, keeper)
        here.setblocking(False)
        self._socket, self._is_ready = here, False
        self.pid, self.pidfd = pid, os.pidfd_open(pid)

    def _execute(self, channel: socket.socket, keeper: int) -> None:
        """Become the standby. It can be ended by a signal only once it waits, so that Python reports no interrupt."""
        try:
            signal.set_wakeup_fd(-1)
            _die_with(keeper)
            signal.pthread_sigmask(signal.SIG_BLOCK, protocol.ENDING)
            before = os.getpriority(os.PRIO_PROCESS, 0)
            if _may_return_to(before):
                os.setpriority(os.PRIO_PROCESS, 0, NICE)
            standby = f"{protocol.FIRST_DESCRIPTOR} {before}"
            protocol.move_descriptors([channel.fileno()])
            environment = {**os.environ, protocol.KEEPER_PID: str(keeper), protocol.STANDBY: standby}
            os.execve(self._command[0], self._command, environment)
        finally:
            os._exit(127)

    def hear(self) -> None:
        """The standby is ready, or it closed its end: then it has failed, and its death is seen next."""
        assert self._socket
        with contextlib.suppress(ConnectionResetError):
            if self._socket.recv(64):
                self._is_ready, self.pause = True, FIRST_PAUSE
                return
        self._fail()

    def take_over(self, held: "dict[str, int]") -> "tuple[int, int] | None":
        """Give a standby that is ready the descriptors. Its process id and pidfd: it is the daemon now.

        None if there is none. One that is not ready is killed: to wait for it could take longer than a new start.
        """
        if not self._socket or not self._is_ready:
            self.end()
            return None
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)  # a stopped one would serve nobody
            socket.send_fds(self._socket, [":".join(held).encode()], list(held.values()))
        except OSError:
            self.end()
            return None
        self._socket.close()
        daemon = self.pid, self.pidfd
        self._socket, self.pid, self.pidfd = None, 0, -1
        return daemon

    def end(self) -> None:
        """Kill it, if there is one. Its death is seen later, by its pidfd."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        if self._socket:
            self._socket.close()
            self._socket = None

    def reap(self) -> None:
        """It is dead."""
        if self._socket and not self._is_ready:
            self._fail()
        self.end()
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.pid, self.pidfd = 0, -1

    def _fail(self) -> None:
        """It died by itself before it was ready."""
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        self.end()

    def end_now(self) -> None:
        """Kill it, and wait until it is dead, but not for long."""
        self.end()
        if self.pid:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if poll.poll(END_SECONDS * 1000):
                self.reap()


def _die_with(keeper: int) -> None:
    """Have the kernel kill this process when the keeper ends."""
    import ctypes  # only here, since the keeper is to stay small

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:  # it ended before the call
        os._exit(0)


def _may_return_to(nice: int) -> bool:
    """Whether a process that made itself nice may go back, which needs a right. Tried by another process."""
    child = os.fork()
    if not child:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, NICE)
            os.setpriority(os.PRIO_PROCESS, 0, nice)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0
