"""mount.py from the command line: options, exit statuses, messages, and each way in which the daemon ends."""

import contextlib
import errno
import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

import ttmfs
from harness import (
    MOUNT_COMMAND,
    MOUNT_PY,
    REPOSITORY,
    Mount,
    children,
    daemons,
    descriptors,
    mounts_below,
    raises_errno,
    remaining,
    run,
    wait_until,
)
from stores import ControlGroup
from ttmfs.options import TABLE, ExitCode, Options

HAS_COMPILED = importlib.util.find_spec("ttmfs.fuse.compiled_requests") is not None
LOOP = "compiled" if HAS_COMPILED and os.environ.get("TTMFS_LOOP") != "python" else "python"
"""What answers the plain requests of a mount in memory."""

COMMAND = shlex.join([sys.executable, "-W", "error", str(MOUNT_PY)])
ENDS_BY_SIGNAL = ["kill -TERM $PID", "kill -INT $PID", "kill -HUP $PID", "kill -TERM $DAEMON"]
ENDS_LAZILY = ['umount -l "$MNT"', 'fusermount3 -u -z "$MNT"']
ENDS_AT_ONCE = ['umount "$MNT"', 'fusermount3 -u "$MNT"']
GONE = {errno.ENOTCONN, errno.ECONNABORTED}


def mounted() -> set[Path]:
    """What the mount table has, whatever the names look like there, and whether the mounts answer or not."""
    rows = (row.split(b" ") for row in Path("/proc/self/mounts").read_bytes().split(b"\n") if row)
    return {Path(os.fsdecode(re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), row[1]))) for row in rows}


def is_mounted(path: Path) -> bool:
    return path in mounted()


@pytest.fixture(autouse=True)
def ended(tmp_path: Path) -> Iterator[None]:
    """End what a failed test has left in the background, so that the next test is not affected, and fail for it."""
    before = children()
    yield
    left = sorted(path for path in mounted() if path.is_relative_to(tmp_path))
    for path in left:
        subprocess.run(["fusermount3", "-u", "-z", "--", path], check=False)

    try:
        wait_until(lambda: not remaining(before), "every process to end", 5)
    except AssertionError:
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    assert not left


def mount_py(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", MOUNT_PY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)


class Daemon:
    """A ttmfs in the background, started by mount.py, for the time of a ``with``.

    It must end with status 0. `pid` is its keeper, an orphan that this process adopts. `daemon` is the keeper's child.
    """

    def __init__(self, path: Path, *arguments: str, says: str = "", **more: Any) -> None:
        self.path, self._arguments, self._says, self._more = path, arguments, says, more
        self._status: int | None = None

    def __enter__(self) -> Self:
        before = children()
        done = mount_py(*self._arguments, self.path, **self._more)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", self._says)
        (self.pid,) = children() - before  # an orphan of ours
        (self.daemon,) = daemons(self.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_mounted(self.path):
            subprocess.run(["fusermount3", "-u", "-z", "--", self.path], check=True)
        try:
            status = self.wait()
        except AssertionError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        assert status == 0 or kind

    def end(self, command: str) -> None:
        """End it, as a user would."""
        run(command, env={**os.environ, "PID": str(self.pid), "DAEMON": str(self.daemon), "MNT": str(self.path)})

    def ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    def wait(self) -> int:
        """Its exit status."""
        wait_until(self.ended, "the daemon's end")
        assert self._status is not None
        return self._status


CLIENT = """
import os, sys
verb, backup = sys.argv[1:]
page, image = (os.open(f"{backup}/{name}", os.O_RDWR) for name in ("1", ".image"))
directory = os.open(backup, os.O_RDONLY)
data = bytes(1 << 20)
def once():
    if verb != "write": os.pread(page, 4096, 0), os.pread(image, 1 << 20, 0)
    if verb != "read": os.pwrite(page, data[:4096], 0), os.pwrite(image, data, 0)
    if verb == "list": os.listdir(directory), os.stat(f"{backup}/1"), os.fstat(page)
once()
print("ready", flush=True)
if verb == "hold": sys.stdin.readline()
try:
    while True: once()
except OSError as error:
    sys.exit(error.errno)
"""


@contextlib.contextmanager
def clients(mountpoint: Path, *verbs: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that read, write and list a backup, or only hold it open until told to end.

    Each exits with the errno that it gets.
    """
    (mountpoint / "a").mkdir()
    (mountpoint / "a/1").touch()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, verb, mountpoint / "a"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for verb in verbs
    ]
    try:
        for client in started:
            assert client.stdout
            assert client.stdout.readline() == "ready\n"
        yield started
    finally:
        for client in started:
            client.kill()
            client.communicate(timeout=10)


# --- to the background, and not before it answers ---


def test_exit_status_0_means_that_the_mount_answers(mountpoint: Path) -> None:
    """Ten times in a row, the next call finds the mount, and every end restores the directory."""
    for number in range(10):
        with Daemon(mountpoint, "-o", f"size={number + 1}m") as daemon:
            assert os.statvfs(mountpoint).f_blocks == (number + 1) * 256
            (mountpoint / "a").mkdir()
            daemon.end('umount "$MNT"')
            assert not is_mounted(mountpoint)
        assert list(mountpoint.iterdir()) == []


def test_a_command_substitution_does_not_wait_for_the_daemon(mountpoint: Path) -> None:
    before = children()
    assert run(f'echo "[$({COMMAND} {mountpoint} 2>&1)] $?"') == "[] 0\n"
    (pid,) = children() - before
    run(f"umount {mountpoint}")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_daemon_is_detached(mountpoint: Path, tmp_path: Path) -> None:
    """Daemon and keeper outlive their terminal, hold nothing of it, and keep no directory busy."""
    before = children()
    command = f"cd {tmp_path} && {COMMAND} mnt && test -e mnt/.stats && tty && echo mounted"
    assert re.fullmatch(r"/dev/pts/\d+\s+mounted\s+", run(f"script -qec {shlex.quote(command)} /dev/null"))
    (keeper,) = children() - before  # the terminal is gone
    try:
        assert (mountpoint / ".stats").read_bytes()
        for pid in keeper, *children(keeper):
            assert os.getsid(pid) == os.getpgid(pid) == keeper
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            assert fields[4] == "0"  # no controlling terminal
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
            assert not [name for name in descriptors(pid) if re.search(r"/(pts|tty)", name)]
        assert len(daemons(keeper)) == 1
    finally:
        run(f"umount {mountpoint}")
        assert os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]) == 0


def test_in_the_background_the_log_goes_to_syslog(mountpoint: Path, tmp_path: Path) -> None:
    """The test has its own syslog, in a private mount namespace."""
    script = tmp_path / "with_syslog"
    script.write_text(f"""
set -e
mkdir old; mount --rbind /dev old; mount -t tmpfs none /dev
for name in null fuse; do touch /dev/$name; mount --bind old/$name /dev/$name; done
{sys.executable} -c 'if True:
    import socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind("/dev/log")
        log.settimeout(20)
        print("bound", flush=True)
        while b"rmdir" not in (line := log.recv(65536)): print(line.decode())
    ' > syslog & log=$!
until grep -q bound syslog; do kill -0 $log; sleep 0.01; done
{COMMAND} -o debug mnt
mkdir mnt/a; rmdir mnt/a; wait $log; umount mnt
""")
    run(f"unshare -m --propagation private bash {script}", cwd=tmp_path)
    assert re.search(r"^<31>ttmfs\[\d+\]: mkdir\(1, b'a', pid=\d+\)", (tmp_path / "syslog").read_text(), re.MULTILINE)
    assert not is_mounted(mountpoint)


def test_mounting_over_a_directory_with_files_prints_a_warning(tmp_path: Path) -> None:
    """The daemon mounts over a home directory, as mount(8) does, and warns the user at once."""
    (mountpoint := tmp_path / "mnt").mkdir()
    (mountpoint / "file").touch()
    try:
        assert "mnt is not empty: what is in it is hidden" in run(f"{COMMAND} mnt -o size=1m 2>&1", cwd=tmp_path)
        assert "another ttmfs is mounted at /" in run(f"{COMMAND} mnt -o size=1m 2>&1", cwd=tmp_path)
    finally:
        run("umount mnt; umount mnt", cwd=tmp_path)
    (mountpoint / "file").unlink()
    assert not run(f"{COMMAND} mnt -o size=1m 2>&1; umount mnt", cwd=tmp_path)


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("mount.py", 1, "required: MNT"),
        ("mount.py ttm mnt more", 1, "unrecognized arguments: more"),
        ("mount.py mnt --foregroud", 1, "unrecognized arguments: --foregroud"),
        ("mount.py mnt -o", 1, "-o: expected one argument"),
        ("mount.py mnt -o siez=1m", 1, "unknown option 'siez=1m', perhaps 'size'"),
        ("mount.py mnt -o size=lots", 1, "size: 'lots' is not a size: write bytes, or a number with k, m, g"),
        ("mount.py mnt -o size=0", 1, "size: 0 is not allowed"),
        ("mount.py mnt -o page_size=3k", 1, "page_size=3k: must be a power of two from 4k to 2m"),
        ("mount.py mnt -o uid=nessuno", 1, "uid: 'nessuno' is not a user of this machine"),
        ("mount.py -f mnt -o ro=1", 1, "ro is a flag and takes no value"),
        ("mount.py missing", 32, "missing does not exist; make it first: mkdir missing"),
        ("mount.py -f missing", 32, "missing does not exist"),
        ("mount.py file", 32, "file is not a directory"),
        ("mount.py /", 32, "a mount on / would hide /.*, which it needs"),
        ("mount.py -f /usr", 32, "a mount on /usr would hide /usr/.*; give an empty directory"),
        ("mount.py file/x", 32, "file/x: Not a directory"),
        ("mount.py loop", 32, "loop: Too many levels of symbolic links"),
        ("PATH=/nonexistent mount.py mnt", 2, "fusermount3 is not installed; install the package fuse3"),
        ("PATH=$PWD/bin mount.py mnt", 32, "fusermount3 cannot mount at .*/mnt: exit status 7"),
        ("NO_DEVICE mount.py mnt", 2, "fuse device not found, try 'modprobe fuse' first"),
        ("NO_DEVICE mount.py -f mnt", 2, "fuse device not found"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_a_documented_status(
    tmp_path: Path, mountpoint: Path, command: str, code: int, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/fusermount3").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "bin/fusermount3").chmod(0o755)
    (tmp_path / "no_device").write_text('mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; exec "$@"\n')
    command = command.replace("mount.py", COMMAND).replace("NO_DEVICE", "unshare -m bash no_device")
    done = subprocess.run(
        ["/bin/bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert re.fullmatch(f"mount.py: .*{message}.*\n", done.stderr)
    assert done.stderr.count("--help") == (code == 1)
    assert (done.stdout, done.returncode) == ("", code)
    assert code in set(ExitCode)
    assert not is_mounted(mountpoint)


def test_a_dead_mount_of_another_filesystem_is_reported_with_how_to_remove_it(mountpoint: Path) -> None:
    """After the advice is followed, the mount works."""
    here, there = socket.socketpair()
    with here, there:
        words = ["fusermount3", "-o", "fsname=none,subtype=other", "--", str(mountpoint)]
        environment = {**os.environ, "_FUSE_COMMFD": str(there.fileno())}
        subprocess.run(words, env=environment, pass_fds=[there.fileno()], check=True)
        _, (connection,), _, _ = socket.recv_fds(here, 1, 1)
    os.close(connection)
    with raises_errno(errno.ENOTCONN):
        mountpoint.stat()
    done = mount_py(mountpoint)
    assert done.returncode == ExitCode.FAILED
    match = re.fullmatch(r"mount.py: a dead mount is in the way at \S+; remove it: (fusermount3 -u .*)\n", done.stderr)
    assert match
    run(match[1])
    with Daemon(mountpoint):
        (mountpoint / "a").mkdir()


@pytest.mark.parametrize("options", ["keeper=on", "keeper=off"])
def test_the_next_mount_removes_a_dead_mount_of_ttmfs(mountpoint: Path, options: str) -> None:
    """SIGKILL to a daemon without a keeper, or to both, leaves a dead mount."""
    with Mount(mountpoint, options) as mount:
        (mountpoint / "a").mkdir()
        mount.kill_both()
        mount.wait()
        with raises_errno(errno.ENOTCONN):
            mountpoint.stat()
        with Daemon(mountpoint, says=f"mount.py: removing the dead ttmfs at {mountpoint}\n"):
            assert os.listdir(mountpoint) == []
            assert mounts_below(mountpoint) == [str(mountpoint)]


def killing(tmp_path: Path, mountpoint: Path, command: str) -> dict[str, str]:
    """An environment whose fusermount3 runs a command after it has mounted and before it passes the connection."""
    script = tmp_path / "fusermount3"
    script.write_text(f"""#!/bin/sh
/usr/bin/env -u PATH /bin/sh -c 'exec fusermount3 "$@"' sh "$@"; code=$?
case "$1" in -u) ;; *) grep -q " {mountpoint} " /proc/mounts && {command};; esac
exit $code
""")
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_mount_survives_the_death_of_the_process_that_waited_for_it(tmp_path: Path, mountpoint: Path) -> None:
    before = children()
    waits = "$(ps -o ppid= -p $(ps -o ppid= -p $PPID))"  # for the keeper, which is the daemon's parent
    done = mount_py(mountpoint, env=killing(tmp_path, mountpoint, f"kill -KILL {waits}"))
    assert done.returncode == -signal.SIGKILL
    (pid,) = children() - before
    wait_until(lambda: os.statvfs(mountpoint).f_blocks, "an answer")
    (mountpoint / "a").mkdir()
    run(f"umount {mountpoint}")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
@pytest.mark.usefixtures("mountpoint")
def test_standard_descriptors_may_be_closed(tmp_path: Path, closed: str) -> None:
    run(f"{COMMAND} mnt {closed} && mkdir mnt/a && echo x >mnt/a/1 && ls mnt/a && umount mnt", cwd=tmp_path)


def test_missing_packages_are_reported_with_what_to_do(mountpoint: Path) -> None:
    bare = [sys.executable, "-S", str(MOUNT_PY), str(mountpoint)]
    done = subprocess.run(bare, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.SYSTEM
    assert re.fullmatch(r"mount\.py: No module named '\w+'\. Run make once, .*\n", done.stderr)


@pytest.mark.parametrize("number", ["INT", "TERM", "HUP"])
@pytest.mark.parametrize("who", ["the command", "the keeper", "the daemon", "the foreground"])
def test_an_interruption_between_mounting_and_serving_leaves_nothing(
    tmp_path: Path, mountpoint: Path, number: str, who: str
) -> None:
    """The test's fusermount3 makes the signal come at the worst instant."""
    keeper = "$(ps -o ppid= -p $PPID)"
    whom = {"the daemon": "$PPID", "the command": f"$(ps -o ppid= -p {keeper})"}.get(who, keeper)
    foreground = ["-f"] * (who == "the foreground")
    done = mount_py(mountpoint, *foreground, env=killing(tmp_path, mountpoint, f"kill -{number} {whom}"))
    assert done.returncode == ExitCode.INTERRUPTED
    assert "Traceback" not in done.stderr
    wait_until(lambda: not is_mounted(mountpoint), "the mount to go")


# --- every end ---


@pytest.mark.parametrize("command", [*ENDS_BY_SIGNAL, *ENDS_LAZILY, *ENDS_AT_ONCE])
def test_every_way_of_ending_unmounts_and_releases_the_memory(mountpoint: Path, command: str) -> None:
    size = 160 << 20
    with ControlGroup(1 << 30) as group, Daemon(mountpoint, "-o", f"size={size}", preexec_fn=group.join) as daemon:
        (mountpoint / "a").mkdir()
        run(f"dd if=/dev/zero of={mountpoint}/a/.image bs=1M count=160 conv=notrunc")
        wait_until(lambda: group.shmem() > size // 2, "the memory to be counted")
        daemon.end(command)
        assert daemon.wait() == 0
        assert not is_mounted(mountpoint)
        wait_until(lambda: group.shmem() < size // 2, "the memory to be released")
    assert list(mountpoint.iterdir()) == []


def test_a_signal_while_the_memory_is_released_changes_nothing(mountpoint: Path) -> None:
    with Daemon(mountpoint, "-o", "size=2g") as daemon:
        (mountpoint / "a").mkdir()
        run(f"dd if=/dev/zero of={mountpoint}/a/.shmem bs=1M count=768 conv=notrunc")
        daemon.end('umount "$MNT" && for i in 1 2 3 4 5; do kill -TERM $PID $DAEMON; sleep 0.02; done || :')
        assert daemon.wait() == 0


@pytest.mark.parametrize("command", ENDS_BY_SIGNAL)
def test_a_signal_ends_the_mount_and_busy_clients_get_errors(mountpoint: Path, command: str) -> None:
    verbs = "read", "write", "list", "hold"
    with Daemon(mountpoint) as daemon, clients(mountpoint, *verbs) as working:
        daemon.end(command)
        assert daemon.wait() == 0
        assert not is_mounted(mountpoint)
        for verb, client in zip(verbs, working, strict=True):
            client.communicate("go on\n", timeout=10)
            assert client.returncode in GONE | ({errno.ENOENT} if verb == "list" else set())  # it goes by path


@pytest.mark.parametrize("command", ENDS_LAZILY)
def test_a_lazy_unmount_ends_when_the_last_client_closes(mountpoint: Path, command: str) -> None:
    with Daemon(mountpoint) as daemon:
        with clients(mountpoint, "read", "write", "list", "hold") as working:
            daemon.end(command)
            assert not is_mounted(mountpoint)
            assert working[2].wait(10) == errno.ENOENT  # it goes by path, and is told that there is none
            with pytest.raises(subprocess.TimeoutExpired):  # as on tmpfs, for what is open is theirs
                working[0].wait(1.5)
            assert [client.poll() for client in working] == [None, None, errno.ENOENT, None]
            assert not daemon.ended()
        assert daemon.wait() == 0


@pytest.mark.parametrize("command", ENDS_AT_ONCE)
def test_a_plain_unmount_is_refused_while_it_is_in_use(mountpoint: Path, command: str) -> None:
    with Daemon(mountpoint) as daemon:
        with clients(mountpoint, "read", "write", "hold") as working:
            with pytest.raises(AssertionError, match="busy"):
                daemon.end(command)
            assert [client.poll() for client in working] == [None, None, None]
            assert (mountpoint / "a/1").stat().st_size == 4096
        daemon.end(command)
        assert daemon.wait() == 0


def test_a_second_signal_does_not_disturb_the_end(mountpoint: Path) -> None:
    """It also comes while the daemon waits for the last clients."""
    with Daemon(mountpoint) as daemon, clients(mountpoint, "hold"):
        daemon.end("kill -TERM $PID")
        wait_until(lambda: not is_mounted(mountpoint), "the unmount")
        daemon.end("kill -TERM $PID; kill -INT $PID; kill -HUP $PID")
        assert daemon.wait() == 0


def test_a_signal_leaves_a_mount_on_top_alone(mountpoint: Path) -> None:
    with Daemon(mountpoint) as daemon:
        run(f"mount -t tmpfs over {mountpoint}")
        try:
            daemon.end("kill -TERM $PID")
            assert daemon.wait() == 0
            assert run(f"findmnt -no SOURCE -M {mountpoint}").split()[-1] == "over"
        finally:
            run(f"umount {mountpoint}; fusermount3 -u -z {mountpoint}")


# --- what findmnt shows ---


@pytest.mark.parametrize("source", ["gpu0", "a,b", "a b", "a\\b", "\\", "a\\,b,", "#1", "日本 ü", "a\tb"])
def test_the_source_is_shown_as_given(mountpoint: Path, source: str) -> None:
    with Daemon(mountpoint, source):
        (shown,) = json.loads(run(f"findmnt --json -M {mountpoint}"))["filesystems"]
        assert (shown["source"], shown["fstype"]) == (source, "fuse.ttmfs")
        assert {"rw", "nosuid", "nodev", "user_id=0"} <= set(shown["options"].split(","))
        assert run(f"df --output=source,fstype {mountpoint}").split()[-1] == "fuse.ttmfs"


@pytest.mark.parametrize("name", ["a b", "a,b", "a\\b", "a\\040b", "日本 ü", "tab\t", "line\nfeed", "-x"])
def test_the_mountpoint_may_have_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    for command in "kill -TERM $PID", 'umount "$MNT"':
        with Daemon(path) as daemon:
            assert is_mounted(path)
            (path / "a").mkdir()
            daemon.end(command)
            assert daemon.wait() == 0
            assert not is_mounted(path)


@pytest.mark.parametrize("name", ["mnt", "mnt/", "./mnt/../mnt", "link"])
@pytest.mark.usefixtures("mountpoint")
def test_the_mountpoint_may_be_relative_or_a_link(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("mnt")
    run(f"{COMMAND} {name} && mkdir mnt/a && umount mnt", cwd=tmp_path)


def test_the_mountpoint_may_be_the_working_directory(tmp_path: Path, mountpoint: Path) -> None:
    run(f"{COMMAND} .", cwd=mountpoint)
    run("mkdir mnt/a && umount mnt", cwd=tmp_path)


def test_mount_8_can_mount_through_the_fuse_helper(tmp_path: Path, mountpoint: Path) -> None:
    """mount.fuse3 runs the program before the "#" of a source, as a line in fstab may have it."""
    helper = tmp_path / "mount.ttmfs"
    helper.write_text(f'#!/bin/sh\nexec {COMMAND} "$@"\n')
    helper.chmod(0o755)
    run(f"mount -t fuse3 -o size=4m,noexec,nofail,_netdev {helper}#gpu0 {mountpoint}")
    try:
        (shown,) = json.loads(run(f"findmnt --json -M {mountpoint}"))["filesystems"]
        assert (shown["source"], shown["fstype"]) == ("gpu0", "fuse.ttmfs")
        assert "noexec" in shown["options"].split(",")
        assert os.statvfs(mountpoint).f_blocks * 4096 == 4 << 20
    finally:
        run(f"umount {mountpoint}")


# --- the options ---


def mount_options(path: Path) -> set[str]:
    return set(run(f"findmnt -no OPTIONS -M {path}").strip().split(","))


def test_the_default_budget_is_half_of_the_ram(mountpoint: Path) -> None:
    with Mount(mountpoint):
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(b"x" * 4096)
        config, shown = Options(), os.statvfs(mountpoint)
        assert shown.f_blocks * shown.f_frsize == config.size
        assert (mountpoint / "a/.image").stat().st_size == config.size
        root = mountpoint.stat()
        assert (root.st_uid, root.st_gid, stat.S_IMODE(root.st_mode)) == (os.getuid(), os.getgid(), 0o755)
        assert mount_options(mountpoint) >= {"rw", "nosuid", "nodev"}


def test_the_kernel_checks_mode_bits_if_other_users_have_access(mountpoint: Path) -> None:
    for options in "allow_other", "":
        with Mount(mountpoint, options):
            assert ("default_permissions" in mount_options(mountpoint)) == bool(options)
            page = mountpoint / "a/1"
            page.parent.mkdir(mode=0o000)
            page.write_bytes(b"#!/bin/sh\n")
            assert os.access(page, os.R_OK | os.W_OK)
            assert not os.access(page, os.X_OK), "no mode lets a page be run"
            assert os.access(page.parent, os.R_OK | os.W_OK | os.X_OK)
            with raises_errno(errno.EACCES):
                os.execv(page, ["1"])


@pytest.mark.parametrize("options", ["size=8m", "size=1g,size=8m", "size=8388607"])
def test_c16_size_is_the_budget(mountpoint: Path, options: str) -> None:
    with Mount(mountpoint, options + ",backup_size=9m"):
        shown = os.statvfs(mountpoint)
        assert shown.f_blocks * shown.f_frsize == shown.f_bfree * shown.f_frsize == 8 << 20
        (mountpoint / "a").mkdir()
        said = run(f"dd if=/dev/zero of={mountpoint}/a/.image bs=1M conv=notrunc", code=1)
        assert "No space left on device" in said
        assert len(os.listdir(mountpoint / "a")) == 2048


def test_nr_inodes_is_the_number_of_backups_plus_1(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=4m,nr_inodes=4"):
        assert os.statvfs(mountpoint).f_files == 4
        for name in "abc":
            (mountpoint / name).mkdir()
        with raises_errno(errno.ENOSPC):
            (mountpoint / "d").mkdir()
        (mountpoint / "a").rmdir()
        (mountpoint / "d").mkdir()


@pytest.mark.parametrize(
    ("options", "expected"),
    [("mode=1777", (0, 0, 0o1777)), ("uid=nobody,gid=1,mode=0700", (65534, 1, 0o700)), ("mode=0", (0, 0, 0))],
)
def test_mode_uid_and_gid_apply_to_the_root(mountpoint: Path, options: str, expected: tuple[int, int, int]) -> None:
    with Mount(mountpoint, options):
        root = mountpoint.stat()
        assert (root.st_uid, root.st_gid, stat.S_IMODE(root.st_mode)) == expected


def test_backup_size_is_the_size_of_a_new_backup(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=8m,backup_size=1m"):
        (mountpoint / "a").mkdir()
        assert os.getxattr(mountpoint / "a", "user.ttmfs.size") == b"1048576"
        (mountpoint / "a/256").touch()
        with raises_errno(errno.EFBIG):
            (mountpoint / "a/257").touch()


@pytest.mark.parametrize("size", ["4k", "64k", "2m"])
def test_page_size_is_the_size_of_a_page(mountpoint: Path, size: str) -> None:
    count = {"4k": 4096, "64k": 65536, "2m": 2 << 20}[size]
    with Mount(mountpoint, f"size=8m,page_size={size}"):
        assert os.getxattr(mountpoint, "user.ttmfs.page_size") == b"%d" % count
        assert os.statvfs(mountpoint).f_frsize == count
        (mountpoint / "a").mkdir()
        (mountpoint / "a/2").write_bytes(os.urandom(count))
        assert (mountpoint / "a/2").stat().st_size == count
        with (mountpoint / "a/.image").open("rb") as image:
            image.seek(count)
            assert image.read(count) == (mountpoint / "a/2").read_bytes()


def test_reserve_is_what_storing_leaves_free(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=8m,reserve=1000t"):
        assert os.statvfs(mountpoint).f_bavail == 0
        (mountpoint / "a").mkdir()
        with raises_errno(errno.ENOSPC):
            (mountpoint / "a/1").touch()
        assert os.listdir(mountpoint / "a") == []


@pytest.mark.parametrize(
    ("arguments", "present", "absent"),
    [
        (["-o", "allow_other"], {"allow_other"}, set()),
        (["-o", "noexec,noatime,sync,dirsync"], {"noexec", "noatime", "sync", "dirsync"}, {"relatime"}),
        (["-o", "suid,dev"], set(), {"nosuid", "nodev"}),
        (["-o", "suid,nosuid"], {"nosuid"}, set()),
        (["-o", "nosuid,suid,nosuid"], {"nosuid"}, set()),
        (["-o", "nosuid", "-o", "suid"], set(), {"nosuid"}),
        (["-o", "ro"], {"ro"}, {"rw"}),
        (["-o", "rw,ro"], {"ro"}, {"rw"}),
        (["-o", "ro", "-o", "rw"], {"rw"}, {"ro"}),
        (["-o", "defaults,_netdev,nofail,noauto,x-systemd.automount,comment=a b"], {"rw"}, {"_netdev", "nofail"}),
    ],
)
def test_options_of_mount_8_reach_the_kernel_and_the_last_counts(
    mountpoint: Path, arguments: list[str], present: set[str], absent: set[str]
) -> None:
    with Mount(mountpoint, argv=tuple(arguments)):
        assert mount_options(mountpoint) >= present
        assert not mount_options(mountpoint) & absent


def test_ro_refuses_every_change(mountpoint: Path) -> None:
    with Mount(mountpoint, "ro"):
        with raises_errno(errno.EROFS):
            (mountpoint / "a").mkdir()
        with raises_errno(errno.EROFS):
            mountpoint.chmod(0o700)
        assert (mountpoint / ".stats").read_bytes()


def test_debug_logs_every_operation(mountpoint: Path) -> None:
    with Mount(mountpoint, "debug") as mounted:
        mounted.expect_log("")
        run("mkdir a && head -c 4096 /dev/zero > a/1 && cat a/1 && df . && ls -l a", cwd=mountpoint)
        run("! rmdir a && rm a/1 && ! stat a/1 && rmdir a", cwd=mountpoint)
    for operation in "lookup mkdir create write open read release opendir readdir unlink rmdir statfs".split():
        assert any(re.search(rf" {operation}\(", line) for line in mounted.log), operation
    assert any(re.search(r" rmdir: ENOTEMPTY: ", line) for line in mounted.log)


def test_help_names_every_option_and_every_exit_code() -> None:
    done = mount_py("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"\[SOURCE\] MNT", done.stdout)
    for name in [*TABLE, "nosuid", "noatime", "_netdev", "SIGTERM", "fusermount3 -u"]:
        assert re.search(rf"\b{re.escape(name)}\b", done.stdout), name
    for code in ExitCode:
        assert re.search(rf"^  {code.value} +{re.escape(code.meaning)}$", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_the_version_option_prints_the_package_version() -> None:
    done = mount_py("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ttmfs {ttmfs.__version__}\n", "")


# --- .config and .stats ---


def test_config_shows_the_options_in_force(mountpoint: Path) -> None:
    options = "size=16m,nr_inodes=100,mode=1777,backup_size=1m,page_size=64k,reserve=1m,allow_other,noexec,standby=on"
    with Mount(mountpoint, options) as mount:
        who = {"daemon_pid": mount.pid, "keeper_pid": mount.process.pid, "loop": "python", "log_to": "terminal"}
        assert json.loads((mountpoint / ".config").read_text()) == Options.parse(options).as_dict() | who
        run(f"setfattr -n user.ttmfs.size -v 32m {mountpoint}")
        now = Options.parse(options, "size=32m").as_dict() | {"backup_size": 1 << 20}
        assert json.loads((mountpoint / ".config").read_text()) == now | who
    with Mount(mountpoint, "keeper=off") as mount:
        config = json.loads((mountpoint / ".config").read_text())
        assert (config["keeper"], config["daemon_pid"], config["keeper_pid"]) == ("off", mount.process.pid, None)
        assert config["loop"] == LOOP


def metrics(text: str) -> dict[str, float]:
    """The samples of a text in Prometheus' exposition format, parsed strictly."""
    label = r'[a-z_]+="(?:[^"\\\n]|\\[\\"n])*"'
    kinds: dict[str, str] = {}
    samples: dict[str, float] = {}
    family = ""
    assert text.endswith("\n")
    lines = iter(text[:-1].split("\n"))
    for line in lines:
        if match := re.fullmatch(r"# HELP ([a-z_]+) (\S.*)", line):
            family = match[1]
            assert family not in kinds, f"{family} comes twice"
            typed = re.fullmatch(rf"# TYPE {family} (counter|gauge|histogram)", next(lines))
            assert typed
            kinds[family] = typed[1]
            assert (typed[1] == "counter") == family.endswith("_total")
            continue
        match = re.fullmatch(
            rf"({family}(?:_bucket|_sum|_count)?)(\{{{label}(?:,{label})*\}})? (\d+(?:\.\d+)?(?:e-?\d+)?)", line
        )
        assert match, f"no sample of {family}: {line!r}"
        assert match[1] + (match[2] or "") not in samples, f"{line!r} comes twice"
        samples[match[1] + (match[2] or "")] = float(match[3])
    return samples


def test_promtool_accepts_the_stats(mnt: Path, backup: Path) -> None:
    (backup / "1").write_bytes(b"x")
    with raises_errno(errno.ENOENT):
        (backup / "2").read_bytes()
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert run(f"PATH={tools}; promtool check metrics <{mnt}/.stats") == ""


def test_stats_are_prometheus_text_and_count(mnt: Path, backup: Path) -> None:
    def now() -> dict[str, float]:
        return metrics((mnt / ".stats").read_text())

    before = now()
    for handle in range(1, 11):
        (backup / str(handle)).write_bytes(b"x" * 4096)
    for _ in range(3):
        with raises_errno(errno.ENOTEMPTY):
            backup.rmdir()
    after = now()
    for operation, least in ("create", 10), ("write", 10), ("read", 1):
        of = f'operation="{operation}"'
        durations = [after[name] for name in after if name.startswith(f"ttmfs_operation_duration_seconds_bucket{{{of}")]
        assert durations == sorted(durations), "buckets add up"
        assert durations[-1] == after[f"ttmfs_operation_duration_seconds_count{{{of}}}"] >= least
        assert after[f"ttmfs_operation_duration_seconds_sum{{{of}}}"] > 0
    assert after['ttmfs_operation_duration_seconds_count{operation="create"}'] == 10
    assert after['ttmfs_operation_errors_total{operation="rmdir",errno="ENOTEMPTY"}'] == 3
    for name, value in before.items():
        if "_total" in name or "_duration_" in name:
            assert after[name] >= value, name
    assert after["ttmfs_busy_poll_hits_total"] > before["ttmfs_busy_poll_hits_total"]
    assert 0 < after["ttmfs_busy_poll_hits_seconds_total"] < 1
    assert after["ttmfs_backups"] == 1
    assert (after['ttmfs_pages{state="resident"}'], after['ttmfs_pages{state="swapped"}']) == (10, 0)
    assert (after['ttmfs_stored_bytes{state="resident"}'], after['ttmfs_stored_bytes{state="swapped"}']) == (40960, 0)
    assert after["ttmfs_size_bytes"] == 64 << 20
    assert after["ttmfs_available_bytes"] == (64 << 20) - 40960
    assert after["ttmfs_page_size_bytes"] == 4096
    assert (after["ttmfs_page_ins_total"], after["ttmfs_page_ins_waiting"]) == (0, 0)
    assert after[f'ttmfs_build_info{{version="{ttmfs.__version__}",loop="{LOOP}"}}'] == 1


# --- a long life ---


class Altered(Mount):
    """A mount whose daemon runs a piece of Python before it starts."""

    def __init__(self, directory: Path, script: Path, alteration: str) -> None:
        super().__init__(directory, "size=8m")
        before = f"import os, sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nimport mount\n"
        in_python = "os.environ['TTMFS_LOOP'] = 'python'\n"  # compiled code calls nothing that was altered
        script.write_text(f"{before}{in_python}{alteration}\nsys.exit(mount.main('mount.py'))\n")
        self._command[self._command.index(str(MOUNT_PY))] = str(script)


FAULT = """
from ttmfs.fuse import {module}
def fault(*arguments, **more):
    raise RuntimeError("nobody foresaw this")
{module}.{name} = fault
"""


@pytest.mark.parametrize(
    ("module", "name", "operation", "command"),
    [
        ("directories", "Root.make_backup", "mkdir", "mkdir b"),
        ("directories", "Root.remove_backup", "rmdir", "rmdir a"),
        ("directories", "Root.rename", "rename", "mv a b"),
        ("directories", "BackupDirectory.create_page", "create", "touch a/2"),
        ("directories", "BackupDirectory.drop_page", "unlink", "rm a/1"),
        ("files", "Pages.read", "read", "cat a/1"),
        ("files", "Pages.write", "write", "echo x > a/1"),
        ("files", "Pages.truncate", "setattr", "truncate -s 5 a/1"),
        ("directories", "BackupDirectory.listing", "readdir", "ls a"),
        ("files", "Shmem.attributes", "lookup", "stat a/.shmem"),
        ("page_requests", "get_xattr", "getxattr", "getfattr -n user.ttmfs.pages a"),
        ("page_requests", "set_xattr", "setxattr", "setfattr -n user.ttmfs.size -v 1m a"),
    ],
)
def test_a_fault_in_a_handler_is_a_logged_eio_and_the_mount_lives_on(
    tmp_path: Path, mountpoint: Path, module: str, name: str, operation: str, command: str
) -> None:
    def filled() -> bool:
        """Whether there is a backup with a page, made by whatever calls avoid the fault."""
        with contextlib.suppress(OSError):
            (mountpoint / "a").mkdir()
        with contextlib.suppress(OSError), (mountpoint / "a/.image").open("r+b", buffering=0) as image:
            image.write(b"x" * 4096)
        return (mountpoint / "a").is_dir()

    with Altered(mountpoint, tmp_path / "faulty.py", FAULT.format(module=module, name=name)) as mounted:
        mounted.expect_log(
            rf"{operation}\(.*\) failed unforeseen; callers get EIO \(logged once\)"
            "|^Traceback|^ +|^RuntimeError: nobody"
        )
        made = filled()
        assert made == (operation != "mkdir")
        for _ in range(3):
            said = subprocess.run(
                ["bash", "-c", command], cwd=mountpoint, capture_output=True, text=True, timeout=20, check=False
            )
            assert "Input/output error" in said.stderr, said
            assert said.returncode
        assert filled() == made
        assert stat.S_ISDIR(mountpoint.stat().st_mode)
        assert mounted.process.poll() is None
        count = metrics((mountpoint / ".stats").read_text())
        assert count[f'ttmfs_operation_errors_total{{operation="{operation}",errno="EIO"}}'] >= 3
    assert mounted.log.count("RuntimeError: nobody foresaw this") == 1, "a caller cannot fill the log"
    assert any(line.startswith("Traceback") for line in mounted.log)


def test_opening_with_truncation_is_two_requests(backup: Path) -> None:
    """Otherwise the kernel takes the page's size for 0 for a while, and a concurrent tar stores an empty page."""
    (backup / "1").write_bytes(b"x" * 4096)

    def truncations() -> int:
        name = 'ttmfs_operation_duration_seconds_count{operation="setattr"}'
        return int(metrics((backup.parent / ".stats").read_text()).get(name, 0))

    before = truncations()
    with open(backup / "1", "wb") as page:
        assert os.fstat(page.fileno()).st_size == 4096
    assert truncations() == before + 1
    assert (backup / "1").read_bytes() == bytes(4096)


def test_open_backups_take_at_most_half_of_the_descriptors(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=64m", command=("prlimit", "--nofile=512", *MOUNT_COMMAND)) as mount:
        before = len(descriptors(mount.pid))
        for number in range(1000):
            (mountpoint / f"{number}").mkdir()
            (mountpoint / f"{number}/1").write_bytes(b"%d" % number)
        assert before + 200 <= len(descriptors(mount.pid)) <= before + 256 + 4
        for number in itertools.chain(range(0, 1000, 7), range(999, 0, -7)):
            assert (mountpoint / f"{number}/1").read_bytes().rstrip(b"\0") == b"%d" % number
        assert len(os.listdir(mountpoint)) == 1000
        assert len(descriptors(mount.pid)) <= before + 256 + 4


def test_sigusr2_logs_a_traceback_and_the_daemon_continues(mount: Mount, backup: Path) -> None:
    mount.expect_log(r"most recent call first\):$|^  File |^$")
    for _ in range(3):
        count = len(mount.log)
        os.kill(mount.pid, signal.SIGUSR2)
        wait_until(lambda: any("mount.py" in line for line in mount.log[count:]), "the stacks")  # noqa: B023
        (backup / "1").write_bytes(b"x" * 4096)
        assert (backup / "1").read_bytes() == b"x" * 4096
