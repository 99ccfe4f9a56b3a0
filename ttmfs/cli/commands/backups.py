"""Making backups, pushing them out of memory, ending them."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ...errors import TtmfsError
from ...fuse.inodes import MAX_HANDLE
from ...options import OptionError, parse_size
from ...quoting import quoted
from .command import Command, CommandError, complain, reason
from .mounts import backup_at, new_backup
from .terminal import size

__all__ = ["COMMANDS"]


def _each(command: str, paths: list[str], work: Callable[[str], object]) -> int:
    """Do something to each path; what fails is told and stops no other. The exit status."""
    failed = 0
    for path in paths:
        try:
            work(path)
        except (CommandError, OSError, TtmfsError) as error:
            failed += 1
            complain(command, str(error) if isinstance(error, CommandError) else reason(error, path))
    return 0 if not failed else 1 if failed < len(paths) else 2


# --- create ---


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="MNT/NAME", help="the backup to make, in the root of a mount")
    parser.add_argument("-s", "--size", metavar="SIZE", help="bytes it spans, or with k, m, g, t, or %% of the RAM")
    parser.add_argument("-m", "--mode", metavar="MODE", help="its mode bits, in octal (0777 less the umask)")


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
        raise CommandError(f"--mode: {arguments.mode!r} is no mode: write it in octal, such as 0750") from None

    def create(path: str) -> None:
        with new_backup(path) as (mount, name):
            from ...client.backup import Backup

            if spans and spans > MAX_HANDLE * mount.number("page_size"):
                raise CommandError(f"{quoted(path)}: a backup has at most {MAX_HANDLE} pages")
            place = f"/proc/self/fd/{mount.fd}/{name}"
            with Backup.create(place, spans, mode=mode, native=False) as backup:  # it never lets in more than asked for
                if arguments.mode is not None and mode & ~backup.status().st_mode:  # the umask took some of it
                    backup.chmod(mode)

    return _each("create", arguments.paths, create)


# --- writeback, fini ---


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="MNT/NAME", help="a backup")


def _add_writeback(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser)
    parser.add_argument("--json", action="store_true", help="a list of objects: backup, page_size, counts of pages")


def _writeback(arguments: argparse.Namespace) -> int:
    done: list[dict[str, Any]] = []

    def writeback(path: str) -> None:
        with backup_at(path, native=False) as backup:
            backup.writeback()
            done.append({"backup": path, "page_size": backup.page_size, **asdict(backup.residency())})

    status = _each("writeback", arguments.paths, writeback)
    if arguments.json:
        sys.stdout.write(json.dumps(done, indent=2) + "\n")
        return status
    for found in done:
        resident, swapped = (size(found[where] * found["page_size"]) for where in ("resident", "swapped"))
        sys.stdout.write(f"{quoted(found['backup'])}: {swapped} out of memory, {resident} in memory\n")
    return status


def _add_fini(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser)
    parser.add_argument("-f", "--force", action="store_true", help="end them also while programs use them")
    parser.add_argument("-n", "--dry-run", action="store_true", help="say what would be done, and do nothing")


def _fini(arguments: argparse.Namespace) -> int:
    from .users import Place, Users, told

    places: dict[str, Place | Exception] = {}
    for path in arguments.paths:
        try:
            with backup_at(path, native=False) as backup:
                places[path] = Place.of(backup)
        except (CommandError, OSError, TtmfsError) as error:
            places[path] = error
    found = [place for place in places.values() if isinstance(place, Place)]
    users = None if arguments.force and not arguments.dry_run else Users(found)

    def fini(path: str) -> None:
        place = places[path]
        if isinstance(place, Exception):
            raise place
        using = users.of(place) if users else []
        if using and not arguments.force:
            raise CommandError(f"{quoted(path)} is in use and was left: {told(using)}; --force ends it all the same")
        with backup_at(path, native=False) as backup:
            if backup.id != place.ino:
                raise CommandError(f"{quoted(path)} is another backup by now, and was left")
            if not arguments.dry_run:
                backup.fini()
                return
            pages = backup.residency().pages
            released = f"{pages} page{'s' * (pages != 1)}, {size(pages * backup.page_size)}"
        sys.stdout.write(f"would end {quoted(path)} and release {released}\n")
        if using:
            sys.stdout.write(f"  though it is in use: {told(using)}\n")

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
  ttmfs create /mnt/ttm/bo7                        of the mount's backup_size=
  ttmfs create -s 64m -m 700 /mnt/ttm/{a,b,c}      each spans 64 MiB""",
        _add_create,
        _create,
        uses_client=True,
        waits_for=lambda arguments: arguments.paths,
    ),
    Command(
        "writeback",
        "Push all pages of backups to swap, now (with store=: to the disk), and say where they are then. Best effort:\n"
        "where there is no swap they stay in memory, and that is no error.",
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
        "fini",
        "End backups and release every page that they hold. A backup that a program uses is refused: one with files\n"
        "of it open, with its descriptor, or with a mapping of it. The message names the programs. Users see their\n"
        "own programs, root sees all of this PID namespace. Nobody sees descriptors in transit in a socket, or\n"
        "registered with io_uring. A program that begins at this very moment can be missed.",
        """\
examples:
  ttmfs fini /mnt/ttm/bo7
  ttmfs fini -n /mnt/ttm/*      what it would do
  ttmfs fini /mnt/ttm/*         all of them; the mount stays
  ttmfs fini --force /mnt/ttm/bo7""",
        _add_fini,
        _fini,
        uses_client=True,
        waits_for=lambda arguments: arguments.paths,
    ),
)
