"""What ``ttmfs --help`` and ``ttmfs COMMAND --help`` say."""

import argparse
import subprocess
import sys
import time

import pytest

from harness import REPOSITORY
from ttmfs.cli.main import COMMANDS, parser


def ttmfs(*words: str) -> str:
    command = [sys.executable, "-m", "ttmfs", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True).stdout


def options_of(name: str) -> set[str]:
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {word for action in commands.choices[name]._actions for word in action.option_strings}


def test_help_lists_every_command() -> None:
    text = ttmfs("--help")
    for name, (_, help_) in COMMANDS.items():
        assert f"    {name} " in text
        assert help_.split(",")[0] in " ".join(text.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_with_existing_options(name: str) -> None:
    text = ttmfs(name, "--help")
    _, _, examples = text.partition("\nexamples:\n")
    lines = [line for line in examples.splitlines() if f"ttmfs {name} " in line + " "]
    assert lines, f'begin its examples with "examples:" and a line "ttmfs {name} ...":\n{text}'
    for line in lines:
        words = line.partition(f"ttmfs {name} ")[2].partition(" | ")[0].partition(" -- ")[0].split()
        assert {word.partition("=")[0] for word in words if word[0] == "-" and word != "-"} <= options_of(name)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_help_starts_without_slow_imports() -> None:
    """It imports neither numpy nor what other commands need."""
    began = time.monotonic()
    loaded = (
        "import sys; sys.argv = ['ttmfs', 'ls', '/proc']; import ttmfs.cli.main as c; c.main(); print(*sys.modules)"
    )
    text = subprocess.run(
        [sys.executable, "-c", loaded], cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True
    ).stdout
    assert not {"numpy", "trio", "pyfuse3", "ttmfs.cli.commands.manifest", "ttmfs.linux.system_calls"} & set(
        text.split()
    )
    assert time.monotonic() < began + 2
