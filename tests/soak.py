"""A long run of everything at once: mixed load, kills of daemon and keeper, restarts, writeback, changes of the budget.

    python tests/soak.py [--seconds 600] [--seed N]

Every answered write is verified, and any error, loss or hang ends it with exit status 1. At the end it reports what it
has done.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from errno import ENOENT, ESTALE
from pathlib import Path

from harness import MOUNT_COMMAND, mounts, opened, wait_until
from load import Load
from stores import swap

__all__ = ["main", "soak"]

SMALLEST, LARGEST = 192, 512  # MiB that the budget is set to; the load needs 12 MiB a client
CLIENTS = 8
HANG_SECONDS, LONGEST_WAIT = 90.0, 30.0
PAUSE = 0.4
"""Seconds between two events, on average. A daemon takes 0.3 to start."""


class Soak:
    """One mount, and the disturbances of it."""

    def __init__(self, mountpoint: Path, seed: int) -> None:
        self.mountpoint, self.chance, self.events = mountpoint, random.Random(seed), Counter[str]()

    def config(self, name: str) -> int:
        """A number in the mount's `.config`. Waits for a daemon that answers."""
        return int(json.loads((self.mountpoint / ".config").read_text())[name])

    def step(self) -> None:
        """Cause one random disturbance."""
        (event,) = self.chance.choices(
            (self.kill, self.kill_twice, self.kill_keeper, self.restart, self.write_back, self.resize),
            (50, 10, 10, 10, 10, 10),
        )
        event()
        self.events[event.__name__] += 1

    def kill(self) -> None:
        os.kill(self.config("daemon_pid"), signal.SIGKILL)

    def kill_twice(self) -> None:
        """Kill the daemon, and the next one while it starts."""
        keeper, daemon = self.config("keeper_pid"), self.config("daemon_pid")
        os.kill(daemon, signal.SIGKILL)

        def next_one() -> set[int]:
            text = Path(f"/proc/{keeper}/task/{keeper}/children").read_text()
            return {int(word) for word in text.split()} - {daemon}

        wait_until(next_one, "the next daemon")
        time.sleep(self.chance.uniform(0, 0.3))
        os.kill(next_one().pop(), signal.SIGKILL)

    def kill_keeper(self) -> None:
        keeper = self.config("keeper_pid")
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: self.config("keeper_pid") != keeper, "another keeper")

    def restart(self) -> None:
        daemon = self.config("daemon_pid")
        os.kill(self.config("keeper_pid"), signal.SIGUSR1)
        wait_until(lambda: self.config("daemon_pid") != daemon, "another daemon")

    def write_back(self) -> None:
        """Write back all backups that are not being removed."""
        for backup in os.listdir(self.mountpoint):
            try:
                with opened(self.mountpoint / backup / ".image") as fd:
                    os.fsync(fd)
            except OSError as error:
                if error.errno not in (ENOENT, ESTALE):  # it was removed meanwhile
                    raise

    def resize(self) -> None:
        size = f"{self.chance.randint(SMALLEST, LARGEST)}m"
        os.setxattr(self.mountpoint, "user.ttmfs.size", size.encode())


@contextlib.contextmanager
def _mounted(mountpoint: Path, log: Path) -> Iterator[None]:
    """A mount in the foreground, with its log. Its first process may be killed."""
    options = f"size={SMALLEST}m"
    with log.open("wb") as file:
        first = subprocess.Popen([*MOUNT_COMMAND, "-f", "-o", options, mountpoint], stderr=file)
    try:
        wait_until(lambda: b"serving /" in log.read_bytes(), "the mount")
        yield
    finally:
        serving = _running("mount.py", mountpoint) + _running("keeper.py", mountpoint)
        subprocess.run(["umount", "-l", mountpoint], check=True)
        wait_until(lambda: not any(_lives(pid) for pid in serving), "daemon and keeper to end")
        first.wait(10)
        assert str(mountpoint) not in mounts()


def _running(program: str, mountpoint: Path) -> list[int]:
    """The processes that run a program for a mount."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_text().split("\0")
            if str(mountpoint) in words and any(word.endswith(program) for word in words):
                found.append(int(process.name))
    return found


def _lives(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # whoever runs this may be the parent of orphans
    with contextlib.suppress(OSError):
        return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    return False


@contextlib.contextmanager
def _watched(mountpoint: Path, run: Soak) -> Iterator[None]:
    """End keeper and daemon if nothing makes progress: waiting processes, this one too, then fail and report it."""
    ended = threading.Event()

    def watch() -> None:
        before = -1
        while not ended.wait(HANG_SECONDS):
            if run.events.total() == before:
                for program in "keeper.py", "mount.py":  # one alone would replace the other
                    for pid in _running(program, mountpoint):
                        os.kill(pid, signal.SIGKILL)
                return
            before = run.events.total()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def soak(directory: Path, seconds: float, seed: int) -> str:
    """Run for a time. Returns what was done. Raises AssertionError for any failure."""
    mountpoint, log = directory / "mnt", directory / "log"
    mountpoint.mkdir()
    with swap(directory, 1 << 30), _mounted(mountpoint, log):
        run = Soak(mountpoint, seed)
        with _watched(mountpoint, run), Load(mountpoint, clients=CLIENTS, seed=seed) as load:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                run.step()
                load.check()
                time.sleep(run.chance.expovariate(1 / PAUSE))
        stats = (mountpoint / ".stats").read_text()
        restarts = next(line.split()[1] for line in stats.splitlines() if line.startswith("ttmfs_restarts_total"))
    said = log.read_text()
    assert "Traceback" not in said, said
    assert "gave up" not in said, said
    assert load.result.slowest < LONGEST_WAIT, f"a client waited {load.result.slowest:.0f} s"
    done = load.result
    kills = run.events["kill"] + 2 * run.events["kill_twice"]
    return (
        f"{seconds:.0f} s, seed {seed}: {kills} kills of the daemon, {run.events['kill_keeper']} of the keeper, "
        f"{run.events['restart']} restarts on purpose survived ({restarts} daemons took over); "
        f"{sum(done.steps.values())} steps by {CLIENTS} clients, {done.listings} listings, {done.races} races, "
        f"{run.events['write_back']} times all written back, {run.events['resize']} budgets; "
        f"0 errors, 0 lost of {done.pages} pages read again, longest wait {done.slowest:.2f} s"
    )


def main(run: Callable[[Path, float, int], str], description: str | None) -> int:
    """Run a soak as a program. The exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="how long (600)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="what it draws from (the time)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ttmfs-soak-") as directory:
        try:
            print(run(Path(directory), arguments.seconds, arguments.seed))
        except (AssertionError, OSError) as error:
            log = Path(directory, "log")
            tail = log.read_text()[-10_000:] if log.exists() else ""
            print(f"seed {arguments.seed}: {error}\n{tail}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(soak, __doc__))
