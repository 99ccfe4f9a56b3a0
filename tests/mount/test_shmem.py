"""``.shmem`` in passthrough mode: who may open it, what works on it, and what goes on while the daemon is dead."""

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import shlex
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kept import Kept, abort, expect_cuts, kept_state, listed_connections, served_anew

from harness import REPOSITORY, Mount, attribute, count, names, opened, raises_errno, run, set_attribute, wait_until
from stores import ALICE, BOB, CAROL, Place, UsersMount, acting_as
from ttmfs.client import Backup
from ttmfs.errors import BackupEnded
from ttmfs.fuse import init_answer
from ttmfs.fuse.backing_files import ID_SHIFT, LATEST
from ttmfs.fuse.inodes import backup_of
from ttmfs.linux.fuse_protocol import ANSWER, BACKING_CLOSE, BACKING_MAP, BACKING_OPEN
from ttmfs.recovery.state import _BACKING_AT as BACKING_AT
from ttmfs.recovery.state import BACKING

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 1 << 20
GROUP = 65500
RWF_DSYNC = os.RWF_DSYNC

ACTORS = {
    "root": (0, 0, []),
    "the owner": (ALICE, ALICE, []),
    "of the group": (BOB, GROUP, []),
    "of the group besides": (BOB, BOB, [BOB, GROUP]),
    "a stranger": (CAROL, CAROL, []),
}
MODES = [
    0o700,
    0o755,
    0o770,
    0o777,
    0o775,
    0o070,
    0o007,
    0o707,
    0o666,
    0o776,
    0o750,
    0o000,
    0o1777,
    0o644,
    0o664,
    0o600,
]

OPEN_EACH = """
import errno, os, sys
for path in sys.argv[1:]:
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as error:
        print(error.errno)
        continue
    os.pwrite(fd, b"mine", 0)
    assert os.pread(fd, 4, 0) == b"mine"
    os.close(fd)
    print(0)
"""


def command_as(place: Place, actor: str, *words: object) -> list[str]:
    """A Python program that a user runs."""
    uid, gid, groups = ACTORS[actor]
    who = f"--reuid {uid} --regid {gid} " + (f"--groups {','.join(map(str, groups))}" if groups else "--clear-groups")
    return [*shlex.split(f"setpriv {who} --"), place.python, "-I", "-c", *map(str, words)]


def open_each(place: Place, actor: str, *paths: Path) -> list[int]:
    """0 for each path if the user can open it to read and write, and does so, else the errno."""
    done = subprocess.run(
        command_as(place, actor, OPEN_EACH, *paths), stdout=subprocess.PIPE, text=True, timeout=60, check=True, cwd="/"
    )
    return [int(line) for line in done.stdout.split()]


@pytest.fixture(scope="module")
def mount(place: Place) -> Iterator[Mount]:
    """A mount of root that is open to all."""
    with (
        place.directory("open") as path,
        Mount(path, f"size=64m,backup_size={SIZE},mode=1777,allow_other", cwd=place.path) as mount,
    ):
        yield mount


@pytest.fixture
def a(mount: Mount) -> Iterator[Path]:
    """A backup with page 7."""
    path = made(mount, "a", 0o777)
    yield path
    end(path)


def made(mount: Mount, name: str, mode: int) -> Path:
    """A backup of Alice and a group, with a page."""
    path = mount.path / name
    path.mkdir()
    (path / "7").write_bytes(b"x" * PAGE)
    os.chown(path, ALICE, GROUP)
    path.chmod(mode)
    return path


def end(path: Path) -> None:
    os.truncate(path / ".image", 0)
    path.rmdir()


def table(mount: Kept) -> list[int]:
    """The state's table of backing files."""
    with opened(kept_state(mount.keeper), os.O_RDONLY) as fd:
        return list(struct.unpack(f"{BACKING}Q", os.pread(fd, BACKING * 8, BACKING_AT)))


def numbers(mount: Kept) -> dict[int, int]:
    """The numbers of the backing files, by backup."""
    return {row >> ID_SHIFT: row % (1 << ID_SHIFT) for place, row in enumerate(table(mount)) if row and place != LATEST}


@contextlib.contextmanager
def connection_of(keeper: int) -> Iterator[int]:
    """The connection that a keeper holds, as a descriptor of this process."""
    (number,) = (int(fd.name) for fd in Path(f"/proc/{keeper}/fd").iterdir() if os.readlink(fd) == "/dev/fuse")
    pidfd = os.pidfd_open(keeper)
    fd = ctypes.CDLL(None).syscall(438, pidfd, number, 0)  # pidfd_getfd(2)
    assert fd >= 0
    try:
        yield fd
    finally:
        os.close(fd)
        os.close(pidfd)


def close_backing(connection: int, number: int) -> int:
    """The errno of closing a backing file."""
    try:
        fcntl.ioctl(connection, BACKING_CLOSE, struct.pack("=I", number))
    except OSError as error:
        return error.errno or 0
    return 0


# --- who ---


@pytest.mark.parametrize("actor", ACTORS)
def test_only_users_who_can_reach_read_and_write_a_backup_can_open_its_shmem(
    place: Place, mount: Mount, actor: str
) -> None:
    paths = [made(mount, f"m{number}", mode) for number, mode in enumerate(MODES)]
    shift = {"the owner": 6, "of the group": 3, "of the group besides": 3, "a stranger": 0}.get(actor)
    expected = [0 if shift is None or mode >> shift & 7 == 7 else errno.EACCES for mode in MODES]
    assert open_each(place, actor, *(path / ".shmem" for path in paths)) == expected
    for path, answer in zip(paths, expected, strict=True):
        assert count(path, "pages") == (2 if answer == 0 else 1), "who was refused stored nothing"
        end(path)


@pytest.mark.parametrize(
    ("mode", "shown"), [(0o644, 0o600), (0o664, 0o660), (0o600, 0o600), (0o1777, 0o666), (0o444, 0), (0o622, 0o622)]
)
def test_shmem_shows_the_right_to_read_only_where_there_is_the_right_to_write(
    mount: Mount, mode: int, shown: int
) -> None:
    path = made(mount, "a", mode)
    found = (path / ".shmem").lstat()
    assert found.st_mode == stat.S_IFREG | shown
    assert (found.st_uid, found.st_gid) == (ALICE, GROUP)
    end(path)


def test_a_reader_gets_eacces_and_reads_the_image(mount: Mount) -> None:
    """A read through a mapping would store a page."""
    path = made(mount, "a", 0o755)
    with acting_as(CAROL):
        with raises_errno(errno.EACCES):
            os.open(path / ".shmem", os.O_RDONLY)
        with Backup.open(path) as backup:
            assert not backup.is_native
            page = bytearray(PAGE)
            backup.copy_page(page, 7)
            assert page == b"x" * PAGE
    end(path)


def test_rights_are_those_of_the_moment(place: Place, mount: Mount) -> None:
    path = made(mount, "a", 0o707)
    assert open_each(place, "a stranger", path / ".shmem") == [0]
    path.chmod(0o700)
    assert open_each(place, "a stranger", path / ".shmem") == [errno.EACCES]
    os.chown(path, CAROL, CAROL)
    assert open_each(place, "a stranger", path / ".shmem") == [0]
    end(path)


def test_another_user_in_another_pid_namespace_has_the_memory(place: Place, a: Path) -> None:
    code = (
        "import mmap, os, sys\n"
        "assert os.getpid() == 1\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "memory = mmap.mmap(fd, 1 << 20)\n"
        "assert memory[6 * 4096 : 6 * 4096 + 2] == b'xx'\n"
        "memory[8 * 4096 : 8 * 4096 + 4] = b'mine'\n"
    )
    subprocess.run(
        ["unshare", "--pid", "--fork", *command_as(place, "a stranger", code, a / ".shmem")], check=True, timeout=30,
        cwd="/",
    )  # fmt: skip
    assert (a / "9").read_bytes()[:4] == b"mine"


def test_chmod_and_chown_of_shmem_are_refused(a: Path) -> None:
    for change in (
        lambda: os.chmod(a / ".shmem", 0o666),
        lambda: os.chown(a / ".shmem", BOB, BOB),
        lambda: (a / ".shmem").unlink(),
        lambda: (a / ".shmem").rename(a / "9"),
    ):
        with raises_errno(errno.EPERM):
            change()
    assert (a / ".shmem").stat().st_uid == ALICE


# --- what works ---


def test_requests_for_reading_and_writing_do_not_reach_the_daemon(mount: Mount, a: Path) -> None:
    def asked(operation: str) -> int:
        text = (mount.path / ".stats").read_text()
        line = f'ttmfs_operation_duration_seconds_count{{operation="{operation}"}} '
        return sum(int(found.removeprefix(line)) for found in text.splitlines() if found.startswith(line))

    with opened(a / ".shmem") as fd:
        before = asked("write")
        for number in range(100):
            os.pwrite(fd, b"%04d" % number, number * PAGE)
            assert os.pread(fd, 4, number * PAGE) == b"%04d" % number
        assert asked("write") == before
        assert count(a, "pages") == 100


def test_size_and_blocks_are_those_of_the_file_in_the_store(a: Path) -> None:
    with opened(a / ".shmem") as fd:
        assert (os.fstat(fd).st_size, os.fstat(fd).st_blocks) == (SIZE, 8)
        os.pwrite(fd, b"x", 20 * PAGE)
        assert os.fstat(fd).st_blocks == 16
        os.pwrite(fd, b"x", SIZE + PAGE)
        assert os.fstat(fd).st_size == SIZE + PAGE + 1
        assert attribute(a, "size") == str(SIZE + PAGE + 1)


def test_append_sendfile_direct_and_durable_writes_and_locks(a: Path, tmp_path: Path) -> None:
    shmem = a / ".shmem"
    with opened(shmem, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"appended")
    with opened(shmem) as fd, opened(shmem) as other, (tmp_path / "out").open("wb") as out:
        assert os.pread(fd, 8, SIZE) == b"appended"
        assert os.lseek(fd, 0, os.SEEK_END) == SIZE + 8
        assert os.sendfile(out.fileno(), fd, 6 * PAGE, PAGE) == PAGE
        assert (tmp_path / "out").read_bytes() == b"x" * PAGE
        for flags in 0, RWF_DSYNC:
            assert os.pwritev(fd, [b"durable"], 3 * PAGE, flags) == 7
        os.fsync(fd)
        os.fdatasync(fd)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
    with opened(shmem, os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(-1, PAGE) as aligned:
        aligned[:] = b"d" * PAGE
        assert os.pwrite(fd, aligned, 5 * PAGE) == PAGE
        assert os.preadv(fd, [aligned], 3 * PAGE) == PAGE
        assert aligned[:7] == b"durable"
    assert (a / "6").read_bytes() == b"d" * PAGE


def test_truncating_shmem_changes_the_size_of_the_backup(a: Path) -> None:
    for size in 3 * PAGE, 0, 10 * PAGE, SIZE:
        os.truncate(a / ".shmem", size)
        assert attribute(a, "size") == str(size)
        assert (a / ".image").stat().st_size == size
        assert names(a) == []
    with opened(a / ".shmem") as fd:
        os.pwrite(fd, b"y" * 2 * PAGE, 0)
        os.ftruncate(fd, PAGE + 100)
        os.ftruncate(fd, SIZE)
        assert os.pread(fd, PAGE, PAGE) == b"y" * 100 + bytes(PAGE - 100)
    with opened(a / ".shmem", os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
    assert a.is_dir(), "the backup does not end"
    with raises_errno(errno.EFBIG):
        os.truncate(a / ".shmem", 1 << 60)
    set_attribute(a, "size", SIZE)


def test_a_page_dropped_through_shmem_is_invisible_at_once(a: Path) -> None:
    with opened(a / ".shmem") as fd:
        for drop in (
            lambda: run(f"fallocate -p -o {6 * PAGE} -l {PAGE} {a}/.shmem"),
            lambda: os.ftruncate(fd, 6 * PAGE),
        ):
            os.ftruncate(fd, SIZE)
            os.pwrite(fd, b"x", 6 * PAGE)
            (a / "7").stat()
            assert names(a) == ["7"]
            drop()
            assert not (a / "7").exists()
            assert names(a) == []
        os.ftruncate(fd, SIZE)


def test_fallocate_gives_and_frees_memory_as_on_a_tmpfs(a: Path) -> None:
    run(f"fallocate -l 40m {a}/.shmem")
    assert attribute(a, "size") == str(40 << 20)
    assert (a / ".shmem").stat().st_blocks * 512 == 40 << 20
    run(f"fallocate -p -o 1m -l 39m {a}/.shmem")
    assert (a / ".shmem").stat().st_blocks * 512 == 1 << 20
    with raises_errno(errno.ENOSPC), opened(a / ".shmem") as fd:
        os.posix_fallocate(fd, 0, 1 << 30)
    with raises_errno(errno.EOPNOTSUPP), opened(a / ".shmem") as fd:  # as on a tmpfs
        if ctypes.CDLL(None, use_errno=True).fallocate(fd, 8, ctypes.c_long(0), ctypes.c_long(PAGE)):
            raise OSError(ctypes.get_errno(), "fallocate")


def test_numpy_maps_it(a: Path) -> None:
    pages = np.memmap(a / ".shmem", np.uint8, "r+").reshape(-1, PAGE)
    pages[3] = 9
    assert (a / "4").read_bytes() == b"\x09" * PAGE


def test_the_client_uses_it_if_it_may(a: Path) -> None:
    with acting_as(BOB), Backup.open(a) as backup:
        assert backup.is_native
        assert backup.backup_page(b"b" * PAGE, 11) == 12
    assert (a / "12").read_bytes() == b"b" * PAGE


def test_flags_of_a_program_s_descriptor_do_not_affect_the_daemon(a: Path) -> None:
    """With O_APPEND on the daemon's own descriptor, every page would go to the end."""
    with opened(a / ".shmem") as fd:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        os.lseek(fd, 12345, os.SEEK_SET)
        (a / "3").write_bytes(b"there")
        assert names(a) == ["3", "7"]
        assert attribute(a, "size") == str(SIZE)


# --- without the daemon ---


@contextlib.contextmanager
def dead_daemon(mount: Kept) -> Iterator[None]:
    """The daemon is dead, and the keeper starts no other before the end."""
    mount.expect_restarts()
    keeper, daemon = mount.keeper, mount.daemon
    before = mount.restarts()
    os.kill(keeper, signal.SIGSTOP)
    try:
        os.kill(daemon, signal.SIGKILL)
        wait_until(lambda: Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "its end")
        yield
    finally:
        os.kill(keeper, signal.SIGCONT)
    assert mount.restarts() == before + 1


def test_reads_writes_mappings_and_close_go_on_while_the_daemon_is_dead(mountpoint: Path, tmp_path: Path) -> None:
    """The first write after an open(2) or stat(2) is not among them: it asks for an attribute, security.capability."""
    with Kept(mountpoint, f"size=16m,backup_size={SIZE}") as mount:
        a = mountpoint / "a"
        a.mkdir()
        fd, appending = os.open(a / ".shmem", os.O_RDWR), os.open(a / ".shmem", os.O_WRONLY | os.O_APPEND)
        with mmap.mmap(fd, SIZE) as memory, (tmp_path / "out").open("wb") as out:
            os.pwrite(fd, b"first", 0)
            with dead_daemon(mount):
                assert os.pwrite(fd, b"w" * PAGE, 0) == PAGE
                assert os.pread(fd, PAGE, 0) == memory[:PAGE] == b"w" * PAGE
                memory[PAGE : PAGE + 6] = b"mapped"
                assert os.pread(fd, 6, PAGE) == b"mapped"
                assert os.write(appending, b"appended") == 8
                assert os.sendfile(out.fileno(), fd, 0, PAGE) == PAGE
                os.close(appending)
            assert (a / "2").read_bytes()[:6] == b"mapped"
            assert os.fstat(fd).st_size == SIZE + 8
        os.close(fd)


def test_a_takeover_keeps_the_number(mountpoint: Path) -> None:
    with Kept(mountpoint, f"size=16m,backup_size={SIZE}") as mount:
        mount.expect_restarts()
        a, b = mountpoint / "a", mountpoint / "b"
        a.mkdir()
        b.mkdir()
        with opened(a / ".shmem") as fd:
            before = numbers(mount)
            assert list(before) == [backup_of(a.stat().st_ino)]
            for _ in range(3):
                mount.kill_daemon()
                with opened(a / ".shmem") as again, opened(b / ".shmem") as other:
                    os.pwrite(again, b"seen", 0)
                    assert os.pread(fd, 4, 0) == b"seen"
                    assert os.pread(other, 4, 0) == bytes(4)
            assert before.items() <= numbers(mount).items()
            assert len(numbers(mount)) == 2


def test_the_next_daemon_closes_a_backing_file_that_was_not_noted(mountpoint: Path) -> None:
    with Kept(mountpoint, f"size=16m,backup_size={SIZE}") as mount:
        a = mountpoint / "a"
        a.mkdir()
        with opened(a / ".shmem") as fd, connection_of(mount.keeper) as connection:
            (number,) = numbers(mount).values()
            with dead_daemon(mount):
                memory = os.memfd_create("orphan")
                orphan = fcntl.ioctl(connection, BACKING_OPEN, bytearray(BACKING_MAP.pack(memory, 0, 0)), True)
                os.close(memory)
                assert orphan > number
            assert close_backing(connection, orphan) == errno.ENOENT, "it is closed"
            assert table(mount)[LATEST] > orphan
            assert list(numbers(mount).values()) == [number]
            with opened(a / ".shmem") as again:
                os.pwrite(again, b"seen", 0)
            assert os.pread(fd, 4, 0) == b"seen"


def test_the_next_daemon_closes_the_backing_file_of_a_backup_that_ended(mountpoint: Path) -> None:
    with Kept(mountpoint, f"size=16m,backup_size={SIZE}") as mount:
        (mountpoint / "a").mkdir()
        with opened(mountpoint / "a/.shmem"), connection_of(mount.keeper) as connection:
            memory = os.memfd_create("of a backup that ended")
            number = fcntl.ioctl(connection, BACKING_OPEN, bytearray(BACKING_MAP.pack(memory, 0, 0)), True)
            os.close(memory)
            before = numbers(mount)
            with dead_daemon(mount), opened(kept_state(mount.process.pid)) as state:
                os.pwrite(state, struct.pack("=Q", 4_000_000_000 << ID_SHIFT | number), BACKING_AT + 8 * 100)
                os.pwrite(state, struct.pack("=Q", number), BACKING_AT + 8 * LATEST)
            assert close_backing(connection, number) == errno.ENOENT
            assert numbers(mount) == before


def test_a_new_mount_forgets_the_numbers(mountpoint: Path) -> None:
    """On a new connection the numbers begin anew. An old one would show another backup's pages."""
    with listed_connections(), Kept(mountpoint, f"size=16m,backup_size={SIZE}") as mount:
        expect_cuts(mount)
        for name in "ab":
            (mountpoint / name).mkdir()
            (mountpoint / name / "1").write_bytes(name.encode() * PAGE)
            with opened(mountpoint / name / ".shmem"):
                pass
        assert len(numbers(mount)) == 2
        abort(mountpoint)
        wait_until(lambda: served_anew(mount), "the mount")
        assert numbers(mount) == {}
        for name in "ba":
            with opened(mountpoint / name / ".shmem") as fd:
                assert os.pread(fd, PAGE, 0) == name.encode() * PAGE


# --- the end of a backup ---


def test_a_program_that_has_it_open_holds_the_memory_until_it_closes(mount: Mount) -> None:
    free = os.statvfs(mount.path).f_bfree
    path = made(mount, "a", 0o777)
    backup = Backup.open(path)
    with opened(path / ".shmem") as fd:
        backup.fini()
        assert os.statvfs(mount.path).f_bfree == free, "what was in it was released"
        os.pwrite(fd, b"late", 0)
        assert os.pread(fd, 4, 0) == b"late"
        with raises_errno(errno.ESTALE):
            os.fstat(fd)
    wait_until(lambda: os.statvfs(mount.path).f_bfree == free, "the page to be released")


def test_the_end_of_a_backup_closes_its_backing_file(mountpoint: Path) -> None:
    with Kept(mountpoint, f"size=16m,backup_size={SIZE}") as mount, connection_of(mount.keeper) as connection:
        for name in "abc":
            (mountpoint / name).mkdir()
            with opened(mountpoint / name / ".shmem") as fd:
                os.pwrite(fd, b"x", 0)
        of = {name: numbers(mount)[backup_of((mountpoint / name).stat().st_ino)] for name in "abc"}
        end(mountpoint / "a")
        os.truncate(mountpoint / "c/.image", 0)
        (mountpoint / "b").rename(mountpoint / "c")  # which ends the old c
        assert list(numbers(mount).values()) == [of["b"]]
        assert [close_backing(connection, of[name]) for name in "ac"] == [errno.ENOENT] * 2
        assert os.statvfs(mountpoint).f_bfree == (16 << 20) // PAGE - 1


def test_the_client_notices_that_a_backup_ended(mount: Mount) -> None:
    path = made(mount, "b", 0o777)
    with Backup.open(path) as backup:
        assert backup.is_native
        end(path)
        with pytest.raises(BackupEnded):
            backup.backup_page(bytes(PAGE), 0)


HOLD = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); {more}; print(flush=True); sys.stdin.read()"
MAPPED = "import mmap; memory = mmap.mmap(fd, 4096); os.close(fd)"


@pytest.mark.parametrize("more", ["pass", MAPPED], ids=["open", "mapped"])
def test_fini_refuses_a_backup_whose_shmem_is_used_in_another_pid_namespace(a: Path, more: str) -> None:
    """No process there can be seen. The daemon knows of it all the same."""
    assert attribute(a, "shmem_open") == "0"
    hidden = ["unshare", "--pid", "--mount-proc", "--fork", sys.executable, "-m", "ttmfs", "fini", str(a)]
    command = [sys.executable, "-I", "-c", HOLD.format(more=more), str(a / ".shmem")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        assert program.stdout.readline() == "\n"
        assert attribute(a, "shmem_open") == "1"
        done = subprocess.run(hidden, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "is in use and was left" in done.stderr
        program.communicate("")
    wait_until(lambda: attribute(a, "shmem_open") == "0", "the file to be closed")
    assert (a / "7").exists()


def test_the_daemon_s_own_use_of_a_backup_does_not_count(mountpoint: Path) -> None:
    with Kept(mountpoint, f"size=16m,backup_size={SIZE}") as mount:
        mount.expect_restarts()
        a = mountpoint / "a"
        a.mkdir()
        (a / "1").write_bytes(b"x")
        with opened(a / ".shmem"):
            assert attribute(a, "shmem_open") == "1"
        for _ in range(2):
            wait_until(lambda: attribute(a, "shmem_open") == "0", "the file to be closed")
            mount.kill_daemon()
            assert (a / "1").read_bytes()[:1] == b"x"


# --- where there is none ---


@pytest.mark.parametrize("options", ["shmem=off", f"uid_size={SIZE}"])
def test_a_mount_that_does_not_offer_it_has_no_such_file(mountpoint: Path, options: str) -> None:
    with Mount(mountpoint, f"size=16m,{options}"):
        a = mountpoint / "a"
        a.mkdir()
        with raises_errno(errno.ENOENT):
            os.open(a / ".shmem", os.O_RDWR)
        with Backup.open(a) as backup:
            assert not backup.is_native
            backup.backup_page(b"x" * PAGE, 3)
        assert names(a) == ["4"]
        shown = json.loads((mountpoint / ".config").read_text())
        assert shown["shmem"] == ("off" if options == "shmem=off" else "on")


def test_a_mount_of_a_user_has_a_link_that_its_user_can_follow(place: Place) -> None:
    """It lies in a user namespace, from which the kernel takes no backing file."""
    options = f"size=16m,backup_size={SIZE}"
    with place.directory("alice", ALICE) as path, UsersMount(place, path, options), acting_as(ALICE):
        (path / "a").mkdir()
        assert stat.S_ISLNK((path / "a/.shmem").lstat().st_mode)
        with opened(path / "a/.shmem") as fd:
            os.pwrite(fd, b"mine", 0)
            assert attribute(path / "a", "shmem_open") == "1"
        assert attribute(path / "a", "shmem_open") == "0"
        assert (path / "a/1").read_bytes()[:4] == b"mine"
        with Backup.open(path / "a") as backup:
            assert backup.is_native
            backup.fini()


def test_with_store_it_is_a_link_that_the_client_does_not_follow(mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with Mount(mountpoint, f"store={tmp_path}/store,size=16m"):
        (mountpoint / "a").mkdir()
        assert (mountpoint / "a/.shmem").is_symlink()
        with Backup.open(mountpoint / "a") as backup:
            assert not backup.is_native
            backup.fini()


# --- FUSE_INIT ---


def test_the_answer_to_init_is_lengthened_and_keeps_what_libfuse_said() -> None:
    body = struct.pack("=IIIIHHI", 7, 38, 1 << 17, 1 << 3 | 1 << 29 | 1 << 5, 12, 9, 1 << 20)
    short = ANSWER.pack(ANSWER.size + len(body), 0, 2) + body
    for passthrough in False, True:
        answer = init_answer.edited(short, passthrough=passthrough)
        assert len(answer) == 80
        assert ANSWER.unpack_from(answer) == (80, 0, 2)
        flags, *kept = struct.unpack_from("=IHHI", answer, 28)
        assert kept == [12, 9, 1 << 20]
        assert flags == 1 << 5 | passthrough * (1 << 30 | 1 << 28)
        assert struct.unpack_from("=II", answer, 48) == ((1 << 5, 1) if passthrough else (0, 0))
