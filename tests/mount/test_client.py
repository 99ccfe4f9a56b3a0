"""The synchronous client: the verbs on a mount, natively and through the mount, with the same result."""

import os
import signal
import stat
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from harness import REPOSITORY, Mount, names, run, set_attribute, wait_until
from stores import ALICE, Place, as_user, slow_swap, swap
from ttmfs.client import Backup, Residency
from ttmfs.errors import (
    BackupAbsent,
    BackupClosed,
    BackupEnded,
    BackupExists,
    InvalidArgument,
    NoRoom,
    PageAbsent,
    StoreFailed,
)

PAGE = os.sysconf("SC_PAGE_SIZE")
WAYS = {"natively": True, "through the mount": False}

NOISE = np.random.default_rng(5).integers(0, 256, (1024, PAGE), np.uint8)


@pytest.fixture
def mnt(shared: Mount) -> Path:
    return shared.path


@pytest.fixture(params=WAYS)
def a(request: pytest.FixtureRequest, mnt: Path) -> Iterator[Backup]:
    """A backup of 4,096 pages."""
    native = WAYS[request.param]
    with Backup.create(mnt / "a", 4096 * PAGE, native=native) as backup:
        assert backup.is_native == native, "root has the one where there is one"
        yield backup


def copied(backup: Backup, handles: Any) -> NDArray[np.uint8]:
    pages = np.full((len(handles), backup.page_size), 0xEE, np.uint8)
    backup.copy_pages(pages, np.asarray(handles, np.uint64))
    return pages


# --- pages ---


def test_c1_the_handle_is_the_index_plus_1(a: Backup) -> None:
    assert a.backup_page(NOISE[0], 0) == 1
    assert a.backup_page(NOISE[1], 4095) == 4096
    assert a.backup_pages(NOISE[:3], 7).tolist() == [8, 9, 10]


def test_c2_backing_up_again_overwrites(a: Backup) -> None:
    a.backup_page(NOISE[0], 5)
    assert a.backup_page(NOISE[1], 5) == 6
    assert (copied(a, [6]) == NOISE[1]).all()
    assert a.handles().tolist() == [6]


@pytest.mark.parametrize("count", [1, 5, 1000])
def test_c8_copying_back_repeatedly_returns_the_stored_bytes(a: Backup, count: int) -> None:
    handles = a.backup_pages(NOISE[:count], 11)
    for _ in range(2):
        assert (copied(a, handles) == NOISE[:count]).all()
    page = bytearray(PAGE)
    a.copy_page(page, int(handles[-1]))
    assert bytes(page) == NOISE[count - 1].tobytes()


def test_copy_takes_handles_in_any_order_and_repeated(a: Backup) -> None:
    a.backup_pages(NOISE[:100], 0)
    wanted = np.array([100, 1, 2, 3, 50, 50, 49, 7], np.uint64)
    assert (copied(a, wanted) == NOISE[wanted - 1]).all()


@pytest.mark.parametrize("around", [0, 400])
def test_c11_a_handle_without_a_page_raises_page_absent(a: Backup, around: int) -> None:
    """The handle is given alone, and among many handles with pages."""
    a.backup_pages(NOISE[:around], 0)
    a.backup_pages(NOISE[:around], around + 1)
    handles = np.arange(1, 2 * around + 2, dtype=np.uint64)
    with pytest.raises(PageAbsent, match=f"handle {around + 1} |No such file"):
        copied(a, handles)
    assert around + 1 not in a.handles(), "looking for it has not made it"


def test_c10_an_index_past_the_size_is_invalid(a: Backup) -> None:
    for call in (
        lambda: a.backup_page(NOISE[0], 4096),
        lambda: a.backup_pages(NOISE[:2], 4095),
        lambda: a.copy_page(bytearray(PAGE), 4097),
        lambda: a.drop(4097),
        lambda: a.drop_pages(np.array([1, 4097], np.uint64)),
    ):
        with pytest.raises(InvalidArgument, match="4096 pages"):
            call()


@pytest.mark.parametrize(
    "call",
    [
        lambda a: a.backup_page(b"short", 0),
        lambda a: a.backup_page(NOISE[0], -1),
        lambda a: a.backup_pages(NOISE[0], 0),
        lambda a: a.backup_pages(NOISE[:2].astype(np.int16), 0),
        lambda a: a.copy_page(bytes(PAGE), 1),
        lambda a: a.copy_page(bytearray(PAGE), 0),
        lambda a: a.copy_pages(np.empty((2, PAGE), np.uint8), np.array([1], np.uint64)),
        lambda a: a.copy_pages(np.empty((1, PAGE), np.uint8), np.array([1], np.int64)),
        lambda a: a.drop_pages(np.array([0], np.uint64)),
        lambda a: a.resize(0),
    ],
)
def test_invalid_arguments_are_refused_with_the_reason(a: Backup, call: Any) -> None:
    with pytest.raises(InvalidArgument, match=r".{20}"):
        call(a)


def test_c12_drop_releases_only_the_named_pages_and_is_idempotent(a: Backup, mnt: Path) -> None:
    handles = a.backup_pages(NOISE[:600], 0)
    a.drop(1)
    a.drop(1)
    a.drop_pages(handles[1::2])
    a.drop_pages(handles[1::2])
    assert a.handles().tolist() == handles[2::2].tolist()
    assert (copied(a, handles[2::2]) == NOISE[2:600:2]).all()
    assert os.statvfs(mnt).f_blocks - os.statvfs(mnt).f_bfree == 299


def test_ten_thousand_runs_are_listed_and_dropped(mnt: Path) -> None:
    """These are more runs than an extended attribute holds."""
    for native in True, False:
        with Backup.create(mnt / "runs", 40_000 * PAGE, native=native) as backup:
            with Backup.open(mnt / "runs") as quick:
                for idx in range(0, 20_000, 2):
                    quick.backup_page(NOISE[0], idx)
            expected = np.arange(1, 20_001, 2, dtype=np.uint64)
            assert (backup.handles() == expected).all()
            backup.drop_pages(expected[:-1])
            assert backup.handles().tolist() == [19_999]
            backup.fini()


def test_c3_running_out_of_room_returns_fewer_handles_and_then_fails(a: Backup, mnt: Path) -> None:
    set_attribute(mnt, "size", 300 * PAGE)
    handles = a.backup_pages(NOISE[:512], 3)
    assert handles.tolist() == list(range(4, 304))
    assert (copied(a, handles) == NOISE[:300]).all()
    with pytest.raises(NoRoom):
        a.backup_pages(NOISE[:5], 2000)
    with pytest.raises(NoRoom):
        a.backup_page(NOISE[0], 2000)
    assert len(a.handles()) == 300, "C6: what was absent stays absent"


@pytest.mark.parametrize("way", WAYS)
def test_c6_a_large_page_is_never_stored_in_part(mountpoint: Path, way: str) -> None:
    size = 64 << 10
    with (
        Mount(mountpoint, f"size={5 * size},page_size=64k"),
        Backup.create(mountpoint / "a", 64 * size, native=WAYS[way]) as backup,
    ):
        pages = NOISE.reshape(-1, size)
        assert backup.backup_pages(pages[:8], 1).tolist() == [2, 3, 4, 5, 6]
        assert (copied(backup, range(2, 7)) == pages[:5]).all()
        with pytest.raises(NoRoom):
            backup.backup_page(pages[0], 40)
        assert backup.residency() == Residency(5, 5, 0)


VERBS = st.one_of(
    st.tuples(st.just("store"), st.integers(0, 70), st.integers(1, 12)),
    st.tuples(st.just("drop"), st.integers(0, 70), st.integers(1, 12)),
    st.tuples(st.just("copy"), st.integers(0, 70), st.integers(1, 12)),
)


def test_native_and_mounted_backups_agree_with_a_dict(mnt: Path) -> None:
    """One list of verbs drives a dict and two backups; results and errors are the same."""
    with Backup.create(mnt / "n", 64 * PAGE) as natively, Backup.create(mnt / "m", 64 * PAGE, native=False) as mounted:

        @hypothesis.settings(max_examples=40, deadline=None)
        @hypothesis.given(st.lists(VERBS, max_size=12))
        def agree(verbs: list[tuple[str, int, int]]) -> None:
            for backup in natively, mounted:
                backup.drop_pages(backup.handles())
            model: dict[int, bytes] = {}
            for number, (verb, idx, count) in enumerate(verbs):
                handles = np.arange(idx + 1, idx + count + 1, dtype=np.uint64)
                pages = NOISE[number * 16 : number * 16 + count]
                results = [outcome(backup, verb, idx, pages, handles) for backup in (natively, mounted)]
                assert results[0] == results[1] == expected(model, verb, idx, pages, handles)
                assert natively.handles().tolist() == mounted.handles().tolist() == sorted(model)

        agree()


def outcome(backup: Backup, verb: str, idx: int, pages: NDArray[np.uint8], handles: NDArray[np.uint64]) -> object:
    try:
        if verb == "store":
            return backup.backup_pages(pages, idx).tolist()
        if verb == "drop":
            backup.drop_pages(handles)
            return None
        return copied(backup, handles).tobytes()
    except (InvalidArgument, PageAbsent) as error:
        return type(error)


def expected(
    model: dict[int, bytes], verb: str, idx: int, pages: NDArray[np.uint8], handles: NDArray[np.uint64]
) -> object:
    if idx + len(handles) > 64:
        return InvalidArgument
    if verb == "store":
        model.update((int(handle), page.tobytes()) for handle, page in zip(handles, pages, strict=True))
        return handles.tolist()
    if verb == "drop":
        for handle in handles:
            model.pop(int(handle), None)
        return None
    if any(int(handle) not in model for handle in handles):
        return PageAbsent
    return b"".join(model[int(handle)] for handle in handles)


@pytest.mark.serial
def test_copying_a_page_takes_the_same_time_in_large_and_small_backups(mountpoint: Path) -> None:
    """A search for the end of the page's run would take a thousand times as long."""
    with (
        Mount(mountpoint, "size=1g"),
        Backup.create(mountpoint / "a") as small,
        Backup.create(mountpoint / "b") as large,
    ):
        small.backup_pages(NOISE[:10], 0)
        for idx in range(0, 100_000, len(NOISE)):
            large.backup_pages(NOISE[: 100_000 - idx], idx)
        page, times = bytearray(PAGE), dict[Backup, list[float]]()
        for _ in range(200):
            for backup in small, large:  # in turns: another process may slow both down
                assert backup.is_native
                start = time.perf_counter()
                backup.copy_page(page, 1)
                times.setdefault(backup, []).append(time.perf_counter() - start)
        assert statistics.median(times[large]) < 10 * statistics.median(times[small])
        small.fini()
        large.fini()


# --- backups ---


def test_create_and_open_refuse_existing_and_absent_backups(mnt: Path, tmp_path: Path) -> None:
    with Backup.create(mnt / "a") as backup:
        assert (backup.size, backup.page_size, backup.path) == (64 << 20, PAGE, str(mnt / "a"))
        assert backup.residency() == Residency(0, 0, 0), "C14"
    with pytest.raises(BackupExists):
        Backup.create(mnt / "a")
    with pytest.raises(BackupAbsent):
        Backup.open(mnt / "b")
    with pytest.raises(InvalidArgument, match="is not a backup"):
        Backup.open(tmp_path)
    with pytest.raises(InvalidArgument, match="is not a backup"):
        Backup.open(mnt)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument):
        Backup.open(tmp_path / "file")
    with pytest.raises(InvalidArgument):
        Backup.create(mnt / "c", size=2**62)
    assert names(mnt) == ["a"], "one that could not be made whole is not left"


def test_c13_fini_refuses_every_later_operation(a: Backup, mnt: Path) -> None:
    a.backup_pages(NOISE[:10], 0)
    calls: list[Callable[[Backup], object]] = [
        lambda backup: backup.backup_page(NOISE[0], 0),
        lambda backup: backup.copy_page(bytearray(PAGE), 1),
        lambda backup: backup.drop(1),
        lambda backup: backup.size,
    ]
    with Backup.open(mnt / "a", native=a.is_native) as another:
        a.fini()
        assert names(mnt) == []
        for backup in a, another:
            for call in calls:
                with pytest.raises(BackupEnded):
                    call(backup)
    assert os.statvfs(mnt).f_bfree == os.statvfs(mnt).f_blocks


def test_closing_a_backup_does_not_end_it(a: Backup, mnt: Path) -> None:
    a.backup_pages(NOISE[:10], 0)
    with Backup.open(mnt / "a", native=a.is_native) as closed:
        pass
    calls: list[Callable[[Backup], object]] = [
        lambda backup: backup.backup_page(NOISE[0], 0),
        lambda backup: backup.copy_page(bytearray(PAGE), 1, threading.Event()),
        lambda backup: backup.drop(1),
        lambda backup: list(backup.runs()),
        lambda backup: backup.residency_of(0, 1),
        Backup.residency,
        Backup.writeback,
        Backup.fini,
        Backup.fileno,
        lambda backup: backup.size,
        lambda backup: backup.path,
    ]
    for call in calls:
        with pytest.raises(BackupClosed):
            call(closed)
    closed.close()
    assert a.residency().pages == 10
    a.fini()
    with pytest.raises(BackupEnded):
        a.fini()
    a.close()
    with pytest.raises(BackupEnded):
        a.fileno()


def test_an_open_backup_survives_a_rename(a: Backup, mnt: Path) -> None:
    a.backup_page(NOISE[0], 0)
    os.rename(mnt / "a", mnt / "b")
    assert a.path == str(mnt / "b")
    assert (copied(a, [1]) == NOISE[0]).all()
    a.fini()
    assert names(mnt) == []


def test_a_backup_can_be_resized(a: Backup) -> None:
    a.backup_page(NOISE[0], 4095)
    a.resize(5000 * PAGE - 1)
    assert a.size == 5000 * PAGE
    with pytest.raises(InvalidArgument):
        a.resize(PAGE)


def test_c22_the_client_does_not_notice_the_death_of_the_daemon(a: Backup, shared: Mount) -> None:
    shared.expect_restarts()
    handles = a.backup_pages(NOISE[:500], 0)
    for _ in range(3):
        shared.kill()
        assert (copied(a, handles) == NOISE[:500]).all()
        assert a.backup_page(NOISE[0], 600) == 601
        assert len(a.handles()) == 501
        with Backup.open(a.path) as another:
            assert another.is_native, "the next daemon gives descriptors, too"


def test_a_dead_mount_gives_an_error_that_says_so(mountpoint: Path) -> None:
    with Mount(mountpoint, "keeper=off") as mount:
        backup = Backup.create(mountpoint / "a", native=False)
        mount.expect_log("")
        mount.process.kill()
        mount.process.wait()
        with backup, pytest.raises(StoreFailed, match=r"not connected|abort"):
            backup.backup_page(NOISE[0], 0)
        run(f"umount -l {mountpoint}")
        mount._ends_with = -signal.SIGKILL


# --- swap ---


@pytest.mark.serial
def test_writeback_and_where_pages_are(a: Backup, tmp_path: Path) -> None:
    with swap(tmp_path):
        a.backup_pages(NOISE[:1024], 0)
        a.writeback()
        found = a.residency()
        assert found.pages == 1024
        assert found.swapped >= 1000
        if a.is_native:
            halves = [a.residency_of(0, 512), a.residency_of(512, 4096)]
            assert [half.pages for half in halves] == [512, 512]
            assert sum(half.swapped for half in halves) == found.swapped
        assert (copied(a, range(1, 1025)) == NOISE).all()
        a.backup_pages(NOISE[:16], 2000, writeback=True)
        assert a.residency().swapped >= 16


@pytest.mark.serial
@pytest.mark.parametrize("way", WAYS)
def test_c9_an_interrupted_wait_for_swap_loses_nothing(mountpoint: Path, tmp_path: Path, way: str) -> None:
    native, intr, pages = WAYS[way], threading.Event(), np.zeros((512, PAGE), np.uint8)
    with Mount(mountpoint, "size=64m") as mount, Backup.create(mountpoint / "a", native=native) as backup:
        with slow_swap(os.getpid() if native else mount.pid, tmp_path) as slow:
            handles = backup.backup_pages(NOISE[:512], 0)
            slow.push_out()
            timer = threading.Timer(0.3, intr.set)
            timer.start()
            start = time.monotonic()
            with pytest.raises(InterruptedError):
                backup.copy_pages(pages, handles, intr)
            assert time.monotonic() - start < 2, "64 reads a quarter of a second apart were not waited for"
            timer.join()
            with pytest.raises(InterruptedError):
                backup.copy_page(pages[0], 512, intr)
            given_up = pages.copy()
        assert backup.residency().pages == 512
        assert (given_up == pages).all(), "what was given up is not written to the caller's memory later"
        intr.clear()
        backup.copy_pages(pages, handles, intr)
        assert (pages == NOISE[:512]).all()


@pytest.mark.serial
def test_an_exception_of_a_signal_handler_ends_a_wait(mountpoint: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with (
            Mount(mountpoint, "size=64m"),
            Backup.create(mountpoint / "a") as backup,
            slow_swap(os.getpid(), tmp_path) as slow,
        ):
            handles = backup.backup_pages(NOISE[:512], 0)
            slow.push_out()
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(Stopped):
                backup.copy_pages(np.empty((512, PAGE), np.uint8), handles, threading.Event())
    finally:
        signal.signal(signal.SIGALRM, before)


def test_threads_share_a_backup(a: Backup) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                first = number * 500
                pages = NOISE[turn : turn + 400]
                assert (copied(a, a.backup_pages(pages, first)) == pages).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_no_backup_is_native_if_the_daemon_counts_pages(mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for options in "uid_size=16m", f"store={tmp_path / 'store'}":
        with Mount(mountpoint, f"size=64m,{options}"), Backup.create(mountpoint / "a") as backup:
            assert not backup.is_native
            handles = backup.backup_pages(NOISE[:100], 0)
            assert (copied(backup, handles) == NOISE[:100]).all()
            backup.fini()


def test_a_read_only_mount_can_be_read(mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with Mount(mountpoint, f"store={tmp_path / 'store'}"), Backup.create(mountpoint / "a", PAGE << 10) as backup:
        backup.backup_pages(NOISE[:100], 0)
    with Mount(mountpoint, f"ro,store={tmp_path / 'store'}"), Backup.open(mountpoint / "a") as backup:
        assert (copied(backup, range(1, 101)) == NOISE[:100]).all()
        with pytest.raises(Exception, match=r"[Rr]ead-only|Bad file"):
            backup.backup_page(NOISE[0], 0)


def test_c5_writeback_does_not_change_what_is_stored(mountpoint: Path) -> None:
    """Native writes respect the budget and not the reserve, with writeback or without."""
    options = "size=1m,backup_size=2m,reserve=1t"
    with Mount(mountpoint, options) as mount, Backup.create(mount.path / "a") as backup:
        assert backup.is_native
        assert [backup.backup_page(NOISE[0], idx, writeback=bool(idx)) for idx in range(2)] == [1, 2]
        assert (copied(backup, [1, 2]) == NOISE[0]).all()
        assert len(backup.backup_pages(NOISE[:300], 2, writeback=True)) == 254
        with pytest.raises(NoRoom):
            backup.backup_page(NOISE[0], 300, writeback=True)


def test_a_page_of_zeros_is_stored_as_a_page(a: Backup) -> None:
    """The page is stored alone, inside runs of others, and at both ends of them."""
    pages = NOISE[:600].copy()
    pages[[0, 5, 6, 7, 300, 599]] = 0
    handles = a.backup_pages(pages, 3)
    assert (copied(a, handles) == pages).all()
    assert (copied(a, handles[[5, 0, 7]]) == 0).all()
    a.drop(int(handles[6]))
    with pytest.raises(PageAbsent, match=f"handle {handles[6]} "):
        copied(a, handles)
    assert (copied(a, handles[7:]) == pages[7:]).all()


def test_a_directory_that_imitates_a_backup_is_refused(mnt: Path, tmp_path: Path) -> None:
    """A user can set attributes on a directory and put links in it. The client follows and changes nothing there."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"secret")
    fake = tmp_path / "fake" / "a"
    fake.mkdir(parents=True)
    for name in ".image", ".shmem", "1":
        (fake / name).symlink_to(precious)
    try:
        os.setxattr(fake.parent, "user.ttmfs.page_size", b"4096")
    except OSError:
        pytest.fail("the filesystem of the tests has no user attributes")
    for name in "pages", "size", "resident", "swapped":
        os.setxattr(fake, f"user.ttmfs.{name}", b"4096")
    for make, path in (Backup.open, fake), (Backup.create, fake.parent / "b"), (Backup.open, mnt):
        with pytest.raises(InvalidArgument, match="of ttmfs"):
            make(path)
    assert sorted(os.listdir(fake.parent)) == ["a"]
    for words in f"save {fake} {tmp_path}/copy", f"load --into {precious} {fake}", f"fini {fake}", f"ls {fake}":
        assert "ttmfs" in run(f"{sys.executable} -m ttmfs {words} 2>&1", cwd=REPOSITORY, code=2)
    assert precious.read_bytes() == b"secret"
    assert not (tmp_path / "copy").exists()


def test_a_failed_create_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is not a mount of ttmfs"):
        Backup.create(tmp_path / "a")
    assert not names(tmp_path)


def test_a_user_with_read_permission_only_cannot_write(place: Place) -> None:
    """The mode bits let the user read. The error says what they refuse."""
    script = """
import sys
from ttmfs.client import Backup
page = bytearray(4096)
with Backup.open(sys.argv[1]) as backup:
    backup.copy_page(page, 1)
    print(backup.is_native, bytes(page[:4]))
    try:
        backup.backup_page(page, 0)
    except Exception as error:
        print(type(error).__name__, error)
"""
    with place.directory("mnt") as path, Mount(path, "size=1m,allow_other,mode=1777") as mount:
        with Backup.create(mount.path / "a", mode=0o755) as backup:
            backup.backup_page(b"page".ljust(PAGE), 0)
        command = [place.python, "-c", script, str(path / "a")]
        done = subprocess.run(
            command, cwd=place.path / "repository", capture_output=True, text=True, check=True, **as_user(ALICE)
        )
    assert done.stdout.splitlines() == ["False b'page'", "NotPermitted storing pages: Permission denied"]


def test_a_backup_can_be_created_with_mode_0(place: Place) -> None:
    script = """
import sys
from ttmfs.client import Backup
for mode in 0o600, 0o400, 0:
    with Backup.create(f"{sys.argv[1]}/{mode:o}", 1 << 20, mode=mode) as backup:
        print(backup.is_native)
"""
    with place.directory("mnt") as path, Mount(path, "size=1m,allow_other,mode=1777") as mount:
        command = [place.python, "-c", script, str(path)]
        done = subprocess.run(
            command, cwd=place.path / "repository", capture_output=True, text=True, check=False, **as_user(ALICE)
        )
        assert done.returncode == 0, done.stderr
        assert {name: stat.S_IMODE((path / name).stat().st_mode) for name in names(mount.path)} == {
            "0": 0, "400": 0o400, "600": 0o600
        }  # fmt: skip
    assert done.stdout.split() == ["False"] * 3


def test_a_signal_whose_handler_raises_nothing_ends_no_call(mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    with (
        Mount(mountpoint, f"size=64m,store={tmp_path}/store"),
        Backup.create(mountpoint / "a", size=1024 * PAGE) as backup,
    ):
        backup.backup_pages(np.full((1024, PAGE), 7, np.uint8), 0)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        try:
            for _ in range(300):
                assert backup.residency().pages == len(backup.handles()) == 1024
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_an_exception_of_a_signal_handler_is_not_reported_as_a_store_failure(mnt: Path) -> None:
    """This holds for an OSError, too, and if pages were stored before it."""

    def late(*_: object) -> None:
        raise TimeoutError("time is up")

    before = signal.signal(signal.SIGALRM, late)
    try:
        with Backup.create(mnt / "a", 1 << 30, native=False) as backup:
            pages = np.ones((131072, PAGE), np.uint8)
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(TimeoutError, match="time is up"):
                backup.backup_pages(pages, 0)
            assert len(backup.handles()) < len(pages)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_fini_ends_the_backup_of_the_opened_mount(tmp_path: Path) -> None:
    """This holds even if another mount, with a backup of the same name and number, lies over it."""
    place = tmp_path / "mnt"
    place.mkdir()
    with Mount(place, "size=1m") as below:
        below_a = Backup.create(place / "a")
        with Mount(place, "size=1m") as above, Backup.create(place / "a") as above_a:
            above.expect_log("another ttmfs is mounted at")
            assert above_a.id == below_a.id
            below_a.fini()
            assert names(place) == ["a"]
        assert names(below.path) == []


def test_residency_is_correct_for_each_of_several_threads(mnt: Path) -> None:
    with Backup.create(mnt / "a") as backup, ThreadPoolExecutor(3) as threads:
        backup.backup_pages(NOISE[:256], 0)

        def answers(count: int) -> set[Residency]:
            return {backup.residency_of(0, count) for _ in range(3000)}

        found = threads.map(answers, (1, 100, 256))
        assert list(found) == [{Residency(count, count, 0)} for count in (1, 100, 256)]


def test_the_client_leaks_no_descriptor(mnt: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with Backup.create(mnt / "a") as backup:
            backup.backup_pages(NOISE[:3], 0, writeback=True)
            copied(backup, [1, 2, 3])
            backup.fini()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, "descriptors to be closed")
