"""store=DIR: backups in a directory of a user, on every supported filesystem."""

import contextlib
import fcntl
import json
import mmap
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from errno import EEXIST, EIO, ENOENT, ENOSPC, ENOTEMPTY, EROFS, ESTALE
from pathlib import Path

import numpy as np
import pytest
import trio

import stores
import ttmfs
from harness import MOUNT_PY, Mount, count, opened, raises_errno, run, wait_until
from ttmfs.errors import NotSupported
from ttmfs.options import ExitCode, Options
from ttmfs.stores import make_temporary_store
from ttmfs.stores.directory import Directory

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
KINDS = ("tmpfs", "ext4", "xfs", "btrfs")

FS_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = (2).to_bytes(4, sys.byteorder)
"""Of a shutdown: nothing that is not on the disk gets there, as when the power fails."""


@pytest.fixture(params=KINDS)
def below(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A new filesystem of each kind."""
    with stores.filesystem(tmp_path / "below", request.param) as path:
        yield path


@pytest.fixture
def directory(below: Path) -> Path:
    path = below / "store"
    path.mkdir()
    return path


def content(seed: int, pages: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(pages * PAGE)


def refused(code: int, mountpoint: Path, options: str) -> str:
    """Check that mount.py refuses to mount. Returns its message."""
    command = [sys.executable, "-W", "error", str(MOUNT_PY), str(mountpoint), "-o", options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.startswith("mount.py: ")
    assert done.stderr.count("\n") == 1
    assert (done.stdout, ExitCode(done.returncode)) == ("", code), done.stderr
    return done.stderr


class Disk:
    """An image with a filesystem, which can be mounted more than once."""

    def __init__(self, directory: Path, kind: str) -> None:
        self._path, self._kind, self._image = directory / "below", kind, directory / "image"
        with self._image.open("xb") as file:
            file.truncate(320 * MIB)
        run(f"mkfs.{kind} -q {self._image}")

    def mounted(self) -> contextlib.AbstractContextManager[Path]:
        return stores.mounted(self._path, self._kind, "loop", str(self._image))


def shut_down(filesystem: Path) -> None:
    with opened(filesystem, os.O_RDONLY) as fd:
        fcntl.ioctl(fd, FS_IOC_SHUTDOWN, NO_LOG_FLUSH)


# --- it lasts ---


def test_backups_survive_an_unmount(directory: Path, mountpoint: Path) -> None:
    options = f"store={directory},size=64m,backup_size=1m"
    with Mount(mountpoint, options):
        (mountpoint / "a").mkdir(mode=0o750)
        (mountpoint / "empty").mkdir()
        os.setxattr(mountpoint / "empty", "user.ttmfs.size", b"2m")
        for handle in 1, 2, 7, 256:
            (mountpoint / "a" / str(handle)).write_bytes(content(handle))
        (mountpoint / "a/3").touch()
        os.chown(mountpoint / "a", 12, 34)
        os.rename(mountpoint / "a", mountpoint / "renamed")
        before = (mountpoint / "renamed").stat()
    with Mount(mountpoint, options):
        assert sorted(os.listdir(mountpoint)) == ["empty", "renamed"]
        assert os.listdir(mountpoint / "renamed") == ["1", "2", "3", "7", "256"]
        after = (mountpoint / "renamed").stat()
        for field in "st_mode", "st_uid", "st_gid", "st_mtime_ns":
            assert getattr(after, field) == getattr(before, field)
        for handle in 1, 2, 7, 256:
            assert (mountpoint / "renamed" / str(handle)).read_bytes() == content(handle)
        assert (mountpoint / "renamed/3").read_bytes() == bytes(PAGE)
        assert count(mountpoint / "empty", "size") == 2 * MIB
        assert count(mountpoint / "renamed", "pages") == 5
        run("rm -r *", cwd=mountpoint)
    assert os.listdir(directory) == [".ttmfs"]


def test_backups_survive_the_death_of_daemon_and_keeper(directory: Path, mountpoint: Path) -> None:
    """The death of daemon and keeper frees the directory, and every answered write is there."""
    with Mount(mountpoint, f"store={directory}") as mount:
        (mountpoint / "a").mkdir()
        (mountpoint / "a/5").write_bytes(content(5))
        mount.kill_both()
        assert mount.wait() == -signal.SIGKILL
    with Mount(mountpoint, f"store={directory}"):
        assert os.listdir(mountpoint / "a") == ["5"]
        assert (mountpoint / "a/5").read_bytes() == content(5)


def test_backups_of_the_api_survive_in_the_directory(directory: Path) -> None:
    page, got = np.frombuffer(content(1), np.uint8), np.zeros(PAGE, np.uint8)

    async def main() -> None:
        async with ttmfs.open_pool(store=str(directory), backup_size=MIB) as pool:
            backup = await pool.create("a")
            assert await backup.backup_page(page, 3, writeback=True) == 4
            assert backup.pages == 1
            if "tmpfs" not in run(f"stat -f -c %T {directory}"):
                assert (backup.resident, backup.swapped) == (0, 1), "it is on the disk alone"
            await backup.copy_page(got, 4)
            assert (got == page).all()
            assert (backup.pages, backup.resident, backup.swapped) == (1, 1, 0)
            with pytest.raises(ttmfs.StoreBusy, match="in use by another mount"):
                async with ttmfs.open_pool(store=str(directory)):
                    pass
        async with ttmfs.open_pool(store=str(directory)) as pool:
            got[:] = 0
            await (await pool.open("a")).copy_page(got, 4)
            assert (got == page).all()

    trio.run(main)


def test_the_root_of_the_mount_shows_the_directory(directory: Path, mountpoint: Path) -> None:
    directory.chmod(0o1750)
    os.chown(directory, 12, 34)
    with Mount(mountpoint, f"store={directory}"):
        found = mountpoint.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o1750, 12, 34)
        mountpoint.chmod(0o700)
        assert json.loads((mountpoint / ".config").read_text())["store"] == str(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


# --- one at a time, and only what fits ---


def test_two_mounts_of_one_directory_are_refused(directory: Path, mountpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    link = tmp_path / "link"
    link.symlink_to(directory)
    with Mount(mountpoint, f"store={directory}"):
        (mountpoint / "a").mkdir()
        for path in directory, link:
            assert "in use by another mount" in refused(32, other, f"store={path}")
        (mountpoint / "a/1").write_bytes(content(1))
        (directory / ".ttmfs").unlink()  # as one who tidies up might
        assert "another mount may use it" in refused(32, other, f"store={directory}")
    with Mount(other, f"store={link}"):
        assert (other / "a/1").read_bytes() == content(1)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def linked(path: Path) -> None:
    path.with_name("elsewhere").write_text("{}")
    path.symlink_to("elsewhere")


def device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero: it can be read without end


def with_another_name(path: Path) -> None:
    path.with_name("other").write_text("{}")
    path.hardlink_to(path.with_name("other"))


def of_a_stranger(path: Path) -> None:
    path.write_text("{}")
    os.chown(path, stores.BOB, stores.BOB)


def enormous(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize("options", ["", ",ro"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fifo, "its .ttmfs is not a regular file: move .ttmfs away"),
        (linked, "its .ttmfs is not a regular file: move .ttmfs away"),
        (device, "its .ttmfs is not a regular file: move .ttmfs away"),
        (Path.mkdir, "its .ttmfs is not a regular file: move .ttmfs away"),
        (with_another_name, "its .ttmfs has a second name"),
        (of_a_stranger, f"its .ttmfs belongs to user {stores.BOB}"),
        (enormous, "this version of ttmfs cannot read its .ttmfs (it is not JSON)"),
    ],
)
def test_a_foreign_record_file_is_refused_with_the_reason(
    mountpoint: Path, tmp_path: Path, make: Callable[[Path], object], reason: str, options: str
) -> None:
    with stores.mounted(tmp_path / "below", "tmpfs") as directory:
        make(directory / ".ttmfs")
        (directory / "a").write_bytes(content(1))
        assert reason in refused(2, mountpoint, f"store={directory}{options}")
        assert (directory / "a").read_bytes() == content(1)
        assert not os.listxattr(directory / "a")


def test_a_user_who_can_only_read_the_directory_cannot_block_its_mount(tmp_path: Path, mountpoint: Path) -> None:
    """This holds before the first mount and later. Such a user cannot lock the file that holds the counts either."""
    with stores.mounted(tmp_path / "below", "tmpfs", "mode=755") as directory, opened(directory, os.O_RDONLY) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in "a", "b":
            with Mount(mountpoint, f"store={directory},backup_size=1m"):
                (mountpoint / name).mkdir()
                (mountpoint / name / "1").write_bytes(content(1))
                assert stat.S_IMODE((directory / ".ttmfs").stat().st_mode) == 0o600
            (directory / ".ttmfs").chmod(0o644)  # as one who tidies up might
        with Mount(mountpoint, f"store={directory}"):
            assert sorted(os.listdir(mountpoint)) == ["a", "b"]
            assert stat.S_IMODE((directory / ".ttmfs").stat().st_mode) == 0o600
        (directory / ".ttmfs").unlink()
        assert "the directory is locked" in refused(32, mountpoint, f"store={directory}")


def test_another_version_that_locks_file_and_directory_excludes_this_one(tmp_path: Path, mountpoint: Path) -> None:
    with stores.mounted(tmp_path / "below", "tmpfs") as directory:
        with Mount(mountpoint, f"store={directory}"):
            for path in directory, directory / ".ttmfs":
                with opened(path, os.O_RDONLY) as fd, pytest.raises(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with opened(directory / ".ttmfs") as file, opened(directory, os.O_RDONLY) as itself:
            for fd in file, itself:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert "in use by another mount" in refused(32, mountpoint, f"store={directory}")


def test_another_page_size_is_refused_with_the_right_one(directory: Path, mountpoint: Path) -> None:
    with Mount(mountpoint, f"store={directory},page_size=64k,backup_size=1m"):
        (mountpoint / "a").mkdir()
        (mountpoint / "a/2").write_bytes(b"x")
    assert "mount it with page_size=64k" in refused(32, mountpoint, f"store={directory}")
    with Mount(mountpoint, f"store={directory},page_size=65536"):
        assert os.listdir(mountpoint / "a") == ["2"]


def ramfs(base: Path) -> Iterator[Path]:
    with stores.mounted(base / "ramfs", "ramfs") as path:
        yield path


def coarse(base: Path) -> Iterator[Path]:
    """An ext4 that allocates 64 KiB at a time."""
    image = base / "image"
    with image.open("xb") as file:
        file.truncate(64 << 20)
    run(f"mkfs.ext4 -q -O bigalloc -C 65536 {image}")
    with stores.mounted(base / "coarse", "ext4", "loop", str(image)) as path:
        yield path


def huge(base: Path) -> Iterator[Path]:
    with stores.mounted(base / "huge", "tmpfs", "size=64m,huge=always") as path:
        yield path


@pytest.mark.parametrize(
    ("make", "reason"),
    [(ramfs, "cannot tell pages of 4k apart"), (coarse, "65536 bytes of room were taken"), (huge, "cannot tell pages")],
)
def test_filesystems_without_exact_holes_are_refused_with_the_reason(
    mountpoint: Path, tmp_path: Path, make: Callable[[Path], Iterator[Path]], reason: str
) -> None:
    with contextlib.contextmanager(make)(tmp_path) as path:
        assert reason in refused(2, mountpoint, f"store={path}")


def test_a_filesystem_with_large_blocks_can_store_pages_of_that_size(mountpoint: Path, tmp_path: Path) -> None:
    with (
        contextlib.contextmanager(coarse)(tmp_path) as path,
        Mount(mountpoint, f"store={path},page_size=64k,backup_size=1m"),
    ):
        (mountpoint / "a").mkdir()
        (mountpoint / "a/2").write_bytes(b"x")
        assert os.listdir(mountpoint / "a") == ["2"]
        (mountpoint / "a/2").unlink()
        assert count(mountpoint / "a", "pages") == 0


def test_a_path_that_is_not_a_writable_directory_is_refused(mountpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "No such file" in refused(32, mountpoint, f"store={tmp_path}/nothing")
    assert "Not a directory" in refused(32, mountpoint, f"store={file}")
    with stores.mounted(tmp_path / "ro", "tmpfs", "ro") as path:
        assert "Read-only file system" in refused(32, mountpoint, f"store={path}")
    assert "store= keeps that of the directory" in refused(1, mountpoint, f"store={tmp_path},mode=700")
    assert "the path of an existing directory is needed" in refused(1, mountpoint, "store=")
    assert "lies within the store" in refused(32, mountpoint, f"store={tmp_path}")
    store = tmp_path / "store"
    store.mkdir()
    (store / ".ttmfs").write_text("{}")
    assert "this version of ttmfs cannot read its .ttmfs" in refused(2, mountpoint, f"store={store}")


def test_a_store_can_be_mounted_over_itself(directory: Path) -> None:
    with Mount(directory, f"store={directory}"):
        (directory / "a").mkdir()
        (directory / "a/1").write_bytes(content(1))
        assert os.listdir(directory) == ["a"]
    assert (directory / "a").is_file()


# --- read-only ---


def test_a_store_mounted_read_only_is_not_changed(directory: Path, below: Path, mountpoint: Path) -> None:
    """This holds, too, if its filesystem is read-only."""
    assert "it contains no store, so it cannot be mounted read-only" in refused(32, mountpoint, f"store={directory},ro")
    with Mount(mountpoint, f"store={directory}"):
        (mountpoint / "a").mkdir()
        (mountpoint / "a/3").write_bytes(content(3))
    (directory / "foreign").write_bytes(content(1))
    before = [(p.name, p.stat().st_mtime_ns, p.stat().st_ctime_ns, os.listxattr(p)) for p in directory.iterdir()]

    def look() -> None:
        with Mount(mountpoint, f"store={directory},ro"):
            assert sorted(os.listdir(mountpoint)) == ["a", "foreign"]
            assert os.listdir(mountpoint / "a") == ["3"]
            assert (mountpoint / "a/3").read_bytes() == content(3)
            assert (mountpoint / "foreign/1").read_bytes() == content(1)
            with raises_errno(EROFS):
                (mountpoint / "b").mkdir()
            with raises_errno(EROFS):
                (mountpoint / "a/3").unlink()
            assert "in use by another mount" in refused(32, below, f"store={directory},ro")

    look()
    assert [
        (p.name, p.stat().st_mtime_ns, p.stat().st_ctime_ns, os.listxattr(p)) for p in directory.iterdir()
    ] == before
    run(f"mount -o remount,ro {below}")
    look()
    assert "mount it with ro" in refused(32, mountpoint, f"store={directory}")


def test_pages_can_be_copied_out_of_a_disk_that_became_read_only(mountpoint: Path, tmp_path: Path) -> None:
    disk = Disk(tmp_path, "ext4")
    run(f"tune2fs -e remount-ro {tmp_path}/image")
    with disk.mounted() as below:
        store = below / "store"
        store.mkdir()
        device = Path(run(f"findmnt -n -o SOURCE {below}").strip()).name
        with Mount(mountpoint, f"store={store},backup_size=64k") as mount:
            mount.expect_log("get EIO")
            for number in range(300):  # more than stay open
                (mountpoint / f"b{number}").mkdir()
                (mountpoint / f"b{number}/1").write_bytes(b"%03d" % number)
            Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("boom")
            run(f"cp -r {mountpoint} {tmp_path}/copy")
            assert len(os.listdir(tmp_path / "copy")) == 300
            assert (tmp_path / "copy/b7/1").read_bytes()[:3] == b"007"
            with raises_errno(EIO):
                (mountpoint / "new").mkdir()


# --- others who can reach the directory ---


def test_a_file_lease_in_the_store_delays_no_other_user(directory: Path, mountpoint: Path) -> None:
    """The owner of a file can hold a lease on it. Opening it then waits up to /proc/sys/fs/lease-break-time."""
    with Mount(mountpoint, f"store={directory}") as mount:
        mount.expect_log("get EIO")
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(content(1))
        (directory / "held").write_bytes(content(2))
        before = signal.signal(signal.SIGIO, signal.SIG_IGN)
        try:
            with opened(directory / "held") as fd:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                begun = time.monotonic()
                os.listdir(mountpoint)
                with contextlib.suppress(OSError):
                    os.listdir(mountpoint / "held")
                assert (mountpoint / "a/1").read_bytes() == content(1)
                assert time.monotonic() - begun < 5
        finally:
            signal.signal(signal.SIGIO, before)
        assert (mountpoint / "held/1").read_bytes() == content(2), "once it is given up"


def test_no_file_in_the_store_has_set_id_bits(directory: Path, mountpoint: Path) -> None:
    directory.chmod(0o3777)
    with Mount(mountpoint, f"store={directory}"):
        (mountpoint / "a").mkdir()
        (mountpoint / "b").mkdir()
        (mountpoint / "b").chmod(0o6755)
        assert [stat.S_IMODE((directory / name).stat().st_mode) & 0o6000 for name in ("a", "b")] == [0, 0]


def test_temporary_directories_of_killed_daemons_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store can have a name that looks like that of a temporary directory."""
    with stores.mounted(tmp_path / "runtime", "tmpfs", "size=100t") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        kept = runtime / "ttmfs-models/store"
        kept.mkdir(parents=True)
        Directory.open(str(kept), Options(store=str(kept))).close()
        why = NotSupported("no namespaces")
        live = make_temporary_store(Options(size=MIB), why)
        left = make_temporary_store(Options(size=MIB), why)
        path = Path(left.directory or "").parent
        left._temporary = None  # as if it had been killed
        left.close()
        assert path.exists()
        make_temporary_store(Options(size=MIB), why).close()
        assert sorted(runtime.iterdir()) == sorted([Path(live.directory or "").parent, kept.parent])
        live.close()
        assert list(runtime.iterdir()) == [kept.parent]


# --- files of others' ---


def test_foreign_files_are_left_alone_and_not_shown(directory: Path, mountpoint: Path) -> None:
    (directory / "notes.txt").write_text("not a page")
    (directory / "lost+found").mkdir()
    (directory / "lost+found/x").write_bytes(bytes(PAGE))
    (directory / "link").symlink_to("notes.txt")
    (directory / "to-itself").symlink_to("to-itself")
    (directory / ".hidden").write_bytes(bytes(PAGE))
    (directory / "empty").touch()
    (directory / "odd").write_bytes(bytes(PAGE + 1))
    (directory / "twice").write_bytes(bytes(PAGE))
    os.link(directory / "twice", directory / "thrice")
    os.mkfifo(directory / "pipe")
    names = sorted(os.listdir(directory))

    def everything() -> list[object]:
        found: list[object] = []
        for name in names:
            path = directory / name
            s = path.lstat()
            found.append((name, s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
            found.append(path.read_bytes() if stat.S_ISREG(s.st_mode) else None)
            found.append(os.listxattr(path, follow_symlinks=False))
        return found

    before = everything()
    with Mount(mountpoint, f"store={directory},size=1m"):
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(content(1))
        assert os.listdir(mountpoint) == ["a"]
        for name in (*names, ".ttmfs"):
            assert not (mountpoint / name).exists()
            if not name.startswith("."):
                with raises_errno(EEXIST):
                    (mountpoint / name).mkdir()
                with raises_errno(EEXIST):
                    os.rename(mountpoint / "a", mountpoint / name)
                with raises_errno(ENOENT):
                    (mountpoint / name).rmdir()
        assert count(mountpoint / "a", "pages") == os.statvfs(mountpoint).f_blocks - os.statvfs(mountpoint).f_bfree == 1
        run("rm -r *", cwd=mountpoint)
    assert everything() == before


def test_a_foreign_file_of_whole_pages_is_a_backup(directory: Path, mountpoint: Path) -> None:
    with (directory / "image").open("xb") as file:
        file.write(content(1, 2))
        file.truncate(8 * PAGE)
        file.seek(5 * PAGE)
        file.write(content(5))
    before = (directory / "image").stat()
    with Mount(mountpoint, f"store={directory}"):
        assert os.listdir(mountpoint) == ["image"]
        assert os.listdir(mountpoint / "image") == ["1", "2", "6"]
        assert (mountpoint / "image/6").read_bytes() == content(5)
        after = (directory / "image").stat()
        for field in "st_ino", "st_mode", "st_uid", "st_size", "st_mtime_ns", "st_blocks":
            assert getattr(after, field) == getattr(before, field)
        with (directory / "new").open("xb") as file:  # while it is mounted
            file.write(content(2))
        assert (mountpoint / "new/1").read_bytes() == content(2)
        assert sorted(os.listdir(mountpoint)) == ["image", "new"]
        (directory / "new").unlink()
        wait_until(lambda: not (mountpoint / "new").exists(), "the kernel to ask again")
        assert os.listdir(mountpoint) == ["image"]


def test_reused_inode_numbers_do_not_mix_up_backups(directory: Path, mountpoint: Path) -> None:
    with Mount(mountpoint, f"store={directory}"):
        shown, below = set(), []
        with contextlib.ExitStack() as stack:
            for number in range(20):
                (mountpoint / "a").mkdir()
                (mountpoint / "a/1").write_bytes(content(number))
                below.append((directory / "a").stat().st_ino)
                for path in mountpoint / "a", mountpoint / "a/1":
                    assert path.stat().st_ino not in shown
                    shown.add(path.stat().st_ino)
                held = stack.enter_context(opened(mountpoint / "a/1"))
                image = stack.enter_context(opened(mountpoint / "a/.image"))
                assert os.pread(held, PAGE, 0) == content(number)
                (mountpoint / "a/1").unlink()
                (mountpoint / "a").rmdir()
                (mountpoint / "a").mkdir()
                (mountpoint / "a/1").write_bytes(b"secret of another's")
                for fd in held, image:
                    with raises_errno(ESTALE):
                        os.pread(fd, PAGE, 0)
                    with raises_errno(ESTALE):
                        os.pwrite(fd, b"x", 0)
                run("rm -r a", cwd=mountpoint)
        if "ext" in run(f"stat -f -c %T {directory}"):
            assert len(set(below)) < len(below), "the filesystem did use some again"


def test_a_copy_of_a_backup_file_is_a_separate_backup(directory: Path, mountpoint: Path, below: Path) -> None:
    """The copy has the original's mark, or was moved here from another store."""
    other = below / "other"
    other.mkdir()
    with Mount(mountpoint, f"store={other}"):
        (mountpoint / "moved").mkdir()
        (mountpoint / "moved/1").write_bytes(content(3))
    with Mount(mountpoint, f"store={directory}"):
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(content(1))
        run(f"cp -a --sparse=always {directory}/a {directory}/copy && mv {other}/moved {directory}/")
        (mountpoint / "copy/1").write_bytes(content(2))
        for name, number in ("a", 1), ("copy", 2), ("moved", 3):
            assert (mountpoint / name / "1").read_bytes() == content(number)
        assert len({entry.inode() for entry in os.scandir(mountpoint)}) == 3


# --- the budget, which the daemon keeps ---


def test_the_budget_and_the_number_of_backups_hold(directory: Path, mountpoint: Path) -> None:
    with Mount(mountpoint, f"store={directory},size=64k,nr_inodes=3"):
        (mountpoint / "a").mkdir()
        (mountpoint / "b").mkdir()
        with raises_errno(ENOSPC):
            (mountpoint / "c").mkdir()
        with opened(mountpoint / "a/.image") as fd:
            assert os.pwrite(fd, content(1, 10), 0) == 10 * PAGE
            os.setxattr(mountpoint / "b", "user.ttmfs.size", b"1m")
            with opened(mountpoint / "b/.image") as other:
                assert os.pwrite(other, content(2, 20), PAGE) == 6 * PAGE
                with raises_errno(ENOSPC):
                    os.pwrite(other, content(2), 100 * PAGE)
                assert os.pwrite(other, content(2, 6), PAGE) == 6 * PAGE, "over what is there"
            assert (mountpoint / "b/2").read_bytes() == content(2, 20)[:PAGE]
        with raises_errno(ENOSPC):
            (mountpoint / "b/90").touch()
        (mountpoint / "a/3").unlink()
        (mountpoint / "b/90").touch()
        room = os.statvfs(mountpoint)
        assert (room.f_blocks, room.f_bfree, room.f_files, room.f_ffree) == (16, 0, 3, 0)
        os.setxattr(mountpoint, "user.ttmfs.size", b"1m")
        assert os.statvfs(mountpoint).f_bfree == 256 - 16
        with raises_errno(22):
            os.setxattr(mountpoint, "user.ttmfs.size", b"60k")
        with pytest.raises(OSError, match=os.strerror(ENOTEMPTY)):
            (mountpoint / "a").rmdir()


def test_pages_stored_through_shmem_are_counted(directory: Path, mountpoint: Path) -> None:
    with Mount(mountpoint, f"store={directory},size=1m"):
        (mountpoint / "a").mkdir()
        run(f"dd if=/dev/urandom of=a/.shmem bs={PAGE} count=10 seek=5 conv=notrunc", cwd=mountpoint)
        assert len(os.listdir(mountpoint / "a")) == 10
        assert count(mountpoint / "a", "pages") == 10
        wait_until(lambda: os.statvfs(mountpoint).f_bfree == 246, "df to see it")
        run(f"fallocate -p -o {6 * PAGE} -l {3 * PAGE} a/.shmem", cwd=mountpoint)
        assert count(mountpoint / "a", "pages") == 7
        wait_until(lambda: os.statvfs(mountpoint).f_bfree == 249, "df to see it")
        assert int(run("du -s --block-size=1 a", cwd=mountpoint).split()[0]) == 7 * PAGE


def test_without_a_budget_a_mount_can_fill_its_filesystem(directory: Path, mountpoint: Path, below: Path) -> None:
    with Mount(mountpoint, f"store={directory}"):
        (mountpoint / "a").mkdir()
        with opened(mountpoint / "a/.image") as fd:
            os.pwrite(fd, content(1, 256), 0)
            os.fsync(fd)
        room, found = os.statvfs(mountpoint), os.statvfs(below)
        assert room.f_blocks - room.f_bfree == 256
        assert abs(room.f_bavail * PAGE - found.f_bavail * found.f_frsize) < 8 * MIB


# --- disks that are full, or fail ---


@pytest.mark.parametrize(("kind", "page_size"), [*((kind, PAGE) for kind in KINDS), ("ext4", 16 * PAGE)])
def test_a_full_disk_gives_enospc_and_loses_nothing(
    mountpoint: Path, tmp_path: Path, kind: str, page_size: int
) -> None:
    with stores.filesystem(tmp_path / "below", kind) as below:
        store = below / "store"
        store.mkdir()
        free = os.statvfs(below).f_bavail * os.statvfs(below).f_frsize
        with (below / "ballast").open("xb") as file:  # so that 12 MiB are left
            os.posix_fallocate(file.fileno(), 0, free - 12 * MIB)
        with Mount(mountpoint, f"store={store},backup_size=64m,page_size={page_size}"):
            (mountpoint / "a").mkdir()
            stored = set()
            with opened(mountpoint / "a/.image") as fd:
                buffer = mmap.mmap(-1, MIB)  # begins with a page, so that no request of the kernel's ends within one
                with raises_errno(ENOSPC):
                    for start in range(0, 64 * MIB, MIB):
                        buffer[:] = content(start, MIB // PAGE)
                        done = os.pwrite(fd, buffer, start)
                        assert done % page_size == 0
                        stored |= {(start, offset) for offset in range(0, done, page_size)}
                with contextlib.suppress(OSError):  # btrfs may notice only now
                    os.fsync(fd)
            assert len(stored) > 8 * MIB // page_size
            assert count(mountpoint / "a", "pages") == len(stored)
            with raises_errno(ENOSPC):
                for handle in range(60 * MIB // page_size, 64 * MIB // page_size):
                    (mountpoint / "a" / str(handle)).write_bytes(content(handle, page_size // PAGE))
        with Mount(mountpoint, f"store={store},page_size={page_size}"):
            pages = {start: content(start, MIB // PAGE) for start, _ in stored}
            with opened(mountpoint / "a/.image") as fd:
                for start, offset in stored:
                    assert os.pread(fd, page_size, start + offset) == pages[start][offset : offset + page_size]
            os.truncate(mountpoint / "a/.image", 0)
            (mountpoint / "a/1").write_bytes(content(1, page_size // PAGE))
            assert (mountpoint / "a/1").read_bytes() == content(1, page_size // PAGE)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("way", ["fsync", "O_SYNC", "fsync of the image"])
def test_synced_pages_survive_a_power_failure(mountpoint: Path, tmp_path: Path, kind: str, way: str) -> None:
    """What was not synced had not reached the disk yet."""
    disk = Disk(tmp_path, kind)
    with disk.mounted() as below:
        (below / "store").mkdir()
        run(f"sync -f {below}")
        with Mount(mountpoint, f"store={below}/store,backup_size=1m") as mount:
            mount.expect_log("get EIO")
            (mountpoint / "a").mkdir()
            with opened(mountpoint / "a/7", os.O_CREAT | os.O_RDWR | (os.O_SYNC if way == "O_SYNC" else 0)) as fd:
                os.pwrite(fd, content(7), 0)
                if way == "fsync":
                    os.fsync(fd)
            if way == "fsync of the image":
                with opened(mountpoint / "a/.image") as fd:
                    os.fsync(fd)
            (mountpoint / "a/8").write_bytes(content(8))
            shut_down(below)
            with raises_errno(EIO):
                (mountpoint / "a/9").write_bytes(content(9))
    with disk.mounted() as below, Mount(mountpoint, f"store={below}/store"):
        assert (mountpoint / "a/7").read_bytes() == content(7)
        assert os.listdir(mountpoint / "a") == ["7"]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_failing_disk_gives_eio_logged_once_and_keeps_synced_pages(
    mountpoint: Path, tmp_path: Path, kind: str
) -> None:
    disk = Disk(tmp_path, kind)
    with disk.mounted() as below:
        (below / "store").mkdir()
        with Mount(mountpoint, f"store={below}/store,backup_size=1m") as mount:
            mount.expect_log("get EIO")
            (mountpoint / "a").mkdir()
            with opened(mountpoint / "a/.image") as fd, opened(mountpoint / "a/.image") as other:
                os.pwrite(fd, content(1, 100), 0)
                os.fsync(fd)
                os.pwrite(fd, content(2), 200 * PAGE)
                shut_down(below)
                for each in fd, other, fd:  # everyone is told, however often
                    with raises_errno(EIO):
                        os.fsync(each)
                for _ in range(3):
                    with raises_errno(EIO):
                        os.pwrite(fd, content(3), 0)
                    with raises_errno(EIO):
                        (mountpoint / "b").mkdir()
        assert len([line for line in mount.log if "callers of fsync" in line]) <= 2, "the first, and why the others"
        assert len([line for line in mount.log if "callers of write" in line]) == 1
    with disk.mounted() as below, Mount(mountpoint, f"store={below}/store"), opened(mountpoint / "a/.image") as fd:
        assert os.pread(fd, 100 * PAGE, 0) == content(1, 100)
