"""Pages that the kernel has swapped out, on a swap of the test's own."""

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harness import meminfo, opened, run, wait_until

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 4096
MADV_PAGEOUT = 21
ZRAM = Path("/sys/block/zram0")


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """256 MiB of swap: zram if the kernel has it, else a file."""
    if ZRAM.is_dir():
        (ZRAM / "disksize").write_text("256M")
        device = "/dev/zram0"
    else:
        device = str(tmp_path / "swap")
        run(f"dd if=/dev/zero of={device} bs=1M count=256 && chmod 600 {device}")
    run(f"mkswap {device} && swapon {device}")
    yield
    run(f"swapoff {device}")
    if ZRAM.is_dir():
        (ZRAM / "reset").write_text("1")


def attribute(path: Path, name: str) -> int:
    return int(os.getxattr(path, f"user.ttmfs.{name}"))


def push_out(backup: Path) -> None:
    """Make the kernel swap a backup's pages out, through a mapping of .shmem."""
    with opened(backup / ".shmem") as fd, mmap.mmap(fd, PAGES * PAGE) as memory:
        # Into the page tables of this mapping, without which nothing is paged out.
        assert len(memory[::PAGE]) == PAGES
        memory.madvise(MADV_PAGEOUT)


@pytest.fixture
def content(backup: Path) -> bytes:
    """What was stored in `backup` and swapped out again, at least half of it."""
    data = np.random.default_rng(1).bytes(PAGES * PAGE)
    subprocess.run(["dd", f"of={backup}/.image", "bs=1M", "conv=notrunc", "status=none"], input=data, check=True)
    push_out(backup)
    assert attribute(backup, "swapped") > PAGES // 2
    return data


@pytest.mark.usefixtures("swap", "content")
def test_residency_tells_the_truth(backup: Path) -> None:
    swapped = attribute(backup, "swapped")
    assert attribute(backup, "resident") + swapped == attribute(backup, "pages") == PAGES
    assert swapped * PAGE <= meminfo("SwapTotal") - meminfo("SwapFree")
    assert attribute(backup, "swapped") == swapped, "asking has brought nothing back"


@pytest.mark.usefixtures("swap")
def test_c8_swapped_out_pages_are_listed_and_come_back_bit_for_bit(backup: Path, content: bytes) -> None:
    assert len(os.listdir(backup)) == PAGES
    assert (backup / "7").read_bytes() == content[6 * PAGE : 7 * PAGE]
    with opened(backup / ".image") as fd:
        assert b"".join(os.pread(fd, 1 << 20, offset) for offset in range(0, len(content), 1 << 20)) == content
    assert attribute(backup, "swapped") == 0


@pytest.mark.parametrize("way", ["rm a/*", "truncate -s 0 a/.image", f"setfattr -n user.ttmfs.drop -v 1-{PAGES} a"])
@pytest.mark.usefixtures("swap", "content")
def test_c12_dropping_gives_swap_back_too(backup: Path, way: str) -> None:
    full = meminfo("SwapFree")
    held = attribute(backup, "swapped") * PAGE
    run(way, cwd=backup.parent)
    assert attribute(backup, "pages") == 0
    wait_until(lambda: meminfo("SwapFree") >= full + held * 9 // 10, "the swap to be given back")
    backup.rmdir()


def test_c15_bytes_avail_follows_the_swap(backup: Path, request: pytest.FixtureRequest) -> None:
    before = attribute(backup.parent, "bytes_avail")
    assert before == meminfo("SwapFree")
    (backup / "1").write_bytes(b"backing up works at 0 too")
    request.getfixturevalue("swap")
    assert attribute(backup.parent, "bytes_avail") == meminfo("SwapFree") > before
