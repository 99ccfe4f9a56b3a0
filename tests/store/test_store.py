"""The store: a private tmpfs with a file for each backup."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import descriptors
from ttmfs.errors import (
    BackupAbsent,
    BackupEnded,
    BackupExists,
    InvalidArgument,
    NameTooLong,
    NoRoom,
    NotPermitted,
    NotSupported,
)
from ttmfs.linux import system_calls as linux
from ttmfs.linux.tmpfs import new_tmpfs
from ttmfs.options import Options
from ttmfs.stores import backup_files
from ttmfs.stores.private_tmpfs import PrivateTmpfs
from ttmfs.stores.store import Store, check_filesystem

PAGE = os.sysconf("SC_PAGE_SIZE")


def create(store: Store, name: str, size: int = 16 * PAGE) -> int:
    return store.create(name, size, 0o755, os.geteuid(), os.getegid())


@pytest.fixture
def store() -> Iterator[Store]:
    made = PrivateTmpfs.make(Options.parse("size=1m"))
    yield made
    made.close()


def test_the_private_tmpfs_is_mounted_nowhere(store: Store) -> None:
    device = os.stat(store.files.path("")).st_dev
    assert f"{os.major(device)}:{os.minor(device)}" not in Path("/proc/self/mountinfo").read_text()


def test_the_options_set_mode_owner_size_and_inodes_of_the_tmpfs() -> None:
    made = PrivateTmpfs.make(Options.parse("size=100k,nr_inodes=7,mode=1770,uid=12,gid=34"))
    try:
        root, room = made.files.stat(), made.room()
        assert (root.st_mode & 0o7777, root.st_uid, root.st_gid) == (0o1770, 12, 34)
        assert (room.f_blocks * room.f_frsize, room.f_files) == (100 << 10, 7)
    finally:
        made.close()


def test_c14_creating_allocates_no_page(store: Store) -> None:
    before = store.room().f_bfree
    create(store, "a", 1 << 40)
    assert store.room().f_bfree == before
    found = os.fstat(store.files.descriptor(store.files.find("a")))
    assert (found.st_size, found.st_blocks) == (1 << 40, 0)


def test_a_backup_is_created_complete_or_not_at_all(store: Store) -> None:
    id = store.create("a", 5 * PAGE, 0o2750, 12, 34)
    found = os.fstat(store.files.descriptor(store.files.find("a")))
    assert (store.files.find("a"), found.st_size, found.st_mode & 0o7777) == (id, 5 * PAGE, 0o2750)
    assert (found.st_uid, found.st_gid) == (12, 34)
    with pytest.raises(BackupExists):
        create(store, "a")
    free = store.room().f_ffree
    with pytest.raises(NameTooLong):
        create(store, "x" * 256)
    assert (store.files.scan(), store.room().f_ffree) == ([id], free)


def test_the_kernel_limits_the_number_of_backups() -> None:
    made = PrivateTmpfs.make(Options.parse("size=1m,nr_inodes=3"))
    try:
        create(made, "a")
        create(made, "b")
        with pytest.raises(NoRoom):
            create(made, "c")
        made.files.remove(made.files.find("a"))
        create(made, "c")
    finally:
        made.close()


def test_the_default_number_of_inodes_is_the_pages_of_the_budget() -> None:
    """Each takes 1 KiB in the kernel, also for attributes.

    tmpfs by default allows half as many as the RAM has pages.
    """
    made = PrivateTmpfs.make(Options.parse("size=1m"))
    try:
        assert made.room().f_files == 4096
        made.resize(8192 * PAGE)
        assert made.room().f_files == 8192
        made.resize(1 << 20)
        assert made.room().f_files == 8192, "what there is may be in use"
    finally:
        made.close()
    made = PrivateTmpfs.make(Options.parse("size=1m,nr_inodes=7"))
    try:
        made.resize(8192 * PAGE)
        assert made.room().f_files == 7
    finally:
        made.close()


def test_ids_are_never_used_twice(store: Store) -> None:
    seen = set()
    for _ in range(100):
        id = create(store, "a")
        assert id not in seen
        seen.add(id)
        store.files.remove(id)


def test_hidden_names_and_other_file_types_are_not_backups(store: Store) -> None:
    os.close(os.open(store.files.path(".hidden"), os.O_CREAT | os.O_WRONLY))
    os.mkdir(store.files.path("directory"))
    os.symlink("x", store.files.path("link"))
    assert store.files.scan() == []
    for name in ".hidden", "directory", "link", "nothing":
        with pytest.raises(BackupAbsent):
            store.files.find(name)


def test_no_name_leads_out_of_the_store(store: Store, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"x" * PAGE)
    for name in str(victim), "../a", "a/b", "", ".", "a\0b", "\ud800":
        with pytest.raises(BackupAbsent):
            store.files.find(name)
    assert store.files.scan() == []


def test_a_failed_creation_leaks_no_descriptor(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon without privilege cannot change owners. Repeated attempts must not exhaust anything."""
    before, free = descriptors(os.getpid()), store.room().f_ffree
    monkeypatch.setattr(os, "geteuid", lambda: 1234)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    for _ in range(3):
        with pytest.raises(NotPermitted):
            store.create("a", PAGE, 0o755, 99, 99)
    assert (descriptors(os.getpid()), store.room().f_ffree) == (before, free)


def test_a_low_descriptor_limit_keeps_fewer_files_open() -> None:
    """With `ulimit -n 60` a store keeps 30 of 100 files open, and every file can be used."""
    code = """if True:
        from ttmfs.options import Options
        from ttmfs.stores.private_tmpfs import PrivateTmpfs
        store = PrivateTmpfs.make(Options.parse("size=1m"))
        ids = [store.create(str(i), 4096, 0o755, 0, 0) for i in range(100)]
        print(len([store.files.descriptor(id) for id in ids]), len(store.files.open))
    """
    limited = ["bash", "-c", 'ulimit -n 60 && exec "$@"', "-", sys.executable, "-c", code]
    assert subprocess.check_output(limited, text=True) == "100 30\n"


def test_a_closed_store_stays_closed() -> None:
    store = PrivateTmpfs.make(Options.parse("size=1m"))
    id = create(store, "a")
    store.close()
    store.close()
    with pytest.raises(BackupEnded):
        store.files.descriptor(id)


def test_removing_a_backup_ends_it_and_frees_its_memory(store: Store) -> None:
    id = create(store, "a")
    before = store.room().f_bfree
    os.pwrite(store.files.descriptor(id), bytes(4 * PAGE), 0)
    assert store.room().f_bfree == before - 4
    store.files.remove(id)
    assert store.room().f_bfree == before
    for use in store.files.descriptor, store.files.name_of, store.files.remove:
        with pytest.raises(BackupEnded):
            use(id)


def test_a_rename_keeps_the_id(store: Store) -> None:
    id, other = create(store, "a"), create(store, "b")
    with pytest.raises(BackupExists):
        store.files.rename(id, "b", replace=False)
    store.files.rename(id, "b", replace=True)
    assert (store.files.name_of(id), store.files.scan()) == ("b", [id])
    with pytest.raises(BackupEnded):
        store.files.descriptor(other)


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make new stores keep few files open."""
    monkeypatch.setattr(backup_files, "OPEN_FILES", 64)


@pytest.mark.usefixtures("few_files")
def test_only_the_most_recently_used_files_stay_open(store: Store) -> None:
    before = len(descriptors(os.getpid()))
    ids = [create(store, str(number)) for number in range(backup_files.OPEN_FILES + 20)]
    assert len(descriptors(os.getpid())) == before + backup_files.OPEN_FILES
    for id in ids:  # every one can be had all the same, and is the right one
        assert os.fstat(store.files.descriptor(id)).st_ino == id
    assert len(descriptors(os.getpid())) == before + backup_files.OPEN_FILES


def test_the_store_sees_changes_made_from_outside(store: Store) -> None:
    kept = [create(store, name) for name in ("a", "b", "c")]
    os.rename(store.files.path("a"), store.files.path("renamed"))
    os.unlink(store.files.path("b"))
    os.close(os.open(store.files.path("new"), os.O_CREAT | os.O_WRONLY))
    assert store.files.find("renamed") == kept[0]
    ids = store.files.scan()
    assert [store.files.name_of(id) for id in ids] == ["renamed", "c", "new"], "in the order of their making"


@pytest.mark.usefixtures("few_files")
def test_a_file_that_replaces_a_backup_is_not_taken_for_it(store: Store) -> None:
    id = create(store, "a")
    for number in range(backup_files.OPEN_FILES):  # so that it is not open any more
        create(store, f"other{number}")
    os.unlink(store.files.path("a"))
    os.close(os.open(store.files.path("a"), os.O_CREAT | os.O_WRONLY))
    with pytest.raises(BackupEnded):
        store.files.descriptor(id)


def test_the_budget_can_change_but_not_below_the_stored_pages(store: Store) -> None:
    os.pwrite(store.files.descriptor(create(store, "a")), bytes(16 * PAGE), 0)
    store.resize(2 << 20)
    assert store.room().f_blocks * PAGE == 2 << 20
    with pytest.raises(InvalidArgument):
        store.resize(15 * PAGE)
    assert store.room().f_blocks * PAGE == 2 << 20
    store.resize(16 * PAGE)
    assert store.room().f_bfree == 0


def test_a_filesystem_with_huge_folios_is_refused() -> None:
    """With huge folios up to 2 MiB look like data after one page is written."""
    directory, _ = new_tmpfs(size="16m", huge="always")
    try:
        with pytest.raises(NotSupported, match="cannot tell pages of 4k apart"):
            check_filesystem(directory, PAGE)
    finally:
        os.close(directory)


def test_an_option_refused_by_tmpfs_is_named_in_the_error() -> None:
    with pytest.raises(OSError, match="tmpfs option nonsense=1"):
        new_tmpfs(nonsense="1")


def test_residency_is_the_same_with_and_without_cachestat(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = store.files.descriptor(create(store, "a", 1 << 30))
    for page in 0, 1, 5, 100_000:
        os.pwrite(fd, b"x", page * PAGE)
    for number in linux._CACHESTAT, 10**6:  # which no kernel has
        monkeypatch.setattr(linux, "_CACHESTAT", number)
        assert linux.residency(fd, 0, 1 << 30) == (4, 0)
        assert linux.resident(fd, 0, 1 << 30) == 4
        assert linux.residency(fd, PAGE, 4 * PAGE) == (1, 0)
        assert linux.residency(fd, PAGE + 1, 4 * PAGE) == (2, 0), "five base pages are touched"
    assert os.fstat(fd).st_blocks == 4 * PAGE // 512, "looking has put no page into the holes"
