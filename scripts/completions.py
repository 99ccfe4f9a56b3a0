#!/usr/bin/env python3
"""Write the scripts that complete command lines, from the parser of ttmfs. Run it after a change of a command.

The scripts are versioned, so that an installation needs no shtab.
"""

import argparse
import sys
from pathlib import Path

import shtab

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ttmfs.cli.commands.completion import SCRIPTS
from ttmfs.cli.main import COMMANDS, parser

PREAMBLES = {
    "bash": """\
_ttmfs_ask() {
    local name
    ttmfs completion "$1" "$2" 2>/dev/null | while IFS= read -r name; do printf '%q\\n' "$name"; done
}
_ttmfs_mounts() { _ttmfs_ask mounts "$1"; }
_ttmfs_names() { _ttmfs_ask names "$1"; }""",
    "zsh": """\
_ttmfs_ask() {
    local -a found
    found=(${(f)"$(ttmfs completion $1 "${(Q)PREFIX}" 2>/dev/null)"})
    compadd -S '' -a found
}
_ttmfs_mounts() { _ttmfs_ask mounts }
_ttmfs_names() { _ttmfs_ask names }""",
    "fish": "",
}


def asking(what: str) -> dict[str, str]:
    """What completes a word with names of mounts or backups, by shell."""
    fish = f"(ttmfs completion {what} (commandline -ct) 2>/dev/null)"
    return {"bash": f"_ttmfs_{what}", "zsh": f"_ttmfs_{what}", "fish": fish}


def completer(command: str, metavar: object) -> object:
    """What completes an argument with this placeholder."""
    if metavar in ("FILE", "SOURCE") and command in ("save", "load", "map"):
        return shtab.FILE
    if metavar in ("DIRECTORY", "OTHER-STORE") or (command, metavar) == ("mount", "MNT"):
        return shtab.DIRECTORY
    if metavar == "MNT" or (command, metavar) == ("rescue", "SOURCE"):
        return asking("mounts")
    return asking("names") if metavar in ("MNT/NAME", "MNT[/NAME]", "PATH") else None


def scripts() -> dict[str, str]:
    """The scripts, by shell."""
    whole = parser()
    commands = next(action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        command.description = COMMANDS[name][1]
        for action in command._actions:
            if found := completer(name, action.metavar):
                action.complete = found  # type: ignore[attr-defined]
    return {shell: shtab.complete(whole, shell, preamble=text) for shell, text in PREAMBLES.items()}


if __name__ == "__main__":
    for shell, script in scripts().items():
        SCRIPTS[shell].write_text(script)
