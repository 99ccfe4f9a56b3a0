"""Making backups, a table of them, pushing them out of memory, ending them."""

import argparse
import errno
import json
import os
import pwd
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NoReturn

from ..errors import TtmfsError
from ..inodes import MAX_HANDLE
from ..mountinfo import ttmfs_mounts
from ..options import OptionError, parse_size
from .command import Command, CommandError, reason
from .mounts import check_backup, check_new, is_backup, number, page_size_of_mount
from .terminal import age, columns, has_colours, is_terminal, painted, quoted, size, table

__all__ = ["COMMANDS"]

LEFT = frozenset({"OWNER", "NAME"})
SECONDS = 2.0

AT_ONCE = 4
"""Backups that are asked about at once: while one request is answered the next ones are on their way."""


def _complain(command: str, text: str) -> None:
    sys.stderr.write(f"ttmfs {command}: {text}\n")


def _each(command: str, paths: list[str], work: Callable[[str], object]) -> int:
    """Do something to each path; what fails is told and stops no other. The exit status."""
    failed = 0
    for path in paths:
        try:
            work(path)
        except (CommandError, OSError, TtmfsError) as error:
            failed += 1
            _complain(command, str(error) if isinstance(error, CommandError) else reason(error, path))
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
        check_new(path)
        from ..client import Backup

        if spans and spans > MAX_HANDLE * number(os.path.dirname(os.path.normpath(path)) or ".", "page_size"):
            raise CommandError(f"{quoted(path)}: a backup has at most {MAX_HANDLE} pages")
        with Backup.create(path, spans, mode=mode, native=False):  # so that it never lets in more than is asked for
            if arguments.mode is not None and mode & ~os.stat(path).st_mode:  # the umask took some of it
                os.chmod(path, mode)

    return _each("create", arguments.paths, create)


# --- ls ---


@dataclass(frozen=True)
class Row:
    """A backup, as the table and ``--json`` have it. Sizes are bytes, `modified` seconds since 1970."""

    mount: str
    name: str
    pages: int
    page_size: int
    size: int
    resident: int
    swapped: int
    uid: int
    owner: str
    modified: float


SORTS: dict[str, Callable[[Row], tuple[object, ...]]] = {
    "name": lambda row: (row.mount, row.name),
    "pages": lambda row: (-row.pages * row.page_size, row.name),
    "size": lambda row: (-row.size, row.name),
    "resident": lambda row: (-row.resident, row.name),
    "swapped": lambda row: (-row.swapped, row.name),
    "owner": lambda row: (row.owner, row.name),
    "age": lambda row: (-row.modified, row.name),
}


def _add_ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", metavar="PATH", help="mounts and backups (all mounts that can be reached)")
    parser.add_argument("-b", "--bytes", action="store_true", help="sizes in bytes")
    parser.add_argument("-s", "--sort", choices=SORTS, default="name", help="numbers: the largest first (name)")
    parser.add_argument("-r", "--reverse", action="store_true", help="the other way round")
    parser.add_argument(
        "-w", "--watch", nargs="?", const=str(SECONDS), metavar="SECONDS", help=f"again and again ({SECONDS:g})"
    )
    parser.add_argument("--json", action="store_true", help="a list of objects; sizes are bytes, times seconds")


def _ls(arguments: argparse.Namespace) -> int:
    paths, seconds = list(arguments.paths), None
    if arguments.watch is not None:
        try:
            seconds = float(arguments.watch)
        except ValueError:  # it was the first path
            if not os.path.lexists(arguments.watch):
                raise CommandError(f"--watch: {arguments.watch!r} is no number of seconds, and no path") from None
            paths.insert(0, arguments.watch)
            seconds = SECONDS
        if not 0.1 <= seconds <= 86400:
            raise CommandError("--watch: give seconds from 0.1 to 86400")
        if arguments.json:
            raise CommandError("--watch draws for people: without it, --json can be asked for as often as is wanted")
        try:
            _watch(paths, seconds, arguments)
        except KeyboardInterrupt:  # is how it ends
            return 0
    rows, status = _look(paths)
    if rows or status < 2:
        _show(rows, arguments)
    return status


def _watch(paths: list[str], seconds: float, arguments: argparse.Namespace) -> NoReturn:
    """Show the table again and again, on a terminal in its place."""
    in_place, first = is_terminal(sys.stdout), True
    while True:
        rows, _ = _look(paths)
        lines = _lines(rows, arguments)
        if in_place:
            height = os.get_terminal_size(sys.stdout.fileno()).lines or 24
            if len(lines) > height - 1:
                lines = [*lines[: height - 3], f"... {len(lines) - height + 2} lines more", lines[-1]]
            text = "".join(line + "\x1b[K\n" for line in lines)
            sys.stdout.write(("\x1b[2J" if first else "") + "\x1b[H" + text + "\x1b[J")
        else:
            sys.stdout.write(("" if first else "\n") + "".join(line + "\n" for line in lines))
        sys.stdout.flush()
        first = False
        time.sleep(seconds)


def _look(paths: list[str]) -> tuple[list[Row], int]:
    """All backups of some mounts and backups, and the exit status."""
    rows: list[Row] = []

    def look(path: str) -> None:
        if (page_size := page_size_of_mount(path)) is not None:
            rows.extend(_rows(path, page_size))
            return
        if is_backup(path):
            above, name = os.path.split(os.path.realpath(path))
            rows.append(_row(above, name, number(above, "page_size"), os.stat(path)))
            return
        raise CommandError(f"{quoted(path)} is no mount of ttmfs, and no backup")

    if paths:
        return rows, _each("ls", paths, look)
    found = sorted({mount.path for mount in ttmfs_mounts() if _is_shown(mount.path)})
    if not found:
        raise CommandError("there is no mount of ttmfs that is shown to you; mount.py makes one")
    return rows, 2 if _each("ls", found, look) == 2 else 0


def _is_shown(mount: str) -> bool:
    """Whether a mount lets its caller in. One that is dead is told of."""
    try:
        os.statvfs(mount)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EPERM)
    return True


def _rows(mount: str, page_size: int) -> Iterator[Row]:
    """The backups of a mount. Those that go meanwhile, and those that may not be looked at, are left out."""
    place = os.path.realpath(mount)
    with os.scandir(mount) as listing, ThreadPoolExecutor(AT_ONCE) as threads:

        def row(entry: "os.DirEntry[str]") -> Row | None:
            try:
                return _row(place, entry.name, page_size, entry.stat(follow_symlinks=False))
            except OSError:
                return None

        yield from (found for found in threads.map(row, listing) if found)


def _row(mount: str, name: str, page_size: int, found: os.stat_result) -> Row:
    path = os.path.join(mount, name)
    pages = number(path, "pages")
    resident = number(path, "resident") if pages else 0
    return Row(
        mount=mount,
        name=name,
        pages=pages,
        page_size=page_size,
        size=number(path, "size"),
        resident=resident * page_size,
        swapped=(pages - resident) * page_size,  # as the mount reckons it
        uid=found.st_uid,
        owner=_user(found.st_uid),
        modified=found.st_mtime,
    )


@lru_cache
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _show(rows: list[Row], arguments: argparse.Namespace) -> None:
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(row) for row in _sorted(rows, arguments)], indent=2) + "\n")
        return
    for line in _lines(rows, arguments):
        sys.stdout.write(line + "\n")


def _sorted(rows: list[Row], arguments: argparse.Namespace) -> list[Row]:
    return sorted(rows, key=SORTS[arguments.sort], reverse=arguments.reverse)


def _lines(rows: list[Row], arguments: argparse.Namespace) -> list[str]:
    """The table, with its totals."""
    shown, now, colours = str if arguments.bytes else size, time.time(), has_colours(sys.stdout)
    several = len({row.mount for row in rows}) > 1
    header = ("PAGES", "SIZE", "RESIDENT", "SWAPPED", "OWNER", "AGE", "NAME")
    cells = [
        (
            str(row.pages), shown(row.size), shown(row.resident), shown(row.swapped), quoted(row.owner),
            age(now - row.modified), quoted(os.path.join(row.mount, row.name) if several else row.name),
        )
        for row in _sorted(rows, arguments)
    ]  # fmt: skip
    sums = (sum(getattr(row, name) for row in rows) for name in ("size", "resident", "swapped"))
    count = f"{len(rows)} backup{'s' * (len(rows) != 1)}"
    total = (str(sum(row.pages for row in rows)), *map(shown, sums), "", "", count)
    lines = table(header, [*cells, total], LEFT)
    if is_terminal(sys.stdout):
        lines = [line if len(line) < columns() else line[: columns() - 1] for line in lines]
    return [painted(lines[0], "1", colours=colours), *lines[1:-1], painted(lines[-1], "2", colours=colours)]


# --- writeback, fini ---


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="MNT/NAME", help="a backup")


def _add_writeback(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser)
    parser.add_argument("--json", action="store_true", help="a list of objects: backup, page_size, counts of pages")


def _writeback(arguments: argparse.Namespace) -> int:
    done: list[dict[str, Any]] = []

    def writeback(path: str) -> None:
        check_backup(path)
        from ..client import Backup

        with Backup.open(path, native=False) as backup:
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
    from ..client import Backup
    from .users import Place, Users, told

    places: dict[str, Place | Exception] = {}
    for path in arguments.paths:
        try:
            check_backup(path)
            places[path] = Place.of(path)
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
        with Backup.open(path, native=False) as backup:
            if backup.id != place.ino:
                raise CommandError(f"{quoted(path)} is another backup by now, and was left")
            if not arguments.dry_run:
                backup.fini()
                return
            pages = number(path, "pages")
            released = f"{pages} page{'s' * (pages != 1)}, {size(pages * backup.page_size)}"
        sys.stdout.write(f"would end {quoted(path)} and release {released}\n")
        if using:
            sys.stdout.write(f"  though it is in use: {told(using)}\n")

    status = _each("fini", arguments.paths, fini)
    if users and found and (unseen := users.unseen()):
        _complain("fini", unseen)
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
    ),
    Command(
        "ls",
        "List the backups of mounts: pages stored, bytes spanned, bytes in memory and swapped out (with store=: on\n"
        "the disk alone), owner, and how long ago the last change was.",
        """\
examples:
  ttmfs ls                             of all mounts that can be reached
  ttmfs ls --sort swapped /mnt/ttm     the coldest first
  ttmfs ls --watch=0.5 /mnt/ttm        drawn anew twice a second, until ^C
  ttmfs ls --json | jq '.[] | select(.pages == 0) | .name'""",
        _add_ls,
        _ls,
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
    ),
)
