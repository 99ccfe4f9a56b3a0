"""``fd``: a program with a backup's own descriptor; and why there is none to be had."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys

from .command import Command, CommandError
from .mounts import check_backup, config
from .terminal import quoted

__all__ = ["COMMANDS"]

ANSWER_SECONDS = 2.0


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backup", metavar="MNT/NAME", help="the backup")
    parser.add_argument(
        "command_line", metavar="COMMAND", nargs=argparse.REMAINDER,
        help="the program and its arguments, in which {} stands for /dev/fd/N",
    )  # fmt: skip


def _run(arguments: argparse.Namespace) -> int:
    words: list[str] = arguments.command_line
    if words[:1] == ["--"]:
        words = words[1:]
    if not words:
        raise CommandError("give a program: ttmfs fd MNT/NAME -- COMMAND {}")
    check_backup(arguments.backup)
    from ..client import Backup

    with Backup.open(arguments.backup) as backup:
        if not backup.is_native:
            raise CommandError(
                f"no descriptor of {quoted(arguments.backup)} is to be had: {_why_none(arguments.backup)}; "
                "its .image serves whoever may read it"
            )
        file = os.dup(backup.fileno())
    os.set_inheritable(file, True)
    sys.stdout.flush()
    try:
        os.execvp(words[0], [word.replace("{}", f"/dev/fd/{file}") for word in words])
    except OSError as error:
        sys.stderr.write(f"ttmfs fd: {quoted(words[0])}: {error.strerror}\n")
        return 127 if error.errno == errno.ENOENT else 126  # as shells and env(1) have it


def _why_none(path: str) -> str:
    """Why the daemon gives no descriptor."""
    if not (found := config(os.path.join(path, ".."))):
        return ".config of the mount cannot be read"
    if not (place := found.get("descriptors")):
        if found.get("ro"):
            return "the mount is read-only"
        if found.get("store") is not None:
            return "the backups lie in a directory (store=, or a user without user namespaces), and are counted there"
        if found.get("uid_size"):
            return "what users store is counted by the daemon (uid_size=)"
        if found.get("allow_other"):
            return "it takes Linux 6.16 or newer with allow_other, and a place for the daemon's socket (/run)"
        return "the daemon found no place for its socket: a user must mount with XDG_RUNTIME_DIR set, root with /run"
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return "its mode bits must let you read, write and enter it"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(place)
    except OSError as error:
        return f"the daemon's socket {quoted(place)} is out of reach from here ({error.strerror})"
    return "the daemon refuses it: root and the mode bits of now decide"


COMMANDS = (
    Command(
        "fd",
        "Run a program that inherits the descriptor of a backup's own file, open to read and to write: at the speed\n"
        "of a tmpfs, without root. It is for whom the mode bits let read, write and enter the backup. Storing so asks\n"
        "the budget alone, not reserve=. A program must not make the file longer or shorter.",
        """\
examples:
  ttmfs fd /mnt/ttm/bo7 -- sha256sum {}
  ttmfs fd /mnt/ttm/bo7 -- dd if=pages of={} bs=1M conv=notrunc
  ttmfs fd /mnt/ttm/bo7 -- fallocate -p -o 8192 -l 4096 {}""",
        _add,
        _run,
        uses_client=True,
    ),
)
