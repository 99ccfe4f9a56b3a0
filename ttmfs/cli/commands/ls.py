"""``ls``: a table of backups.

A child process lists each mount. So a mount that does not answer in time delays no other, and is reported.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

from ...linux.mountinfo import ttmfs_mounts
from ...quoting import plain, quoted
from ..exit_status import ExitStatus
from .child_process import ask_all
from .command import Command, CommandError, complain
from .mounts import Place, failure, located, opened
from .terminal import age, columns, counted, has_colours, is_terminal, painted, size, table, user_name
from .watch import add_watch, interval_and_paths, watch

__all__ = ["COMMANDS"]

LEFT = frozenset({"OWNER", "NAME"})

THREADS, BATCH = 4, 256
"""Several threads ask about backups, so that the daemon always has a request to answer."""


class Row(NamedTuple):
    """A backup in the table and in ``--json``. Sizes are bytes, `modified` is seconds since 1970."""

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
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="mounts and backups (default: all mounts that let you in)"
    )
    parser.add_argument("-b", "--bytes", action="store_true", help="sizes in bytes")
    parser.add_argument(
        "-s", "--sort", choices=SORTS, default="name", help="the order (default: name); numbers: largest first"
    )
    parser.add_argument("-r", "--reverse", action="store_true", help="reverse the order")
    add_watch(parser)
    parser.add_argument("--json", action="store_true", help="a list of objects; sizes are bytes, times seconds")


def _ls(arguments: argparse.Namespace) -> int:
    if arguments.watch is not None:
        return _watch(arguments)
    rows, failed, status = _list(arguments.paths)
    for why in failed.values():
        complain("ls", why)
    if arguments.json:
        found = [row._asdict() for row in _sorted(rows, arguments)]
        silent = [{"mount": path, "error": why} for path, why in failed.items()]
        sys.stdout.write(json.dumps([*found, *silent], indent=2) + "\n")
    elif rows or status != ExitStatus.FAILED:
        sys.stdout.writelines(line + "\n" for line in _lines(rows, arguments))
    return status


def _watch(arguments: argparse.Namespace) -> int:
    seconds, paths = interval_and_paths(arguments.watch, arguments.paths)
    if arguments.json:
        raise CommandError("--watch cannot write JSON; run ls --json repeatedly instead")

    def lines() -> list[str]:
        rows, failed, _ = _list(paths)
        return [*_lines(rows, arguments), *map(plain, failed.values())]

    return watch(seconds, lines)


def _list(paths: list[str]) -> tuple[list[Row], dict[str, str], ExitStatus]:
    """The backups at some paths, or of all mounts; the paths that failed, and why; and the exit status."""
    if paths:
        works = [(path, partial(_rows_at, path)) for path in paths]
    elif found := sorted({mount.path for mount in ttmfs_mounts()}):
        works = [(path, partial(_rows_if_allowed, path)) for path in found]
    else:
        raise CommandError("no ttmfs is mounted; ttmfs mount MNT mounts one")
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for (path, _), answer in zip(works, ask_all(works), strict=True):
        rows.extend(Row(*item) for item in answer.items)
        if answer.error:
            failed[path] = answer.error
    return rows, failed, ExitStatus.of(len(failed), len(works))


def _rows_if_allowed(mount: str) -> Iterator[Row]:
    """The backups of a mount; none if it does not let this user in."""
    try:
        os.stat(mount)  # statvfs(2) of a closed mount succeeds
    except PermissionError:
        return
    except OSError as error:
        raise failure(error, mount) from None
    yield from _rows_at(mount)


def _rows_at(path: str) -> Iterator[Row]:
    """The backups of a mount, or one backup."""
    try:
        with located(path) as place:
            if place and (page_size := place.page_size):
                yield from _rows(os.readlink(f"/proc/self/fd/{place.fd}"), place, page_size)
            elif place and place.is_backup:
                with opened("..", place.fd) as root:
                    mount, name = os.path.split(os.readlink(f"/proc/self/fd/{place.fd}"))
                    yield _row(mount, name, Place(mount, root, place.mount).number("page_size"), place)
            else:
                raise CommandError(f"{quoted(path)} is not a mount of ttmfs, nor a backup; ttmfs ls alone lists all")
    except OSError as error:
        raise failure(error, path) from None


def _rows(path: str, mount: Place, page_size: int) -> Iterator[Row]:
    """The backups of a mount, except those that disappear meanwhile or cannot be opened."""

    def row(name: str) -> Row | None:
        try:
            with opened(name, mount.fd, follow=False) as fd:
                return _row(path, name, page_size, Place(os.path.join(path, name), fd, mount.mount))
        except OSError:
            return None

    with os.scandir(f"/proc/self/fd/{mount.fd}") as listing, ThreadPoolExecutor(THREADS) as threads:
        while names := [entry.name for entry in islice(listing, BATCH)]:
            yield from filter(None, threads.map(row, names))


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
        swapped=(pages - resident) * page_size,  # as the mount computes it
        uid=found.st_uid,
        owner=user_name(found.st_uid),
        modified=found.st_mtime,
    )


def _sorted(rows: list[Row], arguments: argparse.Namespace) -> list[Row]:
    return sorted(rows, key=SORTS[arguments.sort], reverse=arguments.reverse)


def _lines(rows: list[Row], arguments: argparse.Namespace) -> list[str]:
    """The table, with its totals."""
    shown, now, colours = str if arguments.bytes else size, time.time(), has_colours(sys.stdout)
    several = len({row.mount for row in rows}) > 1
    header = ("NAME", "PAGES", "SIZE", "RESIDENT", "SWAPPED", "OWNER", "AGE")
    cells = [
        (
            quoted(os.path.join(row.mount, row.name) if several else row.name), str(row.pages), shown(row.size),
            shown(row.resident), shown(row.swapped), quoted(row.owner), age(now - row.modified),
        )
        for row in _sorted(rows, arguments)
    ]  # fmt: skip
    sums = (sum(getattr(row, name) for row in rows) for name in ("size", "resident", "swapped"))
    count = counted(len(rows), "backup")
    total = (count, str(sum(row.pages for row in rows)), *map(shown, sums), "", "")
    lines = table(header, [*cells, total], LEFT, cut="NAME")
    if is_terminal(sys.stdout):
        lines = [line if len(line) < columns() else line[: columns() - 1] for line in lines]
    return [painted(lines[0], "1", colours=colours), *lines[1:-1], painted(lines[-1], "2", colours=colours)]


COMMANDS = (
    Command(
        "ls",
        "List the backups of mounts: stored pages, size, bytes in memory and swapped out (with store=: only on the\n"
        "disk), owner, and the time since the last change.",
        """\
examples:
  ttmfs ls                             of all mounts that let you in
  ttmfs ls --sort swapped /mnt/ttm     the coldest first
  ttmfs ls --watch=0.5 /mnt/ttm        twice a second, until Ctrl-C
  ttmfs ls --json | jq '.[] | select(.pages == 0) | .name'""",
        _add_ls,
        _ls,
    ),
)
