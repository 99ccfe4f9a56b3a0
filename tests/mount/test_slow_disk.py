"""store=DIR on a disk that writes slowly: only requests that need the disk wait for it.

Alice's operation waits for the disk. Its time is the measure: requests that do not need the disk must be served in a
fraction of it. So nothing here depends on the speed of a machine.
"""

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from errno import EACCES, ENOMEM
from pathlib import Path
from typing import NamedTuple

import pytest

from harness import Mount, attribute, opened, raises_errno, run
from stores import BOB, ControlGroup, Place, acting_as, filesystem, slow_writes

pytestmark = pytest.mark.serial

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
KINDS = ("ext4", "xfs", "btrfs")

FRACTION = 4
"""Others are served in less than this part of what the slow operation takes."""

SLOW = 0.4
"""Seconds that the slow operation takes at least, by the limit on the disk: else nothing was tried."""


class Slow(NamedTuple):
    """A mount with backups a and b, whose disk is slow."""

    path: Path
    mount: Mount


@pytest.fixture(params=KINDS)
def slow(request: pytest.FixtureRequest, mountpoint: Path, tmp_path: Path) -> Iterator[Slow]:
    with filesystem(tmp_path / "below", request.param) as below:
        (below / "store").mkdir()
        with Mount(mountpoint, f"store={below}/store,backup_size=64m") as mount:
            for name in "a", "b":
                (mountpoint / name).mkdir()
                for handle in range(1, 9):
                    (mountpoint / name / str(handle)).write_bytes(bytes([handle]) * PAGE)
            os.sync()
            with slow_writes(mount.pid, below):
                yield Slow(mountpoint, mount)


def fill(path: Path, mib: int, longest: list[float] | None = None) -> None:
    """Write to an image by 1 MiB. Appends the time of each write."""
    data = mmap.mmap(-1, MIB)
    data[:] = os.urandom(MIB)
    with opened(path) as fd:
        for n in range(mib):
            start = time.monotonic()
            os.pwrite(fd, data, n * MIB)
            if longest is not None:
                longest.append(time.monotonic() - start)


def during(slowly: Callable[[], None], others: Callable[[], object]) -> tuple[float, list[float]]:
    """The time of an operation, and of each other operation that was carried out meanwhile, in seconds."""
    took: list[float] = []

    def run() -> None:
        start = time.monotonic()
        slowly()
        took.append(time.monotonic() - start)

    thread = threading.Thread(target=run)
    thread.start()
    times = []
    while thread.is_alive():
        start = time.monotonic()
        others()
        times.append(time.monotonic() - start)
        time.sleep(0.002)
    thread.join()
    return took[0], times


def bob(slow: Slow) -> None:
    """Operations that do not need the disk."""
    assert (slow.path / "b/3").read_bytes() == bytes([3]) * PAGE
    assert len(os.listdir(slow.path / "b")) == 8
    assert attribute(slow.path / "b", "pages") == "8"
    os.statvfs(slow.path)
    os.scandir(slow.path).close()


def test_a_throttled_write_delays_no_other_user(slow: Slow) -> None:
    longest: list[float] = []
    _, times = during(lambda: fill(slow.path / "a/.image", 16, longest), lambda: bob(slow))
    assert max(longest) > SLOW, "the disk was not slow"
    assert max(times) < max(longest) / FRACTION


# --- what waits for the disk takes the daemon's memory ---

WRITERS = """
import errno, mmap, os, sys, threading
path, count = sys.argv[1], int(sys.argv[2])
data = mmap.mmap(-1, 1 << 20)
data[:] = b"x" * len(data)
answers = []
def write(n):
    fd = os.open(f"{path}/{n}/.image", os.O_WRONLY | os.O_SYNC)
    try:
        answers.append(os.pwrite(fd, data, 0))
    except OSError as error:
        answers.append(-error.errno)
    os.close(fd)
threads = [threading.Thread(target=write, args=(n,)) for n in range(count)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*(f"{number}:{answers.count(number)}" for number in sorted(set(answers))))
"""


def test_many_synchronous_writes_fit_into_the_memory_of_the_control_group(mountpoint: Path, tmp_path: Path) -> None:
    """Writes that would exceed it are refused with ENOMEM. All others are stored."""
    count = 240
    with filesystem(tmp_path / "below", "ext4", 1 << 30) as below, ControlGroup(200 << 20) as group:
        (below / "store").mkdir()
        with Mount(mountpoint, f"store={below}/store,backup_size=2m", preexec_fn=group.join) as mount:
            for n in range(count):
                (mountpoint / str(n)).mkdir()
            os.sync()
            with slow_writes(mount.pid, below, 8 << 20):
                said = run(f"{sys.executable} -c '{WRITERS}' {mountpoint} {count}")
            assert group.oom_kills() == 0
            answers = {int(number): int(times) for number, times in (row.split(":") for row in said.split())}
            assert set(answers) <= {MIB, -ENOMEM}
            assert sum(answers.values()) == count
            assert answers[MIB] > 0
            stored = [n for n in range(count) if (mountpoint / str(n) / ".image").read_bytes()[:MIB] == b"x" * MIB]
            assert len(stored) == answers[MIB]


# --- syncing ---


@pytest.mark.parametrize("name", ["a/.image", "a/1", "a", "."])
def test_a_user_who_can_only_read_cannot_lock_a_file_by_fsync(place: Place, tmp_path: Path, name: str) -> None:
    """The user is refused at once, while the owner's fsync takes its time."""
    with filesystem(tmp_path / "below", "ext4") as below, place.directory("mount") as mountpoint:
        (below / "store").mkdir()
        with Mount(mountpoint, f"store={below}/store,backup_size=64m,allow_other") as mount:
            (mountpoint / "a").mkdir(mode=0o755)
            (mountpoint / "a/1").write_bytes(b"x" * PAGE)
            (mountpoint / "a/1024").write_bytes(b"x" * PAGE)
            os.sync()
            with slow_writes(mount.pid, below):
                fill(mountpoint / "a/.image", 3)

                def owner() -> None:
                    with opened(mountpoint / "a/1024", os.O_RDONLY) as fd:  # as sync(1) opens it
                        os.fsync(fd)

                def reader() -> None:
                    with acting_as(BOB), opened(mountpoint / name, os.O_RDONLY) as fd, raises_errno(EACCES):
                        os.fsync(fd)

                took, times = during(owner, reader)
                assert took > SLOW, "the disk was not slow"
                assert max(times) < took / FRACTION
            run(f"sync {mountpoint}/{name}")


def test_creating_a_thousand_backups_does_not_wait_for_the_disk(slow: Slow) -> None:
    """Their ids must be on the disk before the backups are."""
    fill(slow.path / "a/.image", 3)
    times = []
    for n in range(1100):
        if n == 700:  # the disk has answered since more ids were asked for
            with opened(slow.path / "a/.image") as fd:
                os.fsync(fd)
            fill(slow.path / "a/.image", 3)
        start = time.monotonic()
        (slow.path / f"n{n}").mkdir()
        times.append(time.monotonic() - start)
    start = time.monotonic()
    with opened(slow.path / "a/.image") as fd:
        fill(slow.path / "a/.image", 3)
        os.fsync(fd)
    assert max(times) < (time.monotonic() - start) / FRACTION
