"""What a mount shows and does, file by file: pages, .image, .shmem, listings, renames, df; and that nothing tears."""

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from errno import EINVAL, ENODEV, ENOENT, EPERM, ESTALE
from pathlib import Path

import numpy as np
import pytest

from harness import Mount, attribute, names, opened, raises_errno, run, set_attribute, wait_until

PAGE = mmap.PAGESIZE
SIZE = 64 << 20  # of the mounts of the fixtures, and so of their backups
NOREPLACE = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


def create(path: Path, mode: int = 0o666) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def store(backup: Path, *handles: int) -> None:
    """Store pages that are full of the low byte of their handle."""
    for handle in handles:
        (backup / str(handle)).write_bytes(bytes([handle % 256]) * PAGE)


# --- pages ---


def test_creating_a_page_stores_zeros(backup: Path) -> None:
    create(backup / "3")
    assert (backup / "3").read_bytes() == bytes(PAGE)
    os.mknod(backup / "5", 0o644 | stat.S_IFREG)
    assert (backup / "5").read_bytes() == bytes(PAGE)
    assert attribute(backup, "map") == "3,5"


def test_c2_opening_an_existing_page_with_o_creat_keeps_it(backup: Path) -> None:
    store(backup, 1)
    with opened(backup / "1", os.O_CREAT | os.O_RDWR) as fd:
        assert os.pread(fd, PAGE, 0) == b"\1" * PAGE


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (0, 100), (1, 1), (1000, 2000), (PAGE - 1, 1), (0, PAGE), (7, 0)]
)
def test_a_short_write_keeps_the_rest_of_a_page(backup: Path, offset: int, length: int) -> None:
    store(backup, 1)
    with opened(backup / "1") as fd:
        assert os.pwrite(fd, b"x" * length, offset) == length
    assert (backup / "1").read_bytes() == b"\1" * offset + b"x" * length + b"\1" * (PAGE - offset - length)


@pytest.mark.parametrize("size", [0, 1, 100, PAGE - 1, PAGE])
def test_truncating_a_page_fills_the_rest_with_zeros(backup: Path, size: int) -> None:
    store(backup, 1)
    os.truncate(backup / "1", size)
    assert (backup / "1").read_bytes() == b"\1" * size + bytes(PAGE - size)
    assert (backup / "1").stat().st_size == PAGE
    os.truncate(backup / "1", PAGE)
    assert (backup / "1").read_bytes() == b"\1" * size + bytes(PAGE - size), "growing it again brings nothing back"


def test_o_trunc_fills_a_page_with_zeros(backup: Path) -> None:
    store(backup, 1)
    with opened(backup / "1", os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == PAGE
        os.write(fd, b"abc")
    assert (backup / "1").read_bytes() == b"abc" + bytes(PAGE - 3)
    assert names(backup) == ["1"]


def test_a_page_file_always_has_the_size_of_one_page(backup: Path) -> None:
    for use in (
        create,
        lambda p: p.write_bytes(b"x"),
        lambda p: os.truncate(p, 5),
        lambda p: p.write_bytes(b"y" * PAGE),
    ):
        use(backup / "1")
        found = (backup / "1").stat()
        assert (found.st_size, found.st_blocks * 512, found.st_blksize, found.st_nlink) == (PAGE, PAGE, PAGE, 1)
        assert stat.S_ISREG(found.st_mode)


def test_reads_of_a_page_end_at_its_size(backup: Path) -> None:
    data = random.Random(1).randbytes(PAGE)
    (backup / "1").write_bytes(data)
    with opened(backup / "1", os.O_RDONLY) as fd:
        for offset, length in itertools.product(
            (0, 1, 511, PAGE - 1, PAGE, PAGE + 1, 1 << 40), (0, 1, 512, PAGE, 3 * PAGE)
        ):
            assert os.pread(fd, length, offset) == data[offset : offset + length]
        assert os.read(fd, PAGE // 2) + os.read(fd, PAGE) + os.read(fd, PAGE) == data
        assert os.lseek(fd, 0, os.SEEK_END) == PAGE


def test_a_page_can_be_mapped_privately_but_not_shared(backup: Path) -> None:
    store(backup, 7)
    with opened(backup / "7") as fd:
        with mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE) as mapped:
            assert mapped[:] == b"\7" * PAGE
            mapped[0] = 0
        with raises_errno(ENODEV):
            mmap.mmap(fd, PAGE, mmap.MAP_SHARED)
    assert (backup / "7").read_bytes() == b"\7" * PAGE


def test_pages_have_mode_owner_and_times_of_their_backup(mnt: Path) -> None:
    a = mnt / "a"
    a.mkdir(0o750)
    create(a / "1", 0o777)
    page, backup = (a / "1").stat(), a.stat()
    assert stat.S_IMODE(page.st_mode) == 0o640
    assert (page.st_uid, page.st_gid) == (backup.st_uid, backup.st_gid) == (os.getuid(), os.getgid())
    assert (page.st_mtime_ns, page.st_ctime_ns) == (backup.st_mtime_ns, backup.st_ctime_ns)
    os.utime(a, ns=(10**18, 2 * 10**18))
    wait_until(lambda: (a / "1").stat().st_mtime_ns == 2 * 10**18, "the page's time", 2)
    assert a.stat().st_mtime_ns == 2 * 10**18
    before = a.stat().st_mtime_ns
    store(a, 1)
    wait_until(lambda: (a / "1").stat().st_mtime_ns == a.stat().st_mtime_ns != before, "the time of the write", 2)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777, 0o640, 0o2755, 0o1777, 0o000, 0o123])
def test_chmod_and_chown_of_a_backup_show_on_its_pages_at_once(backup: Path, mode: int) -> None:
    store(backup, 1)
    (backup / "1").stat()
    (backup / ".image").stat()
    backup.chmod(mode)
    assert stat.S_IMODE(backup.stat().st_mode) == mode
    for name in ("1", ".image"):
        assert stat.S_IMODE((backup / name).stat().st_mode) == mode & 0o666
    os.chown(backup, 1234, 567)
    for path in (backup, backup / "1", backup / ".image"):
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 567)


def test_chmod_and_utime_of_a_page_are_accepted_and_change_nothing(backup: Path) -> None:
    store(backup, 1)
    before = (backup / "1").stat()
    for change in (lambda p: p.chmod(0o600), os.utime, lambda p: os.utime(p, (1, 1)), lambda p: os.chown(p, -1, -1),
                   lambda p: os.chown(p, before.st_uid, before.st_gid)):  # fmt: skip
        for name in ("1", ".image"):
            change(backup / name)
    after = (backup / "1").stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_uid) == (before.st_mode, before.st_mtime_ns, before.st_uid)
    for uid, gid in (1, -1), (-1, 1), (1, 1):
        with raises_errno(EPERM):
            os.chown(backup / "1", uid, gid)
    assert (backup / "1").stat().st_uid == before.st_uid


def test_a_backup_obeys_the_umask_and_a_setgid_root(mnt: Path) -> None:
    before = os.umask(0o027)
    try:
        (mnt / "a").mkdir(0o777)
    finally:
        os.umask(before)
    assert stat.S_IMODE((mnt / "a").stat().st_mode) == 0o750
    os.chown(mnt, 0, 4321)
    mnt.chmod(0o2755)
    (mnt / "b").mkdir()
    assert ((mnt / "b").stat().st_gid, (mnt / "b").stat().st_mode & stat.S_ISGID) == (4321, stat.S_ISGID)
    create(mnt / "b" / "1")
    assert (mnt / "b" / "1").stat().st_gid == 4321


# --- .image ---


def test_the_image_has_every_page_at_its_offset(backup: Path) -> None:
    store(backup, 1, 2, 5)
    expected = b"\1" * PAGE + b"\2" * PAGE + bytes(2 * PAGE) + b"\5" * PAGE
    with opened(backup / ".image") as fd:
        assert os.pread(fd, 7 * PAGE, 0) == expected + bytes(2 * PAGE)
        assert os.pread(fd, PAGE, PAGE // 2) == expected[PAGE // 2 :][:PAGE]
        assert os.fstat(fd).st_size == SIZE == int(attribute(backup, "size"))
    assert names(backup) == ["1", "2", "5"], "c11: reading holes makes no pages"
    assert run(f"head -c {5 * PAGE} '{backup}/.image' | sha256sum") == run(
        f"cat '{backup}'/{{1,2}} <(head -c {2 * PAGE} /dev/zero) '{backup}'/5 | sha256sum"
    )


def test_c3_writing_an_image_stores_every_page_it_touches(backup: Path) -> None:
    with opened(backup / ".image") as fd:
        assert os.pwrite(fd, b"a", 0) == 1
        assert os.pwrite(fd, b"b" * 2, 3 * PAGE - 1) == 2
        assert os.pwrite(fd, b"c" * (3 * PAGE), 10 * PAGE) == 3 * PAGE
        assert names(backup) == ["1", "3", "4", "11", "12", "13"]
        assert attribute(backup, "map") == "1,3-4,11-13"
        assert (backup / "1").read_bytes() == b"a" + bytes(PAGE - 1)
        assert (backup / "3").read_bytes() == bytes(PAGE - 1) + b"b"
        data = random.Random(2).randbytes(5 << 20)  # several requests
        assert os.pwrite(fd, data, 100 * PAGE + 17) == len(data)
        assert os.pread(fd, len(data), 100 * PAGE + 17) == data


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, ""), (1, "1"), (PAGE, "1"), (PAGE + 1, "1-2"), (3 * PAGE, "1-2"), (4 * PAGE + 1, "1-2,5"), (SIZE, "1-2,5-6")],
)
def test_c12_truncating_an_image_drops_every_page_past_it(backup: Path, size: int, expected: str) -> None:
    store(backup, 1, 2, 5, 6)
    before = (backup / ".image").read_bytes()
    os.truncate(backup / ".image", size)
    assert attribute(backup, "map") == expected
    assert (backup / ".image").stat().st_size == SIZE
    assert (backup / ".image").read_bytes() == before[:size] + bytes(SIZE - size)


def test_c12_truncating_an_image_to_a_hole_makes_no_page(backup: Path) -> None:
    store(backup, 1, 5)
    os.truncate(backup / ".image", 2 * PAGE + 100)
    assert names(backup) == ["1"]


# --- .shmem ---


def test_shmem_is_the_file_of_the_backup(backup: Path) -> None:
    store(backup, 1, 3)
    found = (backup / ".shmem").lstat()
    assert stat.S_ISREG(found.st_mode)
    assert (found.st_size, found.st_blocks * 512) == (SIZE, 2 * PAGE)
    with opened(backup / ".shmem") as fd:
        assert [os.lseek(fd, 0, os.SEEK_HOLE), os.lseek(fd, PAGE, os.SEEK_DATA)] == [PAGE, 2 * PAGE]


def test_pages_and_shmem_show_writes_of_each_other_at_once(backup: Path) -> None:
    with opened(backup / ".shmem") as shmem, opened(backup / ".image") as image:
        create(backup / "2")
        with opened(backup / "2") as page:
            for n in range(50):
                os.pwrite(shmem, b"%04d" % n, PAGE)
                assert os.pread(page, 4, 0) == os.pread(image, 4, PAGE) == b"%04d" % n
                os.pwrite(page, b"%04d" % -n, 8)
                assert os.pread(shmem, 4, PAGE + 8) == b"%04d" % -n
                os.pwrite(image, b"%04d" % n, PAGE + 16)
                assert os.pread(shmem, 4, PAGE + 16) == os.pread(page, 4, 16) == b"%04d" % n
        os.pwrite(shmem, b"new", 9 * PAGE)
        assert (backup / "10").read_bytes()[:3] == b"new"
        (backup / "10").unlink()
        assert os.pread(shmem, 3, 9 * PAGE) == b"\0\0\0"
        run(f"fallocate -p -o {PAGE} -l {PAGE} '{backup}/.shmem'")
        assert names(backup) == []


def test_a_mapping_of_shmem_is_the_memory_of_the_backup(backup: Path) -> None:
    store(backup, 1)
    array = np.memmap(backup / ".shmem", np.uint8, "r+", shape=(4, PAGE))
    assert (array[0] == 1).all()
    array[2] = 9
    assert (backup / "3").read_bytes() == b"\x09" * PAGE
    store(backup, 3)
    assert (array[2] == 3).all()
    assert names(backup) == ["1", "3"]
    assert array[1].sum() == 0
    assert names(backup) == ["1", "2", "3"], "a hole read through a map is a zero page, as with any tmpfs"


def test_the_size_can_be_changed_through_shmem_and_by_attribute(backup: Path) -> None:
    store(backup, 1, 2, 3)
    changes: list[Callable[[int], object]] = [
        lambda size: os.truncate(backup / ".shmem", size),
        lambda size: set_attribute(backup, "size", size),
    ]
    for change in changes:
        for pages in (3, 1000, 5):
            change(pages * PAGE)
            assert attribute(backup, "size") == str(pages * PAGE)
            wait_until(lambda: (backup / ".image").stat().st_size == pages * PAGE, "the image's size", 2)  # noqa: B023
            with opened(backup / str(pages), os.O_CREAT | os.O_RDWR):
                if pages > 3:
                    (backup / str(pages)).unlink()
    os.truncate(backup / ".shmem", 2 * PAGE)
    assert names(backup) == ["1", "2"]
    with raises_errno(ENOENT):
        (backup / "3").read_bytes()
    set_attribute(backup, "size", 2 * PAGE - 1)
    assert attribute(backup, "size") == str(2 * PAGE), "sizes are rounded up to whole pages"
    with raises_errno(EINVAL):
        set_attribute(backup, "size", PAGE)
    assert (backup / "2").read_bytes() == b"\2" * PAGE


def test_bytes_past_the_last_whole_page_do_not_prevent_removal(backup: Path) -> None:
    """A write to .shmem can make the size end within a page. rm -r must find everything all the same."""
    store(backup, 1)
    os.truncate(backup / ".shmem", 2 * PAGE + 100)
    with opened(backup / ".shmem") as fd:
        os.pwrite(fd, b"x", 2 * PAGE + 50)
    assert [name for name in ("1", "2", "3") if (backup / name).exists()] == names(backup) == ["1"]
    run(f"rm -r '{backup}'")
    assert not backup.exists()


# --- listings ---


def test_a_listing_shows_only_pages_in_order(mnt: Path, backup: Path) -> None:
    assert names(backup) == []
    handles = [1, 2, 9, 10, 11, 100, 1000, SIZE // PAGE]
    store(backup, *reversed(handles))
    assert names(backup) == [str(handle) for handle in handles]
    assert os.listdir(mnt) == ["a"]
    for entry in os.scandir(backup):
        assert entry.is_file()
        assert entry.inode() == os.stat(entry.path).st_ino
    text = run(f"ls -fa '{backup}'").split()
    assert text == [".", "..", *map(str, handles)]
    for hidden in (".image", ".shmem"):
        assert (backup / hidden).exists()
    for hidden in (".stats", ".config"):
        assert (mnt / hidden).exists()


def test_a_listing_of_ten_thousand_pages_is_complete(backup: Path) -> None:
    count = 10_000
    with opened(backup / ".image") as fd:
        for idx in range(0, count, 250):
            assert os.pwrite(fd, b"x" * (250 * PAGE), idx * PAGE) == 250 * PAGE
    assert names(backup) == [str(handle) for handle in range(1, count + 1)]
    assert run(f"ls -1 -U -s --block-size={PAGE} '{backup}' | wc -l").strip() == str(count + 1)
    entries = os.scandir(backup)  # one that is left half way keeps nobody else from a whole one
    assert [entry.name for entry in itertools.islice(entries, 300)][-1] == "300"
    for handle in range(2, count + 1, 2):
        (backup / str(handle)).unlink()
    rest = [int(entry.name) for entry in entries]
    assert rest == sorted(set(rest))
    assert set(range(301, count + 1, 2)) <= set(rest)
    assert names(backup) == [str(handle) for handle in range(1, count + 1, 2)]


def test_many_directories_can_be_listed_at_once(mnt: Path) -> None:
    backups = [mnt / f"b{n}" for n in range(80)]  # more than the daemon keeps in mind
    for n, backup in enumerate(backups):
        backup.mkdir()
        with opened(backup / ".image") as fd:
            for idx in range(n, n + 600 * (n < 20), 2):
                os.pwrite(fd, b"x", idx * PAGE)
            os.pwrite(fd, b"x" * (100 * PAGE), n * PAGE)
    expected = [[str(idx + 1) for idx in range(n, n + (600 if n < 20 else 100)) if idx < n + 100 or not (idx - n) % 2]
                for n in range(80)]  # fmt: skip
    with contextlib.ExitStack() as stack:
        listings = [stack.enter_context(os.scandir(backup)) for backup in backups]
        found: list[list[str]] = [[] for _ in backups]
        for row in itertools.zip_longest(*listings):
            for listed, entry in zip(found, row, strict=True):
                if entry:
                    listed.append(entry.name)
    assert found == expected
    assert sorted(os.listdir(mnt)) == sorted(backup.name for backup in backups)


@pytest.mark.parametrize("how", ["page files", ".image", ".shmem"])
def test_a_listing_has_no_gaps_or_duplicates_while_pages_change(backup: Path, how: str) -> None:
    count = 3000
    lasting = {handle for handle in range(1, count + 1) if handle % 3 == 0}
    with opened(backup / ".image") as fd:
        for handle in lasting:
            os.pwrite(fd, b"x", (handle - 1) * PAGE)
    stop = threading.Event()

    def churn() -> None:
        chance = random.Random(3)
        with opened(backup / (".image" if how == "page files" else how)) as fd:
            while not stop.is_set():
                handle = chance.randrange(1, count) // 3 * 3 + 1
                if chance.random() < 0.5 and how == "page files":
                    with contextlib.suppress(FileNotFoundError):
                        (backup / str(handle)).unlink()
                elif chance.random() < 0.5 and how == ".image":
                    set_attribute(backup, "drop", handle)
                elif chance.random() < 0.5:
                    _libc.fallocate(fd, 3, ctypes.c_int64((handle - 1) * PAGE), ctypes.c_int64(PAGE))
                else:
                    os.pwrite(fd, b"x", (handle - 1) * PAGE)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(40):
            listed = [int(name) for name in names(backup)]
            assert listed == sorted(set(listed)), "in order, none twice"
            assert lasting <= set(listed), "none is missing that was there all the time"
            assert not [handle for handle in listed if handle % 3 == 2], "none that never was"
    finally:
        stop.set()
        thread.join(10)


def test_a_listing_of_the_root_is_complete_while_backups_change(mnt: Path) -> None:
    lasting = {f"lasting {n}" for n in range(500)}
    for name in lasting:
        (mnt / name).mkdir()
    stop = threading.Event()

    def churn() -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            (mnt / f"new {n}").mkdir()
            (mnt / f"new {n}").rename(mnt / f"renamed {n}")
            if n >= 20:
                (mnt / f"renamed {n - 20}").rmdir()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(40):
            listed = os.listdir(mnt)
            assert len(set(listed)) == len(listed)
            assert lasting <= set(listed)
    finally:
        stop.set()
        thread.join(10)


# --- renaming backups ---


def test_open_descriptors_work_after_a_rename(mnt: Path, backup: Path) -> None:
    store(backup, 1)
    with opened(backup / "1") as page, opened(backup / ".image") as image, opened(backup, os.O_RDONLY) as directory:
        inode = backup.stat().st_ino
        backup.rename(mnt / "b")
        os.pwrite(page, b"page", 0)
        assert os.pread(image, 4, 0) == b"page"
        os.close(os.open("2", os.O_CREAT, dir_fd=directory))
        assert names(mnt / "b") == ["1", "2"]
        assert (mnt / "b").stat().st_ino == inode == os.fstat(directory).st_ino
        assert (mnt / "b" / ".shmem").read_bytes()[:4] == b"page"
        with raises_errno(ENOENT):
            backup.stat()
        backup.mkdir()
        assert names(backup) == []
        assert os.pread(page, 4, 0) == b"page"


def test_a_rename_replaces_an_empty_backup(mnt: Path, backup: Path) -> None:
    store(backup, 1)
    (mnt / "b").mkdir()
    with opened(mnt / "b" / ".image") as replaced:
        backup.rename(mnt / "b")
        assert os.listdir(mnt) == ["b"]
        assert (mnt / "b" / "1").read_bytes() == b"\1" * PAGE
        with raises_errno(ESTALE):
            os.pread(replaced, 1, 0)
    assert _libc.renameat2(-100, os.fsencode(mnt / "b"), -100, os.fsencode(mnt / "c"), NOREPLACE) == 0
    (mnt / "c").rename(mnt / "c")
    assert names(mnt / "c") == ["1"]
    os.truncate(mnt / "c" / ".image", 0)
    (mnt / "c").rmdir()
    assert os.listdir(mnt) == []


def test_many_backups_can_be_renamed_in_a_ring(mnt: Path) -> None:
    for n in range(10):
        (mnt / str(n)).mkdir()
        store(mnt / str(n), n + 1)
    for _ in range(3):
        (mnt / "0").rename(mnt / "free")
        for n in range(9):
            (mnt / str(n + 1)).rename(mnt / str(n))
        (mnt / "free").rename(mnt / "9")
    assert [names(mnt / str(n)) for n in range(10)] == [[str((n + 3) % 10 + 1)] for n in range(10)]


# --- df ---


@pytest.mark.parametrize("page_size", [PAGE, 16 * PAGE])
def test_statfs_counts_pages(mountpoint: Path, page_size: int) -> None:
    with Mount(mountpoint, f"size=16m,page_size={page_size},nr_inodes=100") as mount:
        pages = (16 << 20) // page_size
        room = os.statvfs(mount.path)
        assert (room.f_bsize, room.f_frsize, room.f_blocks, room.f_namemax) == (page_size, page_size, pages, 255)
        assert (room.f_bfree, room.f_bavail, room.f_files, room.f_ffree) == (pages, pages, 100, 99)
        a = mount.path / "a"
        a.mkdir()
        with opened(a / ".image") as fd:
            os.pwrite(fd, b"x", 0)
            os.pwrite(fd, b"x" * 2, 8 * page_size - 1)
        create(a / "20")
        for path in (mount.path, a, a / "1"):
            room = os.statvfs(path)
            assert (room.f_bfree, room.f_bavail, room.f_ffree) == (pages - 4, pages - 4, 98)
        assert run(f"df -B{page_size} --output=size,used,avail '{mount.path}'").split()[-3:] == [
            str(pages), "4", str(pages - 4)
        ]  # fmt: skip
        assert int(run(f"du -s -B{page_size} '{mount.path}'").split()[0]) == len(names(a)) == 4
        assert [entry.stat().st_size for entry in os.scandir(a)] == [page_size] * 4
        assert attribute(a, "pages") == "4"
        assert attribute(mount.path, "page_size") == str(page_size)


# --- C7: pages do not tear ---

WRITER = """
import os, sys
fd, page_size, serial = os.open(sys.argv[1], os.O_WRONLY), int(sys.argv[2]), 0
pages = [bytes([byte]) * page_size for byte in range(256)]
print(flush=True)
while True:
    serial += 1
    assert os.pwrite(fd, pages[serial % 256], 0) == page_size
"""

READER = """
import os, sys
fd, page_size, seen = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2]), set()
for n in range(int(sys.argv[3])):
    page = os.pread(fd, page_size, 0)
    assert len(page) == page_size
    assert page == page[:1] * page_size, f"torn after {n}: {sorted(set(page))}"
    seen.add(page[0])
print(len(seen))
"""


@pytest.mark.parametrize("page_size", [PAGE, 16 * PAGE])
@pytest.mark.parametrize(("written", "read"), [("1", "1"), ("1", ".image"), (".image", "1")])
def test_c7_a_reader_sees_an_old_or_new_page_but_never_a_mix(
    mountpoint: Path, page_size: int, written: str, read: str
) -> None:
    def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with Mount(mountpoint, f"size=16m,page_size={page_size}") as mount:
        a = mount.path / "a"
        a.mkdir()
        create(a / "1")
        processes = [start(WRITER, a / written, page_size) for _ in range(2)]
        try:
            for writer in processes:
                assert writer.stdout
                assert writer.stdout.readline() == "\n"
            readers = [start(READER, a / read, page_size, 3000) for _ in range(3)]
            processes += readers
            for reader in readers:
                out, err = reader.communicate(timeout=60)
                assert not err
                assert int(out) > 10, "the reader saw pages change"
            assert [writer.poll() for writer in processes[:2]] == [None, None]
        finally:
            for process in processes:
                process.kill()
                process.communicate()
