"""Stores on CephFS: what is kept when servers and machines fail, and that one machine at a time holds a store.

A machine is a client of Ceph with a network and a host name of its own. Its mounts run there.
"""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ceph import Ceph, Client, missing_programs
from harness import MOUNT_COMMAND, REPOSITORY, attribute, mounts_below, opened, raises_errno, run, wait_until
from ttmfs.options import ExitCode

pytestmark = pytest.mark.serial

PAGE = os.sysconf("SC_PAGE_SIZE")
EVICTION_SECONDS = 5
"""After how long the MDS evicts a client that holds what another wants and gives no answer. The default is never, until
its session is over, after 60 s and more."""

FAILOVER_SECONDS = EVICTION_SECONDS + 5.0
TTMFS = f"{sys.executable} -m ttmfs"
OPTIONS = "backup_size=8m,store_timeout=4,standby=off"
GONE = (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED, errno.ESHUTDOWN)


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)}")
    with Ceph("bluestore", settings={"mds cap revoke eviction timeout": EVICTION_SECONDS}) as ceph:
        yield ceph


class Served:
    """A mount of a store in a directory of a client, served on the client's machine."""

    def __init__(self, client: Client, mountpoint: Path, options: str = "", store: str = "store") -> None:
        self.path, self._client = mountpoint, client
        (client.path / store).mkdir(exist_ok=True)
        mountpoint.mkdir()
        words = f"store={client.path / store},{OPTIONS}" + f",{options}" * bool(options)
        self._log = mountpoint.with_name(f"{mountpoint.name}.log")
        with self._log.open("w") as log:
            self.process = client.popen([*MOUNT_COMMAND, "-f", "-o", words, mountpoint], stderr=log)

    def serves(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        return f"serving {self.path}" in self._log.read_text()

    def said(self) -> str:
        return self._log.read_text()

    def config(self, name: str) -> int:
        found: int = json.loads((self.path / ".config").read_text())[name]
        return found

    def end(self, code: int = ExitCode.OK) -> str:
        """End the mount. Returns what was logged."""
        if self.process.poll() is None and code == ExitCode.OK:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        said = self.said()
        if mounts_below(self.path):
            subprocess.run(["umount", "-l", self.path], check=True)
        self.path.rmdir()
        assert self.process.returncode == code, said
        return said


@contextlib.contextmanager
def served(client: Client, mountpoint: Path, options: str = "", store: str = "store") -> Iterator[Served]:
    mount = Served(client, mountpoint, options, store)
    wait_until(mount.serves, "the mount", 30)
    try:
        yield mount
    finally:
        mount.end()


@pytest.fixture
def machine(ceph: Ceph, tmp_path: Path) -> Iterator[Callable[[str], Client]]:
    """Makes machines by name. They end with the test, and the filesystem is empty afterwards."""
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(Client(ceph, tmp_path / name, host=name))
    with Client(ceph, tmp_path / "emptied") as client:
        client.run(["sh", "-c", "rm -rf -- * .[!.]*"])


def content(handle: int, version: int = 0) -> bytes:
    return f"{handle} {version}\n".encode().ljust(PAGE, b".")


def store(backup: Path, handles: range, *, version: int = 0) -> None:
    for handle in handles:
        (backup / str(handle)).write_bytes(content(handle, version))


def holds(backup: Path, handles: range, *, version: int = 0) -> None:
    assert sorted(map(int, os.listdir(backup))) == list(handles)
    for handle in handles:
        assert (backup / str(handle)).read_bytes() == content(handle, version)


def sync(backup: Path) -> None:
    with opened(backup / ".image") as image:
        os.fsync(image)


def test_c27_a_second_machine_is_refused_and_told_which_has_the_store(
    machine: Callable[[str], Client], tmp_path: Path
) -> None:
    a, b = machine("machine-a"), machine("machine-b")
    with served(a, tmp_path / "mnt-a"):
        second = Served(b, tmp_path / "mnt-b")
        assert "the store is in use by the machine 'machine-a'" in second.end(ExitCode.FAILED)
    with served(b, tmp_path / "mnt-b"):
        pass


def test_c27_another_machine_takes_over_from_one_that_is_cut_off(
    machine: Callable[[str], Client], tmp_path: Path
) -> None:
    a, b = machine("machine-a"), machine("machine-b")
    first = Served(a, tmp_path / "mnt-a")
    wait_until(first.serves, "the first mount", 30)
    (first.path / "a").mkdir()
    store(first.path / "a", range(1, 60))
    os.unlink(first.path / "a/59")
    sync(first.path / "a")
    zombie = os.open(first.path / "a/1", os.O_RDWR)
    second = Served(b, tmp_path / "mnt-b", "store_wait=60")
    time.sleep(1)
    assert not second.serves(), "the first still has the store"
    a.cut()
    begun = time.monotonic()
    wait_until(second.serves, "the second mount", 60)
    assert time.monotonic() - begun < FAILOVER_SECONDS
    holds(second.path / "a", range(1, 59))
    store(second.path / "a", range(1, 59), version=1)
    a.join()
    for _ in range(20):
        with raises_errno(*GONE):
            os.pwrite(zombie, b"zombie", 0)
            os.fsync(zombie)
    os.close(zombie)
    holds(second.path / "a", range(1, 59), version=1)
    wait_until(lambda: "gave up: " in first.said(), "the first to give up", 30)
    first.process.send_signal(signal.SIGTERM)
    assert "is lost: another machine may have taken it" in first.end(ExitCode.FAILED)
    second.end()


def test_c26_each_acknowledged_write_outlives_the_machine_with_durable_write(
    machine: Callable[[str], Client], tmp_path: Path
) -> None:
    a, b = machine("machine-a"), machine("machine-b")
    first = Served(a, tmp_path / "mnt-a", "durable=write")
    wait_until(first.serves, "the first mount", 30)
    (first.path / "a").mkdir()
    store(first.path / "a", range(1, 30))
    (first.path / "a/30").touch()
    for handle in range(1, 6):
        os.unlink(first.path / f"a/{handle}")
    daemon, first_taken = first.config("daemon_pid"), first.config("store_counter")
    a.kill()  # the machine dies
    for pid in daemon, first.process.pid:
        os.kill(pid, signal.SIGKILL)
    second = Served(b, tmp_path / "mnt-b", "store_wait=60")
    wait_until(second.serves, "the second mount", 60)
    assert second.config("store_counter") == first_taken + 1
    assert sorted(map(int, os.listdir(second.path / "a"))) == list(range(6, 31))
    for handle in range(6, 30):
        assert (second.path / f"a/{handle}").read_bytes() == content(handle)
    assert (second.path / "a/30").read_bytes() == bytes(PAGE)
    second.end()
    first.end(-signal.SIGKILL)


@pytest.mark.parametrize("server", ["osd", "mds"])
def test_a_server_that_is_killed_and_comes_back_costs_no_page(
    ceph: Ceph, machine: Callable[[str], Client], tmp_path: Path, server: str
) -> None:
    with served(machine("machine-a"), tmp_path / "mnt", "store_timeout=60") as mount:
        (mount.path / "a").mkdir()
        store(mount.path / "a", range(1, 200))
        getattr(ceph, f"kill_{server}")()
        process = subprocess.Popen(["dd", "if=/dev/zero", f"of={mount.path}/a/.image", f"bs={PAGE}", "seek=300",
                                    "count=50", "conv=notrunc,fsync", "status=none"])  # fmt: skip
        time.sleep(1)
        getattr(ceph, f"start_{server}")()
        assert process.wait(60) == 0
        for handle in range(301, 351):
            assert (mount.path / f"a/{handle}").read_bytes() == bytes(PAGE)
            os.unlink(mount.path / f"a/{handle}")
        holds(mount.path / "a", range(1, 200))


def test_a_store_that_does_not_answer_fails_its_requests_and_no_others(
    ceph: Ceph, machine: Callable[[str], Client], tmp_path: Path
) -> None:
    with served(machine("machine-a"), tmp_path / "mnt", "durable=write") as mount:
        a, b = mount.path / "a", mount.path / "b"
        for backup in a, b:
            backup.mkdir()
        store(a, range(1, 20))
        ceph.stop_osd()
        try:
            words = ["dd", "if=/dev/zero", f"of={a}/1", f"bs={PAGE}", "count=1", "conv=notrunc", "status=none"]
            with opened(a / "1") as waiting, subprocess.Popen(words, stderr=subprocess.PIPE) as process:
                time.sleep(0.5)
                for look in (
                    (mount.path / ".stats").read_text,
                    lambda: os.statvfs(mount.path),
                    lambda: os.listdir(a),
                    lambda: attribute(a, "pages"),
                    (a / "2").stat,
                    lambda: os.fstat(waiting),
                ):
                    begun = time.monotonic()
                    look()
                    assert time.monotonic() - begun < 1, "it waited for the store"
                status = process.wait(20)
                assert ceph.osd_is_stopped
                assert status == 1
                assert process.stderr
                assert b"Input/output error" in process.stderr.read()
                with raises_errno(errno.EIO):
                    os.pwrite(waiting, b"x", 0)
        finally:
            ceph.continue_osd()
        assert 'ttmfs_operation_errors_total{operation="write",errno="EIO"} 2' in (mount.path / ".stats").read_text()

        def stores() -> bool:
            with contextlib.suppress(OSError):
                store(a, range(1, 20), version=1)
                return True
            return False

        wait_until(stores, "the store to answer", 30)
        holds(a, range(1, 20), version=1)


def test_c22_killed_daemons_lose_nothing_and_absent_pages_stay_absent(
    machine: Callable[[str], Client], tmp_path: Path
) -> None:
    """What an absent page has in the file, after a write that no mark followed, is never seen."""
    client = machine("machine-a")
    with served(client, tmp_path / "mnt") as mount:
        backup = mount.path / "a"
        backup.mkdir()
        store(backup, range(1, 40))
        os.kill(mount.config("daemon_pid"), signal.SIGKILL)
        holds(backup, range(1, 40))
        with opened(client.path / "store/a") as file:  # as a daemon that was killed between the two
            os.pwrite(file, b"secret", 100 * PAGE)
        (backup / "101").touch()
        assert (backup / "101").read_bytes() == bytes(PAGE)
        with opened(client.path / "store/a") as file:
            os.pwrite(file, b"secret", 200 * PAGE)
        with opened(backup / ".image") as image:
            assert os.pread(image, 4 * PAGE, 199 * PAGE) == bytes(4 * PAGE)
            assert os.pwrite(image, b"x", 200 * PAGE + 10) == 1
            assert os.pread(image, PAGE, 200 * PAGE) == (bytes(10) + b"x").ljust(PAGE, b"\0")
    with served(client, tmp_path / "mnt") as mount:
        assert sorted(map(int, os.listdir(mount.path / "a"))) == [*range(1, 40), 101, 201]


def test_a_file_that_another_program_put_there_has_all_its_pages(
    machine: Callable[[str], Client], tmp_path: Path
) -> None:
    client = machine("machine-a")
    (client.path / "store").mkdir()
    (client.path / "store/foreign").write_bytes(content(1) + content(2))
    with served(client, tmp_path / "mnt") as mount:
        holds(mount.path / "foreign", range(1, 3))
        os.unlink(mount.path / "foreign/1")
        assert os.listdir(mount.path / "foreign") == ["2"]
        assert not os.path.lexists(mount.path / "foreign/.shmem")
        said = run(f"{TTMFS} rescue {client.path}/store {tmp_path}/copies", code=1)
        assert "mount the store again" in said, "it could not tell which pages exist"
    with served(client, tmp_path / "mnt") as mount:
        assert os.listdir(mount.path / "foreign") == ["2"]


def test_a_backup_is_moved_to_the_store_of_another_machine_without_its_pages_being_copied(
    machine: Callable[[str], Client], tmp_path: Path
) -> None:
    a, b = machine("machine-a"), machine("machine-b")
    with served(a, tmp_path / "mnt-a") as first, served(b, tmp_path / "mnt-b", store="other") as second:
        for name in "a", "b":
            (first.path / name).mkdir()
            store(first.path / name, range(1, 50))
        os.unlink(first.path / "a/49")
        file = (a.path / "store/a").stat().st_ino
        with opened(first.path / "a/1") as used:
            said = run(f"{TTMFS} move {first.path}/a {a.path}/other", code=2)
            assert "is in use and was left" in said
            run(f"{TTMFS} move --force {first.path}/a {a.path}/other")
            with raises_errno(errno.ESTALE, errno.ENOENT):
                os.pread(used, PAGE, 0)
        assert os.listdir(first.path) == ["b"]
        wait_until(lambda: os.listdir(second.path) == ["a"], "the other mount to show it")
        holds(second.path / "a", range(1, 49))
        (second.path / "a/49").touch()
        assert (second.path / "a/49").read_bytes() == bytes(PAGE), "the page that was dropped"
        assert (b.path / "other/a").stat().st_ino == file
        for target, why in {
            f"{a.path}/store": "lies in",
            "/tmp": "is on another filesystem",
            f"{a.path}/nowhere": "give an existing directory",
            f"{a.path}": "is no store yet",
        }.items():
            run(f"{TTMFS} move {first.path}/b {target}", code=2)
            assert why in run(f"{TTMFS} why {first.path}")
        holds(first.path / "b", range(1, 50))
        (second.path / "b").mkdir()
        run(f"{TTMFS} move {first.path}/b {a.path}/other", code=2)
        holds(first.path / "b", range(1, 50))


def test_doctor_tells_which_machine_holds_a_store_and_that_a_store_does_not_answer(
    machine: Callable[[str], Client], tmp_path: Path
) -> None:
    a = machine("machine-a")

    def checked(code: int) -> dict[str, str]:
        words = *TTMFS.split(), "doctor", "--json", tmp_path / "mnt"
        said = a.host.run(*words, code=code, cwd=REPOSITORY)  # not in the directory that does not answer
        found = {check["what"]: check for check in json.loads(said)}
        assert found["a filesystem for it"]["state"] == "ok"
        result: dict[str, str] = found[f"store {a.path}/store"]
        return result

    with served(a, tmp_path / "mnt"):
        found = checked(0)
        assert (found["state"], found["use"]) == ("ok", "mounts")
        assert found["found"] == "fuse.ceph-fuse answers; this machine, machine-a, holds it"
        os.kill(a.pid, signal.SIGSTOP)
        try:
            found = checked(1)
            status = a.host.run(*TTMFS.split(), "status", tmp_path / "mnt", code=2, cwd=REPOSITORY)
        finally:
            os.kill(a.pid, signal.SIGCONT)
        assert "fuse.ceph-fuse has not answered for 2 s" in " ".join(status.split())
        assert "fuse.ceph-fuse has not answered for 2 s" in found["found"]
        assert "ceph -s" in found["do"]
