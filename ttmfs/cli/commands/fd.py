"""``fd``: runs a program with a descriptor of a backup's ``.shmem``, or says why there is none."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from typing import TYPE_CHECKING

from ...quoting import quoted
from .child_process import supervised
from .command import Command, CommandError, complain, guarded, reason
from .mounts import backup_at

if TYPE_CHECKING:
    from ...client.backup import Backup

__all__ = ["COMMANDS"]


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
    """Why this process cannot open ``.shmem``."""
    try:
        os.close(backup.open_file(".shmem", os.O_RDWR))
    except OSError as error:
        return {
            errno.ENOENT: "the mount does not offer it (shmem=off, or uid_size=)",
            errno.EACCES: "its mode bits must let you read and write it",
            errno.ELOOP: "only root has more than a link, from Linux 6.9 on, and not with store=",
        }.get(error.errno or 0, os.strerror(error.errno or 0))
    return "another user serves it, and could give you any file to write to"


COMMANDS = (
    Command(
        "fd",
        "Run a program that inherits the descriptor of a backup's .shmem, open to read and to write. It works at the\n"
        "speed of a tmpfs, if the mode bits let you read, write and enter the backup. The budget limits what it\n"
        "stores, reserve= does not. The program must not change the length of the file.",
        """\
examples:
  ttmfs fd /mnt/ttm/bo7 -- sha256sum {}
  ttmfs fd /mnt/ttm/bo7 -- dd if=pages of={} bs=1M conv=notrunc
  ttmfs fd /mnt/ttm/bo7 -- fallocate -p -o 8192 -l 4096 {}""",
        _add,
        _run,
    ),
)
