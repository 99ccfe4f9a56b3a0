"""C23: only a real unmount releases pages. A refused, forced or aborted one releases none."""

import contextlib
import errno
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kept import (
    ANEW,
    CUT_OFF,
    DEAD,
    FAILED,
    FUSECTL,
    GAVE_UP,
    PAGE,
    Caller,
    Kept,
    abort,
    cannot_resend,
    copied_package,
    covered,
    expect_cuts,
    keeper_of,
    listed_connections,
    of_package,
    processes,
    served_anew,
)

from harness import MOUNT_COMMAND, Mount, mounts, opened, raises_errno, run, wait_until
from stores import ALICE, Place, UsersMount, acting_as
from ttmfs.linux.mountinfo import mounted_at

OPTIONS = {"kept": "size=16m", "without a keeper": "size=16m,keeper=off", "not resending": "size=16m"}


def command_of(way: str, directory: Path) -> tuple[str, ...]:
    """How a mount is made: for one of OPTIONS by a copy of ttmfs, in a directory."""
    package = directory / "package"
    if way != "not resending":
        return MOUNT_COMMAND
    return of_package(package) if package.exists() else cannot_resend(copied_package(package))


@pytest.fixture(autouse=True)
def connections() -> Iterator[None]:
    with listed_connections():
        yield


def refused(path: Path) -> None:
    """Run ``umount -f`` while a page is open."""
    with opened(path / "a/7"):
        assert "busy" in run(f"umount -f {path}", code=32)


def daemon_of(path: Path) -> int:
    """The process id of the daemon that serves; 0 if none does."""
    with contextlib.suppress(OSError):
        return int(json.loads((path / ".config").read_text())["daemon_pid"])
    return 0


def store_pages(path: Path) -> dict[str, bytes]:
    (path / "a").mkdir()
    content = {str(handle): os.urandom(PAGE) for handle in (1, 7, 1000)}
    for name, data in content.items():
        (path / "a" / name).write_bytes(data)
    return content


def pages_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "a").iterdir()}


@pytest.mark.parametrize("way", OPTIONS)
def test_c23_an_aborted_connection_loses_no_page_and_is_logged(mountpoint: Path, tmp_path: Path, way: str) -> None:
    with Kept(mountpoint, OPTIONS[way], command=command_of(way, tmp_path)) as mount:
        expect_cuts(mount)
        content = store_pages(mountpoint)
        for turn, cut in enumerate((refused, abort)):
            with opened(mountpoint / "a/1") as page:
                cut(mountpoint)
                wait_until(lambda: len(mount.said("serving /")) == turn + 2, "the mount")  # noqa: B023
                with raises_errno(errno.ENOTCONN):
                    os.pread(page, PAGE, 0)
            assert pages_of(mountpoint) == content
            assert len(mount.said(CUT_OFF)) == len(mount.said(ANEW)) == turn + 1
        (mountpoint / "a/1").write_bytes(content["7"])
        assert (mountpoint / "a/1").read_bytes() == content["7"]
        assert mount.process.poll() is None, "the process that was started lives as long as the mount"


ENDS = (
    "umount {mnt}",
    "fusermount3 -u {mnt}",
    "umount -l {mnt}",
    "umount -f {mnt}",
    "umount -f -l {mnt}",
    "kill {daemon}",
)


@pytest.mark.parametrize(
    ("options", "end"),
    [("kept", end) for end in ENDS] + [(name, end) for name in list(OPTIONS)[1:] for end in (ENDS[0], ENDS[-1])],
)
def test_c23_an_unmount_releases_everything_and_ends_keeper_and_daemon(
    mountpoint: Path, tmp_path: Path, options: str, end: str
) -> None:
    """This holds after an abort, too, when the daemon has mounted again."""
    for aborts in 1, 0:
        with Kept(mountpoint, OPTIONS[options], command=command_of(options, tmp_path)) as mount:
            expect_cuts(mount)
            assert os.listdir(mountpoint) == []
            store_pages(mountpoint)
            if aborts:
                abort(mountpoint)
                wait_until(lambda: len(mount.said("serving /")) == 2, "the mount")
            (mountpoint / "a/.image").write_bytes(bytes(8 << 20))
            run(end.format(mnt=mountpoint, daemon=mount.daemon))
            mount.ends_with(0)
            assert len(mount.said(CUT_OFF)) == aborts


def test_c23_a_lazy_unmount_releases_pages_when_the_last_file_is_closed(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=16m") as mount:
        content = store_pages(mountpoint)
        with opened(mountpoint / "a/1") as page:
            run(f"umount -l {mountpoint}")
            time.sleep(1)  # longer than it takes to look whether it was unmounted
            assert os.pread(page, PAGE, 0) == content["1"]
        mount.ends_with(0)


def test_c23_an_abort_after_a_lazy_unmount_releases_the_pages(mountpoint: Path) -> None:
    """Nobody can reach the pages: the mount is unmounted, and the abort has cut off open files."""
    with Kept(mountpoint, "size=16m") as mount:
        store_pages(mountpoint)
        found = mounted_at(str(mountpoint))
        assert found
        with opened(mountpoint / "a/1"):
            run(f"umount -l {mountpoint}")
            (FUSECTL / found.device.partition(":")[2] / "abort").write_text("1")
            mount.ends_with(0)


def test_c23_an_abort_loses_no_page_of_a_mount_in_another_namespace(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=16m") as mount:
        expect_cuts(mount)
        content = store_pages(mountpoint)
        found = mounted_at(str(mountpoint))
        assert found
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; read line"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as elsewhere:  # fmt: skip
            assert elsewhere.stdout
            assert elsewhere.stdout.readline() == "ready\n"
            run(f"umount {mountpoint}")
            assert str(mountpoint) not in mounts()
            (FUSECTL / found.device.partition(":")[2] / "abort").write_text("1")
            wait_until(lambda: len(mount.said("serving /")) == 2, "the mount")
            elsewhere.communicate("\n")
        assert pages_of(mountpoint) == content


def test_c23_an_abort_gives_an_error_to_a_caller_of_a_stopped_daemon(mountpoint: Path) -> None:
    """The daemon notices the abort when it continues."""
    with Kept(mountpoint, "size=16m") as mount:
        expect_cuts(mount)
        content = store_pages(mountpoint)
        with Caller(mountpoint / "a/1") as caller:
            daemon = mount.daemon
            os.kill(daemon, signal.SIGSTOP)
            caller.asks_and_waits()
            abort(mountpoint)
            assert caller.answer() in DEAD
            os.kill(daemon, signal.SIGCONT)
        wait_until(lambda: served_anew(mount), "the mount")
        assert pages_of(mountpoint) == content


@pytest.mark.parametrize(("cut", "delay"), [(abort, 0.0), (refused, 0.0), (abort, 0.1), (refused, 0.3)])
def test_c23_an_abort_while_the_daemon_is_dead_loses_no_page(
    mountpoint: Path, cut: Callable[[Path], None], delay: float
) -> None:
    with Kept(mountpoint, "size=16m") as mount:
        expect_cuts(mount)
        content = store_pages(mountpoint)
        with opened(mountpoint / "a/7") if cut is refused else contextlib.nullcontext():
            mount.kill_daemon()
            time.sleep(delay)
            if cut is refused:
                run(f"umount -f {mountpoint}", code=32)
            else:
                abort(mountpoint)
        wait_until(lambda: served_anew(mount), "the mount")
        assert pages_of(mountpoint) == content


def test_c23_an_abort_during_the_death_of_the_keeper_loses_no_page(mountpoint: Path) -> None:
    """The keeper that learnt of the connection's end dies. The next keeper learns of it too."""
    with Kept(mountpoint, "size=16m") as mount:
        expect_cuts(mount)
        mount.expect_log("the keeper does not (answer|hear)")
        content = store_pages(mountpoint)
        keeper = mount.keeper
        mount.expect_log(r"the keeper was killed: \d+ is another|the daemon \d+ of /\S+ is dead: starting another")
        os.kill(keeper, signal.SIGKILL)
        abort(mountpoint)
        mount.process.wait(5)
        wait_until(lambda: served_anew(mount), "the mount")
        assert pages_of(mountpoint) == content


def test_c23_aborts_in_a_loop_are_each_logged_and_lose_nothing(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=16m") as mount:
        expect_cuts(mount)
        content = store_pages(mountpoint)
        begun = time.monotonic()
        for turn in range(4):
            wait_until(lambda: len(mount.said("serving /")) == turn + 1, "the mount")  # noqa: B023
            abort(mountpoint)
        wait_until(lambda: len(mount.said("serving /")) == 5, "the mount")
        assert len(mount.said(CUT_OFF)) == len(mount.said(ANEW)) == 4
        assert time.monotonic() - begun > 4 * 0.5, "each waits for an unmount that could come after it"
        assert pages_of(mountpoint) == content


def test_c23_the_keeper_holds_pages_while_the_daemon_cannot_mount_again(mountpoint: Path) -> None:
    """Another mount covers the mountpoint. When it is gone, a signal brings the pages back."""
    with Kept(mountpoint, "size=16m") as mount:
        expect_cuts(mount)
        mount.expect_log(FAILED)
        content, keeper = store_pages(mountpoint), mount.keeper
        under = mounted_at(str(mountpoint))
        assert under
        with covered(mountpoint, "tmpfs"):
            (FUSECTL / under.device.partition(":")[2] / "abort").write_text("1")
            mount.wait_for_log(r"tmpfs is mounted over /\S+, which is to be mounted anew: unmount that first")
            mount.wait_for_log(GAVE_UP)
            assert f"ttmfs rescue {keeper} " in mount.said(GAVE_UP)[0]
        mount.try_again(keeper)
        assert pages_of(mountpoint) == content


def test_c23_another_ttmfs_mounted_over_an_aborted_mount_is_left_alone(mountpoint: Path) -> None:
    with Kept(mountpoint, "size=16m") as mount:
        expect_cuts(mount)
        mount.expect_log(FAILED)
        content, keeper = store_pages(mountpoint), mount.keeper
        under = mounted_at(str(mountpoint))
        assert under
        with Mount(mountpoint, "size=16m") as upper:
            upper.expect_log("another ttmfs is mounted at")
            (mountpoint / "upper").mkdir()
            (FUSECTL / under.device.partition(":")[2] / "abort").write_text("1")
            mount.wait_for_log("fuse.ttmfs is mounted over")
            mount.wait_for_log(GAVE_UP)
            assert os.listdir(mountpoint) == ["upper"]
            run(f"umount {mountpoint}")
            upper.wait()
            mount.try_again(keeper)
            assert pages_of(mountpoint) == content


def test_c23_a_background_mount_serves_again_after_an_abort(mountpoint: Path, tmp_path: Path) -> None:
    for way, options in OPTIONS.items():
        run(f"{shlex.join(command_of(way, tmp_path))} {mountpoint} -o {options}")
        try:
            content = store_pages(mountpoint)
            before = daemon_of(mountpoint)
            abort(mountpoint)
            wait_until(lambda: daemon_of(mountpoint) not in (before, 0), "the mount")  # noqa: B023
            assert pages_of(mountpoint) == content
            os.kill(keeper_of(mountpoint), signal.SIGTERM)
            wait_until(lambda: not processes(mountpoint), "every process to end")
            assert str(mountpoint) not in mounts()
        finally:
            for pid in processes(mountpoint):
                os.kill(pid, signal.SIGKILL)
            if str(mountpoint) in mounts():
                run(f"fusermount3 -u -z {mountpoint}")


def test_c23_a_users_mount_loses_no_page_to_an_abort(place: Place) -> None:
    for options in ("size=64m", "size=64m,keeper=off"):
        with place.directory("home", ALICE) as home, UsersMount(place, home, options) as mount:
            expect_cuts(mount)
            with acting_as(ALICE):
                content = store_pages(home)
            abort(home)
            wait_until(lambda: len([line for line in mount.log if "serving /" in line]) == 2, "the mount")
            with acting_as(ALICE):
                assert pages_of(home) == content


def test_c23_a_store_in_a_directory_is_served_again_after_an_abort(tmp_path: Path, mountpoint: Path) -> None:
    (tmp_path / "store").mkdir()
    for more in ("", ",keeper=off"):
        with Kept(mountpoint, f"store={tmp_path / 'store'}{more}") as mount:
            expect_cuts(mount)
            content = pages_of(mountpoint) if more else store_pages(mountpoint)
            abort(mountpoint)
            wait_until(lambda: len(mount.said("serving /")) == 2, "the mount")
            assert pages_of(mountpoint) == content


FAULT = """

async def fault():
    while not os.path.exists(os.environ["FAULT"]):
        await trio.sleep(0.01)
    os.unlink(os.environ["FAULT"])
    raise ArithmeticError("a fault")
"""


def test_c23_an_exception_in_the_loop_without_a_keeper_loses_no_page(tmp_path: Path, mountpoint: Path) -> None:
    package = copied_package(tmp_path / "package")
    session = package / "ttmfs/daemon/session.py"
    text, task = session.read_text(), "            nursery.start_soon(self._end_on_signal, nursery.cancel_scope)\n"
    assert task in text
    session.write_text(text.replace(task, f"{task}            nursery.start_soon(fault)\n") + FAULT)
    fault = tmp_path / "fault"
    environment = os.environ | {"FAULT": str(fault)}
    with Kept(mountpoint, "size=16m,keeper=off", command=of_package(package), env=environment) as mount:
        mount.expect_restarts()
        content = store_pages(mountpoint)
        with opened(mountpoint / "a/1") as page:
            mount.expect_log("a fault in ttmfs; please report it")
            mount.expect_log(r"^ |^Traceback|ArithmeticError")
            fault.touch()
            mount.wait_for_log("taking over /")
            assert os.pread(page, PAGE, 0) == content["1"]
        assert pages_of(mountpoint) == content
