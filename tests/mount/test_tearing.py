"""C7: no reader through the mount sees a mix of two pages, within the limits that the kernel's requests set."""

import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from harness import Mount, opened, wait_until
from ttmfs.cli.commands.manifest import BackupPages, Chunk
from ttmfs.client import Backup

BASE = mmap.PAGESIZE
REQUEST = 1 << 20
PAGES = 256  # of memory that one request refers to at most
SIZES = {"4k": 4 << 10, "64k": 64 << 10, "1m": 1 << 20}

WRITER = """
import sys
import numpy as np
from ttmfs.client import Backup

path, offset = sys.argv[1], int(sys.argv[2])
with Backup.open(path, native=False) as backup:
    size = backup.page_size
    count = 2 * max(1, (1 << 20) // size)
    memory = np.empty(count * size + offset, np.uint8)
    pages = memory[offset:].reshape(count, size)
    serial = 0
    while True:
        serial = serial % 250 + 1
        memory[:] = serial
        backup.backup_pages(pages, 0)
"""


@pytest.fixture(scope="module", params=list(SIZES.values()), ids=list(SIZES))
def mnt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("mnt")
    with Mount(path, f"size=32m,backup_size=8m,page_size={request.param}") as mount:
        yield mount.path


@pytest.fixture
def backup(mnt: Path) -> Iterator[Backup]:
    with Backup.create(mnt / "a", native=False) as backup:
        yield backup
        backup.fini()


def requests(mnt: Path, operation: str) -> int:
    """How many requests of a kind the daemon has answered. The question itself takes some reads."""
    pattern = rf'^ttmfs_operation_duration_seconds_count{{operation="{operation}"}} (\d+)$'
    found = re.search(pattern, (mnt / ".stats").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def unaligned(length: int) -> "NDArray[np.uint8]":
    """Memory that begins 16 bytes after a page boundary, as numpy's large arrays do."""
    return np.frombuffer(mmap.mmap(-1, length + BASE), np.uint8)[16 : 16 + length]


@pytest.mark.parametrize("reader", ["pread", "client", "save"])
def test_c7_the_client_tears_no_page_for_any_buffer(mnt: Path, backup: Backup, reader: str) -> None:
    """It looks at the pages where a request of 1 MiB, or of the most pages of memory, would end."""
    size = backup.page_size
    suspects = sorted({(REQUEST - 1) // size, REQUEST // size})
    backup.backup_pages(np.ones((2 * max(1, REQUEST // size), size), np.uint8), 0)
    command = [sys.executable, "-c", WRITER, str(mnt / "a"), "16" if reader == "pread" else "0"]
    writer = subprocess.Popen(command)
    page, into = mmap.mmap(-1, size), unaligned((REQUEST // size + 1) * size).reshape(-1, size)
    seen: set[int] = set()
    try:
        with opened(mnt / "a/.image") as image:

            def look() -> bool:
                for _ in range(50):
                    if reader == "pread":
                        for index in suspects:
                            assert os.preadv(image, [page], index * size) == size
                            found = page[:]
                            assert found == found[:1] * size, f"page {index} is torn: {sorted(set(found))}"
                            seen.add(found[0])
                    elif reader == "save":
                        _, rows = BackupPages(backup).read(Chunk(((0, len(into)),)))
                        assert (rows == rows[:, :1]).all(), "a page is torn"
                        seen.add(int(rows[0, 0]))
                    else:
                        backup.copy_pages(into, np.arange(1, len(into) + 1, dtype=np.uint64))
                        torn = np.flatnonzero((into != into[:, :1]).any(axis=1))
                        assert not len(torn), f"pages {torn} are torn"
                        seen.add(int(into[0, 0]))
                assert writer.poll() is None
                return len(seen) > 20

            wait_until(look, "the pages to change", 60)
    finally:
        writer.kill()
        writer.wait(10)


@pytest.mark.parametrize("what", ["write", "read"])
def test_c7_the_kernel_sends_an_aligned_mib_or_256_pieces_as_one_request(mnt: Path, backup: Backup, what: str) -> None:
    """The daemon carries one request out as a whole."""
    call = os.pwritev if what == "write" else os.preadv
    backup.backup_pages(np.ones((2 * max(1, REQUEST // backup.page_size), backup.page_size), np.uint8), 0)
    whole = memoryview(mmap.mmap(-1, REQUEST))
    pieces = [memoryview(mmap.mmap(-1, BASE))[:256] for _ in range(PAGES)]
    cases = [[whole], [unaligned(REQUEST - BASE).data], pieces]
    with opened(mnt / "a/.image") as image:
        for buffers in cases:
            asking = -requests(mnt, what) + requests(mnt, what)
            before, length = requests(mnt, what), sum(map(len, buffers))
            assert call(image, buffers, 0) == length
            assert requests(mnt, what) - before - asking == 1, f"{length} bytes in {len(buffers)} pieces"


def test_c7_readers_see_an_aligned_mib_whole(mnt: Path, backup: Backup) -> None:
    backup.backup_pages(np.ones((max(1, REQUEST // backup.page_size), backup.page_size), np.uint8), 0)
    stop, seen = threading.Event(), set()
    buffers = [mmap.mmap(-1, REQUEST) for _ in range(2)]

    def write(image: int) -> None:
        serial = 0
        while not stop.is_set():
            serial = serial % 250 + 1
            buffers[0][:] = bytes([serial]) * REQUEST
            os.pwritev(image, [buffers[0]], 0)

    with opened(mnt / "a/.image") as image:
        writer = threading.Thread(target=write, args=[image])
        writer.start()
        try:

            def look() -> bool:
                assert os.preadv(image, [buffers[1]], 0) == REQUEST
                found = buffers[1][:]
                assert found == found[:1] * REQUEST
                seen.add(found[0])
                return len(seen) > 20

            wait_until(look, "the pages to change", 60)
        finally:
            stop.set()
            writer.join(10)
