"""Room: the budget, the reserve and the number of backups hold on every path. Dropping pages frees their memory."""

import contextlib
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from errno import EINVAL, ENOENT, ENOSPC
from pathlib import Path

import pytest

import stores
from harness import Mount, attribute, opened, raises_errno, run, wait_until

PAGE = mmap.PAGESIZE
MIB = 1 << 20
PATHS = ["page files", ".image", "create", ".shmem"]


def stored(mnt: Path) -> int:
    """Bytes of stored pages, as df counts them."""
    room = os.statvfs(mnt)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def free_pages(mnt: Path) -> int:
    return os.statvfs(mnt).f_bfree


def page_of(byte: int, size: int = PAGE) -> bytes:
    return bytes([byte]) * size


def new_backup(mnt: Path, name: str, pages: int = 0, byte: int = 1) -> Path:
    path = mnt / name
    path.mkdir()
    with opened(path / ".image") as fd:
        page_size = os.statvfs(mnt).f_frsize
        for idx in range(pages):
            assert os.pwrite(fd, page_of(byte, page_size), idx * page_size) == page_size
    return path


def store(backup: Path, way: str, idx: int, data: bytes) -> None:
    """Store a page in one of several ways; "create" stores zeros."""
    if way == "page files":
        with open(backup / str(idx + 1), "wb", buffering=0) as file:
            assert file.write(data) == len(data)
    elif way == "create":
        os.close(os.open(backup / str(idx + 1), os.O_CREAT | os.O_EXCL))
    else:
        with opened(backup / way) as fd:
            assert os.pwrite(fd, data, idx * len(data)) == len(data)


def fill(backup: Path, way: str, page_size: int = PAGE, first: int = 0) -> int:
    """Store pages from an index on until ENOSPC. Returns the index that was refused."""
    for idx in range(first, first + 100_000):
        try:
            store(backup, way, idx, page_of(idx % 251 + 1, page_size))
        except OSError as error:
            if error.errno != ENOSPC:
                raise
            return idx
    raise AssertionError("there is no end to it")


# --- the budget ---


@pytest.mark.parametrize("way", PATHS)
def test_c6_c16_every_way_of_storing_ends_at_the_budget(mountpoint: Path, way: str) -> None:
    with Mount(mountpoint, "size=1m,backup_size=4m") as mount:
        mnt = mount.path
        a, other = new_backup(mnt, "a"), new_backup(mnt, "other", 16, byte=7)
        full = fill(a, way)
        assert full == MIB // PAGE - 16
        assert (stored(mnt), free_pages(mnt), os.statvfs(mnt).f_bavail) == (MIB, 0, 0)
        for again in PATHS:
            with raises_errno(ENOSPC):
                store(a, again, full + 5, page_of(9))
        for handle in (full + 1, full + 6):
            with raises_errno(ENOENT):
                (a / str(handle)).stat()
        assert [int(page.name) for page in a.iterdir()] == [*range(1, full + 1)]
        for idx in range(full):
            expected = page_of(idx % 251 + 1) if way != "create" else bytes(PAGE)
            assert (a / str(idx + 1)).read_bytes() == expected
        assert all(page.read_bytes() == page_of(7) for page in other.iterdir())
        assert attribute(a, "pages") == str(full)

        for overwrite in ("page files", ".image", ".shmem"):  # takes no room
            store(a, overwrite, 3, page_of(200))
            assert (a / "4").read_bytes() == page_of(200)
        os.truncate(a / "5", 100)
        with opened(a / "6", os.O_WRONLY | os.O_TRUNC):
            pass
        assert (a / "6").read_bytes() == bytes(PAGE)
        mnt.joinpath("empty").mkdir()  # C14: takes no page

        (a / "7").unlink()
        (other / "1").unlink()
        assert free_pages(mnt) == 2
        assert fill(a, way, first=1000) == 1002
        assert stored(mnt) == MIB


WRITER = """
import errno, os, sys
way, backup, first, step, past = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
page_size = os.sysconf("SC_PAGE_SIZE")
sys.stdin.readline()
for idx in range(first, past, step):
    data = idx.to_bytes(8, "little") * (page_size // 8)
    try:
        if way == "page files":
            fd = os.open(f"{backup}/{idx + 1}", os.O_CREAT | os.O_WRONLY)
        else:
            fd = os.open(f"{backup}/{way}", os.O_WRONLY)
        try:
            assert os.pwrite(fd, data, 0 if way == "page files" else idx * page_size) == page_size
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(idx)
        break
"""


@pytest.mark.parametrize("ways", [["page files"] * 8, [".image"] * 8, [".shmem"] * 8, ["page files", ".image",
".shmem", ".image"] * 2],
                         ids=["page files", ".image", ".shmem", "mixed"])  # fmt: skip
@pytest.mark.parametrize("step", [1, 8], ids=["a backup each", "one backup"])
def test_c16_eight_processes_race_for_the_last_pages(mountpoint: Path, ways: list[str], step: int) -> None:
    size = 4 * MIB
    with Mount(mountpoint, f"size={size},backup_size=64m") as mount:
        mnt = mount.path
        backups = [mnt / (f"b{n}" if step == 1 else "b") for n in range(len(ways))]
        for backup in dict.fromkeys(backups):
            backup.mkdir()
        firsts = [0 if step == 1 else n for n in range(len(ways))]
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, way, str(backup), str(first), str(step), "16384"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for way, backup, first in zip(ways, backups, firsts, strict=True)
        ]  # fmt: skip
        try:
            for writer in writers:
                assert writer.stdin
                writer.stdin.write("\n")
                writer.stdin.flush()
            end = time.monotonic() + 30
            while any(writer.poll() is None for writer in writers):
                assert stored(mnt) <= size
                assert time.monotonic() < end
            refused = []
            for writer in writers:
                out, err = writer.communicate(timeout=5)
                assert not err
                refused.append(int(out))
        finally:
            for writer in writers:
                writer.kill()
                writer.communicate()
        assert stored(mnt) == size
        assert free_pages(mnt) == 0
        expected: dict[Path, set[int]] = {backup: set() for backup in backups}
        for backup, first, past in zip(backups, firsts, refused, strict=True):
            expected[backup].update(range(first, past, step))
        assert sum(map(len, expected.values())) == size // PAGE, "what was answered is there, what was refused is not"
        for backup, indices in expected.items():
            assert {int(page.name) - 1 for page in backup.iterdir()} == indices
            with opened(backup / ".image", os.O_RDONLY) as fd:
                for idx in indices:
                    assert os.pread(fd, PAGE, idx * PAGE) == idx.to_bytes(8, "little") * (PAGE // 8)


def test_c3_a_write_that_runs_out_of_room_is_short(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m,backup_size=4m") as mount:
        a = new_backup(mount.path, "a", MIB // PAGE - 6)
        with opened(a / ".image") as fd:
            data = os.urandom(16 * PAGE)
            assert os.pwrite(fd, data, 300 * PAGE) == 6 * PAGE
            assert os.pread(fd, 16 * PAGE, 300 * PAGE) == data[: 6 * PAGE] + bytes(10 * PAGE)
            assert attribute(a, "map") == f"1-{MIB // PAGE - 6},301-306"
            with raises_errno(ENOSPC):
                os.pwrite(fd, data, 306 * PAGE)
            over = 2 * PAGE + 100
            assert os.pwrite(fd, data, 306 * PAGE - over) == over, "over pages that are there, as far as they go"
            with raises_errno(ENOSPC):
                os.pwrite(fd, b"x", 400 * PAGE)
        assert stored(mount.path) == MIB


def test_c3_a_long_write_that_fails_keeps_the_pages_it_stored(mountpoint: Path) -> None:
    """The write takes several requests. dd says how far it came, and the pages up to there are stored."""
    with Mount(mountpoint, "size=3m,backup_size=16m") as mount:
        a = new_backup(mount.path, "a")
        text = run(f"head -c 8M /dev/urandom | tee >(head -c 3M | sha256sum >&2) | dd of='{a}/.image' bs=2M "
                   "iflag=fullblock conv=notrunc", code=1)  # fmt: skip
        assert "No space left on device" in text
        assert "3145728 bytes" in text
        assert run(f"head -c 3M '{a}/.image' | sha256sum").split()[0] in text
        assert attribute(a, "map") == f"1-{3 * MIB // PAGE}"


# --- pages of several base pages ---

BIG = 16 * PAGE


@pytest.mark.parametrize("way", ["page files", ".image", "create"])
def test_c6_a_large_page_is_stored_whole_or_not_at_all(mountpoint: Path, way: str) -> None:
    with Mount(mountpoint, f"size={16 * BIG},backup_size={64 * BIG},page_size={BIG}") as mount:
        mnt = mount.path
        odd, a = new_backup(mnt, "odd"), new_backup(mnt, "a")
        with opened(odd / ".shmem") as fd:
            os.pwrite(fd, b"x", 0)  # one base page: from here on room ends within a page
        assert fill(a, way, BIG) == 15
        assert attribute(a, "pages") == "15"
        blocks = os.stat(a / ".shmem").st_blocks
        assert blocks * 512 == 15 * BIG
        for again in ("page files", ".image", "create"):
            with raises_errno(ENOSPC):
                store(a, again, 20, page_of(5, BIG))
        with opened(a / ".image") as fd:
            for offset in (20 * BIG, 20 * BIG + 100, 21 * BIG - 1):
                with raises_errno(ENOSPC):
                    os.pwrite(fd, b"x", offset)
        assert os.stat(a / ".shmem").st_blocks == blocks, "nothing of any of them was stored"
        with raises_errno(ENOENT):
            (a / "21").stat()
        store(a, "page files", 3, page_of(77, BIG))
        assert (a / "4").read_bytes() == page_of(77, BIG)
        for handle in (1, 2):
            (a / str(handle)).unlink()
        with opened(a / ".image") as fd:
            data = os.urandom(4 * BIG)
            assert os.pwrite(fd, data, 30 * BIG - 100) == BIG + 100, "two pages had room, and the write ends with one"
            assert os.pread(fd, BIG + 101, 30 * BIG - 100) == data[: BIG + 100] + b"\0"
        assert attribute(a, "map") == "3-15,30-31"
        os.truncate(odd / ".image", 0)
        store(a, way, 40, page_of(5, BIG))
        assert free_pages(mnt) == 0


# --- the reserve ---


def test_the_reserve_refuses_pages_before_the_budget_does(mountpoint: Path) -> None:
    """It runs in a control group, where the memory of other processes does not count."""
    limit, reserve = 384 * MIB, 192 * MIB
    with (
        stores.ControlGroup(limit, 0) as group,
        Mount(mountpoint, f"size=4g,reserve={reserve}", preexec_fn=group.join) as mount,
    ):
        mnt = mount.path
        a = new_backup(mnt, "a", 16)
        answer = os.statvfs(mnt)
        assert abs(answer.f_bavail * PAGE - (limit - group.usage() - reserve)) < 64 * MIB, "what the group leaves"
        assert answer.f_bfree == answer.f_blocks - 16, "the budget is another matter"
        chunk, written = b"\5" * MIB, 0
        with opened(a / ".image") as fd:
            with raises_errno(ENOSPC):
                while written < limit:
                    written += os.pwrite(fd, chunk, (16 * PAGE) + written)
            assert written > (limit - reserve) // 4
            assert stored(mnt) == 16 * PAGE + written, "nothing of what was refused was stored"
            assert limit - group.usage() > reserve - 64 * MIB, "page cache, which may go, is charged too"
            assert os.statvfs(mnt).f_bavail * PAGE < 64 * MIB
            os.ftruncate(fd, 16 * PAGE)

            def stored_again() -> bool:
                with contextlib.suppress(OSError):
                    return os.pwrite(fd, chunk, 64 * MIB) == MIB
                return False

            wait_until(stored_again, "what was released to count")


@pytest.mark.parametrize("way", ["page files", ".image", "create"])
def test_c6_c15_a_reserve_above_the_free_memory_refuses_every_page(mountpoint: Path, way: str) -> None:
    with Mount(mountpoint, "size=1g,reserve=1000t") as mount:
        mnt = mount.path
        a = new_backup(mnt, "a")
        assert os.statvfs(mnt).f_bavail == 0
        assert os.statvfs(mnt).f_bfree == (1 << 30) // PAGE
        with raises_errno(ENOSPC):
            store(a, way, 0, page_of(1))
        assert stored(mnt) == 0
        assert list(a.iterdir()) == []
        store(a, ".shmem", 0, page_of(1))  # which goes past the daemon: there the budget alone holds
        store(a, "page files", 0, page_of(2))  # what is stored already can be stored anew, it takes no memory
        store(a, ".image", 0, page_of(3))
        os.truncate(a / "1", PAGE // 2)
        assert (a / "1").read_bytes() == page_of(3, PAGE // 2) + bytes(PAGE // 2)


def test_the_reserve_refuses_pages_before_a_control_group_kills(mountpoint: Path) -> None:
    limit, reserve = 192 * MIB, 32 * MIB
    with (
        stores.ControlGroup(limit, 0) as group,
        Mount(mountpoint, f"size=4g,reserve={reserve}", preexec_fn=group.join) as mount,
    ):
        mnt = mount.path
        a = new_backup(mnt, "a")
        assert os.statvfs(mnt).f_bavail * PAGE < limit - reserve, "df shows what the group leaves"
        for _ in range(2):
            data, written = os.urandom(MIB), 0
            with opened(a / ".image") as fd:
                with raises_errno(ENOSPC):
                    while written < 2 * limit:
                        written += os.pwrite(fd, data, written)
                full = fill(a, "page files", first=written // PAGE)
                assert limit // 3 < stored(mnt) < limit - reserve // 2
                assert stored(mnt) == full * PAGE, "nothing of what was refused was stored"
                for offset in range(0, written, MIB):
                    assert os.pread(fd, MIB, offset) == data
                os.ftruncate(fd, 0)
        assert group.oom_kills() == 0
        assert mount.process.poll() is None


# --- the number of backups ---


def test_one_backup_too_many_is_enospc(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m,nr_inodes=4") as mount:
        mnt = mount.path
        for name in "abc":
            new_backup(mnt, name, 1)
        assert (os.statvfs(mnt).f_files, os.statvfs(mnt).f_ffree) == (4, 0)
        for _ in range(3):
            with raises_errno(ENOSPC):
                (mnt / "d").mkdir()
        assert sorted(os.listdir(mnt)) == ["a", "b", "c"]
        assert [(mnt / name / "1").read_bytes() for name in "abc"] == [page_of(1)] * 3
        (mnt / "a").rename(mnt / "d")
        (mnt / "d" / "1").unlink()
        (mnt / "d").rmdir()
        new_backup(mnt, "e", 1)
        with raises_errno(ENOSPC):
            (mnt / "f").mkdir()


# --- a budget that changes ---


def test_the_budget_is_resized_live(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m,backup_size=8m") as mount:
        mnt = mount.path
        a = new_backup(mnt, "a")
        assert attribute(mnt, "size") == str(MIB)
        assert fill(a, "page files") == MIB // PAGE
        run(f"setfattr -n user.ttmfs.size -v 2m '{mnt}'")
        assert attribute(mnt, "size") == str(2 * MIB)
        assert os.statvfs(mnt).f_blocks == 2 * MIB // PAGE
        assert fill(a, ".image", first=MIB // PAGE) == 2 * MIB // PAGE
        for less in (2 * MIB - 1 - PAGE, MIB, 1):
            with raises_errno(EINVAL):
                os.setxattr(mnt, "user.ttmfs.size", str(less).encode())
            assert attribute(mnt, "size") == str(2 * MIB)
            assert stored(mnt) == 2 * MIB
        assert attribute(mnt, "size") == str(2 * MIB)
        os.truncate(a / ".image", 100 * PAGE)
        os.setxattr(mnt, "user.ttmfs.size", b"%d" % (100 * PAGE))  # to the very page that is stored last
        assert free_pages(mnt) == 0
        with raises_errno(ENOSPC):
            store(a, "page files", 100, page_of(1))
        os.setxattr(mnt, "user.ttmfs.size", b"%d" % (100 * PAGE + 1))
        assert fill(a, "page files", first=100) == 101, "it is rounded up to whole pages"
        os.setxattr(mnt, "user.ttmfs.size", b"8m")
        assert attribute(a, "size") == str(8 * MIB), "a backup's own size is another matter"
        assert fill(a, ".shmem", first=101) == 8 * MIB // PAGE


# --- memory is the system's again ---


def unlink_all(a: Path) -> None:
    for handle in range(1, LARGE // PAGE + 1):
        (a / str(handle)).unlink()


def end_with_memory_that_is_no_page(a: Path) -> None:
    """End a backup that has memory allocated and nothing written: it counts as empty."""
    os.truncate(a / ".image", 0)
    run(f"fallocate -l {LARGE} '{a}/.shmem'")
    assert (list(a.iterdir()), stored(a.parent)) == ([], LARGE)
    a.rmdir()


LARGE = 32 * MIB
ENDS: dict[str, Callable[[Path], object]] = {
    "rm of each page": unlink_all,
    "rm -r": lambda a: run(f"rm -r '{a}'"),
    "truncate .image": lambda a: os.truncate(a / ".image", 0),
    "drop attribute": lambda a: os.setxattr(a, "user.ttmfs.drop", f"1-{LARGE // PAGE}".encode()),
    "rmdir": end_with_memory_that_is_no_page,
    "unmount": lambda a: None,  # noqa: ARG005
}


@pytest.mark.parametrize("way", ENDS)
def test_c12_dropped_memory_returns_to_the_system(mountpoint: Path, way: str) -> None:
    """df, du, ls, the store and the kernel's own count of the daemon's control group agree."""
    with stores.ControlGroup(1 << 30) as group:
        with Mount(mountpoint, "size=64m", preexec_fn=group.join) as mount:
            a = new_backup(mount.path, "a")
            before = group.shmem()
            with opened(a / ".image") as fd:
                for offset in range(0, LARGE, MIB):
                    assert os.pwrite(fd, b"\1" * MIB, offset) == MIB
            assert (
                stored(mount.path)
                == int(attribute(a, "pages")) * PAGE
                == os.stat(a / ".shmem").st_blocks * 512
                == LARGE
            )
            assert sum(1 for _ in os.scandir(a)) * PAGE == int(run(f"du -s -B1 '{a}'").split()[0]) == LARGE
            wait_until(lambda: group.shmem() - before > LARGE * 0.8, "the group's memory to grow")
            ENDS[way](a)
            assert stored(mount.path) == (LARGE if way == "unmount" else 0)
            if way != "unmount":
                wait_until(lambda: group.shmem() - before < LARGE * 0.2, "the group's memory to shrink")
        wait_until(lambda: group.shmem() < LARGE * 0.2, "all of it to be released")


POOL = f"""
import sys, numpy, trio, ttmfs
async def main():
    async with ttmfs.open_pool(size={LARGE}) as pool:
        backup = await pool.create("a")
        await backup.backup_pages(numpy.ones(({LARGE // PAGE}, {PAGE}), numpy.uint8), 0)
        print("stored", flush=True)
        sys.stdin.readline()
    print("closed", flush=True)
    sys.stdin.readline()
trio.run(main)
"""


def test_c12_closing_a_pool_returns_its_memory(mountpoint: Path) -> None:
    with (
        stores.ControlGroup(1 << 30) as group,
        subprocess.Popen(
            [sys.executable, "-c", POOL], preexec_fn=group.join, cwd=mountpoint,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as program,
    ):  # fmt: skip
        assert program.stdin
        assert program.stdout
        assert program.stdout.readline() == "stored\n"
        wait_until(lambda: group.shmem() > LARGE * 0.8, "the group's memory to grow")
        program.stdin.write("\n")
        program.stdin.flush()
        assert program.stdout.readline() == "closed\n"
        wait_until(lambda: group.shmem() < LARGE * 0.2, "the memory to be released")
        program.communicate("\n")


@pytest.mark.parametrize("how", [lambda p: p.unlink(), lambda p: os.truncate(p.parent / ".image", 0),
                                 lambda p: os.setxattr(p.parent, "user.ttmfs.drop", b"1")])  # fmt: skip
def test_c12_an_open_descriptor_keeps_no_memory(mnt: Path, backup: Path, how: Callable[[Path], object]) -> None:
    store(backup, "page files", 0, page_of(1))
    with opened(backup / "1"), opened(backup / ".image"):
        how(backup / "1")
        assert stored(mnt) == 0
        backup.rmdir()
        assert stored(mnt) == 0


def test_c14_creating_backups_takes_no_page(mnt: Path) -> None:
    for n in range(300):  # more than the daemon keeps open
        (mnt / str(n)).mkdir()
    assert stored(mnt) == 0
    assert {attribute(mnt / str(n), "pages") for n in range(0, 300, 50)} == {"0"}
