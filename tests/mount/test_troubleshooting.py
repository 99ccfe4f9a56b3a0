"""docs/troubleshooting.md: what it says that one sees is what one sees."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness import REPOSITORY, Mount
from stores import ALICE, Place

DOCUMENT = " ".join((REPOSITORY / "docs/troubleshooting.md").read_text().split())
ENVIRONMENT = {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "LC_ALL": "C"}


def said(command: str, cwd: Path) -> str:
    """What a shell command prints on both streams."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=ENVIRONMENT, text=True, timeout=60, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return " ".join(done.stdout.split())


def check(symptom: str, text: str) -> None:
    assert re.search(re.escape(symptom).replace(r"\.\.\.", ".*"), text), text
    assert f"`{symptom}`" in DOCUMENT, f"docs/troubleshooting.md has no `{symptom}`"


NOT_MOUNTED = {
    "ttmfs mount nowhere": "does not exist; make it first",
    "touch file; ttmfs mount file": "is not a directory; give an empty one",
    "ttmfs mount mnt -o sise=4g": "unknown option 'sise=4g', perhaps 'size'",
    "ttmfs mount mnt -o size=4q": "'4q' is not a size",
    "ttmfs mount mnt -o store=/nonexistent":
        "store=/nonexistent: No such file or directory; give an existing directory",
    "ttmfs mount mnt -o store=/proc": "its filesystem has no O_TMPFILE",
    "ttmfs umount mnt": "is not a mount of ttmfs",
    "ttmfs statsu": "there is no command 'statsu'; did you mean status?",
    f"PATH=/nonexistent {sys.executable} -m ttmfs mount mnt": "fusermount3 is not installed",
    f"{sys.executable} -S -m ttmfs export": "this needs prometheus_client",
    "python3 -c 'import socket, subprocess; s = socket.create_server((\"127.0.0.1\", 0)); subprocess.run([\"ttmfs\", "
    "\"export\", \"--listen\", \"127.0.0.1:%d\" % s.getsockname()[1]])'": "Address already in use",
}  # fmt: skip


@pytest.mark.parametrize("command", NOT_MOUNTED)
def test_messages_without_a_mount(tmp_path: Path, command: str) -> None:
    (tmp_path / "mnt").mkdir()
    command = command.replace(f"{sys.executable} ", f"PYTHONPATH={REPOSITORY} {sys.executable} ")
    check(NOT_MOUNTED[command.replace(f"PYTHONPATH={REPOSITORY} ", "")], said(command, tmp_path))


MOUNTED = {
    "head -c 2m /dev/zero | dd bs=64k of=mnt/a/.image seek=1 conv=notrunc": "No space left on device",
    "mkdir mnt/b mnt/c mnt/d": "No space left on device",
    "echo x >mnt/a/3000": "File too large",
    "echo x >mnt/a/x": "Invalid argument",
    "cat mnt/a/9": "No such file or directory",
    "touch mnt/file": "Operation not permitted",
    "mkdir mnt/.a": "Operation not permitted",
    "ln mnt/a/.image mnt/b": "Operation not permitted",
    "mkdir mnt/b; mv mnt/b mnt/a": "Operation not permitted",
    "rmdir mnt/a": "Directory not empty",
    "head -c 512k /dev/zero | dd bs=64k of=mnt/a/.image conv=notrunc; ttmfs resize mnt 64k":
        "the budget cannot be ... bytes: more is stored",
    "exec 3<mnt/a/.image; ttmfs fini mnt/a": "is in use and was left",
    "exec 3<mnt/a/.image; ttmfs umount mnt": "is busy and stays mounted",
    "ttmfs fini mnt": "is the root of a mount; name a backup in it",
}  # fmt: skip


@pytest.mark.parametrize("command", MOUNTED)
def test_messages_of_a_mount(tmp_path: Path, mountpoint: Path, command: str) -> None:
    with Mount(mountpoint, "size=1m,backup_size=4m,nr_inodes=3"):
        said("mkdir mnt/a; echo page >mnt/a/1", tmp_path)
        symptom = MOUNTED[command]
        text = said(command, tmp_path)
        assert re.search(re.escape(symptom).replace(r"\.\.\.", ".*"), text), text
        assert f"`{symptom}`" in DOCUMENT
        said("rm -f mnt/*/[1-9]*; truncate -s 0 mnt/*/.image", tmp_path)


def test_messages_of_a_store(tmp_path: Path, mountpoint: Path) -> None:
    for name in "other", "store":
        (tmp_path / name).mkdir()
    with Mount(mountpoint, f"size=1m,store={tmp_path}/store"):
        check("the store is in use by another mount", said(f"ttmfs mount other -o store={tmp_path}/store", tmp_path))
    text = said(f"ttmfs mount other -o store={tmp_path}/store,page_size=64k", tmp_path)
    check("its pages are of 4k: mount it with page_size=4k", text)


def test_messages_of_a_mount_that_is_stopped_or_dead(tmp_path: Path, mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m") as mount:
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            check("has not answered for 2 s", said("ttmfs ls mnt", tmp_path))
        finally:
            os.kill(mount.pid, signal.SIGCONT)
        mount.kill_both()
        check("Transport endpoint is not connected", said("ls mnt", tmp_path))
        check("is dead: daemon and keeper are gone", said("ttmfs doctor mnt", tmp_path))


def test_messages_to_other_users(place: Place) -> None:
    user = f"setpriv --reuid {ALICE} --regid {ALICE} --clear-groups"
    command = f"{user} env -C {place.path}/repository {place.python} -m ttmfs"
    with place.directory("closed") as closed, place.directory("roots") as roots, Mount(closed, "size=1m"):
        check("Permission denied", said(f"{user} ls {closed}", place.path))
        check("is not shown to this user", said(f"{command} export --once", place.path))
        check("user has no write access to mountpoint", said(f"{command} mount {roots}", place.path))
    with place.directory("hers", ALICE) as hers:
        text = said(f"{command} mount {hers} -o allow_other", place.path)
        check("option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf", text)


def test_the_document_has_enough_entries_and_each_has_something_to_do() -> None:
    rows = re.findall(
        r"^\| (.+) \| (.+) \| (.+) \|$", (REPOSITORY / "docs/troubleshooting.md").read_text(), re.MULTILINE
    )
    entries = [row for row in rows if row[0] not in ("you see", "---") and "---" not in row[0]]
    assert len(entries) >= 25
    assert all(do.strip() for _, _, do in entries)
