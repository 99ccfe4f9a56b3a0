"""A full disk: with few free blocks, and scattered ones, a page is stored whole or not at all."""

import contextlib
import ctypes
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

import ttmfs
from stores import filesystem
from ttmfs.errors import NoRoom
from ttmfs.linux import system_calls as linux
from ttmfs.model.pool import Pool
from ttmfs.options import Options
from ttmfs.stores import make_store
from ttmfs.stores.page_file import finished

libc = ctypes.CDLL(None)

BLOCK = 4096
PAGES = 48  # that the tests use

SIZES = {"ext4": 32 << 20, "xfs": 320 << 20, "btrfs": 128 << 20}


@contextlib.contextmanager
def opened(directory: Path, page_size: int) -> "Iterator[Pool]":
    options = Options(store=str(directory), page_size=page_size, backup_size=2 * PAGES * page_size)
    with contextlib.closing(Pool(make_store(options), options)) as pool:
        yield pool


@contextlib.contextmanager
def full_disk(path: Path, kind: str) -> "Iterator[tuple[Path, Filler]]":
    """A disk with a directory for a store, and a file that fills the rest of it."""
    with filesystem(
        path, kind, SIZES[kind], options="-m 0" if kind == "ext4" else ""
    ) as disk:  # nothing for root alone
        (disk / "store").mkdir()
        with (disk / "filler").open("xb+", buffering=0) as file:
            yield disk / "store", Filler(file.fileno())


class Filler:
    """A file that takes all the room of a disk except some blocks."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = 0

    def fill(self) -> None:
        """Take all free space: of a large disk all but 64 MiB without writing, the rest by writing."""
        room = os.fstatvfs(self._fd)
        if (allocated := room.f_bavail * room.f_frsize - (64 << 20)) > 0:
            os.posix_fallocate(self._fd, 0, allocated)
            self._end = allocated
        step = 1 << 20
        while step >= BLOCK:
            try:
                self._end += os.pwrite(self._fd, b"x" * step, self._end)
                os.fsync(self._fd)
            except OSError:
                step //= 2

    def leave(self, blocks: int, chosen: random.Random) -> None:
        """Leave about a number of blocks free, scattered."""
        libc.syncfs(self._fd)
        for _ in range(100):
            room = os.fstatvfs(self._fd)
            missing = blocks - room.f_bavail * room.f_frsize // BLOCK
            if missing > 0:
                with contextlib.suppress(OSError):
                    linux.punch_hole(self._fd, chosen.randrange(self._end // BLOCK // 2) * 2 * BLOCK, BLOCK)
            elif missing < 0:
                try:
                    self._end += os.pwrite(self._fd, b"x" * BLOCK, self._end)
                    os.fsync(self._fd)
                except OSError:
                    return
            else:
                return


class Model:
    """What a backup must hold: every page that was stored, whole, and no other."""

    def __init__(self, backup: ttmfs.Backup) -> None:
        self.pages: dict[int, bytes] = {}
        self._backup, self._size = backup, backup.page_size

    async def do(self, chosen: random.Random) -> str:
        """Do one random operation, which may find no room. Returns what it was."""
        idx, verb = chosen.randrange(PAGES), chosen.choice(["page", "page", "pages", "bytes", "create", "drop"])
        offset, data = idx * self._size, b""
        if verb == "page":
            data = chosen.randbytes(self._size)
        elif verb == "pages":
            data = chosen.randbytes(chosen.randrange(2, 5) * self._size)
        elif verb == "bytes":
            offset, data = offset + chosen.randrange(self._size), chosen.randbytes(chosen.randrange(1, 2 * self._size))
        try:
            if verb == "drop":
                await finished(self._backup.file.drop_range(idx, idx + 1))
                self.pages.pop(idx, None)
            elif verb == "create":
                await finished(self._backup.file.create_page(idx))
                self.pages.setdefault(idx, bytes(self._size))
            elif verb == "page":
                await self._backup.backup_page(data, idx)
                self._store(offset, data)
            else:
                self._store(offset, data[: await finished(self._backup.file.write(offset, data))])
        except NoRoom:
            pass
        return f"{verb} {idx}"

    def _store(self, offset: int, data: bytes) -> None:
        while data:
            idx, start = divmod(offset, self._size)
            part, data = data[: self._size - start], data[self._size - start :]
            old = self.pages.get(idx, bytes(self._size))
            self.pages[idx] = old[:start] + part + old[start + len(part) :]
            offset += len(part)

    def check(self, what: str) -> None:
        """Check that the backup holds what it must."""
        found = [idx for first, past in self._backup.file.extents() for idx in range(first, past)]
        assert found == sorted(self.pages), what
        for idx, page in self.pages.items():
            assert self._backup.file.read(idx * self._size, self._size) == page, (what, idx)
        assert self._backup.pages == len(self.pages), what


@pytest.mark.parametrize("page_size", [4 << 10, 16 << 10, 64 << 10])
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_c6_a_page_is_stored_whole_or_not_at_all_for_any_free_space(tmp_path: Path, kind: str, page_size: int) -> None:
    """(Not on btrfs: an overwrite there takes new blocks, and may find room for only half of it.)"""

    async def main(pool: Pool, filler: Filler) -> None:
        backup = await pool.create("a")
        model, chosen = Model(backup), random.Random(page_size)
        filler.fill()
        for _ in range(50):
            filler.leave(chosen.randrange(3 * page_size // BLOCK), chosen)
            for _ in range(6):
                model.check(await model.do(chosen))

    with full_disk(tmp_path / "disk", kind) as (directory, filler), opened(directory, page_size) as pool:
        trio.run(main, pool, filler)


@pytest.mark.parametrize("kind", SIZES)
def test_c6_an_absent_page_that_was_read_stays_absent(tmp_path: Path, kind: str) -> None:
    """A read of a hole fills the page cache, which looks like a page once the disk has allocated some of it."""

    async def main(pool: Pool, filler: Filler) -> None:
        backup = await pool.create("a")
        await backup.backup_page(b"1" * page_size, 0)
        backup.file.read(0, 4 * page_size)
        filler.fill()
        filler.leave(page_size // BLOCK // 2, random.Random(1))
        for store in (
            partial(backup.file.write, 2 * page_size, b"x" * page_size),
            partial(backup.file.write, 2 * page_size + 5, b"x"),
            partial(backup.file.create_page, 2),
        ):
            with pytest.raises(NoRoom):
                await finished(store())
            assert list(backup.file.extents()) == [(0, 1)]
            assert backup.pages == 1
        assert backup.file.read(0, 4 * page_size) == b"1" * page_size + bytes(3 * page_size)

    page_size = 64 << 10
    with full_disk(tmp_path / "disk", kind) as (directory, filler), opened(directory, page_size) as pool:
        trio.run(main, pool, filler)


KILLED = """
import os, signal, sys
import trio
from ttmfs.linux import system_calls as linux
from ttmfs.options import Options
from ttmfs.model.pool import Pool
from ttmfs.stores import make_store
from ttmfs.stores.page_file import finished

allocate_range = linux.allocate_range

def killed(*range):
    try:
        allocate_range(*range)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    backup = await pool.open("a")
    backup.file.read(0, 4 * pool.page_size)
    linux.allocate_range = killed
    await finished(backup.file.write(2 * pool.page_size, b"x" * pool.page_size))

options = Options(store=sys.argv[1], page_size=64 << 10)
pool = Pool(make_store(options), options)
trio.run(main)
"""


@pytest.mark.parametrize("blocks", [8, 200], ids=["no room", "room"])
@pytest.mark.parametrize("kind", SIZES)
def test_c6_a_daemon_killed_between_allocation_and_write_leaves_no_page(tmp_path: Path, kind: str, blocks: int) -> None:
    async def make() -> None:
        backup = await pool.create("a")
        await backup.backup_page(b"1" * pool.page_size, 0)

    async def look() -> None:
        backup = await pool.open("a")
        assert list(backup.file.extents()) == [(0, 1)]
        assert backup.pages == 1

    with full_disk(tmp_path / "disk", kind) as (directory, filler):
        with opened(directory, 64 << 10) as pool:
            trio.run(make)
        filler.fill()
        filler.leave(blocks, random.Random(2))
        done = subprocess.run([sys.executable, "-c", KILLED, directory], check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
        with opened(directory, 64 << 10) as pool:
            trio.run(look)
