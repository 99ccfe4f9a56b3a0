"""Permissions: a user's private mount, and a mount that several users share."""

import json
import os
import re
import shlex
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Mount, children, opened, run
from stores import (
    ALICE,
    BOB,
    CAROL,
    UNSHARE,
    WITHOUT_USER_NAMESPACES,
    Place,
    UsersMount,
    acting_as,
    as_user,
    site_of,
)
from ttmfs.options import ExitCode

AS_ALICE, AS_BOB = (f"setpriv --reuid {uid} --regid {uid} --clear-groups" for uid in (ALICE, BOB))


def refused(uid: int, command: str, reason: str, **more: Any) -> None:
    """Check that a user's command fails with a reason."""
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False, **as_user(uid, **more)
    )
    assert done.returncode, f"{command} was carried out"
    assert reason in done.stderr


@pytest.fixture
def home(place: Place) -> Iterator[Path]:
    """An empty directory of Alice."""
    with place.directory("home", ALICE) as path:
        yield path


@pytest.fixture
def shared(place: Place) -> Iterator[Path]:
    """An empty directory of root that everyone can reach."""
    with place.directory("shared") as path:
        yield path


# --- a user mounts for himself ---


@pytest.mark.parametrize("end", ["fusermount3 -u home", "umount home", "fusermount3 -u -z home", "kill -TERM $PID"])
def test_a_user_can_mount_store_read_drop_and_unmount(place: Place, home: Path, end: str) -> None:
    """All of it in the background and without any privilege."""
    before = children()
    script = f"""
set -e
{place.command} mine home -o size=1m
test "$(stat -c %u:%g:%a home)" = {ALICE}:{ALICE}:755
test "$(df --output=source,size home | tail -1 | xargs)" = "mine 1024"
mkdir home/a
page=$(head -c 3000 /dev/urandom | base64)
echo "$page" > home/a/7
test "$(tr -d '\\0' < home/a/7)" = "$page"
test "$(ls home/a)" = 7
test "$(stat -c %u home/a/7)" = {ALICE}
! said=$(dd if=/dev/zero of=home/a/.image bs=4096 count=512 conv=notrunc 2>&1)
test "$(ls home/a | wc -l)" = 256
! rmdir home/a 2>&1
rm home/a/*
rmdir home/a
"""
    run(script, **as_user(ALICE, cwd=place.path))
    (pid,) = children() - before
    run(end, **as_user(ALICE, cwd=place.path, env={**os.environ, "PID": str(pid)}))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert list(home.iterdir()) == []


def test_a_mount_of_a_user_is_closed_to_root_and_others(place: Place, home: Path) -> None:
    with UsersMount(place, home, "size=1m"):
        with pytest.raises(PermissionError):
            home.stat()
        with pytest.raises(PermissionError):
            (home / "a").mkdir()
        refused(BOB, f"ls {home}", "Permission denied")
        run(f"ls {home}", **as_user(ALICE))
        (row,) = json.loads(run(f"findmnt --json -M {home}"))["filesystems"]
        assert row["fstype"] == "fuse.ttmfs"
        shown = set(row["options"].split(","))
        assert {f"user_id={ALICE}", f"group_id={ALICE}", "nosuid", "nodev", "default_permissions"} <= shown


def test_a_user_can_change_the_budget_of_a_mount(place: Place, home: Path) -> None:
    def budget() -> int:
        size = int(run(f"getfattr --absolute-names --only-values -n user.ttmfs.size {home}", **as_user(ALICE)))
        assert int(run(f"df --output=size -B1 {home} | tail -1", **as_user(ALICE))) == size
        return size

    with UsersMount(place, home, "size=1m"):
        assert budget() == 1 << 20
        run(f"setfattr -n user.ttmfs.size -v 2m {home}", **as_user(ALICE))
        assert budget() == 2 << 20
        run(f"cd {home}; mkdir a; truncate -s 1m a/.image", **as_user(ALICE))
        run(f"dd if=/dev/zero of={home}/a/.image bs=64k count=16 conv=notrunc", **as_user(ALICE))
        refused(ALICE, f"setfattr -n user.ttmfs.size -v 512k {home}", "Invalid argument")
        assert budget() == 2 << 20


def test_a_user_gets_no_set_id_bits_even_if_he_asks(place: Place, home: Path) -> None:
    with UsersMount(place, home, "suid,dev"):
        shown = run(f"findmnt -no OPTIONS -M {home}").strip().split(",")
        assert {"nosuid", "nodev"} <= set(shown)


def test_the_shmem_link_works_for_the_user_of_the_mount(place: Place, home: Path) -> None:
    with UsersMount(place, home, "size=1m"):
        run(f"cd {home}; mkdir a; echo one > a/1; cmp -n 4096 a/1 a/.shmem", **as_user(ALICE))
        run(f"echo two | dd of={home}/a/.shmem conv=notrunc && grep -q two {home}/a/1", **as_user(ALICE))
        target = run(f"readlink {home}/a/.shmem", **as_user(ALICE)).strip()
        assert Path(target).read_bytes()[:4] == b"two\n"  # root, too, by that way
        refused(BOB, f"cat {target}", "Permission denied")


@pytest.mark.parametrize(
    ("prepare", "options", "code", "reason"),
    [
        ("true", "allow_other", 32, "option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf"),
        ("chown 0 home", "ro", 32, "user has no write access to mountpoint"),
        ("chmod 000 home; chown 0 home", "ro", 32, "failed to chdir to mountpoint: Permission denied"),
        ("mknod -m 600 fuse c 10 229; mount --bind fuse /dev/fuse", "ro", 2, "failed to open /dev/fuse: Permission"),
        ("true", "uid=0", 2, "can give only their own uid= and gid="),
        ("true", "gid=0", 2, "can give only their own uid= and gid="),
    ],
)
def test_options_that_need_privilege_are_refused_with_the_reason(
    place: Place, home: Path, prepare: str, options: str, code: int, reason: str
) -> None:
    """A private mount namespace prepares the machine for each case."""
    script = f"{prepare}; {AS_ALICE} {place.command} home -o {options}"
    try:
        done = subprocess.run(
            ["unshare", "-m", "bash", "-c", script],
            cwd=place.path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        (place.path / "fuse").unlink(missing_ok=True)
        os.chown(home, ALICE, ALICE)
    assert re.fullmatch(f"mount.py: .*{reason}.*\n", done.stderr)
    assert (done.stdout, ExitCode(done.returncode)) == ("", code)


def test_a_user_without_namespaces_and_memory_files_gets_the_reason(place: Place, home: Path) -> None:
    become = (place.python, "-I", "-c", WITHOUT_USER_NAMESPACES, UNSHARE, ALICE, place.path)
    command = shlex.join([*map(str, become), *place.mount_command, str(home)])
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", f"mount -t tmpfs -o ro none /dev/shm; XDG_RUNTIME_DIR=/dev/shm {command}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Users other than root need user namespaces" in done.stderr
    assert (done.stdout, ExitCode(done.returncode)) == ("", ExitCode.SYSTEM)


@pytest.mark.usefixtures("home")
def test_a_user_can_let_others_in_if_fuse_conf_allows_it(place: Place) -> None:
    """The test has its own fuse.conf, in a private mount namespace. Others cannot own backups there."""
    before = children()
    script = f"""
mount --bind {place.path}/fuse.conf /etc/fuse.conf
{AS_ALICE} {place.command} home -o size=1m,allow_other,mode=1777
findmnt -no OPTIONS -M home | grep -q allow_other
{AS_ALICE} mkdir -m 777 home/a
{AS_BOB} sh -c 'echo bob > home/a/1'
echo root > home/a/2
stat -c %u home home/a home/a/1 home/a/2
! {AS_BOB} mkdir home/b
! mkdir home/b
{AS_ALICE} fusermount3 -u home
"""
    (place.path / "fuse.conf").write_text("user_allow_other\n")
    try:
        said = run("unshare -m bash -e", cwd=place.path, input=script)
    finally:
        (place.path / "fuse.conf").unlink()
    assert said.startswith(f"{ALICE}\n" * 4)
    assert said.count("mkdir: cannot create directory") == said.count("Operation not permitted") == 2
    (pid,) = children() - before
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("kind", ["user", "fallback"])
def test_a_backup_that_its_owner_can_only_read_stays_and_blocks_no_other(
    place: Place, tmp_path: Path, kind: str
) -> None:
    """The daemon keeps few files open, and has only its user's rights to open this one again."""
    with site_of(kind, place, tmp_path) as site, site.mount("size=16m") as mount, site.acting():
        kept = mount.path / "kept"
        kept.mkdir(0o700)
        (kept / "1").write_bytes(b"x" * 4096)
        kept.chmod(0o500)
        for n in range(300):
            (mount.path / f"other {n}").mkdir(0o500 if n % 2 else 0o700)
        assert len(os.listdir(mount.path)) == 301
        assert owner(kept) == (ALICE, ALICE, 0o500)
        assert (kept / "1").read_bytes() == b"x" * 4096
        time.sleep(1.1)  # then the daemon looks at all of them
        assert os.statvfs(mount.path).f_bfree == os.statvfs(mount.path).f_blocks - 1
        (mount.path / "other 0" / "1").write_bytes(b"y")
        kept.chmod(0o700)
        (kept / "2").write_bytes(b"z")
        mount.path.chmod(0o500)  # at the end nothing of the store is left all the same


def test_a_directory_of_a_user_keeps_read_only_backups(place: Place, home: Path) -> None:
    with place.directory("below", ALICE) as below:
        for made in (True, False):
            with UsersMount(place, home, f"store={below},size=1m"), acting_as(ALICE):
                if made:
                    for name, mode in ("a", 0o500), ("b", 0o700):
                        (home / name).mkdir(mode)
                    (home / "b/1").write_bytes(b"b" * 4096)
                    (home / "b").chmod(0o500)
                assert sorted(os.listdir(home)) == ["a", "b"]
                assert [owner(home / name)[2] for name in "ab"] == [0o500] * 2
                assert (home / "b/1").read_bytes() == b"b" * 4096
                assert os.statvfs(home).f_bfree == 255
                (home / "c").mkdir()
                (home / "c/1").write_bytes(b"c")
                (home / "c/1").unlink()
                (home / "c").rmdir()
        run(f"find {below} -mindepth 1 -delete")


# --- several users on one mount of root's ---


def test_a_mount_of_root_is_closed_to_others(place: Place, shared: Path) -> None:
    with Mount(shared, "size=1m,mode=1777", cwd=place.path):
        (shared / "a").mkdir()
        refused(ALICE, f"ls {shared}", "Permission denied")
        refused(ALICE, f"mkdir {shared}/b", "Permission denied")
        assert os.listdir(shared) == ["a"]


@pytest.fixture
def open_to_all(place: Place, shared: Path) -> Iterator[Path]:
    with Mount(shared, "size=4m,mode=1777,allow_other", cwd=place.path):
        yield shared


def owner(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o000, 0o777)])
def test_a_backup_and_its_pages_belong_to_their_creator(open_to_all: Path, umask: int, mode: int) -> None:
    for uid in ALICE, BOB, CAROL:
        run(f"mkdir {uid}; echo x > {uid}/1", **as_user(uid, cwd=open_to_all, umask=umask))
        assert owner(open_to_all / str(uid)) == (uid, uid, mode)
        assert owner(open_to_all / str(uid) / "1") == (uid, uid, mode & 0o666)
        assert owner(open_to_all / str(uid) / ".image") == (uid, uid, mode & 0o666)


def test_the_mode_of_a_backup_decides_who_can_read_and_write(open_to_all: Path) -> None:
    run("mkdir -m 755 a; echo x > a/1; mkdir -m 700 b; echo x > b/1", **as_user(ALICE, cwd=open_to_all))
    for uid in BOB, CAROL:
        run("cat a/1; ls -l a; head -c 1 a/.image; stat b", **as_user(uid, cwd=open_to_all))
        for command in (
            *("cat b/1", "ls b", "cat b/.image", "stat b/1", "readlink -v b/.shmem", "touch b/2"),
            *("echo y > a/1", "touch a/2", "rm -f a/1", "truncate -s 0 a/.image", "echo y >> a/.image"),
            *("setfattr -n user.ttmfs.drop -v 1 a", "setfattr -n user.ttmfs.size -v 1m a"),
        ):
            refused(uid, command, "Permission denied", cwd=open_to_all)
        for command in "chmod 777 a", "chown $UID a", "touch -d 2001-01-01 a", "chmod 666 a/1":
            refused(uid, command, "Operation not permitted", cwd=open_to_all)
    run("chmod 777 a", **as_user(ALICE, cwd=open_to_all))
    run("echo y > a/2; rm a/1; test $(stat -c %u a/2) = 65534", **as_user(BOB, cwd=open_to_all))
    run("test \"$(cat b/1 | tr -d '\\0')\" = x; rm -r b", cwd=open_to_all)  # root


def test_only_the_owner_can_rename_and_remove_in_a_sticky_root(open_to_all: Path) -> None:
    run("mkdir a b; mkdir -m 777 c", **as_user(ALICE, cwd=open_to_all))
    run("mkdir d", **as_user(BOB, cwd=open_to_all))
    for command in "rmdir a", "mv -T a e", "mv -T d a", "rmdir c":
        refused(BOB, command, "Operation not permitted", cwd=open_to_all)
    run("mv -T a e; rmdir e b", **as_user(ALICE, cwd=open_to_all))
    run("rmdir c d", cwd=open_to_all)  # root
    assert os.listdir(open_to_all) == []


def test_a_setgid_root_passes_its_group_on(place: Place, shared: Path) -> None:
    with Mount(shared, f"size=1m,mode=2777,gid={CAROL},allow_other", cwd=place.path):
        run("mkdir a; echo x > a/1", **as_user(ALICE, cwd=shared, umask=0o027))
        assert owner(shared / "a") == (ALICE, CAROL, 0o2750)
        assert owner(shared / "a/1") == (ALICE, CAROL, 0o640)
        run("cat a/1", **as_user(CAROL, cwd=shared))
        refused(BOB, "cat a/1", "Permission denied", cwd=shared)


@pytest.mark.parametrize(("mode", "reason"), [("755", "Permission denied"), ("777", "Operation not permitted")])
def test_only_root_can_change_the_budget(place: Place, shared: Path, mode: str, reason: str) -> None:
    """This holds even if everyone may write to the root, and so may set its other attributes."""
    with Mount(shared, f"size=1m,mode={mode},allow_other", cwd=place.path):
        for uid in ALICE, BOB:
            refused(uid, f"setfattr -n user.ttmfs.size -v 2m {shared}", reason)
            assert run(f"getfattr --absolute-names --only-values -n user.ttmfs.size {shared}", **as_user(uid)) == str(
                1 << 20
            )
        run(f"setfattr -n user.ttmfs.size -v 2m {shared}")
        assert os.getxattr(shared, "user.ttmfs.size") == b"%d" % (2 << 20)


def test_everyone_can_read_the_statistics_but_not_write_them(open_to_all: Path) -> None:
    run("cat .stats .config; df .", **as_user(ALICE, cwd=open_to_all))
    refused(ALICE, "echo > .stats", "Permission denied", cwd=open_to_all)
    with pytest.raises(PermissionError):
        (open_to_all / ".config").write_text("{}")
    assert json.loads((open_to_all / ".config").read_text())["allow_other"] is True


@pytest.mark.parametrize("killed", [False, True], ids=["", "and the daemon is killed"])
def test_a_new_mode_takes_effect_at_once_if_set_by_descriptor(place: Place, *, killed: bool) -> None:
    """The kernel may cache a page's mode for a second, and the next daemon does not know that it changed."""
    with place.directory("shared") as path, Mount(path, "size=4m,allow_other,mode=1777", cwd=place.path) as mount:
        mount.expect_restarts()
        (path / "a").mkdir()
        (path / "a").chmod(0o777)
        (path / "a/1").write_bytes(b"precious")
        with opened(path / "a/1", os.O_PATH) as page:
            link = Path(f"/proc/self/fd/{page}")
            with acting_as(ALICE), opened(link):  # the kernel is asked, and remembers
                pass
            (path / "a").chmod(0o700)
            if killed:
                mount.kill()
            with acting_as(ALICE):
                for _ in range(5):
                    with pytest.raises(PermissionError):
                        os.truncate(link, 0)
                    for flags in os.O_RDONLY, os.O_WRONLY, os.O_RDWR:
                        with pytest.raises(PermissionError):
                            os.open(link, flags)
        assert (path / "a/1").read_bytes()[:8] == b"precious"
