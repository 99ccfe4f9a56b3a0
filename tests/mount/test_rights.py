"""C24: no way to a descriptor of a page grants more than open(2) of the same page does."""

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import Mount, opened, raises_errno, run
from stores import ALICE, BOB, CAROL, Place, acting_as, as_user

PAGE = 4096
CREATE = os.O_CREAT | os.O_EXCL
READING = {"rdonly": os.O_RDONLY, "rdwr": os.O_RDWR}


@pytest.fixture(scope="module")
def root(place: Place) -> Iterator[Path]:
    """A mount that everyone can use."""
    with (
        place.directory("rights") as path,
        Mount(path, "size=16m,mode=1777,allow_other", cwd=place.path),
    ):
        yield path


@pytest.fixture
def alices(root: Path) -> Iterator[Path]:
    """A backup of Alice, whose mode the tests set."""
    path = root / "alices"
    with acting_as(ALICE):
        path.mkdir()
    yield path
    path.chmod(0o700)
    os.truncate(path / ".image", 0)
    path.rmdir()


@pytest.mark.parametrize("access", READING)
@pytest.mark.parametrize("more", [0, os.O_EXCL, os.O_TRUNC, os.O_SYNC, os.O_APPEND])
def test_c24_creating_a_page_to_read_needs_the_right_to_read(alices: Path, access: str, more: int) -> None:
    alices.chmod(0o733)
    if READING[access] == os.O_RDONLY and more == os.O_APPEND:
        more = 0
    with acting_as(BOB):
        with raises_errno(errno.EACCES):
            os.open(alices / "1", READING[access] | os.O_CREAT | more)
        with opened(alices / "2", os.O_WRONLY | CREATE | more & ~os.O_APPEND) as page:  # what cp, tar and > do
            os.write(page, b"bob")
            with raises_errno(errno.EBADF):
                os.pread(page, 1, 0)
    assert os.listdir(alices) == ["2"], "nothing is left of what was refused"
    assert (alices / "2").read_bytes()[:3] == b"bob"


def test_c24_descriptors_kept_by_a_stranger_show_no_page_stored_later(alices: Path) -> None:
    """The attack: create and unlink pages, keep the descriptors, and wait for the owner."""
    alices.chmod(0o733)
    kept: list[int] = []
    with acting_as(BOB):
        for handle in range(1, 9):
            for flags in READING.values():
                with contextlib.suppress(PermissionError):
                    kept.append(os.open(alices / str(handle), flags | os.O_CREAT))
                    os.unlink(alices / str(handle))
            with contextlib.suppress(PermissionError):
                os.mknod(alices / str(handle), 0o666 | stat.S_IFREG)
                kept.append(os.open(alices / str(handle), os.O_RDONLY))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(alices / str(handle))
            with contextlib.suppress(OSError):
                kept.append(os.open(alices, os.O_TMPFILE | os.O_RDWR))
    with acting_as(ALICE):
        for handle in range(1, 9):
            (alices / str(handle)).write_bytes(b"secret" * 100)
    try:
        for fd in kept:
            assert b"secret" not in os.pread(fd, PAGE, 0)
        assert not kept
    finally:
        for fd in kept:
            os.close(fd)


@pytest.mark.parametrize(
    "way",
    [
        lambda path: os.open(path, os.O_RDONLY | os.O_TRUNC),
        lambda path: os.open(path, os.O_RDWR | os.O_CREAT),
        lambda path: os.open(path.parent / ".image", os.O_RDONLY),
        lambda path: os.open(path.parent / ".image", os.O_RDWR | os.O_CREAT),
        lambda path: os.open(path.parent / ".shmem", os.O_RDONLY),
        lambda path: reopened(path, os.O_RDONLY),
        lambda path: reopened(path, os.O_RDWR),
        lambda path: os.listdir(path.parent),
        lambda path: os.getxattr(path.parent, "user.ttmfs.map"),
    ],
)
def test_c24_no_way_of_reading_bypasses_the_mode_bits(alices: Path, way: Callable[[Path], object]) -> None:
    alices.chmod(0o733)
    (alices / "1").write_bytes(b"secret")
    with acting_as(BOB), raises_errno(errno.EACCES):
        way(alices / "1")
    assert (alices / "1").read_bytes()[:6] == b"secret"


def reopened(path: Path, flags: int) -> int:
    """A descriptor through /proc/self/fd, which looks no name up."""
    with opened(path, os.O_PATH) as found:
        return os.open(f"/proc/self/fd/{found}", flags)


def test_c24_a_descriptor_link_or_a_rename_gives_no_right_to_read(root: Path, alices: Path) -> None:
    alices.chmod(0o733)
    with acting_as(BOB), opened(alices / "1", os.O_WRONLY | CREATE) as page:
        with pytest.raises(PermissionError):
            os.open(f"/proc/self/fd/{page}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.link(alices / "1", alices / "2")
        with pytest.raises(PermissionError):
            alices.rename(root / "bobs")
    (alices / "1").unlink()


@pytest.mark.parametrize("mode", [0o300, 0o733, 0o333])
def test_c24_the_owner_bits_apply_to_the_owner_who_can_still_store(alices: Path, mode: int) -> None:
    """As with open(2): an owner who may not read the backup may not read its pages."""
    alices.chmod(mode)
    may_read = bool(mode & 0o400)
    with acting_as(ALICE):
        if may_read:
            with opened(alices / "1", os.O_RDWR | CREATE):
                pass
        else:
            with raises_errno(errno.EACCES):
                os.open(alices / "1", os.O_RDWR | CREATE)
        page = os.open(alices / "2", os.O_WRONLY | CREATE, 0)  # the mode that open(2) asks for is not the page's
        try:
            assert os.pwrite(page, b"x" * PAGE, 0) == PAGE
        finally:
            os.close(page)


def test_c24_supplementary_groups_count(alices: Path) -> None:
    os.chown(alices, ALICE, CAROL)
    script = "import os; os.open('1', os.O_RDWR | os.O_CREAT); os.unlink('1')"

    def tried(mode: int, gid: int, groups: list[int]) -> bool:
        alices.chmod(mode)
        done = subprocess.run(
            ["python3", "-I", "-c", script], cwd=alices.parent / "alices", user=BOB, group=gid, extra_groups=groups,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not done.returncode or "PermissionError" in done.stderr, done.stderr
        return not done.returncode

    for gid, groups in (CAROL, []), (BOB, [CAROL]), (BOB, [ALICE, CAROL]):
        assert tried(0o770, gid, groups)
        assert tried(0o773, gid, groups)
        assert not tried(0o737, gid, groups), "the group's bits decide, others' do not"
        assert not tried(0o730, gid, groups)
    for gid, groups in (BOB, []), (BOB, [ALICE]):
        assert tried(0o777, gid, groups)
        assert tried(0o737, gid, groups)
        assert not tried(0o773, gid, groups)


@pytest.mark.parametrize("killed", [False, True], ids=["", "and the daemon is killed"])
def test_c24_creating_a_page_obeys_the_current_mode(place: Place, *, killed: bool) -> None:
    with place.directory("shared") as path, Mount(path, "size=4m,allow_other,mode=1777", cwd=place.path) as mount:
        mount.expect_restarts()
        for number in range(4):
            (path / "a").mkdir(exist_ok=True)
            (path / "a").chmod(0o777)
            with acting_as(BOB), opened(path / "a/1", os.O_RDWR | os.O_CREAT):
                os.unlink(path / "a/1")
            (path / "a").chmod((0o733, 0o744, 0o700, 0o722)[number])
            if killed:
                mount.kill()
            with acting_as(BOB):
                for flags in READING.values():
                    with raises_errno(errno.EACCES):
                        os.open(path / "a/1", flags | os.O_CREAT)


def test_a_set_group_id_backup_has_the_same_permission_checks(alices: Path) -> None:
    alices.chmod(0o2733)
    with acting_as(BOB), raises_errno(errno.EACCES):
        os.open(alices / "1", os.O_RDWR | CREATE)


TOOLS = """
cp source rights/alices/1
cat source > rights/alices/2
dd if=source of=rights/alices/3 status=none
touch rights/alices/4
tee rights/alices/5 < source > /dev/null
head -c 4096 source | split -b 4096 -a 1 --numeric-suffixes=6 - rights/alices/
set -C; cat source > rights/alices/7
"""
INSTALL = "install -m 644 source rights/alices/8\n"  # which asks for the owner's right
TAR = "ln source 9; tar -cf - 9 | tar -C rights/alices -xf -; rm 9\n"  # which reads the directory


@pytest.mark.parametrize(
    ("uid", "mode", "commands", "count"),
    [(BOB, 0o733, TOOLS, 7), (ALICE, 0o300, TOOLS + INSTALL, 8), (ALICE, 0o700, TOOLS + INSTALL + TAR, 9)],
)
def test_tools_store_pages_with_write_permission_only(
    alices: Path, uid: int, mode: int, commands: str, count: int
) -> None:
    alices.chmod(mode)
    place = alices.parent.parent
    (place / "source").write_bytes(b"y" * PAGE)
    os.chown(place / "source", uid, uid)
    place.chmod(0o777)
    try:
        run("set -e" + commands, **as_user(uid, cwd=place))
    finally:
        place.chmod(0o755)
        (place / "source").unlink()
    stored = {path.name: path.read_bytes() for path in alices.iterdir()}
    assert stored == {str(n): b"\0" * PAGE if n == 4 else b"y" * PAGE for n in range(1, count + 1)}
