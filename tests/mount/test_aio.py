"""The client for event loops, with asyncio and with trio, on a real mount: what it adds to the synchronous client."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from harness import Mount, names, set_attribute
from stores import slow_swap
from ttmfs import aio
from ttmfs.errors import BackupAbsent, BackupClosed, BackupEnded, BackupExists, NoRoom, PageAbsent

PAGE = os.sysconf("SC_PAGE_SIZE")
NOISE = np.random.default_rng(5).integers(0, 256, (1024, PAGE), np.uint8)
WAYS = {"natively": True, "through the mount": False}


Loop = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "trio"])
def loop(request: pytest.FixtureRequest) -> Loop:
    """A function that runs a coroutine on an event loop."""
    return lambda coroutine: anyio.run(lambda: coroutine, backend=request.param)


@pytest.mark.parametrize("way", WAYS)
def test_each_method_does_what_that_of_the_synchronous_client_does(shared: Mount, loop: Loop, way: str) -> None:
    path = shared.path / "a"

    async def main() -> None:
        async with await aio.Backup.create(path, 100 * PAGE - 1, mode=0o750, native=WAYS[way]) as backup:
            assert (backup.is_native, backup.page_size, backup.id) == (WAYS[way], PAGE, path.stat().st_ino)
            assert await backup.get_size() == 100 * PAGE
            assert await backup.get_path() == str(path)
            assert (await backup.status()).st_mode & 0o777 == 0o750
            await backup.chmod(0o700)
            await backup.resize(1024 * PAGE)
            handles = await backup.backup_pages(NOISE[:50], 3)
            assert handles.tolist() == list(range(4, 54))
            assert await backup.backup_page(NOISE[50], 0) == 1
            pages, page = np.empty((50, PAGE), np.uint8), bytearray(PAGE)
            await backup.copy_pages(pages, handles)
            await backup.copy_page(page, 1)
            assert (pages == NOISE[:50]).all()
            assert page == NOISE[50].tobytes()
            await backup.drop(1)
            await backup.drop_pages(handles[::2])
            await backup.writeback()
            assert (await backup.handles()).tolist() == handles[1::2].tolist()
            assert (await backup.residency()).pages == 25, "another test may have made swap"
            if backup.is_native:
                assert (await backup.residency_of(0, 5)).pages == 1
            async with await aio.Backup.open(path, native=WAYS[way]) as another:
                await another.copy_page(page, 5)
                assert page == NOISE[1].tobytes()
            with pytest.raises(BackupClosed):
                await another.drop(5)
            await backup.fini()
        assert names(shared.path) == []

    loop(main())


def test_errors_are_those_of_the_synchronous_client_and_not_in_groups(shared: Mount, loop: Loop) -> None:
    async def main() -> None:
        with pytest.raises(BackupAbsent):
            await aio.Backup.open(shared.path / "a")
        backup = await aio.Backup.create(shared.path / "a", 64 * PAGE)
        with pytest.raises(BackupExists):
            await aio.Backup.create(shared.path / "a")
        with pytest.raises(PageAbsent):
            await backup.copy_page(bytearray(PAGE), 1)
        set_attribute(shared.path, "size", 2 * PAGE)
        assert len(await backup.backup_pages(NOISE[:3], 0)) == 2, "C3"
        with pytest.raises(NoRoom):
            await backup.backup_page(NOISE[0], 5)
        await backup.fini()
        with pytest.raises(BackupEnded):
            await backup.copy_page(bytearray(PAGE), 1)
        await backup.aclose()

    loop(main())


def test_many_tasks_share_a_backup_and_a_limiter(shared: Mount, loop: Loop) -> None:
    async def main() -> None:
        limiter = anyio.CapacityLimiter(2)
        most = 0

        async def work(backup: aio.Backup, number: int) -> None:
            nonlocal most
            for _ in range(3):
                pages = np.empty((10, PAGE), np.uint8)
                await backup.copy_pages(pages, await backup.backup_pages(NOISE[number : number + 10], 10 * number))
                most = max(most, limiter.borrowed_tokens)
                assert (pages == NOISE[number : number + 10]).all()

        async with await aio.Backup.create(shared.path / "a", limiter=limiter) as backup:
            async with anyio.create_task_group() as group:
                for number in range(100):
                    group.start_soon(work, backup, number)
            assert len(await backup.handles()) == 1000
            assert 0 < most <= 2

    loop(main())


def test_an_array_of_pages_is_evicted_and_restored(shared: Mount, loop: Loop) -> None:
    async def main() -> None:
        async with await aio.Backup.create(shared.path / "a", 64 * PAGE) as backup:
            array = await backup.page_array(8, first=3)
            for slot in range(len(array)):
                array[slot][:] = NOISE[slot]
            assert await array.backup(limit=5) == 5
            assert (array.sync.backed_up, array.sync.populated) == (5, 3)
            assert (await backup.handles()).tolist() == [4, 5, 6, 7, 8]
            assert await array.restore() == 5
            assert all((array[slot] == NOISE[slot]).all() for slot in range(8))
            assert await array.backup(purge=True) == 8
            await array.destroy()

    loop(main())


@pytest.mark.serial
@pytest.mark.parametrize("way", WAYS)
def test_c9_the_loop_goes_on_during_a_wait_for_swap_and_a_cancellation_ends_it(
    mountpoint: Path, tmp_path: Path, loop: Loop, way: str
) -> None:
    """64 reads of a quarter of a second each."""
    native = WAYS[way]

    async def main(mount: Mount) -> None:
        pages, untouched = np.full((512, PAGE), 0xEE, np.uint8), np.full((512, PAGE), 0xEE, np.uint8)
        async with await aio.Backup.create(mountpoint / "a", native=native) as backup:
            with slow_swap(os.getpid() if native else mount.pid, tmp_path) as slow:
                handles = await backup.backup_pages(NOISE[:512], 0)
                slow.push_out()
                start = time.monotonic()
                with anyio.move_on_after(0.5) as scope:
                    await backup.copy_pages(pages, handles)
                assert scope.cancelled_caught
                # This process's own memory may be in the slow swap, too, so turns of the loop tell nothing.
                assert time.monotonic() - start < 8, "the loop waited for the copy"
                given_up = pages.copy()
            assert (pages == given_up).all(), "what was given up is not written to the caller's memory later"
            assert (given_up[256:] == untouched[256:]).all()
            assert (await backup.residency()).pages == 512, "the pages stay"
            await backup.copy_pages(pages, handles)
            assert (pages == NOISE[:512]).all()

    with Mount(mountpoint, "size=64m") as mount:
        loop(main(mount))


@pytest.mark.serial
def test_a_cancellation_by_asyncio_itself_ends_a_copy_too(mountpoint: Path, tmp_path: Path) -> None:
    """task.cancel() and asyncio.wait_for() know nothing of anyio's scopes."""

    async def main(mount: Mount) -> None:
        pages = np.full((512, PAGE), 0xEE, np.uint8)
        async with await aio.Backup.create(mountpoint / "a", native=False) as backup:
            with slow_swap(mount.pid, tmp_path) as slow:
                handles = await backup.backup_pages(NOISE[:512], 0)
                slow.push_out()
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(backup.copy_pages(pages, handles), 0.3)
                given_up = pages.copy()
            assert (pages == given_up).all()
            await backup.copy_pages(pages, handles)
            assert (pages == NOISE[:512]).all()

    with Mount(mountpoint, "size=64m") as mount:
        asyncio.run(main(mount))


def test_a_second_cancellation_by_asyncio_does_not_end_a_call_that_uses_memory(shared: Mount) -> None:
    async def main() -> None:
        async with await aio.Backup.create(shared.path / "a", 65536 * PAGE) as backup:
            memory = np.full((16384, PAGE), 1, np.uint8)
            for _ in range(5):
                storing = asyncio.create_task(backup.backup_pages(memory, 0))
                while not (await backup.residency()).pages:  # noqa: ASYNC110 # no event tells it
                    await asyncio.sleep(0)
                for _ in range(3):
                    storing.cancel()
                    await asyncio.sleep(0.001)
                with contextlib.suppress(asyncio.CancelledError):  # it may be through already
                    await storing
                stored = await backup.handles()
                assert len(stored) == len(memory)
                await backup.drop_pages(stored)

    asyncio.run(main())


def test_a_store_that_has_begun_is_carried_out_in_spite_of_a_cancellation(shared: Mount, loop: Loop) -> None:
    async def main() -> None:
        async with await aio.Backup.create(shared.path / "a", 1024 * PAGE) as backup:
            for _ in range(20):
                memory = NOISE.copy()
                with anyio.move_on_after(0.0001):
                    await backup.backup_pages(memory, 0)
                memory[:] = 0  # the call no longer uses it
                stored = await backup.handles()
                assert len(stored) in (0, 1024)
                if len(stored):
                    pages = np.empty_like(NOISE)
                    await backup.copy_pages(pages, stored)
                    assert (pages == NOISE).all()
                    await backup.drop_pages(stored)

    loop(main())


def test_a_backup_is_closed_in_a_cancelled_scope(shared: Mount, loop: Loop) -> None:
    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with await aio.Backup.create(shared.path / "a", 64 * PAGE) as backup:
                scope.cancel()
        with pytest.raises(BackupClosed):
            await backup.drop(1)

    loop(main())
