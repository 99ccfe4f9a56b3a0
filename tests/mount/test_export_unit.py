"""The unit ttmfs-export.service under a real systemd: what it shows, what it may do, and how it ends."""

import time

import pytest

from harness import wait_until
from systemd_machine import Machine, Unit

pytestmark = pytest.mark.serial

SCRAPE = "curl -s --max-time 20 http://127.0.0.1:10900/metrics"


def test_the_unit_shows_mounts_that_come_and_go_and_one_that_hangs_does_not_stop_it(machine: Machine) -> None:
    exporter = Unit(machine, "ttmfs-export.service")
    machine.run("mount --make-rshared /")  # as every machine is that is no container
    machine.run("mkdir -p -m 700 /root/closed; mkdir -p /root/closed/ttm /mnt/shown")
    machine.run("mount -t ttmfs ttm /root/closed/ttm -o size=16m")
    exporter("start")

    def shows(line: str) -> bool:
        time.sleep(1)  # what is older is read again
        return line in machine.call(SCRAPE).stdout

    try:
        wait_until(lambda: shows('ttmfs_size_bytes{mount="/root/closed/ttm"}'), "the mount", 30)
        machine.run("mount -t ttmfs ttm /mnt/shown -o size=16m")
        wait_until(lambda: shows('ttmfs_up{mount="/mnt/shown"} 1.0'), "the mount that came", 30)
        pids = machine.run("grep -ho '_pid\": [0-9]*' /mnt/shown/.config | grep -o '[0-9]*'").split()
        machine.run(f"kill -s STOP {' '.join(pids)}")
        wait_until(lambda: shows('ttmfs_up{mount="/mnt/shown"} 0.0'), "the mount that hangs", 30)
        exporter("restart")
        assert exporter.state == ("active", "running"), "it starts beside a mount that hangs"
        wait_until(lambda: shows('ttmfs_up{mount="/mnt/shown"} 0.0'), "the mount that hangs", 30)
        assert shows('ttmfs_up{mount="/root/closed/ttm"} 1.0')
        machine.run(f"kill -s CONT {' '.join(pids)}; umount /mnt/shown")
        wait_until(lambda: not shows('mount="/mnt/shown"'), "the mount that went", 30)
        assert machine.run("touch /mnt/shown/x && rm /mnt/shown/x") == "", "it holds no mount"
    finally:
        exporter("stop")
        machine.call("umount -l /mnt/shown; umount /root/closed/ttm; mount --make-rprivate /")
    assert exporter.state == ("inactive", "dead")


def test_the_unit_has_one_right_of_root(machine: Machine) -> None:
    exporter = Unit(machine, "ttmfs-export.service")
    exporter("start")
    try:
        status = machine.path(f"/proc/{exporter.main_pid}/status").read_text()
        (capabilities,) = (line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
        assert int(capabilities, 16) == 1 << 2, "CAP_DAC_READ_SEARCH"
        exposure = machine.run("systemd-analyze security --no-pager ttmfs-export | tail -1")
        assert float(exposure.split("service: ")[1].split()[0]) < 4, exposure
    finally:
        exporter("stop")


def test_the_unit_does_not_try_again_what_fails_always(machine: Machine) -> None:
    exporter = Unit(machine, "ttmfs-export.service")
    machine.write("/etc/ttmfs/export.conf", "EXPORT=--listen nowhere\n")
    try:
        machine.call("systemctl start ttmfs-export")
        wait_until(lambda: exporter.state == ("failed", "failed"), "the failure")
        assert any("is not ADDRESS:PORT" in str(entry["MESSAGE"]) for entry in exporter.journal())
        machine.write("/etc/ttmfs/export.conf", "EXPORT=--listen 127.0.0.1:10901 /mnt/none\n")
        exporter("start")
        scrape = SCRAPE.replace("10900", "10901")
        wait_until(lambda: 'ttmfs_up{mount="/mnt/none"} 0.0' in machine.call(scrape).stdout, "its metrics", 30)
    finally:
        machine.call("systemctl stop ttmfs-export; systemctl reset-failed ttmfs-export; rm /etc/ttmfs/export.conf")
