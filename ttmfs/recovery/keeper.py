"""Both sides of a store of descriptors, which keeps a mount alive while its daemon is dead.

A keeper holds the connection to the kernel, the store's directory and the mount's state. While it does, the daemon can
be killed at any instant: clients wait, the keeper starts another daemon, and that one takes over. A service manager
with a store of descriptors is a keeper; without one, this file is: run as a program, by its path, it is one of our own.

The protocol is sd_notify(3)'s. The daemon sends datagrams of lines to ``NOTIFY_SOCKET``, or to one of our own through a
channel that has no name and is passed to it: ``FDSTORE=1`` and ``FDNAME=`` with descriptors, ``READY=1`` when it
serves, ``WATCHDOG=1`` with it and every few seconds then, ``STOPPING=1`` when it ends on purpose, ``BARRIER=1`` with a
pipe that is closed when all before it was heard (ours writes a byte to it first: its death closes the pipe as well).
A daemon started anew finds the descriptors from 3 on (``LISTEN_PID``, ``LISTEN_FDS``, ``LISTEN_FDNAMES``). That a
service manager has a store it says by ``FDSTORE`` in the environment, as systemd does from version 254 on.

The program::

    keeper.py CHANNEL VOICE PID READY TRIES SECONDS LOG MOUNTPOINT COMMAND...

CHANNEL and VOICE are the ends of a socket pair, its own and that of its daemons. PID is the daemon that runs already; 0
if this process was it, which then names what it kept in TTMFS_KEPT. READY is a pipe to write a byte to when a daemon
first serves (-1: none), TRIES and SECONDS are when to give up, LOG is stderr, journal or syslog. It imports next to
nothing, touches no page and

- starts the next daemon when one has died, at once; after a start that failed by itself a little later each time;
- gives up after TRIES such starts in a row, or SECONDS without a daemon that serves: it closes the connection, of which
  the kernel makes errors for all who wait, and goes on holding the pages;
- hands SIGTERM, SIGINT and SIGHUP on (end), and SIGUSR1 (restart; having given up, try again);
- kills a daemon that does not obey such a signal, or that gives no more signs of life, unless a debugger traces it;
- ends with the daemon that said STOPPING, or that died before it left anything here.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time

__all__ = [
    "CONNECTION",
    "ENDING",
    "LEFT",
    "RESTART",
    "STARTS",
    "STATE",
    "Keeper",
    "another",
    "become",
    "become_alone",
    "inherited",
    "write_to_syslog",
]

CONNECTION, STATE = "fuse", "state"
"""The names of what the keeper holds beside the store's own descriptors."""

STORE = "store"  # as ttmfs.stores.store has it, which a program run by its path cannot import

STARTS = "starts"
"""What is kept beside by a service manager: how many starts failed (ttmfs.daemon.service)."""

RESTART, LEFT = signal.SIGUSR1, 75
"""What has a daemon leave its mount to another, and the status that it then ends with (EX_TEMPFAIL)."""

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
LONGEST_MESSAGE, MOST_MESSAGES = 4096, 1024
MOST_DESCRIPTORS = 16
BARRIER_SECONDS = 5.0
RETRY_SECONDS = 0.2
SHORT_LIFE, LONGEST_DELAY = 1.0, 0.5
"""A daemon that died by itself so soon has the next one wait, longer each time, lest they use up the machine."""

GRACE_SECONDS = 10.0
"""How long a daemon may take to obey a signal. It takes 0.1 s, and as long as fusermount3 takes to unmount."""

LOOK_SECONDS, MOST_SILENT = 5.0, 6
"""The interval of looks for a sign of life, and after how many looks without one the daemon is killed: 30 s, as in the
units. Looks are counted and not seconds: while the machine stands still the keeper does not look either."""

LAST_LINES = 4

KEEPER_PID, KEEPER_CHANNEL, KEPT = "TTMFS_KEEPER_PID", "TTMFS_KEEPER_CHANNEL", "TTMFS_KEPT"


SYSLOG, FACILITY, WARNING = "/dev/log", 3 << 3, 4


def write_to_syslog(name: str, priority: int, text: str) -> None:
    """Log to syslog(3) without waiting. The text is lost if syslog does not take it at once."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.setblocking(False)
        log.connect(SYSLOG)
        log.send(f"<{FACILITY | priority}>{name}[{os.getpid()}]: {text}\0".encode(errors="backslashreplace"))


# --- the daemon's side ---


def inherited() -> "dict[str, int]":
    """The descriptors that a keeper passed to this process, by name. To be asked once."""
    count, names = int(os.environ.get("LISTEN_FDS", "0")), os.environ.get("LISTEN_FDNAMES", "").split(":")
    ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    for name in "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES":
        os.environ.pop(name, None)
    if not ours:
        return {}
    found = {}
    for fd, name in zip(range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + count), names, strict=False):
        os.set_inheritable(fd, False)
        found[name] = fd
    if (fd := found.pop(KEEPER_CHANNEL, -1)) >= 0:
        os.environ[KEEPER_CHANNEL] = str(fd)
    return found


class Keeper:
    """The keeper of this process: a service manager, by its address, or one of our own, by a channel and its `pid`."""

    def __init__(self, address: str, pid: "int | None", watchdog: float = 0.0, channel: int = -1) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._channel = channel
        self.pid = pid
        self.watchdog = watchdog  # seconds between two signs of life that are asked for; 0: none is
        self._pidfd = -1
        if pid is not None:
            try:
                self._pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                self.pid = 0  # it is dead already

    @classmethod
    def of_environment(cls) -> "Keeper | None":
        """Who keeps this process' descriptors, if anyone says that he does."""
        address, room, pid = (os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "FDSTORE", KEEPER_PID))
        patience, watched = (os.environ.pop(name, "") for name in ("WATCHDOG_USEC", "WATCHDOG_PID"))
        if channel := os.environ.pop(KEEPER_CHANNEL, ""):
            return cls("", int(pid), channel=int(channel))
        if not address or not room.isdigit() or room == "0":
            return None
        if not pid and os.environ.get("SYSTEMD_EXEC_PID", str(os.getpid())) != str(os.getpid()):
            return None  # the manager's service is another process, of which this one has the environment alone
        asked = int(patience) / 2e6 if patience.isdigit() and watched in ("", str(os.getpid())) else 0.0
        return cls(address, int(pid) if pid else None, asked)

    def environment(self, held: "dict[str, int]") -> "dict[str, str]":
        """The environment for a program that is to take this process' place, with what is held from descriptor 3 on."""
        _move(list(held.values()))
        environment = {
            **os.environ, "NOTIFY_SOCKET": self._address.replace("\0", "@"), "FDSTORE": str(MOST_DESCRIPTORS),
            **_listen_fds(list(held)),
        }  # fmt: skip
        if self.watchdog:
            environment["WATCHDOG_USEC"] = str(int(self.watchdog * 2e6))
        return environment

    @property
    def death(self) -> "int | None":
        """A descriptor that becomes readable when it dies; None if that need not be watched. -1: it is dead."""
        return None if self.pid is None else self._pidfd

    def close(self) -> None:
        """Give up the descriptor, and if it is a child of ours and dead, bury it."""
        if self.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = -1
        if self._channel >= 0:
            os.close(self._channel)
        self._channel = -1

    def tell(self, *lines: str, descriptors: "tuple[int, ...]" = (), seconds: float = BARRIER_SECONDS) -> None:
        """Send a message, within so many seconds. Raises OSError if there is no one to hear it."""
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
        """Give it descriptors to hold, then tell it lines, and wait until it has heard all. Raises OSError."""
        for name, fd in descriptors.items():
            self.tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=(fd,))
        for line in lines:
            self.tell(line)
        heard, barrier = os.pipe()
        try:
            try:
                self.tell("BARRIER=1", descriptors=(barrier,))
            finally:
                os.close(barrier)
            poll = select.poll()  # select(2) knows no descriptor above 1023
            poll.register(heard, select.POLLIN)
            if not poll.poll(BARRIER_SECONDS * 1000):
                raise TimeoutError("the keeper does not answer")
            if self.pid is not None and not os.read(heard, 1):
                raise ConnectionRefusedError("the keeper died")
        finally:
            os.close(heard)


def become(tries: int, seconds: float, log: str, mountpoint: str, command: "list[str]", ready: int) -> None:
    """Fork. The child returns, to be the daemon; this process becomes its keeper, a program that does nothing else.

    Raises OSError if no process can be started.
    """
    (channel, voice), keeper = _channel(), os.getpid()
    signals = {*ENDING, RESTART}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until the keeper's handlers are there
    try:
        child = os.fork()
    except OSError:
        channel.close()
        voice.close()
        raise
    if not child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        channel.close()
        if ready >= 0:
            os.close(ready)
        os.environ.update({KEEPER_CHANNEL: str(voice.detach()), KEEPER_PID: str(keeper)})
        return
    try:
        for fd in channel.fileno(), voice.fileno(), ready:
            if fd >= 0:
                os.set_inheritable(fd, True)
        words = _command_line(channel.fileno(), voice.fileno(), child, ready, tries, seconds, log, mountpoint, command)
        os.execv(words[0], words)
    finally:
        os.kill(child, signal.SIGKILL)
        os._exit(4)


def become_alone(
    held: "dict[str, int]", tries: int, seconds: float, log: str, mountpoint: str, command: "list[str]"
) -> None:
    """Become the keeper of what this process held as a daemon without one, and start another daemon.

    Does not return.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING, RESTART})  # until the keeper's handlers are there
    channel, voice = _channel()
    for fd in channel.fileno(), voice.fileno(), *held.values():
        os.set_inheritable(fd, True)
    # By their numbers of now: a thread that still stores a page must not find another file there.
    os.environ[KEPT] = " ".join(f"{name}={fd}" for name, fd in held.items())
    words = _command_line(channel.fileno(), voice.fileno(), 0, -1, tries, seconds, log, mountpoint, command)
    try:
        os.execv(words[0], words)
    finally:
        os._exit(4)


def another(tries: int, seconds: float, log: str, mountpoint: str, command: "list[str]") -> Keeper:
    """Start a keeper for this process, which had one that died. Raises OSError."""
    channel, voice = _channel()
    with channel, voice:
        ends = channel.fileno(), voice.fileno()
        words = _command_line(*ends, os.getpid(), -1, tries, seconds, log, mountpoint, command)
        channel.set_inheritable(True)
        voice.set_inheritable(True)
        pid = os.posix_spawn(words[0], words, os.environ)
        voice.set_inheritable(False)
        return Keeper("", pid, channel=voice.detach())


def _channel() -> "tuple[socket.socket, socket.socket]":
    """A keeper's socket, and that of its daemons. They have no name: a stranger who could send would send descriptors
    whose closing takes as long as he likes (a socket that lingers, a file of a FUSE mount of his own).
    """
    channel, voice = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return channel, voice


def _listen_fds(names: "list[str]") -> "dict[str, str]":
    """What tells this process, or the program that takes its place, what it is passed."""
    count, named = str(len(names)), ":".join(names)
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": named}


def _move(descriptors: "list[int]") -> None:
    """Give descriptors the numbers from the first on that are passed, inheritable, and close all others above them."""
    clear = FIRST_DESCRIPTOR + MOST_DESCRIPTORS + 1 + max([0, *descriptors])
    for number, fd in enumerate(descriptors):  # by way of numbers that are no one's
        os.dup2(fd, clear + number)
    for number in range(len(descriptors)):
        os.dup2(clear + number, FIRST_DESCRIPTOR + number)
    os.closerange(FIRST_DESCRIPTOR + len(descriptors), clear + len(descriptors))


def _command_line(channel: int, voice: int, daemon: int, ready: int, tries: int, seconds: float, log: str,
                  mountpoint: str, command: "list[str]") -> "list[str]":  # fmt: skip
    numbers = [str(value) for value in (channel, voice, daemon, ready, tries, seconds)]
    return [sys.executable, "-I", "-S", __file__, *numbers, log, mountpoint, *command]


# --- the keeper's side ---


class _Program:
    """The keeper. Times are of time.monotonic()."""

    def __init__(self, channel: int, voice: int, daemon: int, ready: int, tries: int, seconds: float, log: str,
                 mountpoint: str, command: "list[str]") -> None:  # fmt: skip
        self.channel = socket.socket(fileno=channel)
        self.channel.setblocking(False)
        self.channel.set_inheritable(False)
        self.voice = voice  # the other end, for every daemon
        os.set_inheritable(voice, False)
        if ready >= 0:
            os.set_inheritable(ready, False)
        self.ready, self.tries, self.seconds, self.log = ready, tries, seconds, log
        self.mountpoint, self.command = mountpoint, command
        self.held: list[tuple[str, int]] = []
        for word in os.environ.pop(KEPT, "").split():
            name, _, fd = word.partition("=")
            os.set_inheritable(int(fd), False)
            self.held.append((name, int(fd)))
        self.pid, self.pidfd = daemon, os.pidfd_open(daemon) if daemon else -1
        self.serving = self.stopping = self.asked_to_end = self.asked_to_restart = self.gave_up = False
        self.ever_served, self.interrupted = not daemon, False  # asked to end before it ever did
        self.wake = self.said = -1  # the other ends: a signal's, and standard error of the daemon in the background
        self.failed = 0  # starts in a row
        self.short_lived, self.served_since = 0, 0.0
        self.start_at = 0.0  # when there is no daemon
        self.kill_at: float | None = None  # when a daemon is killed that has been sent a signal
        self.watched, self.silent, self.look_at = False, 0, 0.0  # whether it gives signs of life; looks since the last
        self.down_since = None if daemon else time.monotonic()  # None: a daemon serves, or the first has not yet

    def run(self) -> int:
        """Keep until there is nothing to keep; the exit status."""
        self.wake, signals = os.pipe()
        for fd in self.wake, signals:
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(signals)
        for caught in (*ENDING, RESTART):
            signal.signal(caught, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ENDING, RESTART})
        while True:
            events = select.poll()
            for fd in self.wake, self.channel.fileno(), self.pidfd:
                if fd >= 0:
                    events.register(fd, select.POLLIN)
            for fd, _ in events.poll(self.patience()):
                if fd == self.wake:
                    self.obey_all()
                elif fd == self.channel.fileno():
                    self.hear_all()
                elif (code := self.bury()) is not None:
                    return code
            now = time.monotonic()
            if self.kill_at is not None and now >= self.kill_at:
                self.kill(f"has not obeyed a signal for {GRACE_SECONDS:g} s")
            if self.watched and now >= self.look_at:
                self.look()
            if self.gave_up:
                if self.asked_to_end:
                    return 32
            elif self.down_since is not None and now >= self.down_since + self.seconds:
                self.give_up(f"no daemon has answered for {self.seconds:g} s")
            elif not self.pid and now >= self.start_at:
                self.start()

    def patience(self) -> "float | None":
        """How many ms to wait for events."""
        times = [] if self.gave_up else [self.start_at] * (not self.pid)
        if self.down_since is not None:
            times.append(self.down_since + self.seconds)
        if self.kill_at is not None:
            times.append(self.kill_at)
        if self.watched:
            times.append(self.look_at)
        return max(0.0, (min(times) - time.monotonic()) * 1000 + 1) if times else None

    def obey_all(self) -> None:
        """Hand on the signals that came by now."""
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self.wake, 64):
                self.obey(number)

    def obey(self, number: int) -> None:
        """Hand a signal on."""
        if number in ENDING:
            self.asked_to_end = True
            self.interrupted |= not self.ever_served
        elif self.gave_up:
            self.say("trying again")
            self.gave_up, self.failed, self.start_at, self.down_since = False, 0, 0.0, time.monotonic()
        elif not self.serving:
            self.asked_to_restart = bool(self.pid)  # what is started already may be the version before
        # A daemon that takes over is told when it serves: only then does it know all that there is to end.
        if self.pid and (self.serving or (number in ENDING and not self.held)):
            self.ask(number)

    def ask(self, number: int) -> None:
        """Send the daemon a signal that it has to obey soon."""
        self.signal(number)
        if self.kill_at is None:
            self.kill_at = time.monotonic() + GRACE_SECONDS

    def look(self) -> None:
        """Kill the daemon if it has given no sign of life for too long."""
        self.look_at = time.monotonic() + LOOK_SECONDS
        self.silent += 1
        self.hear_all()
        if self.watched and self.silent > MOST_SILENT:
            self.kill(f"has given no sign of life for {LOOK_SECONDS * MOST_SILENT:g} s")

    def kill(self, why: str) -> None:
        """Kill the daemon, but for one that someone looks at with a debugger."""
        self.kill_at, self.silent = None, 0
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/status") as status:
            if any(line.startswith("TracerPid:") and int(line[10:]) for line in status):
                return
        self.say(f"the daemon {self.pid} of {self.mountpoint} {why}: killing it")
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send the daemon a signal. It can be dead already: of one that is no child of ours no one but we are told."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def hear_all(self) -> None:
        """Take what was sent by now, but not for ever: anyone can send."""
        for _ in range(MOST_MESSAGES):
            if not self.hear():
                break

    def hear(self) -> bool:
        """Take one message; False if there is none."""
        space = socket.CMSG_SPACE(4 * MOST_DESCRIPTORS) + socket.CMSG_SPACE(12)
        try:
            message, ancillary, _, _ = self.channel.recvmsg(LONGEST_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        sender = 0
        descriptors: list[int] = []
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
            elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                sender = struct.unpack("iII", data)[0]
        lines = message.decode(errors="replace").split("\n")
        name = next((line[7:] for line in lines if line.startswith("FDNAME=")), "stored")
        if sender and sender == self.pid:  # 0: no process of this process namespace
            if "FDSTOREREMOVE=1" in lines:
                self.drop(name)
            if "FDSTORE=1" in lines and len(self.held) + len(descriptors) <= MOST_DESCRIPTORS:
                self.drop(name)
                self.held += [(name, fd) for fd in descriptors]
                descriptors = []
            if "STOPPING=1" in lines:  # from here on it may take its time
                self.stopping, self.watched, self.kill_at = True, False, None
            if "WATCHDOG=1" in lines:
                self.watched, self.silent = not self.stopping, 0
            if "READY=1" in lines:
                self.served()
            if "BARRIER=1" in lines:
                for fd in descriptors:
                    with contextlib.suppress(OSError):  # it waits no more
                        os.write(fd, b"\1")
        for fd in descriptors:
            os.close(fd)
        return True

    def served(self) -> None:
        """The daemon serves."""
        self.obey_all()  # a signal that came before is not to be overtaken: the exit status tells
        self.ever_served = True
        self.serving, self.failed, self.down_since, self.served_since = True, 0, None, time.monotonic()
        if self.ready >= 0:
            with contextlib.suppress(BrokenPipeError):  # whoever waited was killed; the mount is no worse for it
                os.write(self.ready, b"\1" * (not self.interrupted))
            os.close(self.ready)
            self.ready = -1
            null = os.open(os.devnull, os.O_RDWR)
            for stream in 0, 1, 2:
                os.dup2(null, stream)
            os.close(null)
        if self.asked_to_end:
            self.ask(signal.SIGTERM)
        elif self.asked_to_restart:
            self.ask(RESTART)
        self.asked_to_restart = False

    def drop(self, name: str) -> None:
        """Close what is held by a name."""
        for fd in [fd for known, fd in self.held if known == name]:
            os.close(fd)
        self.held = [(known, fd) for known, fd in self.held if known != name]

    def bury(self) -> "int | None":
        """The daemon is dead: plan the next, or give the status to end with."""
        self.hear_all()  # what it said before
        try:
            _, status = os.waitpid(self.pid, 0)
            code: int | None = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            code = None  # it was no child of ours: it made us
        os.close(self.pidfd)
        was, self.pid, self.pidfd = self.pid, 0, -1
        self.watched, self.kill_at = False, None
        words = self.last_words()
        if self.stopping or not self.held:
            return 8 if code == 0 and self.interrupted else 0 if code is None else code if code >= 0 else 4
        if code is None:
            how = "is dead"
        elif code == LEFT:
            how = "left it"
        else:
            how = f"ended with status {code}" if code >= 0 else f"was killed by signal {-code}"
        now = time.monotonic()
        self.start_at = now
        if self.gave_up:
            return None
        if self.down_since is None:
            self.down_since = now
        if self.serving:
            kept = any(name == CONNECTION for name, _ in self.held)
            left = -signal.SIGKILL, *[LEFT] * kept  # on purpose; without a connection it may have been cut off
            soon = code not in left and now < self.served_since + SHORT_LIFE
            self.short_lived = self.short_lived + 1 if soon else 0
            if self.short_lived > 1:
                self.start_at += min(LONGEST_DELAY, RETRY_SECONDS * (self.short_lived - 1) / 4)
            self.say(f"the daemon {was} of {self.mountpoint} {how}: starting another")
        elif code == -signal.SIGKILL:
            self.say(f"the daemon {was} of {self.mountpoint} was killed before it served: starting another")
        else:
            self.failed += 1
            self.say(
                f"the daemon {was} of {self.mountpoint} {how} before it served ({self.failed} of {self.tries}){words}"
            )
            self.start_at = now + RETRY_SECONDS * 2 ** (self.failed - 1)
            if self.failed >= self.tries:
                self.give_up(f"{self.failed} daemons could not start")
        self.serving = False
        return None

    def last_words(self) -> str:
        """What a daemon in the background wrote to standard error, as far as its log did not tell."""
        if self.said < 0:
            return ""
        text = b""
        with contextlib.suppress(BlockingIOError):  # a child of its own may live on
            text = os.read(self.said, 1 << 16)
        os.close(self.said)
        self.said = -1
        lines = text.decode(errors="replace").splitlines()
        return ": " + " | ".join(lines[-LAST_LINES:]) if lines else ""

    def start(self) -> None:
        """Start a daemon, which finds what is held from descriptor 3 on."""
        self.asked_to_restart = False
        said = stderr = -1
        try:
            said, stderr = os.pipe()
            pid = os.fork()
        except OSError as error:
            for fd in said, stderr:
                if fd >= 0:
                    os.close(fd)
            self.say(f"cannot start a daemon: {error.strerror}")
            self.start_at = time.monotonic() + RETRY_SECONDS
            return
        if pid:
            self.pid, self.pidfd = pid, os.pidfd_open(pid)
            os.close(stderr)
            self.said = said
            os.set_blocking(said, False)
            return
        try:
            signal.set_wakeup_fd(-1)
            if self.log == "syslog":
                os.set_blocking(stderr, False)  # no one reads it before the daemon is dead
                os.dup2(stderr, 2)
            passed = [*self.held, (KEEPER_CHANNEL, self.voice)]
            environment = {**os.environ, KEEPER_PID: str(os.getppid()), **_listen_fds([name for name, _ in passed])}
            _move([fd for _, fd in passed])
            os.execve(self.command[0], self.command, environment)
        except OSError as error:
            os.write(2, f"ttmfs: {self.command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def give_up(self, why: str) -> None:
        """Make the mountpoint dead: an error for all who wait. The pages stay."""
        if self.pid:
            self.signal(signal.SIGKILL)  # it holds the connection too
            self.watched, self.kill_at = False, None
        self.drop(CONNECTION)
        self.gave_up, self.down_since = True, None
        if not any(name == STORE for name, _ in self.held):
            self.say(f"gave up: {why}. {self.mountpoint} is dead, and its pages are lost. To end: kill {os.getpid()}")
            return
        me, rescue = (
            os.getpid(),
            os.path.join(os.path.dirname(os.path.dirname(__file__)), "cli", "rescue.py"),
        )  # which needs nothing else
        self.say(
            f"gave up: {why}. {self.mountpoint} is dead, but its pages are safe as long as this process, {me}, lives. "
            f"To get them out: ttmfs rescue {me} DIRECTORY (or python3 {rescue} {me} DIRECTORY). "
            f"To try again: kill -USR1 {me}. To let them go: kill {me}"
        )

    def say(self, text: str) -> None:
        """Log one line."""
        try:
            if self.log == "syslog":
                write_to_syslog("ttmfs-keeper", WARNING, text)
            else:
                priority = "<4>" if self.log == "journal" else ""
                os.write(2, f"{priority}ttmfs-keeper: {text}\n".encode(errors="replace"))
        except OSError:
            pass  # no one listens


def _main(
    channel: str, voice: str, daemon: str, ready: str, tries: str, seconds: str, log: str, mountpoint: str,
    *command: str,
) -> int:  # fmt: skip
    with open("/proc/self/comm", "w") as name:
        name.write("ttmfs-keeper")
    os.chdir("/")
    return _Program(
        int(channel), int(voice), int(daemon), int(ready), int(tries), float(seconds), log, mountpoint, list(command)
    ).run()


if __name__ == "__main__":
    os._exit(_main(*sys.argv[1:]))  # at once: a signal no longer changes the status
