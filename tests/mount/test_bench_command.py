"""``ttmfs bench``: figures of a mount beside a tmpfs, in a backup of its own that never stays."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness import Mount, names, run, wait_until
from stores import ALICE, Place, as_user

BENCH = [sys.executable, "-m", "ttmfs", "bench"]


def test_bench_compares_a_mount_with_a_tmpfs(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=64m"):
        (mountpoint / "mine").mkdir()
        (mountpoint / "mine/1").write_bytes(b"a")
        text = run(f"{' '.join(BENCH)} --seconds 0.1 {mountpoint}")
        assert text.startswith("OPERATION")
        for name in "pread", "create+write+close", "1 MiB write", ".shmem 1 MiB read":
            assert re.search(rf"^{re.escape(name)} +[\d.]+us +[\d.]+us +[\d.]+$", text, re.MULTILINE), name
        assert "Waking a process" in text or os.cpu_count() == 1
        assert names(mountpoint) == ["mine"]
        assert names(mountpoint / "mine") == ["1"]
        found = json.loads(run(f"{' '.join(BENCH)} --seconds 0.1 --json {mountpoint}"))
        assert found["rounds"] >= 3
        assert found["microseconds"]["mount"].keys() == found["microseconds"]["tmpfs"].keys() == found["ratios"].keys()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_leaves_no_backup(mountpoint: Path, number: signal.Signals) -> None:
    with Mount(mountpoint, "size=64m"):
        with subprocess.Popen([*BENCH, "--seconds", "60", str(mountpoint)], stderr=subprocess.PIPE) as bench:
            wait_until(lambda: names(mountpoint), "its backup", 20)
            bench.send_signal(number)
            bench.communicate(timeout=20)
            assert bench.returncode == (130 if number == signal.SIGINT else -number)
        wait_until(lambda: not names(mountpoint), "its backup to be removed", 20)


def test_bench_refuses_a_mount_without_room_and_a_backup(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=8m"):
        assert re.search(
            r"has 8M free, and this needs 1\dM.*drop pages", run(f"{' '.join(BENCH)} {mountpoint}", code=2)
        )
        (mountpoint / "a").mkdir()
        assert "is not a mount point of ttmfs" in run(f"{' '.join(BENCH)} {mountpoint}/a", code=2)
        assert names(mountpoint) == ["a"]
        assert "give seconds" in run(f"{' '.join(BENCH)} --seconds 0 {mountpoint}", code=2)


def test_an_ordinary_user_measures_too(place: Place) -> None:
    with place.directory("bench") as path, Mount(path, "size=64m,mode=1777,allow_other", cwd=place.path):
        done = subprocess.run(
            [*BENCH, "--seconds", "0.1", path],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **as_user(ALICE),
        )
        assert done.returncode == 0, done.stderr
        assert "pread" in done.stdout
        assert names(path) == []
