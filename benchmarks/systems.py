"""The filesystems to compare: each is really mounted by its own program, and unmounted afterwards.

All of a group's systems are mounted at once, so that they can take turns. ``tmpfs.py`` is the example in the source
package of the installed pyfuse3. pip fetches it once into the user's cache directory. ``scripts/libfuse_examples.sh``
builds the examples of libfuse. ttmfs is used as any program uses it: by its command line, its files and its mount.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from processes import uninterrupted

__all__ = [
    "BINDFS",
    "EXAMPLE",
    "MEMFS",
    "OFF",
    "OTHER",
    "PASSTHROUGH",
    "TMPFS",
    "TTMFS",
    "InUnit",
    "System",
    "Tmpfs",
    "Ttmfs",
    "Unavailable",
    "checkouts",
    "compare_with",
    "knows_option",
    "mounted",
    "side_by_side",
    "wait_until",
]

TTMFS, OFF, OTHER, EXAMPLE, BINDFS, TMPFS = "ttmfs", "ttmfs busy_poll=off", "other ttmfs", "tmpfs.py", "bindfs", "tmpfs"
MEMFS, PASSTHROUGH = "memfs_ll", "passthrough_hp"

REPOSITORY = Path(__file__).resolve().parent.parent
LIBFUSE_EXAMPLES = REPOSITORY / "build/libfuse-examples/bin"
WAIT_SECONDS, FETCH_SECONDS = 30.0, 120.0
STATS_BYTES = 1 << 16


class Unavailable(Exception):
    """A system is not available here. The text says what to do."""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Wait for a condition, with a time limit."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.01)


class System(ABC):
    """A mount, and the process that serves it, if any."""

    page_size = os.sysconf("SC_PAGE_SIZE")
    open_flags = 0
    """Flags with which a client opens pages, so that each read and write is a request to the daemon."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.path = Path()
        self.process: subprocess.Popen[str] | None = None

    @abstractmethod
    def start(self) -> None:
        """Begin to mount at ``path``, an empty directory."""

    def wait(self) -> None:  # noqa: B027 (without a daemon there is nothing to wait for)
        """Return once the mount answers."""

    def ask_to_end(self) -> None:  # noqa: B027
        """Begin to unmount, if that takes time."""

    @abstractmethod
    def end(self) -> list[str]:
        """Unmount. On return nothing is left and the server has ended. Return the complaints."""

    @property
    def pid(self) -> int:
        """The daemon's process id, after :meth:`wait`."""
        assert self.process is not None
        return self.process.pid

    def cpu(self) -> int:
        """CPU time of the daemon's whole process in ns, by the clock of clock_getcpuclockid(3)."""
        return int(time.clock_gettime_ns(~self.pid << 3 | 2)) if self.process else 0

    def new(self, name: str) -> Path:
        """Make a new directory for pages."""
        directory = self.path / name
        directory.mkdir()
        return directory


class _Daemon(System):
    """A system whose daemon, or its keeper, is our child in the foreground.

    It has its own session, so that Ctrl-C does not reach it before we have closed its files.
    """

    command: Sequence[str]

    def start(self) -> None:
        self._before = self.path.stat().st_dev
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by end)
        self.process = subprocess.Popen(
            [*self.command, str(self.path)],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, text=True, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> None:
        process = self.process
        assert process is not None
        wait_until(
            lambda: process.poll() is not None or self.path.stat().st_dev != self._before, f"{self.name} to mount"
        )
        if process.poll() is not None:
            raise RuntimeError(f"{self.name} did not mount: {self._said()}")

    def ask_to_end(self) -> None:
        if self.process and os.path.ismount(self.path):
            subprocess.run(["fusermount3", "-u", str(self.path)], check=False, stderr=subprocess.DEVNULL)
        elif self.process:
            self.process.terminate()

    def end(self) -> list[str]:
        if self.process is None:
            return []
        try:
            code = self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            code = self.process.wait()
        finally:
            if os.path.ismount(self.path):
                subprocess.run(["fusermount3", "-u", "-z", str(self.path)], check=False)
        with self._log:
            return [f"{self.name} ended with {code}: {self._said()}"] if code else []

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().strip()


class Ttmfs(_Daemon):
    """A ttmfs on a private tmpfs. `checkout` is the directory of the program."""

    def __init__(
        self, name: str, size: int, *options: str, page_size: int = System.page_size, checkout: Path = REPOSITORY
    ) -> None:
        super().__init__(name, size)
        self.page_size = page_size
        self.checkout = checkout
        self._asked = -1
        self._daemon = -1
        words = ",".join((f"size={size}", f"page_size={page_size}", *options))
        self.command = [*_program(checkout), "-f", "-o", words]

    @property
    def keeper(self) -> int:
        """The process id of the keeper, which is our child."""
        return super().pid

    @property
    def pid(self) -> int:
        return self._daemon

    def wait(self) -> None:
        super().wait()
        self.find_daemon()

    def find_daemon(self) -> None:
        """Ask the mount which process serves it now."""
        self._daemon = int(json.loads((self.path / ".config").read_text())["daemon_pid"])

    def ask_to_end(self) -> None:
        if self.process:
            self.process.terminate()

    def requests(self) -> Counter[str]:
        """The number of finished requests of each kind, without those of reading ``.stats`` itself.

        The text is made when the file is opened, so it includes earlier openings and readings.
        """
        fd = os.open(self.path / ".stats", os.O_RDONLY)
        try:
            text = os.read(fd, STATS_BYTES).decode()
        finally:
            os.close(fd)
        rows = re.findall(r'^ttmfs_operation_duration_seconds_count\{operation="(\w+)"\} (\d+)$', text, re.MULTILINE)
        found = Counter({name: int(count) for name, count in rows})
        self._asked += 1
        found.subtract({"open": self._asked, "read": self._asked})
        return found

    def stored_pages(self) -> int:
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize // self.page_size


class InUnit(Ttmfs):
    """A ttmfs whose keeper is the main process of a unit of systemd, which stores the keeper's descriptors."""

    SETTINGS = (
        "Type=notify", "FileDescriptorStoreMax=16", "Environment=FDSTORE=16", "KillMode=process", "Restart=on-failure",
        "RestartSec=100ms", "RestartForceExitStatus=SIGKILL",
    )  # fmt: skip

    def __init__(self, name: str, size: int, *options: str, checkout: Path = REPOSITORY) -> None:
        if not Path("/run/systemd/system").is_dir():
            raise Unavailable("systemd does not run here")
        super().__init__(name, size, *options, checkout=checkout)
        self._unit = f"ttmfs-bench-{os.getpid()}-{name.replace('=', '-').replace(' ', '-')}"
        settings = [word for setting in self.SETTINGS for word in ("-p", setting)]
        self.command = ["systemd-run", "--quiet", "--wait", "--unit", self._unit, *settings, *self.command]

    @property
    def keeper(self) -> int:
        return int(json.loads((self.path / ".config").read_text())["keeper_pid"])

    def ask_to_end(self) -> None:
        subprocess.run(["systemctl", "stop", self._unit], check=False, stderr=subprocess.DEVNULL)


class Tmpfs(System):
    """A tmpfs of the kernel, with one file a page: the alternative to ttmfs."""

    def start(self) -> None:
        options = f"size={self.size},nr_inodes=0"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "ttmfs-bench", str(self.path)], check=True)

    def end(self) -> list[str]:
        if os.path.ismount(self.path):
            subprocess.run(["umount", str(self.path)], check=True)
        return []


class Memfs(_Daemon):
    """The example memfs_ll of libfuse, in C++: files in the daemon's own memory."""

    open_flags = os.O_DIRECT  # without it, the page cache answers reads of open files

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self.command = [_libfuse_example(name), "-f"]


class Passthrough(_Daemon):
    """A passthrough filesystem over a tmpfs of its own. The command names the tmpfs last."""

    def __init__(self, name: str, size: int, *command: str) -> None:
        super().__init__(name, size)
        self._words = command
        self._below = Tmpfs(f"{name} below", size)

    def start(self) -> None:
        self._below.path = self.path.with_suffix(".below")
        self._below.path.mkdir()
        self._below.start()
        self.command = [*self._words, str(self._below.path)]
        super().start()

    def end(self) -> list[str]:
        try:
            return super().end()
        finally:
            if self._below.path.name:
                self._below.end()
                self._below.path.rmdir()


def _bindfs(name: str, size: int) -> Passthrough:
    """bindfs, in C."""
    if not shutil.which("bindfs"):
        raise Unavailable("bindfs is not installed: apt-get install bindfs")
    return Passthrough(name, size, "bindfs", "-f", "-o", "direct_io")


def _libfuse_example(name: str) -> str:
    path = LIBFUSE_EXAMPLES / name
    if not path.exists():
        raise Unavailable("it is not built: scripts/libfuse_examples.sh")
    return str(path)


class Example(_Daemon):
    """The filesystem ``examples/tmpfs.py`` of pyfuse3."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self.command = [sys.executable, str(_example())]


def _example() -> Path:
    """The path of tmpfs.py. Fetches it if necessary."""
    release = version("pyfuse3")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttmfs-bench"
    path = cache / f"tmpfs-{release}.py"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "pyfuse3", "-d", temporary, f"pyfuse3=={release}"]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=FETCH_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"pip took too long to fetch the source package of pyfuse3 {release}") from None
        archives = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode or not archives:
            said = done.stderr.strip().splitlines() or ["pip gave no source package"]
            raise Unavailable(f"pip cannot fetch the source package of pyfuse3 {release}: {said[-1]}")
        with tarfile.open(archives[0]) as archive:
            names = [name for name in archive.getnames() if name.endswith("/examples/tmpfs.py")]
            member = archive.extractfile(names[0]) if names else None
            if member is None:
                raise Unavailable(f"the source package of pyfuse3 {release} has no examples/tmpfs.py")
            text = io.TextIOWrapper(member, "utf-8").read()
    cache.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


_checkouts = {TTMFS: REPOSITORY}


def compare_with(checkout: Path) -> None:
    """Measure the ttmfs of another checkout, too. Raises Unavailable if there is none."""
    if not (checkout / "mount.py").is_file():
        raise Unavailable(f"{checkout} is no checkout of ttmfs: it has no mount.py")
    _checkouts[OTHER] = checkout


def checkouts(size: int, *options: str) -> list[Ttmfs]:
    """This ttmfs, and the other one if there is one."""
    return [Ttmfs(name, size, *options, checkout=checkout) for name, checkout in _checkouts.items()]


def knows_option(checkout: Path, option: str) -> bool:
    """Whether the ttmfs of a checkout has this mount option."""
    text = subprocess.run([*_program(checkout), "--help"], check=True, capture_output=True, text=True).stdout
    return bool(re.search(rf"\b{option}=", text))


def _program(checkout: Path) -> list[str]:
    """A checkout's command to mount, with its own Python if it has one."""
    python = checkout / ".venv/bin/python"
    own = checkout != REPOSITORY and python.exists()
    return [str(python) if own else sys.executable, str(checkout / "mount.py")]


def side_by_side(size: int, names: Sequence[str]) -> tuple[list[System], dict[str, str]]:
    """The systems of these names, and the reasons why the others are not available. The other ttmfs is optional."""
    make: dict[str, Callable[[], System]] = {
        **{name: partial(Ttmfs, name, size, checkout=checkout) for name, checkout in _checkouts.items()},
        OFF: lambda: Ttmfs(OFF, size, "busy_poll=off"),
        EXAMPLE: lambda: Example(EXAMPLE, size),
        MEMFS: lambda: Memfs(MEMFS, size),
        PASSTHROUGH: lambda: Passthrough(PASSTHROUGH, size, _libfuse_example(PASSTHROUGH), "--foreground"),
        BINDFS: lambda: _bindfs(BINDFS, size),
        TMPFS: lambda: Tmpfs(TMPFS, size),
    }
    found, missing = [], {}
    for name in names:
        try:
            if name in make:
                found.append(make[name]())
        except Unavailable as error:
            missing[name] = str(error)
    return found, missing


@contextlib.contextmanager
def mounted(directory: Path, systems: Sequence[System]) -> Iterator[None]:
    """Mount systems below a directory, all at once, for the duration of a ``with``."""
    begun: list[System] = []
    complaints: list[str] = []

    def end(system: System) -> None:
        complaints.extend(system.end())

    try:
        for number, system in enumerate(systems):
            system.path = directory / f"{number}"
            system.path.mkdir()
            begun.append(system)
            with uninterrupted():
                system.start()
        for system in systems:
            system.wait()
        yield
    finally:
        with uninterrupted(), contextlib.ExitStack() as stack:  # each one ends, even if others fail
            for system in begun:
                stack.callback(system.path.rmdir)  # fails if something is still mounted; does not empty it
                stack.callback(end, system)
            for system in begun:
                stack.callback(system.ask_to_end)
    if complaints:  # after an error, these would hide it
        raise RuntimeError("; ".join(complaints))
