"""The commands that look after a mount: mount, umount, resize, drop and restart."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kept import Kept, changed, copied_package, gives_up_after, of_package

from harness import REPOSITORY, Mount, attribute, children, count, mounts, opened, remaining, run, stopped, wait_until
from stores import ALICE, BOB, Place, UsersMount, as_user
from ttmfs.linux.unmount import PROGRAM

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
TTMFS = [sys.executable, "-m", "ttmfs"]


def ttmfs(*words: object, code: int = 0, **more: Any) -> str:
    """Run a command. Returns its output, followed by its standard error, which must hold no traceback."""
    more = {"cwd": REPOSITORY, "stdin": subprocess.DEVNULL, **more}
    line = [*more.pop("command", TTMFS), *map(str, words)]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        line, capture_output=True, text=True, timeout=90, check=False, **more
    )
    text = done.stdout + done.stderr
    assert done.returncode == code, f"{words}: {done.returncode}\n{text}"
    assert "Traceback" not in text
    return text


@pytest.fixture
def begin(mountpoint: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """A function that mounts in the background, by ``ttmfs mount``, and returns .config. The test has to unmount."""
    before = children()

    def mount(*words: object) -> dict[str, Any]:
        assert ttmfs("mount", mountpoint, *words) == ""
        found: dict[str, Any] = json.loads((mountpoint / ".config").read_text())
        return found

    yield mount
    left = [path for path in mounts() if path == str(mountpoint)]
    for path in left:
        subprocess.run(["fusermount3", "-u", "-z", "--", path], check=False)
    wait_until(lambda: not remaining(before), "every process to end")
    assert not left


def has_ended(pid: int) -> bool:
    """Whether a process has ended; one that this process adopted is reaped."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return not Path(f"/proc/{pid}").exists()


# --- mount ---


def test_mount_takes_the_arguments_of_mount_py(begin: Callable[..., dict[str, Any]], mountpoint: Path) -> None:
    found = begin("-o", "size=16m", "-o", "backup_size=1m")
    assert (found["size"], found["backup_size"]) == (16 * MIB, MIB)
    (mountpoint / "a").mkdir()
    (mountpoint / "a/7").write_bytes(b"kept")
    os.kill(found["daemon_pid"], signal.SIGKILL)
    assert (mountpoint / "a/7").read_bytes()[:4] == b"kept", "the keeper finds the program"
    ttmfs("umount", mountpoint)


def test_mount_shows_its_options_and_reports_mistakes_in_its_name(tmp_path: Path) -> None:
    text = ttmfs("mount", "--help")
    assert "usage: ttmfs mount " in text
    assert "backup_size=SIZE" in text
    assert ttmfs("mount", tmp_path / "missing", code=32).startswith("ttmfs mount: ")
    assert "required: MNT" in ttmfs("mount", code=1)


@pytest.mark.usefixtures("begin")
def test_without_proc_mount_says_so(mountpoint: Path) -> None:
    program = f"mount -t tmpfs none /proc; exec {sys.executable} -m ttmfs mount {mountpoint}"
    text = run(f"unshare --mount sh -c '{program}'", code=2, cwd=REPOSITORY)
    assert text == "ttmfs mount: /proc is not mounted here; mount it first: mount -t proc proc /proc\n"


def test_the_program_is_found_from_a_directory_that_has_another_ttmfs(mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "ttmfs").mkdir()
    (tmp_path / "ttmfs/__init__.py").write_text("raise SystemExit('it ran a stranger\\'s code')\n")
    command = Path(sys.executable).parent / "ttmfs"
    ttmfs("mount", mountpoint, "-o", "size=1m", cwd=tmp_path, command=[command])
    ttmfs("restart", mountpoint, cwd=tmp_path, command=[command])
    ttmfs("umount", mountpoint, cwd=tmp_path, command=[command])


# --- umount ---


def test_umount_returns_when_every_process_has_ended(begin: Callable[..., dict[str, Any]], mountpoint: Path) -> None:
    found = begin("-o", "size=64m")
    (mountpoint / "a").mkdir()
    with opened(mountpoint / "a/.image") as image:
        os.pwrite(image, b"x" * MIB, 0)
    assert ttmfs("umount", mountpoint) == ""
    assert str(mountpoint) not in mounts()
    assert has_ended(found["daemon_pid"])
    assert has_ended(found["keeper_pid"])


def test_umount_waits_for_a_daemon_without_keeper(begin: Callable[..., dict[str, Any]], mountpoint: Path) -> None:
    found = begin("-o", "size=1m,keeper=off")
    (row,) = json.loads(ttmfs("umount", "--json", mountpoint))
    assert (row["mount"], row["error"], row["users"]) == (str(mountpoint), None, [])
    assert has_ended(found["daemon_pid"])


def test_umount_names_the_processes_that_are_in_the_way(mount: Mount) -> None:
    (mount.path / "a").mkdir()
    (mount.path / "a/1").touch()
    code = "import mmap, sys; f = open('1'); m = mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE); print(flush=True); input()"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=mount.path / "a", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdin
        assert user.stdout
        user.stdout.readline()
        text = ttmfs("umount", mount.path, code=2)
        (row,) = json.loads(ttmfs("umount", "--json", mount.path, code=2).rpartition("]")[0] + "]")
        user.stdin.close()
    assert f"{mount.path} is busy and stays mounted: " in text
    assert re.search(rf"\(pid {user.pid}, user root\) has 1 working directory, 2 open files, 1 mapping\. End or", text)
    assert f"ttmfs umount --lazy {mount.path}" in text
    assert [(u["pid"], u["uses"]["mapping"]) for u in row["users"]] == [(user.pid, 1)]
    assert (mount.path / "a/1").exists()


def test_umount_names_a_mount_inside(mount: Mount) -> None:
    (mount.path / "a").mkdir()
    run(f"mount -t tmpfs inside {mount.path}/a")
    try:
        assert f"{mount.path}/a is mounted in it: unmount that first" in ttmfs("umount", mount.path, code=2)
    finally:
        run(f"umount {mount.path}/a")


def test_a_lazy_umount_detaches_a_mount_in_use(begin: Callable[..., dict[str, Any]], mountpoint: Path) -> None:
    found = begin("-o", "size=1m")
    (mountpoint / "a").mkdir()
    with opened(mountpoint / "a/.image"):
        assert "is detached; its pages are released when" in ttmfs("umount", "--lazy", mountpoint)
        assert str(mountpoint) not in mounts()
        assert not has_ended(found["keeper_pid"])
    wait_until(lambda: has_ended(found["keeper_pid"]), "the end")


def test_umount_names_another_mount_namespace_with_a_copy(
    begin: Callable[..., dict[str, Any]], mountpoint: Path, tmp_path: Path
) -> None:
    found = begin("-o", "size=1m")
    hostile = shlex.quote(f"{tmp_path}/\r")  # a name that another user can choose for a mount
    script = f"mkdir {hostile}; mount -t tmpfs none {hostile}; echo ready; exec sleep 100"
    copy = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(copy, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"ready\n"
        said = ttmfs("umount", mountpoint, code=2)
        other.kill()
    assert f"{mountpoint} is unmounted here, but its pages stay" in said
    assert f"pid {other.pid}" in said
    assert str(mountpoint) not in mounts()
    wait_until(lambda: has_ended(found["keeper_pid"]), "the end")


def test_umount_says_that_the_keeper_is_stopped(begin: Callable[..., dict[str, Any]], mountpoint: Path) -> None:
    found = begin("-o", "size=1m")
    keeper = found["keeper_pid"]
    with stopped(keeper):
        said = ttmfs("umount", mountpoint, code=2)
        assert f"process {keeper} ends, which is stopped: kill -CONT {keeper} continues it" in said
        assert str(mountpoint) not in mounts()
    wait_until(lambda: has_ended(keeper), "the end")


def test_umount_says_that_a_mount_in_use_does_not_answer(place: Place) -> None:
    """A server has read requests, so the processes that wait cannot be killed. Nothing in /proc names the mount."""
    server = [sys.executable, str(REPOSITORY / "tests/hostile_server.py")]
    with place.directory("silent") as path:
        plan = json.dumps({"hangs": ["getattr", "statfs"]})
        with subprocess.Popen([*server, str(path), str(ALICE), plan], stdout=subprocess.PIPE) as hostile:
            assert hostile.stdout
            hostile.stdout.readline()
            try:
                said = ttmfs("umount", path, code=2)
            finally:
                hostile.kill()
        run(f"umount {path}")
    assert "it does not answer, and programs that wait for it cannot be seen" in said


def test_umount_of_a_copy_does_not_wait_for_the_mount(mount: Mount, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    run(f"mount --bind {mount.path} {copy}")
    said = ttmfs("umount", copy)
    assert said == f"{copy} is unmounted; its pages stay, because it is also mounted at {mount.path}\n"
    assert str(copy) not in mounts()


def test_what_hides_a_mount_is_named_as_the_reason(mount: Mount) -> None:
    run(f"mount -t tmpfs none {mount.path}")
    try:
        for verb in "status", "restart", "umount":
            assert f"{mount.path} is hidden by another mount on the same path" in ttmfs(verb, mount.path, code=2)
        assert f"umount {mount.path} ends that mount" in ttmfs("status", code=2)
    finally:
        run(f"umount {mount.path}")


def test_a_working_directory_that_has_ended_is_named_as_the_reason(mount: Mount) -> None:
    (mount.path / "a").mkdir()
    command = f"cd {mount.path}/a; rmdir ../a; exec {sys.executable} -m ttmfs restart .. 2>&1"
    text = run(command, code=2, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert "your working directory has ended; leave it with cd" in text


def test_root_unmounts_through_no_link_that_was_made_meanwhile(mount: Mount, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mount.path.parent)
    words = [sys.executable, "-I", "-S", PROGRAM, str(tmp_path / "link" / mount.path.name)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (1, "Too many levels of symbolic links\n")
    assert str(mount.path) in mounts()


def test_umount_removes_a_dead_mount(begin: Callable[..., dict[str, Any]], mountpoint: Path) -> None:
    found = begin("-o", "size=1m,keeper=off")
    os.kill(found["daemon_pid"], signal.SIGKILL)
    wait_until(lambda: has_ended(found["daemon_pid"]), "its death")
    assert ttmfs("umount", mountpoint) == ""
    assert str(mountpoint) not in mounts()


def test_umount_releases_the_pages_of_a_dead_mount_only_by_force(mountpoint: Path, tmp_path: Path) -> None:
    package = copied_package(tmp_path)
    gives_up_after(package, failed=1)
    with Kept(mountpoint, "size=16m,standby=off", command=of_package(package)) as mount:
        keeper = mount.keeper
        mount.expect_log("no such luck")
        with changed(package / "mount.py", "import sys\n", "raise SystemExit('no such luck')\n"):
            mount.give_up()
        text = ttmfs("umount", mountpoint, code=2)
        assert f"{mountpoint} is dead, but its keeper {keeper} holds its pages" in text
        for advice in "ttmfs restart", f"ttmfs rescue {keeper} DIRECTORY", "ttmfs umount --force":
            assert advice in text
        assert ttmfs("umount", "--force", mountpoint) == ""
        mount.ends_with(32)


def test_umount_refuses_what_is_no_mount_point(mount: Mount, tmp_path: Path) -> None:
    (mount.path / "a").mkdir()
    assert f"give the mount point, {mount.path}" in ttmfs("umount", mount.path / "a", code=2)
    text = ttmfs("umount", tmp_path, mount.path / "a", "/nonexistent", code=2)
    assert len(text.splitlines()) == 3
    assert "is not a mount of ttmfs" in text


def test_only_root_and_the_user_who_mounted_unmount_and_restart(place: Place) -> None:
    with place.directory("home", ALICE) as home, UsersMount(place, home, "size=16m") as mount:
        command: dict[str, Any] = {"command": [place.python, "-m", "ttmfs"], "cwd": place.path / "repository"}
        for verb in "umount", "restart":
            text = ttmfs(verb, home, code=2, **command, **as_user(BOB))
            assert re.search(r"is served by user \S+: only that user and root may", text)
        mount.expect_log("was killed")
        mount.expect_log("taking over")
        before = mount.pid
        assert f"daemon {before}, version " in ttmfs("restart", home, **command, **as_user(ALICE))
        assert "replaced by" in ttmfs("restart", home, **command)
        mount.expect_log("unmounted")
        assert ttmfs("umount", home, **command, **as_user(ALICE)) == ""
        assert mount.process.wait(10) == 0


# --- resize, drop ---


def test_resize_changes_the_budget_and_backups(mount: Mount) -> None:
    (mount.path / "a").mkdir()
    assert ttmfs("resize", mount.path, "96m") == f"{mount.path}: 96m (was 64m)\n"
    assert os.statvfs(mount.path).f_blocks * PAGE == 96 * MIB
    found = json.loads(ttmfs("resize", "--json", mount.path / "a", "1.5m"))
    assert found == {"path": str(mount.path / "a"), "before": 64 * MIB, "size": 3 * MIB // 2}
    assert (mount.path / "a/.image").stat().st_size == 3 * MIB // 2


@pytest.mark.parametrize("mode", ["0755", "1777"])
def test_only_root_and_the_user_who_mounted_change_a_mount(place: Place, mode: str) -> None:
    with place.directory("roots") as path, Mount(path, f"size=16m,allow_other,mode={mode}", cwd=place.path):
        command: dict[str, Any] = {"command": [place.python, "-m", "ttmfs"], "cwd": place.path / "repository"}
        for verb, value in ("resize", "1m"), ("log", "debug"):
            text = ttmfs(verb, path, value, code=2, **command, **as_user(ALICE))
            assert text == f"ttmfs {verb}: {path}: only root and the user who mounted it may change that\n"


def test_resize_refuses_to_lose_pages_and_says_why(mount: Mount) -> None:
    (mount.path / "a").mkdir()
    with opened(mount.path / "a/.image") as image:
        os.pwrite(image, b"x" * MIB, 0)
    assert "more is stored; drop pages first" in ttmfs("resize", mount.path, "64k", code=2)
    assert "pages are stored past byte 4096; drop them first" in ttmfs("resize", mount.path / "a", "4k", code=2)
    assert count(mount.path / "a", "pages") == MIB // PAGE
    assert "'lots' is not a size" in ttmfs("resize", mount.path, "lots", code=2)
    assert "is neither a mount of ttmfs nor a backup" in ttmfs("resize", "/tmp", "1g", code=2)


def test_resize_follows_a_link_to_a_mount_only(mount: Mount, tmp_path: Path) -> None:
    (mount.path / "a").mkdir()
    (tmp_path / "link").symlink_to(mount.path)
    (tmp_path / "backup").symlink_to(mount.path / "a")
    ttmfs("resize", tmp_path / "link", "32m")
    assert "is a symbolic link; name the backup itself" in ttmfs("resize", tmp_path / "backup", "1m", code=2)
    assert ttmfs("resize", tmp_path / "link/a", "1m")


def test_drop_drops_ranges_and_counts(mount: Mount) -> None:
    backup = mount.path / "a"
    backup.mkdir()
    with opened(backup / ".image") as image:
        os.pwrite(image, b"x" * 20 * PAGE, 0)
    assert ttmfs("drop", backup, "1-5,9", "12") == f"{backup}: 7 pages dropped, 13 left\n"
    assert attribute(backup, "map") == "6-8,10-11,13-20"
    found = json.loads(ttmfs("drop", "--json", "--all", backup))
    assert found == {"backup": str(backup), "page_size": PAGE, "dropped": 13, "pages": 0}
    many = ",".join(str(handle) for handle in range(1, 10001, 2))
    assert "0 pages dropped" in ttmfs("drop", backup, many)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{0}/a", "give the handles to drop, such as 1-5,9, or --all"),
        ("--all {0}/a 3", "give the handles to drop"),
        ("{0}/a 3-1", "HANDLES: the range 3-1 runs backwards"),
        ("{0}/a x", "'x' is neither a handle nor a range"),
        ("{0}/a 0", "'0' is neither a handle nor a range"),
        ("{0}/a 1,16385", "has the handles 1 to 16384, and not 16385"),
        ("{0} 1", "is the root of a mount; name a backup in it, such as {0}/a"),
        ("{0}/a/1 1", "is a page; name the backup, {0}/a"),
        ("{0}/b 1", "No such file or directory"),
    ],
)
def test_drop_refuses_what_it_cannot_drop_and_drops_nothing(mount: Mount, words: str, message: str) -> None:
    (mount.path / "a").mkdir()
    (mount.path / "a/1").touch()
    text = ttmfs("drop", *words.format(mount.path).split(), code=2)
    assert message.format(mount.path) in text
    assert len(text.splitlines()) == 1
    assert attribute(mount.path / "a", "map") == "1"


# --- restart ---


def test_restart_replaces_the_daemon_and_keeps_every_page(mount: Mount) -> None:
    (mount.path / "a").mkdir()
    mount.expect_restarts()
    before = mount.pid
    with opened(mount.path / "a/.image") as image:
        os.pwrite(image, b"kept", 0)
        text = ttmfs("restart", mount.path)
        assert os.pread(image, 4, 0) == b"kept"
    assert re.fullmatch(rf"{mount.path}: daemon {before}, version \S+, replaced by {mount.pid}, version .*\n", text)
    before = mount.pid
    found = json.loads(ttmfs("restart", "--json", mount.path))
    assert (found["before"]["daemon_pid"], found["after"]["daemon_pid"]) == (before, mount.pid)
    assert found["keeper_pid"] == mount.process.pid


def test_restart_replaces_a_daemon_that_hangs(mount: Mount) -> None:
    mount.expect_restarts()
    os.kill(mount.pid, signal.SIGSTOP)
    assert "replaced by" in ttmfs("restart", mount.path)
    assert mount.restarts() == 1


def test_restart_revives_a_mount_whose_keeper_gave_up(mountpoint: Path, tmp_path: Path) -> None:
    package = copied_package(tmp_path)
    gives_up_after(package, failed=1)
    with Kept(mountpoint, "size=16m,standby=off", command=of_package(package)) as mount:
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(b"kept")
        mount.expect_log("no such luck")
        mount.expect_log("trying again")
        mount.expect_log("anew over the pages that were kept")
        with changed(package / "mount.py", "import sys\n", "raise SystemExit('no such luck')\n"):
            mount.give_up()
            assert "no daemon could start" in ttmfs("restart", mountpoint, code=2)
        assert "no daemon replaced by" in ttmfs("restart", mountpoint)
        assert (mountpoint / "a/1").read_bytes()[:4] == b"kept"


def test_restart_says_what_it_cannot_restart(mountpoint: Path, tmp_path: Path) -> None:
    with Mount(mountpoint, "size=1m,keeper=off"):
        assert "has no keeper that could start another daemon" in ttmfs("restart", mountpoint, code=2)
        assert "give the mount point" in ttmfs("restart", mountpoint / "a", code=2)
    assert "is not a mount of ttmfs" in ttmfs("restart", tmp_path, code=2)
    with Mount(mountpoint, "size=1m") as mount, stopped(mount.process.pid):
        assert f"kill -CONT {mount.process.pid}" in ttmfs("restart", mountpoint, code=2)
