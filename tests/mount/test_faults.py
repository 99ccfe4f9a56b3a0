"""The faults that the kernel injects into its own backups (``backup_fault_inject``), here caused for real.

Half the pages of a range are backed up and the rest reported as not. A restore is interrupted part way and repeated.
Memory runs out after the first page of a range. The store fails with EIO for one page.
"""

import os
from errno import EIO
from pathlib import Path

import numpy as np
import pytest
import trio

import ttmfs
from harness import Mount, opened, raises_errno, run
from stores import filesystem, mounted

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 16


def content(pages: int, seed: int) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    return np.random.default_rng(seed).integers(0, 256, (pages, PAGE), np.uint8)


@pytest.mark.parametrize("room", [PAGES // 2, 1], ids=["half", "the first page"])
def test_c3_a_short_write_stores_and_reports_only_the_pages_that_found_room(mountpoint: Path, room: int) -> None:
    with Mount(mountpoint, f"size={room * PAGE},backup_size=1m"):
        a = mountpoint / "a"
        a.mkdir()
        pages = content(PAGES, 1)
        with opened(a / ".image") as image:
            assert os.pwrite(image, pages.tobytes(), 3 * PAGE) == room * PAGE
            assert os.listdir(a) == [str(handle) for handle in range(4, 4 + room)]
            assert os.pread(image, room * PAGE, 3 * PAGE) == pages[:room].tobytes()
            os.truncate(a / ".image", 0)
            assert os.pwrite(image, pages[room:].tobytes()[: room * PAGE], 0) == room * PAGE, "the room is there again"


@pytest.mark.parametrize("room", [PAGES // 2, 1], ids=["half", "the first page"])
def test_c3_only_pages_that_found_room_get_handles(room: int) -> None:
    async def main() -> None:
        async with ttmfs.open_pool(size=room * PAGE, backup_size=1 << 20) as pool:
            backup = await pool.create("a")
            pages = content(PAGES, 2)
            handles = await backup.backup_pages(pages, 3)
            assert handles.tolist() == list(range(4, 4 + room))
            copy = np.empty((room, PAGE), np.uint8)
            await backup.copy_pages(copy, handles)
            assert (copy == pages[:room]).all()
            with pytest.raises(ttmfs.PageAbsent):
                await backup.copy_page(copy[0], 4 + room)

    trio.run(main)


def test_c9_a_restore_continues_after_an_interruption(tmp_path: Path) -> None:
    """The pages are on a disk and not in memory, so each waits. The interruption comes as soon as the first is read."""

    async def main(directory: Path) -> None:
        async with ttmfs.open_pool(store=str(directory), backup_size=1 << 20) as pool:
            backup = await pool.create("a")
            pages = content(PAGES, 3)
            await backup.backup_pages(pages, 0, writeback=True)
            handles = np.arange(PAGES, 0, -1, dtype=np.uint64)  # one by one: none follows the one before
            copy = np.zeros((PAGES, PAGE), np.uint8)

            async def interrupt() -> None:
                while not copy[0].any():
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(interrupt)
                with trio.CancelScope() as scope:
                    await backup.copy_pages(copy, handles, intr=True)
            assert scope.cancelled_caught
            done = [bool(row.any()) for row in copy]
            assert 0 < sum(done) < PAGES
            assert (copy[done] == pages[::-1][done]).all()
            assert backup.pages == PAGES, "restoring drops nothing"
            await backup.copy_pages(copy, handles, intr=True)
            assert (copy == pages[::-1]).all()

    with filesystem(tmp_path / "disk", "ext4") as below:
        trio.run(main, below)


def test_c6_a_disk_error_at_one_page_affects_only_that_page(tmp_path: Path, mountpoint: Path) -> None:
    """One block of a btrfs has a wrong checksum."""
    image, below, pages = tmp_path / "image", tmp_path / "disk", content(PAGES, 4)
    with image.open("xb") as file:
        file.truncate(320 << 20)
    run(f"mkfs.btrfs -q {image}")
    with mounted(below, "btrfs", "loop,max_inline=0", str(image)), Mount(mountpoint, f"store={below},backup_size=1m"):
        (mountpoint / "a").mkdir()
        with opened(mountpoint / "a/.image") as fd:
            os.pwrite(fd, pages.tobytes(), 0)
            os.fsync(fd)
    found = image.read_bytes().find(pages[5].tobytes())
    with image.open("r+b") as file:
        file.seek(found)
        file.write(bytes(100))
    store = f"store={below},backup_size=1m"
    with mounted(below, "btrfs", "loop", str(image)), Mount(mountpoint, store) as mount:
        mount.expect_log("Input/output error.*logged once")
        for handle in range(1, PAGES + 1):
            if handle == 6:
                with raises_errno(EIO):
                    (mountpoint / "a/6").read_bytes()
            else:
                assert (mountpoint / f"a/{handle}").read_bytes() == pages[handle - 1].tobytes()
        with opened(mountpoint / "a/.image") as fd, raises_errno(EIO):
            os.pread(fd, 2 * PAGE, 5 * PAGE)
        os.unlink(mountpoint / "a/6")
        (mountpoint / "a/6").write_bytes(pages[0].tobytes())
        assert (mountpoint / "a/6").read_bytes() == pages[0].tobytes()
