"""What a command is, and what stands in the way of one."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import TtmfsError
from .terminal import quoted

__all__ = ["Command", "CommandError", "reason"]


@dataclass(frozen=True)
class Command:
    """A command of ``ttmfs``. `run` gives the exit status: 0; 1 if part of the work failed; 2 if none could be done."""

    name: str
    description: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], int]
    interrupted: str = "interrupted"  # what is said then
    uses_client: bool = False  # whose import takes a moment


class CommandError(Exception):
    """What stands in the way, and what to do about it: one line. `status` 1: a part of the work was done."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


def reason(error: Exception, path: str | os.PathLike[str] | None = None) -> str:
    """Why something failed, in a line: what it was done to, and what went wrong."""
    if isinstance(error, OSError):
        where = error.filename if path is None and isinstance(error.filename, str) else path
        what = error.strerror or str(error)
    else:
        where, what = path, str(error)
        if isinstance(error, TtmfsError) and isinstance(error.__cause__, OSError) and error.__cause__.strerror:
            what = error.__cause__.strerror
    return f"{quoted(where)}: {what}" if where is not None else what
