"""``ttmfs fini`` ends no backup that a program uses, unless it is told to."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import REPOSITORY, Mount
from stores import ALICE, BOB, Place, UsersMount, acting_as, as_user

PAGE = os.sysconf("SC_PAGE_SIZE")

USES = {
    "a page": "held = os.open(f'{backup}/7', os.O_RDONLY)",
    "a page, O_PATH": "held = os.open(f'{backup}/7', os.O_PATH)",
    ".image": "held = os.open(f'{backup}/.image', os.O_RDWR)",
    "the directory": "held = os.open(backup, os.O_RDONLY)",
    ".shmem": "held = os.open(f'{backup}/.shmem', os.O_RDONLY)",
    "the client, natively": "from ttmfs.client import Backup; held = Backup.open(backup); assert held.is_native",
    "the client, through the mount": "from ttmfs.client import Backup; held = Backup.open(backup, native=False)",
    "a mapping": (
        "fd = os.open(f'{backup}/.shmem', os.O_RDWR); libc = ctypes.CDLL(None); "
        "libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, ctypes.c_long(0)); os.close(fd)"
    ),
}


@contextlib.contextmanager
def program(backup: Path, use: str, **more: Any) -> Iterator[int]:
    """A program that uses a backup; its process id."""
    code = f"import ctypes, os, sys; backup = sys.argv[1]; {use}; print(flush=True); sys.stdin.read()"
    command = [*more.pop("command", [sys.executable]), "-c", code, str(backup)]
    more.setdefault("cwd", REPOSITORY)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more) as process:
        assert process.stdout
        assert process.stdout.readline() == "\n"
        yield process.pid


def fini(*words: object, code: int = 0, **more: Any) -> str:
    """The output of the command."""
    command = [*more.pop("command", [sys.executable]), "-m", "ttmfs", "fini", *map(str, words)]
    more.setdefault("cwd", REPOSITORY)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)
    assert done.returncode == code, done.stderr
    return f"{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def mnt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with Mount(tmp_path_factory.mktemp("mnt"), "size=16m,backup_size=1m") as mount:
        yield mount.path


def made(path: Path) -> Path:
    path.mkdir()
    (path / "7").write_bytes(b"x" * PAGE)
    return path


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_fini_refuses_a_backup_in_use_and_names_the_process(mnt: Path, use: str) -> None:
    a, b = made(mnt / "a"), made(mnt / "b")
    with program(a, use) as pid:
        for option in (), ("-n",):
            text = fini(*option, a, code=2)
            assert re.search(rf"a is in use and was left: \S+ \(pid {pid}, user root\) has [123] ", text), text
            assert "--force" in text
            assert (a / "7").read_bytes() == b"x" * PAGE
        assert f"pid {pid}" in fini(a, b, code=1)
        assert os.listdir(mnt) == ["a"], "nobody used the other"
        assert f"pid {pid}" in fini("--force", "--dry-run", a)
        assert (a / "7").exists()
        assert not fini("--force", a)
    assert not os.listdir(mnt)


def test_a_dry_run_of_fini_changes_nothing(mnt: Path) -> None:
    a = made(mnt / "a")
    text = fini("-n", a, mnt, code=1)
    assert f"would end {a} and release 1 page, {PAGE // 1024}K\n" in text
    assert "is the root of a mount" in text
    assert os.listdir(a) == ["7"]
    assert not fini(a), "who used it has ended, and the daemon is no user"


def test_a_backup_of_the_same_number_in_another_mount_is_not_in_use(mnt: Path, mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m"):
        other, a = made(mountpoint / "a"), made(mnt / "a")
        while other.stat().st_ino < a.stat().st_ino:
            other.rmdir() if not os.listdir(other) else (other / "7").unlink()
            other.mkdir(exist_ok=True)
        other = mountpoint / "a"
        assert other.stat().st_ino == a.stat().st_ino
        with program(other, USES[".image"]), program(other, USES[".shmem"]):
            assert not fini(a)


def test_users_see_their_own_processes_and_a_note_about_the_others(place: Place) -> None:
    with place.directory("shared") as path, Mount(path, "size=16m,allow_other,mode=1777", cwd=place.path):
        a = made(path / "a")
        os.chown(a, ALICE, ALICE)
        a.chmod(0o777)
        more: dict[str, Any] = {"command": [place.python], "cwd": place.path / "repository"}
        alice, bob = more | as_user(ALICE), more | as_user(BOB)
        with program(a, USES[".image"], **bob) as theirs, program(a, USES["a page"], **alice) as hers:
            text = fini(a, code=2, **alice)
            assert f"pid {hers}" in text
            assert f"pid {theirs}" not in text
            assert "processes of other users could not be examined" in text
            text = fini("-n", a, code=2)
            assert f"(pid {theirs}, user {BOB}) has 1 open file" in text, "root sees them"
        assert "could not be examined" in fini(a, **alice)
        assert not os.listdir(path)


def test_the_next_daemon_and_its_keeper_do_not_count_as_use(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m") as mount:
        a = made(mountpoint / "a")
        mount.expect_restarts()
        mount.kill()
        assert (a / "7").read_bytes()[:1] == b"x"
        assert not fini(a)


def test_daemon_and_keeper_of_a_user_mount_do_not_count_as_use(place: Place) -> None:
    more: dict[str, Any] = {"command": [place.python], "cwd": place.path / "repository", **as_user(ALICE)}
    with place.directory("alice", ALICE) as path, UsersMount(place, path, "size=1m"):
        with acting_as(ALICE):
            a = made(path / "a")
        with program(a, USES[".shmem"], **more):  # it follows the link, so it has no file of the mount open
            assert "has its .shmem open or mapped" in fini(a, code=2, **more)
        fini(a, **more)
        with acting_as(ALICE):
            assert not os.listdir(path)
