"""Mounts whose daemon or keeper is killed, stopped or replaced while clients use them, and helpers to inspect them."""

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from harness import (
    MOUNT_COMMAND,
    MOUNT_PY,
    REPOSITORY,
    Mount,
    children,
    descriptors,
    has_state,
    is_keeper,
    opened,
    run,
    wait_until,
)
from ttmfs.linux.mountinfo import mounted_at

COMMAND = shlex.join(MOUNT_COMMAND)
PAGE = os.sysconf("SC_PAGE_SIZE")
DEAD = {"ENOTCONN", "ECONNABORTED"}
STANDBY_NICE = 19
REPLACED = r"the keeper was killed: \d+ is another"
FAILED = r"the daemon \d+ of /\S+ ended with status \d+ before it served \(\d+ of \d+\)"
GAVE_UP = r"gave up: "
CUT_OFF = r"the connection of /\S+ was cut off, but it was not unmounted"
ANEW = r"mounted /\S+ anew over the pages that were kept"
FUSECTL = Path("/sys/fs/fuse/connections")


def processes(path: Path) -> set[int]:
    """The processes with a path among their arguments: the keeper and the daemon of a mount there."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.fsencode(path) in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
    return found


def standbys(path: Path) -> set[int]:
    """The processes that stand by for a mount, ready or not, or that are just ending."""
    return {pid for pid in processes(path) if not _serves(pid)}


def serving(path: Path) -> set[int]:
    """The keeper and the daemon of a mount."""
    return {pid for pid in processes(path) if _serves(pid)}


def _serves(pid: int) -> bool:
    """Whether a process is a keeper, or has the state of a mount."""
    with contextlib.suppress(OSError):
        return is_keeper(pid) or has_state(pid)
    return False


def ready_standby(path: Path) -> int:
    """The process id of the standby of a mount. Waits until it is ready, and has it hurry."""

    def ready() -> set[int]:
        found = set()
        for pid in standbys(path):
            with contextlib.suppress(OSError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, pid, 0)
                if Path(f"/proc/{pid}/comm").read_text() == "ttmfs-standby\n":
                    found.add(pid)
        return found

    wait_until(ready, "a standby", 30)
    (pid,) = ready()
    os.setpriority(os.PRIO_PROCESS, pid, STANDBY_NICE)
    return pid


def keeper_of(path: Path) -> int:
    found: int = json.loads((path / ".config").read_text())["keeper_pid"]
    return found


class Kept(Mount):
    """A mount whose keeper may be killed. The end sends SIGTERM to the last keeper."""

    has_standby = True

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / ".config").read_text())
        return found

    @property
    def keeper(self) -> int:
        """The process id of the keeper."""
        return keeper_of(self.path)

    @property
    def daemon(self) -> int:
        return int(self.config()["daemon_pid"])

    def kill_daemon(self) -> None:
        """Kill the daemon once it answers."""
        os.kill(self.daemon, signal.SIGKILL)

    def kill_keeper(self, *, wait: bool = True) -> None:
        """Kill the keeper, and wait for its replacement unless `wait` is false."""
        self.expect_log(REPLACED)
        self.expect_log("the keeper does not hear: .*Connection refused")  # it died amid a message
        self.expect_log(r"the daemon \d+ of /\S+ is dead: starting another")  # it is no child of the new keeper
        before = self.keeper
        os.kill(before, signal.SIGKILL)
        if before == self.process.pid:
            self.process.wait(5)
        if wait:
            self.wait_for_another_keeper(before)

    def wait_for_another_keeper(self, before: int) -> None:
        wait_until(lambda: self.keeper != before, "another keeper")

    def restart(self) -> None:
        """Ask the keeper for another daemon, and wait for it."""
        self.expect_restarts()
        before = self.daemon
        os.kill(self.keeper, signal.SIGUSR1)
        wait_until(lambda: self.daemon != before, "another daemon")

    def said(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]

    def wait_for_log(self, pattern: str) -> None:
        self.expect_log(pattern)
        wait_until(lambda: self.said(pattern), f"{pattern!r} in the log", 30)

    def give_up(self) -> None:
        """Kill the daemon when no other can start, and wait until the keeper has given up."""
        self.expect_restarts()
        self.expect_log(FAILED)
        self.kill_daemon()
        self.wait_for_log(GAVE_UP)

    def try_again(self, keeper: int) -> None:
        """Tell a keeper that gave up to try again, and wait for the mount."""
        self.expect_log("anew over the pages that were kept")
        served = len(self.said("serving /"))
        os.kill(keeper, signal.SIGUSR1)
        self.wait_for_log("trying again")
        wait_until(lambda: len(self.said("serving /")) > served, "the mount")

    def ends_with(self, code: int) -> None:
        """Wait for the keeper and the daemon to end by themselves, and check the exit status."""
        assert self.process.wait(10) == code
        self._ends_with = code
        wait_until(lambda: not processes(self.path), "every process to end")

    def _finish(self) -> int:
        if self.process.poll() is None or not processes(self.path):
            code = super()._finish()
        else:  # the first keeper was killed, and another one serves. This process adopts it when the daemon ends.
            keeper, statuses = self.keeper, dict[int, int]()
            os.kill(keeper, signal.SIGTERM)

            def ended() -> bool:
                with contextlib.suppress(ChildProcessError):
                    for orphan in children():
                        pid, status = os.waitpid(orphan, os.WNOHANG)
                        statuses[pid] = os.waitstatus_to_exitcode(status)
                return keeper in statuses and not processes(self.path)

            wait_until(ended, "keeper and daemon to end")
            super()._finish()
            code = statuses[keeper]
        assert not processes(self.path), "a process is left"
        return code

    def _bite(self) -> None:
        self.log.append("watchdog: killed")
        for pid in processes(self.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


CALLER = """
import errno, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print("open", flush=True)
while sys.stdin.readline():
    try:
        print("read" if os.pread(fd, 4096, 0) else "nothing", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


class Caller:
    """Another process, which has a file open and reads from it on demand. The read may block."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-I", "-c", CALLER, str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def __enter__(self) -> Self:
        assert self._said() == "open"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=5)

    def ask(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("read\n")

    def asks_and_waits(self) -> None:
        """Ask for a read, and wait until it blocks in the kernel."""
        self.ask()
        wait_until(lambda: "fuse" in Path(f"/proc/{self._process.pid}/stack").read_text(), "the caller to wait")

    def answer(self) -> str:
        """The outcome of the read, within 10 s: "read", "nothing" or the name of an errno."""
        return self._said()

    def waits(self) -> bool:
        return not self._readable(0)

    def _said(self) -> str:
        assert self._readable(10), "the caller hangs"
        assert self._process.stdout
        line: str = self._process.stdout.readline()
        return line.rstrip("\n")

    def _readable(self, seconds: float) -> bool:
        assert self._process.stdout
        return bool(select.select([self._process.stdout], [], [], seconds)[0])


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """A backup with pages and open descriptors. The end checks that all of them still work and that no page changed."""
    a = path / "a"
    a.mkdir()
    content = {handle: os.urandom(PAGE) for handle in (1, 2, 3, 1000)}
    for handle, data in content.items():
        (a / str(handle)).write_bytes(data)
    with (
        os.scandir(a) as names,
        opened(a / "2") as page,
        opened(a / ".image") as image,
        opened(a / ".shmem") as memory,
    ):
        listed = [next(names).name]
        yield
        content[2] = os.urandom(PAGE)
        assert os.pwrite(page, content[2], 0) == PAGE
        assert os.pread(image, PAGE, PAGE) == content[2]
        assert os.pread(memory, PAGE, PAGE) == content[2]
        with opened(a / ".shmem") as again:
            assert os.pread(again, PAGE, PAGE) == content[2]
        assert listed + [entry.name for entry in names] == ["1", "2", "3", "1000"]
        for handle, data in content.items():
            assert (a / str(handle)).read_bytes() == data
    shutil.rmtree(a)


def store_of(daemon: int) -> Path:
    """The directory of a private store that a daemon has open, as a path in /proc."""
    found = [fd for fd in Path(f"/proc/{daemon}/fd").iterdir() if os.readlink(fd) == "/" and fd.is_dir()]
    (store,) = (fd for fd in found if not os.path.samestat(fd.stat(), os.stat("/")))
    return store


def kept_state(keeper: int) -> Path:
    """The memfd of the state that a keeper holds, as a path in /proc."""
    (found,) = (fd for fd in Path(f"/proc/{keeper}/fd").iterdir() if os.readlink(fd) == "/memfd:ttmfs-state (deleted)")
    return found


def kinds(pid: int) -> Counter[str]:
    """The number of sockets, pipes, devices and so on that a process has open. Files of backups do not count."""
    return Counter(
        name.partition(":")[0] for name in descriptors(pid) if not name.startswith("/") or name.startswith("/dev")
    )


def copied_package(directory: Path) -> Path:
    """A copy of ttmfs that a test may change."""
    shutil.copytree(REPOSITORY / "ttmfs", directory / "ttmfs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(MOUNT_PY, directory)
    return directory


def replace_in(file: Path, old: str, new: str) -> None:
    """Replace a text that must be there."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def gives_up_after(package: Path, *, failed: int = 5, seconds: float = 30) -> None:
    """Have the keeper of a copied ttmfs give up sooner."""
    limits = "MOST_FAILED_STARTS, MOST_SECONDS_DOWN"
    protocol = package / "ttmfs/recovery/keeper_protocol.py"
    replace_in(protocol, f"\n{limits} = 5, 30.0\n", f"\n{limits} = {failed}, {seconds}\n")


def cannot_resend(package: Path) -> tuple[str, ...]:
    """The command of a copied ttmfs that takes this kernel for one before Linux 6.9."""
    replace_in(package / "ttmfs/daemon/keeping.py", "RESEND_SINCE = (7, 40)", "RESEND_SINCE = (99, 0)")
    return of_package(package)


def of_package(package: Path) -> tuple[str, ...]:
    return *MOUNT_COMMAND[:-1], str(package / MOUNT_PY.name)


@contextlib.contextmanager
def changed(file: Path, old: str, new: str) -> Iterator[None]:
    """Replace text in a file for the time of a ``with``.

    Python recompiles a module if its modification time, in seconds, has changed. So each version is a minute newer.
    """
    text, before = file.read_text(), file.stat().st_mtime
    assert old in text
    file.write_text(text.replace(old, new))
    os.utime(file, (before + 60, before + 60))
    try:
        yield
    finally:
        file.write_text(text)
        os.utime(file, (before + 120, before + 120))


@contextlib.contextmanager
def covered(path: Path, kind: str) -> Iterator[None]:
    """A directory that is there, with something mounted on it."""
    run(f"mount -t {kind} none {path}")
    try:
        yield
    finally:
        run(f"umount {path}")


@contextlib.contextmanager
def listed_connections() -> Iterator[None]:
    """The kernel's list of connections, mounted if it is not."""
    with contextlib.ExitStack() as stack:
        if not os.path.ismount(FUSECTL):
            stack.enter_context(covered(FUSECTL, "fusectl"))
        yield


def abort(path: Path) -> None:
    """Abort the connection of the mount at a path."""
    found = mounted_at(str(path))
    assert found
    (FUSECTL / found.device.partition(":")[2] / "abort").write_text("1")


def expect_cuts(mount: Mount) -> None:
    for pattern in (CUT_OFF, ANEW):
        mount.expect_log(pattern)
    mount.expect_restarts()


def served_anew(mount: Kept) -> bool:
    """Whether the daemon has mounted again and serves."""
    lines = [line for line in mount.log if re.search(f"{ANEW}|serving /", line)]
    return "serving /" in lines[-1] and len(mount.said(ANEW)) == 1
