"""The Ceph of the tests, and what CephFS does that filesystems of one machine do not. Each is an experiment."""

import contextlib
import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ceph import Ceph, Client, has_ended
from harness import mounts_below, opened, raises_errno, run
from ttmfs.linux import system_calls as linux
from ttmfs.stores.directory_record import is_locked

PAGE = 4096
WAITS_SECONDS = 1.0
"""So long a request must wait at least to count as one that waits."""
ENDS_SECONDS = 60.0

WRITE = ["dd", "if=/dev/urandom", "of=file", f"bs={PAGE}", "count=1", "conv=fsync", "status=none"]


@pytest.fixture
def client(ceph: Ceph, tmp_path: Path) -> Iterator[Client]:
    with Client(ceph, tmp_path / "client") as client:
        yield client


@pytest.fixture
def other(ceph: Ceph, tmp_path: Path) -> Iterator[Client]:
    """A client on a host of its own."""
    with Client(ceph, tmp_path / "other", host="other") as client:
        yield client


@pytest.fixture(autouse=True)
def emptied(ceph: Ceph, tmp_path: Path) -> Iterator[None]:
    """The next test has an empty filesystem."""
    yield
    with Client(ceph, tmp_path / "emptied") as client:
        for path in client.path.iterdir():
            path.unlink()


@contextlib.contextmanager
def started(client: Client, command: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A command that must end with status 0 in time. On failure the client is killed: requests could wait for ever."""
    process = client.popen(command)
    try:
        yield process
        assert process.wait(ENDS_SECONDS) == 0
    except BaseException:
        client.kill()
        raise
    finally:
        process.wait(ENDS_SECONDS)


def waits(process: "subprocess.Popen[bytes]") -> bool:
    try:
        process.wait(WAITS_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


# --- the fixture ---


def test_clients_share_a_filesystem(client: Client, other: Client) -> None:
    (client.path / "file").write_bytes(b"shared")
    assert (other.path / "file").read_bytes() == b"shared"
    assert other.run(["cat", "file"]) == "shared"


def test_a_client_has_the_host_name_it_is_given(ceph: Ceph, client: Client, other: Client) -> None:
    assert other.run(["hostname"]) == "other\n"
    assert client.run(["hostname"]) != other.run(["hostname"])
    assert {session["client_metadata"]["hostname"] for session in ceph.sessions()} >= {"other"}


def test_options_reach_ceph_fuse(ceph: Ceph, tmp_path: Path) -> None:
    """A shared mapping of a file needs the kernel's page cache."""
    command = ["python3", "-c", "import mmap; f = open('file', 'r+b'); mmap.mmap(f.fileno(), 4096)"]
    with Client(ceph, tmp_path / "cached") as cached:
        (cached.path / "file").write_bytes(bytes(PAGE))
        cached.run(command)
    with Client(ceph, tmp_path / "direct", options={"fuse_disable_pagecache": "true"}) as direct:
        direct.run(command, code=1)


def test_nothing_is_left(tmp_path: Path) -> None:
    links = run("ip link")
    with Ceph() as ceph:
        with Client(ceph, tmp_path / "ended", host="ended") as ended:
            pass
        assert has_ended(ended.pid)
        with Client(ceph, tmp_path / "failed", host="failed") as failed:
            failed.cut()
            ceph.stop_osd()
        pids = [failed.pid, ceph.host.pid, *(ceph.pid(kind) for kind in ("mon", "mgr", "osd", "mds"))]
    assert all(not Path(f"/proc/{pid}").exists() for pid in pids)
    assert not ceph.directory.exists()
    assert not mounts_below(tmp_path)
    assert not os.listdir(tmp_path)
    assert run("ip link") == links


# --- what CephFS does ---


def test_there_is_no_unnamed_file(client: Client) -> None:
    with raises_errno(errno.EOPNOTSUPP):
        os.open(client.path, os.O_TMPFILE | os.O_RDWR, 0o600)


def test_a_rename_replaces_nothing_that_is_not_to_be_replaced(client: Client) -> None:
    """CephFS knows no flag for that (EINVAL), so the function looks first."""
    for name in "old", "taken":
        (client.path / name).write_text(name)
    with opened(client.path, os.O_RDONLY) as directory:
        with raises_errno(errno.EEXIST):
            linux.rename(directory, "old", "taken", replace=False)
        linux.rename(directory, "old", "free", replace=False)
        assert (client.path / "taken").read_text() == "taken"
        linux.rename(directory, "free", "taken", replace=True)


def test_a_whole_file_is_data(client: Client) -> None:
    """Holes take no room in the OSD, but neither lseek(2) nor st_blocks tells them."""
    with opened(client.path / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.ftruncate(fd, 64 * PAGE)
        os.pwrite(fd, b"x", 32 * PAGE)
        os.fsync(fd)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 64 * PAGE
        assert os.fstat(fd).st_blocks * 512 == 64 * PAGE


def test_a_punched_hole_reads_as_zeros(client: Client, other: Client) -> None:
    with opened(client.path / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 3 * PAGE, 0)
        linux.punch_hole(fd, PAGE, PAGE)
        expected = b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
        assert os.pread(fd, 3 * PAGE, 0) == expected
        assert (other.path / "file").read_bytes() == expected
        assert os.lseek(fd, PAGE, os.SEEK_DATA) == PAGE


def test_the_lock_of_a_file_holds_for_all_clients(client: Client, other: Client) -> None:
    (client.path / "file").touch()
    with opened(client.path / "file") as ours, opened(other.path / "file") as theirs:
        assert is_locked(ours)
        assert not is_locked(theirs)
        fcntl.flock(ours, fcntl.LOCK_UN)
        assert is_locked(theirs)


def test_the_lock_of_a_directory_holds_for_one_client(client: Client, other: Client) -> None:
    with opened(client.path, os.O_RDONLY) as ours, opened(client.path, os.O_RDONLY) as second:
        assert is_locked(ours)
        assert not is_locked(second)
        with opened(other.path, os.O_RDONLY) as theirs:
            assert is_locked(theirs)


def test_free_space_is_told_in_objects(client: Client) -> None:
    """Both sizes of a block are the size of an object."""
    found = os.statvfs(client.path)
    assert found.f_bsize == found.f_frsize == 4 << 20
    assert 0 < found.f_bavail <= found.f_blocks


# --- failures ---


def test_a_write_waits_for_the_osd(ceph: Ceph, client: Client) -> None:
    ceph.stop_osd()
    try:
        with started(client, WRITE) as write:
            assert waits(write)
            ceph.continue_osd()
    finally:
        ceph.continue_osd()
    assert (client.path / "file").stat().st_size == PAGE


def test_a_write_waits_for_the_network(client: Client, other: Client) -> None:
    other.cut()
    with started(other, WRITE) as write:
        assert waits(write)
        other.join()
    assert (client.path / "file").stat().st_size == PAGE


def test_a_killed_mds_loses_nothing(ceph: Ceph, client: Client) -> None:
    with opened(client.path / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"before")
        ceph.kill_mds()
        with started(client, ["touch", "new"]) as touch:
            assert waits(touch)
            os.write(fd, b", meanwhile")  # data needs no MDS
            ceph.start_mds()
        os.write(fd, b", after")
    assert sorted(os.listdir(client.path)) == ["file", "new"]
    assert (client.path / "file").read_bytes() == b"before, meanwhile, after"


def test_an_osd_that_is_shut_down_loses_nothing(ceph: Ceph, client: Client) -> None:
    client.run(WRITE)
    content = (client.path / "file").read_bytes()
    ceph.end_osd()
    ceph.start_osd()
    with Client(ceph, client.path.with_name("fresh")) as fresh:
        assert (fresh.path / "file").read_bytes() == content


def test_a_killed_osd_with_bluestore_loses_nothing(tmp_path: Path) -> None:
    with Ceph("bluestore") as ceph, Client(ceph, tmp_path / "client") as client:
        client.run(WRITE)
        content = (client.path / "file").read_bytes()
        ceph.kill_osd()
        with started(client, [*WRITE, "of=second"]) as write:
            assert waits(write)
            ceph.start_osd()
        with Client(ceph, tmp_path / "fresh") as fresh:
            assert (fresh.path / "file").read_bytes() == content


def test_an_evicted_client_gets_errors(ceph: Ceph, client: Client, other: Client) -> None:
    client.run(WRITE)
    with opened(other.path / "file") as fd:
        ceph.evict(other)
        for request in (
            lambda: os.listdir(other.path),
            lambda: os.open(other.path / "new", os.O_CREAT | os.O_RDWR),
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.pread(fd, 1, 0),
            lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
        ):
            with pytest.raises(OSError, match=f"{os.strerror(errno.ESHUTDOWN)}|{os.strerror(errno.EIO)}"):
                request()
    (client.path / "file").write_bytes(b"the others go on")


def test_an_evicted_client_loses_its_locks(ceph: Ceph, client: Client, other: Client) -> None:
    """A client that was killed or cut off keeps them until then."""
    (client.path / "file").touch()
    with opened(client.path / "file") as ours, opened(other.path / "file") as theirs:
        assert is_locked(theirs)
        other.cut()
        assert not is_locked(ours)
        ceph.evict(other)
        assert is_locked(ours)
        other.join()


def test_a_client_can_be_killed(ceph: Ceph, client: Client, other: Client) -> None:
    (other.path / "file").touch()
    ceph_id = other.id
    other.kill()
    with raises_errno(errno.ENOTCONN):
        os.listdir(other.path)
    assert ceph_id in {session["id"] for session in ceph.sessions()}
    ceph.evict(other)
    (client.path / "file").write_bytes(b"the others go on")
