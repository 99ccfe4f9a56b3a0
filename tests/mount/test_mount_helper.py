"""mount(8), fstab and systemd's mount units: installed by ``make install`` and used for real in a booted machine."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from harness import wait_until
from stores import ALICE, BOB
from systemd_machine import Machine, Unit

pytestmark = pytest.mark.serial

MNT = "/mnt/ttm"
HELPERS = "mount.ttmfs", "mount.fuse.ttmfs"


@pytest.fixture(autouse=True)
def unmounted(machine: Machine) -> Iterator[None]:
    """Check that nothing is mounted, runs or stands in fstab at the end of a test."""
    machine.run(f"mkdir -p {MNT}; cp -n /etc/fstab /etc/fstab.before")
    yield
    machine.call(f"while umount -l {MNT}; do :; done; cp /etc/fstab.before /etc/fstab; systemctl daemon-reload")
    wait_until(lambda: not keepers(machine), "the end of every keeper")


def keepers(machine: Machine) -> str:
    return machine.call("pgrep ttmfs-keeper").stdout


def config(machine: Machine, path: str = MNT) -> dict[str, Any]:
    """The options in force and the process ids. Waits for a daemon that answers."""
    found: dict[str, Any] = json.loads(machine.run(f"cat {path}/.config"))
    return found


def kill_daemon(machine: Machine) -> None:
    """Kill the daemon, and check that a page is still there."""
    before = config(machine)
    machine.run(f"mkdir -p {MNT}/a; echo kept >{MNT}/a/7; kill -KILL {before['daemon_pid']}")
    assert machine.run(f"head -c 4 {MNT}/a/7") == "kept"
    after = config(machine)
    assert after["keeper_pid"] == before["keeper_pid"]
    assert after["daemon_pid"] != before["daemon_pid"]


def add_to_fstab(machine: Machine, line: str) -> None:
    machine.run(f"echo {line!r} >>/etc/fstab; systemctl daemon-reload")


def unit(machine: Machine, kind: str = "mount") -> Unit:
    return Unit(machine, f"mnt-ttm.{kind}")


# --- mount(8) ---


@pytest.mark.parametrize("kind", ["ttmfs", "fuse.ttmfs"])
def test_mount_accepts_both_types_and_umount_ends_the_mount(machine: Machine, kind: str) -> None:
    assert machine.run(f"mount -t {kind} ttm {MNT} -o size=64m,noatime") == ""
    assert machine.run(f"findmnt -n -o SOURCE,FSTYPE {MNT}").split() == ["ttm", "fuse.ttmfs"]
    (row,) = re.findall(rf"^(\S+) {MNT} (\S+) (\S+)", machine.run("cat /proc/mounts"), re.MULTILINE)
    assert row[:2] == ("ttm", "fuse.ttmfs")
    assert "noatime" in row[2].split(",")
    assert config(machine)["size"] == 64 << 20
    kill_daemon(machine)
    assert machine.run(f"umount {MNT}") == ""
    machine.run(f"findmnt {MNT}", code=1)


def test_umount_of_a_mount_in_use_is_busy_and_a_lazy_one_works(machine: Machine) -> None:
    machine.run(f"mount -t ttmfs ttm {MNT} -o size=64m")
    assert "busy" in machine.run(f"cd {MNT}; umount {MNT}", code=32)
    machine.run(f"cd {MNT}; umount -l {MNT}; cd /; ! findmnt {MNT}")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (f"ttm {MNT} -o size=64m,store=/var", 0, ""),
        (f"-v ttm {MNT} -o size=64m", 0, f"mount.py -o rw,size=64m -- ttm {MNT}"),
        (f"ttm {MNT} -o siez=64m", 1, "unknown option 'siez=64m', perhaps 'size'"),
        (f"ttm {MNT} -o size=lots", 1, "size: 'lots' is not a size"),
        ("ttm /mnt/missing", 32, "/mnt/missing does not exist; make it first: mkdir /mnt/missing"),
        ("ttm /etc/passwd", 32, "/etc/passwd is not a directory"),
        (f"ttm {MNT} -o store=/missing", 32, "/missing does not exist"),
    ],
)
def test_fake_checks_and_mounts_nothing(machine: Machine, words: str, code: int, said: str) -> None:
    out = machine.run(f"mount -f -t ttmfs {words}", code=code)
    assert said in out
    assert bool(out) == bool(said)
    machine.run(f"findmnt {MNT}", code=1)
    assert not keepers(machine)


@pytest.mark.parametrize(
    ("hide", "said"),
    [
        ("mount --bind /etc/passwd /usr/bin/fusermount3", "install the package fuse3"),
        ("mount -t tmpfs empty /dev", "modprobe fuse"),
    ],
)
def test_fake_reports_what_the_system_lacks(machine: Machine, hide: str, said: str) -> None:
    assert said in machine.run(f"unshare -m sh -c '{hide} && mount -f -t ttmfs ttm {MNT}'", code=2)


def test_errors_have_the_status_and_message_of_ttmfs_mount(machine: Machine) -> None:
    assert "mkdir /mnt/missing" in machine.run("mount -t ttmfs ttm /mnt/missing", code=32)
    assert "perhaps 'size'" in machine.run(f"mount -t ttmfs ttm {MNT} -o siez=1m", code=1)
    assert "invalid choice: 'ext4'" in machine.run(f"mount.ttmfs ttm {MNT} -t ext4", code=1)
    assert "required: DIRECTORY" in machine.run("mount.ttmfs ttm", code=1)


def test_sloppy_and_read_only_flags_and_unusual_names_are_accepted(machine: Machine) -> None:
    machine.run(
        "mkdir -p '/mnt/a b' '/var/c,d'; mount.ttmfs ttm '/mnt/a b' -o 'store=/var/c\\,d'; umount '/mnt/a b';"
        "mount -s -r -t ttmfs 'my ttm' '/mnt/a b' -o 'siez=1m,store=/var/c\\,d'"
    )
    try:
        found = config(machine, "'/mnt/a b'")
        assert (found["ro"], found["store"]) == (True, "/var/c,d")
        assert machine.run("findmnt -n -r -o SOURCE '/mnt/a b'") == "my\\x20ttm\n"
    finally:
        machine.run("umount '/mnt/a b'")


def test_remount_is_refused_with_what_to_do_instead(machine: Machine) -> None:
    machine.run(f"mount -t ttmfs ttm {MNT} -o size=64m; mkdir {MNT}/a; echo kept >{MNT}/a/7")
    assert "cannot be remounted" in machine.run(f"mount -o remount,ro {MNT}", code=32)
    said = machine.run(f"mount -o remount,size=128m {MNT}", code=32)
    (advice,) = re.findall(rf"ttmfs resize {MNT} SIZE", said)
    machine.run(advice.replace("SIZE", "128m"))
    assert machine.run(f"df -h --output=size {MNT}").split()[1] == "128M"
    assert machine.run(f"cat {MNT}/a/.image | head -c 28676 | tail -c 4100 | tr -d '\\0'") == "kept\n"


def test_the_helper_runs_no_program_of_another_mount_namespace(machine: Machine) -> None:
    """The owner of the namespace may have put any program at the helper's path. mount(8) passes the namespace by -N."""
    script = f"""
helper=$(readlink -f /sbin/mount.ttmfs)
printf '#!/bin/sh\\ntouch /tmp/was-run\\n' >/tmp/theirs; chmod +x /tmp/theirs
unshare -m --propagation private sh -c "mount --bind /tmp/theirs $helper; exec sleep 60" & there=$!
until nsenter -t $there -m grep -q was-run $helper; do sleep 0.01; done
mount -t ttmfs -N $there ttm {MNT} -o size=64m; echo "status $?"
mount.ttmfs ttm {MNT} -N /proc/$there/ns/mnt; echo "status $?"
nsenter -t $there -m findmnt {MNT} || echo "nothing there"
kill $there; ls /tmp/was-run || echo "not run"
"""
    said = machine.run(script)
    assert said.count("status 32") == 2
    assert said.count("nsenter --mount --target PID mount -t ttmfs SOURCE DIRECTORY") == 2
    assert "nothing there" in said
    assert "not run" in said


# --- fstab ---


def test_mount_a_takes_a_line_of_fstab_once(machine: Machine) -> None:
    every = "nofail,_netdev,x-systemd.requires-mounts-for=/var,X-foo=bar,comment=ours,lazytime,nodiratime"
    add_to_fstab(machine, f"ttm {MNT} ttmfs size=64m,mode=1777,{every} 0 0")
    assert machine.run("mount -a; mount -a") == ""
    assert machine.run(f"findmnt -n -o TARGET {MNT}") == f"{MNT}\n", "once"
    found = config(machine)
    assert (found["size"], found["mode"]) == (64 << 20, "1777")
    machine.run(f"umount {MNT}; mount {MNT}; test $(stat -c %a {MNT}) = 1777; umount ttm")


def test_a_line_of_fstab_names_the_log(machine: Machine) -> None:
    add_to_fstab(machine, f"ttm {MNT} ttmfs size=8m,log=/var/log/fstab.log,log_level=debug 0 0")
    machine.run("mount -a")
    kill_daemon(machine)
    machine.run(f"mkdir {MNT}/after; umount {MNT}")

    def has_lines() -> bool:  # a thread writes them, and a kill loses the last ones
        text = machine.run("cat /var/log/fstab.log")
        return "mkdir(1, b'after'" in text and "ttmfs-keeper[" in text

    wait_until(has_lines, "the lines of daemon and keeper")
    machine.run("rm /var/log/fstab.log")


def test_a_noauto_line_is_mounted_only_on_request(machine: Machine) -> None:
    add_to_fstab(machine, f"ttm {MNT} fuse.ttmfs noauto,defaults,size=64m 0 0")
    machine.run(f"mount -a; findmnt {MNT}", code=1)
    machine.run(f"mount {MNT}; findmnt -n {MNT}")


def test_only_the_user_who_mounted_through_fstab_can_unmount(machine: Machine) -> None:
    machine.run(
        f"chown {ALICE} {MNT}; cp /etc/passwd /run;"
        f"echo alice:x:{ALICE}:{ALICE}::/:/bin/sh >>/etc/passwd; echo bob:x:{BOB}:{BOB}::/:/bin/sh >>/etc/passwd"
    )
    add_to_fstab(machine, f"ttm {MNT} ttmfs user,noauto,size=16m 0 0")
    alice, bob = (f"setpriv --reuid {user} --regid {user} --clear-groups env -C /" for user in (ALICE, BOB))
    try:
        machine.run(f"{alice} mount {MNT} && {alice} mkdir {MNT}/a")
        assert {"noexec", "nosuid", f"user_id={ALICE}"} <= set(
            machine.run(f"findmnt -n -o OPTIONS {MNT}").strip().split(",")
        )
        assert machine.run(f"{alice} stat -c %u {MNT} {MNT}/a") == f"{ALICE}\n{ALICE}\n"
        assert "must be superuser" in machine.run(f"{bob} umount {MNT}", code=32)
        machine.run(f"{alice} umount {MNT}")
        machine.run(f"{bob} mount {MNT}", code=32)  # the directory is not his
    finally:
        machine.run(f"cp /run/passwd /etc/passwd; chown 0 {MNT}")


# --- systemd ---


@contextlib.contextmanager
def started(machine: Machine, line: str) -> Iterator[Unit]:
    add_to_fstab(machine, line)
    mount = unit(machine)
    mount("start")
    try:
        yield mount
    finally:
        machine.call(f"systemctl stop {mount.name}")


def test_the_unit_that_systemd_makes_of_the_line_keeps_every_page_until_it_is_stopped(machine: Machine) -> None:
    with started(machine, f"ttm {MNT} ttmfs size=64m 0 0") as mount:
        assert mount.state == ("active", "mounted")
        first = config(machine)
        for pid in first["daemon_pid"], first["keeper_pid"]:
            assert "/mnt-ttm.mount" in machine.run(f"cat /proc/{pid}/cgroup")
        kill_daemon(machine)
        machine.run(f"kill -KILL {first['keeper_pid']}")
        wait_until(lambda: config(machine)["keeper_pid"] not in (None, first["keeper_pid"]), "another keeper")
        machine.run("systemctl daemon-reload; systemctl daemon-reexec")
        kill_daemon(machine)
        mount("reload", code=1)
        assert any("cannot be remounted" in str(entry["MESSAGE"]) for entry in mount.journal())
        assert mount.state == ("active", "mounted")
        assert machine.run(f"head -c 4 {MNT}/a/7") == "kept"
        mount("stop")
        machine.run(f"findmnt {MNT}", code=1)
        wait_until(lambda: not keepers(machine), "the end of all")
        assert mount.state == ("inactive", "dead")


def test_a_unit_over_a_store_is_restarted_at_once_with_every_page(machine: Machine) -> None:
    machine.run("mkdir -p /var/kept")
    with started(machine, f"ttm {MNT} ttmfs store=/var/kept,backup_size=1m 0 0") as mount:
        machine.run(f"mkdir {MNT}/a; echo kept >{MNT}/a/7")
        mount("restart")
        assert machine.run(f"head -c 4 {MNT}/a/7") == "kept"


def test_a_unit_that_cannot_mount_fails_and_says_why(machine: Machine) -> None:
    add_to_fstab(machine, f"ttm {MNT} ttmfs siez=64m 0 0")
    mount = unit(machine)
    mount("start", code=1)
    assert mount.state == ("failed", "failed")
    assert any("perhaps 'size'" in str(entry["MESSAGE"]) for entry in mount.journal())
    mount("reset-failed")


def test_an_automount_mounts_at_first_access_and_survives_a_kill(machine: Machine) -> None:
    """The process that mounts for an automount must stay in its process group, or would wait for itself."""
    add_to_fstab(machine, f"ttm {MNT} ttmfs size=64m,x-systemd.automount,x-systemd.mount-timeout=15 0 0")
    automount = unit(machine, "automount")
    automount("start")
    try:
        assert machine.run(f"findmnt -n -o FSTYPE {MNT}") == "autofs\n"
        for _ in range(2):
            assert machine.run(f"ls {MNT}") == ""
            assert machine.run(f"findmnt -n -o FSTYPE {MNT}").split() == ["autofs", "fuse.ttmfs"]
            kill_daemon(machine)
            machine.run(f"umount {MNT}")
    finally:
        automount("stop")


# --- installing ---


def test_install_does_not_replace_foreign_files(machine: Machine) -> None:
    machine.run("mv /sbin/mount.ttmfs /run/ours; echo theirs >/sbin/mount.ttmfs")
    try:
        assert "/sbin/mount.ttmfs does not belong to ttmfs" in machine.run("scripts/install.sh", code=1)
        assert machine.run("cat /sbin/mount.ttmfs") == "theirs\n"
    finally:
        machine.run("mv -f /run/ours /sbin/mount.ttmfs")


def test_man_finds_the_installed_manual_pages(machine: Machine) -> None:
    for page in "1 ttmfs", "5 ttmfs", "8 mount.ttmfs", "8 mount.fuse.ttmfs":
        section, name = page.split()
        machine.run(f"test -s /usr/local/share/man/man{section}/{name}.{section}")


def test_uninstall_removes_only_installed_files(machine: Machine) -> None:
    helpers, home = " ".join(f"/sbin/{name}" for name in HELPERS), "/usr/local/lib/ttmfs"
    links = "find /sbin/ /usr/local/bin /usr/local/lib/systemd /usr/local/share/man "
    links += "'(' -lname '*ttmfs*' -o -name '*ttmfs*' ')'"
    machine.run(f"PREFIX=/opt/other scripts/install.sh uninstall; ls {helpers}")
    assert len(machine.run(links).split()) > 10
    machine.run(f"{links} -print0 | tar -cPf /run/links.tar --null -T -; cp -al {home} {home}.kept")
    try:
        machine.run("make uninstall")
        assert machine.run(links) == ""
        machine.run(f"ls -d {home}", code=2)
    finally:
        machine.run(f"mv {home}.kept {home}; tar -xPf /run/links.tar")
