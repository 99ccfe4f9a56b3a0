"""The command that starts the program of a mount."""

import os
import sys

__all__ = ["command"]

PROGRAM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "daemon", "mount.py")


def command(*words: str) -> list[str]:
    """The command line with these arguments. A keeper runs it later, so it depends on no working directory."""
    return [sys.executable, PROGRAM, *words]
