"""``create``, ``writeback``, ``move`` and ``fini``: one action on each of several backups."""

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...errors import BackupExists, TtmfsError
from ...fuse.inodes import MAX_HANDLE
from ...options import OptionError, parse_size
from ...quoting import quoted
from ..exit_status import ExitStatus
from .command import Command, CommandError, complain, reason
from .mounts import backup_at, config_of, new_backup, refusal_of
from .terminal import ProgressBar, is_terminal, size

if TYPE_CHECKING:
    from ...client.backup import Backup

__all__ = ["COMMANDS"]

LOOK_SECONDS = 0.25
"""The interval at which a progress bar asks where the pages are."""


def _why(error: Exception, path: str) -> str:
    if isinstance(error, CommandError):
        return str(error)
    if refusal := refusal_of(path, error):
        return f"{quoted(path)}: {refusal}"
    exists = f"; ttmfs fini {quoted(path)} ends it" if isinstance(error, FileExistsError | BackupExists) else ""
    return reason(error, path) + exists


def _each(command: str, paths: list[str], work: Callable[[str], object], *, as_json: bool = False) -> ExitStatus:
    """Do something to each path. A failure is reported, and the others continue.

    With `as_json` the results of the work are printed, as a list.
    """
    failed, results = 0, list[object]()
    for path in paths:
        try:
            results.append(work(path))
        except (CommandError, OSError, TtmfsError) as error:
            failed += 1
            complain(command, _why(error, path))
    if as_json:
        sys.stdout.write(json.dumps(results, indent=2) + "\n")
    return ExitStatus.of(failed, len(paths))


# --- create ---


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="MNT/NAME", help="the backup to make, in the root of a mount")
    parser.add_argument("-s", "--size", metavar="SIZE", help="its size: bytes, with k, m, g, t, or %% of RAM")
    parser.add_argument("-m", "--mode", metavar="MODE", help="its mode bits, in octal (0777 without the umask)")
    parser.add_argument("--json", action="store_true", help="a list of objects: backup, size in bytes")


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

    def create(path: str) -> dict[str, Any]:
        with new_backup(path) as (mount, name):
            from ...client.backup import Backup

            if spans and spans > MAX_HANDLE * mount.number("page_size"):
                raise CommandError(f"{quoted(path)}: a backup has at most {MAX_HANDLE} pages")
            place = f"/proc/self/fd/{mount.fd}/{name}"
            with Backup.create(place, spans, mode=mode, native=False) as backup:  # it never lets in more than asked for
                if arguments.mode is not None and mode & ~backup.status().st_mode:  # the umask removed some bits
                    backup.chmod(mode)
                return {"backup": path, "size": backup.size}

    return _each("create", arguments.paths, create, as_json=arguments.json)


# --- writeback, fini ---


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="MNT/NAME", help="a backup")


def _add_writeback(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser)
    parser.add_argument("--json", action="store_true", help="a list of objects: backup, page_size, counts of pages")


def _writeback(arguments: argparse.Namespace) -> int:
    from ...linux.system_calls import swap_space
    from .mapped import page_out_mappings

    def writeback(path: str) -> dict[str, Any]:
        with backup_at(path, native=False) as backup:
            has_disk = bool(config_of(backup).get("store"))
            can_swap = swap_space()[0] > 0 and not has_disk
            if can_swap and is_terminal(sys.stderr):
                _push_with_progress(path, backup)
            else:
                backup.writeback()
            if can_swap and backup.residency().resident:
                for refusal in page_out_mappings(backup):
                    complain("writeback", f"{quoted(path)}: {refusal}")
            found = {"backup": path, "page_size": backup.page_size, **asdict(backup.residency())}
        if not arguments.json:
            sys.stdout.write(f"{quoted(path)}: {_whereabouts(found, has_disk=has_disk)}\n")
        return found

    return _each("writeback", arguments.paths, writeback, as_json=arguments.json)


def _push_with_progress(path: str, backup: "Backup") -> None:
    """Push pages to swap, and show meanwhile how many bytes are out of memory."""
    failed = list[Exception]()

    def push() -> None:
        try:
            backup.writeback()
        except Exception as error:
            failed.append(error)

    thread, before = threading.Thread(target=push, daemon=True), backup.residency()
    seen = before.swapped
    with ProgressBar(path, before.resident * backup.page_size) as bar:
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            seen, last = backup.residency().swapped, seen
            bar.advance((seen - last) * backup.page_size)
    if failed:
        raise failed[0]


def _whereabouts(found: dict[str, Any], *, has_disk: bool) -> str:
    """Where the pages of a backup are after writeback."""
    from ...linux.system_calls import swap_space

    resident, swapped = (size(found[where] * found["page_size"]) for where in ("resident", "swapped"))
    if not found["pages"]:
        return "holds no pages"
    if has_disk:
        return f"all pages are on the disk; {resident} of them also in memory"
    if found["swapped"]:
        return f"{swapped} swapped out, {resident} in memory"
    total, free = swap_space()
    if not total:
        return (
            f"nothing to push: this machine has no swap (see swapon --show); {resident} stay in memory. "
            "Add a swap device, a file or zram: see swapon(8)"
        )
    why = "swap is full (see swapon --show)" if not free else "see ttmfs doctor"
    return f"nothing swapped out, {resident} stay in memory: {why}"


def _add_move(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser)
    parser.add_argument("store", metavar="OTHER-STORE", help="the directory of another store")
    parser.add_argument("-f", "--force", action="store_true", help="move backups even if programs use them")
    parser.add_argument("--json", action="store_true", help="a list of objects: backup, store")


def _move(arguments: argparse.Namespace) -> int:
    from .users import BackupIdentity, Users, in_a_line

    def move(path: str) -> dict[str, Any]:
        with backup_at(path, native=False) as backup:
            identity = BackupIdentity.of(backup)
            if not arguments.force and (using := Users([identity]).of(identity)):
                raise CommandError(
                    f"{quoted(path)} is in use and was left: {in_a_line(using)}; --force moves it anyway"
                )
            backup.move(os.path.abspath(arguments.store))
            return {"backup": path, "store": os.path.abspath(arguments.store)}

    return _each("move", arguments.paths, move, as_json=arguments.json)


def _add_fini(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser)
    parser.add_argument("-f", "--force", action="store_true", help="end backups even if programs use them")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be done, and do nothing")
    parser.add_argument("--json", action="store_true", help="a list of objects: backup, pages, page_size, ended")


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

    def fini(path: str) -> dict[str, Any]:
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
            pages, page_size = backup.residency().pages, backup.page_size
            if not arguments.dry_run:
                backup.fini()
            elif not arguments.json:
                released = f"{pages} page{'s' * (pages != 1)}, {size(pages * page_size)}"
                used = f"  though it is in use: {in_a_line(using)}\n" if using else ""
                sys.stdout.write(f"would end {quoted(path)} and release {released}\n{used}")
            return {"backup": path, "pages": pages, "page_size": page_size, "ended": not arguments.dry_run}

    status = _each("fini", arguments.paths, fini, as_json=arguments.json)
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
        "effort: without swap they stay in memory, which is not an error. A terminal shows the progress. As root it\n"
        "also pages out what one program has mapped, such as the memory of a virtual machine.",
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
