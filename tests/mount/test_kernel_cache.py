"""The kernel's cache of a mount: it is true after every change, and is kept where nothing has changed."""

import contextlib
import fcntl
import itertools
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from errno import EFBIG, ENOENT, ESTALE
from pathlib import Path
from typing import Any

import pytest

from harness import Mount, attribute, opened, raises_errno, run, set_attribute, wait_until
from ttmfs.fuse.kernel_cache import LIFETIME, MOST_BLOCKS

PAGE = 4096
PAGES = 64
RWF_APPEND = 0x10


def store(backup: Path, *handles: int) -> None:
    with opened(backup / ".image") as fd:
        for handle in handles:
            os.pwrite(fd, b"S" * PAGE, (handle - 1) * PAGE)


def drop(backup: Path) -> None:
    set_attribute(backup, "drop", f"1-{PAGES}")


def truncate(backup: Path) -> None:
    os.truncate(backup / ".image", 0)


def shut(backup: Path) -> None:
    backup.chmod(0o700)


def changes_of(backup: Any) -> None:
    """Make every kind of change that concerns many pages at once."""
    drop(backup)
    store(backup, 1, 2)
    truncate(backup)
    store(backup, 1, 2)
    for mode in 0o700, 0o755:
        backup.chmod(mode)
    os.chown(backup, 1234, 567)
    os.utime(backup, ns=(10**18, 10**18))


def restart(mount: Any) -> None:
    """Replace the daemon on purpose."""
    before = mount.restarts()
    os.kill(mount.process.pid, signal.SIGUSR1)
    wait_until(lambda: mount.restarts() > before, "another daemon")


def kill(mount: Any) -> None:
    before = mount.restarts()
    mount.kill()
    wait_until(lambda: mount.restarts() > before, "another daemon")


@pytest.fixture
def mount(shared: Mount) -> Mount:
    """A mount for all tests of this file, empty."""
    return shared


@pytest.fixture
def living(mount: Mount) -> Mount:
    """A mount whose daemons can be killed and restarted."""
    mount.expect_restarts()
    return mount


@pytest.fixture
def a(mnt: Path) -> Path:
    return filled(mnt, "a")


@pytest.fixture
def b(mnt: Path) -> Path:
    return filled(mnt, "b")


def filled(mnt: Path, name: str) -> Path:
    """A backup with two pages that the kernel knows."""
    backup = mnt / name
    backup.mkdir()
    set_attribute(backup, "size", PAGES * PAGE)
    store(backup, 1, 2)
    for page in backup.iterdir():
        page.stat()
    return backup


# --- nothing else is forgotten ---


def test_a_filesystem_mounted_on_a_backup_stays_mounted(living: Mount, a: Path, b: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/there").touch()
    with opened(a, os.O_RDONLY | os.O_DIRECTORY) as below:
        run(f"mount --bind {tmp_path}/source {a}")
        try:
            for change, of in (
                (changes_of, b),
                (changes_of, Path(f"/proc/self/fd/{below}")),
                (restart, living),
                (kill, living),
                (changes_of, b),
            ):
                change(of)
                assert (a / "there").exists()
                assert os.path.ismount(a)
                time.sleep(1.1 * LIFETIME)  # the kernel looks the name up anew
                assert (a / "there").exists()
        finally:
            run(f"umount {a}")
    assert sorted(os.listdir(a)) == ["1", "2"]


GETCWD = """
import os, sys
os.chdir(sys.argv[1])
print("begun", flush=True)
os.set_blocking(0, False)
failed = asked = 0
while sys.stdin.buffer.read() is None:
    asked += 1
    try:
        failed += os.getcwd() != sys.argv[1]
    except FileNotFoundError:
        failed += 1
print(failed, asked)
"""


@contextlib.contextmanager
def asking_getcwd(directory: Path) -> Iterator[None]:
    """A process asks for its working directory, and never fails to get it."""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", GETCWD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "begun\n"
            yield
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    failed, asked = map(int, said.split())
    assert asked
    assert not failed, f"getcwd failed {failed} of {asked} times"


def test_getcwd_works_in_every_backup_during_changes(living: Mount, a: Path, b: Path) -> None:
    with asking_getcwd(a), asking_getcwd(b):
        end = time.monotonic() + 2
        while time.monotonic() < end:
            changes_of(b)
        restart(living)
        kill(living)
        changes_of(b)


def test_an_overlay_over_a_backup_keeps_working(living: Mount, a: Path, b: Path, tmp_path: Path) -> None:
    layers = tmp_path / "layers"
    run(f"mkdir {layers}; mount -t tmpfs none {layers}; mkdir {layers}/upper {layers}/work {layers}/all")
    try:
        run(f"mount -t overlay none {layers}/all -o lowerdir={a},upperdir={layers}/upper,workdir={layers}/work")
        try:
            for change, of in (changes_of, b), (restart, living), (kill, living), (changes_of, b):
                change(of)
                for again in range(2):
                    assert (layers / "all/1").read_bytes() == b"S" * PAGE
                    assert sorted(os.listdir(layers / "all")) == ["1", "2"]
                    time.sleep(1.1 * LIFETIME * (not again))
        finally:
            run(f"umount {layers}/all")
    finally:
        run(f"umount {layers}")


# --- what has changed is seen at once ---

Look = Callable[[Path], os.stat_result]
LOOKS: dict[str, Look] = {
    "stat": lambda a: (a / "2").stat(),
    "listing": lambda a: next(entry.stat() for entry in list(os.scandir(a)) if entry.name == "2"),
}


@pytest.mark.parametrize("dropped", [drop, truncate])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("after", [None, restart, kill])
def test_a_page_dropped_in_bulk_is_invisible_at_once(
    living: Mount, a: Path, dropped: Callable[[Path], None], look: str, after: Callable[[Mount], None] | None
) -> None:
    """This holds by path and by descriptor, even if the daemon that notified the kernel has died."""
    with opened(a / "2") as page:
        for again in range(5):
            store(a, 2)
            LOOKS[look](a)
            os.fstat(page)
            if after and not again:
                after(living)
            before = a.stat().st_mtime_ns
            dropped(a)
            with raises_errno(ESTALE):
                os.fstat(page)
            assert not os.access(a / "2", os.F_OK)
            with raises_errno(ENOENT):
                (a / "2").stat()
            with raises_errno(ENOENT):
                (a / "2").unlink()
            with raises_errno(ENOENT):
                os.truncate(a / "2", 0)
            assert a.stat().st_mtime_ns > before
            os.close(os.open(a / "2", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            (a / "2").unlink()


@pytest.mark.parametrize("dropped", [drop, truncate])
def test_a_page_dropped_in_bulk_can_be_created_again(a: Path, dropped: Callable[[Path], None]) -> None:
    """The kernel still has the name, and asks to open the page before it asks to create one."""
    for _ in range(10):
        dropped(a)
        with opened(a / "2", os.O_CREAT | os.O_WRONLY) as page:
            assert os.write(page, b"new") == 3
        assert (a / "2").read_bytes()[:3] == b"new"


LOOK_UP = """
import os, sys
for handle in iter(lambda: 0, 1):
    for handle in range(1, 9):
        try:
            os.stat(f"{sys.argv[1]}/{handle}")
        except FileNotFoundError:
            pass
"""


@pytest.mark.parametrize("dropped", [drop, truncate])
def test_a_page_looked_up_during_its_drop_is_invisible_afterwards(a: Path, dropped: Callable[[Path], None]) -> None:
    """The kernel may learn of the page only after the notification that it is gone."""
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-I", "-c", LOOK_UP, str(a)]))
            stack.callback(process.kill)
        end, rounds = time.monotonic() + 3, 0
        while time.monotonic() < end:
            store(a, *range(1, 9))
            time.sleep(0.001 * (rounds % 3))
            dropped(a)
            assert [handle for handle in range(1, 9) if (a / str(handle)).exists()] == []
            rounds += 1


def test_a_removal_that_waits_for_a_truncation_does_not_block_it(a: Path) -> None:
    """The removal holds the directory's lock and waits for the lock of .image, which the truncation holds."""
    remove = "import os, sys\nwhile True:\n try: os.unlink(sys.argv[1])\n except PermissionError: pass"
    with subprocess.Popen([sys.executable, "-I", "-c", remove, str(a / ".image")]) as process:
        try:
            for _ in range(50):
                store(a, 1)
                with contextlib.suppress(FileNotFoundError):
                    (a / "1").stat()
                begun = time.monotonic()
                truncate(a)
                assert time.monotonic() - begun < 5
                assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.parametrize("after", [None, restart, kill])
def test_pages_show_a_new_mode_owner_and_time_of_their_backup_at_once(
    living: Mount, a: Path, after: Callable[[Mount], None] | None
) -> None:
    names = ["1", "2", ".image"]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(opened(a / name)) for name in names]
        for again, mode in enumerate((0o700, 0o2755, 0o777)):
            for path, fd in zip(names, files, strict=True):
                os.fstat(fd)
                (a / path).stat()
            if after and not again:
                after(living)
            a.chmod(mode)
            seen = [*map(os.fstat, files), *((a / name).stat() for name in names)]
            assert {stat.S_IMODE(found.st_mode) for found in seen} == {mode & 0o666}
            os.chown(a, 1000 + again, 2000)
            seen = [*map(os.fstat, files), *((a / name).stat() for name in names), (a / ".shmem").lstat()]
            assert {(found.st_uid, found.st_gid) for found in seen} == {(1000 + again, 2000)}
            os.utime(a, ns=(again, again))
            seen = [*map(os.fstat, files), *((a / name).stat() for name in names), (a / ".shmem").lstat()]
            assert {found.st_mtime_ns for found in seen} == {again}


def test_attributes_stay_true_for_more_pages_than_the_table_holds(mountpoint: Path) -> None:
    """The pages are far from each other, so each needs an entry of its own."""
    step, count = 64, MOST_BLOCKS + 100
    with Mount(mountpoint, f"size=64m,backup_size={step * count * PAGE}") as mount:
        a = mountpoint / "a"
        a.mkdir()
        store(a, *range(1, step * count, step))
        changes: list[Callable[[Path], None]] = [drop, truncate, shut]
        for changed in changes:
            store(a, 1, step + 1)
            for handle in range(1, step * count, step):
                with contextlib.suppress(FileNotFoundError):
                    (a / str(handle)).stat()
            changed(a)
            for handle in 1, step + 1:
                if changed is shut:
                    assert stat.S_IMODE((a / str(handle)).stat().st_mode) == 0o600
                elif changed is truncate or handle == 1:
                    with raises_errno(ENOENT):
                        (a / str(handle)).stat()
        assert mount.restarts() == 0


def test_stats_and_config_belong_to_the_owner_of_the_root(mnt: Path) -> None:
    for uid in 1000, 1001:
        (mnt / ".stats").stat()
        (mnt / ".config").stat()
        os.chown(mnt, uid, -1)
        assert (mnt / ".stats").stat().st_uid == (mnt / ".config").stat().st_uid == uid


# --- the size of .image ---


def by_attribute(backup: Path, pages: int) -> None:
    set_attribute(backup, "size", pages * PAGE)


def by_shmem(backup: Path, pages: int) -> None:
    os.truncate(backup / ".shmem", pages * PAGE)


@pytest.fixture(scope="module", params=["", ",allow_other"], ids=["alone", "allow_other"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount where the kernel checks mode bits, and one where it does not. Backups have 4 pages."""
    with Mount(tmp_path_factory.mktemp("small"), f"size=64m,backup_size=16k{request.param}") as mount:
        yield mount


@pytest.fixture
def grown(small: Mount) -> Iterator[Path]:
    """A backup of 4 pages, whose .image the kernel knows, beside a larger backup."""
    a, b = small.path / "a", small.path / "b"
    for backup in a, b:
        backup.mkdir()
    set_attribute(b, "size", "1m")
    (a / ".image").stat()
    yield a
    for backup in a, b:
        os.truncate(backup / ".image", 0)
        backup.rmdir()


@pytest.mark.parametrize("grow", [by_attribute, by_shmem])
@pytest.mark.parametrize("opened_first", [True, False])
def test_b2_an_append_overwrites_no_page_of_a_grown_backup(
    grown: Path, grow: Callable[[Path, int], None], opened_first: bool
) -> None:
    flags = os.O_RDWR | os.O_APPEND
    if not opened_first:
        grow(grown, 8)
    with opened(grown / ".image", flags) as image, opened(grown / ".shmem") as shmem:
        for pages in 8, 16, 12:
            if opened_first:
                grow(grown, pages)
            os.pwrite(shmem, b"kept", 4 * PAGE)
            for size in 1, PAGE, 5 * PAGE:
                with raises_errno(EFBIG):
                    os.write(image, b"x" * size)
            assert os.pread(image, 4, 4 * PAGE) == b"kept", "reading is as ever"
            os.fsync(image)
            os.ftruncate(image, 5 * PAGE)
        assert sorted(os.listdir(grown)) == ["5"]
    with opened(grown / ".image", flags | os.O_DSYNC) as image, raises_errno(EFBIG):
        os.write(image, b"x")


def test_b2_an_append_by_flags_set_later_finds_the_new_end(grown: Path) -> None:
    with opened(grown / ".image") as image, opened(grown / ".image") as later:
        for pages in 8, 64, 32:
            by_attribute(grown, pages)
            with raises_errno(EFBIG):
                os.pwritev(image, [b"x"], 0, RWF_APPEND)
            set_flags(later, os.O_APPEND)
            with raises_errno(EFBIG):
                os.write(later, b"x")
            set_flags(later, 0)
        assert os.listdir(grown) == []


def set_flags(fd: int, flags: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)


Copy = Callable[[int, int, int, int], int]
COPIES: dict[str, Copy] = {
    "sendfile": os.sendfile,
    "copy_file_range": lambda out, source, offset, count: os.copy_file_range(source, out, count, offset, 0),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("opened_first", [True, False])
@pytest.mark.parametrize("grow", [by_attribute, by_shmem])
def test_b2_copies_include_pages_past_the_old_end(
    grown: Path, copy: str, opened_first: bool, grow: Callable[[Path, int], None]
) -> None:
    """The copy opens the file anew, or has it open and the size is changed through the mount.

    The daemon does not see what .shmem does. A program that calls fstat(2) first, as programs that copy do, sees the
    new end.
    """
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(opened(grown / ".image"))
        out = stack.enter_context(opened(grown.parent / "b/.image"))
        for pages in 8, 64:
            grow(grown, pages)
            with opened(grown / ".shmem") as shmem:
                os.pwrite(shmem, b"%04d" % pages, (pages - 1) * PAGE)
            if not opened_first:
                image = stack.enter_context(opened(grown / ".image"))
            elif grow is by_shmem:
                os.fstat(image)
            assert COPIES[copy](out, image, (pages - 1) * PAGE, 4) == 4
        by_attribute(grown, 64)
        os.truncate(grown / ".image", 0)
        grow(grown, 4)
        assert COPIES[copy](out, image, 4 * PAGE, 4) == 0
        assert os.fstat(image).st_size == (grown / ".image").stat().st_size == 4 * PAGE


def test_resizing_and_reading_the_end_do_not_block_each_other(a: Path) -> None:
    """The read goes through the page cache, whose pages the kernel locks."""
    reads = "import os, sys\nfd = os.open(sys.argv[1], 0)\nout = os.open('/dev/null', 1)\nprint(flush=True)\n" + (
        "while True: os.sendfile(out, fd, 0, 1 << 20)"
    )
    with subprocess.Popen(
        [sys.executable, "-I", "-c", reads, str(a / ".image")], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            for pages in itertools.islice(itertools.cycle((PAGES, 2 * PAGES, 3 * PAGES)), 300):
                by_attribute(a, pages)
                assert os.stat(a / ".image").st_size == pages * PAGE
        finally:
            process.kill()
    assert attribute(a, "pages") == "2"


# --- the daemon does not grow ---


def resident(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_c3_repeated_mode_changes_take_no_memory_of_the_daemon(mount: Mount) -> None:
    def cycles(count: int) -> None:
        for _ in range(count):
            os.mkdir(mount.path / "a")
            (mount.path / "a").chmod(0o2755)
            os.chown(mount.path / "a", 1000, 1000)
            os.rmdir(mount.path / "a")

    cycles(1500)
    before = resident(mount.pid)
    cycles(6000)
    assert resident(mount.pid) - before < 1 << 20
