"""What a command is, and what stands in the way of one."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import TtmfsError
from ...quoting import plain, quoted

__all__ = ["Command", "CommandError", "complain", "guarded", "reason"]


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
    waits_for: Callable[[argparse.Namespace], list[str]] | None = (
        None  # paths in the mounts without which it cannot go on
    )


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


def complain(command: str, text: str) -> None:
    """Say on standard error what is wrong, in one line."""
    sys.stderr.write(f"{f'ttmfs {command}'.rstrip()}: {plain(text)}\n")


def guarded(command: str, run: Callable[[], int], *, interrupted: Callable[[], str] = lambda: "interrupted") -> int:
    """The exit status of some work; where it fails, what that stands for, and a line on standard error."""
    try:
        return run()
    except KeyboardInterrupt:
        why, status = interrupted(), 130
    except BrokenPipeError:  # who read the output wants no more of it: as others end, whom SIGPIPE ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that nothing is flushed to it
        return 141
    except CommandError as error:
        why, status = str(error), error.status
    except (TtmfsError, OSError) as error:
        why, status = reason(error), 2
    complain(command, why)
    return status
