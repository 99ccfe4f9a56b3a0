"""The units under a real systemd, installed as a user installs them: restarts, failures and stops."""

import contextlib
import errno
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kept import STANDBY_NICE

from harness import raises_errno, wait_until
from stores import ALICE, swap
from systemd_machine import Machine, Unit

pytestmark = pytest.mark.serial

PAGE = os.sysconf("SC_PAGE_SIZE")
ERROR, WARNING = 3, 4


class Service:
    """One started instance of the system unit."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.unit = Unit(machine, f"ttmfs@mnt-{name}.service")
        self.path = machine.path(f"/mnt/{name}")  # out here
        self.inside = f"/mnt/{name}"

    def restarts(self) -> int:
        """How many daemons have taken over. Waits for one that answers."""
        found = re.search(r"^ttmfs_restarts_total (\d+)", self.machine.run(f"cat {self.inside}/.stats"), re.MULTILINE)
        assert found
        return int(found[1])

    def config(self) -> dict[str, Any]:
        """What its .config says. Process ids are those inside."""
        found: dict[str, Any] = json.loads(self.machine.run(f"cat {self.inside}/.config"))
        return found

    def ready_standby(self) -> int:
        """The process id, inside, of its standby. Waits until that is ready."""
        keeper = self.unit.main_pid

        def found() -> str:
            return self.machine.call(f"pgrep -P {keeper} -x ttmfs-standby").stdout.strip()

        wait_until(found, "a standby", 30)
        return int(found())

    def wait_for_restart(self, before: int) -> None:
        wait_until(lambda: self.restarts() > before, "another daemon", 20)
        wait_until(lambda: self.unit.state == ("active", "running"), "the unit", 20)

    def logged(self, priority: int) -> list[str]:
        """Its log messages of a priority or higher."""
        return [str(e["MESSAGE"]) for e in self.unit.journal() if "_CMDLINE" in e and int(e["PRIORITY"]) <= priority
                and e.get("_PID") != "1"]  # fmt: skip


@contextlib.contextmanager
def served(machine: Machine, name: str, options: str, more: str = "") -> Iterator[Service]:
    """A mount at /mnt/NAME by the system unit. `more` are settings of the unit."""
    machine.run(f"mkdir -p /mnt/{name}")
    machine.write(f"/etc/ttmfs/mnt-{name}.conf", f"OPTIONS={options}\n")
    service = Service(machine, name)
    if more:
        machine.write(f"/etc/systemd/system/{service.unit.name}.d/test.conf", f"[Service]\n{more}\n")
        machine.run("systemctl daemon-reload")
    service.unit("start")
    try:
        yield service
    finally:
        machine.call(f"systemctl stop {service.unit.name}; systemctl reset-failed {service.unit.name}")


def holder(service: Service, path: str) -> "subprocess.Popen[str]":
    """A process inside that has a page open. It stores each line that it gets, and reads it back."""
    program = (
        f"exec 3<>{path}; while read -r line; do printf '%-4095s\\n' \"$line\" >/proc/self/fd/3 "
        "&& head -c 4096 /proc/self/fd/3; done"
    )
    return subprocess.Popen(
        service.machine.words(program), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


RESTARTS = {
    "systemctl restart": "systemctl restart {unit}",
    "systemctl reload": "systemctl reload {unit}",
    "SIGKILL to all": "systemctl kill -s KILL {unit}",
    "SIGKILL to the keeper": "kill -s KILL {keeper_pid}",
    "SIGKILL to the daemon": "kill -s KILL {daemon_pid}",
    "SIGUSR1 to the keeper": "kill -s USR1 {keeper_pid}",
    "SIGSEGV": "kill -s SEGV {daemon_pid}",
    "a daemon that hangs": "kill -s STOP {daemon_pid}",
    "a missed watchdog": "systemctl kill -s STOP {unit}",
}


def test_c22_restarts_crashes_and_a_missed_watchdog_lose_nothing(machine: Machine) -> None:
    with served(machine, "kept", "size=64m", "WatchdogSec=1") as service:
        machine.run("mkdir /mnt/kept/a; for i in $(seq 100); do echo $i >/mnt/kept/a/$i; done")
        with holder(service, "/mnt/kept/a/1") as process:
            assert process.stdin
            assert process.stdout
            for command in RESTARTS.values():
                before = service.restarts()
                machine.run(command.format(unit=service.unit.name, **service.config()))
                process.stdin.write(f"after {command}\n")
                assert process.stdout.readline().strip() == f"after {command}"
                service.wait_for_restart(before)
            process.stdin.close()
        assert machine.run("cat /mnt/kept/a/.image | tr -d '\\0' | wc -l") == "100\n"
        assert service.restarts() == len(RESTARTS)
        wait_until(lambda: service.unit.show("StatusText") == "backups: 1, stored: 400k of 64m", "the status")
        assert int(service.unit.show("NFileDescriptorStore")) == 3, "connection, store, state"
        journal = [str(entry["MESSAGE"]) for entry in service.unit.journal()]
        assert any("Watchdog timeout" in message for message in journal)
        said = service.logged(WARNING)
        assert sum("was killed by signal 9: starting another" in line for line in said) == 3
        assert sum("was killed by signal 11: starting another" in line for line in said) == 1
        assert sum("the daemon before died: Fatal Python error: Segmentation fault" in line for line in said) == 1
        assert sum("has given no sign of life for 1 s: killing it" in line for line in said) == 1
        assert service.config()["standby"] == "on"


def test_c22_a_standby_takes_over_in_the_unit_but_not_after_a_restart_on_purpose(machine: Machine) -> None:
    with served(machine, "standby", "size=64m,standby=on") as service:
        machine.run("mkdir /mnt/standby/a; echo kept >/mnt/standby/a/7")
        standby, before = service.ready_standby(), service.config()
        may_return = int(machine.run(f"prlimit --pid {standby} --nice --noheadings -o SOFT")) >= 20
        assert int(machine.run(f"ps -o ni= -p {standby}")) == (STANDBY_NICE if may_return else 0)
        machine.run(f"kill -s KILL {before['daemon_pid']}")
        after = service.config()
        assert (after["daemon_pid"], after["keeper_pid"]) == (standby, before["keeper_pid"])
        assert int(machine.run(f"ps -o ni= -p {standby}")) == 0
        standby = service.ready_standby()
        service.unit("restart")
        last = service.config()
        assert last["keeper_pid"] != after["keeper_pid"], "another version may be installed"
        wait_until(lambda: machine.call(f"ps -p {standby} {after['daemon_pid']}").returncode, "the end of both", 10)
        assert machine.run("head -c 4 /mnt/standby/a/7") == "kept"


def test_the_log_of_the_unit_goes_to_a_file(machine: Machine) -> None:
    with served(machine, "logged", "size=1m,log=/var/log/ttmfs-unit.log") as service:
        machine.run(f"kill -s KILL {service.config()['daemon_pid']}")
        service.wait_for_restart(0)
        service.unit("restart")
        service.wait_for_restart(1)

        def lines() -> list[str]:
            return machine.run("cat /var/log/ttmfs-unit.log").splitlines()

        wait_until(lambda: sum("info ttmfs[" in line and "taking over" in line for line in lines()) == 2, "its lines")
        assert any("warning ttmfs-keeper[" in line and "was killed by signal 9" in line for line in lines())
    machine.run("rm /var/log/ttmfs-unit.log")


def test_the_log_of_the_unit_goes_to_the_journal_with_priorities(machine: Machine) -> None:
    with served(machine, "natively", "size=1m,log=journal") as service:
        machine.run(f"kill -s KILL {service.config()['daemon_pid']}")
        service.wait_for_restart(0)
        wait_until(
            lambda: any(
                (entry.get("SYSLOG_IDENTIFIER"), entry["PRIORITY"]) == ("ttmfs-keeper", str(WARNING))
                and "was killed by signal 9" in str(entry["MESSAGE"])
                for entry in service.unit.journal()
            ),
            "the keeper's line",
        )
        said = [str(entry["MESSAGE"]) for entry in service.unit.journal() if entry.get("SYSLOG_IDENTIFIER") == "ttmfs"]
        assert "taking over /mnt/natively: no page and no open file is lost" in said


def test_c22_a_daemon_dies_with_its_keeper_even_if_it_is_stopped(machine: Machine) -> None:
    """Two daemons that read one connection would carry out requests twice."""
    with served(machine, "both", "size=64m,standby=off") as service:
        before = service.config()
        assert before["keeper_pid"] == service.unit.main_pid
        machine.run("echo kept >/root/page; mkdir /mnt/both/a; cp /root/page /mnt/both/a/7")
        machine.run(f"kill -s STOP {before['daemon_pid']}; kill -s KILL {before['keeper_pid']}")
        service.wait_for_restart(0)
        assert machine.call(f"ps -p {before['daemon_pid']}").returncode == 1
        assert service.config()["keeper_pid"] == service.unit.main_pid
        assert machine.run("head -c 4 /mnt/both/a/7") == "kept"


def test_c23_the_unit_mounts_again_after_a_refused_forced_unmount(machine: Machine) -> None:
    with served(machine, "forced", "size=64m") as service:
        machine.run("mkdir /mnt/forced/a; for i in $(seq 100); do echo $i >/mnt/forced/a/$i; done")
        for turn in range(2):
            with holder(service, "/mnt/forced/a/1") as process:
                assert process.stdin
                assert process.stdout
                process.stdin.write("open\n")
                assert process.stdout.readline().strip() == "open"
                machine.run("umount -f /mnt/forced", code=32)
                process.stdin.close()
                wait_until(lambda: machine.call("ls /mnt/forced/a").returncode == 0, "the mount", 20)
            assert service.restarts() == turn + 1
            wait_until(lambda: service.unit.state == ("active", "running"), "the unit", 20)
        assert machine.run("cat /mnt/forced/a/.image | tr -d '\\0' | wc -l") == "100\n"
        assert int(service.unit.show("NFileDescriptorStore")) == 3, "the new connection in place of the old one"
        said = service.logged(WARNING)
        assert sum("was cut off, but it was not unmounted" in line for line in said) == 2
        assert sum("anew over the pages that were kept" in line for line in said) == 2
        machine.run("umount /mnt/forced")
        wait_until(lambda: service.unit.state == ("inactive", "dead"), "the end")


def test_swap_and_descriptors_work_in_the_confined_unit(machine: Machine, tmp_path: Path) -> None:
    """The unit's confinement must allow paging out, cachestat and the socket."""
    with served(machine, "swapped", "size=64m,allow_other,mode=1777"), swap(tmp_path):
        machine.run("mkdir /mnt/swapped/a; head -c 1M /dev/urandom | tee /root/pages >/mnt/swapped/a/.image")
        machine.run("sync /mnt/swapped/a/.image")
        assert int(machine.run("getfattr --absolute-names --only-values -n user.ttmfs.swapped /mnt/swapped/a")) > 200
        assert re.search(
            r'^ttmfs_pages\{state="swapped"\} [12]\d\d', machine.run("cat /mnt/swapped/.stats"), re.MULTILINE
        )
        machine.run("cmp -n 1048576 /root/pages /mnt/swapped/a/.image; cmp -n 4096 /root/pages /mnt/swapped/a/1")
        program = (
            "from ttmfs.client import Backup; b = Backup.create('/mnt/swapped/b'); "
            "print(b.is_native, b.backup_page(b'x' * 4096, 4), b.residency().pages)"
        )
        who = f"setpriv --reuid {ALICE} --regid {ALICE} --clear-groups"
        assert machine.run(f'{who} /usr/local/lib/ttmfs/bin/python -c "{program}"') == "True 5 1\n"


def test_stopping_the_unit_unmounts_and_releases_everything(machine: Machine) -> None:
    with served(machine, "stopped", "size=64m") as service:
        machine.run("mkdir /mnt/stopped/a; head -c 1M /dev/urandom >/mnt/stopped/a/.image")
        service.unit("restart")
        assert int(service.unit.show("NFileDescriptorStore")) > 0
        service.unit("stop")
        assert service.unit.state == ("inactive", "dead")
        assert int(service.unit.show("NFileDescriptorStore")) == 0
        machine.run("findmnt /mnt/stopped", code=1)
        service.unit("start")
        assert machine.run("ls -A /mnt/stopped") == ""


@pytest.mark.parametrize("end", ["umount /mnt/ended", "fusermount3 -u /mnt/ended"])
def test_an_unmount_by_hand_stops_the_unit(machine: Machine, end: str) -> None:
    with served(machine, "ended", "size=16m") as service:
        machine.run(end)
        wait_until(lambda: service.unit.state == ("inactive", "dead"), "the end")
        machine.run("findmnt /mnt/ended", code=1)


def test_a_failed_first_start_is_not_retried(machine: Machine) -> None:
    machine.run("mkdir -p /mnt/wrong")
    machine.write("/etc/ttmfs/mnt-wrong.conf", "OPTIONS=szie=64m\n")
    service = Service(machine, "wrong")
    service.unit("start", code=1)
    wait_until(lambda: service.unit.state == ("failed", "failed"), "the end")
    wait_until(lambda: service.logged(ERROR), "the reason in the journal")
    (reason,) = service.logged(ERROR)
    assert "unknown option 'szie=64m', perhaps 'size'" in reason
    assert service.unit.show("NRestarts") == "0"
    machine.write("/etc/ttmfs/mnt-wrong.conf", "OPTIONS=size=64m\n")
    service.unit("start")
    service.unit("stop")


def package(machine: Machine) -> Path:
    """The directory of the installed package, inside."""
    (found,) = machine.path("/usr/local/lib/ttmfs/lib").glob("python3.*/site-packages/ttmfs")
    return found


def test_c22_a_broken_upgrade_holds_the_pages_until_a_restart_after_repair(
    machine: Machine,
) -> None:
    with served(machine, "broken", "size=64m") as service:
        machine.run("mkdir /mnt/broken/a; echo kept >/mnt/broken/a/7")
        session = package(machine) / "daemon/session.py"
        good = session.read_text()
        session.write_text("a broken upgrade\n")
        try:
            service.unit("restart", code=1)
            wait_until(lambda: "gave up" in service.unit.show("StatusText"), "giving up", 30)
            assert service.unit.state == ("active", "running")
            machine.run("ls /mnt/broken", code=2)
            with raises_errno(errno.ENOTCONN):
                os.listdir(service.path)
            assert "gave up: " in service.logged(ERROR)[-1]
            assert sum("before it served (5 of 5)" in line for line in service.logged(WARNING)) == 1
            (command,) = re.findall(r"(ttmfs rescue \d+) DIRECTORY", service.unit.show("StatusText"))
            assert "1 of 1 backups" in machine.run(f"{command} /root/by-pid")
            assert "1 of 1 backups" in machine.run("ttmfs rescue /mnt/broken /root/by-mountpoint")
            machine.run("cmp /root/by-pid/a /root/by-mountpoint/a; ttmfs rescue --check /root/by-pid")
            service.unit("restart", code=1)  # it is broken still
            wait_until(lambda: "gave up" in service.unit.show("StatusText"), "giving up", 30)
        finally:
            session.write_text(good)
        service.unit("restart")
        assert machine.run("head -c 4 /mnt/broken/a/7") == "kept"
        assert service.restarts() >= 1


@pytest.mark.parametrize("retry", ["restart", "reload"])
def test_c22_an_option_that_became_wrong_loses_nothing(machine: Machine, retry: str) -> None:
    with served(machine, "typo", "size=64m") as service:
        machine.run("mkdir /mnt/typo/a; echo kept >/mnt/typo/a/7")
        machine.write("/etc/ttmfs/mnt-typo.conf", "OPTIONS=size=64m,keepr=on\n")
        service.unit("restart", code=1)
        wait_until(lambda: "gave up" in service.unit.show("StatusText"), "giving up", 30)
        assert any("unknown option 'keepr=on', perhaps 'keeper'" in m for m in service.logged(ERROR))
        machine.write("/etc/ttmfs/mnt-typo.conf", "OPTIONS=size=64m\n")
        service.unit(retry)
        wait_until(lambda: machine.call("head -c 4 /mnt/typo/a/7").stdout == "kept", "the page")


def test_stopping_a_unit_that_gave_up_leaves_nothing_behind(machine: Machine) -> None:
    with served(machine, "given", "size=64m") as service:
        session = package(machine) / "daemon/session.py"
        good = session.read_text()
        session.write_text("a broken upgrade\n")
        try:
            machine.run(f"systemctl kill -s KILL {service.unit.name}")
            wait_until(lambda: "gave up" in service.unit.show("StatusText"), "giving up", 30)
        finally:
            session.write_text(good)
        service.unit("stop")
        assert service.unit.state == ("inactive", "dead")
        machine.run("findmnt /mnt/given", code=1)


def test_c22_a_daemon_stuck_in_the_kernel_delays_no_restart(machine: Machine) -> None:
    """A frozen daemon comes closest to that: no signal reaches it, not even SIGKILL."""
    with served(machine, "stuck", "size=64m", "TimeoutStopSec=1") as service:
        machine.run("mkdir /mnt/stuck/a; echo kept >/mnt/stuck/a/7")
        stuck = machine.pid(service.unit.main_pid)
        group = Path("/sys/fs/cgroup/freezer/ttmfs-test-stuck")
        group.mkdir()
        try:
            (group / "tasks").write_text(str(stuck))
            (group / "freezer.state").write_text("FROZEN")
            begun = time.monotonic()
            service.unit("restart")
            assert time.monotonic() - begun < 15
            assert machine.run("head -c 4 /mnt/stuck/a/7") == "kept"
            assert os.path.exists(f"/proc/{stuck}"), "it was not stuck"
        finally:
            (group / "freezer.state").write_text("THAWED")
            wait_until(lambda: not (group / "tasks").read_text(), "its end")
            group.rmdir()
        assert machine.run("head -c 4 /mnt/stuck/a/7") == "kept"


def test_a_unit_ordered_after_ttmfs_finds_it_mounted(machine: Machine) -> None:
    machine.run("mkdir -p /mnt/ttm /srv/pages; cp systemd/example.mount /etc/systemd/system/srv-pages.mount")
    machine.write("/etc/ttmfs/mnt-ttm.conf", "OPTIONS=size=16m\n")
    machine.run("systemctl daemon-reload; systemctl start srv-pages.mount")
    try:
        assert "fuse.ttmfs" in machine.run("findmnt -n -o FSTYPE /srv/pages")
        machine.run("mkdir /srv/pages/a; systemctl restart ttmfs@mnt-ttm; test -d /srv/pages/a")
    finally:
        machine.run("systemctl stop srv-pages.mount ttmfs@mnt-ttm")
    machine.run("findmnt /srv/pages", code=1)


def test_a_unit_waits_for_its_store_longer_than_a_start_may_take(machine: Machine) -> None:
    machine.run("mkdir -p /srv/store /mnt/waits")
    options = "store=/srv/store,backup_size=1m"
    with served(machine, "holds", options) as first:
        machine.run("mkdir /mnt/holds/a; echo kept >/mnt/holds/a/7")
        machine.write("/etc/ttmfs/mnt-waits.conf", f"OPTIONS={options},store_wait=600\n")
        second = Unit(machine, "ttmfs@mnt-waits.service")
        machine.write(f"/etc/systemd/system/{second.name}.d/test.conf", "[Service]\nTimeoutStartSec=7\n")
        machine.run(f"systemctl daemon-reload; systemctl start --no-block {second.name}")
        try:
            time.sleep(12)
            assert second.state == ("activating", "start")
            first.unit("stop")
            wait_until(lambda: second.state == ("active", "running"), "the second", 20)
            assert machine.run("head -c 4 /mnt/waits/a/7") == "kept"
        finally:
            second("stop")


def test_the_units_are_valid_and_confined(machine: Machine) -> None:
    with served(machine, "tight", "size=16m") as service:
        machine.run(f"systemd-analyze verify {service.unit.name}")
        said = machine.run(f"systemd-analyze security --no-pager --threshold=40 {service.unit.name}")
        assert "Overall exposure level" in said
        assert "/ttmfs.slice/" in machine.run(f"cat /proc/{service.unit.main_pid}/cgroup")


USER = "setpriv --reuid {uid} --regid {uid} --clear-groups env HOME=/home/alice XDG_RUNTIME_DIR=/run/user/{uid}"


@pytest.fixture
def user(machine: Machine) -> Iterator[str]:
    """The words that run a command as a user with a service manager of her own."""
    machine.run(
        f"mkdir -p /home/alice/.config/ttmfs /run/user/{ALICE}; chown -R {ALICE}:{ALICE} /home/alice /run/user/{ALICE};"
        f"chmod 700 /run/user/{ALICE}; systemd-run -q --unit=alice -p User={ALICE} -p Group={ALICE} -p Delegate=yes "
        f"-p Type=notify -p Environment=HOME=/home/alice -p Environment=XDG_RUNTIME_DIR=/run/user/{ALICE} "
        "/lib/systemd/systemd --user"
    )
    yield USER.format(uid=ALICE)
    machine.run("systemctl stop alice")


def test_c22_the_unit_for_users_survives_kills(machine: Machine, user: str) -> None:
    machine.run(f"{user} mkdir -p /home/alice/ttm")
    machine.write("/home/alice/.config/ttmfs/home-alice-ttm.conf", "OPTIONS=size=16m\n")
    unit = Unit(machine, "ttmfs@home-alice-ttm.service", f"{user} systemctl --user")
    unit("start")
    try:

        def said(line: str) -> bool:
            return line in machine.run(f"{user} cat /home/alice/ttm/.stats")

        machine.run(f"{user} bash -c 'mkdir ~/ttm/a; echo kept >~/ttm/a/7'")
        for turn, verb in enumerate(("restart", "reload", "kill -s KILL"), 1):
            unit(verb)
            line = f"restarts_total {turn}\n"
            wait_until(partial(said, line), "another daemon")
            wait_until(lambda: unit.state == ("active", "running"), "the unit")
            assert machine.run(f"{user} head -c 4 /home/alice/ttm/a/7") == "kept"
        assert int(unit.show("NFileDescriptorStore")) >= 4
    finally:
        unit("stop")
    machine.run("findmnt /home/alice/ttm", code=1)
