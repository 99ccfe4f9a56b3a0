"""How much one user can store (uid_size): it holds under races, over restarts, and on every kind of store."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Mount, count, opened, raises_errno, wait_until
from stores import ALICE, BOB, Place, acting_as, as_user

PAGE = os.sysconf("SC_PAGE_SIZE")
LIMIT = 64
"""Pages that a user may have."""


@pytest.fixture(params=["in memory", "in a directory"])
def mnt(request: pytest.FixtureRequest, place: Place, tmp_path: Path) -> Iterator[Path]:
    """A mount in which everyone can make backups."""
    store = ""
    if request.param == "in a directory":
        (tmp_path / "store").mkdir(mode=0o1777)
        (tmp_path / "store").chmod(0o1777)
        store = f",store={tmp_path / 'store'}"
    options = f"size=16m,backup_size=4m,allow_other,uid_size={LIMIT * PAGE}" + (store or ",mode=1777")
    with place.directory("shared") as path, Mount(path, options, cwd=place.path) as mount:
        mount.expect_restarts()
        yield mount.path


def fill(backup: Path, number: int) -> int:
    """Store up to a number of new pages. Returns how many were stored."""
    for handle in range(1, number + 1):
        try:
            (backup / str(handle)).write_bytes(bytes([handle % 256]) * PAGE)
        except OSError as error:
            if error.errno != errno.EDQUOT:
                raise
            return handle - 1
    return number


def free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize // PAGE


def test_c16_a_user_quota_limits_only_that_user(mnt: Path) -> None:
    with acting_as(ALICE):
        (mnt / "a").mkdir()
        assert free(mnt) == LIMIT - 1, "a backup counts as a page"
        assert fill(mnt / "a", LIMIT) == LIMIT - 1
        assert free(mnt) == 0
        with raises_errno(errno.EDQUOT):
            (mnt / "b").mkdir()
        (mnt / "a/1").write_bytes(b"\2" * PAGE)  # what is there may be stored over
        with opened(mnt / "a/.image") as image:
            assert os.pwrite(image, b"\3" * PAGE, 0) == PAGE
            with raises_errno(errno.EDQUOT):
                os.pwrite(image, b"\3" * PAGE, 100 * PAGE)
            (mnt / "a/5").unlink()
            (mnt / "a/6").unlink()
            assert os.pwrite(image, b"\4" * 4 * PAGE, 100 * PAGE) == 2 * PAGE, "as far as there is room"
        assert count(mnt / "a", "pages") == LIMIT - 1
    with acting_as(BOB):
        (mnt / "b").mkdir()
        assert fill(mnt / "b", LIMIT) == LIMIT - 1
    (mnt / "r").mkdir()
    assert fill(mnt / "r", 3 * LIMIT) == 3 * LIMIT, "root is not bound"
    with acting_as(ALICE):
        os.truncate(mnt / "a/.image", 0)
        assert free(mnt) == LIMIT - 1
        (mnt / "a").rmdir()
        assert free(mnt) == LIMIT


def test_c16_a_backup_counts_for_its_current_owner(mnt: Path) -> None:
    with acting_as(ALICE):
        (mnt / "a").mkdir()
        (mnt / "a").chmod(0o777)
    with acting_as(BOB):
        assert fill(mnt / "a", LIMIT) == LIMIT - 1
        (mnt / "b").mkdir()
    with acting_as(ALICE), raises_errno(errno.EDQUOT):
        (mnt / "more").mkdir()
    with raises_errno(errno.EDQUOT):
        os.chown(mnt / "a", BOB, -1)
    os.chown(mnt / "a", 0, 0)
    with acting_as(ALICE):
        assert free(mnt) == LIMIT
    with acting_as(BOB):
        (mnt / "b").rmdir()
    os.chown(mnt / "a", BOB, -1)
    with acting_as(BOB):
        assert free(mnt) == 0


WRITER = """
import errno, os, sys
backup, way = sys.argv[1:]
os.mkdir(backup)
sys.stdin.readline()
stored = 0
for idx in range(1024):
    try:
        fd = os.open(f"{backup}/{idx + 1}" if way == "page" else f"{backup}/.image", os.O_CREAT | os.O_WRONLY)
        stored += os.pwrite(fd, b"x" * 4096, 0 if way == "page" else idx * 4096) == 4096
        os.close(fd)
    except OSError as error:
        if error.errno != errno.EDQUOT:
            raise
        break
print(stored)
"""


def test_c16_eight_processes_of_a_user_race_for_the_last_pages(mnt: Path, place: Place) -> None:
    writers = [
        subprocess.Popen(
            [place.python, "-c", WRITER, str(mnt / f"b{number}"), "page" if number % 2 else "image"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **as_user(ALICE),
        )
        for number in range(8)
    ]  # fmt: skip
    wait_until(lambda: len(list(mnt.iterdir())) == 8, "their backups")
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("\n")
        writer.stdin.flush()
    stored = [int(writer.communicate(timeout=30)[0]) for writer in writers]
    assert sum(stored) == LIMIT - 8
    assert sum(count(mnt / f"b{number}", "pages") for number in range(8)) == LIMIT - 8


def test_c22_the_quota_counts_stored_pages_after_a_kill(place: Place) -> None:
    options = f"size=16m,backup_size=4m,allow_other,mode=1777,uid_size={LIMIT * PAGE}"
    with place.directory("shared") as path, Mount(path, options, cwd=place.path) as mount:
        mount.expect_restarts()
        with acting_as(ALICE):
            (path / "a").mkdir()
            fill(path / "a", 10)
        mount.kill()
        with acting_as(ALICE):
            assert free(path) == LIMIT - 11
            assert fill(path / "a", LIMIT) == LIMIT - 1


def test_changing_the_group_needs_no_room(mnt: Path) -> None:
    """chown(1) passes both ids, even if only one is new."""
    with acting_as(ALICE):
        (mnt / "a").mkdir()
        assert fill(mnt / "a", LIMIT) == LIMIT - 1
    os.chown(mnt / "a", ALICE, BOB)
    assert ((mnt / "a").stat().st_uid, (mnt / "a").stat().st_gid) == (ALICE, BOB)
