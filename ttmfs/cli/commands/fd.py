"""``fd``: runs a program with a backup's own descriptor, or says why there is none."""

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
from .mounts import backup_at, config_of

if TYPE_CHECKING:
    from ...client.backup import Backup

__all__ = ["COMMANDS"]

ANSWER_SECONDS = 2.0


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backup", metavar="MNT/NAME", help="the backup")
    parser.add_argument(
        "command_line", metavar="COMMAND", nargs=argparse.REMAINDER,
        help="the program and its arguments; {} stands for the descriptor, /dev/fd/N",
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
                        f"{quoted(arguments.backup)} has no descriptor for you: {_why_none(backup)}; "
                        "use its .image instead"
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
        return 127 if error.errno == errno.ENOENT else 126  # as in shells and env(1)


def _why_none(backup: Backup) -> str:
    """Why the daemon gives no descriptor, or why the client did not ask for one."""
    served = ttmfs_on(backup.status().st_dev)
    if served is None or served.served_by not in (0, os.geteuid()):
        return "another user serves it, and could give you any file to write to"
    if not (found := config_of(backup)):
        return ".config of the mount cannot be read"
    if not (place := found.get("descriptors")):
        return next(text for applies, text in (
            (found.get("ro"), "the mount is read-only"),
            (found.get("store") is not None, "its backups lie in a directory (store=, or no user namespaces)"),
            (found.get("uid_size"), "the daemon counts what each user stores (uid_size=)"),
            (found.get("allow_other"), "with allow_other it needs Linux 6.16, and /run for the daemon's socket"),
            (True, "the daemon has no place for its socket: a user must set XDG_RUNTIME_DIR, root needs /run"),
        ) if applies)  # fmt: skip
    if not os.access(backup.path, os.R_OK | os.W_OK | os.X_OK):
        return "its mode bits must let you read, write and enter it"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(place)
    except OSError as error:
        return f"the daemon's socket {quoted(place)} is not accessible from here ({error.strerror})"
    return "the daemon refuses it"


COMMANDS = (
    Command(
        "fd",
        "Run a program that inherits the descriptor of a backup's own file, open to read and to write. It works at\n"
        "the speed of a tmpfs, without root, if the mode bits let you read, write and enter the backup. The budget\n"
        "limits what it stores, reserve= does not. The program must not change the length of the file.",
        """\
examples:
  ttmfs fd /mnt/ttm/bo7 -- sha256sum {}
  ttmfs fd /mnt/ttm/bo7 -- dd if=pages of={} bs=1M conv=notrunc
  ttmfs fd /mnt/ttm/bo7 -- fallocate -p -o 8192 -l 4096 {}""",
        _add,
        _run,
    ),
)
