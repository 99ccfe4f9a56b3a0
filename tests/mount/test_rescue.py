"""``ttmfs rescue`` copies pages out of a keeper that gave up after a broken upgrade, and out of other keepers."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harness import REPOSITORY, Mount, children, opened, run, wait_until

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 1 << 40
TTMFS = f"{sys.executable} -m ttmfs"
ODD = 'a "quoted" näme\nof two lines'


def content(seed: int, pages: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(pages * PAGE)


def fill(mountpoint: Path) -> None:
    """Make backups of all sorts: sparse, empty, with odd names, of another user, and without permissions."""
    for name in "sparse", "empty", ODD, "another's", "shut":
        (mountpoint / name).mkdir()
    for handle in 1, 2, 1000, SIZE // PAGE // 2, (1 << 28) - 7:
        (mountpoint / "sparse" / str(handle)).write_bytes(content(handle))
    (mountpoint / "sparse/5").touch()  # a page of zeros
    (mountpoint / ODD / "1").write_bytes(content(1))
    with opened(mountpoint / "another's/.image") as fd:
        os.pwrite(fd, content(2, 700), 0)
    os.chown(mountpoint / "another's", 12, 34)
    (mountpoint / "shut/3").write_bytes(content(3))
    (mountpoint / "shut").chmod(0)


def verify(copy: Path) -> None:
    """Check that the copies are the backups of :func:`fill`, and as sparse."""
    assert sorted(os.listdir(copy)) == sorted([".CHECKSUMS", "sparse", "empty", ODD, "another's", "shut"])
    with opened(copy / "sparse", os.O_RDONLY) as fd:
        found = os.fstat(fd)
        assert found.st_size == SIZE
        assert found.st_blocks * 512 <= 16 * PAGE
        for handle in 1, 2, 1000, SIZE // PAGE // 2, (1 << 28) - 7:
            assert os.pread(fd, PAGE, (handle - 1) * PAGE) == content(handle)
        assert os.pread(fd, PAGE, 4 * PAGE) == bytes(PAGE)
    assert (copy / "empty").stat().st_blocks == 0
    with opened(copy / ODD, os.O_RDONLY) as fd:
        assert os.pread(fd, 2 * PAGE, 0) == content(1) + bytes(PAGE)
    with opened(copy / "another's", os.O_RDONLY) as fd:
        assert os.pread(fd, 701 * PAGE, 0) == content(2, 700) + bytes(PAGE)
        assert (os.fstat(fd).st_uid, os.fstat(fd).st_gid) == (12, 34)
    assert stat.S_IMODE((copy / "shut").stat().st_mode) == 0


@pytest.fixture
def given_up(tmp_path: Path, mountpoint: Path) -> "Iterator[subprocess.Popen[str]]":
    """A mount whose keeper gave up, because its package was broken."""
    package = tmp_path / "package"
    shutil.copytree(REPOSITORY / "ttmfs", package / "ttmfs")
    shutil.copy(REPOSITORY / "mount.py", package)
    options = f"size=64m,backup_size={SIZE},standby=off"
    process = subprocess.Popen(
        [sys.executable, package / "mount.py", "-f", "-o", options, mountpoint], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert "serving" in process.stderr.readline()
        wait_until(lambda: children(process.pid), "the daemon")
        fill(mountpoint)
        (package / "ttmfs/fuse/tree.py").write_text("this is no Python")
        for daemon in children(process.pid):
            os.kill(daemon, signal.SIGKILL)
        line = next(line for line in process.stderr if "gave up" in line)
        assert f"ttmfs rescue {process.pid} DIRECTORY" in line
        yield process
    finally:
        process.terminate()
        process.wait(10)
        if process.stderr is not None:
            process.stderr.close()
        subprocess.run(["fusermount3", "-u", "-z", mountpoint], check=False)


def test_rescue_finds_the_same_backups_for_every_name_of_a_keeper(
    given_up: "subprocess.Popen[str]", mountpoint: Path, tmp_path: Path
) -> None:
    pid = given_up.pid
    descriptor = next(
        path for path in Path(f"/proc/{pid}/fd").iterdir()
        if path.is_dir() and not os.path.samefile(path, f"/proc/{pid}/cwd")
    )  # fmt: skip
    alone, copy = REPOSITORY / "ttmfs/cli/rescue.py", tmp_path
    for number, command in enumerate(
        (
            f"{TTMFS} rescue {pid}",
            f"{TTMFS} rescue {mountpoint}",
            f"{TTMFS} rescue {descriptor}",
            f"{sys.executable} -I {alone} {pid}",
        )
    ):
        copy = tmp_path / f"copy{number}"
        said = run(f"{command} {copy}", cwd=REPOSITORY)
        assert "5 of 5 backups" in said
        verify(copy)
        assert "5 of 5 backups are unchanged" in run(f"{TTMFS} rescue --check {copy}", cwd=REPOSITORY)
    assert "nothing is overwritten" in run(f"{TTMFS} rescue {pid} {copy}", cwd=REPOSITORY, code=2)
    verify(copy)


def test_rescue_copies_a_live_mount_without_disturbing_it(tmp_path: Path, mountpoint: Path) -> None:
    with Mount(mountpoint, f"size=64m,backup_size={SIZE}") as mount:
        fill(mountpoint)
        for number, pid in enumerate((mount.pid, mount.process.pid)):
            run(f"{TTMFS} rescue {pid} {tmp_path}/{number}", cwd=REPOSITORY)
            verify(tmp_path / str(number))
        assert (mountpoint / "sparse/1000").read_bytes() == content(1000)


def test_the_check_of_rescued_files_finds_changed_and_missing_ones(tmp_path: Path) -> None:
    store, copy = tmp_path / "store", tmp_path / "copy"
    store.mkdir()
    for name in "abc":
        (store / name).write_bytes(content(ord(name), 20))
    (store / ".hidden").touch()
    run(f"{TTMFS} rescue {store} {copy}", cwd=REPOSITORY)
    assert sorted(os.listdir(copy)) == [".CHECKSUMS", "a", "b", "c"]
    with opened(copy / "a") as fd:
        os.pwrite(fd, bytes([content(ord("a"), 20)[5000] ^ 1]), 5000)
    (copy / "b").unlink()
    said = run(f"{TTMFS} rescue --check {copy}", cwd=REPOSITORY, code=1)
    assert '"a": is not what was rescued' in said
    assert '"b": No such file' in said
    assert '"c": OK' in said
    os.truncate(copy / "c", 21 * PAGE)
    assert '"c": is not' in run(f"{TTMFS} rescue --check {copy}", cwd=REPOSITORY, code=1)


def test_a_backup_that_cannot_be_copied_does_not_stop_the_others(tmp_path: Path) -> None:
    store, copy = tmp_path / "store", tmp_path / "copy"
    store.mkdir()
    (store / "a").write_bytes(content(1, 300))
    (store / "b").write_bytes(content(2))
    # A limit on the size of files: as where the target's filesystem cannot hold them.
    said = run(f"ulimit -f 1000; trap '' XFSZ; {TTMFS} rescue {store} {copy}", cwd=REPOSITORY, code=1)
    assert "'a': File too large" in said
    assert "1 of 2 backups" in said
    assert sorted(os.listdir(copy)) == [".CHECKSUMS", "b"]
    assert "1 of 1" in run(f"{TTMFS} rescue --check {copy}", cwd=REPOSITORY)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("4194305 {0}/copy", "there is no process 4194305"),
        ("{0}/absent {0}/copy", "No such file or directory"),
        ("{0} /proc/nowhere", "give a directory that can be made"),
        ("{0}", "give a SOURCE"),
        ("--check {0}", "ttmfs rescue SOURCE"),
        ("--check 1 {0}", "DIRECTORY alone"),
    ],
)
def test_errors_of_rescue_are_one_line_with_what_to_do(tmp_path: Path, arguments: str, said: str) -> None:
    text = run(f"{TTMFS} rescue {arguments.format(tmp_path)}", cwd=REPOSITORY, code=2)
    assert said in text
    assert len(text.splitlines()) == 1


def test_an_interrupted_rescue_leaves_no_half_copied_file(tmp_path: Path) -> None:
    store, copy = tmp_path / "store", tmp_path / "copy"
    store.mkdir()
    (store / "a").write_bytes(content(1, 30_000))
    command = [sys.executable, "-m", "ttmfs", "rescue", str(store), str(copy)]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as client:
        wait_until(lambda: (copy / ".a.partial").exists(), "the copy to begin")
        client.send_signal(signal.SIGINT)
        assert client.stderr is not None
        assert "interrupted" in client.stderr.read()
    assert client.returncode == 130
    assert os.listdir(copy) == [".CHECKSUMS"]
