"""SIGKILL to the daemon at random instants under mixed load (C22): nothing is lost, no call fails or hangs.

Each client of the load knows the content and the answer to each call (tests/load.py). A kill comes some time after the
previous daemon has answered, or before that.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Mount, daemons, wait_until
from load import Load

SEED = int(os.environ.get("KILLS_SEED", time.time_ns() % 10**6))
"""Another in each run. It is printed when a test fails."""

OPTIONS = "size=256m"


READ_AND_WRITE_SHMEM = """
import os, random, sys
path, random = sys.argv[1], random.Random(7)
fd = os.open(path, os.O_RDWR)
page, done = bytearray(4096), 0
print("open", flush=True)
os.set_blocking(0, False)
while True:
    number = random.randrange(200)
    data = done.to_bytes(8, "little") * 512
    assert os.pwrite(fd, data, number * 4096) == 4096
    assert os.pread(fd, 4096, number * 4096) == data
    again = os.open(path, os.O_RDWR) if done % 50 == 0 else -1
    if again >= 0:
        assert os.pread(again, 4096, number * 4096) == data
        os.close(again)
    done += 1
    try:
        if not os.read(0, 1):
            break
    except BlockingIOError:
        pass
print(done, flush=True)
"""


class Killer:
    """Kills the daemons of a mount, each once."""

    def __init__(self, mount: Mount) -> None:
        self.kills = 0
        self._keeper, self._killed = mount.process.pid, set[int]()

    def kill(self) -> None:
        """Kill the next daemon, as soon as there is one."""
        wait_until(lambda: daemons(self._keeper) - self._killed, "another daemon")
        (pid,) = daemons(self._keeper) - self._killed
        os.kill(pid, signal.SIGKILL)
        self._killed.add(pid)
        self.kills += 1


@contextlib.contextmanager
def under_load(mountpoint: Path, options: str, seed: int) -> Iterator[tuple[Load, Killer]]:
    """A mount under a load of eight clients, and the killer of its daemons."""
    print(f"KILLS_SEED={SEED}")
    with Mount(mountpoint, f"{options},standby=on") as mount:
        mount.expect_restarts()
        try:
            with Load(mountpoint, seed=seed) as load:
                load.wait_for_steps(100)
                yield load, Killer(mount)
                load.wait_for_steps(100)
        finally:
            print("\n".join(mount.log))
        print(load.result)
        assert load.result.races, "no race was run"


@pytest.mark.parametrize("part", range(2))
def test_c22_no_client_notices_a_kill(mountpoint: Path, part: int) -> None:
    """Each part has 50 kills. A third of them come before the daemon answers."""
    chance = random.Random(SEED + part)
    with under_load(mountpoint, OPTIONS, SEED + part) as (load, killer):
        while killer.kills < 50:
            if chance.random() < 0.35:
                time.sleep(chance.uniform(0, 0.3))
            else:
                load.wait_for_steps(chance.choice((1, 1, 10, 100)))
                time.sleep(chance.choice((0, chance.uniform(0, 0.01), chance.uniform(0, 0.15))))
            killer.kill()
            load.check()


def test_c22_kills_in_bursts_do_not_count_as_failed_starts(mountpoint: Path) -> None:
    """The keeper does not count them: the bursts are longer than the failed starts that it accepts."""
    chance = random.Random(SEED)
    with under_load(mountpoint, OPTIONS, SEED) as (load, killer):
        for _ in range(2):
            load.wait_for_steps(100)
            for _ in range(20):
                killer.kill()
                time.sleep(chance.uniform(0, 0.25))
            load.check()


def test_c22_a_program_that_uses_shmem_does_not_notice_a_hundred_kills(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=16m,standby=on") as mount:
        mount.expect_restarts()
        (mountpoint / "a").mkdir()
        command = [sys.executable, "-I", "-c", READ_AND_WRITE_SHMEM, str(mountpoint / "a/.shmem")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdout
            assert program.stdout.readline() == "open\n"
            killer = Killer(mount)
            for turn in range(100):
                assert (mountpoint / "a").is_dir()
                time.sleep(random.random() / 50)
                killer.kill()
                if turn % 10 == 9:
                    mount.watch_anew()
            said, _ = program.communicate("", timeout=30)
        assert program.returncode == 0
        assert int(said) > 50
