"""Backups by name, and the room for them."""

import os
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import trio

import ttmfs

PAGE = os.sysconf("SC_PAGE_SIZE")


def with_pool(test: Callable[[ttmfs.Pool], Awaitable[None]]) -> Callable[[], None]:
    async def run_test() -> None:
        async with ttmfs.open_pool(size=64 * PAGE, backup_size=16 * PAGE, nr_inodes=50) as pool:
            await test(pool)

    def run() -> None:
        trio.run(run_test)

    run.__name__ = test.__name__
    return run


@with_pool
async def test_c14_a_new_backup_has_its_own_size_and_no_page(pool: ttmfs.Pool) -> None:
    assert (await pool.create("a")).size == 16 * PAGE
    assert (await pool.create("b", size=1 << 40)).size == 1 << 40
    assert (await pool.create("c", size=1)).size == PAGE, "whole pages"
    assert pool.room().stored == 0
    assert await pool.names() == ["a", "b", "c"]


@with_pool
async def test_impossible_names_are_refused(pool: ttmfs.Pool) -> None:
    for name in "", ".", "..", ".a", "a/b", "a\0b":
        with pytest.raises(ttmfs.InvalidArgument):
            await pool.create(name)
    with pytest.raises(ttmfs.NameTooLong):
        await pool.create("é" * 128)
    for size in 0, -1, 2**63, "1m", 1.5:
        with pytest.raises(ttmfs.InvalidArgument):
            await pool.create("a", size=size)  # type: ignore[arg-type]
    with pytest.raises(ttmfs.BackupAbsent):
        await pool.open("")
    assert await pool.names() == []
    await pool.create("é" * 127 + "a")
    await pool.create(os.fsdecode(b"\xff\xfe"))
    await pool.create("with space\nand newline")
    assert len(await pool.names()) == 3


@with_pool
async def test_open_finds_the_created_backup(pool: ttmfs.Pool) -> None:
    made = await pool.create("a", mode=0o700)
    await made.backup_page(b"x" * PAGE, 3)
    found = await pool.open("a")
    copy = bytearray(PAGE)
    await found.copy_page(copy, 4)
    assert copy == b"x" * PAGE
    assert found.file.stat().st_mode & 0o7777 == 0o700
    with pytest.raises(ttmfs.BackupExists):
        await pool.create("a")
    with pytest.raises(ttmfs.BackupAbsent):
        await pool.open("b")


@with_pool
async def test_renaming_keeps_a_backup_and_replaces_only_an_empty_one(pool: ttmfs.Pool) -> None:
    a, b = await pool.create("a"), await pool.create("b")
    await b.backup_page(b"x" * PAGE, 0)
    with pytest.raises(ttmfs.BackupExists):
        await pool.rename("a", "b")
    with pytest.raises(ttmfs.BackupNotEmpty):
        await pool.rename("a", "b", replace=True)
    await pool.rename("b", "a", replace=True)
    assert (b.name, await pool.names()) == ("a", ["a"])
    with pytest.raises(ttmfs.BackupEnded):
        await a.drop(1)
    await pool.rename("a", "a", replace=True)
    assert pool.room().backups == 1
    await pool.rename("a", "c")
    with pytest.raises(ttmfs.BackupAbsent):
        await pool.rename("a", "d")
    with pytest.raises(ttmfs.InvalidArgument):
        await pool.rename("c", ".d")
    assert (await pool.open("c")).pages == 1


@with_pool
async def test_only_an_empty_backup_is_removed(pool: ttmfs.Pool) -> None:
    backup = await pool.create("a")
    await backup.backup_page(bytes(PAGE), 0)
    with pytest.raises(ttmfs.BackupNotEmpty):
        await pool.remove("a")
    await backup.drop(1)
    await pool.remove("a")
    with pytest.raises(ttmfs.BackupAbsent):
        await pool.remove("a")


@with_pool
async def test_room_is_the_rest_of_the_budget(pool: ttmfs.Pool) -> None:
    backup = await pool.create("a")
    await backup.backup_pages(np.ones((10, PAGE), np.uint8), 0)
    room = pool.room()
    assert (room.size, room.stored, room.free) == (64 * PAGE, 10 * PAGE, 54 * PAGE)
    assert (room.backups, room.files, room.files_free) == (1, 50, 48)
    assert room.available == room.free
    pool.resize(20 * PAGE)
    assert pool.room().free == 10 * PAGE
    with pytest.raises(ttmfs.InvalidArgument):
        pool.resize(9 * PAGE)
    with pytest.raises(ttmfs.InvalidArgument):
        pool.resize(0)


def test_impossible_options_are_refused() -> None:
    async def check() -> None:
        for options in (
            {"page_size": 5000},
            {"page_size": 4 << 20},
            {"page_size": 2048},
            {"nonsense": 1},
            {"size": -5},  # tmpfs would take what that rounds to as no limit
            {"size": "1g"},
            {"reserve": -1},
            {"nr_inodes": 1},
        ):
            with pytest.raises(ttmfs.InvalidArgument):
                async with ttmfs.open_pool(**options):
                    pass

    trio.run(check)
