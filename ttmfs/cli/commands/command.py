"""What a command is, and how it reports errors."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import TtmfsError
from ...quoting import plain, quoted
from ..exit_status import ExitStatus

__all__ = ["Command", "CommandError", "complain", "guarded", "reason"]


@dataclass(frozen=True)
class Command:
    """A command of ``ttmfs``. `run` gives the exit status: 0; 1 if part of the work failed; 2 if none could be done.

    `description` and `examples` are shown by ``ttmfs COMMAND --help``. `uses_client` imports ttmfs.client before `run`.
    `waits_for` returns the paths of the backups that the command uses. The command then runs in a child process: Ctrl-C
    always ends it, and a mount that does not answer is reported. `unparsed`, if given, runs instead of `run`, with the
    words behind the command's name.
    """

    name: str
    description: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], int]
    interrupted: str = "interrupted"  # the message after Ctrl-C
    uses_client: bool = False
    waits_for: Callable[[argparse.Namespace], list[str]] | None = None
    unparsed: Callable[[list[str]], int] | None = None


class CommandError(Exception):
    """What is wrong, then what to do: one line. `status` 1 means that part of the work was done."""

    def __init__(self, text: str, status: int = ExitStatus.FAILED) -> None:
        super().__init__(text)
        self.status = status


def reason(error: Exception, path: str | os.PathLike[str] | None = None) -> str:
    """Why something failed, in one line: the path, then the error."""
    if isinstance(error, CommandError):
        return str(error)
    if isinstance(error, OSError):
        where = error.filename if path is None and isinstance(error.filename, str) else path
        what = error.strerror or str(error)
    else:
        where, what = path, str(error)
        if isinstance(error, TtmfsError) and isinstance(error.__cause__, OSError) and error.__cause__.strerror:
            what = error.__cause__.strerror
    return f"{quoted(where)}: {what}" if where is not None else what


def complain(command: str, text: str) -> None:
    """Report on standard error what is wrong, in one line."""
    sys.stderr.write(f"{f'ttmfs {command}'.rstrip()}: {plain(text)}\n")


def guarded(command: str, run: Callable[[], int], *, interrupted: Callable[[], str] = lambda: "interrupted") -> int:
    """Run a command. Returns its exit status, or that of the error, which is reported on standard error."""
    try:
        return run()
    except KeyboardInterrupt:
        why, status = interrupted(), ExitStatus.INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe: end as SIGPIPE ends other programs
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered is flushed at exit
        return 141
    except (CommandError, TtmfsError, OSError) as error:
        why, status = reason(error), getattr(error, "status", ExitStatus.FAILED)
    complain(command, why)
    return status
