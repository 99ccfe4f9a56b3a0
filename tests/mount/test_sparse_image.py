"""``.image`` as a sparse file: SEEK_DATA, SEEK_HOLE and fallocate(2), and the tools that use them."""

import ctypes
import errno
import os
import subprocess
from pathlib import Path

import pytest

from harness import Mount, count, opened, raises_errno, set_attribute

PAGE = os.sysconf("SC_PAGE_SIZE")
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, COLLAPSE_RANGE = 1, 2, 16, 8

libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def runs(path: Path) -> list[tuple[int, int]]:
    """The runs of data of a file, in pages."""
    found, position = list[tuple[int, int]](), 0
    with opened(path, os.O_RDONLY) as fd:
        while True:
            try:
                start = os.lseek(fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return found
            position = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start // PAGE, position // PAGE))


@pytest.fixture
def image(backup: Path) -> Path:
    """The image of a backup of 64 pages in three runs: 2 to 5, 9, and 40 to 50."""
    set_attribute(backup, "size", 64 * PAGE)
    with opened(backup / ".image") as fd:
        for first, past in (2, 6), (9, 10), (40, 51):
            os.pwrite(fd, b"".join(bytes([number]) * PAGE for number in range(first, past)), first * PAGE)
    return backup / ".image"


RUNS = [(2, 6), (9, 10), (40, 51)]


def test_data_and_holes_of_an_image_are_its_pages(image: Path) -> None:
    assert runs(image) == RUNS
    with opened(image, os.O_RDONLY) as fd:
        assert os.lseek(fd, 2 * PAGE + 7, os.SEEK_DATA) == 2 * PAGE + 7
        assert os.lseek(fd, 7, os.SEEK_HOLE) == 7
        assert os.lseek(fd, 51 * PAGE - 1, os.SEEK_HOLE) == 51 * PAGE
        assert os.lseek(fd, 0, os.SEEK_END) == 64 * PAGE
        for whence in os.SEEK_DATA, os.SEEK_HOLE:
            with raises_errno(errno.ENXIO):
                os.lseek(fd, 64 * PAGE, whence)


def test_a_page_is_data_from_end_to_end(image: Path) -> None:
    with opened(image.parent / "3", os.O_RDONLY) as fd:
        assert os.lseek(fd, 5, os.SEEK_DATA) == 5
        assert os.lseek(fd, 5, os.SEEK_HOLE) == PAGE
        with raises_errno(errno.ENXIO):
            os.lseek(fd, PAGE, os.SEEK_DATA)
        (image.parent / "3").unlink()
        with raises_errno(errno.ESTALE):
            os.lseek(fd, 5, os.SEEK_DATA)


@pytest.mark.parametrize(
    "command",
    [
        "cp --sparse=auto {image} {copy}",
        "cp --sparse=always {image} {copy}",
        "tar -S -C {image.parent} -cf {copy}.tar .image && tar -xOf {copy}.tar >/dev/null && mkdir {copy}.d &&"
        " tar -S -C {copy}.d -xf {copy}.tar && mv {copy}.d/.image {copy}",
        "rsync --sparse {image} {copy}",
    ],
)
def test_tools_copy_an_image_with_its_holes(image: Path, tmp_path: Path, command: str) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["bash", "-c", command.format(image=image, copy=copy)], check=True)
    assert copy.read_bytes() == image.read_bytes()
    assert runs(copy) == RUNS


def test_cp_stores_no_page_for_a_hole(image: Path, mnt: Path) -> None:
    (mnt / "b").mkdir()
    set_attribute(mnt / "b", "size", 64 * PAGE)
    subprocess.run(["cp", "--sparse=always", "--no-preserve=all", image, mnt / "b/.image"], check=True)
    assert count(mnt / "b", "pages") == 16
    assert runs(mnt / "b/.image") == RUNS


def test_punching_drops_whole_pages_and_zeroes_parts(image: Path) -> None:
    expected = bytearray(image.read_bytes())
    for offset, length in (3 * PAGE, 2 * PAGE), (9 * PAGE + 10, 20), (41 * PAGE + 7, 3 * PAGE), (45 * PAGE, 100 * PAGE):
        with opened(image) as fd:
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
        expected[offset : offset + length] = bytes(min(length, 64 * PAGE - offset))
        assert image.read_bytes() == expected
    assert runs(image) == [(2, 3), (5, 6), (9, 10), (40, 42), (44, 45)]
    assert not (image.parent / "4").exists()
    assert (image.parent / "3").exists()
    assert image.stat().st_size == 64 * PAGE


def test_fallocate_p_frees_pages_from_the_shell(image: Path) -> None:
    subprocess.run(["fallocate", "-p", "-o", str(40 * PAGE), "-l", str(11 * PAGE), image], check=True)
    assert runs(image) == RUNS[:2]


def test_allocating_stores_pages_of_zeros_where_there_are_none(image: Path) -> None:
    before = image.read_bytes()
    with opened(image) as fd:
        fallocate(fd, 0, 5 * PAGE + 1, 5 * PAGE)
        fallocate(fd, KEEP_SIZE, 63 * PAGE, PAGE)
        assert runs(image) == [(2, 11), (40, 51), (63, 64)]
        assert image.read_bytes() == before
        for mode in 0, KEEP_SIZE:
            with raises_errno(errno.EFBIG):
                fallocate(fd, mode, 60 * PAGE, 5 * PAGE)
        for mode in ZERO_RANGE, COLLAPSE_RANGE:
            with raises_errno(errno.EOPNOTSUPP):
                fallocate(fd, mode, 0, PAGE)
    assert runs(image) == [(2, 11), (40, 51), (63, 64)]
    with opened(image.parent / "3") as fd, raises_errno(errno.EOPNOTSUPP):
        fallocate(fd, 0, 0, PAGE)


def test_allocating_more_than_there_is_room_for_stores_nothing(mountpoint: Path) -> None:
    with Mount(mountpoint, f"size={20 * PAGE},backup_size={64 * PAGE}"):
        (mountpoint / "a").mkdir()
        (mountpoint / "a/9").touch()
        with opened(mountpoint / "a/.image") as fd, raises_errno(errno.ENOSPC):
            fallocate(fd, 0, 0, 40 * PAGE)
        assert runs(mountpoint / "a/.image") == [(8, 9)]
