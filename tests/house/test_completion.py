"""Completion in bash, zsh and fish: made from the parser, and tried in real shells on a real mount."""

import json
import os
import pty
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import REPOSITORY, Mount
from ttmfs.cli.commands.completion import SCRIPTS
from ttmfs.cli.main import COMMANDS

ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}


def test_the_scripts_are_those_of_the_parser() -> None:
    made = runpy.run_path(str(REPOSITORY / "scripts/completions.py"))["scripts"]()
    for shell, script in made.items():
        assert SCRIPTS[shell].read_text() == script, "run .venv/bin/python scripts/completions.py"


def test_the_command_prints_the_scripts() -> None:
    for shell, path in SCRIPTS.items():
        command = [sys.executable, "-m", "ttmfs", "completion", shell]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout == path.read_text()


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount with three backups."""
    with Mount(tmp_path_factory.mktemp("completed"), "size=16m") as mount:
        for name in "activations", "activations.old", "a b":
            (mount.path / name).mkdir()
        yield mount


def in_bash(line: str, cwd: Path = REPOSITORY) -> set[str]:
    """What bash offers at the end of a line."""
    script = """\
source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_ttmfs 2>/dev/null; printf '%s\\n' "${COMPREPLY[@]}"
"""
    command = ["bash", "-c", script, "bash", str(SCRIPTS["bash"]), *line.split(" ")]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=True)
    return {word for word in done.stdout.splitlines() if word}


def in_fish(line: str) -> set[str]:
    command = ["fish", "--no-config", "-c", f"source {SCRIPTS['fish']}; complete -C {line!r}"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=True)
    return {word.partition("\t")[0] for word in done.stdout.splitlines()}


def test_bash_completes_commands_options_mounts_and_backups(mounted: Mount) -> None:
    assert {"restart", "resize", "rescue"} <= in_bash("ttmfs re")
    assert in_bash("ttmfs ls --js") == {"--json"}
    assert set(COMMANDS) <= in_bash("ttmfs ")
    mount = f"{mounted.path}"
    assert in_bash(f"ttmfs umount {mount[:-1]}") == {f"{mount}/"}
    assert in_bash(f"ttmfs fini {mount}/act") == {f"{mount}/activations", f"{mount}/activations.old"}
    assert in_bash(f"ttmfs writeback {mount}/activations {mount}/a") >= {f"{mount}/a\\ b"}
    assert in_bash("ttmfs fini act", mounted.path) == set()
    assert in_bash(f"ttmfs fini {mounted.path.name}/a", mounted.path.parent) >= {f"{mounted.path.name}/activations"}
    assert in_bash("ttmfs completion f") == {"fish"}


def test_fish_completes_commands_options_mounts_and_backups(mounted: Mount) -> None:
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    assert {"restart", "resize", "rescue"} <= in_fish("ttmfs re")
    assert "--json" in in_fish("ttmfs ls --js")
    mount = mounted.path
    assert {f"{mount}/activations", f"{mount}/activations.old"} <= in_fish(f"ttmfs fini {mount}/act")


def in_zsh(line: str, wanted: str) -> str:
    """What a terminal shows of zsh after a line and two Tabs, up to a wanted text."""
    ours, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "dumb", "PS1": "ready:"}
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    try:
        os.write(ours, f"fpath=({SCRIPTS['zsh'].parent} $fpath); autoload -U compinit; compinit -u -D\r".encode())
        shown, sent, end = b"", False, time.monotonic() + 30
        while wanted.encode() not in shown and time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 65536)
            if not sent and shown.count(b"ready:") > 1:
                os.write(ours, f"{line}\t\t".encode())
                shown, sent = b"", True
        return shown.decode(errors="replace")
    finally:
        shell.kill()
        shell.wait(10)
        os.close(ours)


def test_zsh_completes_commands_mounts_and_backups(mounted: Mount) -> None:
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    assert "change the budget of a mount" in in_zsh("ttmfs re", "change the budget of a mount")
    assert f"{mounted.path}/activations.old" in in_zsh(f"ttmfs fini {mounted.path}/act", "activations.old")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_valid(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", SCRIPTS[shell]], check=True, timeout=30)


def test_a_mount_that_hangs_does_not_hang_the_shell(mounted: Mount) -> None:
    daemon: int = json.loads((mounted.path / ".config").read_text())["daemon_pid"]
    os.kill(daemon, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert in_bash(f"ttmfs umount {str(mounted.path)[:-1]}") == {f"{mounted.path}/"}
        assert in_bash(f"ttmfs fini {mounted.path}/act") == set()
        assert time.monotonic() - began < 15
    finally:
        os.kill(daemon, signal.SIGCONT)
