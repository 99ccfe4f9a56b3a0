"""The command ``ttmfs``, for those who look after mounts: its parser, and which command it is.

A command's module is imported when the command is used, so that none waits for what the others need.
"""

import argparse
import importlib
import os
import signal
import sys

from .commands.command import Command, CommandError, reason
from .errors import TtmfsError
from .version import __version__

__all__ = ["COMMANDS", "main", "parser"]

COMMANDS = {
    "create": ("backups", "make backups"),
    "ls": ("backups", "list backups: pages, sizes, what is in memory and what is swapped out"),
    "map": ("map", "draw which pages of a backup are absent, in memory, and swapped out"),
    "save": ("save", "save a backup to a sparse file, with its checksum"),
    "load": ("load", "load a backup from a sparse file, at the same handles"),
    "writeback": ("backups", "push backups out of memory, to swap, now"),
    "fini": ("backups", "end backups, with all their pages"),
    "fd": ("fd", "run a program with a backup's own descriptor, for native speed"),
    "doctor": ("doctor", "look at the machine and its mounts, and say what to do"),
    "rescue": ("rescue", "get backups out of a keeper that gave up, as sparse files with checksums"),
}
"""Each command's module, and what it does."""

EPILOG = """\
exit status: 0; 1 if part of the work failed; 2 if none could be done; 130 if it was interrupted.
ttmfs COMMAND --help has examples of each."""


def _command(name: str) -> Command:
    module = importlib.import_module(f".commands.{COMMANDS[name][0]}", __package__)
    found: Command = next(command for command in module.COMMANDS if command.name == name)
    return found


def parser(*used: str) -> argparse.ArgumentParser:
    """The parser of the command line: with the arguments of the commands that are `used`, or of all."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(
        "ttmfs",
        description="Look after mounts of ttmfs and their backups. mount.py makes them.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    whole.add_argument("-V", "--version", action="version", version=f"ttmfs {__version__}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, help_) in COMMANDS.items():
        one = commands.add_parser(name, help=help_, formatter_class=raw)
        if name in (used or COMMANDS):
            command = _command(name)
            one.description, one.epilog = command.description, command.examples
            command.add_arguments(one)
            one.set_defaults(command=command)
    return whole


def _have_standard_files() -> None:
    """Have standard input, output and error, whichever the caller closed: else a backup's file could become one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def main() -> int:
    """From argv to an exit status: 0; 1 if part of the work failed; 2 if none could be done; 130 if interrupted."""
    name = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    _have_standard_files()
    try:
        try:
            arguments = parser(name).parse_args()
        except SystemExit:  # it has said what it is asked for, or what is wrong
            sys.stdout.flush()
            raise
        command: Command = arguments.command
        name = command.name
        if command.uses_client:
            importlib.import_module(".client", __package__)
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # nothing is imported any more: see __main__.py
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = command.run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        why, status = _command(name).interrupted if name in COMMANDS else "interrupted", 130
    except BrokenPipeError:  # who read the output wants no more of it: as others end, whom SIGPIPE ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that nothing is flushed to it
        return 141
    except CommandError as error:
        why, status = str(error), error.status
    except (TtmfsError, OSError) as error:
        why, status = reason(error), 2
    sys.stderr.write(f"{f'ttmfs {name}'.rstrip()}: {why}\n")
    return status
