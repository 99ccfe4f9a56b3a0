"""A store with page maps, on a directory of this machine: what fails, waits or is killed leaves its pages as they were.

What it does on Ceph, tests/mount/test_scale_out.py shows.
"""

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import ttmfs
from ttmfs.errors import BackupExists, NoRoom, PageAbsent, StoreFailed
from ttmfs.model.pool import Pool
from ttmfs.options import Options
from ttmfs.stores import backup_files, distributed, mapped_file, page_map
from ttmfs.stores.directory_record import FILE
from ttmfs.stores.distributed import Distributed

PAGE = os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def opened(directory: Path, **options: Any) -> Iterator[Pool]:
    """The pool of a store with maps, whatever filesystem the directory lies on."""
    parsed = Options(store=str(directory), **{"backup_size": 64 * PAGE, "store_timeout": 1, **options})
    pool = Pool(Distributed.open(str(directory), parsed), parsed)
    try:
        yield pool
    finally:
        pool.close()


def content(backup: int, handle: int) -> bytes:
    return f"{backup} {handle}".encode().ljust(PAGE, b".")


async def copied(backup: ttmfs.Backup, handle: int) -> bytes:
    page = bytearray(PAGE)
    await backup.copy_page(page, handle)
    return bytes(page)


def is_clean(directory: Path) -> bool:
    found: bool = json.loads((directory / FILE).read_text())["clean"]
    return found


def failing(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """A function that fails with an errno, once, and before it does anything."""
    left = [number]

    def call(*arguments: Any) -> Any:
        if left:
            raise OSError(left.pop(), "as if")
        return function(*arguments)

    return call


class Slow:
    """A function that waits, where the filesystem would, until it is let go."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._go, self.waits = function, threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.waits.set()
        assert self._go.wait(30)
        return self._function(*arguments)

    def let_go(self) -> None:
        self._go.set()


async def timed_out(backup: ttmfs.Backup, page: bytes, monkeypatch: pytest.MonkeyPatch) -> Slow:
    """Store a page at handle 2, for which the filesystem takes too long. Returns what is still to be let go."""
    slow = Slow(mapped_file._store)
    with monkeypatch.context() as patched:
        patched.setattr(mapped_file, "_store", slow)
        with pytest.raises(StoreFailed, match="store_timeout"):
            await backup.backup_page(page, 1)
    return slow


def test_pages_of_more_backups_than_may_be_open_reach_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request waits for a thread while other requests open files, and with them close the ones used last."""
    monkeypatch.setattr(backup_files, "OPEN_FILES", 2)

    async def store(backup: ttmfs.Backup, number: int) -> None:
        for handle in range(1, 20):
            await backup.backup_page(content(number, handle), handle - 1)

    async def main() -> None:
        with opened(tmp_path) as pool:
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(store, await pool.create(str(number)), number)
        with opened(tmp_path) as pool:
            for number in range(8):
                backup = await pool.open(str(number))
                assert [await copied(backup, handle) for handle in range(1, 20)] == [
                    content(number, handle) for handle in range(1, 20)
                ]

    trio.run(main)


def test_a_drop_that_failed_and_was_repeated_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with opened(tmp_path) as pool:
            backup = await pool.create("a")
            await backup.backup_page(content(0, 2), 1)
            monkeypatch.setattr(mapped_file, "_drop", failing(mapped_file._drop, errno.EIO))
            with pytest.raises(StoreFailed):
                await backup.drop(2)
            await backup.drop(2)
            await backup.file.sync(0, PAGE)
        with opened(tmp_path) as pool:
            assert (await pool.open("a")).pages == 0

    trio.run(main)


def test_a_write_that_came_too_late_does_not_bring_back_what_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with opened(tmp_path) as pool:
            backup = await pool.create("a")
            slow = await timed_out(backup, content(0, 2), monkeypatch)
            with pytest.raises(StoreFailed, match="earlier request"):
                await backup.drop(2)
            slow.let_go()
            await backup.drop(2)
            with pytest.raises(PageAbsent):
                await copied(backup, 2)
        with opened(tmp_path) as pool:
            assert (await pool.open("a")).pages == 0

    trio.run(main)


def test_a_store_with_a_write_in_flight_is_not_closed_as_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with opened(tmp_path) as pool:
            slow = await timed_out(await pool.create("a"), b"S" * PAGE, monkeypatch)
        assert not is_clean(tmp_path)
        slow.let_go()
        await trio.sleep(0.2)
        with opened(tmp_path) as pool:
            backup = await pool.open("a")
            assert await backup.file.read_out(PAGE, PAGE) in (bytes(PAGE), b"S" * PAGE)
            if not backup.pages:
                await backup.file.create_page(1)  # type: ignore[misc]
                assert await copied(backup, 2) == bytes(PAGE)
        assert is_clean(tmp_path)

    trio.run(main)


@pytest.mark.parametrize("ro", [False, True])
def test_a_foreign_file_keeps_its_pages_if_its_map_cannot_be_made_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ro: bool
) -> None:
    with opened(tmp_path):
        pass
    (tmp_path / "foreign").write_bytes(b"x" * 4 * PAGE)

    async def main() -> None:
        if ro:
            with opened(tmp_path, ro=True) as pool:
                assert (await pool.open("foreign")).pages == 4
        else:
            monkeypatch.setattr(page_map, "write", failing(page_map.write, errno.ENOSPC))
            with opened(tmp_path) as pool, contextlib.suppress(NoRoom):
                assert (await pool.open("foreign")).pages == 4
        assert ro == (sorted(os.listdir(tmp_path)) == [FILE, "foreign"])
        with opened(tmp_path) as pool:
            assert (await pool.open("foreign")).pages == 4
        assert (tmp_path / "foreign").read_bytes() == b"x" * 4 * PAGE

    trio.run(main)


def test_what_is_stored_counts_from_the_beginning(tmp_path: Path) -> None:
    async def main() -> None:
        with opened(tmp_path, size=8 * PAGE) as pool:
            backup = await pool.create("a")
            for idx in range(8):
                await backup.backup_page(content(0, idx), idx)
        with opened(tmp_path, size=8 * PAGE) as pool:
            assert pool.room().free == 0
            with pytest.raises(NoRoom):
                await (await pool.open("a")).backup_page(content(0, 9), 9)

    trio.run(main)


def test_an_fsync_that_nobody_waited_for_fails_the_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_late(_: object, __: object) -> None:
        time.sleep(1.5)
        raise OSError(errno.EIO, "as if")

    async def main() -> None:
        with opened(tmp_path) as pool:
            backup = await pool.create("a")
            with monkeypatch.context() as patched:
                patched.setattr(distributed.Distributed, "sync_held", fails_late)
                with pytest.raises(StoreFailed, match="store_timeout"):
                    await backup.file.sync(0, PAGE)
                await trio.sleep(1)
            with pytest.raises(StoreFailed, match="it failed before"):
                await backup.file.sync(0, PAGE)

    trio.run(main)


def test_no_map_is_left_of_backups_that_were_not_made_or_have_ended(tmp_path: Path) -> None:
    async def main() -> None:
        with opened(tmp_path) as pool:
            backup = await pool.create("a")
            for _ in range(3):
                with pytest.raises(BackupExists):
                    await pool.create("a")
            assert len([name for name in os.listdir(tmp_path) if name.startswith(".ttmfs-map-")]) == 1
            await backup.fini()
            (tmp_path / ".ttmfs-map-12345").write_bytes(b"\xff")
        with opened(tmp_path):
            assert os.listdir(tmp_path) == [FILE]

    trio.run(main)
