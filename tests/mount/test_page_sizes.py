"""Pages of every size, from the system's own to 2 MiB: what holds for one size holds for all.

A large page consists of many base pages. The memory or the disk below may have, lack, refuse or free any of them.
None of that shows: a page exists or not, and has its size, its room, its bytes and its end as a whole.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from errno import EFBIG, EINVAL, ENODEV, ENOENT, ENOSPC, ESTALE
from pathlib import Path

import numpy as np
import pytest
import trio

import ttmfs
from harness import MOUNT_PY, Mount, attribute, meminfo, mounts, names, opened, raises_errno, run, set_attribute
from stores import filesystem
from ttmfs.handles import parse_ranges

BASE = mmap.PAGESIZE
MIB = 1 << 20
REQUEST = MIB  # the most bytes that the kernel asks for at once
SIZES = {"4k": 4 << 10, "16k": 16 << 10, "64k": 64 << 10, "2m": 2 * MIB}
LARGE = {"64k": 64 << 10, "2m": 2 * MIB}
"""What GPU drivers and KV caches use."""

BUDGET = 64 * MIB
PAGES = 16  # of each backup
MAX_HANDLE = 2**30 - 3
PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

TTMFS = (sys.executable, "-W", "error", "-m", "ttmfs")

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """A mount for each page size. Its budget and the size of its backups are not whole numbers of pages."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name, size in SIZES.items():
            options = f"size={BUDGET - 1},backup_size={PAGES * size - 1},page_size={name}"
            found[size] = stack.enter_context(Mount(tmp_path_factory.mktemp(name), options)).path
        yield found


@pytest.fixture(params=list(SIZES.values()), ids=list(SIZES))
def size(request: pytest.FixtureRequest) -> int:
    """Bytes per page."""
    return int(request.param)


@pytest.fixture
def mnt(roots: dict[int, Path], size: int) -> Iterator[Path]:
    """The mount with pages of `size`. The end of the test removes all backups, and checks that all room is free."""
    root = roots[size]
    yield root
    set_attribute(root, "size", BUDGET)
    for backup in root.iterdir():
        os.truncate(backup / ".image", 0)
        backup.rmdir()
    assert stored(root) == 0


@pytest.fixture
def a(mnt: Path) -> Path:
    """An empty backup."""
    (mnt / "a").mkdir()
    return mnt / "a"


large = pytest.mark.parametrize("size", LARGE.values(), ids=LARGE)
huge = pytest.mark.parametrize("size", [2 * MIB], ids=["2m"])


@functools.cache
def page(n: int, size: int) -> bytes:
    """A page of noise. No two pages, and no two base pages of one, are equal."""
    return random.Random(n).randbytes(size)


def fill(backup: Path, size: int, *handles: int) -> None:
    """Store pages of noise, by their handles."""
    for handle in handles:
        (backup / str(handle)).write_bytes(page(handle, size))


def create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def put(path: Path, offset: int, data: bytes) -> int:
    """One pwrite(2). Returns its result."""
    with opened(path, os.O_WRONLY) as fd:
        return os.pwrite(fd, data, offset)


def get(path: Path, offset: int, length: int) -> bytes:
    """One pread(2)."""
    with opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, length, offset)


def fallocate(path: Path, mode: int, offset: int, length: int) -> None:
    with opened(path) as fd:
        assert _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0


def stored(root: Path) -> int:
    """Bytes of stored pages, as df counts them."""
    room = os.statvfs(root)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def allocated(backup: Path) -> int:
    """Bytes that a backup takes."""
    return os.stat(backup / ".shmem").st_blocks * 512


def residency(backup: Path) -> tuple[int, int, int]:
    """Pages stored, in memory and swapped out. Pages that the machine swaps out by itself count as in memory."""
    pages, resident, out = (int(attribute(backup, name)) for name in ("pages", "resident", "swapped"))
    if out and meminfo("SwapTotal"):
        return pages, resident + out, 0
    return pages, resident, out


def shows(backup: Path, size: int, *handles: int) -> None:
    """Check that every way to list the pages gives the same answer."""
    assert names(backup) == [str(handle) for handle in handles]
    absent = next(n for n in itertools.count(1) if n not in handles)
    looked_up = {0, absent, PAGES + 1, *handles[:1], *handles[-1:]}
    assert {n for n in looked_up if (backup / str(n)).exists()} == looked_up.intersection(handles)
    text = attribute(backup, "map")
    assert [n for first, last in (parse_ranges(text) if text else []) for n in range(first, last + 1)] == list(handles)
    for entry in os.scandir(backup):
        found = entry.stat()
        assert (found.st_size, found.st_blocks * 512, found.st_blksize) == (size, size, size)


def holds(backup: Path, size: int, *handles: int) -> None:
    """Check the list of pages, and that every report of their room agrees. There must be no other backup."""
    shows(backup, size, *handles)
    assert residency(backup) == (len(handles), len(handles), 0)
    assert stored(backup.parent) == allocated(backup) == len(handles) * size
    assert os.stat(backup / ".image").st_blocks * 512 == len(handles) * size


def metric(root: Path, name: str) -> float:
    """One of the numbers in .stats."""
    lines = (root / ".stats").read_text().splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"ttmfs_{name} ")))


def tells(backup: Path, size: int, pages: int) -> None:
    """Check that every report of the number of pages gives this number. There must be no other backup."""
    assert len(names(backup)) == pages
    text = attribute(backup, "map")
    assert sum(last - first + 1 for first, last in (parse_ranges(text) if text else [])) == pages
    assert residency(backup) == (pages, pages, 0)
    counted = [metric(backup.parent, f'pages{{state="{state}"}}') for state in ("resident", "swapped")]
    assert sum(counted) == pages
    assert metric(backup.parent, 'stored_bytes{state="resident"}') == counted[0] * size
    listed = json.loads(subprocess.check_output([*TTMFS, "ls", "--json", backup.parent]))
    assert [(row["pages"], row["resident"], row["swapped"]) for row in listed] == [(pages, pages * size, 0)]
    seen = json.loads(subprocess.check_output([*TTMFS, "map", "--json", backup]))
    assert (seen["pages"], seen["resident"], seen["swapped"]) == (pages, pages, 0)
    assert sum(run["last"] - run["first"] + 1 for run in seen["runs"]) == pages


# --- names, sizes and room ---


def test_names_are_the_handles_up_to_the_size_of_the_backup(a: Path, size: int) -> None:
    for handle in (PAGES, 1, 7):
        create(a / str(handle))
    for handle in (PAGES + 1, 2 * PAGES, PAGES * size, MAX_HANDLE, MAX_HANDLE + 1, 2**64):
        with raises_errno(EFBIG):
            create(a / str(handle))
        with raises_errno(ENOENT):
            (a / str(handle)).stat()
    for name in ("0", "01", "+1", "-1", "1.0", "0x1", "1k", " 1", "1 ", "\u0661"):
        with raises_errno(EINVAL):
            create(a / name)
        with raises_errno(ENOENT):
            (a / name).stat()
    holds(a, size, 1, 7, PAGES)


def test_every_report_shows_the_page_size(a: Path, size: int) -> None:
    mnt = a.parent
    assert attribute(mnt, "page_size") == str(size)
    assert f'"page_size": {size},' in (mnt / ".config").read_text()
    assert f"\nttmfs_page_size_bytes {size}\n" in (mnt / ".stats").read_text()
    fill(a, size, 2, 3, 9)
    image = (a / ".image").stat()
    assert (image.st_size, image.st_blocks * 512, image.st_blksize) == (PAGES * size, 3 * size, size)
    assert os.stat(a / ".shmem").st_size == PAGES * size
    with opened(a / "3", os.O_RDONLY) as fd:
        found = os.fstat(fd)
        assert (found.st_size, found.st_blocks * 512, found.st_blksize) == (size, size, size)
        assert (os.lseek(fd, 0, os.SEEK_END), os.read(fd, 1)) == (size, b"")
    for path in (mnt, a, a / "3", a / ".image"):
        room = os.statvfs(path)
        assert (room.f_bsize, room.f_frsize, room.f_blocks) == (size, size, BUDGET // size)


def test_du_df_and_ls_agree_for_every_way_of_storing(a: Path, size: int) -> None:
    mnt = a.parent
    create(a / "1")
    put(a / ".image", 2 * size - 1, b"x")  # the last byte of page 2
    (a / "3").write_bytes(b"abc")
    put(a / ".image", 5 * size - 2, b"four")  # across the end of page 5
    fill(a, size, 16)
    holds(a, size, 1, 2, 3, 5, 6, 16)
    told = run("du -s -B1 a; du -B1 a/.image; du -s -B1 --apparent-size a; stat -f -c %S .", cwd=mnt).split()
    assert told == [str(6 * size), "a", str(6 * size), "a/.image", str(6 * size), "a", str(size)]
    told = run(f"df -B{size} --output=size,used,avail .", cwd=mnt).split()[-3:]
    assert told == [str(BUDGET // size), "6", str(BUDGET // size - 6)]
    told = run(f"ls -s -v --block-size={size} a", cwd=mnt).split()
    assert told == ["total", "6", "1", "1", "1", "2", "1", "3", "1", "5", "1", "6", "1", "16"]
    assert run(f"find a -type f -size {size}c | wc -l", cwd=mnt).split() == ["6"]


def test_c1_every_page_lies_at_its_place_in_image_and_shmem(a: Path, size: int) -> None:
    for handle in reversed(range(1, PAGES + 1, 3)):
        fill(a, size, handle)
    whole = b"".join(page(n, size) if n % 3 == 1 else bytes(size) for n in range(1, PAGES + 1))
    assert (a / ".image").read_bytes() == (a / ".shmem").read_bytes() == whole
    for offset, length in (
        (0, 1), (3 * size - 5, 10), (size - 1, 2 * size + 2), (9 * size + BASE - 1, 2), (PAGES * size - 7, 100),
        (PAGES * size, 1), (2**60, 1),
    ):  # fmt: skip
        assert get(a / ".image", offset, length) == whole[offset : offset + length]
    put(a / ".image", 3 * size + 5, b"into a page")
    put(a / "7", size - 11, b"into a page")
    assert get(a / "4", 5, 11) == get(a / ".shmem", 7 * size - 11, 11) == b"into a page"
    holds(a, size, 1, 4, 7, 10, 13, 16)


# --- attributes ---


def test_c12_map_and_drop_count_in_pages(a: Path, size: int) -> None:
    fill(a, size, 1, 2, 3, 4, 5, 8, 9, 11, 16)
    assert attribute(a, "map") == "1-5,8-9,11,16"
    holds(a, size, 1, 2, 3, 4, 5, 8, 9, 11, 16)
    with opened(a / "4") as fd:
        set_attribute(a, "drop", "2-4, 9,16")
        for offset in (0, size - 1):
            with raises_errno(ESTALE):
                os.pread(fd, 1, offset)
    holds(a, size, 1, 5, 8, 11)
    for wrong in (f"1-{PAGES + 1}", "0", "3-2", str(PAGES * size)):
        with raises_errno(EINVAL):
            set_attribute(a, "drop", wrong)
    holds(a, size, 1, 5, 8, 11)
    assert all((a / name).read_bytes() == page(int(name), size) for name in names(a))


def test_backup_sizes_are_rounded_up_to_pages(a: Path, size: int) -> None:
    assert attribute(a, "size") == str(PAGES * size), "backup_size was one byte less"
    for asked, pages in [(1, 1), (size, 1), (size + 1, 2), (4 * size - 1, 4), (100 * size + 1, 101)]:
        set_attribute(a, "size", asked)
        assert attribute(a, "size") == str(pages * size)
        assert os.stat(a / ".image").st_size == os.stat(a / ".shmem").st_size == pages * size
        with raises_errno(EFBIG):
            create(a / str(pages + 1))
        create(a / str(pages))
        (a / str(pages)).unlink()
    for wrong in (0, -size, f"{size}b", 2**63):
        with raises_errno(EINVAL):
            set_attribute(a, "size", wrong)
    assert attribute(a, "size") == str(101 * size)


def test_a_backup_shrinks_over_absent_pages_only(a: Path, size: int) -> None:
    put(a / ".image", 6 * size - 1, b"x")  # which makes the whole page
    for too_small in (5 * size, 5 * size - BASE + 1, 1):
        with raises_errno(EINVAL):
            set_attribute(a, "size", too_small)
    holds(a, size, 6)
    set_attribute(a, "size", 5 * size + 1)
    assert attribute(a, "size") == str(6 * size)
    (a / "6").unlink()
    set_attribute(a, "size", 1)
    assert attribute(a, "size") == str(size)
    set_attribute(a, "size", PAGES * size)
    holds(a, size)
    assert not any((a / ".image").read_bytes())


def test_a_backup_has_at_most_as_many_pages_as_there_are_handles(a: Path, size: int) -> None:
    with raises_errno(EINVAL):
        set_attribute(a, "size", MAX_HANDLE * size + 1)
    set_attribute(a, "size", MAX_HANDLE * size)  # 2 PiB of 2 MiB pages
    fill(a, size, MAX_HANDLE)
    assert names(a) == [attribute(a, "map")] == [str(MAX_HANDLE)]
    assert residency(a) == (1, 1, 0)
    assert get(a / ".image", (MAX_HANDLE - 1) * size, size) == page(MAX_HANDLE, size)
    assert put(a / ".image", MAX_HANDLE * size - 1, b"xy") == 1
    with raises_errno(EFBIG):
        put(a / ".image", MAX_HANDLE * size, b"x")
    with raises_errno(EFBIG):
        create(a / str(MAX_HANDLE + 1))
    set_attribute(a, "drop", f"1-{MAX_HANDLE}")
    holds(a, size)


def test_the_budget_is_rounded_up_to_pages(a: Path, size: int) -> None:
    mnt = a.parent
    assert attribute(mnt, "size") == str(BUDGET), "size was one byte less"
    fill(a, size, 1, 2, 3)
    for asked, pages in [(10 * size + 1, 11), (2 * size + 1, 3), (3 * size, 3)]:
        set_attribute(mnt, "size", asked)
        assert attribute(mnt, "size") == str(pages * size)
        room = os.statvfs(mnt)
        assert (room.f_blocks, room.f_bfree, room.f_bavail) == (pages, pages - 3, pages - 3)
    with raises_errno(EINVAL):
        set_attribute(mnt, "size", 2 * size)
    with raises_errno(ENOSPC):
        create(a / "4")
    holds(a, size, 1, 2, 3)


# --- parts of pages ---


def spans(size: int) -> list[tuple[int, int]]:
    """(offset, length) of parts of a page: at its ends, inside and across base pages, inside and across requests."""
    chosen = {
        (0, 1), (1, 1), (0, BASE - 1), (BASE - 1, 2), (BASE, BASE), (BASE - 7, 2 * BASE + 14), (size // 2 - 3, 7),
        (size - 1, 1), (size - BASE, BASE), (0, size - 1), (1, size - 1), (size // 3, size // 3), (REQUEST - 1, 2),
        (REQUEST - BASE, REQUEST + 1), (0, size),
    }  # fmt: skip
    return sorted((offset, length) for offset, length in chosen if offset + length <= size)


@pytest.mark.parametrize("way", ["page file", ".image"])
def test_a_partial_write_keeps_the_rest_of_a_page(a: Path, size: int, way: str) -> None:
    fill(a, size, 4, 5, 6)
    expected = bytearray(page(5, size))
    for offset, length in spans(size):
        data = random.Random(offset).randbytes(length)
        path, start = (a / "5", 0) if way == "page file" else (a / way, 4 * size)
        assert put(path, start + offset, data) == length
        expected[offset : offset + length] = data
        assert (a / "5").read_bytes() == expected
        assert get(a / "5", offset, length) == data
    assert [(a / name).read_bytes() for name in ("4", "6")] == [page(4, size), page(6, size)]
    holds(a, size, 4, 5, 6)


def test_a_partial_write_creates_the_whole_page(a: Path, size: int) -> None:
    for offset, length in spans(size):
        data = random.Random(offset).randbytes(length)
        assert put(a / ".image", 7 * size + offset, data) == length
        assert (a / "8").read_bytes() == bytes(offset) + data + bytes(size - offset - length)
        holds(a, size, 8)
        (a / "8").unlink()
        assert not any(get(a / ".image", 7 * size, size))
    data = random.Random(0).randbytes(size + 2)
    assert put(a / ".image", 6 * size - 1, data) == size + 2
    holds(a, size, 6, 7, 8)
    assert (a / ".image").read_bytes() == bytes(6 * size - 1) + data + bytes((PAGES - 7) * size - 1)


def test_a_page_can_be_written_in_pieces_in_any_order(a: Path, size: int) -> None:
    chance, expected = random.Random(1), bytearray(size)
    create(a / "2")
    cuts = [0, *sorted(chance.sample(range(1, size), 40)), size]
    pieces = list(itertools.pairwise(cuts))
    chance.shuffle(pieces)
    with opened(a / "2") as fd:
        for start, past in pieces:
            expected[start:past] = chance.randbytes(past - start)
            assert os.pwrite(fd, expected[start:past], start) == past - start
            assert os.pread(fd, size, 0) == expected
    holds(a, size, 2)


def test_reads_and_writes_of_a_page_end_at_its_size(a: Path, size: int) -> None:
    fill(a, size, 1, 2, 3)
    with opened(a / "2") as fd:
        assert os.pwrite(fd, b"0123456789", size - 3) == 3
        assert os.pread(fd, 100, size - 6) == page(2, size)[-6:-3] + b"012"
        for offset in (size, size + 1, size + BASE, 2**40):
            with raises_errno(EFBIG):
                os.pwrite(fd, b"x", offset)
            assert os.pread(fd, 10, offset) == b""
        assert os.pwrite(fd, page(9, size) + b"more", 0) == size, "as much as fits"
        assert os.pread(fd, 3 * size, 0) == page(9, size)
        assert os.writev(fd, [b"a" * (size // 2), b"b" * (size // 2), b"c"]) == size
        assert os.pread(fd, size, 0) == b"a" * (size // 2) + b"b" * (size // 2)
    with opened(a / "2", os.O_WRONLY | os.O_APPEND) as fd, raises_errno(EFBIG):
        os.write(fd, b"x")
    assert [(a / name).read_bytes() for name in ("1", "3")] == [page(1, size), page(3, size)]
    holds(a, size, 1, 2, 3)


def test_reads_and_writes_of_an_image_end_at_the_backup_size(a: Path, size: int) -> None:
    data = page(1, size) + page(2, size)
    assert put(a / ".image", (PAGES - 1) * size - 1, data) == size + 1
    for offset in (PAGES * size, PAGES * size + 1, 2**50):
        with raises_errno(EFBIG):
            put(a / ".image", offset, b"x")
    for past in (PAGES * size + 1, 2**50):
        with raises_errno(EFBIG):
            os.truncate(a / ".image", past)
    os.truncate(a / ".image", PAGES * size)
    assert get(a / ".image", (PAGES - 1) * size - 1, 3 * size) == data[: size + 1]
    holds(a, size, PAGES - 1, PAGES)


def test_a_page_can_be_mapped_and_copied_within_the_kernel(a: Path, size: int, tmp_path: Path) -> None:
    """The kernel takes st_blksize for the file's block size. Its page cache has smaller pages."""
    fill(a, size, 1, 3)
    with opened(a / "3") as fd, opened(a / ".image") as image:
        with mmap.mmap(fd, size, mmap.MAP_PRIVATE) as mapped:
            assert mapped[:] == page(3, size)
        with mmap.mmap(image, 3 * size, mmap.MAP_PRIVATE) as mapped:
            assert mapped[:] == page(1, size) + bytes(size) + page(3, size)
        with raises_errno(ENODEV):
            mmap.mmap(fd, size, mmap.MAP_SHARED)
        with opened(tmp_path / "copy", os.O_RDWR | os.O_CREAT) as copy:
            while os.sendfile(copy, fd, None, size):
                pass
        assert (tmp_path / "copy").read_bytes() == page(3, size)
    (a / "5").write_bytes(b"")
    with opened(a / "1") as source, opened(a / "5") as copy:
        while os.copy_file_range(source, copy, size):
            pass
    assert (a / "5").read_bytes() == page(1, size)
    holds(a, size, 1, 3, 5)


# --- truncation ---


def cuts(size: int) -> list[int]:
    found = {0, 1, BASE - 1, BASE, BASE + 1, size // 2, size // 2 + 1, size - BASE, size - BASE + 1, size - 1, size}
    return sorted(n for n in found | {REQUEST - 1, REQUEST + 1} if n <= size)


def test_truncating_a_page_fills_the_rest_with_zeros(a: Path, size: int) -> None:
    fill(a, size, 1, 3)
    for length in cuts(size):
        fill(a, size, 2)
        expected = page(2, size)[:length] + bytes(size - length)
        with opened(a / "2") as fd:
            os.ftruncate(fd, length)
            assert os.fstat(fd).st_size == size, "its size stays"
            assert os.pread(fd, size, 0) == expected
            os.ftruncate(fd, size)
            assert os.pread(fd, size, 0) == expected, "nothing comes back"
        for longer in (size + 1, size + BASE, 2**40):
            with raises_errno(EFBIG):
                os.truncate(a / "2", longer)
        assert (a / "2").read_bytes() == expected
        holds(a, size, 1, 2, 3)
    assert [(a / name).read_bytes() for name in ("1", "3")] == [page(1, size), page(3, size)]


def test_o_trunc_zeroes_a_page_and_drops_the_pages_of_an_image(a: Path, size: int) -> None:
    fill(a, size, 1, 2, 3)
    with opened(a / "2", os.O_WRONLY | os.O_TRUNC) as fd:
        assert (a / "2").read_bytes() == bytes(size)
        os.write(fd, b"abc")
        assert os.fstat(fd).st_size == size
    assert (a / "2").read_bytes() == b"abc" + bytes(size - 3)
    holds(a, size, 1, 2, 3)
    with opened(a / ".image", os.O_WRONLY | os.O_TRUNC) as fd:
        holds(a, size)
        os.write(fd, b"abc")
    assert (a / "1").read_bytes() == b"abc" + bytes(size - 3)
    holds(a, size, 1)


def test_truncating_an_image_within_a_page_zeroes_its_rest(a: Path, size: int) -> None:
    for length in cuts(size):
        fill(a, size, 1, 3, 4, 5, 9, 16)
        os.truncate(a / ".image", 3 * size + length)
        holds(a, size, *((1, 3, 4) if length else (1, 3)))
        assert get(a / ".image", 3 * size, 3 * size) == page(4, size)[:length] + bytes(3 * size - length)
        os.truncate(a / ".image", size + length)  # page 2 is absent, and is not made by that
        holds(a, size, 1)
        assert (a / "1").read_bytes() == page(1, size)


# --- room ---


def test_c3_c6_no_page_is_stored_in_part_if_room_runs_out(a: Path, size: int) -> None:
    """There is room for 10 pages, less one base page of another backup.

    It ends within a run of pages, and within a page.
    """
    mnt, room_for = a.parent, 9
    (mnt / "odd").mkdir()
    put(mnt / "odd" / ".shmem", 0, b"x")
    set_attribute(mnt, "size", 10 * size)
    data = random.Random(0).randbytes(12 * size)
    assert put(a / ".image", 2 * size, data) == room_for * size
    expected = bytearray(2 * size) + data[: room_for * size] + bytes((PAGES - 2 - room_for) * size)

    def unchanged() -> None:
        assert (a / ".image").read_bytes() == expected
        shows(a, size, *range(3, 12))
        assert allocated(a) == room_for * size, "nothing was stored of what was refused"
        room = os.statvfs(mnt)
        assert (room.f_bfree, room.f_bavail) == (0, 0), "what is left is no page"

    unchanged()
    for offset, length in itertools.product((0, size, 11 * size, 12 * size - 1, 14 * size + 1), (1, size, 2 * size)):
        with raises_errno(ENOSPC):
            put(a / ".image", offset, b"y" * length)
    for handle in (1, 2, 12, 16):
        with raises_errno(ENOSPC):
            create(a / str(handle))
    unchanged()

    # Storing over what is there takes no room, and goes on up to where pages are absent.
    assert put(a / ".image", 10 * size - 5, b"z" * (3 * size)) == size + 5
    expected[10 * size - 5 : 11 * size] = b"z" * (size + 5)
    os.truncate(a / "3", size // 2)
    expected[2 * size + size // 2 : 3 * size] = bytes(size // 2)
    put(a / "4", size // 2, b"part")
    expected[3 * size + size // 2 : 3 * size + size // 2 + 4] = b"part"
    unchanged()

    # A write that begins within an absent page and goes over one that is there: the first has room, the third has not.
    for name in ("3", "4"):
        (a / name).unlink()
    create(a / "14")
    assert put(a / ".image", 13 * size - 1, data[: 3 * size]) == size + 1
    assert get(a / ".image", 13 * size - 1, 3 * size) == data[: size + 1] + bytes(2 * size - 1)
    shows(a, size, 5, 6, 7, 8, 9, 10, 11, 13, 14)
    assert allocated(a) == 9 * size


WRITER = """
import errno, os, sys
way, backup, size, first, step, past = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])
sys.stdin.readline()
for idx in range(first, past, step):
    try:
        path = f"{backup}/{idx + 1}" if way == "page file" else f"{backup}/.image"
        fd = os.open(path, os.O_CREAT | os.O_WRONLY if way == "page file" else os.O_WRONLY)
        try:
            data = bytes([idx + 1]) * size
            assert os.pwrite(fd, data, 0 if way == "page file" else idx * size) == size
        finally:
            os.close(fd)
        print(idx + 1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
"""


@large
def test_c16_a_race_for_the_last_pages_stores_whole_pages(a: Path, size: int) -> None:
    mnt = a.parent
    (mnt / "odd").mkdir()
    put(mnt / "odd" / ".shmem", 0, b"x" * 3 * BASE)
    set_attribute(mnt, "size", 10 * size)
    command = [sys.executable, "-S", "-c", WRITER]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(subprocess.Popen([*command, way, a, str(size), str(n), "4", str(PAGES)],
                                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for n, way in enumerate(["page file", ".image"] * 2)
        ]  # fmt: skip
        for writer in writers:
            stack.callback(writer.kill)
            assert writer.stdin
            writer.stdin.write("\n")
            writer.stdin.flush()
        said = [writer.communicate(timeout=30)[0] for writer in writers]
        assert [writer.returncode for writer in writers] == [0] * 4
    handles = sorted(int(handle) for text in said for handle in text.split())
    assert len(handles) == 9
    shows(a, size, *handles)
    assert allocated(a) == 9 * size
    assert all((a / str(handle)).read_bytes() == bytes([handle]) * size for handle in handles)


# --- requests, and what is atomic ---


def carried_out(mnt: Path, operation: str) -> int:
    """How many requests of a kind the daemon has answered."""
    rows = (mnt / ".stats").read_text().splitlines()
    prefix = f'ttmfs_operation_duration_seconds_count{{operation="{operation}"}} '
    return next((int(row.removeprefix(prefix)) for row in rows if row.startswith(prefix)), 0)


@huge
def test_c3_a_write_longer_than_a_request_takes_several(a: Path, size: int) -> None:
    mnt = a.parent
    create(a / "1")
    with opened(a / "1") as fd, opened(a / ".image") as image, mmap.mmap(-1, 5 * MIB) as buffer:
        for file, length in [(fd, size), (image, size), (image, 5 * MIB)]:
            buffer[:] = random.Random(length).randbytes(5 * MIB)
            before = carried_out(mnt, "write")
            assert os.pwrite(file, memoryview(buffer)[:length], 0) == length
            assert carried_out(mnt, "write") - before == length // REQUEST
            assert os.pread(file, length, 0) == buffer[:length]
        unaligned = buffer[: 3 * MIB]
        assert os.pwrite(image, unaligned, 5 * size - 7) == len(unaligned)
        assert os.pread(image, 3 * MIB, 5 * size - 7) == unaligned
    holds(a, size, 1, 2, 3, 5, 6, 7)


TEARING = """
import mmap, os, sys
what, path, size, part, count = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
fd, buffer, seen = os.open(path, os.O_RDWR), mmap.mmap(-1, size), set()  # a map is aligned, as requests are then
print(flush=True)
for n in range(count):
    if what == "write":
        buffer[:] = bytes([n % 256]) * size
        assert os.pwrite(fd, buffer, 0) == size
    else:
        assert os.preadv(fd, [buffer], 0) == size
        for start in range(0, size, part):
            piece = buffer[start : start + part]
            assert piece == piece[:1] * part, f"torn after {n}: {sorted(set(piece))}"
        seen.add(buffer[0])
print(len(seen))
"""


@pytest.mark.parametrize(("written", "read"), [("1", "1"), ("1", ".image"), (".image", "1")])
@huge
def test_c7_each_request_writes_its_part_of_a_page_atomically(a: Path, size: int, written: str, read: str) -> None:
    create(a / "1")
    with contextlib.ExitStack() as stack:

        def start(what: str, name: str, count: int) -> "subprocess.Popen[str]":
            arguments = [what, str(a / name), str(size), str(REQUEST), str(count)]
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", TEARING, *arguments], stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            assert process.stdout
            stack.callback(process.stdout.close)
            assert process.stdout.readline() == "\n"
            return process

        writers = [start("write", written, 1 << 40) for _ in range(2)]
        reader = start("read", read, 150)
        out, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0
        assert int(out) > 5, "the reader saw the page change"
        assert [writer.poll() for writer in writers] == [None, None]


# --- dropping ---


@pytest.mark.parametrize("way", ["rm", "drop", "truncate", "rm -r"])
def test_c12_drop_frees_the_whole_page_for_every_way_of_storing(a: Path, size: int, way: str) -> None:
    mnt = a.parent
    fill(a, size, 1, 2)
    create(a / "3")
    put(a / ".image", 5 * size - 1, b"x")
    put(a / ".shmem", 6 * size - BASE, b"x" * BASE)
    fallocate(a / ".shmem", 1, 6 * size, size)  # room without data: no page shows
    shows(a, size, 1, 2, 3, 5, 6)
    if way == "rm":
        for handle in (1, 2, 3, 5, 6):
            (a / str(handle)).unlink()
        assert allocated(a) == size
        with raises_errno(ENOENT):
            (a / "7").unlink()
        create(a / "7")
        (a / "7").unlink()
    elif way == "drop":
        set_attribute(a, "drop", "7,1-6")
    elif way == "truncate":
        os.truncate(a / ".image", 0)
    else:
        run("rm -r a", cwd=mnt)
        a.mkdir()
    holds(a, size)


# --- .shmem, which knows base pages only ---


@large
def test_a_partial_write_through_shmem_creates_a_page(a: Path, size: int) -> None:
    data = random.Random(1).randbytes(BASE)
    for idx in (2, 3):  # pages 3 and 4: a base page in their middle
        put(a / ".shmem", idx * size + size // 2, data)
    put(a / ".shmem", 5 * size - BASE, data + data)  # pages 5 and 6: their last, and first
    for offset in (0, 5 * BASE, size - BASE):  # page 9: three, with holes between
        put(a / ".shmem", 8 * size + offset, data)
    shows(a, size, 3, 4, 5, 6, 9)
    assert attribute(a, "map") == "3-6,9"
    assert residency(a) == (5, 5, 0)
    assert metric(a.parent, 'pages{state="resident"}') == 5
    assert metric(a.parent, 'pages{state="swapped"}') == 0
    assert allocated(a) == os.stat(a / ".image").st_blocks * 512 == 7 * BASE, "du counts room"
    assert os.statvfs(a).f_bfree == BUDGET // size - 1, "and so does df, rounded up to pages"
    assert (a / "3").read_bytes() == bytes(size // 2) + data + bytes(size // 2 - BASE)
    assert get(a / ".image", 4 * size, 2 * size) == bytes(size - BASE) + data + data + bytes(size - BASE)
    with opened(a / "9", os.O_CREAT | os.O_RDWR) as fd:
        assert os.pread(fd, BASE, 5 * BASE) == data, "it is there, and O_CREAT leaves it"
    for handle in (3, 4, 5, 6, 9):  # any write makes it whole
        assert put(a / str(handle), 1, b"y") == 1
    assert (a / "3").read_bytes() == b"\0y" + bytes(size // 2 - 2) + data + bytes(size // 2 - BASE)
    holds(a, size, 3, 4, 5, 6, 9)


@large
def test_partly_stored_pages_count_like_whole_ones(a: Path, size: int) -> None:
    for idx in (1, 4):
        put(a / ".shmem", idx * size, b"x" * BASE)
    tells(a, size, 2)
    assert allocated(a) == os.stat(a / ".image").st_blocks * 512 == 2 * BASE
    fallocate(a / ".shmem", 0, 6 * size, 3 * size)
    tells(a, size, 2)
    assert allocated(a) == os.stat(a / ".image").st_blocks * 512 == 2 * BASE + 3 * size, "room that is not written"
    put(a / ".shmem", 7 * size, b"x")
    tells(a, size, 3)
    fill(a, size, 2, 12)
    tells(a, size, 4)
    fallocate(a / ".shmem", PUNCH, size, size - BASE)
    tells(a, size, 4)
    fallocate(a / ".shmem", PUNCH, 2 * size - BASE, BASE)
    tells(a, size, 3)
    os.truncate(a / ".image", 0)
    tells(a, size, 0)
    assert stored(a.parent) == 0


@large
def test_c6_a_page_partly_written_through_shmem_needs_room_to_become_whole(a: Path, size: int) -> None:
    mnt = a.parent
    put(a / ".shmem", 3 * size, b"x" * BASE)
    fill(a, size, 1, 2)
    set_attribute(mnt, "size", 3 * size)
    put(a / ".shmem", 8 * size, b"x" * BASE)  # of what page 4 would need
    for refused in (lambda: put(a / "4", 5, b"y"), lambda: os.truncate(a / "4", 1), lambda: create(a / "5")):
        with raises_errno(ENOSPC):
            refused()
    assert get(a / ".image", 3 * size, 2 * size) == b"x" * BASE + bytes(2 * size - BASE)
    (a / "9").unlink()
    put(a / "4", 5, b"y")
    holds(a, size, 1, 2, 4)


@large
def test_a_page_exists_until_all_of_it_is_punched_through_shmem(a: Path, size: int) -> None:
    fill(a, size, 1, 2, 3)
    fallocate(a / ".shmem", PUNCH, size, BASE)
    fallocate(a / ".shmem", PUNCH, size + size // 2, size // 2)
    left = bytes(BASE) + page(2, size)[BASE : size // 2] + bytes(size // 2)
    assert (a / "2").read_bytes() == left
    shows(a, size, 1, 2, 3)
    assert allocated(a) == 2 * size + size // 2 - BASE
    put(a / "2", size - 1, b"z")  # whole again
    assert (a / "2").read_bytes() == left[:-1] + b"z"
    holds(a, size, 1, 2, 3)
    fallocate(a / ".shmem", PUNCH, size, size - BASE)
    assert (a / "2").read_bytes() == bytes(size - 1) + b"z", "the last base page keeps it"
    fallocate(a / ".shmem", PUNCH, 2 * size - BASE, BASE)
    assert names(a) == ["1", "3"], "a name that is known may be found for a second longer"
    assert allocated(a) == 2 * size


def test_a_size_within_a_page_shows_only_the_whole_pages(a: Path, size: int) -> None:
    """Only a write to .shmem can make such a size. The bytes past the last whole page go with the backup."""
    for extra in {1, size // 2 + 1, size - 1}:
        end = 3 * size + extra
        fill(a, size, 1, 3)
        os.truncate(a / ".shmem", end)
        put(a / ".shmem", 3 * size, b"x")
        shows(a, size, 1, 3)
        assert attribute(a, "size") == str(end)
        with raises_errno(EFBIG):
            create(a / "4")
        os.truncate(a / ".image", end)
        with raises_errno(EFBIG):
            os.truncate(a / ".image", end + 1)
        assert get(a / ".image", 3 * size - 1, size) == page(3, size)[-1:] + (b"x" + bytes(extra - 1))[: size - 1]
        set_attribute(a, "size", PAGES * size)
        shows(a, size, 1, 3, 4)
        os.truncate(a / ".shmem", end)
        run(f"rm -r '{a}'")
        a.mkdir()
        holds(a, size)


# --- every way in and out at once ---


def test_random_operations_agree_with_a_dict_of_pages(a: Path, size: int) -> None:
    """They concern all parts of a page, by every way. The dict maps handles to bytes."""
    chance, pages = random.Random(), dict[int, bytearray]()
    steps: list[str] = []

    def place() -> tuple[int, int]:
        start = chance.choice([chance.randrange(size), chance.randrange(0, size, BASE), 0, size - 1])
        return start, chance.choice([1, BASE, size // 2, size, size + 1, chance.randrange(1, 2 * size)])

    def change(first: int, data: bytes) -> None:
        """Store bytes from an offset in the backup on."""
        while data:
            idx, start = divmod(first, size)
            part = data[: size - start]
            pages.setdefault(idx + 1, bytearray(size))[start : start + len(part)] = part
            first, data = first + len(part), data[len(part) :]

    for _ in range(60):
        handle, (start, length) = chance.randrange(1, PAGES + 1), place()
        data, offset = chance.randbytes(length), (handle - 1) * size + start
        step = chance.choice("create put put image image shmem cut cut drop range truncate resize".split())
        steps.append(f"{step} {handle} {start} {length}")
        if step == "create" and handle not in pages:
            create(a / str(handle))
            change(offset - start, bytes(size))
        elif step == "put" and handle in pages:
            assert put(a / str(handle), start, data) == min(length, size - start), steps
            change(offset, data[: size - start])
        elif step == "image":
            assert put(a / ".image", offset, data) == min(length, PAGES * size - offset), steps
            change(offset, data[: PAGES * size - offset])
        elif step == "shmem" and length <= PAGES * size - offset:
            put(a / ".shmem", offset, data)
            change(offset, data)
        elif step == "cut" and handle in pages:
            os.truncate(a / str(handle), start)
            pages[handle][start:] = bytes(size - start)
        elif step == "drop" and handle in pages:
            (a / str(handle)).unlink()
            del pages[handle]
        elif step == "range":
            last = chance.randrange(handle, PAGES + 1)
            set_attribute(a, "drop", f"{handle}-{last}")
            pages = {n: data for n, data in pages.items() if not handle <= n <= last}
        elif step == "truncate" and chance.random() < 0.5:
            os.truncate(a / ".image", offset)
            pages = {n: data for n, data in pages.items() if n <= handle}
            if handle in pages:
                pages[handle][start:] = bytes(size - start)
                if not start:
                    del pages[handle]
        elif step == "resize":
            smallest = max(pages, default=1)
            set_attribute(a, "size", smallest * size)
            set_attribute(a, "size", PAGES * size)
        shows(a, size, *sorted(pages))
        assert allocated(a) <= len(pages) * size, steps
        looked_at = chance.choice(sorted(pages)) if pages else 1
        assert get(a / ".image", (looked_at - 1) * size, size) == pages.get(looked_at, bytes(size)), steps
    whole = b"".join(pages.get(handle, bytes(size)) for handle in range(1, PAGES + 1))
    assert (a / ".image").read_bytes() == (a / ".shmem").read_bytes() == whole, steps
    assert all((a / str(handle)).read_bytes() == data for handle, data in pages.items()), steps


# --- tools ---

Shell = Callable[..., str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """For each page size, a directory: `in` holds the pages 1 to 4 as files, `src` all four and a part of one more."""
    found = {}
    for name, size in LARGE.items():
        found[size] = tmp_path_factory.mktemp(f"in-{name}")
        (found[size] / "in").mkdir()
        fill(found[size] / "in", size, 1, 2, 3, 4)
        (found[size] / "src").write_bytes(b"".join(page(n, size) for n in range(1, 5)) + b"rest")
    return found


@pytest.fixture
def sh(mnt: Path, inputs: dict[int, Path], size: int, tmp_path: Path) -> Shell:
    """Runs a command in the root of the mount. $I has the inputs, $O takes outputs, $P is the page size."""
    (tmp_path / "out").mkdir()

    def shell(command: str, code: int = 0) -> str:
        given = {"I": str(inputs[size]), "O": str(tmp_path), "P": str(size), "LC_ALL": "C"}
        return run(f"set -eo pipefail; {command}", cwd=mnt, code=code, env=os.environ | given)

    return shell


PAGES_IN = """
cp $I/in/* a/
cat $I/in/1 >a/1; tee a/2 <$I/in/2 >$O/tee; install $I/in/3 a/; cp $I/in/4 $O/t; mv $O/t a/4
for n in 1 2 3 4; do dd if=$I/in/$n of=a/$n bs=2M status=none; done
for n in 1 2 3 4; do dd if=$I/in/$n of=a/$n bs=32k status=none oflag=direct; done
for n in 1 2 3 4; do touch a/$n; dd if=$I/in/$n of=a/$n bs=30000 conv=notrunc status=none; done
rsync -a --inplace --checksum $I/in/ a/
tar c -C $I/in . | tar x -C a
split -b $P -a 1 --numeric-suffixes=1 --filter='[ $FILE = 5 ] || cat >a/$FILE' $I/src ''
rm -r a; cp -a $I/in a
"""


@large
@pytest.mark.parametrize("command", PAGES_IN.strip().splitlines())
def test_c2_tools_store_pages(a: Path, size: int, sh: Shell, command: str) -> None:
    """They also overwrite pages: one differs, one is absent and one ends in its middle."""
    for _ in range(2):
        sh(command)
        assert all((a / str(n)).read_bytes() == page(n, size) for n in range(1, 5))
        holds(a, size, 1, 2, 3, 4)
        (a / "2").write_bytes(page(9, size))
        (a / "3").unlink()
        os.truncate(a / "4", size // 2)


PAGES_OUT = """
cp a/* $O/out/
cp -a a/. $O/out/
for n in 1 2 3 4; do dd if=a/$n of=$O/out/$n bs=2M status=none; done
for n in 1 2 3 4; do cat a/$n >$O/out/$n; done
tar c a | tar x -C $O/out --strip-components=1
rsync -a --inplace a/ $O/out/
head -c $((4 * P)) a/.image | split -b $P -a 1 --numeric-suffixes=1 - $O/out/
cp --sparse=auto a/.shmem $O/t; head -c $((4 * P)) $O/t | split -b $P -a 1 --numeric-suffixes=1 - $O/out/
mv a/1 a/2 a/3 a/4 $O/out/; cp $O/out/* a/
"""


@large
@pytest.mark.parametrize("command", PAGES_OUT.strip().splitlines())
def test_c8_tools_copy_pages_out(a: Path, size: int, sh: Shell, command: str) -> None:
    fill(a, size, 1, 2, 3, 4)
    sh(f"{command}; diff -r $I/in $O/out; diff -r a $O/out")
    holds(a, size, 1, 2, 3, 4)


IMAGE_IN = """
cp $I/src a/.image
cat $I/src >a/.image
dd if=$I/src of=a/.image bs=2M status=none
dd if=$I/src of=a/.image bs=64k iflag=fullblock oflag=sync status=none
dd if=$I/src of=a/.image bs=3M conv=notrunc status=none
dd if=$I/src of=a/.image bs=100000 conv=notrunc status=none
rsync --inplace --ignore-times $I/src a/.image
tar cS -C $I src --transform s/.*/.image/ | tar x --overwrite -C a
"""


@large
@pytest.mark.parametrize("command", IMAGE_IN.strip().splitlines())
def test_c2_tools_store_an_image(a: Path, size: int, sh: Shell, command: str) -> None:
    sh(f"{command}; cmp -n $(stat -c %s $I/src) a/.image $I/src")
    assert (a / "5").read_bytes() == b"rest" + bytes(size - 4)
    holds(a, size, 1, 2, 3, 4, 5)


@large
def test_tools_work_at_the_edges_of_pages(a: Path, size: int, sh: Shell) -> None:
    """Data too long for a page, writes at an offset, sparse copies, and truncation."""
    assert "File too large" in sh("cp $I/src a/1", code=1)
    assert (a / "1").read_bytes() == page(1, size), "as much as fits"
    assert "File too large" in sh("printf x >>a/1", code=1)
    sh("dd if=$I/src of=a/.image bs=$P skip=2 seek=9 count=2 conv=notrunc status=none")
    assert [(a / name).read_bytes() for name in ("10", "11")] == [page(3, size), page(4, size)]
    sh("cp --sparse=always a/.image $O/sparse; rm a/*; cp --sparse=always $O/sparse a/.image")
    holds(a, size, 1, 10, 11)
    sh(f"truncate -s $((10 * P + {size // 2 + 1})) a/.image; truncate -s 1 a/1; cmp a/.image a/.shmem")
    assert (a / "11").read_bytes() == page(4, size)[: size // 2 + 1] + bytes(size // 2 - 1)
    assert (a / "1").read_bytes() == page(1, size)[:1] + bytes(size - 1)
    holds(a, size, 1, 10, 11)
    sh("truncate -s $((10 * P)) a/.image")
    holds(a, size, 1, 10)


def test_copies_between_mounts_of_different_page_sizes_keep_the_bytes(roots: dict[int, Path], tmp_path: Path) -> None:
    """A hole in one mount may be part of a page in the other. The bytes stay, the pages differ."""
    less, more = SIZES["4k"], SIZES["64k"]
    a, b = roots[less] / "a", roots[more] / "b"
    a.mkdir()
    b.mkdir()
    try:
        fill(a, less, 1, 2, 7)
        tool = functools.partial(run, cwd=tmp_path)
        for command in (
            f"cp --sparse=always {a}/.image {b}/.image",
            f"dd if={a}/.image of={b}/.image bs=4k conv=sparse",
            f"cp --sparse=auto {a}/.shmem t; dd if=t of={b}/.shmem conv=notrunc,sparse bs=4k",
        ):
            tool(command)
            shows(b, more, 1)
            assert get(b / ".image", 0, more) == (a / ".image").read_bytes() == (a / ".shmem").read_bytes()
            os.truncate(b / ".image", 0)
        tool(f"cp -r {a}/. {b}/")  # page by page: the rest of each is zeros
        holds(b, more, 1, 2, 7)
        assert all((b / n).read_bytes() == (a / n).read_bytes() + bytes(more - less) for n in ("1", "2", "7"))

        os.truncate(a / ".image", 0)
        assert "File too large" in tool(f"cp {b}/2 {a}/2", code=1)
        assert (a / "2").read_bytes() == page(2, less)
        os.truncate(b / ".image", more)
        tool(f"dd if={b}/1 of={a}/.image bs=64k status=none")
        holds(a, less, *range(1, more // less + 1))
        assert (a / ".image").read_bytes() == (b / "1").read_bytes()
    finally:
        for backup in (a, b):
            os.truncate(backup / ".image", 0)
            backup.rmdir()


# --- what is no page size ---

REFUSED = {
    "3k": r"page_size=3k: must be a power of two from 4k to 2m",
    "2k": r"page_size=2k: must be a power of two from 4k to 2m",
    "4m": r"page_size=4m: must be a power of two from 4k to 2m",
    "0": r"page_size=0: must be a power of two",
    "abc": r"page_size: 'abc' is not a size: write bytes, or a number with k, m, g, t",
}


def test_an_invalid_page_size_is_refused_with_the_reason(mountpoint: Path) -> None:
    with contextlib.ExitStack() as stack:
        started = {}
        for text in REFUSED:
            command = [sys.executable, str(MOUNT_PY), str(mountpoint), "-o", f"page_size={text}"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            started[text] = stack.enter_context(process)
        for text, process in started.items():
            told, _ = process.communicate(timeout=30)
            assert process.returncode == 1
            assert REFUSED[text] in told
            assert told.count("\n") == 1
    assert str(mountpoint) not in mounts()


# --- a program, without a mount ---


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run_it(**fixtures: object) -> None:
        trio.run(functools.partial(test, **fixtures))

    return run_it


def noise(count: int, size: int) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    return np.frombuffer(random.Random(count).randbytes(count * size), np.uint8).reshape(count, size)


@large
@in_trio
async def test_the_verbs_and_their_plural_forms_take_large_pages(size: int) -> None:
    async with ttmfs.open_pool(size=BUDGET, backup_size=PAGES * size - 1, page_size=size) as pool:
        backup = await pool.create("a")
        assert (pool.page_size, backup.page_size, backup.size) == (size, size, PAGES * size)
        assert (await pool.create("b", size=1)).size == size
        pages = noise(6, size)
        assert await backup.backup_page(pages[5], 9) == 10
        handles = await backup.backup_pages(pages[::2], 3)
        assert handles.tolist() == [4, 5, 6]
        assert (backup.pages, backup.resident, backup.swapped, pool.room().stored) == (4, 4, 0, 4 * size)
        copy = np.empty((5, size), np.uint8)
        await backup.copy_pages(copy, np.array([10, 6, 5, 4, 10], np.uint64))
        assert (copy == pages[[5, 4, 2, 0, 5]]).all()
        await backup.copy_page(copy[1], 4)
        assert (copy[1] == pages[0]).all()
        for wrong in (np.zeros((2, BASE), np.uint8), np.zeros((2, size - 1), np.uint8), np.zeros(size, np.uint8)):
            with pytest.raises(ttmfs.InvalidArgument):
                await backup.backup_pages(wrong, 0)
        for short in (bytes(BASE), bytes(size - BASE), bytes(size + BASE)):
            with pytest.raises(ttmfs.InvalidArgument, match=f"a page has {size} bytes"):
                await backup.backup_page(short, 0)
        for idx, count in ((PAGES, 1), (PAGES - 1, 2)):
            with pytest.raises(ttmfs.InvalidArgument):
                await backup.backup_pages(pages[:count], idx)
        await backup.drop_pages(np.array([5, 10, 7], np.uint64))
        await backup.drop(4)
        assert (backup.pages, pool.room().stored) == (1, size)
        with pytest.raises(ttmfs.PageAbsent):
            await backup.copy_pages(copy[:2], np.array([6, 5], np.uint64))
        await backup.fini()
        assert pool.room().stored == 0


@large
@in_trio
async def test_c3_c6_plural_forms_store_whole_pages_if_room_runs_out(size: int) -> None:
    async with ttmfs.open_pool(size=10 * size, backup_size=PAGES * size, page_size=size) as pool:
        await pool.create("odd")
        put(Path(pool.files.path("odd")), 0, b"x")  # room ends within a page
        backup, pages = await pool.create("a"), noise(8, size)
        assert (await backup.backup_pages(pages[:4], 2)).tolist() == [3, 4, 5, 6]
        assert (await backup.backup_pages(pages, 5)).tolist() == [6, 7, 8, 9, 10, 11], "one was there, five had room"
        assert backup.pages == 9
        assert backup.file.stat().st_blocks * 512 == 9 * size
        for refused in (backup.backup_pages(pages[:3], 11), backup.backup_page(pages[0], 0)):
            with pytest.raises(ttmfs.NoRoom):
                await refused
        copy = np.empty((9, size), np.uint8)
        await backup.copy_pages(copy, np.arange(3, 12, dtype=np.uint64))
        assert (copy == np.concatenate((pages[:3], pages[:6]))).all()
        assert backup.file.stat().st_blocks * 512 == 9 * size


@in_trio
async def test_the_library_refuses_an_invalid_page_size() -> None:
    refused = {
        3 << 10: "page_size=3k: must be a power of two from 4k to 2m",
        2 << 10: "page_size=2k: must be",
        4 << 20: "page_size=4m: must be",
        0: "page_size=0: must be",
        -4096: "page_size: -4096 does not lie between",
        "64k": "page_size: a number is needed here, not '64k'",
        65536.5: "page_size: a number is needed here",
    }
    for wrong, why in refused.items():
        with pytest.raises(ttmfs.InvalidArgument, match=why):
            async with ttmfs.open_pool(size=BUDGET, page_size=wrong):
                pass


@huge
@in_trio
async def test_c3_more_than_2_gib_at_once_is_stored_whole(size: int) -> None:
    """A write(2) ends one base page before 2 GiB. A source of zeros takes no memory."""
    count = (2 << 30) // size + 2
    pages = np.zeros((count, size), np.uint8)
    pages[-3:, -1] = 7, 8, 9
    async with ttmfs.open_pool(size=count * size, page_size=size) as pool:
        backup = await pool.create("a")
        assert len(await backup.backup_pages(pages, 0)) == count
        assert backup.pages == count
        copy = np.empty((3, size), np.uint8)
        await backup.copy_pages(copy, np.arange(count - 2, count + 1, dtype=np.uint64))
        assert copy[:, -1].tolist() == [7, 8, 9]


@in_trio
async def test_copying_scattered_pages_does_not_scan_the_whole_backup() -> None:
    size, count = 64 << 10, 4096
    async with ttmfs.open_pool(size=count * size, page_size=size) as pool:
        backup = await pool.create("a")
        pages = noise(count // 8, size)
        for idx in range(0, count, len(pages)):
            await backup.backup_pages(pages, idx)
        handles = np.arange(1, count, 4, dtype=np.uint64)
        copy = np.zeros((len(handles), size), np.uint8)
        start = time.perf_counter()
        for row, handle in zip(copy, handles, strict=True):
            await backup.copy_page(row, int(handle))
        one_by_one, start = time.perf_counter() - start, time.perf_counter()
        await backup.copy_pages(copy, handles)
        assert time.perf_counter() - start < 4 * one_by_one + 0.2
        assert (copy == pages[(handles - 1) % len(pages)]).all()


# --- on disks ---


@pytest.mark.parametrize(("kind", "size"), [("ext4", 2 * MIB), ("xfs", 64 << 10)])
def test_c6_no_page_is_stored_in_part_on_a_full_disk(tmp_path: Path, mountpoint: Path, kind: str, size: int) -> None:
    """Filesystems keep what they allocated before room ended. Some ask for room where all is allocated already."""
    with filesystem(tmp_path / "disk", kind) as disk:
        (disk / "store").mkdir()
        room = os.statvfs(disk)
        run(f"fallocate -l {room.f_bavail * room.f_frsize - 14 * MIB - size // 2} '{disk}/full'")
        with Mount(mountpoint, f"store={disk}/store,page_size={size},backup_size=32m") as mount:
            a = mount.path / "a"
            a.mkdir()
            handles = []
            with raises_errno(ENOSPC):
                for handle in range(1, 32 * MIB // size + 1):
                    fill(a, size, handle)
                    handles.append(handle)
            assert 0 < len(handles) < 32 * MIB // size
            for handle in (len(handles) + 1, 32 * MIB // size):
                with raises_errno(ENOSPC):
                    create(a / str(handle))
            run(f"sync -f {disk}")
            assert names(a) == [str(handle) for handle in handles]
            assert allocated(a) < len(handles) * size + 16 * BASE, "but for what the filesystem notes of them"
            assert all((a / name).read_bytes() == page(int(name), size) for name in names(a))
            put(a / "1", size // 2, page(99, size // 2))
            assert (a / "1").read_bytes() == page(1, size)[: size // 2] + page(99, size // 2)
