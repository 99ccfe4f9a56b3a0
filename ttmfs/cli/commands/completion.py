"""``completion``: prints the scripts that complete the command line, and the names that they ask for.

``scripts/completions.py`` makes the scripts, and a test compares them with the parser.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ...linux.mountinfo import ttmfs_mounts
from .child_process import ask
from .command import Command

__all__ = ["COMMANDS", "SCRIPTS"]

DIRECTORY = Path(__file__).parent.parent / "completions"
SCRIPTS = {"bash": DIRECTORY / "bash/ttmfs", "zsh": DIRECTORY / "zsh/_ttmfs", "fish": DIRECTORY / "fish/ttmfs.fish"}

MOST_NAMES = 1000


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=[*SCRIPTS, "mounts", "names"], help="the script of a shell; or mounts, or mounts and backups"
    )
    parser.add_argument("word", nargs="?", default="", metavar="WORD", help="how the mounts or names begin")


def _run(arguments: argparse.Namespace) -> int:
    if script := SCRIPTS.get(arguments.what):
        sys.stdout.write(script.read_text())
        return 0
    word: str = arguments.word
    found = [*_mounts(word)]
    if arguments.what == "names" and len(found) == 1:
        found += _backups(found[0])
    sys.stdout.writelines(
        f"{name}\n" for name in found if name.isprintable() and name.startswith(word) and name != word
    )
    return 0


def _mounts(word: str) -> Iterator[str]:
    """The mounts that a word is the beginning of, or that it leads into: each with a slash behind it.

    They are relative if the word is. The mounts themselves are not touched, because they may hang.
    """
    for path in sorted({mount.path for mount in ttmfs_mounts()}):
        shown = path if not word or os.path.isabs(word) else os.path.relpath(path)
        if f"{shown}/".startswith(word) or word.startswith(f"{shown}/"):
            yield f"{shown}/"


def _backups(mount: str) -> Iterator[str]:
    """The backups of a mount, as paths. None if it does not answer."""

    def names() -> list[str]:
        with os.scandir(mount) as entries:
            return sorted(name for entry, _ in zip(entries, range(MOST_NAMES), strict=False)
                          if not (name := entry.name).startswith("."))  # fmt: skip

    for listed in ask(mount, names).items:
        yield from (f"{mount}{name}" for name in listed)


COMMANDS = (
    Command(
        "completion",
        "Print the script that completes command lines of ttmfs in a shell, with the names of mounts and backups.\n"
        "Where ttmfs is installed for the machine, the shells find it themselves.",
        """\
examples:
  ttmfs completion bash >~/.local/share/bash-completion/completions/ttmfs
  ttmfs completion zsh >~/.zfunc/_ttmfs        with fpath+=~/.zfunc before compinit in ~/.zshrc
  ttmfs completion fish >~/.config/fish/completions/ttmfs.fish
  ttmfs completion names /mnt/ttm/             what the scripts ask for""",
        _add,
        _run,
    ),
)
