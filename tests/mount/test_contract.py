"""The contract, C1 to C16 (docs/contract.md), at the mount, on every kind of store.

Two mounts serve all tests of a kind of store, one with much room and one with little. Each test finds them empty and
leaves them empty. Other modules test, under the same numbers, what one kind alone has or what shows only under load.
"""

import contextlib
import json
import mmap
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from errno import EFBIG, EINVAL, ENOENT, ENOSPC, ENOTEMPTY, ESTALE
from pathlib import Path

import pytest

from harness import Mount, attribute, meminfo, opened, raises_errno, set_attribute, wait_until
from stores import Site

PAGE = mmap.PAGESIZE
PAGES = 1024  # of a backup in the mount with room
ROOM, SPAN = 32, 64  # pages that the mount with little takes, and that a backup there spans


@pytest.fixture(scope="module")
def large(site: Site) -> Iterator[Mount]:
    with site.mount(f"size=64m,backup_size={PAGES * PAGE}") as mount:
        yield mount


@pytest.fixture(scope="module")
def small(site: Site) -> Iterator[Mount]:
    with site.mount(f"size={ROOM * PAGE},backup_size={SPAN * PAGE}") as mount:
        yield mount


@contextlib.contextmanager
def visited(site: Site, mount: Mount) -> Iterator[Path]:
    """A mount for one test, which runs as its user. At the end it is empty, and kernel and daemon know that."""
    with site.acting():
        yield mount.path
        for backup in mount.path.iterdir():
            os.truncate(backup / ".image", 0)
            backup.rmdir()
        wait_until(lambda: stored(mount.path) == 0, "all room to be free")


@pytest.fixture
def mnt(site: Site, large: Mount) -> Iterator[Path]:
    with visited(site, large) as path:
        yield path


@pytest.fixture
def backup(mnt: Path) -> Path:
    return new_backup(mnt, "a")


@pytest.fixture
def tight(site: Site, small: Mount) -> Iterator[Path]:
    with visited(site, small) as path:
        yield path


def new_backup(mnt: Path, name: str) -> Path:
    (mnt / name).mkdir()
    return mnt / name


def page_of(seed: object) -> bytes:
    return random.Random(str(seed)).randbytes(PAGE)


def store(backup: Path, *handles: int) -> None:
    """Store pages whose content names their handle and their backup."""
    for handle in handles:
        assert (backup / str(handle)).write_bytes(page_of((backup.name, handle))) == PAGE


def holds(backup: Path, *handles: int) -> None:
    """Check that exactly the pages stored by `store` are there, bit for bit."""
    assert listed(backup) == sorted(handles)
    for handle in handles:
        assert (backup / str(handle)).read_bytes() == page_of((backup.name, handle))


def listed(backup: Path) -> list[int]:
    return [int(page.name) for page in os.scandir(backup)]


def stored(mnt: Path) -> int:
    """The number of stored pages, as df counts them."""
    room = os.statvfs(mnt)
    return room.f_blocks - room.f_bfree


def file_of(backup: Path) -> Path:
    """The backup's file in the store."""
    if os.path.lexists(backup / ".shmem"):
        return backup / ".shmem"
    return Path(json.loads((backup.parent / ".config").read_text())["store"]) / backup.name


# --- handles ---


def test_c1_a_handle_is_the_index_plus_one_and_never_0(backup: Path) -> None:
    store(backup, 1, 7, PAGES)
    with opened(backup / ".image") as image, opened(file_of(backup), os.O_RDONLY) as file:
        for handle in (1, 7, PAGES):
            for fd in (image, file):
                assert os.pread(fd, PAGE, (handle - 1) * PAGE) == (backup / str(handle)).read_bytes()
        assert os.pwrite(image, b"x", 99 * PAGE) == 1
    assert listed(backup) == [1, 7, 100, PAGES]
    assert attribute(backup, "map") == f"1,7,100,{PAGES}"
    for name in ("0", "00", "01", "+1", "-1", "1 ", " 1", "1.", "0x1", "1e0", "¹", "a", str(1 << 70)):
        with raises_errno(ENOENT):
            (backup / name).stat()
        with raises_errno(EFBIG if name == str(1 << 70) else EINVAL):
            (backup / name).touch()
    assert listed(backup) == [1, 7, 100, PAGES]


def test_c2_the_caller_chooses_the_index_and_backing_up_again_overwrites(backup: Path) -> None:
    store(backup, 2, 900, 1)
    for again in (b"\1", b"\2"):
        assert (backup / "2").write_bytes(again * PAGE) == PAGE
        assert (backup / "2").read_bytes() == again * PAGE
    with opened(backup / ".image") as image:
        assert os.pwrite(image, b"\3" * PAGE, PAGE) == PAGE
    with opened(backup / "2", os.O_CREAT | os.O_RDWR) as page:
        assert os.pread(page, PAGE, 0) == b"\3" * PAGE, "opening it with O_CREAT leaves it as it is"
    assert attribute(backup, "map") == "1-2,900"
    assert attribute(backup, "pages") == "3"
    assert stored(backup.parent) == 3
    store(backup, 2)
    holds(backup, 1, 2, 900)


def test_c3_pages_stored_at_once_have_consecutive_handles(backup: Path) -> None:
    data = random.Random(3).randbytes(300 * PAGE)  # two requests
    with opened(backup / ".image") as image:
        assert os.pwrite(image, data, 10 * PAGE) == len(data)
        assert listed(backup) == [*range(11, 311)]
        for handle in (11, 200, 310):
            assert (backup / str(handle)).read_bytes() == data[(handle - 11) * PAGE :][:PAGE]
        assert os.pread(image, len(data) + 2 * PAGE, 9 * PAGE) == bytes(PAGE) + data + bytes(PAGE)
        assert os.pwrite(image, data, (PAGES - 2) * PAGE) == 2 * PAGE, "as many as there are to the end"
    assert attribute(backup, "map") == f"11-310,{PAGES - 1}-{PAGES}"


def test_c3_a_write_that_runs_out_of_room_is_short(tight: Path) -> None:
    a, b = new_backup(tight, "a"), new_backup(tight, "b")
    store(a, *range(1, ROOM - 5))
    data = random.Random(4).randbytes(10 * PAGE)
    with opened(b / ".image") as image:
        assert os.pwrite(image, data, 3 * PAGE) == 6 * PAGE
        assert os.pread(image, 12 * PAGE, 3 * PAGE) == data[: 6 * PAGE] + bytes(6 * PAGE)
        with raises_errno(ENOSPC):
            os.pwrite(image, data, 9 * PAGE)
        assert os.pwrite(image, data, 7 * PAGE) == 2 * PAGE, "over pages that are there, as far as they go"
    assert attribute(b, "map") == "4-9"
    holds(a, *range(1, ROOM - 5))


# --- backing up ---


def test_c4_the_copy_is_complete_on_return(backup: Path) -> None:
    source = bytearray(page_of(1))
    with opened(backup / "1", os.O_CREAT | os.O_RDWR) as page, opened(backup / ".image") as image:
        for fd, offset in ((page, 0), (image, PAGE)):
            for seed in range(20):
                source[:] = expected = page_of(seed)
                assert os.pwrite(fd, source, offset) == PAGE
                source[:] = bytes(PAGE)
                assert os.pread(fd, PAGE, offset) == expected
    assert (backup / "2").read_bytes() == page_of(19)


@pytest.mark.parametrize("flags", [0, os.O_SYNC, os.O_DSYNC, os.O_DIRECT])
def test_c5_writeback_changes_no_result(backup: Path, flags: int) -> None:
    store(backup, 2)
    for name in ("1", ".image"):
        with opened(backup / name, os.O_RDWR | os.O_CREAT | flags) as fd, mmap.mmap(-1, PAGE) as buffer:
            buffer[:] = page_of(name)  # aligned, as O_DIRECT asks for
            assert os.pwrite(fd, buffer, 0) == PAGE
            for push in (os.fsync, os.fdatasync) * 2:
                push(fd)
        assert (backup / name).read_bytes()[:PAGE] == page_of(name)
    with opened(backup, os.O_RDONLY) as fd:
        os.fsync(fd)
    assert (backup / "2").read_bytes() == page_of(("a", 2))
    assert attribute(backup, "map") == "1-2"


def test_c6_a_refused_write_changes_nothing(backup: Path) -> None:
    store(backup, 1, 3)
    with opened(backup / "1") as page, opened(backup / ".image") as image:
        for fd, end in ((page, PAGE), (image, PAGES * PAGE)):
            for offset in (end, end + 1, 1 << 40):
                with raises_errno(EFBIG):
                    os.pwrite(fd, b"x", offset)
            with raises_errno(EFBIG):
                os.ftruncate(fd, end + 1)
        assert os.pwrite(page, page_of(("a", 1)) + b"x", 0) == PAGE, "a longer write stores the beginning"
    for ranges in (f"1-{PAGES + 1}", "3-1", "0", "x"):
        with raises_errno(EINVAL):
            set_attribute(backup, "drop", ranges)
    with raises_errno(EINVAL):
        set_attribute(backup, "size", PAGE)
    holds(backup, 1, 3)


def test_c6_a_page_without_room_is_not_stored_in_part(tight: Path) -> None:
    a, b = new_backup(tight, "a"), new_backup(tight, "b")
    store(a, *range(1, ROOM + 1))
    refused: list[Callable[[], object]] = [
        lambda: (b / "1").write_bytes(page_of(1)),
        lambda: (b / "2").touch(),
        lambda: (a / str(SPAN)).write_bytes(b"x"),
    ]
    for store_it in refused:
        with raises_errno(ENOSPC):
            store_it()
    for backup in (a, b):
        with opened(backup / ".image") as image:
            for offset in (40 * PAGE, 40 * PAGE + 17):
                with raises_errno(ENOSPC):
                    os.pwrite(image, page_of(1), offset)
    holds(b)
    holds(a, *range(1, ROOM + 1))
    assert stored(tight) == ROOM


def test_c7_a_reader_sees_the_old_page_or_the_new_one(backup: Path) -> None:
    store(backup, 1)
    pages = [bytes([byte]) * PAGE for byte in range(1, 251)]
    stop = threading.Event()

    def write(fd: int, mine: list[bytes]) -> None:
        while not stop.is_set():
            for page in mine:
                os.pwrite(fd, page, 0)

    with opened(backup / "1") as page, opened(backup / ".image") as image:
        os.pwrite(page, pages[0], 0)  # a reader may come before both writers
        halves = ((page, pages[::2]), (image, pages[1::2]))
        threads = [threading.Thread(target=write, args=arguments) for arguments in halves]
        for thread in threads:
            thread.start()
        try:
            seen: set[int] = set()

            def read() -> bool:
                for fd in (page, image) * 100:
                    found = os.pread(fd, PAGE, 0)
                    assert found == found[:1] * PAGE
                    seen.add(found[0])
                return {byte % 2 for byte in seen} == {0, 1}

            wait_until(read, "pages of both writers", 20)
        finally:
            stop.set()
            for thread in threads:
                thread.join(10)


# --- copying back ---


def test_c8_copying_back_does_not_consume(site: Site, backup: Path) -> None:
    """The page stays bit for bit, in memory and, if the store has a disk, on the disk."""
    store(backup, *range(1, 20))
    with opened(backup / ".image") as image, opened(file_of(backup), os.O_RDONLY) as file:
        for _ in range(3):
            os.fsync(image)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            assert not site.on_disk or attribute(backup, "resident") == "0"
            for handle in range(1, 20):
                assert (backup / str(handle)).read_bytes() == page_of(("a", handle))
                assert os.pread(image, PAGE, (handle - 1) * PAGE) == page_of(("a", handle))
    holds(backup, *range(1, 20))


def test_c9_an_interrupted_wait_leaves_the_page_unchanged(large: Mount, backup: Path) -> None:
    def waits(client: "subprocess.Popen[bytes]") -> bool:
        where = Path(f"/proc/{client.pid}/wchan").read_text()
        return "fuse" in where or "request_wait" in where

    store(backup, 1)
    os.kill(large.pid, signal.SIGSTOP)
    try:
        with subprocess.Popen(["cat", backup / "1"], stdout=subprocess.PIPE) as client:
            wait_until(lambda: waits(client), "the client to wait")
            client.terminate()
            assert client.wait(10) == -signal.SIGTERM
            assert client.stdout
            assert not client.stdout.read()
    finally:
        os.kill(large.pid, signal.SIGCONT)
    holds(backup, 1)


def test_c10_an_index_past_the_size_is_refused(backup: Path) -> None:
    store(backup, PAGES)
    for handle in (PAGES + 1, 1 << 30, 1 << 33):
        with raises_errno(ENOENT):
            (backup / str(handle)).read_bytes()
        with raises_errno(ENOENT):
            (backup / str(handle)).unlink()
        with raises_errno(EFBIG):
            (backup / str(handle)).touch()
    with opened(backup / ".image") as image:
        for offset in (PAGES * PAGE, PAGES * PAGE + 1, 1 << 45):
            assert os.pread(image, PAGE, offset) == b""
            with raises_errno(EFBIG):
                os.pwrite(image, b"x", offset)
    set_attribute(backup, "size", (PAGES + 1) * PAGE)
    store(backup, PAGES + 1)
    holds(backup, PAGES, PAGES + 1)


def test_c11_a_handle_without_a_page_has_no_file(backup: Path) -> None:
    store(backup, 2, 5)
    for handle in (1, 3, 4, 6, PAGES):
        path = backup / str(handle)
        for use in (path.stat, path.read_bytes, path.unlink, lambda path=path: os.truncate(path, 0)):
            with raises_errno(ENOENT):
                use()
    with opened(backup / ".image", os.O_RDONLY) as image:
        assert os.pread(image, 2 * PAGE, 2 * PAGE) == bytes(2 * PAGE)
        assert os.pread(image, 100, PAGES * PAGE - 100) == bytes(100)
    holds(backup, 2, 5)
    assert stored(backup.parent) == 2


# --- dropping, ending ---

DROPS: dict[str, Callable[[Path, int, int], object]] = {
    "rm": lambda a, first, last: [os.unlink(a / str(handle)) for handle in range(first, last + 1)],  # type: ignore[func-returns-value]
    "truncate": lambda a, first, _: os.truncate(a / ".image", (first - 1) * PAGE),
    "attribute": lambda a, first, last: set_attribute(a, "drop", f"{first}-{last}"),
}


@pytest.mark.parametrize("way", DROPS)
def test_c12_drop_releases_only_the_named_pages_at_once(site: Site, backup: Path, way: str) -> None:
    def counts() -> tuple[int, int, int]:
        """The pages as df, the backup and the space of its file count them."""
        room = (backup / ".shmem" if site.tells_holes else backup / ".image").stat().st_blocks * 512
        return stored(backup.parent), int(attribute(backup, "pages")), room // PAGE

    store(backup, *range(1, 41))
    assert counts() == (40, 40, 40)
    with opened(backup / "40") as dropped, opened(backup / "30") as kept:
        DROPS[way](backup, 31, 40)
        assert counts() == (30, 30, 30)
        with raises_errno(ESTALE):
            os.pread(dropped, PAGE, 0)
        with raises_errno(ESTALE):
            os.pwrite(dropped, b"x", 0)
        assert os.pread(kept, PAGE, 0) == page_of(("a", 30))
        holds(backup, *range(1, 31))
        with raises_errno(ENOENT):
            (backup / "40").unlink()
        set_attribute(backup, "drop", f"31-40,{PAGES}")  # many at once are what the API is: holes are no errors
        store(backup, 40)
        assert os.pread(dropped, PAGE, 0) == page_of(("a", 40)), "it is that page again"
    assert int(attribute(backup, "resident")) + int(attribute(backup, "swapped")) == 31
    holds(backup, *range(1, 31), 40)


def test_c13_fini_releases_every_page_and_later_operations_are_refused(mnt: Path, backup: Path) -> None:
    other = new_backup(mnt, "b")
    store(backup, *range(1, 31))
    store(other, 1)
    with raises_errno(ENOTEMPTY):
        backup.rmdir()
    with raises_errno(ENOTEMPTY):
        other.rename(backup)
    holds(backup, *range(1, 31))
    with opened(backup / "1") as page, opened(backup / ".image") as image, opened(backup, os.O_RDONLY) as directory:
        (backup / ".image").open("wb").close()
        backup.rmdir()
        assert stored(mnt) == 1
        new_backup(mnt, "a")
        assert not any((backup / ".image").read_bytes())
        store(backup, 7)
        for fd in (page, image):
            for use in (
                lambda fd: os.pread(fd, 1, 0),
                lambda fd: os.pwrite(fd, b"x", 0),
                lambda fd: os.ftruncate(fd, 0),
            ):
                with raises_errno(ESTALE):
                    use(fd)
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
            with pytest.raises(OSError, match=r"No such file|Stale") as refused:
                os.open("7", flags, dir_fd=directory)
            # ENOENT is the kernel's own, unless it asks for the directory's mode first.
            assert refused.value.errno in (ENOENT, ESTALE)
    holds(backup, 7)
    holds(other, 1)


def test_c14_creating_a_backup_allocates_no_page(site: Site, mnt: Path) -> None:
    backups = [new_backup(mnt, str(n)) for n in range(20)]
    assert stored(mnt) == 0
    for backup in backups:
        assert (attribute(backup, "pages"), attribute(backup, "size")) == ("0", str(PAGES * PAGE))
        assert not site.tells_holes or (backup / ".shmem").stat().st_blocks == 0
        holds(backup)


# --- room ---


def test_c15_bytes_avail_is_the_free_swap_and_a_hint(mnt: Path, backup: Path) -> None:
    def compared() -> bool:
        before, said, after = meminfo("SwapFree"), int(attribute(mnt, "bytes_avail")), meminfo("SwapFree")
        return before == said == after

    wait_until(compared, "bytes_avail to be the free swap")
    store(backup, 1)
    holds(backup, 1)


@pytest.mark.parametrize("way", ["page files", ".image", "create"])
def test_c16_the_budget_is_exact(tight: Path, way: str) -> None:
    a, b = new_backup(tight, "a"), new_backup(tight, "b")
    store(b, 1, 2)

    def fill(first: int) -> int:
        """Store pages until one is refused. Returns their number."""
        for handle in range(first, SPAN + 1):
            try:
                if way == "page files":
                    store(a, handle)
                elif way == ".image":
                    with opened(a / ".image") as image:
                        os.pwrite(image, page_of(("a", handle)), (handle - 1) * PAGE)
                else:
                    (a / str(handle)).touch(exist_ok=False)
            except OSError as error:
                if error.errno != ENOSPC:
                    raise
                return handle - first
        raise AssertionError("there was room for all")

    assert fill(1) == ROOM - 2
    room = os.statvfs(tight)
    assert (room.f_blocks, room.f_bfree, room.f_bavail) == (ROOM, 0, 0)
    store(a, *range(1, ROOM - 1))  # over what is there: it takes no room
    (b / "1").unlink()
    set_attribute(a, "drop", "3-5")
    assert fill(SPAN - 10) == 4
    assert stored(tight) == ROOM
    store(a, *range(SPAN - 10, SPAN - 6))
    holds(a, 1, 2, *range(6, ROOM - 1), *range(SPAN - 10, SPAN - 6))
    holds(b, 2)


def test_c16_the_budget_holds_under_concurrency(tight: Path) -> None:
    backups = [new_backup(tight, name) for name in "abcd"]

    def fill(backup: Path) -> None:
        for handle in range(1, SPAN + 1):
            with contextlib.suppress(OSError):
                store(backup, handle)
            assert stored(tight) <= ROOM

    threads = [threading.Thread(target=fill, args=(backup,)) for backup in backups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stored(tight) == ROOM == sum(len(listed(backup)) for backup in backups)
    for backup in backups:
        holds(backup, *listed(backup))


def test_c16_pages_stored_through_shmem_are_counted(site: Site, tight: Path) -> None:
    """The kernel refuses the write if it keeps the budget. Otherwise the mount soon refuses new pages."""
    a, b = new_backup(tight, "a"), new_backup(tight, "b")
    if not site.tells_holes:
        assert not os.path.lexists(a / ".shmem"), "it could not be counted"
        return

    def refused() -> bool:
        """Whether a page finds no room. If it finds room, it is dropped again."""
        try:
            store(b, 1)
        except OSError as error:
            if error.errno != ENOSPC:
                raise
            return True
        (b / "1").unlink()
        return False

    store(a, *range(1, ROOM - 3))
    last = ROOM if site.kernel_keeps_the_budget else ROOM + 1
    with opened(a / ".shmem") as file:
        for handle in range(ROOM - 3, last + 1):
            assert os.pwrite(file, page_of(("a", handle)), (handle - 1) * PAGE) == PAGE
        if site.kernel_keeps_the_budget:
            with raises_errno(ENOSPC):
                os.pwrite(file, b"x", last * PAGE)
    wait_until(refused, "it to be counted", 5)
    assert os.statvfs(tight).f_bfree == os.statvfs(tight).f_bavail == 0
    with raises_errno(ENOSPC):
        store(a, SPAN)
    wait_until(lambda: listed(a) == [*range(1, last + 1)], "the names", 5)
    holds(a, *range(1, last + 1))
    set_attribute(a, "drop", f"1-{last - ROOM + 1}")  # to one less than the budget
    store(b, 1)
    with raises_errno(ENOSPC):
        store(b, 2)
    assert stored(tight) == ROOM
