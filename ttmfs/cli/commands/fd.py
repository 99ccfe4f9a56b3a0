"""``fd``: a program with a backup's own descriptor; and why there is none to be had."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from typing import TYPE_CHECKING

from ...linux.mountinfo import ttmfs_on
from ...quoting import quoted
from .child_process import supervised
from .command import Command, CommandError, complain, guarded, reason
from .mounts import backup_at, config

if TYPE_CHECKING:
    from ...client.backup import Backup

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
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:

        def hand_over() -> int:
            with backup_at(arguments.backup) as backup:
                if not backup.is_native:
                    raise CommandError(
                        f"no descriptor of {quoted(arguments.backup)} is to be had: {_why_none(backup)}; "
                        "its .image serves whoever may read it"
                    )
                socket.send_fds(theirs, [b"1"], [backup.fileno()])
            return 0

        if status := supervised("fd", [arguments.backup], lambda: guarded("fd", hand_over)):
            return status
        _, (file,), _, _ = socket.recv_fds(ours, 1, 1)
    os.set_inheritable(file, True)
    sys.stdout.flush()
    try:
        os.execvp(words[0], [word.replace("{}", f"/dev/fd/{file}") for word in words])
    except OSError as error:
        complain("fd", reason(error, words[0]))
        return 127 if error.errno == errno.ENOENT else 126  # as shells and env(1) have it


def _why_none(backup: Backup) -> str:
    """Why the daemon gives no descriptor, or why none was asked for."""
    served = ttmfs_on(backup.status().st_dev)
    if served is None or served.served_by not in (0, os.geteuid()):
        return "it is served by another user, who could give any file to write to"
    mount = backup.open_file("..", os.O_PATH | os.O_DIRECTORY)
    try:
        found = config(mount)
    finally:
        os.close(mount)
    if not found:
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
    if not os.access(backup.path, os.R_OK | os.W_OK | os.X_OK):
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
    ),
)
