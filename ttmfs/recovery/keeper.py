"""The keeper: holds a mount's connection, store and state while daemons die, and starts the next daemon.

It is a program, run by its path::

    keeper.py DAEMON_PID LOG COMMAND...

DAEMON_PID is the daemon that runs already, or 0. LOG is a sink of log_sink.py. COMMAND starts a daemon; its last word
is the mount point. TTMFS_HELD in the environment names the keeper's descriptors: ``channel``, its end of a socket
pair; ``keeper``, the end for its daemons; ``ready``, a pipe to write a byte to when a daemon first serves; and what it
holds already. It uses only the standard library, and touches no page. Its states::

                  start               READY                STOPPING
      WAITING -----------> STARTING ---------> SERVING -----------------> STOPPING
       |  ^  ^              | |  |  STOPPING      |                        ^   |
       |  |  +-- it died ---+ |  +----------------|------------------------+   | it died
       |  |                   |                   |                            v
       |  +------------- it died -----------------+                         (exit)
       |                      |
       |  5 failed starts, or 30 s without a daemon that serves
       +---------+------------+
                 v
              GAVE_UP ---- SIGUSR1 ----> WAITING
                 |
                 +---- SIGTERM, SIGINT, SIGHUP ----> (exit)

- A daemon that dies before the keeper holds its state ends the keeper too.
- A daemon that died by itself delays the next one; failed starts in a row do so longer each time.
- Giving up closes the connection, so that waiting clients get errors. The pages stay. It comes later while a daemon
  says that it waits for its store.
- SIGTERM, SIGINT and SIGHUP end the mount: they are passed to the daemon, if one only starts once it serves.
- SIGUSR1 kills the daemon, as it may be killed at any instant, and so does a lack of its signs of life.
- A standby waits for the daemon's death, if the daemon asks for one: it has imported everything, and becomes the next
  daemon. It is ended where another version may be wanted: by a restart on purpose, and before a new mount.
- A service manager that stores descriptors (ttmfs.recovery.service_manager), if one started the keeper, gets them too,
  and the keeper's own signs of life. Daemon and standby then die with the keeper, and the manager starts another.
- A start job of the manager's during which the keeper gives up is to fail, as its user then knows: the keeper ends, and
  the next one, told by a descriptor, holds the pages.
"""

import contextlib
import enum
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable

if __package__:
    from . import keeper_protocol as protocol
    from . import log_sink
    from .keeper_giving_up import last_words, unmount
    from .keeper_orphans import reap_orphans
    from .keeper_standby import LONGEST_PAUSE, Standby
    from .service_manager import HELD_BY_NEXT, NOT_AGAIN, ServiceManager
else:  # run by its path
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import keeper_protocol as protocol  # type: ignore[import-not-found,no-redef]
    import log_sink  # type: ignore[import-not-found,no-redef]
    from keeper_giving_up import last_words, unmount  # type: ignore[import-not-found,no-redef]
    from keeper_orphans import reap_orphans  # type: ignore[import-not-found,no-redef]
    from keeper_standby import LONGEST_PAUSE, Standby  # type: ignore[import-not-found,no-redef]
    from service_manager import HELD_BY_NEXT, NOT_AGAIN, ServiceManager  # type: ignore[import-not-found,no-redef]

NAME = "ttmfs-keeper"
LONGEST_MESSAGE, MOST_MESSAGES = 4096, 1024
RETRY_SECONDS, FLUSH_SECONDS = 0.2, 0.5

LOOK_SECONDS, MOST_SILENT = 5.0, 6
"""The interval of looks for a sign of life, and after how many looks without one the daemon is killed: 30 s, or as long
as a service manager waits for the keeper's. Looks are counted, not seconds: while the machine stands still the
keeper does not look either."""


class State(enum.Enum):
    """What the keeper waits for."""

    WAITING = enum.auto()  # for the time to start a daemon; there is none
    STARTING = enum.auto()  # for the daemon to serve
    SERVING = enum.auto()  # for the daemon to die
    STOPPING = enum.auto()  # for the daemon to end, which it does on purpose
    GAVE_UP = enum.auto()  # for a signal; the connection is closed


class Exit(enum.IntEnum):
    """Exit statuses: those of mount(8), as in ttmfs.options.ExitCode."""

    OK = 0
    BUG = 4
    INTERRUPTED = 8
    FAILED = 32


class Program:
    """The keeper of one mount. Times are of time.monotonic()."""

    def __init__(
        self, held: "dict[str, int]", daemon: int, log: str, command: "list[str]", manager: ServiceManager
    ) -> None:
        for fd in held.values():
            os.set_inheritable(fd, False)
        self.channel = socket.socket(fileno=held.pop("channel"))
        self.channel.setblocking(False)
        self.daemons_end, self.ready = held.pop(protocol.KEEPER), held.pop("ready", -1)
        self.held, self.command, self.mountpoint = held, command, command[-1]
        self.log_to, self.log = log, log_sink.make_sink(log, NAME)
        self.manager, self.look_seconds = manager, (manager.watchdog or LOOK_SECONDS * MOST_SILENT) / MOST_SILENT
        self.timers: dict[Callable[[], None], float] = {}  # what is to be done, and when
        self.pid, self.pidfd = daemon, os.pidfd_open(daemon) if daemon else -1  # of the daemon, if there is one
        self.state = State.STARTING
        self.has_served = protocol.STATE in held
        self.end_requested = self.interrupted = False  # the latter: before a daemon ever served
        self.failed_starts = self.silent_looks = 0
        self.standby, self.wants_standby = Standby(command), False
        self.exit_status: int | None = None
        if protocol.GAVE_UP in held:
            self.give_up("no daemon could start")
        elif not daemon:
            self.wait_for_start(0.0)
        self.give_sign_of_life()

    def run(self) -> int:
        """Keep until there is nothing to keep. The exit status."""
        self.signals, writing_end = os.pipe()
        for fd in self.signals, writing_end:
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(writing_end)
        for caught in (*protocol.ENDING, protocol.RESTART, signal.SIGCHLD):
            signal.signal(caught, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*protocol.ENDING, protocol.RESTART})
        while self.exit_status is None:
            poll = select.poll()
            for fd in self.signals, self.channel.fileno(), self.pidfd, self.standby.channel, self.standby.pidfd:
                if fd >= 0:
                    poll.register(fd, select.POLLIN)
            due = min(self.timers.values(), default=None)
            for fd, _ in poll.poll(None if due is None else max(0.0, (due - time.monotonic()) * 1000 + 1)):
                if fd == self.signals:
                    self.handle_signals()
                elif fd == self.channel.fileno():
                    self.handle_messages()
                elif fd == self.pidfd:
                    self.daemon_died()
                elif fd == self.standby.channel:
                    self.standby.hear()
                elif fd == self.standby.pidfd:
                    self.standby_died()
            for action, due in [*self.timers.items()]:
                if due <= time.monotonic() and self.timers.pop(action, None) is not None:
                    action()
        self.standby.end_now()
        self.log.flush(FLUSH_SECONDS)
        if self.state is State.GAVE_UP and self.exit_status != HELD_BY_NEXT:
            unmount(self.mountpoint)
        return self.exit_status

    # --- signals ---

    def handle_signals(self) -> None:
        """Handle the signals that came by now."""
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self.signals, 64):
                if number in protocol.ENDING:
                    self.handle_end(number)
                elif number == signal.SIGCHLD:
                    reap_orphans({self.pid, self.standby.pid})
                elif self.state is State.GAVE_UP:
                    self.say("trying again")
                    self.failed_starts = 0
                    self.wait_for_start(0.0)
                elif self.state in (State.STARTING, State.SERVING) and self.held:
                    self.standby.end()  # the next daemon is to be of the version that is installed now
                    self.signal_daemon(signal.SIGKILL)

    def handle_end(self, number: int) -> None:
        """End the mount: now if a daemon serves, else once one does. It alone knows all that there is to undo."""
        self.end_requested = True
        self.interrupted |= not self.has_served
        if self.state is State.GAVE_UP:
            self.exit_status = Exit.OK if self.manager else Exit.FAILED
        elif not self.pid and not self.held:
            self.exit_status = Exit.INTERRUPTED
        elif self.state in (State.SERVING, State.STOPPING) or not self.held:
            self.signal_daemon(number)

    def signal_daemon(self, number: int) -> None:
        """Send the daemon a signal, unless it is dead. Its number may be given to another process by then."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def look_for_sign_of_life(self) -> None:
        """Kill the daemon if it has been silent for too many looks."""
        self.timers[self.look_for_sign_of_life] = time.monotonic() + self.look_seconds
        self.silent_looks += 1
        self.handle_messages()
        if self.silent_looks > MOST_SILENT and self.look_for_sign_of_life in self.timers:
            self.silent_looks = 0
            why = f"has given no sign of life for {self.look_seconds * MOST_SILENT:g} s"
            self.say(f"the daemon {self.pid} of {self.mountpoint} {why}: killing it")
            self.signal_daemon(signal.SIGKILL)

    def give_sign_of_life(self) -> None:
        """Tell the service manager that the keeper lives. Whether the daemon does is the keeper's to watch."""
        if self.manager.watchdog:
            self.timers[self.give_sign_of_life] = time.monotonic() + self.look_seconds
            self.manager.tell("WATCHDOG=1")

    def stop_timers(self) -> None:
        """Stop all that waits for its time, except signs of life."""
        self.timers.clear()
        self.give_sign_of_life()

    # --- messages ---

    def handle_messages(self) -> None:
        """Handle the messages that came by now; not without end, since a daemon can send more and more."""
        for _ in range(MOST_MESSAGES):
            if not self.handle_message():
                break

    def handle_message(self) -> bool:
        """Handle one message; False if there is none."""
        space = socket.CMSG_SPACE(4 * protocol.MOST_DESCRIPTORS) + socket.CMSG_SPACE(12)
        try:
            message, ancillary, _, _ = self.channel.recvmsg(LONGEST_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        sender, descriptors = 0, list[int]()
        for _, kind, data in ancillary:
            if kind == socket.SCM_RIGHTS:
                descriptors += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
            elif kind == socket.SCM_CREDENTIALS:
                sender = struct.unpack("iII", data)[0]
        if sender and sender == self.pid:  # 0: a process outside of this process namespace
            self.obey(message.decode(errors="replace").split("\n"), descriptors)
        for fd in descriptors:
            os.close(fd)
        return True

    def obey(self, lines: "list[str]", descriptors: "list[int]") -> None:
        """Do what a message of the daemon says. Takes those descriptors out of the list that are to be held."""
        name = next((line[7:] for line in lines if line.startswith("FDNAME=")), "stored")
        if "FDSTOREREMOVE=1" in lines:
            self.drop(name)
        if "FDSTORE=1" in lines and descriptors and len(self.held) < protocol.MOST_DESCRIPTORS:
            self.drop(name)
            self.held[name] = descriptors.pop()
            self.manager.hold(name, self.held[name])
        self.manager.tell(*(line for line in lines if line.startswith(("READY=", "STOPPING=", "STATUS="))))
        if "STOPPING=1" in lines:  # from now on it may take its time
            self.state = State.STOPPING
            self.stop_timers()
            self.standby.end()
        if "WATCHDOG=1" in lines and self.state in (State.STARTING, State.SERVING):
            self.timers.setdefault(self.look_for_sign_of_life, time.monotonic() + self.look_seconds)
            self.silent_looks = 0
        if "EXTEND=1" in lines and self.state is State.STARTING:
            if self.give_up_waiting in self.timers:
                self.timers[self.give_up_waiting] = time.monotonic() + protocol.MOST_SECONDS_DOWN
            self.manager.tell(f"EXTEND_TIMEOUT_USEC={protocol.MOST_SECONDS_DOWN * 1e6:.0f}")
        if "READY=1" in lines and self.state in (State.STARTING, State.SERVING):
            self.wants_standby = "STANDBY=1" in lines
            self.daemon_serves()
        if "BARRIER=1" in lines:
            for fd in descriptors:
                with contextlib.suppress(OSError):  # the daemon no longer waits
                    os.write(fd, b"\1")
                self.manager.tell("BARRIER=1", descriptors=(fd,))

    def drop(self, name: str) -> None:
        """Close what is held by a name, here and in the service manager."""
        if name in self.held:
            os.close(self.held.pop(name))
            self.manager.drop(name)

    # --- transitions ---

    def wait_for_start(self, delay: float) -> None:
        """Start the next daemon after a delay, and give up if none serves in time."""
        now = time.monotonic()
        if self.held:  # else nobody waits, and the first daemon may have to wait for its store
            self.timers.setdefault(self.give_up_waiting, now + protocol.MOST_SECONDS_DOWN)
        if self.pid:  # it was killed because the keeper gave up; its death leads back here
            self.state = State.STARTING
        else:
            self.state = State.WAITING
            self.timers[self.start] = now + delay

    def start(self) -> None:
        """Start a daemon, or have the standby be it. It finds what is held from descriptor 3 on."""
        passed = {**self.held, protocol.KEEPER: self.daemons_end}
        if daemon := self.standby.take_over(passed):
            (self.pid, self.pidfd), self.state = daemon, State.STARTING
            return
        try:
            pid = os.fork()
        except OSError as error:
            self.say(f"cannot start a daemon: {error.strerror}")
            self.timers[self.start] = time.monotonic() + RETRY_SECONDS
            return
        if pid:
            self.pid, self.pidfd, self.state = pid, os.pidfd_open(pid), State.STARTING
            return
        try:
            signal.set_wakeup_fd(-1)
            names = protocol.listen_fds(list(passed))
            protocol.move_descriptors(list(passed.values()))
            environment = {**os.environ, protocol.KEEPER_PID: str(os.getppid()), **names}
            os.execve(self.command[0], self.command, environment)
        except OSError as error:
            self.log = log_sink.make_sink(self.log_to, NAME)  # the keeper's thread and descriptors are not here
            self.say(f"{self.command[0]}: {error.strerror}")
            self.log.flush(FLUSH_SECONDS)
        finally:
            os._exit(127)

    def daemon_serves(self) -> None:
        """The daemon answers requests."""
        self.handle_signals()  # before the state changes: one that came before decides the exit status
        self.state, self.has_served, self.failed_starts = State.SERVING, True, 0
        self.timers.pop(self.give_up_waiting, None)
        self.wait_for_standby()
        if self.ready >= 0:
            self.leave_terminal()
        if self.end_requested:
            self.signal_daemon(signal.SIGTERM)

    # --- the standby ---

    def wait_for_standby(self) -> None:
        """Start a standby later, if the daemon that serves wants one."""
        if self.wants_standby and self.state is State.SERVING:
            self.timers[self.start_standby] = time.monotonic() + self.standby.pause

    def start_standby(self) -> None:
        """Start a standby, unless there is one."""
        try:
            self.standby.start()
        except OSError as error:
            self.say(f"cannot start a standby: {error.strerror}")
            self.standby.pause = LONGEST_PAUSE
            self.wait_for_standby()

    def standby_died(self) -> None:
        """The standby is dead: start another later."""
        self.standby.reap()
        self.wait_for_standby()

    # --- the daemon's end ---

    def leave_terminal(self) -> None:
        """Tell the process that waits for the mount that it answers, and close the standard streams."""
        with contextlib.suppress(BrokenPipeError):  # it was killed; the mount serves all the same
            os.write(self.ready, b"\1" * (not self.interrupted))
        os.close(self.ready)
        self.ready = -1
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1) if self.log_to == log_sink.STDERR else (0, 1, 2):
            os.dup2(null, stream)
        os.close(null)

    def daemon_died(self) -> None:
        """The daemon is dead: start another, give up, or end."""
        self.handle_messages()  # what it sent before
        try:
            _, status = os.waitpid(self.pid, 0)
            code: int | None = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            code = None  # it was no child of the keeper, but started it
        os.close(self.pidfd)
        for action in self.look_for_sign_of_life, self.start_standby:
            self.timers.pop(action, None)
        if code == protocol.LEFT:
            self.standby.end()
        what = f"the daemon {self.pid} of {self.mountpoint} {_how(code)}"
        self.pid, self.pidfd, before = 0, -1, self.state
        if before is State.STOPPING or protocol.STATE not in self.held:
            self.exit_status = self.status_after(code)
        elif before is State.SERVING:
            self.say(f"{what}: starting another")
            self.wait_for_start(0.0 if code in (None, -signal.SIGKILL, protocol.LEFT) else RETRY_SECONDS)
        elif before is State.STARTING and code == -signal.SIGKILL:
            self.say(f"{what} before it served: starting another")
            self.wait_for_start(0.0)
        elif before is State.STARTING:
            self.failed_starts += 1
            self.say(f"{what} before it served ({self.failed_starts} of {protocol.MOST_FAILED_STARTS})")
            self.wait_for_start(RETRY_SECONDS * 2 ** (self.failed_starts - 1))
            if self.failed_starts >= protocol.MOST_FAILED_STARTS:
                self.give_up(f"{self.failed_starts} daemons could not start")

    def status_after(self, code: "int | None") -> int:
        """The keeper's exit status after the last daemon's."""
        if code == 0 and self.interrupted:
            return Exit.INTERRUPTED
        return Exit.OK if code is None else code if code >= 0 else Exit.BUG

    def give_up_waiting(self) -> None:
        """Give up: no daemon served in time."""
        self.give_up(f"no daemon has answered for {protocol.MOST_SECONDS_DOWN:g} s")

    def give_up(self, why: str) -> None:
        """Close the connection, so that all who wait get an error. The pages stay."""
        if self.pid:
            self.signal_daemon(signal.SIGKILL)  # it has the connection too
        self.drop(protocol.CONNECTION)
        self.standby.end()
        self.stop_timers()
        self.state = State.GAVE_UP
        if self.end_requested:
            self.exit_status = Exit.FAILED
        if self.manager and not self.manager.is_ready and protocol.GAVE_UP not in self.held:
            self.exit_status = HELD_BY_NEXT
            self.manager.hold(protocol.GAVE_UP, os.eventfd(0))
            return
        self.drop(protocol.GAVE_UP)
        has_store, in_unit = protocol.STORE in self.held, bool(self.manager)
        self.say(text := last_words(why, self.mountpoint, has_store=has_store, in_unit=in_unit), log_sink.CRITICAL)
        self.manager.tell("READY=1", f"STATUS={text}")

    def say(self, text: str, priority: int = log_sink.WARNING) -> None:
        """Log one line."""
        self.log.write(priority, text)


def _how(code: "int | None") -> str:
    """How a daemon ended."""
    if code is None or code == protocol.LEFT:
        return "is dead" if code is None else "left it"
    return f"ended with status {code}" if code >= 0 else f"was killed by signal {-code}"


def main(daemon: str, log: str, *command: str) -> int:
    """From the command line to the exit status."""
    with open("/proc/self/comm", "w") as name:
        name.write(NAME)
    os.chdir("/")
    held = {name: int(fd) for name, fd in (word.split("=") for word in os.environ.pop(protocol.HELD).split())}
    manager = ServiceManager.found(os.environ)
    if manager:
        os.environ[protocol.PATIENCE] = str(manager.watchdog or LOOK_SECONDS * MOST_SILENT)
    status = Program(held, int(daemon), log, list(command), manager).run()
    return NOT_AGAIN if manager and status not in (Exit.OK, HELD_BY_NEXT) else status


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))  # at once: a signal no longer changes the status
