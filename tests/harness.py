"""Real mounts for tests: they start, a watchdog bounds them, and the end checks what they logged and leaked."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

REPOSITORY = Path(__file__).resolve().parent.parent
MOUNT_PY = REPOSITORY / "mount.py"
MOUNT_COMMAND = (sys.executable, "-W", "error", str(MOUNT_PY))

START_SECONDS = 20.0
WATCHDOG_SECONDS = 120.0


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 10.0) -> None:
    """Wait until a condition holds. Fails after a number of seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.005)


def meminfo(name: str) -> int:
    """The value of a row of /proc/meminfo, in bytes."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows[name].split()[0]) * 1024


def names(directory: Path) -> list[str]:
    """The names in a directory, in the order of the listing."""
    return [entry.name for entry in os.scandir(directory)]


def attribute(path: Path, name: str) -> str:
    """The value of the extended attribute user.ttmfs.NAME."""
    return os.getxattr(path, f"user.ttmfs.{name}").decode()


def count(path: Path, name: str) -> int:
    """The value of a numeric extended attribute user.ttmfs.NAME."""
    return int(attribute(path, name))


def set_attribute(path: Path, name: str, value: object) -> None:
    """Set the extended attribute user.ttmfs.NAME."""
    os.setxattr(path, f"user.ttmfs.{name}", str(value).encode())


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A descriptor of a file for the time of a ``with``."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened_process(pid: int) -> Iterator[int]:
    """A pidfd of a process for the time of a ``with``. It becomes readable when the process ends."""
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _mounted() -> Iterator[tuple[str, str]]:
    """The mount point and type of each mount. The kernel writes blanks in a mount point as octal escapes."""
    for line in Path("/proc/self/mounts").read_bytes().split(b"\n")[:-1]:
        _, path, kind, *_ = line.split(b" ")
        path = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), path)
        yield os.fsdecode(path), kind.decode()


def mounts() -> set[str]:
    """The mount points of all ttmfs mounts."""
    return {path for path, kind in _mounted() if kind == "fuse.ttmfs"}


def mounts_below(directory: Path) -> list[str]:
    """The mount points of all mounts below a directory, sorted."""
    return sorted(path for path, _ in _mounted() if Path(path).is_relative_to(directory))


def children(pid: int | None = None) -> set[int]:
    """The process ids of the children of a process (of this one by default)."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid or os.getpid()}/task").iterdir():
        with contextlib.suppress(OSError):
            found.update(map(int, (task / "children").read_text().split()))
    return found


def remaining(before: set[int]) -> set[int]:
    """The children of this process that it did not have before. Those that have ended are reaped."""
    for pid in children() - before:
        os.waitpid(pid, os.WNOHANG)
    return children() - before


def descriptors(pid: int) -> list[str]:
    """What the descriptors of a process refer to, sorted."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(entry))
    return sorted(found)


def daemons(keeper: int) -> set[int]:
    """The daemons among a keeper's children: those that have the state of the mount. A standby has none.

    A child that the keeper has just forked still has all that the keeper has, and its name.
    """
    found = set()
    for pid in children(keeper):
        with contextlib.suppress(OSError):
            if not is_keeper(pid) and has_state(pid):
                found.add(pid)
    return found


def is_keeper(pid: int) -> bool:
    """Whether a process has the name of a keeper. Raises OSError if it has ended."""
    return Path(f"/proc/{pid}/comm").read_text() == "ttmfs-keeper\n"


def has_state(pid: int) -> bool:
    """Whether a process has the state of a mount open. Raises OSError if it has ended."""
    return any(name.startswith("/memfd:ttmfs-state") for name in descriptors(pid))


def _kinds(held: list[str]) -> Counter[str]:
    """The number of open sockets, pipes and so on. Files do not count: each daemon has other backups open."""
    return Counter(name.partition(":")[0] for name in held if not name.startswith("/"))


class Mount:
    """A mount of ttmfs, served in the foreground by a child process for the time of a ``with``.

    The end sends SIGTERM. The test fails if the exit status is not 0, if the daemon leaked a descriptor, or if it
    logged an unexpected line. Expected are the lines in NORMAL and those that :meth:`expect_log` allows.
    A mount that one test uses for longer than WATCHDOG_SECONDS is killed, so that no client hangs. Its stacks are in
    the log. A mount that several tests share has that time for each of them: the plugin calls :meth:`watch_anew`.
    """

    living: ClassVar[list["Mount"]] = []

    has_standby = False
    """Whether a mount has a standby unless its options say so. Only tests of kills need one, which takes a processor a
    third of a second to start."""

    NORMAL = (
        r"serving /",
        r"SIGTERM: unmounting /",
        r"refused: ",
        r"this kernel cannot refuse descriptors of strangers",
        r"is more than RAM and swap of this machine",
    )
    RESTARTED = (r"the daemon \d+ of /\S+ (was killed|ended|left it)", r"taking over /")

    def __init__(
        self,
        directory: Path,
        options: str = "",
        *,
        argv: tuple[str, ...] = (),
        command: tuple[str, ...] = MOUNT_COMMAND,
        **popen: Any,
    ) -> None:
        self.path = directory
        self.log: list[str] = []
        self._expected = [re.compile(pattern) for pattern in self.NORMAL]
        self._command = [*command, *argv, str(directory), "-f"]
        if not self.has_standby and "standby=" not in options:
            options = f"{options},standby=off".lstrip(",")
        if options:
            self._command += ["-o", options]
        self._popen = popen
        self._served, self._heard = False, threading.Event()
        self._kept, self._ends_with = False, 0

    @property
    def pid(self) -> int:
        """The process id of the daemon: a child of the keeper, or, without a keeper, the process that was started."""
        return next(iter(daemons(self.process.pid)), self.process.pid)

    def expect_restarts(self) -> None:
        """Allow the log lines about daemons that die and daemons that take over."""
        self._expected += [re.compile(pattern) for pattern in self.RESTARTED]

    def restarts(self) -> int:
        """How many daemons have taken over. Waits for a daemon that answers."""
        text = (self.path / ".stats").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("ttmfs_restarts_total")))

    def kill(self) -> None:
        """Send SIGKILL to the daemon. If the keeper is just starting one, wait for it first."""
        daemon = 0

        def there() -> bool:
            nonlocal daemon
            daemon = self.pid
            return daemon != self.process.pid or not self._kept

        wait_until(there, "a daemon")
        os.kill(daemon, signal.SIGKILL)

    def kill_both(self) -> None:
        """Kill the daemon and its keeper, so that neither replaces the other. The mountpoint is then dead."""
        daemon = self.pid
        with opened_process(daemon) as dead:
            os.kill(daemon, signal.SIGSTOP)
            self.process.kill()
            os.kill(daemon, signal.SIGKILL)
            assert select.select([dead], [], [], 10)[0], "it lives on"
        self._ends_with = -signal.SIGKILL

    def expect_log(self, pattern: str) -> None:
        """Allow log lines of the daemon that contain a pattern."""
        self._expected.append(re.compile(pattern))

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **self._popen
        )
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()
        self._watch()
        self.living.append(self)
        if not self._heard.wait(START_SECONDS):
            self._bite()
        if not self._served:
            self._finish()
            raise AssertionError(f"the mount did not come up: {self.log}")
        self._kept = self.pid != self.process.pid
        self._descriptors = descriptors(self.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = _kinds(descriptors(self.pid)) if self.process.poll() is None else Counter[str]()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self._finish()
        assert str(self.path) not in mounts(), "it is mounted still"
        if kind is None:
            unexpected = [line for line in self.log if not any(p.search(line) for p in self._expected)]
            assert not unexpected, "the daemon logged:\n" + "\n".join(self.log)
            assert code == self._ends_with, f"the mount's exit status is {code}"
            # Beyond the start: one pipe of libfuse's, for splice(2).
            leaked = left - _kinds(self._descriptors)
            assert leaked.total() <= 2, f"the daemon leaked {leaked}"

    def _watch(self) -> None:
        self._watchdog = threading.Timer(WATCHDOG_SECONDS, self._bite)
        self._watchdog.start()

    def watch_anew(self) -> None:
        """Start the time of the watchdog again."""
        self._watchdog.cancel()
        self._watchdog.join()
        self._watch()

    def wait(self) -> int:
        """Wait until the daemon ends by itself. Returns its exit status."""
        return self.process.wait(10)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            if "serving /" in line:
                self._served = True
                self._heard.set()
        self._heard.set()  # the log has ended, so the process has

    def _bite(self) -> None:
        """Kill a daemon that hangs, after it has logged its stacks. Its clients then get errors."""
        self.log.append(f"watchdog: killed after {WATCHDOG_SECONDS} s")
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(self.pid, signal.SIGUSR2)
            time.sleep(0.5)
            self.kill_both()

    def _finish(self) -> int:
        try:
            code = self.process.wait(15)
        except subprocess.TimeoutExpired:
            self._bite()
            code = self.process.wait(5)
        self.living.remove(self)
        self._watchdog.cancel()
        self._watchdog.join()
        if str(self.path) in mounts():  # the keeper alone was killed, and the daemon still serves
            subprocess.run(["fusermount3", "-u", "-z", str(self.path)], check=False)
        self._reader.join(5)
        if self._reader.is_alive():  # closing the pipe would wait for the reader
            self.log.append("a process of the mount lives on")
        elif self.process.stderr:
            self.process.stderr.close()
        return code


@contextlib.contextmanager
def raises_errno(*numbers: int) -> Iterator[None]:
    """Expect an OSError with one of these errnos."""
    expected = " or ".join(map(os.strerror, numbers))
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise AssertionError(f"{error!r} instead of {expected}") from error
    else:
        raise AssertionError(f"no error instead of {expected}")


def run(command: str, *, cwd: Path | None = None, code: int = 0, **more: Any) -> str:
    """Run a shell command as a user would type it. Returns both output streams. Fails on another status than `code`.

    SHELL is /bin/sh whatever the environment says, since split(1) runs its filters with it.
    """
    more["env"] = {**more.get("env", os.environ), "SHELL": "/bin/sh"}
    done: subprocess.CompletedProcess[str] = subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=100,
        check=False,
        **more,
    )
    assert done.returncode == code, f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Stop processes for the time of a ``with``."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
