"""C25: what is read through the kernel's page cache is what was stored last, and nothing of a page that was dropped."""

import contextlib
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from harness import Mount, opened, set_attribute
from ttmfs.recovery.state import CACHED

PAGE = os.sysconf("SC_PAGE_SIZE")
OLD, NEW = b"o" * PAGE, b"n" * PAGE


def through_pipe(transfer: Callable[[int], int]) -> bytes:
    """The page that a system call moves into a pipe."""
    reads, writes = os.pipe()
    with open(reads, "rb") as pipe:
        try:
            assert transfer(writes) == PAGE
        finally:
            os.close(writes)
        return pipe.read()


def by_sendfile(path: Path, offset: int) -> bytes:
    with opened(path, os.O_RDONLY) as fd:
        return through_pipe(partial(_sendfile, fd, offset))


def by_splice(path: Path, offset: int) -> bytes:
    with opened(path, os.O_RDONLY) as fd:
        return through_pipe(lambda pipe: os.splice(fd, pipe, PAGE, offset))


def by_private_mapping(path: Path, offset: int) -> bytes:
    with (
        opened(path, os.O_RDONLY) as fd,
        mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=offset) as mapped,
    ):
        return mapped[:]


WAYS = {"sendfile": by_sendfile, "splice": by_splice, "mapping": by_private_mapping}


def write(path: Path, offset: int, data: bytes) -> None:
    with opened(path) as fd:
        assert os.pwrite(fd, data, offset) == len(data)


CHANGES: dict[str, tuple[Callable[[Path], object], bytes | None]] = {
    "write of the page": (lambda a: write(a / "3", 0, NEW), NEW),
    "write of the image": (lambda a: write(a / ".image", 2 * PAGE, NEW), NEW),
    "durable write": (lambda a: _write_durably(a / "3"), NEW),
    "truncation of the page": (lambda a: os.truncate(a / "3", 0), bytes(PAGE)),
    "truncation of the image": (lambda a: os.truncate(a / ".image", 0), None),
    "unlink": (lambda a: (a / "3").unlink(), None),
    "bulk drop": (lambda a: set_attribute(a, "drop", "1-9"), None),
}
"""A change, and what page 3 then is; None: it is absent."""


def _write_durably(path: Path) -> None:
    with opened(path) as fd:
        assert os.pwritev(fd, [NEW], 0, os.RWF_DSYNC) == PAGE


@pytest.mark.parametrize("way", WAYS)
def test_c25_a_change_shows_in_reads_through_the_page_cache(mount: Mount, way: str) -> None:
    for make, expected in CHANGES.values():
        check(mount, WAYS[way], make, expected)


def test_c25_a_change_after_a_kill_shows_in_reads_through_the_page_cache(mount: Mount) -> None:
    """The next daemon knows what the kernel has."""
    mount.expect_restarts()
    for make, expected in CHANGES.values():
        check(mount, by_sendfile, make, expected, mount.kill)


def check(
    mount: Mount,
    read: Callable[[Path, int], bytes],
    change: Callable[[Path], object],
    expected: bytes | None,
    before: Callable[[], object] = lambda: None,
) -> None:
    a = mount.path / "a"
    a.mkdir()
    with contextlib.ExitStack() as stack:
        with opened(a / ".image") as image:
            os.pwrite(image, OLD * 9, 0)
        # Held open, or the next open(2) would have the kernel forget what it has.
        for name in "3", ".image":
            stack.enter_context(opened(a / name, os.O_RDONLY))
        assert read(a / "3", 0) == OLD
        assert read(a / ".image", 2 * PAGE) == OLD
        before()
        change(a)
        assert read(a / ".image", 2 * PAGE) == (expected or bytes(PAGE))
        if expected:
            assert read(a / "3", 0) == expected
        else:
            assert not (a / "3").exists()
    os.truncate(a / ".image", 0)
    a.rmdir()


def test_c25_a_descriptor_that_stays_open_shows_each_change(backup: Path) -> None:
    """The kernel's page cache is used between the changes: no open(2) has it forget anything."""
    (backup / "3").write_bytes(OLD)
    with opened(backup / "3") as fd, opened(backup / ".image") as image:
        for number in range(200):
            data = bytes([number]) * PAGE
            os.pwrite(image if number % 2 else fd, data, 2 * PAGE * (number % 2))
            for source, offset in (fd, 0), (image, 2 * PAGE):
                assert through_pipe(partial(_sendfile, source, offset)) == data


def _sendfile(source: int, offset: int, pipe: int) -> int:
    return os.sendfile(pipe, source, offset, PAGE)


def test_c25_more_files_than_are_noted_show_each_change(backup: Path) -> None:
    """The kernel forgets the one that was noted longest ago."""
    pages = CACHED + 50
    with contextlib.ExitStack() as stack:
        files = []
        for handle in range(1, pages + 1):
            (backup / str(handle)).write_bytes(OLD)
            files.append(stack.enter_context(opened(backup / str(handle))))
            assert by_sendfile(backup / str(handle), 0) == OLD
        for handle, fd in enumerate(files, 1):
            os.pwrite(fd, NEW, 0)
            assert by_sendfile(backup / str(handle), 0) == NEW
