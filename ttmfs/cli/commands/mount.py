"""``mount``: becomes the program that serves a mount."""

import argparse
import os

from ...options import add_mount_arguments
from ..mount_program import command
from .command import Command, CommandError

__all__ = ["COMMANDS"]


def _execute(words: list[str]) -> int:
    """Execute the program with these arguments, which it parses itself: it also runs without this command."""
    line = command(*words)
    try:
        os.execv(line[0], line)
    except OSError as error:
        raise CommandError(f"{line[0]}: {error.strerror}; install ttmfs again") from None


def _run(_: argparse.Namespace) -> int:
    raise AssertionError("the program parses the arguments")


COMMANDS = (
    Command(
        "mount",
        "Mount a ttmfs at a directory. It returns once the mount answers.",
        "",  # the program shows its own help
        add_mount_arguments,
        _run,
        unparsed=_execute,
    ),
)
