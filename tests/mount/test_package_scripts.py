"""The scripts that a package runs as root, with mounts whose names others chose. See also ``make test-packages``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import REPOSITORY, Mount

DEBIAN = REPOSITORY / "packaging/debian"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A mount point with an escape sequence, a blank and a backslash in its name."""
    path = tmp_path / "\x1b[31m \\c*"
    path.mkdir()
    return path


def script(name: str, *words: str, code: int = 0) -> str:
    """Run a script of the package. Returns its output, followed by its standard error."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", DEBIAN / name, *words], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_a_removal_names_the_mounts_without_their_control_characters(hostile: Path) -> None:
    with Mount(hostile, "size=1m"):
        said = script("ttmfs.prerm", "remove", code=1)
    assert "\x1b" not in said
    assert "/^[[31m\\040\\134c*\n" in said


def test_an_upgrade_restarts_every_mount(hostile: Path, mountpoint: Path) -> None:
    with Mount(hostile, "size=1m") as first, Mount(mountpoint, "size=1m") as second:
        for mount in first, second:
            mount.expect_log("was killed")
            mount.expect_log("taking over")
        before = first.pid, second.pid
        said = script("ttmfs.postinst", "configure", "0.0.1")
        assert said.count(" replaced by ") == 2
        assert not set(before) & {first.pid, second.pid}
