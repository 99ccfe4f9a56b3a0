"""The six verbs and their plural forms, through the Python API. Every test runs in trio, on a real tmpfs."""

import functools
import itertools
import os
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio

import ttmfs
from ttmfs.errors import OutOfBounds
from ttmfs.linux import system_calls as linux
from ttmfs.linux.memory import Reserve

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGE_SIZES = (PAGE, 64 << 10, 2 << 20)


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        trio.run(functools.partial(test, **fixtures))

    return run


@pytest.fixture(params=PAGE_SIZES, ids=["4k", "64k", "2m"])
def page_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def page(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def write_round(pool: ttmfs.Pool, offset: int, data: bytes) -> None:
    """Write to the backup "a" around the API, as a process with .shmem open can."""
    fd = os.open(pool.files.path("a"), os.O_RDWR)
    os.pwrite(fd, data, offset)
    os.close(fd)


@in_trio
async def test_c1_c2_the_caller_chooses_the_index_and_the_handle_is_one_more(page_size: int) -> None:
    async with ttmfs.open_pool(size=16 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a")
        for idx in 3, 0, 15, 3:
            assert await backup.backup_page(page(page_size, idx), idx) == idx + 1
        assert backup.pages == 3


@in_trio
async def test_c2_backing_up_the_same_index_overwrites(page_size: int) -> None:
    async with ttmfs.open_pool(size=4 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a")
        handles = [await backup.backup_page(page(page_size, seed), 2) for seed in range(3)]
        assert handles == [3, 3, 3]
        copy = bytearray(page_size)
        await backup.copy_page(copy, 3)
        assert copy == page(page_size, 2)


@in_trio
async def test_c3_a_failure_part_way_gives_a_short_count(page_size: int) -> None:
    async with ttmfs.open_pool(size=4 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a", size=20 * page_size)
        pages = np.frombuffer(page(6 * page_size, 1), np.uint8).reshape(6, page_size)
        handles = await backup.backup_pages(pages, 2)
        assert handles.tolist() == [3, 4, 5, 6]
        assert handles.dtype == np.uint64
        with pytest.raises(ttmfs.NoRoom):
            await backup.backup_pages(pages, 7)
        copy = np.zeros((4, page_size), np.uint8)
        await backup.copy_pages(copy, handles)
        assert (copy == pages[:4]).all()
        assert backup.pages == 4, "no page was stored in part"


@in_trio
async def test_c4_the_caller_can_reuse_the_source_at_once() -> None:
    async with ttmfs.open_pool(size=PAGE) as pool:
        backup = await pool.create("a")
        source = bytearray(page(PAGE, 1))
        await backup.backup_page(source, 0)
        source[:] = bytes(PAGE)
        copy = bytearray(PAGE)
        await backup.copy_page(copy, 1)
        assert copy == page(PAGE, 1)


@in_trio
async def test_c5_writeback_changes_no_result() -> None:
    async with ttmfs.open_pool(size=2 * PAGE) as pool:
        backup = await pool.create("a", size=4 * PAGE)
        assert await backup.backup_page(page(PAGE, 1), 0, writeback=True) == 1
        await backup.backup_page(page(PAGE, 1), 1, writeback=True)
        with pytest.raises(ttmfs.NoRoom):
            await backup.backup_page(page(PAGE, 1), 2, writeback=True)


@in_trio
async def test_c6_a_failed_backup_changes_nothing(page_size: int) -> None:
    async with ttmfs.open_pool(size=3 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a", size=10 * page_size)
        for idx in range(3):
            await backup.backup_page(page(page_size, idx), idx)
        with pytest.raises(ttmfs.NoRoom):
            await backup.backup_page(page(page_size, 9), 5)
        assert list(backup.file.extents()) == [(0, 3)]
        assert pool.room().stored == 3 * page_size
        await backup.backup_page(page(page_size, 7), 1)  # what is there can be overwritten in a full pool
        copy = bytearray(page_size)
        for handle, seed in (1, 0), (2, 7), (3, 2):
            await backup.copy_page(copy, handle)
            assert copy == page(page_size, seed)


@in_trio
async def test_c6_a_partly_stored_page_is_overwritten_whole_or_not_at_all() -> None:
    """Through .shmem a process can store 4 KiB of a 64 KiB page. The page exists, and its rest reads as zeros."""
    size = 64 << 10
    async with ttmfs.open_pool(size=2 * size, page_size=size) as pool:
        backup = await pool.create("a", size=4 * size)
        write_round(pool, size + 2 * PAGE, b"x" * PAGE)
        copy = bytearray(size)
        await backup.copy_page(copy, 2)
        assert copy == bytes(2 * PAGE) + b"x" * PAGE + bytes(13 * PAGE)
        await backup.backup_page(page(size, 0), 0)
        with pytest.raises(ttmfs.NoRoom):
            await backup.backup_page(page(size, 2), 2)
        await backup.backup_page(page(size, 1), 1)
        assert pool.room().free == 0
        with pytest.raises(ttmfs.NoRoom):
            await backup.backup_page(page(size, 3), 3)
        await backup.copy_page(copy, 2)
        assert copy == page(size, 1)


@in_trio
async def test_c8_copying_does_not_consume(page_size: int) -> None:
    async with ttmfs.open_pool(size=page_size, page_size=page_size) as pool:
        backup = await pool.create("a")
        await backup.backup_page(page(page_size, 1), 0)
        for _ in range(3):
            copy = np.zeros(page_size, np.uint8)
            await backup.copy_page(copy, 1)
            assert copy.tobytes() == page(page_size, 1)


@in_trio
async def test_c9_a_cancelled_copy_can_be_repeated() -> None:
    async with ttmfs.open_pool(size=2 * PAGE) as pool:
        backup = await pool.create("a")
        handles = await backup.backup_pages(np.full((2, PAGE), 7, np.uint8), 0)
        copy = np.zeros((2, PAGE), np.uint8)
        with trio.CancelScope() as scope:
            scope.cancel()
            await backup.copy_page(copy[0], 1, intr=True)
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await backup.copy_pages(copy, handles, intr=True)
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await backup.copy_page(copy[0], 1)  # not asked to be interruptible
        assert copy.tolist() == [[7] * PAGE, [0] * PAGE]
        await backup.copy_pages(copy, handles, intr=True)
        assert (copy == 7).all()


@in_trio
async def test_c10_an_index_past_the_size_is_refused_by_every_verb(page_size: int) -> None:
    async with ttmfs.open_pool(size=8 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a", size=4 * page_size)
        pages = np.ones((2, page_size), np.uint8)
        for handle in 0, 5, 6, 2**40, 2**63, 2**64 - 1, -1:
            idx = handle - 1
            past = np.array([1, handle & (2**64 - 1)], np.uint64)
            for call in (
                backup.backup_page(pages[0], idx),
                backup.backup_pages(pages, idx),
                backup.copy_page(bytearray(page_size), handle),
                backup.copy_pages(pages, past),
                backup.drop(handle),
                backup.drop_pages(past),
            ):
                with pytest.raises((ttmfs.InvalidArgument, ttmfs.PageAbsent)) as caught:
                    await call
                assert caught.type is ttmfs.InvalidArgument or "handle 1 holds no page" in str(caught.value)
        with pytest.raises(ttmfs.InvalidArgument):
            await backup.backup_pages(pages, 3)
        assert backup.pages == 0, "a range that lies past the end in part is refused whole"


@in_trio
async def test_c11_a_handle_without_a_page_is_absent(page_size: int) -> None:
    async with ttmfs.open_pool(size=8 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a")
        await backup.backup_page(page(page_size, 1), 1)
        copy = bytearray(b"\7" * page_size)
        for handle in 1, 3:
            with pytest.raises(ttmfs.PageAbsent):
                await backup.copy_page(copy, handle)
        rows = np.zeros((3, page_size), np.uint8)
        with pytest.raises(ttmfs.PageAbsent, match="handle 3"):
            await backup.copy_pages(rows, np.array([2, 3, 4], np.uint64))
        assert copy == b"\7" * page_size
        assert backup.pages == 1, "looking for a page has made none"


@in_trio
async def test_c12_drop_releases_that_page_alone_and_is_idempotent(page_size: int) -> None:
    async with ttmfs.open_pool(size=8 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a")
        handles = await backup.backup_pages(np.full((8, page_size), 5, np.uint8), 0)
        before = backup.file.stat().st_blocks
        for _ in range(2):
            await backup.drop(3)
            assert backup.file.stat().st_blocks == before - page_size // 512
            assert list(backup.file.extents()) == [(0, 2), (3, 8)]
        await backup.drop_pages(handles[4:])
        assert list(backup.file.extents()) == [(0, 2), (3, 4)]
        assert pool.room().stored == 3 * page_size


@in_trio
async def test_c13_fini_releases_all_pages_and_later_operations_are_refused(page_size: int) -> None:
    async with ttmfs.open_pool(size=4 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a")
        handles = await backup.backup_pages(np.full((4, page_size), 5, np.uint8), 0)
        await backup.fini()
        assert pool.room().stored == 0
        assert await pool.names() == []
        rows = np.zeros((4, page_size), np.uint8)
        for later in (
            backup.backup_page(rows[0], 0),
            backup.backup_pages(rows, 0),
            backup.copy_page(rows[0], 1),
            backup.copy_pages(rows, handles),
            backup.drop(1),
            backup.drop_pages(handles),
            backup.fini(),
        ):
            with pytest.raises(ttmfs.BackupEnded):
                await later
        for attribute in "name", "size", "pages", "resident", "swapped":
            with pytest.raises(ttmfs.BackupEnded):
                getattr(backup, attribute)
        again = await pool.create("a")
        with pytest.raises(ttmfs.BackupEnded):  # a new backup of the old name is another backup
            await backup.copy_page(rows[0], 1)
        await again.backup_page(rows[0], 0)


@in_trio
async def test_c16_backups_exceed_neither_their_size_nor_the_budget(page_size: int) -> None:
    async with ttmfs.open_pool(size=6 * page_size, page_size=page_size) as pool:
        backups = [await pool.create(name, size=4 * page_size) for name in "ab"]
        stored = 0
        for idx, backup in itertools.product(range(4), backups):
            try:
                await backup.backup_page(page(page_size, idx), idx)
                stored += 1
            except ttmfs.NoRoom:
                assert stored == 6
        with pytest.raises(ttmfs.InvalidArgument):
            await backups[0].backup_page(page(page_size, 0), 4)
        assert pool.room().stored == 6 * page_size == sum(b.pages for b in backups) * page_size


@in_trio
async def test_c16_storing_leaves_the_reserve_free() -> None:
    async with ttmfs.open_pool(size=64 * PAGE, reserve=1 << 60) as pool:
        backup = await pool.create("a")
        with pytest.raises(ttmfs.NoRoom, match="reserve"):
            await backup.backup_page(page(PAGE, 0), 0)
        write_round(pool, 0, b"x" * PAGE)
        await backup.backup_page(page(PAGE, 1), 0)  # takes no more room
        assert pool.room().available == 0


@in_trio
async def test_c16_the_reserve_counts_whole_pages() -> None:
    """One byte creates a page of any size. The reserve has to admit all of it."""
    size = 2 << 20
    async with ttmfs.open_pool(size=64 * size, page_size=size) as pool:
        backup = await pool.create("a")
        asked: list[int] = []
        admits = Reserve.admits
        try:
            Reserve.admits = lambda self, size: asked.append(size) or admits(self, size)  # type: ignore[func-returns-value,method-assign]
            backup.file.create_page(0)
            backup.file.write(3 * size - 1, b"ab")
        finally:
            Reserve.admits = admits  # type: ignore[method-assign]
        assert asked == [size, 2 * size]
        assert pool.room().stored == 3 * size


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"x",
        bytes(PAGE - 1),
        bytes(PAGE + 1),
        np.zeros((2, PAGE), np.uint8),
        np.zeros(2 * PAGE, np.uint8)[::2],
        "text",
        7,
    ],
    ids=["empty", "one", "short", "long", "two", "strided", "text", "int"],
)
@in_trio
async def test_a_page_is_a_contiguous_buffer_of_page_size(wrong: Any) -> None:
    async with ttmfs.open_pool(size=4 * PAGE) as pool:
        backup = await pool.create("a")
        await backup.backup_page(bytes(PAGE), 0)
        for call in backup.backup_page(wrong, 1), backup.copy_page(wrong, 1):
            with pytest.raises(ttmfs.InvalidArgument):
                await call
        assert backup.pages == 1


@in_trio
async def test_arrays_of_another_shape_or_type_are_refused() -> None:
    async with ttmfs.open_pool(size=8 * PAGE) as pool:
        backup = await pool.create("a")
        handles = await backup.backup_pages(np.ones((2, PAGE), np.uint8), 0)
        for wrong in (np.ones((2, PAGE), np.int8), np.ones(PAGE, np.uint8), np.ones((2, PAGE - 1), np.uint8)):
            with pytest.raises(ttmfs.InvalidArgument):
                await backup.backup_pages(wrong, 0)  # type: ignore[arg-type]
            with pytest.raises(ttmfs.InvalidArgument):
                await backup.copy_pages(wrong, handles)  # type: ignore[arg-type]
        rows = np.zeros((2, PAGE), np.uint8)
        rows.flags.writeable = False
        with pytest.raises(ttmfs.InvalidArgument):
            await backup.copy_pages(rows, handles)
        with pytest.raises(ttmfs.InvalidArgument):
            await backup.copy_page(rows[0], 1)
        for wrong_handles in np.array([1, 2]), np.array([[1, 2]], np.uint64), [1, 2]:
            with pytest.raises(ttmfs.InvalidArgument):
                await backup.copy_pages(np.zeros((2, PAGE), np.uint8), wrong_handles)  # type: ignore[arg-type]


@in_trio
async def test_plural_forms_take_handles_in_any_order_and_strided_sources() -> None:
    async with ttmfs.open_pool(size=64 * PAGE) as pool:
        backup = await pool.create("a")
        pages = np.random.default_rng(1).integers(0, 256, (32, PAGE), np.uint8)
        assert (await backup.backup_pages(pages[::2], 0)).tolist() == list(range(1, 17))
        handles = np.array([5, 6, 7, 1, 16, 15, 5], np.uint64)
        copy = np.zeros((7, PAGE), np.uint8)
        await backup.copy_pages(copy, handles)
        assert (copy == pages[::2][handles - 1]).all()
        assert (await backup.backup_pages(pages[:0], 3)).tolist() == []
        await backup.copy_pages(copy[:0], handles[:0])
        await backup.drop_pages(handles)
        assert [tuple(run) for run in backup.file.extents()] == [(1, 4), (7, 14)]


@in_trio
async def test_residency_is_counted_in_pages(page_size: int) -> None:
    async with ttmfs.open_pool(size=8 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a")
        await backup.backup_pages(np.ones((3, page_size), np.uint8), 2)
        assert (backup.pages, backup.resident, backup.swapped) == (3, 3, 0)
        assert backup.size == 8 * page_size


# --- what the mount uses: ranges of bytes ---


@in_trio
async def test_writing_a_range_stores_every_page_it_touches_whole(page_size: int) -> None:
    async with ttmfs.open_pool(size=8 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a")
        assert backup.file.write(2 * page_size - 3, b"abcdef") == 6
        assert list(backup.file.extents()) == [(1, 3)]
        assert pool.room().stored == 2 * page_size
        assert backup.file.read(2 * page_size - 4, 8) == b"\0abcdef\0"
        assert backup.file.write(8 * page_size - 2, b"abcd") == 2, "short at the end"
        for offset in 8 * page_size, 9 * page_size, 2**62:
            with pytest.raises(OutOfBounds):
                backup.file.write(offset, b"x")
        assert backup.file.read(8 * page_size - 1, 10) == b"b"
        assert backup.file.read(2**62, 10) == b""


@in_trio
async def test_truncating_drops_pages_past_the_end_and_zeroes_the_rest(page_size: int) -> None:
    async with ttmfs.open_pool(size=8 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a")
        await backup.backup_pages(np.full((8, page_size), 255, np.uint8), 0)
        await backup.file.truncate(5 * page_size + 7)
        assert list(backup.file.extents()) == [(0, 6)]
        assert backup.file.read(5 * page_size, page_size) == b"\xff" * 7 + bytes(page_size - 7)
        assert backup.file.stat().st_blocks * 512 == 6 * page_size
        await backup.drop(2)
        await backup.file.truncate(page_size + 7)
        assert list(backup.file.extents()) == [(0, 1)], "the page that it ends in is made by no truncation"
        await backup.file.truncate(0)
        assert (backup.pages, backup.size) == (0, 8 * page_size)
        with pytest.raises(OutOfBounds):
            await backup.file.truncate(8 * page_size + 1)


@in_trio
async def test_a_backup_always_grows_but_shrinks_only_over_holes(page_size: int) -> None:
    async with ttmfs.open_pool(size=8 * page_size, page_size=page_size) as pool:
        backup = await pool.create("a", size=4 * page_size)
        await backup.backup_page(bytes(page_size), 2)
        backup.file.resize(100 * page_size)
        backup.file.resize(3 * page_size)
        with pytest.raises(ttmfs.InvalidArgument, match="drop them first"):
            backup.file.resize(2 * page_size)
        assert (backup.size, backup.pages) == (3 * page_size, 1)


@in_trio
async def test_a_file_cut_short_from_outside_causes_no_crash() -> None:
    """A process with .shmem open can cut the file short at any time."""
    async with ttmfs.open_pool(size=8 * PAGE) as pool:
        backup = await pool.create("a")
        await backup.backup_pages(np.ones((8, PAGE), np.uint8), 0)
        os.truncate(pool.files.path("a"), 2 * PAGE + 100)
        with pytest.raises(ttmfs.InvalidArgument):
            await backup.copy_page(bytearray(PAGE), 5)
        assert list(backup.file.extents()) == [(0, 2)], "a page that is cut in two is none"
        with pytest.raises(ttmfs.InvalidArgument):
            await backup.backup_page(bytes(PAGE), 2)


@in_trio
async def test_allocated_but_unwritten_space_is_not_a_page() -> None:
    async with ttmfs.open_pool(size=8 * PAGE) as pool:
        backup = await pool.create("a")
        fd = os.open(pool.files.path("a"), os.O_RDWR)
        linux.allocate_range(fd, 0, 2 * PAGE)
        os.close(fd)
        assert list(backup.file.extents()) == []
        with pytest.raises(ttmfs.PageAbsent):
            await backup.copy_page(bytearray(PAGE), 1)
        await pool.remove("a")
        assert pool.room().stored == 0
