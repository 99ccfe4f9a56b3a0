"""Mistakes that newcomers make: each gets a message that names the remedy, in one line, and nothing is changed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import REPOSITORY, Mount, mounts, names, opened

PAGE = os.sysconf("SC_PAGE_SIZE")
BIN = Path(sys.executable).parent

MOUNTING = [
    ("ttmfs mount", "required: MNT"),
    ("ttmfs mount missing", "make it first: mkdir missing"),
    ("ttmfs mount file", "is not a directory; give an empty one"),
    ("ttmfs mount /usr", "would hide /usr/.*; give an empty directory"),
    ("ttmfs mount d size=1g", "mount options follow -o, as in -o size=1g"),
    ("ttmfs mount d --size=1g", "mount options follow -o, as in -o size=1g"),
    ("ttmfs mount d --size 1g", r"mount options follow -o, as in -o size=\.\.\."),
    ("ttmfs mount -t ttmfs ttm d", r"-t is an option of mount\(8\): leave it"),
    ("ttmfs mount d -o", "expected one argument; --help lists"),
    ("ttmfs mount d -o siez=1g", "unknown option 'siez=1g', perhaps 'size'"),
    ("ttmfs mount d -o size", "size needs a value: size=SIZE"),
    ("ttmfs mount d -o size=1gb", "'1gb' is not a size: .*, perhaps '1g'"),
    ("ttmfs mount d -o size=lots", "write bytes, or a number with k, m, g, t or %"),
    ("ttmfs mount d -o size=0", "0 is not allowed: leave the option out"),
    ("ttmfs mount d -o page_size=3k", "must be a power of two from 4k to 2m"),
    ("ttmfs mount d -o ro=1", "ro is a flag and takes no value"),
    ("ttmfs mount d -o keeper=yes", "'yes' is neither on nor off"),
    ("ttmfs mount d -o mode=rwx", "write it in octal, such as 0755"),
    ("ttmfs mount d -o uid=nessuno", "'nessuno' is not a user of this machine"),
    ("ttmfs mount d -o store=missing", "No such file or directory; give an existing directory"),
    ("ttmfs mount d -o store=file", "Not a directory; give an existing directory"),
    ("ttmfs mount d -o store=d/..,mode=700", "change it with chmod or chown"),
    ("ttmfs mount d -o store=.", "lies within the store .*; mount it elsewhere"),
    ("ttmfs mount M -o remount,size=2g", "cannot be remounted; ttmfs resize MNT SIZE"),
]

COMMANDS = [
    ("ttmfs", "required: COMMAND"),
    ("ttmfs lss", "there is no command 'lss'; did you mean ls[?]"),
    ("ttmfs unmount M", "did you mean umount[?]"),
    ("ttmfs remove M/a", "did you mean fini[?]"),
    ("ttmfs xyzzy", "ttmfs --help lists the commands"),
    ("ttmfs ls --jsn", "did you mean --json[?]"),
    ("ttmfs ls --sort siz", "choose from 'name', 'pages', 'size'"),
    ("ttmfs ls d", "is not a mount of ttmfs, nor a backup; ttmfs ls alone lists all"),
    ("ttmfs create M", "is the root of a mount; name a backup in it, such as M/a"),
    ("ttmfs create d/b", "d is not a mount of ttmfs; name a backup in the root of one: MNT/a"),
    ("ttmfs create M/a/b", "name a backup in the root of one: MNT/a"),
    ("ttmfs create M/.x", "names that begin with a dot are reserved"),
    ("ttmfs create M/a", "File exists; ttmfs fini M/a ends it"),
    ("ttmfs create -s 1x M/b", "'1x' is not a size: write bytes"),
    ("ttmfs create -m rwx M/b", "write it in octal, such as 0750"),
    ("ttmfs fini M", "name a backup in it, such as M/a"),
    ("ttmfs fini M/a/1", "M/a/1 is a page; name the backup, M/a"),
    ("ttmfs fini M/nope", "No such file or directory; ttmfs ls lists the backups"),
    ("exec 5<M/a/1; ttmfs fini M/a", "is in use and was left: .*; --force ends it anyway"),
    ("ttmfs map M", "name a backup in it, such as M/a"),
    ("ttmfs save M/a", "required: FILE"),
    ("ttmfs save M/a file", "file exists; --force replaces it"),
    ("ttmfs save file M/a", "file: Not a directory; name a backup, MNT/NAME"),
    ("ttmfs load missing M/b", "No such file or directory; give a file that ttmfs save made"),
    ("ttmfs load M/a file", "M/a is a directory; give the file first, then the backup"),
    ("ttmfs load saved M/a", "--continue resumes a load, --into replaces pages"),
    ("ttmfs resize M", "required: SIZE"),
    ("ttmfs resize 8g M", "SIZE: 'M' is not a size"),
    ("ttmfs resize M/a 4k", "drop them first"),
    ("ttmfs drop M/a", "give the handles to drop, such as 1-5,9, or --all; ttmfs map shows"),
    ("ttmfs drop M/a 1-9999999", "has the handles 1 to 4096, and not"),
    ("ttmfs umount M/a", "give the mount point, .*/M"),
    ("ttmfs umount d", "is not a mount of ttmfs; ttmfs doctor shows all mounts"),
    ("cd M; ttmfs umount .", "leave it with cd. .* ttmfs umount --lazy"),
    ("ttmfs restart d", "is not a mount of ttmfs; ttmfs doctor shows all mounts"),
    ("ttmfs why M/a", "give MNT, not a backup in it"),
    ("ttmfs rescue M", "give a SOURCE: a keeper's process id, a mount point"),
    ("ttmfs move M/a d", "only .*CephFS.*|only .*distributed|distributed"),
    ("ttmfs fd M/a", r"give a program: ttmfs fd MNT/NAME -- COMMAND \{\}"),
]

OPERATIONS = [
    ("echo x >M/f", "the root holds backups, not files: make one with mkdir"),
    ("cp file M/", "the root holds backups, not files: make one with mkdir"),
    ("mkdir M/.b", "names that begin with a dot are the mount's own"),
    ("echo x >M/a/x", "'x' is not a handle: pages are named 1, 2, 3 and so on"),
    ("echo x >M/a/0", "'0' is not a handle: pages are named 1, 2, 3 and so on"),
    ("mkdir M/a/b", "a backup holds pages, not directories"),
    ("mknod M/a/400 p", "a backup holds pages, not devices, pipes or sockets"),
    ("head -c 10000 /dev/zero >M/a/1", f"a page ends at byte {PAGE}; .image takes several pages"),
    ("touch M/a/9999999", "the backup ends at page 4096; ttmfs resize makes it longer"),
    ("truncate -s 1g M/a/.image", "the backup ends at byte 16777216; ttmfs resize makes it longer"),
    ("ln -s a M/l", "no links can be made here; make them outside of the mount"),
    ("rmdir M/a", "the backup 'a' holds pages; ttmfs fini ends it with them"),
    ("rm M/a/.image", "'.image' cannot be removed; it ends with its directory"),
    ("setfattr -n user.ttmfs.size -v plenty M", "'plenty' is not a size: write bytes"),
    ("setfattr -n user.ttmfs.drop -v 9-1 M/a", "the range 9-1 runs backwards"),
    ("echo 1 >M/.config", "this file can only be read"),
    ("head -c 16m /dev/zero | dd of=M/a/.image bs=1M conv=notrunc", "drop pages, or give the mount more: ttmfs resize"),
]


def test_there_are_more_than_forty() -> None:
    assert len(MOUNTING) + len(COMMANDS) + len(OPERATIONS) > 40


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a mount M that has a backup a, a directory d, and two files."""
    path = tmp_path_factory.mktemp("mistakes")
    (path / "d").mkdir()
    (path / "M").mkdir()
    (path / "file").touch()
    (path / "saved").write_bytes(b"x" * PAGE)
    with Mount(path / "M", "size=8m,backup_size=16m,reserve=0") as mount:
        (path / "M/a").mkdir()
        with opened(path / "M/a/.image") as image:
            os.pwrite(image, b"x" * 8 * PAGE, 0)
        yield path
        mount.watch_anew()


def shell(command: str, directory: Path) -> tuple[int, str]:
    """Run a shell command. Returns its status and what it printed, without a command's usage."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "LC_ALL": "C", "COLUMNS": "200"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(("usage: ", " "))]
    return done.returncode, "\n".join(said)


@pytest.mark.parametrize(("command", "remedy"), [*MOUNTING, *COMMANDS])
def test_a_wrong_command_is_answered_with_the_remedy(mistaken: Path, command: str, remedy: str) -> None:
    before = mounts(), sorted(names(mistaken)), sorted(names(mistaken / "M"))
    status, said = shell(command, mistaken)
    assert status not in (0, 4)
    assert re.search(remedy, said), said
    assert len(said.splitlines()) == 1, said
    assert before == (mounts(), sorted(names(mistaken)), sorted(names(mistaken / "M")))


@pytest.mark.parametrize(("command", "remedy"), OPERATIONS)
def test_why_tells_the_remedy_for_a_refused_operation(mistaken: Path, command: str, remedy: str) -> None:
    status, said = shell(command, mistaken)
    assert status, said
    _, why = shell("ttmfs why M", mistaken)
    assert re.search(remedy, why.splitlines()[-1]), why


def test_a_store_in_a_git_checkout_is_a_warning(tmp_path: Path) -> None:
    for name in "M", "work/store", "work/.git":
        (tmp_path / name).mkdir(parents=True)
    _, said = shell("ttmfs mount M -o store=work/store; ttmfs umount M", tmp_path)
    assert re.fullmatch(r"ttmfs mount: store=.*/store is in the git checkout .*/work: name it in \.gitignore.*", said)


def test_more_than_the_machine_has_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "M").mkdir()
    _, said = shell("ttmfs mount M -o size=100t; ttmfs umount M", tmp_path)
    assert re.fullmatch(r"ttmfs mount: size=100t is more than RAM and swap of this machine, \d+m together: .*", said)
    assert shell("ttmfs mount M -o size=1m,backup_size=100g; ttmfs umount M", tmp_path) == (0, "")


def test_a_mount_over_a_ttmfs_is_a_warning(mistaken: Path) -> None:
    _, said = shell("ttmfs mount M -o size=1m; ttmfs umount M", mistaken)
    assert re.fullmatch("ttmfs mount: another ttmfs is mounted at .*/M already: it is hidden until .*", said)


def test_no_command_prints_a_traceback_for_words_in_any_order() -> None:
    command = [sys.executable, "-m", "ttmfs"]
    for words in (["--", "ls"], ["-x"], ["ls", "--", "--x"], ["--json", "ls"], ["umount", ""], ["resize", "", ""]):
        done = subprocess.run(
            [*command, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2, words
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "command", "remedy"),
    [
        ("size=8m,reserve=900t", "echo x >M/a/1", r"must stay free \(reserve=\); free memory, add swap"),
        ("size=8m,nr_inodes=2", "mkdir M/b", r"\(nr_inodes=\) is used up; end backups, or mount with"),
        ("size=64k,reserve=0", "head -c 1m /dev/zero | dd of=M/a/.image bs=1M conv=notrunc; echo x >M/a/100",
         r"the budget \(size=\) is used up|No space left.*drop pages, or give the mount more: ttmfs resize"),
    ],
)  # fmt: skip
def test_a_lack_of_room_is_told_apart(tmp_path: Path, options: str, command: str, remedy: str) -> None:
    (tmp_path / "M").mkdir()
    with Mount(tmp_path / "M", f"{options},backup_size=4m") as mount:
        (tmp_path / "M/a").mkdir()
        status, said = shell(command, tmp_path)
        assert status, said
        assert re.search(remedy, shell("ttmfs why M", tmp_path)[1])
        found = shell("ttmfs doctor M | sed 's/^ *//'", tmp_path)[1]
        assert ("memory and swap are down to reserve=" in found) == ("reserve=900t" in options)
        mount.watch_anew()
