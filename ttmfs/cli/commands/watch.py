"""``--watch``: a screen that is written again and again until Ctrl-C."""

import argparse
import os
import sys
import time
from collections.abc import Callable

from .child_process import ask
from .command import CommandError
from .terminal import is_terminal

__all__ = ["SECONDS", "add_watch", "interval_and_paths", "watch"]

SECONDS = "2"


def add_watch(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--watch [SECONDS]``."""
    parser.add_argument(
        "-w", "--watch", nargs="?", const=SECONDS, metavar="SECONDS", help="repeat every SECONDS (default: 2)"
    )


def interval_and_paths(value: str, paths: list[str]) -> tuple[float, list[str]]:
    """The seconds between two screens, and the paths. In ``--watch PATH`` the value is the first path."""
    seconds = _interval(value)
    return (float(SECONDS), [value, *paths]) if seconds is None else (seconds, paths)


def watch(seconds: float, lines: Callable[[], list[str]]) -> int:
    """Write lines repeatedly until Ctrl-C. On a terminal, overwrite those before. Returns the exit status, 0."""
    clear = "\x1b[2J"
    try:
        while True:
            found = lines()
            if is_terminal(sys.stdout):
                text = "".join(line + "\x1b[K\n" for line in _fitting(found))
                sys.stdout.write(f"{clear}\x1b[H{text}\x1b[J")
                clear = ""
            else:
                sys.stdout.writelines([*(line + "\n" for line in found), "\n"])
            sys.stdout.flush()
            time.sleep(seconds)
    except KeyboardInterrupt:
        return 0


def _interval(text: str) -> float | None:
    """The number of seconds, or None if the text is a path."""
    try:
        seconds = float(text)
    except ValueError:
        there = ask(text, lambda: os.path.lexists(text))
        if not there.is_silent and not there.items[0]:
            raise CommandError(f"--watch: {text!r} is neither a number of seconds nor a path") from None
        return None
    if not 0.1 <= seconds <= 86400:
        raise CommandError("--watch: give seconds from 0.1 to 86400")
    return seconds


def _fitting(lines: list[str]) -> list[str]:
    """The lines that fit on the terminal, including the last one."""
    room = (os.get_terminal_size(sys.stdout.fileno()).lines or 24) - 1
    if len(lines) <= room:
        return lines
    return [*lines[: room - 2], f"... {len(lines) - room + 1} more lines", lines[-1]]
