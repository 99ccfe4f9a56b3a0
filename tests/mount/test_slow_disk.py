"""store=DIR on a disk that writes slowly: whoever waits for it waits alone.

Alice's operation waits for the disk. What it takes is the measure: whoever does not ask for the disk must be served in
a fraction of that. So nothing here depends on how fast a machine is.
"""

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from harness import Mount, attribute, opened
from stores import filesystem, slow_writes

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
    """Write to an image by 1 MiB. Appends what each write took, in seconds."""
    data = mmap.mmap(-1, MIB)
    data[:] = os.urandom(MIB)
    with opened(path) as fd:
        for n in range(mib):
            start = time.monotonic()
            os.pwrite(fd, data, n * MIB)
            if longest is not None:
                longest.append(time.monotonic() - start)


def during(slowly: Callable[[], None], others: Callable[[], object]) -> tuple[float, list[float]]:
    """What an operation takes, and how long each of the others took that were carried out meanwhile. In seconds."""
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
    """What does not ask for the disk."""
    assert (slow.path / "b/3").read_bytes() == bytes([3]) * PAGE
    assert len(os.listdir(slow.path / "b")) == 8
    assert attribute(slow.path / "b", "pages") == "8"
    os.statvfs(slow.path)
    os.scandir(slow.path).close()


def test_a_write_that_the_kernel_throttles_holds_up_no_one(slow: Slow) -> None:
    longest: list[float] = []
    _, times = during(lambda: fill(slow.path / "a/.image", 16, longest), lambda: bob(slow))
    assert max(longest) > SLOW, "the disk was not slow"
    assert max(times) < max(longest) / FRACTION
