"""The command ``ttmfs``: its parser and its commands.

A command's module is imported when the command runs, so that no command pays for the imports of another.
"""

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from ..quoting import plain
from ..version import __version__
from .commands.child_process import supervised
from .commands.command import Command, guarded

__all__ = ["COMMANDS", "main", "parser"]

COMMANDS = {
    "mount": ("mount", "mount a ttmfs at a directory"),
    "umount": ("umount", "end mounts, release their memory, and name the programs that are in the way"),
    "status": ("status", "show budget, pages, operations, restarts and processes of mounts on one screen"),
    "top": ("top", "show requests by backup and by process"),
    "ls": ("ls", "list backups: pages, sizes, what is in memory and what is swapped out"),
    "map": ("map", "draw which pages of a backup are absent, in memory, and swapped out"),
    "create": ("backups", "make backups"),
    "resize": ("resize", "change the budget of a mount, or the size of a backup"),
    "drop": ("resize", "drop pages of a backup, by their handles"),
    "writeback": ("backups", "push backups out of memory, to swap, now"),
    "fini": ("backups", "end backups, with all their pages"),
    "save": ("save", "save a backup to a sparse file or a stream, with checksums"),
    "load": ("load", "load a backup from a sparse file or a stream, at the same handles"),
    "move": ("backups", "give a backup to another store on the same filesystem"),
    "fd": ("fd", "run a program with a backup's own descriptor, for native speed"),
    "restart": ("restart", "have another daemon take a mount over, without losing a page"),
    "bench": ("bench", "measure a mount beside a tmpfs on this machine"),
    "log": ("log", "show where a mount logs, and change the level of its log"),
    "why": ("why", "show why requests were refused"),
    "doctor": ("doctor", "check the machine and its mounts, and say what to do"),
    "export": ("export", "serve the metrics of all mounts for Prometheus"),
    "rescue": ("rescue", "get backups out of a keeper that gave up, as sparse files with checksums"),
    "completion": ("completion", "print the script that completes command lines in bash, zsh or fish"),
}
"""Each command's module, and what it does."""

EPILOG = """\
exit status: 0; 1 if part of the work failed; 2 if none could be done; 130 if it was interrupted.
ttmfs COMMAND --help shows examples."""


MEANT = {
    "delete": "fini", "info": "ls", "list": "ls", "mkdir": "create", "reload": "restart", "remount": "resize",
    "remove": "fini", "rm": "fini", "rmdir": "fini", "start": "mount", "stop": "umount",
}  # fmt: skip
"""Commands by words that others have for them."""


class _Parser(argparse.ArgumentParser):
    """Errors are shown without control characters: a shell makes arguments of names that others chose."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {plain(message)}\n")


def _nearest(word: str, known: Iterable[str]) -> str:
    """The part of a message that names the nearest known word; nothing if none is near."""
    match = [MEANT[word]] if word in MEANT else difflib.get_close_matches(word, known, 1)
    return f"; did you mean {match[0]}?" if match else ""


def _parse(name: str) -> argparse.Namespace:
    """The arguments. SystemExit after --help, --version, or an error that was reported."""
    whole = parser(name)
    if name and name not in COMMANDS:
        hint = _nearest(name, COMMANDS) or "; ttmfs --help lists the commands"
        whole.error(f"there is no command {name!r}{hint}")
    arguments, rest = whole.parse_known_args()
    if rest:
        option = next((word for word in rest if word.startswith("-")), "").partition("=")[0]
        known = [word for action in arguments.parser._actions for word in action.option_strings]
        hint = "; options stand behind the command" if option in known else _nearest(option, known)
        hint = hint or f"; ttmfs {name} --help lists the arguments"
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return arguments


def _command(name: str) -> Command:
    module = importlib.import_module(f".commands.{COMMANDS[name][0]}", __package__)
    found: Command = next(command for command in module.COMMANDS if command.name == name)
    return found


def parser(*used: str) -> argparse.ArgumentParser:
    """The parser of the command line, with the arguments of the commands `used`, or of all."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = _Parser(
        "ttmfs",
        description="Make and manage mounts of ttmfs and their backups.",
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
            one.set_defaults(command=command, parser=one)
    return whole


def _open_standard_files() -> None:
    """Open standard input, output and error if the caller closed them: else a backup's file could become one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def main(*, in_child: bool = False) -> int:
    """Run the command in argv. Returns its exit status, as in EPILOG.

    With `in_child` a command that waits for a mount does so in a child process, so that Ctrl-C always ends it.
    """
    name = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    _open_standard_files()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the caller may ignore it, and the kernel then reaps children itself
    return _guarded(name, lambda: _run(name, in_child=in_child))


def _guarded(name: str, run: Callable[[], int]) -> int:
    return guarded(name, run, interrupted=lambda: _command(name).interrupted if name in COMMANDS else "interrupted")


def _run(name: str, *, in_child: bool) -> int:
    if sys.argv[1:2] == [name] and name in COMMANDS and (unparsed := _command(name).unparsed):
        return unparsed(sys.argv[2:])
    try:
        arguments = _parse(name)
    except SystemExit:  # after --help, --version, or an error that argparse has reported
        sys.stdout.flush()
        raise
    command: Command = arguments.command

    def run(on_interruption: Callable[..., object]) -> int:
        if command.uses_client:
            importlib.import_module("ttmfs.client")
        _handle_interruption(on_interruption)  # from here on nothing is imported: see __main__.py
        status = command.run(arguments)
        sys.stdout.flush()
        return status

    if not in_child or command.waits_for is None:
        return run(signal.default_int_handler)
    _handle_interruption(signal.default_int_handler)
    return supervised(name, command.waits_for(arguments), lambda: _guarded(name, lambda: run(_interrupt_once)))


def _handle_interruption(handler: Callable[..., object]) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, handler)


def _interrupt_once(*_: object) -> None:
    """Ctrl-C reaches the child twice: the terminal sends it to both processes, and the parent passes it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
