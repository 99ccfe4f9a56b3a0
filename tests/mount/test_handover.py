"""A backup's descriptor goes to users whom the mode bits allow, and to nobody else. Some users try to cheat."""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harness import Mount, count, descriptors, wait_until
from stores import ALICE, BOB, CAROL, Place, UsersMount, acting_as
from ttmfs.client import Backup
from ttmfs.daemon import descriptor_socket as handover
from ttmfs.daemon.descriptor_socket import DescriptorSocket
from ttmfs.fuse.inodes import IMAGE
from ttmfs.model.pool import Pool
from ttmfs.options import Options
from ttmfs.stores import make_store

PAGE = os.sysconf("SC_PAGE_SIZE")
GROUP = 65500

ASK = """
import json, os, socket, struct, sys
path, answers = sys.argv[1], []
for request in json.load(sys.stdin):
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(5)
            connection.connect(path)
            connection.send(bytes.fromhex(request))
            answer, given, _, _ = socket.recv_fds(connection, 64, 4)
            number, = struct.unpack("=i", answer)
            if not number:
                os.pwrite(given[0], b"mine", 0)
                assert os.pread(given[0], 4, 0) == b"mine"
            assert len(given) == (not number)
            for fd in given:
                os.close(fd)
            answers.append(number)
    except OSError as error:
        answers.append(error.errno)
print(json.dumps(answers))
"""

ACTORS = {
    "root": (0, 0, []),
    "the owner": (ALICE, ALICE, []),
    "of the group": (BOB, GROUP, []),
    "of the group besides": (BOB, BOB, [BOB, GROUP]),
    "a stranger": (CAROL, CAROL, []),
}


def requests_for(*inodes: int) -> list[str]:
    return [struct.pack("=Q", ino).hex() for ino in inodes]


def ask(place: Place, actor: str, path: str, requests: list[str]) -> list[int]:
    """The answer to a request: 0 if the user got a descriptor, stored and read through it, else an errno."""
    uid, gid, groups = ACTORS[actor]
    who = f"--reuid {uid} --regid {gid} " + (f"--groups {','.join(map(str, groups))}" if groups else "--clear-groups")
    command = [*shlex.split(f"setpriv {who} --"), place.python, "-I", "-c", ASK, path]
    done = subprocess.run(
        command, input=json.dumps(requests), stdout=subprocess.PIPE, text=True, timeout=60, check=True, cwd="/"
    )
    return list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def mount(place: Place) -> Iterator[Mount]:
    """A mount of root that is open to all."""
    with (
        place.directory("open") as path,
        Mount(path, "size=16m,backup_size=1m,mode=1777,allow_other", cwd=place.path) as mount,
    ):
        yield mount


@pytest.fixture
def door(mount: Mount) -> str:
    """The socket of that mount."""
    return mount.descriptors_socket()


def made(mount: Mount, name: str, mode: int) -> int:
    """A backup of Alice and a group, with a page. Returns its inode number."""
    path = mount.path / name
    path.mkdir()
    (path / "7").write_bytes(b"x")
    os.chown(path, ALICE, GROUP)
    path.chmod(mode)
    return path.stat().st_ino


def ended(mount: Mount) -> None:
    for path in mount.path.iterdir():
        os.truncate(path / ".image", 0)
        path.rmdir()


LINGERING_SECONDS = 20

SEND_SOCKETS_THAT_LINGER = f"""
import contextlib, os, socket, struct, sys, threading
listener = socket.create_server(("127.0.0.1", 0))
for _ in range(8):
    lingering = socket.create_connection(listener.getsockname())
    lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, {LINGERING_SECONDS}))
    lingering.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while lingering.send(bytes(65536)):  # nobody reads it: the process that closes it last waits
            pass
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(sys.argv[1])
    try:
        socket.send_fds(connection, [bytes(8)], [lingering.fileno()])
    except OSError as error:
        print(error.errno)
        lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
    # In most of the threads this happens before the daemon receives the other reference, which is the last one then.
    threading.Thread(target=os.close, args=[lingering.detach()], daemon=True).start()
    connection.detach()
sys.stdout.flush()
sys.stdin.readline()  # till then the other ends are there, and silent
"""

MODES = [0o700, 0o755, 0o770, 0o777, 0o775, 0o070, 0o007, 0o707, 0o666, 0o776, 0o750, 0o000, 0o1777, 0o500]


@pytest.mark.parametrize("actor", ACTORS)
def test_only_users_who_can_reach_read_and_write_a_backup_get_its_descriptor(
    place: Place, mount: Mount, door: str, actor: str
) -> None:
    inodes = [made(mount, f"m{number}", mode) for number, mode in enumerate(MODES)]
    shift = {"the owner": 6, "of the group": 3, "of the group besides": 3, "a stranger": 0}.get(actor)
    expected = [0 if shift is None or mode >> shift & 7 == 7 else errno.EACCES for mode in MODES]
    assert ask(place, actor, door, requests_for(*inodes)) == expected
    for number, answer in enumerate(expected):
        assert count(mount.path / f"m{number}", "pages") == (2 if answer == 0 else 1), "who was refused stored nothing"
    ended(mount)


def test_a_root_directory_without_search_permission_gives_no_descriptors(place: Place, mount: Mount, door: str) -> None:
    request = requests_for(made(mount, "a", 0o777))
    mount.path.chmod(0o1770)
    assert [ask(place, actor, door, request) for actor in ("a stranger", "root")] == [[errno.EACCES], [0]]
    mount.path.chmod(0o1777)
    assert ask(place, "a stranger", door, request) == [0]
    ended(mount)


def test_requests_for_anything_but_a_backup_are_refused(place: Place, mount: Mount, door: str) -> None:
    ino = made(mount, "a", 0o777)
    gone = made(mount, "b", 0o777)
    os.truncate(mount.path / "b/.image", 0)
    (mount.path / "b").rmdir()
    requests = [
        *requests_for(0, 1, 2, 3, ino + 7, ino + IMAGE, ino | 1 << 63, 2**64 - 1),
        "", "00", "00" * 7, "00" * 9, "ff" * 8, "00" * 5000, struct.pack("=QQ", ino, ino).hex(),
    ]  # fmt: skip
    assert set(ask(place, "root", door, requests)) <= {errno.EINVAL, errno.ESTALE}
    assert ask(place, "root", door, requests_for(gone)) == [errno.ESTALE]
    ended(mount)


def test_permissions_are_checked_at_each_request(place: Place, mount: Mount, door: str) -> None:
    request = requests_for(made(mount, "a", 0o707))
    assert ask(place, "a stranger", door, request) == [0]
    (mount.path / "a").chmod(0o700)
    assert ask(place, "a stranger", door, request) == [errno.EACCES]
    os.chown(mount.path / "a", CAROL, CAROL)
    assert ask(place, "a stranger", door, request) == [0]
    ended(mount)


def test_flags_of_a_passed_descriptor_do_not_affect_the_daemon(mount: Mount) -> None:
    """With O_APPEND on the daemon's own descriptor, every page would go to the end."""
    with Backup.create(mount.path / "a") as backup:
        assert backup.is_native
        fcntl.fcntl(backup.fileno(), fcntl.F_SETFL, os.O_APPEND)
        os.lseek(backup.fileno(), 12345, os.SEEK_SET)
        (mount.path / "a/3").write_bytes(b"there")
        assert backup.handles().tolist() == [3]
        assert backup.size == 1 << 20
        backup.fini()


def test_attributes_set_through_a_descriptor_take_less_memory_than_size(place: Place) -> None:
    size, taken, name = 16 << 20, 0, 0
    with place.directory("shared") as path, Mount(path, f"size={size},mode=1777,allow_other", cwd=place.path):
        for directory in "ab":
            (path / directory).mkdir()
        with Backup.open(path / "a") as backup:
            os.chown(path / "a", ALICE, ALICE)
            with acting_as(ALICE), contextlib.suppress(OSError):
                while taken < 2 * size:  # before Linux 6.6 a tmpfs has no such attributes
                    os.setxattr(backup.fileno(), f"user.{name}", bytes(65536))
                    name, taken = name + 1, taken + 65536
            assert taken < size
            (path / "b/7").write_bytes(b"x")
            assert (path / "b/7").read_bytes()[:1] == b"x", "pages have their own room"
            backup.fini()
        wait_until(lambda: os.statvfs(path).f_ffree > 4000, "the memory to be given back")


def test_a_descriptor_outlives_the_backup_and_holds_its_memory_no_longer_than_itself(mount: Mount) -> None:
    backup = Backup.create(mount.path / "a")
    backup.backup_pages(np.ones((100, PAGE), np.uint8), 0)
    fd = os.dup(backup.fileno())
    backup.fini()
    assert not os.fstat(fd).st_blocks, "what was in it was released"
    os.pwrite(fd, b"late", 0)
    free = os.statvfs(mount.path).f_bfree
    os.close(fd)
    wait_until(lambda: os.statvfs(mount.path).f_bfree == free + 1, "the page to be released")


def test_silent_connections_do_not_block_others(place: Place, mount: Mount, door: str) -> None:
    """The daemon keeps eight of each user for a second, and serves others meanwhile."""
    request, before = requests_for(made(mount, "a", 0o777)), len(descriptors(mount.pid))

    def seconds_to_ask() -> float:
        start = time.monotonic()
        assert ask(place, "a stranger", door, request) == [0]
        return time.monotonic() - start

    alone = seconds_to_ask()
    with contextlib.ExitStack() as idle:
        with acting_as(BOB):
            for _ in range(100):
                idle.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)).connect(door)
        assert seconds_to_ask() < 1 + 3 * alone, "a hundred connections keep each other out for 12 s"
        assert len(descriptors(mount.pid)) <= before + 12, "eight connections, and files opened meanwhile"
    wait_until(lambda: len(descriptors(mount.pid)) <= before, "the daemon to let go of them")
    ended(mount)


def test_a_user_with_many_uids_takes_no_more_than_the_limit_for_all(mount: Mount, door: str) -> None:
    """subuid(5) gives each user 65,536 of them."""
    before = len(descriptors(mount.pid))
    with contextlib.ExitStack() as idle:
        for uid in range(100_000, 100_020):
            with acting_as(uid):
                for _ in range(8):
                    idle.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)).connect(door)
        wait_until(lambda: len(descriptors(mount.pid)) >= before + 60, "the daemon to take them")
        time.sleep(0.2)
        assert len(descriptors(mount.pid)) <= before + 68
    wait_until(lambda: len(descriptors(mount.pid)) <= before, "the daemon to let go of them")


def test_a_stranger_s_descriptors_never_reach_the_daemon(place: Place) -> None:
    """The kernel closes received descriptors in the receiving thread. A socket that lingers would delay that thread."""
    options = "size=1m,mode=1777,allow_other,busy_poll=off"
    with place.directory("shared") as path, Mount(path, options, cwd=place.path) as mount:
        door = mount.descriptors_socket()
        (path / "a").mkdir()
        (path / "a/7").write_bytes(b"x")
        command = ["setpriv", "--reuid", str(BOB), "--regid", str(BOB), "--clear-groups", "--"]
        command += [place.python, "-I", "-c", SEND_SOCKETS_THAT_LINGER, door]
        sender = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
        try:
            start = time.monotonic()
            while time.monotonic() < start + 3:
                asked = time.monotonic()
                assert (path / "a/7").read_bytes()[:1] == b"x"
                assert time.monotonic() - asked < LINGERING_SECONDS / 2, "the daemon waited for a stranger's socket"
                time.sleep(0.01)
            assert sender.communicate(timeout=60)[0].split() == [str(errno.EPERM)] * 8
        finally:
            sender.kill()
            sender.communicate()


def test_an_old_kernel_restricts_the_socket_to_the_user_of_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_SO_PASSRIGHTS", 9999)  # every kernel answers as an older one does to SO_PASSRIGHTS
    with contextlib.closing(Pool(make_store(options := Options.parse("size=1m")), options)) as pool:
        path = tmp_path / "socket"
        with pytest.raises(OSError, match="cannot refuse descriptors of strangers"):
            DescriptorSocket(pool, str(path), owner=0, open_to_others=True, count=int)
        assert not path.exists()
        with contextlib.closing(DescriptorSocket(pool, str(path), owner=0, open_to_others=False, count=int)):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_handovers_are_counted_and_the_socket_is_removed_at_unmount(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m") as mount:
        socket_ = Path(json.loads((mountpoint / ".config").read_text())["descriptors"])
        assert stat.S_IMODE(socket_.stat().st_mode) == 0o600, "root alone is let in"
        for _ in range(3):
            with Backup.create(mountpoint / "a") as backup:
                assert backup.is_native
                backup.fini()
        assert "\nttmfs_handovers_total 3\n" in (mountpoint / ".stats").read_text()
        mount.expect_restarts()
        mount.kill()
        with Backup.create(mountpoint / "a") as backup:
            assert backup.is_native, "of the next daemon"
            backup.fini()
    assert not socket_.exists()


def test_a_user_s_mount_gives_its_user_descriptors_and_root_none(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.directory("runtime", ALICE) as runtime, place.directory("alice", ALICE) as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        with UsersMount(place, path, "size=1m"):
            with acting_as(ALICE), Backup.create(path / "a") as backup:
                assert backup.is_native
                assert backup.backup_page(b"x" * PAGE, 3) == 4
                ino = backup.id
                door = json.loads((path / ".config").read_text())["descriptors"]
            assert door.startswith(f"{runtime}/ttmfs/")
            assert ask(place, "root", door, requests_for(ino)) == [errno.EACCES]
            assert ask(place, "a stranger", door, requests_for(ino)) == [errno.EACCES]
            with acting_as(ALICE), Backup.open(path / "a") as backup:
                backup.fini()
        (runtime / "ttmfs").rmdir()


def test_a_mount_serves_even_if_it_cannot_make_a_socket(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.directory("alice", ALICE) as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
        with UsersMount(place, path, "size=1m") as mount:
            mount.expect_log("no descriptors are given to programs")
            with acting_as(ALICE), Backup.create(path / "a") as backup:
                assert json.loads((path / ".config").read_text())["descriptors"] is None
                assert not backup.is_native
                backup.backup_page(b"x" * PAGE, 0)
                backup.fini()
