"""The keeper kills a daemon that is stopped or hangs. Here it waits for a shorter time than usual."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from kept import PAGE, Caller, Kept, copied_package, held, of_package

from harness import opened, wait_until

SILENT = r"the daemon \d+ of /\S+ has given no sign of life for \S+ s: killing it"


@pytest.fixture
def impatient(tmp_path: Path) -> tuple[str, ...]:
    """The command of a ttmfs whose keeper looks every 0.2 s and lets 6 looks pass."""
    package = copied_package(tmp_path / "package")
    for name, changes in {
        "recovery/keeper": {
            "LOOK_SECONDS, MOST_SILENT = 5.0": "LOOK_SECONDS, MOST_SILENT = 0.2",
        },
        "daemon/keeping": {"REPORT_SECONDS = 5.0": "REPORT_SECONDS = 0.1"},
    }.items():
        file = package / f"ttmfs/{name}.py"
        text = file.read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        file.write_text(text)
    return of_package(package)


def test_c22_a_stopped_daemon_is_killed_without_an_error_to_callers(
    mountpoint: Path, impatient: tuple[str, ...]
) -> None:
    with Kept(mountpoint, "size=16m", command=impatient) as mount, held(mountpoint):
        mount.expect_restarts()
        for turn in range(2):
            with Caller(mountpoint / "a/1") as caller:
                os.kill(mount.daemon, signal.SIGSTOP)
                caller.asks_and_waits()
                assert caller.answer() == "read"
            mount.wait_for_log(SILENT)
            assert mount.restarts() == turn + 1
        assert len(mount.said(SILENT)) == 2


@pytest.mark.parametrize("by_another", [False, True], ids=["its first keeper", "a keeper that a daemon made"])
def test_c22_a_restart_succeeds_even_if_the_daemon_is_stopped(
    mountpoint: Path, impatient: tuple[str, ...], by_another: bool
) -> None:
    with Kept(mountpoint, "size=16m", command=impatient) as mount, held(mountpoint):
        mount.expect_restarts()
        if by_another:
            mount.kill_keeper()
        keeper, daemon = mount.keeper, mount.daemon
        os.kill(daemon, signal.SIGSTOP)
        os.kill(keeper, signal.SIGUSR1)
        assert mount.restarts() == 1
        assert mount.keeper == keeper
        assert not mount.said(SILENT)


def test_sigterm_ends_the_mount_even_if_the_daemon_is_stopped(mountpoint: Path, impatient: tuple[str, ...]) -> None:
    """Another daemon takes over, and ends properly: nothing stays mounted."""
    with Kept(mountpoint, "size=16m", command=impatient) as mount:
        mount.expect_restarts()
        (mountpoint / "a").mkdir()
        os.kill(mount.daemon, signal.SIGSTOP)
        mount.process.send_signal(signal.SIGTERM)
        mount.wait_for_log(SILENT)
        mount.ends_with(0)


def test_a_slow_daemon_that_serves_is_not_killed(mountpoint: Path, impatient: tuple[str, ...]) -> None:
    """The daemon is stopped repeatedly, in total for longer than the keeper waits for a sign of life."""
    with Kept(mountpoint, "size=16m", command=impatient) as mount, held(mountpoint):
        daemon, end = mount.daemon, time.monotonic() + 4
        while time.monotonic() < end:
            os.kill(daemon, signal.SIGSTOP)
            time.sleep(0.3)
            os.kill(daemon, signal.SIGCONT)
            time.sleep(0.3)
        assert mount.daemon == daemon


def test_a_paused_machine_does_not_get_its_daemon_killed(mountpoint: Path, impatient: tuple[str, ...]) -> None:
    """Daemon and keeper are stopped for longer than the keeper waits, and continue at the same time."""
    with Kept(mountpoint, "size=16m", command=impatient) as mount, held(mountpoint):
        daemon, keeper = mount.daemon, mount.keeper
        for process in daemon, keeper:
            os.kill(process, signal.SIGSTOP)
        time.sleep(3)
        for process in keeper, daemon:
            os.kill(process, signal.SIGCONT)
            time.sleep(0.3)
        assert mount.daemon == daemon


def test_a_stopped_keeper_delays_no_request(mountpoint: Path, impatient: tuple[str, ...]) -> None:
    """Signs of life fill up its channel, since it does not read them."""
    with Kept(mountpoint, "size=16m", command=impatient) as mount, held(mountpoint):
        keeper = mount.keeper
        os.kill(keeper, signal.SIGSTOP)
        longest, end = 0.0, time.monotonic() + 4
        with opened(mountpoint / "a/1", os.O_RDONLY) as page:
            while time.monotonic() < end:
                begun = time.monotonic()
                assert len(os.pread(page, PAGE, 0)) == PAGE
                longest = max(longest, time.monotonic() - begun)
                time.sleep(0.01)
        os.kill(keeper, signal.SIGCONT)
        assert longest < 2, "one waited for the keeper"
        wait_until(lambda: mount.keeper == keeper, "the keeper")


def test_the_watchdog_timeout_equals_that_of_the_units() -> None:
    """The timeout is 30 s, and the daemon gives several signs of life in that time."""
    root = Path(__file__).resolve().parents[2]
    keeper, daemon = ((root / f"ttmfs/{name}.py").read_text() for name in ("recovery/keeper", "daemon/keeping"))
    found = re.search(r"^LOOK_SECONDS, MOST_SILENT = ([\d.]+), (\d+)$", keeper, re.MULTILINE)
    given = re.search(r"^REPORT_SECONDS = ([\d.]+)$", daemon, re.MULTILINE)
    assert found
    assert given
    patience = float(found[1]) * int(found[2])
    assert float(given[1]) * 3 <= patience
    for unit in (root / "systemd").glob("*/ttmfs@.service"):
        assert f"\nWatchdogSec={patience:g}\n" in unit.read_text()
