"""The reasons of refusals: in the log, and by ``ttmfs why``."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest

from harness import Mount, raises_errno, run, stopped
from stores import ALICE, Place, acting_as
from ttmfs import errors
from ttmfs.fuse import refusals
from ttmfs.fuse.refusals import Refusals

WHY = f"{sys.executable} -m ttmfs why"


def test_the_log_and_why_show_the_reason_of_a_refusal(mount: Mount, backup: Path) -> None:
    with raises_errno(errno.EINVAL):
        os.setxattr(mount.path, "user.ttmfs.size", b"plenty\n\x1b[31m")
    with raises_errno(errno.EPERM):
        (mount.path / ".hidden").mkdir()
    with raises_errno(errno.ENOENT):
        (backup / "7").stat()
    found = json.loads(run(f"{WHY} {mount.path} --json"))
    assert [(row["operation"], row["errno"]) for row in found] == [("setxattr", "EINVAL"), ("mkdir", "EPERM")]
    assert "is not a size" in found[0]["reason"]
    assert all((row["uid"], row["pid"]) == (os.geteuid(), os.getpid()) for row in found)
    lines = run(f"{WHY} {mount.path}").splitlines()
    assert lines[0].startswith("TIME")
    assert re.search(r"setxattr +EINVAL +.*plenty.*is not a size", lines[1])
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert any(re.search(r"refused: setxattr .*EINVAL.*plenty.*is not a size", line) for line in mount.log)


def test_why_shows_nothing_before_the_first_refusal(mnt: Path) -> None:
    assert "nothing was refused" in run(f"{WHY} {mnt}")
    assert json.loads(run(f"{WHY} --json {mnt}")) == []
    (mnt / "a").mkdir()
    assert "is not a mount point" in run(f"{WHY} {mnt}/a", code=2)


def test_why_says_that_a_restart_lost_the_reasons(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m") as mount:
        mount.expect_restarts()
        run(f"mkdir {mountpoint}/.a", code=1)
        assert "was restarted" not in run(f"{WHY} {mountpoint}")
        mount.kill()
        said = run(f"{WHY} {mountpoint}")
        assert "nothing was refused since the daemon started" in said
        assert "the daemon was restarted" in said
        assert f"ttmfs log {mountpoint}" in said
        assert json.loads(run(f"{WHY} --json {mountpoint}")) == []


@pytest.mark.parametrize("loop", ["compiled", "python"])
def test_why_has_the_reasons_of_requests_that_compiled_code_cannot_answer(mountpoint: Path, loop: str) -> None:
    with Mount(mountpoint, "size=1m,backup_size=8k", env={**os.environ, "TTMFS_LOOP": loop}):
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(b"a")
        fd = os.open(mountpoint / "a/1", os.O_RDWR)
        with raises_errno(errno.EFBIG):
            os.pwrite(fd, b"a", 1 << 20)
        os.close(fd)
        with raises_errno(errno.EFBIG, errno.ENOSPC):
            (mountpoint / "a/9").write_bytes(b"a")
        found = json.loads(run(f"{WHY} --json {mountpoint}"))
        assert {"write", "create"} <= {row["operation"] for row in found}


def test_why_does_not_wait_for_a_stopped_daemon(mount: Mount) -> None:
    with stopped(mount.pid):
        said = run(f"timeout 20 {WHY} {mount.path}", code=2)
    assert "has not answered for 2 s" in said
    assert f"ttmfs doctor {mount.path} says what to do" in said


def test_why_shows_a_stranger_no_names_of_others(place: Place) -> None:
    with place.directory("why") as path, Mount(path, "size=1m,mode=1777,allow_other", cwd=place.path):
        with raises_errno(errno.EPERM):
            (path / ".secret").mkdir()
        with acting_as(ALICE), raises_errno(errno.EPERM):
            os.getxattr(path, "user.ttmfs.refusals")
        assert b"mkdir" in os.getxattr(path, "user.ttmfs.refusals")


def test_the_log_has_a_few_of_many_refusals_and_their_count(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    kept = Refusals()
    for n in range(1000):
        kept.note("write", errno.ENOSPC, errors.NoRoom(f"{n}"))
    assert [record.getMessage() for record in caplog.records] == ["refused: write: ENOSPC: 0"]
    monkeypatch.setattr(refusals, "KIND_SECONDS", 0.0)
    monkeypatch.setattr(refusals, "LINE_SECONDS", 0.0)
    kept.note("write", errno.ENOSPC, errors.NoRoom("last"))
    assert "(999 more before this were not logged)" in caplog.records[-1].getMessage()
    assert [row["reason"] for row in json.loads(kept.text())][-2:] == ["999", "last"]
    assert len(json.loads(kept.text())) == refusals.KEPT


def test_the_attribute_holds_long_reasons() -> None:
    kept = Refusals()
    for _ in range(100):
        kept.note("setxattr", errno.EINVAL, errors.InvalidArgument("\U0001f4be" * 70_000))
    assert len(kept.text()) <= 65536
    assert json.loads(kept.text())


def test_ordinary_errors_are_not_recorded_as_refusals() -> None:
    kept = Refusals()
    for error in refusals.ORDINARY:
        kept.note("open", errno.ESTALE, error("it is gone"))
    assert kept.text() == "[]"
