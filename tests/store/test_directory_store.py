"""A directory as a store: its lock, ids and counts, which the kernel keeps for a private tmpfs."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import stores
import ttmfs
from harness import descriptors
from ttmfs.errors import BackupEnded, InvalidArgument, NoRoom, NotSupported, StoreBusy
from ttmfs.fuse import inodes
from ttmfs.linux import system_calls as linux
from ttmfs.model.pool import Pool
from ttmfs.options import Options
from ttmfs.stores import backup_files, make_store
from ttmfs.stores.directory import Directory
from ttmfs.stores.directory_record import FILE, IDS_AT_ONCE, MAX_ID, MAX_PAGES, DirectoryRecord
from ttmfs.stores.page_file import finished

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(params=["tmpfs", "ext4"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with stores.filesystem(tmp_path / "below", request.param) as path:
        yield path


def opened(directory: Path, **options: object) -> Pool:
    parsed = Options(store=str(directory), **{"size": 1 << 20, "backup_size": 1 << 20, **options})  # type: ignore[arg-type]
    return Pool(make_store(parsed), parsed)


def recount(pool: Pool) -> None:
    """Make the next question count the pages again."""
    assert isinstance(pool.store, Directory)
    pool.store._recounts.reset()


def do(result: object) -> None:
    """Run the coroutine that a method returned, if it returned one."""
    trio.run(finished, result)


def create(pool: Pool, name: str) -> ttmfs.Backup:
    async def main() -> ttmfs.Backup:
        return await pool.create(name)

    return trio.run(main)


def test_a_write_reaches_its_backup_among_many(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting opens every file and closes the least recently used ones, perhaps the one that is written to."""
    monkeypatch.setattr(backup_files, "OPEN_FILES", 256)
    pool = opened(directory, size=64 << 20)
    try:
        backups = [create(pool, str(number)) for number in range(backup_files.OPEN_FILES + 50)]
        for number in 0, 200, len(backups) - 1:
            recount(pool)
            do(backups[number].file.write(5 * PAGE, b"%03d" % number * PAGE))
        assert [number for number, backup in enumerate(backups) if backup.pages] == [0, 200, len(backups) - 1]
        for number in 0, 200, len(backups) - 1:
            assert backups[number].file.read(5 * PAGE, 3) == b"%03d" % number
        assert pool.room().stored == 9 * PAGE
    finally:
        pool.close()


def test_every_way_of_storing_and_dropping_keeps_the_page_count(directory: Path) -> None:
    pool = opened(directory)
    try:
        backup, other = create(pool, "a"), create(pool, "b")
        steps = (
            (lambda: backup.file.write(0, bytes(10 * PAGE)), 10),
            (lambda: backup.file.write(5 * PAGE + 7, bytes(10 * PAGE)), 16),
            (lambda: backup.file.create_page(100), 17),
            (lambda: backup.file.create_page(100), 17),
            (lambda: other.file.write(0, b"x"), 18),
            (lambda: backup.file.drop_range(0, 3), 15),
            (lambda: backup.file.drop_run(0, 256), 1),
            (lambda: backup.file.write(0, bytes(20 * PAGE)), 21),
            (lambda: backup.file.truncate(10 * PAGE + 1), 12),
            (lambda: backup.file.zero(0, 5), 12),
            (lambda: backup.file.resize(2 << 20), 12),
            (lambda: other.fini(), 11),
        )
        for step, pages in steps:
            do(step())
            assert pool.store.room().f_blocks - pool.store.room().f_bfree == pages
            assert backup.pages == sum(past - first for first, past in backup.file.extents())
        assert pool.store.admit(pool.files.find("a"), 10**6) == 256 - 11
    finally:
        pool.close()


def test_a_partly_stored_page_counts_as_a_page_but_takes_only_its_part(tmp_path: Path) -> None:
    async def pages() -> int:
        return await pool.count_pages()

    size = 16 * PAGE
    with stores.filesystem(tmp_path / "below", "tmpfs") as directory:
        pool = opened(directory, page_size=size, uid_size=1 << 20)
        try:
            backup, other = create(pool, "a"), create(pool, "b")
            for name, idx in ("a", 1), ("a", 4), ("b", 2):
                with (directory / name).open("rb+") as file:
                    os.pwrite(file.fileno(), b"x", idx * size)
            assert (backup.pages, other.pages, trio.run(pages)) == (2, 1, 3)
            assert (backup.file.taken, other.file.taken) == (2 * PAGE, PAGE)
            recount(pool)
            assert pool.room().stored == 2 * size, "each of them rounded up"
            do(backup.file.write(0, bytes(size)))
            assert (backup.pages, backup.file.taken, trio.run(pages)) == (3, size + 2 * PAGE, 4)
            do(backup.file.drop_range(4, 5))
            assert (backup.pages, backup.file.taken, trio.run(pages)) == (2, size + PAGE, 3)
        finally:
            pool.close()


def test_the_next_mount_reuses_no_id(directory: Path) -> None:
    seen: set[int] = set()
    for _ in range(3):
        pool = opened(directory)
        try:
            assert IDS_AT_ONCE > 50
            for number in range(50):
                id = pool.store.create(str(number), PAGE, 0o755, os.geteuid(), os.getegid())
                assert id not in seen
                seen.add(id)
            for name in range(50):
                trio.run(pool.remove, str(name))
        finally:
            pool.close()
    kept = json.loads((directory / FILE).read_text())
    assert kept["next_id"] > max(seen)
    assert (directory / FILE).stat().st_size == 256


def test_an_old_record_gives_each_backup_its_own_id(directory: Path) -> None:
    """After a loss of power the marks of files can be on the disk while the record of ids is old."""
    pool = opened(directory)
    old = (directory / FILE).read_bytes()
    for number in range(6):
        do(create(pool, str(number)).file.write(0, b"I am %d" % number))
    pool.close()
    (directory / FILE).write_bytes(old)
    pool = opened(directory)
    try:
        do(create(pool, "6").file.write(0, b"I am 6"))
        assert sorted(trio.run(pool.names)) == list("0123456")
        assert len({pool.files.find(name) for name in "0123456"}) == 7
        for name in "0123456":
            assert pool.file(pool.files.find(name)).read(0, 6) == f"I am {name}".encode()
    finally:
        pool.close()


def test_backups_keep_their_ids_across_mounts(directory: Path) -> None:
    pool = opened(directory)
    create(pool, "a"), create(pool, "b")
    before = pool.files.find("a"), pool.files.find("b")
    trio.run(pool.rename, "a", "c")
    pool.close()
    pool = opened(directory)
    try:
        assert (pool.files.find("c"), pool.files.find("b")) == before
        assert pool.files.scan() == sorted(before)
    finally:
        pool.close()


def test_a_file_that_took_a_backups_name_is_left_alone(directory: Path) -> None:
    pool = opened(directory)
    try:
        backup = create(pool, "a")
        os.rename(directory / "a", directory / "moved")
        (directory / "a").write_text("someone's notes")
        with pytest.raises(BackupEnded):
            trio.run(backup.fini)
        assert (directory / "a").read_text() == "someone's notes"
        assert trio.run(pool.names) == ["moved"]
    finally:
        pool.close()


def test_closing_releases_the_directory_for_the_next_mount(directory: Path) -> None:
    before = descriptors(os.getpid())
    pool = opened(directory)
    with pytest.raises(StoreBusy, match="in use by another mount"):
        opened(directory)
    pool.close()
    assert descriptors(os.getpid()) == before
    opened(directory).close()
    with pytest.raises(InvalidArgument, match="mount it with page_size=4k"):
        opened(directory, page_size=4 * PAGE)
    assert descriptors(os.getpid()) == before


WRITTEN = {"format": 1, "page_size": PAGE, "grain": PAGE, "tag": "0123456789abcdef", "next_id": 77}

CRAFTED: dict[str, tuple[object, ...]] = {
    "format": (2, 0, True, "1", None),
    "page_size": ("x", True, 0, -PAGE, PAGE + 1, 10**60, None, [PAGE]),
    "grain": ("x", 0, -1, 10**60, 2 * PAGE, 1.5, True),
    "tag": (
        None,
        5,
        "",
        "0123456789abcde ",
        " 123456789abcdef",
        "0123 56789abcdef",
        "0123456789ABCDEF",
        "x" * 90,
        "é" * 16,
    ),
    "next_id": (-1, 0, 1, 10**100, 1 << 64, 2**34, 1.5, float("inf"), "2", True, None, [2], {}),
}
TEXTS = (
    *(
        b"",
        b"nonsense",
        b"{}",
        b"[]",
        b"5",
        b"null",
        b"\0" * 256,
        b"\xff\xfe\x00",
        b"[" * 256,
        json.dumps(WRITTEN).encode()[:60],
    ),
    *(json.dumps({**WRITTEN, key: value}).encode() for key, values in CRAFTED.items() for value in values),
    *(
        json.dumps({key: value for key, value in WRITTEN.items() if key != left}).encode()
        for left in ("tag", "next_id")
    ),
)


@pytest.mark.parametrize("text", TEXTS)
def test_an_unknown_record_file_is_refused_and_left_unchanged(tmp_path: Path, text: bytes) -> None:
    before = descriptors(os.getpid())
    (tmp_path / FILE).write_bytes(text)
    with pytest.raises(NotSupported, match=r"this version of ttmfs cannot read its .ttmfs \(.*move .ttmfs away"):
        DirectoryRecord(at := os.open(tmp_path, os.O_RDONLY), PAGE)
    os.close(at)
    assert (tmp_path / FILE).read_bytes() == text
    assert descriptors(os.getpid()) == before


def test_an_enormous_record_file_is_not_read_whole(directory: Path) -> None:
    opened(directory).close()
    os.truncate(directory / FILE, 1 << 40)
    opened(directory).close()


def test_the_advice_for_a_forged_record_keeps_every_backup(directory: Path) -> None:
    pool = opened(directory)
    do(create(pool, "a").file.write(3 * PAGE, b"kept" * (PAGE // 4)))
    pool.close()
    (directory / FILE).write_text(json.dumps({**WRITTEN, "next_id": -5}))
    with pytest.raises(NotSupported, match=r"next_id is -5.*move .ttmfs away: every backup stays"):
        opened(directory)
    (directory / FILE).rename(directory / "moved")
    pool = opened(directory)
    try:
        assert trio.run(pool.names) == ["a"]
        assert list(pool.file(pool.files.find("a")).extents()) == [(3, 4)]
        assert pool.file(pool.files.find("a")).read(3 * PAGE, 4) == b"kept"
    finally:
        pool.close()


def test_the_last_ids_work_after_all_are_used_up(directory: Path) -> None:
    assert (MAX_ID, MAX_PAGES) == (inodes.MAX_BACKUP_ID, inodes.MAX_HANDLE)
    (directory / FILE).write_text(json.dumps({**WRITTEN, "next_id": MAX_ID}))
    pool = opened(directory)
    try:
        do(create(pool, "last").file.write(0, b"x"))
        assert pool.files.find("last") == MAX_ID
        with pytest.raises(NoRoom, match="used up: unmount it, and move"):
            create(pool, "more")
        (directory / "foreign").write_bytes(bytes(PAGE))
        assert trio.run(pool.names) == ["last"]
    finally:
        pool.close()
    pool = opened(directory)
    assert trio.run(pool.names) == ["last"]
    pool.close()


def test_a_file_with_more_pages_than_handles_is_not_a_backup(tmp_path: Path) -> None:
    with stores.filesystem(tmp_path / "below", "xfs") as directory:
        for name, pages in ("most", MAX_PAGES), ("more", MAX_PAGES + 1), ("petabyte", (1 << 50) // PAGE):
            with (directory / name).open("xb") as file:
                file.truncate(pages * PAGE)
        pool = opened(directory)
        try:
            assert trio.run(pool.names) == ["most"]
        finally:
            pool.close()


def test_a_forged_mark_is_ignored(directory: Path) -> None:
    """A user who can write a file can write its mark, but cannot make it that of another file."""
    pool = opened(directory)
    try:
        create(pool, "a")
        id, mark = pool.files.find("a"), os.getxattr(directory / "a", "user.ttmfs.id")
        (directory / "b").write_bytes(bytes(PAGE))
        tag, _, ino = mark.decode().split()
        own = (directory / "b").stat().st_ino
        forgeries = (
            mark,
            b"",
            b"\xff",
            b"1",
            *(
                f"{words}".encode()
                for words in (f"{tag} {id} {own}", f"{tag} 99999 {own}", f"{tag} 0 {own}", f"x {id} {ino}")
            ),
        )
        for forged in forgeries:
            os.setxattr(directory / "b", "user.ttmfs.id", forged)
            assert pool.files.find("b") not in (id, 0, 99999)
    finally:
        pool.close()


def test_a_file_with_any_name_and_mark_does_no_harm(directory: Path) -> None:
    odd = [b"-rf", b"a\nb", b"\xff\xfe", b" ", b"%s", b"x" * 255, b"\x1b[31m", b"*", b"\\"]
    marks = [b"", b"x" * 2000, b"0 " + b"9" * 2000 + b" 1", b"\0", b"1 2 3", b"%d %d %d", b"- - -", b" 1 1", b"\xff"]
    opened(directory).close()
    tag = json.loads((directory / FILE).read_text())["tag"].encode()
    for name, mark in zip(odd, marks, strict=True):
        path = os.fsencode(directory) + b"/" + name
        with open(path, "xb") as file:
            file.write(name[:1] * PAGE)
        os.setxattr(path, "user.ttmfs.id", mark.replace(b"1 2", tag + b" -2"))
        os.setxattr(path, "user.other", b"x")
    pool = opened(directory)
    try:
        assert sorted(map(os.fsencode, trio.run(pool.names))) == sorted(odd)
        ids = {pool.files.find(os.fsdecode(name)) for name in odd}
        assert len(ids) == len(odd)
        assert all(2 <= id <= MAX_ID for id in ids)
        for name in odd:
            assert pool.file(pool.files.find(os.fsdecode(name))).read(0, 1) == name[:1]
    finally:
        pool.close()


def test_nr_inodes_limits_the_number_of_backups(directory: Path) -> None:
    pool = opened(directory, nr_inodes=3)
    try:
        create(pool, "a")
        create(pool, "b")
        with pytest.raises(NoRoom):
            create(pool, "c")
    finally:
        pool.close()


@pytest.mark.parametrize("page_size", [PAGE, 16 * PAGE])
def test_page_runs_are_found_in_any_interval(directory: Path, page_size: int) -> None:
    with (directory / "file").open("xb+") as file:
        file.truncate(64 * page_size)
        there = {0, 1, 2, 5, 9, 10, 40, 63}
        for idx in there:
            os.pwrite(file.fileno(), b"x", idx * page_size + idx % 16 * PAGE % page_size)
        for first in range(64):
            for past in range(first, 65, 7):
                runs = list(linux.page_runs(file.fileno(), page_size, first, past))
                assert {idx for run in runs for idx in range(*run)} == {idx for idx in there if first <= idx < past}
                assert all(a[1] < b[0] for a, b in itertools.pairwise(runs)), "apart and ascending"
