"""The standby: a process that waits, with everything imported, until the daemon dies."""

import os
import signal
import time
from pathlib import Path

import pytest
from kept import (
    STANDBY_NICE,
    Kept,
    copied_package,
    held,
    kinds,
    of_package,
    processes,
    ready_standby,
    replace_in,
    standbys,
)

from harness import daemons, run, stopped, wait_until

OPTIONS = "size=16m,standby=on"


def nice_of(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def locked(pid: int) -> int:
    """The locked memory of a process, in bytes."""
    rows = dict(row.split(":") for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(rows["Locked"].split()[0]) << 10


def test_c22_the_standby_takes_over_as_the_same_process_and_another_one_stands_by(mountpoint: Path) -> None:
    with Kept(mountpoint, OPTIONS) as mount, held(mountpoint):
        mount.expect_restarts()
        first = mount.daemon
        about = name_of(first), nice_of(first), kinds(first)
        assert mount.config()["standby"] == "on"
        wait_until(lambda: any(nice_of(pid) == STANDBY_NICE for pid in standbys(mountpoint)), "it to be nice")
        standby = ready_standby(mountpoint)
        mount.kill_daemon()
        assert mount.daemon == standby
        assert mount.restarts() == 1
        assert (name_of(standby), nice_of(standby)) == about[:2]
        assert (kinds(standby) - about[2]).total() <= 1  # a pipe of libfuse's
        another = ready_standby(mountpoint)
        assert processes(mountpoint) == {mount.keeper, standby, another}
        mount.kill_daemon()
        assert mount.daemon == another


def test_a_standby_locks_no_more_memory_than_the_daemon(mountpoint: Path) -> None:
    with Kept(mountpoint, OPTIONS) as mount:
        assert locked(ready_standby(mountpoint)) < 1.1 * locked(mount.daemon)


def test_c22_twenty_kills_in_a_row_lose_nothing_and_leave_nothing(mountpoint: Path) -> None:
    """Every second one waits for the standby; the others find it not ready, or not there."""
    with Kept(mountpoint, OPTIONS) as mount, held(mountpoint):
        mount.expect_restarts()
        for turn in range(20):
            expected = ready_standby(mountpoint) if turn % 2 else 0
            time.sleep(0 if turn % 2 else turn / 10)
            mount.watch_anew()
            mount.kill_daemon()
            assert mount.restarts() == turn + 1
            assert mount.daemon == expected or not expected
            assert daemons(mount.keeper) == {mount.daemon}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_standby_that_was_killed_is_replaced_and_does_not_disturb_the_mount(mountpoint: Path, how: int) -> None:
    with Kept(mountpoint, OPTIONS) as mount, held(mountpoint):
        mount.expect_restarts()
        standby = ready_standby(mountpoint)
        os.kill(standby, how)
        wait_until(lambda: not standbys(mountpoint), "it to end")
        if how == signal.SIGKILL:
            mount.kill_daemon()
            assert mount.restarts() == 1
        another = ready_standby(mountpoint)
        mount.kill_daemon()
        assert mount.daemon == another != standby


def test_c22_daemon_and_standby_killed_at_once_lose_nothing(mountpoint: Path) -> None:
    with Kept(mountpoint, OPTIONS) as mount, held(mountpoint):
        mount.expect_restarts()
        standby, daemon = ready_standby(mountpoint), mount.daemon
        with stopped(mount.keeper):
            os.kill(standby, signal.SIGKILL)
            os.kill(daemon, signal.SIGKILL)
        assert mount.restarts() == 1
        assert mount.daemon not in (standby, daemon)


def test_c22_a_stopped_standby_takes_over_all_the_same(mountpoint: Path) -> None:
    with Kept(mountpoint, OPTIONS) as mount, held(mountpoint):
        mount.expect_restarts()
        standby = ready_standby(mountpoint)
        os.kill(standby, signal.SIGSTOP)
        mount.kill_daemon()
        assert mount.daemon == standby


def test_a_restart_on_purpose_loads_the_program_anew(mountpoint: Path) -> None:
    with Kept(mountpoint, OPTIONS) as mount, held(mountpoint):
        standby = ready_standby(mountpoint)
        mount.restart()
        assert mount.daemon != standby
        wait_until(lambda: standby not in processes(mountpoint), "the standby of the old version to end")
        another = ready_standby(mountpoint)
        mount.kill_daemon()
        assert mount.daemon == another


def test_c22_a_new_keeper_has_a_standby_of_its_own_and_the_old_one_ends(mountpoint: Path) -> None:
    with Kept(mountpoint, OPTIONS) as mount, held(mountpoint):
        mount.expect_restarts()
        standby = ready_standby(mountpoint)
        mount.kill_keeper()
        wait_until(lambda: standby not in processes(mountpoint), "the old standby to end")
        another = ready_standby(mountpoint)
        mount.kill_daemon()
        assert mount.daemon == another
        assert processes(mountpoint) >= {mount.keeper, another}


def test_a_kill_of_keeper_and_daemon_ends_the_standby(mountpoint: Path) -> None:
    with Kept(mountpoint, OPTIONS) as mount:
        ready_standby(mountpoint)
        mount.kill_both()
        wait_until(lambda: not processes(mountpoint), "every process to end")
        run(f"fusermount3 -u -z {mountpoint}")


@pytest.mark.parametrize("end", ["umount {mnt}", "kill {keeper}", "kill {daemon}"])
@pytest.mark.parametrize("is_ready", [False, True])
def test_the_standby_ends_with_the_mount(mountpoint: Path, end: str, is_ready: bool) -> None:
    with Kept(mountpoint, OPTIONS) as mount:
        if is_ready:
            ready_standby(mountpoint)
        else:
            wait_until(lambda: standbys(mountpoint), "a standby that starts")
        run(end.format(mnt=mountpoint, keeper=mount.keeper, daemon=mount.daemon))
        mount.ends_with(0)
        assert not standbys(mountpoint)


def test_a_standby_that_cannot_start_is_tried_at_growing_intervals(mountpoint: Path, tmp_path: Path) -> None:
    package, pauses = copied_package(tmp_path / "package"), "FIRST_PAUSE, LONGEST_PAUSE = "
    replace_in(package / "ttmfs/recovery/keeper_standby.py", f"{pauses}1.0", f"{pauses}0.1")
    replace_in(package / "ttmfs/daemon/standby.py", "    _warm_up()\n", "    raise SystemExit('no such luck')\n")
    with Kept(mountpoint, OPTIONS, command=of_package(package)) as mount, held(mountpoint):
        mount.expect_restarts()
        mount.expect_log("no such luck")
        begun = time.monotonic()
        wait_until(lambda: len(mount.said("no such luck")) >= 5, "five standbys", 60)
        assert time.monotonic() - begun > 0.2 + 0.4 + 0.8 + 1.6
        mount.kill_daemon()
        assert mount.restarts() == 1


def test_without_a_standby_there_is_none(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=16m,standby=off") as mount, held(mountpoint):
        mount.expect_restarts()
        assert mount.config()["standby"] == "off"
        time.sleep(1.5)
        assert processes(mountpoint) == {mount.keeper, mount.daemon}
        mount.kill_daemon()
        assert mount.restarts() == 1
        time.sleep(1.5)
        assert processes(mountpoint) == {mount.keeper, mount.daemon}
    with Kept(mountpoint, "size=16m,keeper=off,standby=on") as mount:
        assert mount.config()["standby"] == "off", "nobody could start it"
