"""The keeper: a mount when keeper, daemon, or both are killed, stopped, restarted, upgraded or ended.

Tests that need another version of ttmfs change a copy of the package while it serves.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kept import (
    COMMAND,
    DEAD,
    FAILED,
    GAVE_UP,
    PAGE,
    REPLACED,
    Caller,
    Kept,
    cannot_resend,
    changed,
    copied_package,
    gives_up_after,
    held,
    keeper_of,
    kept_state,
    kinds,
    of_package,
    processes,
    serving,
    store_of,
)

from harness import (
    count,
    daemons,
    descriptors,
    mounts,
    opened,
    raises_errno,
    run,
    set_attribute,
    wait_until,
)
from load import Load
from stores import ALICE, ControlGroup, Place, UsersMount, acting_as
from ttmfs.recovery.state import FORMAT, Record

NO_STANDBY = "standby=off"
"""For tests about what a daemon does as it starts: a standby has its start behind it."""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of ttmfs that a test may change."""
    return copied_package(tmp_path / "package")


# --- kills of the keeper ---


def test_c22_a_replaced_keeper_restarts_a_killed_daemon(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=16m") as mount, held(mountpoint):
        mount.expect_restarts()
        daemon = mount.daemon
        mount.kill_keeper()
        assert mount.daemon == daemon
        assert mount.restarts() == 0
        mount.kill_daemon()
        assert mount.restarts() == 1
        assert mount.keeper in processes(mountpoint)
        assert daemons(mount.keeper) == {mount.daemon}


def test_c22_a_keeper_is_replaced_after_each_of_many_kills(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=16m") as mount, held(mountpoint):
        mount.expect_restarts()
        before = kinds(mount.daemon)
        for turn in range(8):
            mount.kill_keeper()
            assert serving(mountpoint) == {mount.keeper, mount.daemon}
            if turn % 4 == 3:
                mount.kill_daemon()
        assert mount.restarts() == 2
        assert kinds(mount.daemon) == before


def test_c22_a_load_does_not_notice_kills_of_daemon_or_keeper(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=128m") as mount, Load(mountpoint, clients=3) as load:
        mount.expect_restarts()
        for _ in range(6):
            load.wait_for_steps(50)
            mount.kill_keeper()
            load.wait_for_steps(50)
            mount.kill_daemon()


def test_killing_both_leaves_a_dead_mountpoint_that_the_next_mount_removes(mountpoint: Path) -> None:
    with ControlGroup(1 << 30) as group, Kept(mountpoint, "size=128m", preexec_fn=group.join) as mount:
        a = mountpoint / "a"
        a.mkdir()
        (a / ".image").write_bytes(bytes(64 << 20))
        with Caller(a / "1") as caller:
            os.kill(mount.pid, signal.SIGSTOP)
            caller.asks_and_waits()
            wait_until(lambda: group.shmem() > 48 << 20, "the pages' memory to be counted")
            mount.kill_both()
            wait_until(lambda: group.shmem() < 16 << 20, "the pages' memory to be released")
            assert caller.answer() in DEAD
        with raises_errno(errno.ENOTCONN):
            os.listdir(mountpoint)
        with Kept(mountpoint, "size=16m") as another:
            another.expect_log("removing the dead ttmfs at")
            assert os.listdir(mountpoint) == []


# --- stopped, restarted ---


def test_c22_callers_of_a_stopped_daemon_wait_until_it_continues(mountpoint: Path, package: Path) -> None:
    """The keeper does not take a stopped daemon for dead as soon as a killed one."""
    gives_up_after(package, seconds=3)
    with Kept(mountpoint, "size=16m", command=of_package(package)) as mount, held(mountpoint):
        with Caller(mountpoint / "a/1") as caller:
            daemon = mount.daemon
            os.kill(daemon, signal.SIGSTOP)
            caller.asks_and_waits()
            time.sleep(3.5)  # longer than the keeper waits for one that was killed
            assert caller.waits()
            os.kill(daemon, signal.SIGCONT)
            assert caller.answer() == "read"
            os.kill(daemon, signal.SIGSTOP)
            caller.asks_and_waits()
            mount.expect_restarts()
            os.kill(daemon, signal.SIGKILL)
            assert caller.answer() == "read"
        assert mount.restarts() == 1


def test_a_restart_on_purpose_keeps_pages_and_descriptors_and_counts_anew(mountpoint: Path) -> None:
    """rate() and increase() of Prometheus expect counters to begin anew. How many daemons took over goes on."""

    def errors() -> float:
        text = (mountpoint / ".stats").read_text()
        rows = re.findall(r"^ttmfs_operation_errors_total\{.*EINVAL.* (\d+)$", text, re.MULTILINE)
        return sum(map(int, rows))

    with Kept(mountpoint, "size=16m") as mount, held(mountpoint):
        with raises_errno(errno.EINVAL):
            (mountpoint / "a/0").touch()
        keeper = mount.keeper
        assert errors() > 0
        for turn in range(3):
            mount.restart()
            assert mount.restarts() == turn + 1
            assert errors() == 0
        assert mount.keeper == keeper


def test_c22_a_load_does_not_notice_restarts_on_purpose(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=128m") as mount, Load(mountpoint, clients=4) as load:
        for _ in range(5):
            load.wait_for_steps(50)
            mount.restart()


# --- giving up ---


def test_c22_a_daemon_that_cannot_start_leaves_a_dead_mountpoint_and_every_page(
    mountpoint: Path, package: Path
) -> None:
    """Waiting callers get an error. When the code is repaired, a signal brings everything back."""
    broken = package / "ttmfs/daemon/session.py"
    gives_up_after(package, failed=3)
    with Kept(mountpoint, f"size=16m,{NO_STANDBY}", command=of_package(package)) as mount:
        a = mountpoint / "a"
        a.mkdir()
        content = os.urandom(1 << 20)
        (a / ".image").write_bytes(content)
        with changed(broken, "import trio", "import trio trio"), Caller(a / "1") as caller:
            keeper, daemon = mount.keeper, mount.daemon
            mount.expect_restarts()
            mount.expect_log(FAILED)
            mount.expect_log(r"^ |SyntaxError|^Traceback")
            os.kill(daemon, signal.SIGKILL)
            caller.asks_and_waits()
            mount.wait_for_log(GAVE_UP)
            assert caller.answer() in DEAD
            with raises_errno(errno.ENOTCONN):
                os.listdir(mountpoint)
            (line,) = mount.said(GAVE_UP)
            assert f"ttmfs rescue {keeper} " in line
            assert f"kill -USR1 {keeper}" in line
            assert len(mount.said(FAILED)) == 3
        mount.try_again(keeper)
        assert (a / ".image").read_bytes()[: 1 << 20] == content
        assert mount.keeper == keeper
        (a / "1").unlink()


def test_c22_a_state_of_another_format_is_refused_and_nothing_is_lost(mountpoint: Path, package: Path) -> None:
    """A newer version knows only another format. The old version then finds everything unchanged."""
    gives_up_after(package, failed=2)
    with Kept(mountpoint, f"size=16m,{NO_STANDBY}", command=of_package(package)) as mount:
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(b"x" * PAGE)
        keeper = mount.keeper
        refusal = rf"ttmfs \S+ left .* in format {FORMAT}, .* {FORMAT + 1} alone; its pages are safe with the keeper"
        mount.expect_log(refusal)
        state, daemon = kept_state(keeper), mount.daemon
        with changed(package / "ttmfs/recovery/state.py", f"\nFORMAT = {FORMAT}\n", f"\nFORMAT = {FORMAT + 1}\n"):
            os.kill(daemon, signal.SIGSTOP)
            wait_until(lambda: "State:\tT" in Path(f"/proc/{daemon}/status").read_text(), "it to stop")
            before = state.read_bytes()
            mount.expect_restarts()
            mount.expect_log(FAILED)
            os.kill(daemon, signal.SIGKILL)
            mount.wait_for_log(GAVE_UP)
            with raises_errno(errno.ENOTCONN):
                os.listdir(mountpoint)
            assert state.read_bytes() == before
        assert len(mount.said(refusal)) == 2
        assert f"ttmfs rescue {keeper} " in mount.said(GAVE_UP)[0]
        mount.try_again(keeper)
        assert (mountpoint / "a/1").read_bytes() == b"x" * PAGE


def test_the_state_of_a_mount_has_the_entries_that_its_format_names(mountpoint: Path) -> None:
    """tests/store/test_format.py lists the entries. Any other entry needs the next FORMAT."""
    with Kept(mountpoint, "size=16m") as mount:
        header = json.loads(kept_state(mount.keeper).read_bytes()[:4096].rstrip(b"\0"))
        assert sorted(header) == sorted(["format", *(field.name for field in dataclasses.fields(Record))])
        assert header["format"] == FORMAT


def test_the_keeper_gives_up_after_five_failed_starts(mountpoint: Path, package: Path) -> None:
    tries = 5
    with Kept(mountpoint, f"size=16m,{NO_STANDBY}", command=of_package(package)) as mount:
        keeper = mount.keeper
        mount.expect_log("no such luck")
        with changed(package / "mount.py", "import sys\n", "raise SystemExit('no such luck')\n"):
            mount.give_up()
        assert len(mount.said(FAILED)) == len(mount.said("no such luck")) == tries
        assert f"{tries} daemons could not start" in mount.said(GAVE_UP)[0]
        mount.try_again(keeper)


def test_a_start_that_takes_too_long_is_killed(mountpoint: Path, package: Path) -> None:
    """A daemon that hangs as it starts is killed: it holds the connection, on which others wait."""
    gives_up_after(package, seconds=4)
    with Kept(mountpoint, f"size=16m,{NO_STANDBY}", command=of_package(package)) as mount:
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").touch()
        keeper = mount.keeper
        with Caller(mountpoint / "a/1") as caller:
            start = time.monotonic()
            with changed(package / "mount.py", "import sys\n", "__import__('time').sleep(60)\n"):
                mount.give_up()
            assert 4 <= time.monotonic() - start < 12
            assert "no daemon has answered for 4 s" in mount.said(GAVE_UP)[0]
            caller.ask()
            assert caller.answer() in DEAD
        wait_until(lambda: processes(mountpoint) == {keeper}, "the daemon that hung to end")
        mount.try_again(keeper)
        assert os.listdir(mountpoint / "a") == ["1"]


def test_a_keeper_that_gave_up_ends_on_request_and_releases_its_pages(mountpoint: Path, package: Path) -> None:
    gives_up_after(package, failed=1)
    with Kept(mountpoint, f"size=16m,{NO_STANDBY}", command=of_package(package)) as mount:
        mount.expect_log("no such luck")
        with changed(package / "mount.py", "import sys\n", "raise SystemExit('no such luck')\n"):
            mount.give_up()
        mount.process.send_signal(signal.SIGTERM)
        mount.ends_with(32)


# --- without a keeper, without resending ---


def test_a_kill_without_a_keeper_leaves_a_dead_mountpoint(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=16m,keeper=off") as mount:
        assert mount.config()["keeper_pid"] is None
        assert mount.daemon == mount.process.pid
        assert processes(mountpoint) == {mount.process.pid}
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").touch()
        with Caller(mountpoint / "a/1") as caller:
            mount.process.send_signal(signal.SIGSTOP)
            caller.asks_and_waits()
            mount.process.send_signal(signal.SIGKILL)
            assert caller.answer() in DEAD
        with raises_errno(errno.ENOTCONN):
            os.listdir(mountpoint)
        mount.ends_with(-signal.SIGKILL)


def test_without_resend_the_next_daemon_mounts_again_with_every_page(mountpoint: Path, package: Path) -> None:
    """The log says which of the two ways it took."""
    with Kept(mountpoint, "size=16m", command=cannot_resend(package)) as mount:
        mount.expect_restarts()
        content = {handle: os.urandom(PAGE) for handle in (1, 7, 4096)}
        for turn in range(3):
            if not turn:
                (mountpoint / "a").mkdir()
                for handle, data in content.items():
                    (mountpoint / f"a/{handle}").write_bytes(data)
            with opened(mountpoint / "a/7") as page, Caller(mountpoint / "a/1") as caller:
                daemon = mount.daemon
                os.kill(daemon, signal.SIGSTOP)
                caller.asks_and_waits()
                os.kill(daemon, signal.SIGKILL)
                assert caller.answer() in DEAD
                wait_until(lambda: len(mount.said("serving /")) == turn + 2, "the mount")  # noqa: B023
                with raises_errno(errno.ENOTCONN):
                    os.pread(page, PAGE, 0)
            assert {int(file.name): file.read_bytes() for file in (mountpoint / "a").iterdir()} == content
            assert mount.restarts() == turn + 1
        mount.wait_for_log(r"mounted /\S+ anew over the pages that were kept: none is lost, files that were open are")
        assert len(mount.said("anew over the pages")) == 3
        assert not mount.said("no open file is lost")


# --- the end ---


@pytest.mark.parametrize("end", ["umount {mnt}", "umount -l {mnt}", "kill {keeper}", "kill -INT {keeper}"])
@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_c22_a_mount_can_be_ended_while_the_daemon_is_dead(mountpoint: Path, end: str, delay: float) -> None:
    """It can also be ended while the next daemon starts, and when it has just started."""
    with Kept(mountpoint, "size=16m") as mount:
        mount.expect_restarts()
        (mountpoint / "a").mkdir()
        mount.expect_log("SIGINT: unmounting /")
        keeper = mount.keeper
        mount.kill_daemon()
        time.sleep(delay)
        run(end.format(mnt=mountpoint, keeper=keeper))
        mount.ends_with(0)


def test_c22_a_mount_in_the_background_survives_kills_and_leaves_no_process(mountpoint: Path) -> None:
    run(f"{COMMAND} {mountpoint} -o size=16m")
    try:
        with held(mountpoint):
            for turn in range(3):
                config = json.loads((mountpoint / ".config").read_text())
                assert serving(mountpoint) == {config["keeper_pid"], config["daemon_pid"]}
                os.kill(config["daemon_pid"] if turn < 2 else config["keeper_pid"], signal.SIGKILL)
            wait_until(lambda: keeper_of(mountpoint) != config["keeper_pid"], "another keeper")
        os.kill(keeper_of(mountpoint), signal.SIGTERM)
        wait_until(lambda: not processes(mountpoint), "every process to end")
        assert str(mountpoint) not in mounts()
    finally:
        for pid in processes(mountpoint):
            os.kill(pid, signal.SIGKILL)
        if str(mountpoint) in mounts():
            run(f"fusermount3 -u -z {mountpoint}")


# --- what is kept ---


def test_c22_a_directory_store_keeps_its_ids_budget_and_lock_after_kills(
    tmp_path: Path, mountpoint: Path, package: Path
) -> None:
    store, second = tmp_path / "store", tmp_path / "second"
    store.mkdir()
    second.mkdir()

    def refused() -> bool:
        said = run(f"{COMMAND} {second} -o store={store}", code=32)
        return "the store is in use by another mount" in said

    options = f"size=16m,backup_size=5m,store={store}"
    with Kept(mountpoint, options, command=of_package(package)) as mount, held(mountpoint):
        mount.expect_restarts()
        set_attribute(mountpoint, "size", 8 << 20)
        set_attribute(mountpoint / "a", "size", 6 << 20)
        before = (mountpoint / "a").stat().st_ino
        for turn in range(2):
            mount.kill_daemon()
            assert mount.restarts() == turn + 1
            assert count(mountpoint, "size") == 8 << 20
            assert count(mountpoint / "a", "size") == 6 << 20
            assert (mountpoint / "a").stat().st_ino == before
            assert refused()
        (mountpoint / "b").mkdir()
        assert (mountpoint / "b").stat().st_ino not in (before, mountpoint.stat().st_ino)
        (mountpoint / "b").rmdir()


def test_a_keeper_that_gave_up_keeps_the_store_locked(tmp_path: Path, mountpoint: Path, package: Path) -> None:
    store, second = tmp_path / "store", tmp_path / "second"
    store.mkdir()
    second.mkdir()
    gives_up_after(package, failed=1)
    with Kept(mountpoint, f"store={store},{NO_STANDBY}", command=of_package(package)) as mount:
        keeper = mount.keeper
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(b"x" * PAGE)
        mount.expect_log("no such luck")
        with changed(package / "mount.py", "import sys\n", "raise SystemExit('no such luck')\n"):
            mount.give_up()
        run(f"{COMMAND} {second} -o store={store} 2>&1 | grep -q 'in use by another mount'")
        mount.try_again(keeper)
        assert (mountpoint / "a/1").read_bytes() == b"x" * PAGE


def test_c22_a_mount_of_a_user_survives_kills(place: Place) -> None:
    with place.directory("home", ALICE) as home, UsersMount(place, home, "size=64m") as mount, acting_as(ALICE):
        mount.expect_restarts()
        with held(home):
            for turn in range(3):
                daemon = json.loads((home / ".config").read_text())["daemon_pid"]
                os.kill(daemon, signal.SIGKILL)
                assert mount.restarts() == turn + 1


def test_c22_large_pages_survive_kills_under_load(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=256m,page_size=64k") as mount, Load(mountpoint, clients=4) as load:
        mount.expect_restarts()
        for _ in range(8):
            load.wait_for_steps(20)
            mount.kill_daemon()


@pytest.mark.parametrize("how", ["killed", "asked"])
def test_c22_a_new_version_takes_over_the_running_mount(mountpoint: Path, package: Path, how: str) -> None:
    old, new = "# HELP ttmfs_backups Backups there are.", "# HELP ttmfs_backups What the new version counts."
    with Kept(mountpoint, f"size=16m,{NO_STANDBY}", command=of_package(package)) as mount, held(mountpoint):
        mount.expect_restarts()
        assert old in (mountpoint / ".stats").read_text()
        with changed(package / "ttmfs/fuse/metrics.py", "Backups there are.", "What the new version counts."):
            if how == "killed":
                mount.kill_daemon()
            else:
                mount.restart()
            assert new in (mountpoint / ".stats").read_text()
        assert mount.restarts() == 1


# --- the keeper itself ---


def test_the_keeper_is_small_and_holds_connection_store_and_state_but_no_page(mountpoint: Path) -> None:
    def resident(pid: int) -> int:
        row = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert row
        return int(row[1]) << 10

    with Kept(mountpoint, "size=256m") as mount:
        mount.expect_restarts()
        (mountpoint / "a").mkdir()
        before = resident(mount.keeper)
        (mountpoint / "a/.image").write_bytes(os.urandom(1 << 20) * 128)
        mount.kill_daemon()
        assert mount.restarts() == 1
        assert resident(mount.keeper) < 16 << 20
        assert resident(mount.keeper) - before < 1 << 20
        held_there = descriptors(mount.keeper)
        assert held_there.count("/dev/fuse") == 1
        assert held_there.count("/memfd:ttmfs-state (deleted)") == 1
        store = os.stat(store_of(mount.daemon))
        found = [os.stat(fd) for fd in Path(f"/proc/{mount.keeper}/fd").iterdir() if not fd.name.startswith("/dev")]
        assert sum(os.path.samestat(store, other) for other in found) == 1


def test_restarts_leak_nothing(mountpoint: Path) -> None:
    """Keeper and daemon keep the same descriptors, processes and stored bytes."""
    with Kept(mountpoint, "size=64m,standby=off") as mount, held(mountpoint):
        mount.expect_restarts()
        mount.kill_daemon()
        assert mount.restarts() == 1
        keeper = mount.keeper
        before = kinds(keeper), kinds(mount.daemon), os.statvfs(mountpoint).f_bfree
        (mountpoint / "b").mkdir()
        for turn in range(8):
            with opened(mountpoint / "b/.image") as image:
                os.pwrite(image, bytes(8 << 20), 0)
                mount.kill_daemon()
                os.ftruncate(image, 0)
            assert mount.restarts() == turn + 2
            assert serving(mountpoint) == {keeper, mount.daemon}
            assert daemons(keeper) == {mount.daemon}
        (mountpoint / "b").rmdir()
        assert (kinds(keeper), kinds(mount.daemon), os.statvfs(mountpoint).f_bfree) == before


def test_c22_a_restart_works_with_more_open_files_than_select_allows(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=64m") as mount:
        for number in range(1200):
            (mountpoint / f"b{number}").mkdir()
            (mountpoint / f"b{number}/1").write_bytes(b"%d" % number)
        mount.expect_restarts()
        os.kill(mount.keeper, signal.SIGUSR1)
        wait_until(lambda: mount.restarts() == 1, "another daemon")
        assert all((mountpoint / f"b{n}/1").read_bytes().rstrip(b"\0") == b"%d" % n for n in range(1200))


def test_without_resend_a_failed_request_starts_from_the_beginning(mountpoint: Path, package: Path) -> None:
    """A caller that was told that a truncation failed, and repeats it, has all of it done."""
    far = 16 << 20  # pages so far from each other are dropped one by one
    with Kept(mountpoint, "size=2g", command=cannot_resend(package)) as mount:
        mount.expect_restarts()
        mount.expect_log("mounted /.* anew over the pages")
        (mountpoint / "a").mkdir()
        set_attribute(mountpoint / "a", "size", 50_000 * far)
        with opened(mountpoint / "a/.shmem") as file:
            for number in range(50_000):
                os.pwrite(file, b"x", number * far)
        before = count(mountpoint / "a", "pages")
        program = """
import os, sys
try:
    os.truncate(sys.argv[1], 0)
except OSError:
    print("told", flush=True)
sys.stdin.readline()
os.truncate(sys.argv[1], 0)
"""
        with subprocess.Popen(
            [sys.executable, "-c", program, mountpoint / "a/.image"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as asking:
            wait_until(lambda: count(mountpoint / "a", "pages") < before, "the first page to go")
            mount.kill_daemon()
            assert asking.stdout
            assert asking.stdout.readline() == "told\n"
            wait_until(lambda: os.path.ismount(mountpoint) and (mountpoint / "a").exists(), "the mount")
            assert 0 < count(mountpoint / "a", "pages") < before
            (mountpoint / "a/1").write_bytes(b"stored meanwhile")
            asking.communicate("\n")
        assert not asking.returncode
        assert count(mountpoint / "a", "pages") == 0


def test_c22_a_signal_to_a_daemon_that_has_just_died_ends_no_keeper(mountpoint: Path) -> None:
    """A keeper that a daemon made is not its parent, so a dead daemon's pid can be reused."""
    with Kept(mountpoint, "size=16m") as mount, held(mountpoint):
        mount.expect_restarts()
        mount.kill_keeper()
        keeper, daemon = mount.keeper, mount.daemon
        os.kill(keeper, signal.SIGSTOP)
        os.kill(daemon, signal.SIGKILL)
        os.waitpid(daemon, 0)  # an orphan since the first keeper was killed, and so a child of this process
        os.kill(keeper, signal.SIGUSR1)
        os.kill(keeper, signal.SIGCONT)
        assert mount.daemon != daemon
        assert mount.keeper == keeper


def test_a_keeper_that_cannot_start_is_retried_at_growing_intervals(mountpoint: Path, package: Path) -> None:
    """The upgrade of the keeper is broken. The mount serves, and gets a keeper after the repair."""
    with Kept(mountpoint, "size=16m", command=of_package(package)) as mount, held(mountpoint):
        mount.expect_log("the keeper does not hear")
        mount.expect_log(r"^  |^Traceback|Error: ")  # Python's own words for it
        with changed(package / "ttmfs/recovery/keeper.py", "if __name__", "1 / 0\nif __name__"):
            os.kill(mount.keeper, signal.SIGKILL)
            mount.process.wait(5)
            begun = time.monotonic()
            wait_until(lambda: len(mount.said(REPLACED)) > 3, "several keepers")
            assert time.monotonic() - begun > 0.3, "at ever greater intervals"
            mount.expect_log(REPLACED)
            assert (mountpoint / "a/1").read_bytes()
        wait_until(lambda: kept_again(mount.keeper), "a keeper that has it all", 20)
        mount.expect_restarts()
        mount.expect_log(r"the daemon \d+ of /\S+ is dead: starting another")
        mount.kill_daemon()
        assert mount.restarts() == 1


def kept_again(keeper: int) -> bool:
    with contextlib.suppress(OSError):
        return "/dev/fuse" in descriptors(keeper)
    return False
