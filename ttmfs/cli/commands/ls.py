"""A table of backups.

Each mount is looked at by a process apart: one that does not answer, or not in time, is marked, and holds up no other.
"""

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
from functools import lru_cache, partial
from itertools import islice
from typing import NoReturn

from ...linux.mountinfo import Mounted, ttmfs_mounts
from ...quoting import plain, quoted
from .apart import Asked, ask, ask_all
from .command import Command, CommandError, complain, reason
from .mounts import Place, located, opened
from .terminal import age, columns, has_colours, is_terminal, painted, size, table

__all__ = ["COMMANDS"]

LEFT = frozenset({"OWNER", "NAME"})
SECONDS = 2.0
LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

AT_ONCE, BATCH = 4, 256
"""Backups that are asked about at once: while one request is answered the next ones are on their way."""


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
            there = ask(arguments.watch, lambda: os.path.lexists(arguments.watch))
            if not there.is_silent and not there.items[0]:
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
    rows, failed, status = _look(paths, {})
    for why in failed.values():
        complain("ls", why)
    if arguments.json:
        found = [asdict(row) for row in _sorted(rows, arguments)]
        silent = [{"mount": path, "error": why} for path, why in failed.items()]
        sys.stdout.write(json.dumps([*found, *silent], indent=2) + "\n")
    elif rows or status < 2:
        sys.stdout.writelines(line + "\n" for line in _lines(rows, arguments))
    return status


def _watch(paths: list[str], seconds: float, arguments: argparse.Namespace) -> NoReturn:
    """Show the table again and again, on a terminal in its place."""
    in_place, first = is_terminal(sys.stdout), True
    left: dict[str, Asked] = {}
    while True:
        rows, failed, _ = _look(paths, left)
        lines = [*_lines(rows, arguments), *map(plain, failed.values())]
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


def _look(paths: list[str], left: dict[str, Asked]) -> tuple[list[Row], dict[str, str], int]:
    """All backups of some mounts and backups, which of these failed and why, and the exit status."""
    if paths:
        works = [(path, partial(_rows_at, path)) for path in paths]
    elif found := sorted({mount.path for mount in ttmfs_mounts()}):
        works = [(path, partial(_rows_shown, path)) for path in found]
    else:
        raise CommandError("there is no mount of ttmfs; mount.py makes one")
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for (path, _), answer in zip(works, ask_all(works, left), strict=True):
        rows.extend(Row(**item) for item in answer.items if item)
        if answer.error:
            hint = f"; ttmfs doctor {quoted(path)} says what to do" if answer.is_silent else ""
            failed[path] = answer.error + hint
    return rows, failed, 0 if not failed else 1 if len(failed) < len(works) else 2


def _rows_shown(mount: str) -> Iterator[dict[str, object]]:
    """What :func:`_rows_at` gives, but nothing of a mount that does not let its caller in."""
    try:
        os.statvfs(mount)
    except PermissionError:
        return
    yield from _rows_at(mount)


def _rows_at(path: str) -> Iterator[dict[str, object]]:
    """The backups of a mount, or a backup."""
    try:
        with located(path) as place:
            if place and (page_size := place.page_size):
                mount, root = os.readlink(f"/proc/self/fd/{place.fd}"), os.open(".", LISTED, dir_fd=place.fd)
                try:
                    yield from _rows(mount, root, page_size, place.mount)
                finally:
                    os.close(root)
            elif place and place.is_backup:
                with opened("..", place.fd) as above:
                    mount, name = os.path.split(os.readlink(f"/proc/self/fd/{place.fd}"))
                    page_size = Place(mount, above, place.mount).number("page_size")
                    yield asdict(_row(mount, name, page_size, place))
            else:
                raise CommandError(f"{quoted(path)} is no mount of ttmfs, and no backup")
    except OSError as error:
        hint = "; ttmfs doctor says what to do" if error.errno == errno.ENOTCONN else ""
        raise CommandError(reason(error, path) + hint) from None


def _rows(mount: str, root: int, page_size: int, served: Mounted) -> Iterator[dict[str, object]]:
    """The backups of a mount. Those that go meanwhile, and those that may not be looked at, are left out."""

    def row(name: str) -> Row | None:
        try:
            with opened(name, root, follow=False) as fd:
                return _row(mount, name, page_size, Place(os.path.join(mount, name), fd, served))
        except OSError:
            return None

    with os.scandir(root) as listing, ThreadPoolExecutor(AT_ONCE) as threads:
        while names := [entry.name for entry in islice(listing, BATCH)]:
            yield from (asdict(found) for found in threads.map(row, names) if found)


def _row(mount: str, name: str, page_size: int, backup: Place) -> Row:
    found, pages = os.fstat(backup.fd), backup.number("pages")
    resident = min(pages, backup.number("resident")) if pages else 0
    return Row(
        mount=mount,
        name=name,
        pages=pages,
        page_size=page_size,
        size=backup.number("size"),
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


COMMANDS = (
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
)
