"""``ttmfs status``: what one screen says about mounts, also about those that do not answer."""

import json
import os
import re
import select
import signal
import sys
from pathlib import Path

from harness import Mount, opened_process, run, stopped
from stores import ALICE, Place, UsersMount

STATUS = f"{sys.executable} -m ttmfs status"
PAGE = os.sysconf("SC_PAGE_SIZE")


def test_status_shows_a_mount_on_one_screen(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=16m,reserve=0") as mount:
        (mountpoint / "a").mkdir()
        for handle in 1, 2, 3:
            (mountpoint / f"a/{handle}").write_bytes(b"a" * PAGE)
        run(f"mkdir {mountpoint}/.b", code=1)
        text = run(f"{STATUS} {mountpoint}")
        assert re.search(r"budget +16M: 12K stored, 16M free, reserve 0", text)
        assert re.search(r"pages +3 in memory, 0 swapped out, of 4K each, in 1 backup\n", text)
        assert re.search(r"options +size=16m,reserve=0,standby=off\n", text)
        assert "mkdir EPERM 1" in text
        assert re.search(r"refusals +1 kept", text)
        assert re.search(rf"daemon +pid {mount.pid}, running, \S+ of RAM", text)
        assert re.search(rf"keeper +pid {mount.process.pid}, running", text)
        assert re.search(r"^create +\d+ +\S+ +<\S+ +<\S+ +3$", text, re.MULTILINE)
        (found,) = json.loads(run(f"{STATUS} --json {mountpoint}"))
        assert (found["size_bytes"], found["stored_bytes"], found["backups"]) == (16 << 20, 3 * PAGE, 1)
        assert found["pages"] == {"resident": 3, "swapped": 0}
        assert found["operations"]["create"]["count"] == 3
        assert found["daemon"]["pid"] == mount.pid
        assert found["problems"] == []
        assert f"\n{mountpoint} " in run(STATUS)


def test_status_counts_restarts_and_shows_when_the_last_one_was(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m") as mount:
        mount.expect_restarts()
        assert re.search(r"restarts +none", run(f"{STATUS} {mountpoint}"))
        with opened_process(mount.pid) as dead:
            mount.kill()
            assert select.select([dead], [], [], 10)[0]
        assert re.search(r"restarts +1, the last one \d+s ago", run(f"{STATUS} {mountpoint}"))


def test_status_says_what_mends_a_mount_that_does_not_answer(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m") as mount:
        with stopped(daemon := mount.pid):
            text = run(f"timeout 30 {STATUS} {mountpoint}", code=2)
            assert "problem" in text
            assert f"kill -CONT {daemon} continues its daemon" in text
            assert re.search(rf"daemon +pid {daemon}, stopped", text)
            assert "has not answered" in run(f"timeout 30 {STATUS}", code=2)
        mount.kill_both()
        (found,) = json.loads(run(f"{STATUS} --json {mountpoint}", code=2))
        assert found["answers"] is False
        assert "is dead" in found["problems"][0]["found"]
        run(f"fusermount3 -u {mountpoint}")


def test_a_mount_that_another_user_closed_is_told_apart(place: Place, mountpoint: Path) -> None:
    """Root's status, ls and top of the whole machine do not fail because a user has a mount of their own."""
    with place.directory("home", ALICE) as home, Mount(mountpoint, "size=16m"), UsersMount(place, home, "size=1m"):
        row = next(line for line in run(STATUS).splitlines() if str(home) in line)
        assert row.split()[-1] == "closed"
        assert "closed to other users, root included" in run(f"{STATUS} {home}", code=2)
        (found,) = (found for found in json.loads(run(f"{STATUS} --json")) if found["mount"] == str(home))
        assert (found["answers"], found["closed"], found["problems"]) == (False, True, [])
        ttmfs = STATUS.removesuffix(" status")
        assert str(home) not in run(f"{ttmfs} ls 2>&1")
        for command in "ls", "top --once", "why":
            assert "without allow_other it is closed" in run(f"{ttmfs} {command} {home}", code=2)


def test_status_repeats_until_it_is_interrupted(mount: Mount) -> None:
    text = run(f"timeout -s {signal.SIGINT.value} 3 {STATUS} --watch=0.2 {mount.path}", code=124)
    assert text.count("budget") > 1
    assert "between two looks" in text


def test_status_of_what_is_no_mount_is_an_error(tmp_path: Path) -> None:
    assert "is not a mount of ttmfs" in run(f"{STATUS} {tmp_path}", code=2)
