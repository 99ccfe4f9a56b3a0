"""What mount.py inherits from its caller: the mount works all the same, or is refused with the reason."""

import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from harness import (
    MOUNT_COMMAND,
    MOUNT_PY,
    Mount,
    count,
    descriptors,
    mounts,
    remaining,
    run,
    set_attribute,
    wait_until,
)
from stores import ALICE, Place
from ttmfs.options import ExitCode

LIMITS = {
    "fsize": (100 << 10, resource.RLIM_INFINITY),
    "nofile": (24, 1000),
    "as": (200 << 20, resource.RLIM_INFINITY),
    "data": (24 << 20, resource.RLIM_INFINITY),
    "cpu": (1, resource.RLIM_INFINITY),
}
"""Soft limits that break a daemon, and hard ones that do not."""


def mount_py(*arguments: object, limits: str = "", **more: Any) -> "subprocess.CompletedProcess[str]":
    command = ["prlimit", *limits.split(), *MOUNT_COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)


def limits_of(pid: int) -> dict[str, tuple[int, int]]:
    return {name: resource.prlimit(pid, getattr(resource, f"RLIMIT_{name.upper()}")) for name in LIMITS}


@pytest.mark.parametrize("name", LIMITS)
def test_a_low_soft_limit_is_raised(mountpoint: Path, name: str) -> None:
    soft, hard = LIMITS[name]
    wanted = f"--{name}={soft}:{'unlimited' if hard == resource.RLIM_INFINITY else hard}"
    with Mount(mountpoint, "size=64m", command=("prlimit", wanted, *MOUNT_COMMAND)) as mount:
        mount.expect_restarts()
        for pid in mount.pid, mount.process.pid:
            assert limits_of(pid)[name] == (hard, hard)
        for number in range(40):
            (mountpoint / f"{number}").mkdir()
            (mountpoint / f"{number}/1").write_bytes(b"x" * 4096)
        set_attribute(mountpoint / "0", "size", 1 << 40)
        (mountpoint / "0/200000000").write_bytes(b"y" * 4096)
        mount.kill()
        assert mount.restarts() == 1
        assert limits_of(mount.pid)[name] == (hard, hard)
        assert (mountpoint / "0/200000000").read_bytes() == b"y" * 4096
        assert count(mountpoint / "0", "pages") == 2


@pytest.mark.parametrize("foreground", [[], ["-f"]])
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            "--fsize=100000000",
            r"RLIMIT_FSIZE is 100000000, and ttmfs needs no limit: raise it with ulimit -f",
        ),
        ("--nofile=255", r"RLIMIT_NOFILE is 255, and ttmfs needs 256 at least: raise it with ulimit -n as root, or in"),
        ("--nofile=24", r"RLIMIT_NOFILE is 24, and ttmfs needs 256 at least"),
        ("--as=1000000000", r"RLIMIT_AS is 1000000000, and ttmfs needs \d+ at least: raise it with ulimit -v"),
        ("--data=1000000000", r"RLIMIT_DATA is 1000000000, and ttmfs needs \d+ at least: raise it with ulimit -d"),
        ("--cpu=1000", r"RLIMIT_CPU is 1000, and ttmfs needs no limit: raise it with ulimit -t"),
    ],
)
def test_a_hard_limit_that_is_too_low_is_refused_with_what_to_do(
    mountpoint: Path, foreground: list[str], limits: str, message: str
) -> None:
    done = mount_py(mountpoint, *foreground, limits=limits)
    assert re.fullmatch(f"mount.py: .*{message}.*\n", done.stderr)
    assert done.returncode == ExitCode.SYSTEM
    assert str(mountpoint) not in mounts()


@pytest.mark.parametrize("limit", range(8_000_000, 24_000_000, 1_000_000))
def test_too_little_memory_to_load_the_program_is_one_line(mountpoint: Path, limit: int) -> None:
    done = mount_py(mountpoint, limits=f"--data={limit}")
    assert re.fullmatch(
        r"mount.py: (there is too little memory to start; .* ulimit -d may limit it|RLIMIT_DATA is .*)\n", done.stderr
    )
    assert done.returncode == ExitCode.SYSTEM


def test_help_works_under_low_limits() -> None:
    assert mount_py("--help", limits="--fsize=1 --nofile=24 --cpu=10").returncode == 0


def test_a_daemon_that_takes_over_accepts_low_limits(mountpoint: Path) -> None:
    """If it refused to start, the mount would be dead."""
    with Mount(mountpoint, "size=64m") as mount:
        mount.expect_restarts()
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(b"x" * 4096)
        resource.prlimit(mount.process.pid, resource.RLIMIT_NOFILE, (128, 128))
        mount.kill()
        assert mount.restarts() == 1
        assert (mountpoint / "a/1").read_bytes() == b"x" * 4096


def test_a_low_process_limit_lets_a_user_mount_or_is_reported(place: Place) -> None:
    """The number of processes it needs depends on what else the user runs."""
    codes: list[int] = []
    with place.directory("mnt", ALICE) as mnt:
        while 0 not in codes and len(codes) < 500:
            limit = len(codes) + 1
            words = f"prlimit --nproc={limit}:{limit} setpriv --reuid {ALICE} --regid {ALICE} --clear-groups"
            command = [*words.split(), *place.mount_command, str(mnt), "-o", "size=1m"]
            done = subprocess.run(command, cwd=place.path, capture_output=True, text=True, timeout=60, check=False)
            codes.append(done.returncode)
            if not done.returncode:
                run(f"umount {mnt}")
            else:
                assert re.fullmatch(r"((mount\.py|setpriv): .*\n)+", done.stderr), "and no traceback"
                assert re.search("temporarily unavailable|thread", done.stderr)
            wait_until(lambda: not remaining(set()), "every process to end")
    assert codes[-1] == 0
    assert ExitCode.SYSTEM in codes


def ignoring(numbers: Iterable[int], blocking: Iterable[int] = ()) -> Callable[[], None]:
    def prepare() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, blocking)

    return prepare


EVERY = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


@pytest.mark.parametrize("keeper", ["on", "off"])
def test_signals_may_be_ignored_and_blocked(mountpoint: Path, keeper: str) -> None:
    """Each signal still works, above all SIGTERM, which ends the mount."""
    ignored = ignoring((signal.SIGCHLD, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1), EVERY)
    with Mount(mountpoint, f"size=1m,keeper={keeper}", preexec_fn=ignored) as mount:
        for pid in {mount.pid, mount.process.pid}:
            status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            assert int(status["SigBlk"], 16) == 0
            assert not int(status["SigIgn"], 16) >> (signal.SIGCHLD - 1) & 1
        (mountpoint / "a").mkdir()


def test_the_failure_of_a_child_is_seen_if_the_caller_ignored_sigchld(tmp_path: Path, mountpoint: Path) -> None:
    (tmp_path / "fusermount3").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "fusermount3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = mount_py(mountpoint, "-f", env=environment, preexec_fn=ignoring([signal.SIGCHLD]))
    assert re.fullmatch(r"mount\.py: fusermount3 cannot mount at \S+: exit status 7\n", done.stderr)
    assert done.returncode == ExitCode.FAILED


def test_the_daemon_closes_locks_and_pipes_of_the_caller(tmp_path: Path, mountpoint: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        heard, pipe = os.pipe()
        with Mount(mountpoint, "size=1m", pass_fds=(lock.fileno(), pipe)) as mount:
            lock.close()
            os.close(pipe)
            with (tmp_path / "lock").open("w") as again:
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert os.read(heard, 1) == b"", "the pipe has no other end"
            os.close(heard)
            mount.expect_restarts()
            mount.kill()
            assert mount.restarts() == 1
            assert not [name for name in descriptors(mount.pid) if name.endswith("/lock")]


@pytest.mark.parametrize("umask", [0, 0o777])
def test_the_daemon_sets_its_own_umask(mountpoint: Path, umask: int) -> None:
    with Mount(mountpoint, "size=1m", umask=umask) as mount:
        assert "Umask:\t0077\n" in Path(f"/proc/{mount.pid}/status").read_text()
        run("umask 022; mkdir a; echo x >a/1", cwd=mountpoint)
        assert [(mountpoint / name).stat().st_mode & 0o777 for name in ("a", "a/1")] == [0o755, 0o644]


def test_a_relative_python_path_still_works_after_a_restart(tmp_path: Path, mountpoint: Path) -> None:
    """Daemons that take over start in the root directory."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/sitecustomize.py").write_text(f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\n")
    words = [sys.executable, str(MOUNT_PY)]
    environment = {**os.environ, "PYTHONPATH": "lib"}
    with Mount(mountpoint, "size=1m", command=tuple(words), cwd=tmp_path, env=environment) as mount:
        before = (tmp_path / "starts").read_text()
        mount.expect_restarts()
        mount.kill()
        assert mount.restarts() == 1
        assert (tmp_path / "starts").read_text() == before + "x"
