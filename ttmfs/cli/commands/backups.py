"""``create``, ``writeback``, ``move`` and ``fini``: one action on each of several backups."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ...errors import TtmfsError
from ...fuse.inodes import MAX_HANDLE
from ...options import OptionError, parse_size
from ...quoting import quoted
from ..exit_status import ExitStatus
from .command import Command, CommandError, complain, reason
from .mounts import backup_at, new_backup
from .terminal import size

__all__ = ["COMMANDS"]


def _each(command: str, paths: list[str], work: Callable[[str], object]) -> ExitStatus:
    """Do something to each path. A failure is reported, and the others continue."""
    failed = 0
    for path in paths:
        try:
            work(path)
        except (CommandError, OSError, TtmfsError) as error:
            failed += 1
            complain(command, reason(error, path))
    return ExitStatus.of(failed, len(paths))


# --- create ---


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="MNT/NAME", help="the backup to make, in the root of a mount")
    parser.add_argument("-s", "--size", metavar="SIZE", help="its size: bytes, with k, m, g, t, or %% of RAM")
    parser.add_argument("-m", "--mode", metavar="MODE", help="its mode bits, in octal (0777 without the umask)")


def _create(arguments: argparse.Namespace) -> int:
    try:
        spans = None if arguments.size is None else parse_size(arguments.size)
    except OptionError as error:
        raise CommandError(f"--size: {error}") from None
    try:
        mode = 0o777 if arguments.mode is None else int(arguments.mode, 8)
        if not 0 <= mode <= 0o7777:
            raise ValueError
    except ValueError:
        raise CommandError(f"--mode: {arguments.mode!r} is not a mode: write it in octal, such as 0750") from None

    def create(path: str) -> None:
        with new_backup(path) as (mount, name):
            from ...client.backup import Backup

            if spans and spans > MAX_HANDLE * mount.number("page_size"):
                raise CommandError(f"{quoted(path)}: a backup has at most {MAX_HANDLE} pages")
            place = f"/proc/self/fd/{mount.fd}/{name}"
            with Backup.create(place, spans, mode=mode, native=False) as backup:  # it never lets in more than asked for
                if arguments.mode is not None and mode & ~backup.status().st_mode:  # the umask removed some bits
                    backup.chmod(mode)

    return _each("create", arguments.paths, create)


# --- writeback, fini ---


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="MNT/NAME", help="a backup")


def _add_writeback(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser)
    parser.add_argument("--json", action="store_true", help="a list of objects: backup, page_size, counts of pages")


def _writeback(arguments: argparse.Namespace) -> int:
    from ...linux.system_calls import swap_space
    from .mapped import page_out_mappings

    done: list[dict[str, Any]] = []

    def writeback(path: str) -> None:
        with backup_at(path, native=False) as backup:
            backup.writeback()
            if backup.residency().resident and swap_space()[0]:
                for refusal in page_out_mappings(backup):
                    complain("writeback", f"{quoted(path)}: {refusal}")
            done.append({"backup": path, "page_size": backup.page_size, **asdict(backup.residency())})

    status = _each("writeback", arguments.paths, writeback)
    if arguments.json:
        sys.stdout.write(json.dumps(done, indent=2) + "\n")
    else:
        sys.stdout.writelines(map(_whereabouts, done))
    return status


def _whereabouts(found: dict[str, Any]) -> str:
    """Where the pages of a backup are after writeback, in a line."""
    from ...linux.system_calls import swap_space

    resident, swapped = (size(found[where] * found["page_size"]) for where in ("resident", "swapped"))
    text = f"{swapped if found['swapped'] else 'nothing'} swapped out, {resident} in memory"
    if found["resident"] and not found["swapped"] and not swap_space()[0]:
        text += "; this machine has no swap (see swapon --show)"
    return f"{quoted(found['backup'])}: {text}\n"


def _add_move(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser)
    parser.add_argument("store", metavar="OTHER-STORE", help="the directory of another store")
    parser.add_argument("-f", "--force", action="store_true", help="move backups even if programs use them")


def _move(arguments: argparse.Namespace) -> int:
    from .users import BackupIdentity, Users, in_a_line

    def move(path: str) -> None:
        with backup_at(path, native=False) as backup:
            identity = BackupIdentity.of(backup)
            if not arguments.force and (using := Users([identity]).of(identity)):
                raise CommandError(
                    f"{quoted(path)} is in use and was left: {in_a_line(using)}; --force moves it anyway"
                )
            backup.move(os.path.abspath(arguments.store))

    return _each("move", arguments.paths, move)


def _add_fini(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser)
    parser.add_argument("-f", "--force", action="store_true", help="end backups even if programs use them")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be done, and do nothing")


UNNAMED = "a process that cannot be seen from here has its .shmem open or mapped"


def _fini(arguments: argparse.Namespace) -> int:
    from .users import BackupIdentity, Users, in_a_line

    identities: dict[str, BackupIdentity | Exception] = {}
    for path in arguments.paths:
        try:
            with backup_at(path, native=False) as backup:
                identities[path] = BackupIdentity.of(backup)
        except (CommandError, OSError, TtmfsError) as error:
            identities[path] = error
    found = [identity for identity in identities.values() if isinstance(identity, BackupIdentity)]
    users = None if arguments.force and not arguments.dry_run else Users(found)

    def fini(path: str) -> None:
        identity = identities[path]
        if isinstance(identity, Exception):
            raise identity
        using = users.of(identity) if users else []
        if using and not arguments.force:
            raise CommandError(f"{quoted(path)} is in use and was left: {in_a_line(using)}; --force ends it anyway")
        with backup_at(path, native=False) as backup:
            if backup.id != identity.ino:
                raise CommandError(f"{quoted(path)} has been replaced by another backup, and was left")
            if not using and users and backup.shmem_is_open and not arguments.force:
                raise CommandError(f"{quoted(path)} is in use and was left: {UNNAMED}; --force ends it anyway")
            if not arguments.dry_run:
                backup.fini()
                return
            pages = backup.residency().pages
            released = f"{pages} page{'s' * (pages != 1)}, {size(pages * backup.page_size)}"
        sys.stdout.write(f"would end {quoted(path)} and release {released}\n")
        if using:
            sys.stdout.write(f"  though it is in use: {in_a_line(using)}\n")

    status = _each("fini", arguments.paths, fini)
    if users and found and (unseen := users.unseen()):
        complain("fini", unseen)
    return status


COMMANDS = (
    Command(
        "create",
        "Make empty backups. They take no memory until pages are stored in them.",
        """\
examples:
  ttmfs create /mnt/ttm/bo7                        of the size that backup_size= gives
  ttmfs create -s 64m -m 700 /mnt/ttm/{a,b,c}      of 64 MiB each""",
        _add_create,
        _create,
        uses_client=True,
        waits_for=lambda arguments: arguments.paths,
    ),
    Command(
        "writeback",
        "Push all pages of backups to swap, now (with store=: to the disk), and show where they are afterwards. Best\n"
        "effort: without swap they stay in memory, which is not an error. As root it also pages out what one program\n"
        "has mapped, such as the memory of a virtual machine.",
        """\
examples:
  ttmfs writeback /mnt/ttm/bo7
  ttmfs writeback /mnt/ttm/*
  ttmfs writeback --json /mnt/ttm/bo7 | jq '.[].swapped'""",
        _add_writeback,
        _writeback,
        uses_client=True,
        waits_for=lambda arguments: arguments.paths,
    ),
    Command(
        "move",
        "Give backups to another store=DIR on the same CephFS, of this machine or of another, without copying their\n"
        "pages. The other mount shows them within a second. It refuses a backup that a program uses. Only root and\n"
        "the user who mounted may move a backup.",
        """\
examples:
  ttmfs move /mnt/ttm/bo7 /ceph/other
  ttmfs move /mnt/ttm/* /ceph/other""",
        _add_move,
        _move,
        uses_client=True,
        waits_for=lambda arguments: arguments.paths,
    ),
    Command(
        "fini",
        "End backups and release all their pages. It refuses a backup that a program uses: with an open file of it,\n"
        "or a mapping of it. The message names the programs: users see their own programs, root sees all in this PID\n"
        "namespace. An open .shmem is found wherever it is. Of other files nobody sees descriptors in transit in a\n"
        "socket, or registered with io_uring. A program that opens the backup at this moment can be missed.",
        """\
examples:
  ttmfs fini /mnt/ttm/bo7
  ttmfs fini -n /mnt/ttm/*      show what it would do
  ttmfs fini /mnt/ttm/*         all of them; the mount stays
  ttmfs fini --force /mnt/ttm/bo7""",
        _add_fini,
        _fini,
        uses_client=True,
        waits_for=lambda arguments: arguments.paths,
    ),
)
