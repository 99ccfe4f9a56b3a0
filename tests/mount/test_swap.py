"""Pages between memory and swap, on a swap of the test's own: writeback, swap-ins, residency, dropping."""

import contextlib
import mmap
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from errno import ENOENT, ESTALE
from pathlib import Path

import numpy as np
import pytest
import trio

import stores
import ttmfs
from harness import Mount, count, meminfo, opened, run, wait_until

pytestmark = pytest.mark.serial

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 4096
MADV_PAGEOUT = 21
MIB = 1 << 20


def push_out(backup: Path) -> None:
    """Make the kernel swap a backup's pages out, through a mapping of .shmem."""
    with opened(backup / ".shmem") as fd, mmap.mmap(fd, PAGES * PAGE) as memory:
        # Into the page tables of this mapping, without which nothing is paged out.
        assert len(memory[::PAGE]) == PAGES
        memory.madvise(MADV_PAGEOUT)


@pytest.fixture
def content(backup: Path) -> bytes:
    """The content of `backup`. The kernel has swapped out at least half of it."""
    data = np.random.default_rng(1).bytes(PAGES * PAGE)
    subprocess.run(["dd", f"of={backup}/.image", "bs=1M", "conv=notrunc", "status=none"], input=data, check=True)
    push_out(backup)
    assert count(backup, "swapped") > PAGES // 2
    return data


@pytest.mark.usefixtures("swap", "content")
def test_resident_and_swapped_pages_add_up_to_all_pages(backup: Path) -> None:
    swapped = count(backup, "swapped")
    assert count(backup, "resident") + swapped == count(backup, "pages") == PAGES
    assert swapped * PAGE <= meminfo("SwapTotal") - meminfo("SwapFree")
    assert count(backup, "swapped") == swapped, "asking has brought nothing back"


@pytest.mark.usefixtures("swap")
def test_c8_swapped_out_pages_are_listed_and_come_back_bit_for_bit(backup: Path, content: bytes) -> None:
    assert len(os.listdir(backup)) == PAGES
    assert (backup / "7").read_bytes() == content[6 * PAGE : 7 * PAGE]
    with opened(backup / ".image") as fd:
        assert b"".join(os.pread(fd, 1 << 20, offset) for offset in range(0, len(content), 1 << 20)) == content
    assert count(backup, "swapped") == 0


@pytest.mark.parametrize("way", ["rm a/*", "truncate -s 0 a/.image", f"setfattr -n user.ttmfs.drop -v 1-{PAGES} a"])
@pytest.mark.usefixtures("swap", "content")
def test_c12_drop_frees_swap(backup: Path, way: str) -> None:
    full = meminfo("SwapFree")
    held = count(backup, "swapped") * PAGE
    run(way, cwd=backup.parent)
    assert count(backup, "pages") == 0
    wait_until(lambda: meminfo("SwapFree") >= full + held * 9 // 10, "the swap to be given back")
    backup.rmdir()


def test_c15_bytes_avail_follows_the_free_swap(backup: Path, request: pytest.FixtureRequest) -> None:
    before = count(backup.parent, "bytes_avail")
    assert before == meminfo("SwapFree")
    (backup / "1").write_bytes(b"backing up works at 0 too")
    request.getfixturevalue("swap")
    assert count(backup.parent, "bytes_avail") == meminfo("SwapFree") > before


@pytest.mark.usefixtures("swap")
def test_partly_stored_pages_are_swapped_out_as_pages(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=64m,backup_size=1m,page_size=64k"):
        backup = mountpoint / "a"
        backup.mkdir()
        with opened(backup / ".shmem") as fd:
            for idx in (1, 4):
                os.pwrite(fd, b"x" * PAGE, idx << 16)
        assert (count(backup, "pages"), count(backup, "swapped")) == (2, 0)

        def is_out() -> bool:
            with opened(backup / ".image") as fd:
                os.fsync(fd)
            return count(backup, "swapped") == 2

        wait_until(is_out, "both pages to be swapped out")
        assert (count(backup, "pages"), count(backup, "resident")) == (2, 0)


def swap_used() -> int:
    return meminfo("SwapTotal") - meminfo("SwapFree")


def fill(backup: Path, pages: int, seed: int = 1) -> bytes:
    """Store random pages from index 0 on through .image. Returns what was stored."""
    data = np.random.default_rng(seed).bytes(pages * PAGE)
    with opened(backup / ".image") as fd:
        for offset in range(0, len(data), MIB):
            assert os.pwrite(fd, data[offset : offset + MIB], offset) == len(data[offset : offset + MIB])
    return data


# --- writeback ---


def fsync_page(backup: Path, handle: int, data: bytes) -> None:
    with opened(backup / str(handle), os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, data, 0)
        os.fsync(fd)


def fdatasync_page(backup: Path, handle: int, data: bytes) -> None:
    with opened(backup / str(handle), os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, data, 0)
        os.fdatasync(fd)


def rwf_dsync_page(backup: Path, handle: int, data: bytes) -> None:
    with opened(backup / str(handle), os.O_RDWR | os.O_CREAT) as fd:
        os.pwritev(fd, [data], 0, os.RWF_DSYNC)


def dd(flags: str) -> Callable[[Path, int, bytes], None]:
    def store(backup: Path, handle: int, data: bytes) -> None:
        command = ["dd", f"of={backup / str(handle)}", f"bs={PAGE}", "status=none", *flags.split()]
        subprocess.run(command, input=data, check=True)

    return store


def dd_image(backup: Path, handle: int, data: bytes) -> None:
    command = ["dd", f"of={backup}/.image", f"bs={PAGE}", f"seek={handle - 1}", "conv=notrunc", "oflag=sync"]
    subprocess.run(command, input=data, check=True, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "store",
    [fsync_page, fdatasync_page, rwf_dsync_page, dd("oflag=sync"), dd("oflag=dsync"), dd("conv=fsync"), dd_image],
    ids=["fsync", "fdatasync", "RWF_DSYNC", "oflag=sync", "oflag=dsync", "conv=fsync", "image oflag=sync"],
)
@pytest.mark.usefixtures("swap")
def test_c5_writeback_pushes_a_page_to_swap_at_once(backup: Path, store: Callable[[Path, int, bytes], None]) -> None:
    others = fill(backup, 20)
    data, before = np.random.default_rng(7).bytes(PAGE), swap_used()
    store(backup, 9, data)
    assert swap_used() >= before + PAGE
    assert (count(backup, "resident"), count(backup, "swapped")) == (19, 1), "it is evicted, and no other"
    assert (backup / "9").read_bytes() == data
    assert count(backup, "swapped") == 0, "it was this one"
    assert (backup / "8").read_bytes() == others[7 * PAGE : 8 * PAGE]


@pytest.mark.usefixtures("swap")
def test_c5_a_synchronous_write_can_begin_and_end_anywhere(backup: Path) -> None:
    """Beside a page in memory, such a write once searched for the end of its range forever."""
    data = bytearray(fill(backup, 3))
    with opened(backup / ".image", os.O_RDWR | os.O_SYNC) as fd:
        for offset, length in (1234, 700), (PAGE - 100, 200), (PAGE + 1, 2 * PAGE - 2):
            piece = bytes([offset % 251]) * length
            assert os.pwrite(fd, piece, offset) == length
            data[offset : offset + length] = piece
        assert os.pread(fd, len(data), 0) == data


@pytest.mark.usefixtures("swap")
def test_c5_fsync_of_the_image_swaps_out_the_whole_backup(backup: Path) -> None:
    data = fill(backup, PAGES)
    for handle in range(1, 100, 7):
        (backup / str(handle)).unlink()
        data = data[: (handle - 1) * PAGE] + bytes(PAGE) + data[handle * PAGE :]
    pages, used = count(backup, "pages"), swap_used()
    with opened(backup / ".image") as fd:
        os.fsync(fd)
        assert count(backup, "pages") == pages, "it made none"
        assert count(backup, "swapped") >= pages - 2  # one that was just being looked at may stay
        assert swap_used() - used >= pages * PAGE * 9 // 10, "others may bring pages in meanwhile"
        (backup / "2").read_bytes()
        os.fsync(fd)  # of what is partly out already
        assert count(backup, "swapped") >= pages - 2
        assert b"".join(os.pread(fd, MIB, offset) for offset in range(0, len(data), MIB)) == data


@pytest.mark.parametrize("size", ["64k", "2m"])
@pytest.mark.usefixtures("swap")
def test_large_pages_are_swapped_out_whole(mountpoint: Path, size: str) -> None:
    with Mount(mountpoint, f"size=64m,page_size={size}"):
        backup, page_size = mountpoint / "a", os.statvfs(mountpoint).f_bsize
        backup.mkdir()
        data = np.random.default_rng(1).bytes(page_size)
        for handle in 1, 2, 4:
            (backup / str(handle)).write_bytes(data)
        with opened(backup / "2") as fd:
            os.fsync(fd)
        assert (count(backup, "resident"), count(backup, "swapped")) == (2, 1)
        assert (backup / "2").read_bytes() == data
        (backup / "5").touch()  # one of its base pages is data; the others are only allocated
        with opened(backup / ".image") as fd:
            os.pwrite(fd, b"x", 6 * page_size - 10000)
            os.fsync(fd)
        assert (count(backup, "resident"), count(backup, "swapped")) == (0, 5)
        assert os.listdir(backup) == ["1", "2", "4", "5", "6"]
        assert (backup / "4").read_bytes() == data
        assert (backup / "5").read_bytes() == bytes(page_size)


@pytest.mark.usefixtures("swap")
def test_c5_the_api_pushes_pages_to_swap() -> None:
    async def main() -> None:
        async with ttmfs.open_pool(size=64 * MIB) as pool:
            backup = await pool.create("a")
            page = np.random.default_rng(1).integers(0, 256, PAGE, np.uint8)
            assert await backup.backup_page(page, 3, writeback=True) == 4
            assert (backup.resident, backup.swapped) == (0, 1)
            many = np.random.default_rng(2).integers(0, 256, (600, PAGE), np.uint8)
            assert len(await backup.backup_pages(many, 10, writeback=True)) == 600
            assert (backup.pages, backup.resident) == (601, 0)
            got, all_got = np.zeros(PAGE, np.uint8), np.zeros((600, PAGE), np.uint8)
            await backup.copy_page(got, 4, intr=True)
            await backup.copy_pages(all_got, np.arange(11, 611, dtype=np.uint64))
            assert (got == page).all()
            assert (all_got == many).all()
            assert backup.swapped == 0

    trio.run(main)


@pytest.mark.usefixtures("swap")
def test_c5_a_page_written_on_any_cpu_is_pushed_out() -> None:
    """The kernel keeps new pages in per-CPU lists, where paging out on another CPU does not find them."""
    cpus = sorted(os.sched_getaffinity(0))

    async def main() -> None:
        async with ttmfs.open_pool(size=64 * MIB) as pool:
            backup, page = await pool.create("a"), np.full(PAGE, 7, np.uint8)
            for idx in range(50):
                os.sched_setaffinity(0, {cpus[0]})
                await backup.backup_page(page, idx)
                os.sched_setaffinity(0, {cpus[-1]})
                await backup.file.push_out(idx * PAGE, PAGE)
            assert (backup.pages, backup.resident) == (50, 0)

    try:
        trio.run(main)
    finally:
        os.sched_setaffinity(0, cpus)


@pytest.mark.usefixtures("swap")
def test_a_cancelled_writeback_leaves_nothing_behind() -> None:
    """No descriptor (the plugin checks) and no mapping stays, although the thread that should close them never ran."""

    async def main() -> None:
        async with ttmfs.open_pool(size=64 * MIB) as pool:
            backup = await pool.create("a")
            page, got = np.full(PAGE, 7, np.uint8), np.zeros(PAGE, np.uint8)
            with trio.CancelScope() as scope:
                scope.cancel()
                await backup.backup_page(page, 3, writeback=True)
            assert scope.cancelled_caught
            assert (backup.pages, backup.swapped) == (1, 0), "it is stored all the same"
            file = os.stat(pool.files.path("a"))
            with open("/proc/self/maps") as maps:  # noqa: ASYNC230 # it is no disk
                assert f" {file.st_ino} " not in maps.read()
            await backup.backup_page(page, 3, writeback=True)
            assert backup.swapped == 1
            with trio.CancelScope() as scope:
                scope.cancel()
                await backup.copy_page(got, 4, intr=True)
            assert scope.cancelled_caught
            await backup.copy_page(got, 4)
            assert (got == page).all()

    trio.run(main)


def test_c5_without_swap_writeback_does_nothing_and_succeeds(backup: Path) -> None:
    fsync_page(backup, 1, b"x" * PAGE)
    dd("oflag=sync")(backup, 2, b"y" * PAGE)
    with opened(backup / ".image") as fd:
        os.fsync(fd)
    if not meminfo("SwapTotal"):  # a machine's own swap is not ours to switch off
        assert (count(backup, "resident"), count(backup, "swapped")) == (2, 0)
    assert (backup / "1").read_bytes() == b"x" * PAGE


@pytest.mark.usefixtures("swap")
def test_c12_writeback_does_not_bring_dropped_pages_back(backup: Path) -> None:
    """One client pushes pages out as fast as it can while another stores and drops them."""
    stop = threading.Event()

    def push_out() -> None:
        with opened(backup / ".image") as fd:
            while not stop.is_set():
                os.fsync(fd)

    def push_page_out() -> None:
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError), opened(backup / "5") as fd:
                while not stop.is_set():
                    os.fsync(fd)

    clients = [threading.Thread(target=client) for client in (push_out, push_page_out)]
    for client in clients:
        client.start()
    try:
        for _ in range(120):
            fill(backup, 16)
            for handle in range(1, 17):
                os.unlink(backup / str(handle))
                assert not (backup / str(handle)).exists()
            assert count(backup, "pages") == 0
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert (count(backup, "pages"), os.listdir(backup)) == (0, [])


@pytest.mark.usefixtures("swap")
def test_other_clients_are_served_during_writeback_of_a_backup(backup: Path, mnt: Path) -> None:
    """A busy machine may spoil one try. A loop that waits spoils all tries."""
    (mnt / "b").mkdir()
    (mnt / "b/1").write_bytes(b"b" * PAGE)

    def share_of_the_longest_read() -> float:
        fill(backup, 12 * 1024)
        begun, times = time.monotonic(), []
        with opened(backup / ".image") as image, opened(mnt / "b/1") as page:
            pusher = threading.Thread(target=os.fsync, args=(image,))
            pusher.start()
            while pusher.is_alive():
                start = time.monotonic()
                os.pread(page, PAGE, 0)
                times.append(time.monotonic() - start)
            pusher.join()
        took = time.monotonic() - begun
        assert count(backup, "resident") <= 2
        return max(times) / took

    shares: list[float] = []
    while not shares or (min(shares) > 1 / 3 and len(shares) < 6):
        shares.append(share_of_the_longest_read())
    assert min(shares) < 1 / 3, shares


# --- swap-ins ---


@pytest.fixture
def slow(mount: Mount, tmp_path: Path) -> Iterator[stores.SlowSwap]:
    """Swap from which the daemon reads four times a second."""
    with stores.slow_swap(mount.pid, tmp_path) as slow:
        yield slow


def held_up(times: list[float]) -> float:
    """Total seconds of the reads that took so long that they must have waited."""
    return sum(time for time in times if time > 0.05)


WAYS: dict[str, Callable[[Path, int], object]] = {
    "read": lambda backup, handle: (backup / str(handle)).read_bytes(),
    "write": lambda backup, handle: os.close(_written(backup / str(handle))),
    "truncate": lambda backup, handle: os.truncate(backup / str(handle), 7),
    "image": lambda backup, handle: _from_image(backup, handle),
}


def _written(path: Path) -> int:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"z" * PAGE, 0)
    return fd


def _from_image(backup: Path, handle: int) -> bytes:
    with opened(backup / ".image") as fd:
        return os.pread(fd, PAGE, (handle - 1) * PAGE)


@pytest.mark.parametrize("way", WAYS)
def test_a_swap_in_delays_no_other_client(backup: Path, slow: stores.SlowSwap, way: str) -> None:
    """One client waits for a slow swap device. Another's reads of a resident page take as long as without it."""
    content = fill(backup, 256)
    (backup / "300").write_bytes(b"r" * PAGE)
    slow.push_out()
    assert count(backup, "swapped") >= 256
    with opened(backup / "300") as fd:
        os.pread(fd, PAGE, 0)  # resident from here on

        def reads(count: int) -> list[float]:
            times = []
            for _ in range(count):
                start = time.perf_counter()
                assert os.pread(fd, PAGE, 0) == b"r" * PAGE
                times.append(time.perf_counter() - start)
            return times

        alone = reads(300)
        waiting: list[float] = []

        def wait() -> None:
            for handle in 10, 90, 200:  # each far enough from the last that no readahead helped it
                start = time.perf_counter()
                WAYS[way](backup, handle)
                waiting.append(time.perf_counter() - start)

        client = threading.Thread(target=wait)
        client.start()
        beside = []
        while client.is_alive():
            beside += reads(20)
        client.join()
        afterwards = reads(300)
    assert max(waiting) > 0.15, f"no swap-in was slow: {waiting}"
    assert held_up(beside) < sum(waiting) / 3, "no read waited for the other's swap-in"
    assert statistics.median(beside) < max(0.05, 3 * max(map(statistics.median, (alone, afterwards))))
    if way == "read":
        assert (backup / "11").read_bytes() == content[10 * PAGE : 11 * PAGE]


def test_a_partial_write_of_a_swapped_out_large_page_delays_no_other_client(mountpoint: Path, tmp_path: Path) -> None:
    """The whole page must be in memory for it. A thread waits for all of it."""
    with Mount(mountpoint, "size=64m,page_size=256k") as mount, stores.slow_swap(mount.pid, tmp_path, 10) as slow:
        (mountpoint / "a").mkdir()
        data = np.random.default_rng(1).bytes(256 << 10)
        for handle in 1, 2:
            (mountpoint / "a" / str(handle)).write_bytes(data)
        slow.push_out()
        with opened(mountpoint / "a/1") as page:
            writer = threading.Thread(target=os.pwrite, args=(page, b"x", 99999))
            begun = time.monotonic()
            writer.start()
            times = []
            while writer.is_alive():
                start = time.monotonic()
                os.getxattr(mountpoint, "user.ttmfs.size")
                times.append(time.monotonic() - start)
            writer.join()
            took = time.monotonic() - begun
        assert took > 0.5
        assert held_up(times) < took / 3
        assert (mountpoint / "a/1").read_bytes() == data[:99999] + b"x" + data[100000:]


def test_c9_a_signal_ends_a_wait_for_swap(backup: Path, mount: Mount, tmp_path: Path) -> None:
    """Ctrl-C of a program that reads a page from a slow disk."""
    with stores.slow_swap(mount.pid, tmp_path, reads_a_second=1) as slow:
        pages = fill(backup, 64 * 8)
        slow.push_out()
        others = [
            subprocess.Popen(["cat", backup / str(1 + number * 64)], stdout=subprocess.DEVNULL) for number in range(5)
        ]
        time.sleep(0.3)  # the disk has enough to do
        page = backup / str(1 + 64 * 7)
        with subprocess.Popen(["cat", page], stdout=subprocess.DEVNULL) as reader:
            time.sleep(0.5)
            assert reader.poll() is None, "it did not wait"
            began = time.monotonic()
            reader.send_signal(signal.SIGINT)
            assert reader.wait(10) == -signal.SIGINT
            assert time.monotonic() - began < 2, "it waited for the disk"
        assert any(other.poll() is None for other in others), "the disk was through with what came before it"
        assert [other.wait(30) for other in others] == [0] * 5
    assert page.read_bytes() == pages[64 * 7 * PAGE : (64 * 7 + 1) * PAGE]


def test_many_waits_for_swap_delay_no_other_client(backup: Path, mount: Mount, tmp_path: Path) -> None:
    """There are more waits than threads, or tasks that pyfuse3 would start by itself (99)."""
    waiters, apart = 160, 16
    with stores.slow_swap(mount.pid, tmp_path, reads_a_second=40) as slow:
        fill(backup, waiters * apart)
        (backup / "3000").write_bytes(b"r" * PAGE)
        slow.push_out()
        with opened(backup / "3000") as fd:
            os.pread(fd, PAGE, 0)
            clients = [
                threading.Thread(target=(backup / str(1 + number * apart)).read_bytes) for number in range(waiters)
            ]
            for client in clients:
                client.start()
            begun, times = time.monotonic(), []
            while any(client.is_alive() for client in clients):
                start = time.monotonic()
                assert os.pread(fd, PAGE, 0) == b"r" * PAGE
                times.append(time.monotonic() - start)
            took = time.monotonic() - begun
            for client in clients:
                client.join()
    assert took > waiters / 40 / 2
    assert held_up(times) < took / 3


def test_a_signal_ends_the_mount_while_clients_wait_for_swap(mountpoint: Path, tmp_path: Path) -> None:
    """The clients are cut off. The daemon, locked in memory, waits for no page of its own."""
    with Mount(mountpoint, "size=64m") as mount, stores.slow_swap(mount.pid, tmp_path, reads_a_second=5) as slow:
        (mountpoint / "a").mkdir()
        fill(mountpoint / "a", 64 * 60)
        slow.push_out()
        status = Path(f"/proc/{mount.pid}/status").read_text()
        assert "VmSwap:\t       0 kB" in status
        readers = [
            subprocess.Popen(["cat", mountpoint / "a" / str(1 + number * 64)], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
            for number in range(50)
        ]  # fmt: skip
        time.sleep(0.5)
        begun = time.monotonic()
        mount.process.terminate()
        try:
            codes = [reader.wait(60) for reader in readers]
            took = time.monotonic() - begun
        finally:
            for reader in readers:
                reader.kill()
                reader.wait()
        assert took < 8, "they were cut off"
        assert codes.count(1) >= 5, "with an error"
        assert mount.wait() == 0


def test_a_page_dropped_during_its_swap_in_stays_dropped(backup: Path, slow: stores.SlowSwap) -> None:
    """Its reader gets an error, and the page does not come back."""
    apart, readers = 64, 40  # far enough apart that no readahead helps: 10 s of reading
    content = fill(backup, apart * readers)
    slow.push_out()
    answers: dict[int, object] = {}

    def read(handle: int) -> None:
        with opened(backup / str(handle), os.O_RDONLY) as fd:
            opened_all.wait(60)
            try:
                answers[handle] = os.pread(fd, PAGE, 0)
            except OSError as error:
                answers[handle] = error.errno

    handles = range(1, apart * readers, apart)
    opened_all = threading.Barrier(len(handles) + 1)
    clients = [threading.Thread(target=read, args=(handle,)) for handle in handles]
    for client in clients:
        client.start()
    opened_all.wait(60)
    wait_until(lambda: answers, "the first to be read", 60)
    os.setxattr(backup, "user.ttmfs.drop", b"1-%d" % (apart * readers))
    late = set(handles) - set(answers)
    for client in clients:
        client.join()
    assert late, "some were under way, or waited for their turn"
    for handle, answer in answers.items():
        assert answer in (ESTALE, content[(handle - 1) * PAGE : handle * PAGE])
    assert ESTALE in [answers[handle] for handle in late]
    assert count(backup, "pages") == 0
    assert os.listdir(backup) == []
    with pytest.raises(OSError, match=os.strerror(ENOENT)):
        (backup / "1").read_bytes()


def test_c9_a_cancelled_copy_leaves_the_page_and_can_be_repeated(tmp_path: Path) -> None:
    """`intr` lets a cancellation end the wait for swap. Without it the copy is completed."""

    async def main() -> None:
        async with ttmfs.open_pool(size=64 * MIB) as pool:
            with stores.slow_swap(os.getpid(), tmp_path) as slow:
                backup = await pool.create("a")
                pages = np.random.default_rng(1).integers(0, 256, (256, PAGE), np.uint8)
                await backup.backup_pages(pages, 0)
                slow.push_out()
                got = np.zeros(PAGE, np.uint8)
                with trio.move_on_after(0.02) as scope:
                    await backup.copy_page(got, 200, intr=True)
                assert scope.cancelled_caught
                assert not got.any()
                with trio.move_on_after(0.02) as scope:
                    await backup.copy_page(got, 100)
                assert not scope.cancelled_caught
                assert (got == pages[99]).all()
                await backup.copy_page(got, 200, intr=True)
                assert (got == pages[199]).all()

    trio.run(main)


# --- room ---


def test_df_follows_swap_being_switched_on_and_off(mountpoint: Path, tmp_path: Path) -> None:
    """Memory and swap limit what can be stored if they are less than the budget."""
    with Mount(mountpoint, "size=100t"):

        def available() -> int:
            room = os.statvfs(mountpoint)
            return room.f_bavail * room.f_frsize

        before = available()
        with stores.swap(tmp_path, 1 << 30):
            wait_until(lambda: available() >= before + (512 << 20), "df to grow")
        wait_until(lambda: available() <= before + (512 << 20), "df to shrink")
