"""Where the log goes (`log=`), what its lines look like, and its level, also across kills of daemon and keeper."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import (
    MOUNT_COMMAND,
    MOUNT_PY,
    Mount,
    attribute,
    descriptors,
    mounts,
    raises_errno,
    run,
    set_attribute,
    stopped,
    wait_until,
)
from stores import ALICE, Place, acting_as
from ttmfs.recovery import log_sink
from ttmfs.recovery.log_sink import File, StandardError, make_sink

TTMFS = f"{sys.executable} -m ttmfs"
COMMAND = f"{sys.executable} -W error {MOUNT_PY}"
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"


@contextlib.contextmanager
def in_background(mountpoint: Path, options: str) -> Iterator[dict[str, object]]:
    """A mount that was left in the background, with what its .config says."""
    assert run(f"{COMMAND} {mountpoint} -o size=1m,standby=off,{options}") == ""
    try:
        yield json.loads((mountpoint / ".config").read_text())
    finally:
        run(f"umount {mountpoint}")
        wait_until(lambda: str(mountpoint) not in mounts(), "the end of the mount")


def test_a_file_has_the_lines_of_daemon_and_keeper_with_their_times(mountpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "ttmfs.log"
    with in_background(mountpoint, f"log={file}") as config:
        assert file.stat().st_mode & 0o7777 == 0o640
        run(f"mkdir {mountpoint}/.a", code=1)
        wait_until(lambda: "refused" in file.read_text(), "the line, which a thread writes")
        os.kill(int(str(config["daemon_pid"])), signal.SIGKILL)
        (mountpoint / "a").mkdir()
        wait_until(lambda: "taking over" in file.read_text(), "the line of the next daemon")
        wait_until(lambda: file.read_text().count("serving") == 2, "the last line of its start")
        daemon_pid = json.loads((mountpoint / ".config").read_text())["daemon_pid"]
        assert [path for path in descriptors(daemon_pid) if path == str(file)] == [str(file)]
    lines = file.read_text().splitlines()
    for said in (
        rf"{STAMP} info ttmfs\[\d+\]: serving {mountpoint}",
        rf"{STAMP} info ttmfs\[\d+\]: refused: mkdir for user 0, process \d+: EPERM: ",
        rf"{STAMP} warning ttmfs-keeper\[{config['keeper_pid']}\]: the daemon \d+ of \S+ was killed by signal 9",
        rf"{STAMP} info ttmfs\[\d+\]: taking over {mountpoint}",
    ):
        assert any(re.match(said, line) for line in lines), (said, lines)
    assert all(re.match(STAMP, line) for line in lines)


def test_rescue_is_not_misled_by_the_directory_of_a_log_file(mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with in_background(mountpoint, f"log={tmp_path}/logs/log") as config:
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(b"kept")
        for number, source in enumerate((config["keeper_pid"], config["daemon_pid"])):
            run(f"mkdir {mountpoint}/.a", code=1)  # a line opens the file
            assert "1 of 1 backups" in run(f"{TTMFS} rescue {source} {tmp_path}/copy{number}")
            assert (tmp_path / f"copy{number}/a").read_bytes()[:4] == b"kept"


def test_a_renamed_file_is_made_again(mountpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "ttmfs.log"
    with in_background(mountpoint, f"log={file}") as config:
        file.rename(tmp_path / "ttmfs.log.1")
        run(f"mkdir {mountpoint}/.a", code=1)
        wait_until(file.exists, "the new file")
        wait_until(lambda: "refused: mkdir" in file.read_text(), "the line")
        file.unlink()
        os.kill(int(str(config["daemon_pid"])), signal.SIGKILL)
        (mountpoint / "a").mkdir()
        wait_until(lambda: file.exists() and "ttmfs-keeper" in file.read_text(), "the keeper's line")
    assert "refused" not in (tmp_path / "ttmfs.log.1").read_text()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("ttmfs.log", "is no place for a log: write auto, journal, syslog, stderr, or the absolute path of a file"),
        ("{mnt}/log", "lies below the mount point"),
        ("{tmp}/none/log", "No such file or directory"),
        ("{tmp}", "directory"),
        ("{tmp}/link", "symbolic link"),
        ("{tmp}/pipe", "No such device|is not a regular file"),
    ],
)
def test_a_wrong_place_for_the_log_is_refused(mountpoint: Path, tmp_path: Path, log: str, message: str) -> None:
    (tmp_path / "link").symlink_to("ttmfs.log")
    os.mkfifo(tmp_path / "pipe")
    said = run(f"{COMMAND} {mountpoint} -o size=1m,log={log.format(mnt=mountpoint, tmp=tmp_path)} 2>&1 || true")
    assert re.fullmatch(f"mount.py: .*({message}).*\n", said)
    assert str(mountpoint) not in mounts()


def test_another_users_file_in_a_public_directory_is_refused_where_the_kernel_protects(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "log").touch()
    os.chown(tmp_path / "log", ALICE, ALICE)
    is_protected = Path("/proc/sys/fs/protected_regular").read_text() != "0\n"
    file = File(str(tmp_path / "log"), "ttmfs")
    with raises_errno(13) if is_protected else contextlib.nullcontext():
        file.open()
    file.close()


def test_a_log_in_another_ttmfs_is_refused(mount: Mount, tmp_path: Path) -> None:
    (mount.path / "a").mkdir()
    (tmp_path / "other").mkdir()
    said = run(f"{COMMAND} {tmp_path}/other -o size=1m,log={mount.path}/a/1", code=1)
    assert "it lies in a ttmfs" in said


def test_the_level_changes_while_the_mount_serves_and_survives_a_kill(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m") as mount:
        mount.expect_restarts()
        mount.expect_log(r"mount.py: \w+\(|mount.py: pyfuse-")
        loop = re.compile(r'loop="(\w+)"')
        before = loop.findall((mountpoint / ".stats").read_text())
        assert run(f"{TTMFS} log {mountpoint}").startswith("level: info\nlog: standard error")
        assert "level: debug" in run(f"{TTMFS} log {mountpoint} debug")
        assert loop.findall((mountpoint / ".stats").read_text()) == ["python"]
        (mountpoint / "a").mkdir()
        wait_until(lambda: any("mkdir(1, b'a'" in line for line in mount.log), "the line of the request")
        mount.kill()
        (mountpoint / "b").mkdir()
        assert attribute(mountpoint, "log_level") == "debug"
        wait_until(lambda: any("mkdir(1, b'b'" in line for line in mount.log), "the line of the next daemon")
        assert json.loads(run(f"{TTMFS} log --json {mountpoint} info"))["log_level"] == "info"
        assert loop.findall((mountpoint / ".stats").read_text()) == before
        count = len(mount.log)
        (mountpoint / "c").mkdir()
        assert not any("b'c'" in line for line in mount.log[count:])
        with raises_errno(22):
            set_attribute(mountpoint, "log_level", "loud")


def test_a_level_leaves_out_the_lines_below_it(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m,log_level=info") as mount:
        run(f"{TTMFS} log {mountpoint} error")
        run(f"mkdir {mountpoint}/.a", code=1)
        run(f"{TTMFS} log {mountpoint} info")
        run(f"rmdir {mountpoint}/.stats", code=1)
        run(f"ln -s a {mountpoint}/b", code=1)
        assert not any("mkdir" in line for line in mount.log)


def test_a_stranger_cannot_change_the_level(place: Place) -> None:
    with place.directory("log") as path, Mount(path, "size=1m,mode=1777,allow_other", cwd=place.path):
        with acting_as(ALICE), raises_errno(1):
            set_attribute(path, "log_level", "debug")
        assert attribute(path, "log_level") == "info"


def test_standard_error_gets_the_time_in_the_background_too(mountpoint: Path, tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "w") as log:
        command = [*MOUNT_COMMAND, str(mountpoint), "-o", "size=1m,standby=off,log=stderr"]
        subprocess.run(command, stderr=log, check=True, timeout=60)
    try:
        run(f"mkdir {mountpoint}/.a", code=1)
        wait_until(lambda: "refused" in (tmp_path / "stderr").read_text(), "the line")
    finally:
        run(f"umount {mountpoint}")
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert re.match(rf"{STAMP} info ttmfs\[\d+\]: refused: mkdir", lines[-1]) or "refused" in "".join(lines)


def test_a_reader_that_stops_reading_standard_error_does_not_stop_the_mount(mountpoint: Path) -> None:
    command = [*MOUNT_COMMAND, "-f", str(mountpoint), "-o", "size=1m,standby=off,debug"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:  # nobody reads it
        try:
            wait_until(lambda: str(mountpoint) in mounts(), "the mount")
            (mountpoint / "a").mkdir()
            for n in range(1, 500):
                (mountpoint / f"a/{n % 200 + 1}").write_bytes(b"a")  # several lines each: more than a pipe holds
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_the_journal_gets_messages_with_priorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_sink, "JOURNAL_SOCKET", str(tmp_path / "socket"))
    sink = make_sink("journal", "ttmfs")
    sink.write(log_sink.ERROR, "there is none yet")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "socket"))
        sink.write(log_sink.WARNING, "two\nlines, one with \udcff")
        message = journal.recv(4096)
        assert message.startswith(b"PRIORITY=4\nSYSLOG_IDENTIFIER=ttmfs\n")
        text = b"two\nlines, one with \\udcff"
        assert message.endswith(b"MESSAGE\n" + len(text).to_bytes(8, "little") + text + b"\n")
        for _ in range(2000):  # far more than its queue takes
            sink.write(log_sink.INFO, "again")


def test_a_file_that_blocks_does_not_block_its_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, hold, held = File(str(tmp_path / "log"), "ttmfs"), threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        hold.wait(20)

    monkeypatch.setattr(sink, "_reopen_if_renamed", wait)
    for n in range(2000):
        sink.write(log_sink.INFO, f"line {n}")
    assert held.wait(10)
    sink.flush(0.01)  # it does not wait for it either
    hold.set()
    wait_until(lambda: "line 1999" in (tmp_path / "log").read_text(), "the last line")
    assert "line 999\n" not in (tmp_path / "log").read_text()
    sink.flush(5)
    sink.close()


def test_a_log_on_a_filesystem_that_hangs_delays_no_takeover(mountpoint: Path, tmp_path: Path) -> None:
    """Another filesystem, whose server is stopped, is mounted over the directory of the log."""
    for name in "logs", "source":
        (tmp_path / name).mkdir()
    with in_background(mountpoint, f"log={tmp_path}/logs/log") as config:
        with subprocess.Popen(["bindfs", "-f", "-o", "nonempty", tmp_path / "source", tmp_path / "logs"]) as server:
            try:
                wait_until(lambda: str(tmp_path / "logs") in Path("/proc/mounts").read_text(), "the mount")
                with stopped(server.pid):
                    os.kill(int(str(config["daemon_pid"])), signal.SIGKILL)
                    run(f"timeout 20 mkdir {mountpoint}/a")
            finally:
                run(f"umount -l {tmp_path}/logs")
                server.kill()  # the next daemon has the directory open, so the unmounting alone does not end it
        wait_until(lambda: "ttmfs-keeper" in (tmp_path / "logs/log").read_text(), "the keeper's line")


def test_a_log_in_a_ttmfs_that_was_mounted_later_delays_no_takeover(mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with in_background(mountpoint, f"log={tmp_path}/logs/log") as config:
        run(f"mount --bind {mountpoint} {tmp_path}/logs")
        try:
            os.kill(int(str(config["daemon_pid"])), signal.SIGKILL)
            run(f"timeout 20 mkdir {mountpoint}/a")
        finally:
            run(f"umount {tmp_path}/logs")


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_sink, "SYSLOG_SOCKET", str(tmp_path / "syslog"))
    sink = File(str(tmp_path / "log"), "ttmfs")
    sink.open()
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(sink, "_reopen_if_renamed", lambda: os.dup2(full, sink._fd, inheritable=False))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "syslog"))
        syslog.settimeout(10)
        sink.write(log_sink.WARNING, "kept elsewhere")
        assert b"cannot be written: No space left on device" in syslog.recv(1000)
        assert syslog.recv(1000).startswith(b"<28>ttmfs[")
    sink.flush(5)
    sink.close()
    os.close(full)


def test_the_keeper_says_in_a_file_why_it_cannot_start_a_daemon(mountpoint: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    file = tmp_path / "log"
    command = f"{python} {MOUNT_PY} {mountpoint} -o size=1m,standby=off,log={file}"
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    assert run(command, env=environment) == ""
    config = json.loads((mountpoint / ".config").read_text())
    python.unlink()
    os.kill(int(str(config["daemon_pid"])), signal.SIGKILL)
    try:
        wait_until(lambda: f"{python}: No such file or directory" in file.read_text(), "the reason")
    finally:
        python.symlink_to(sys.executable)
        wait_until(lambda: "taking over" in file.read_text(), "the next daemon")
        run(f"umount {mountpoint}")
        wait_until(lambda: str(mountpoint) not in mounts(), "the end of the mount")


def test_a_terminal_that_nobody_reads_does_not_stop_the_mount(mountpoint: Path) -> None:
    terminal, standard_error = pty.openpty()
    command = [*MOUNT_COMMAND, "-f", str(mountpoint), "-o", "size=1m,standby=off,debug"]
    with subprocess.Popen(command, stderr=standard_error) as process:
        try:
            wait_until(lambda: str(mountpoint) in mounts(), "the mount")
            (mountpoint / "a").mkdir()
            for n in range(1, 1000):  # several lines each: more than a terminal holds
                (mountpoint / f"a/{n % 200 + 1}").write_bytes(b"a")
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    os.close(standard_error)
    os.close(terminal)


def test_standard_error_has_priorities_only_if_it_is_the_journal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    StandardError("mount.py", has_time=False).write(log_sink.INFO, "hello")
    StandardError("ttmfs", has_time=True).write(log_sink.INFO, "a\nb")
    found = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    StandardError("", has_time=True).write(log_sink.ERROR, "a\nb")
    first, second, third = capfd.readouterr().err.splitlines()
    assert first == "mount.py: hello"
    assert re.fullmatch(rf"{STAMP} info ttmfs\[\d+\]: a \| b", second)
    assert third == "<3>a | b"
