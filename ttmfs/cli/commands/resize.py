"""``resize`` and ``drop``: what changes the size of a mount or a backup, and the pages of a backup."""

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator

from ...handles import format_ranges, parse_ranges
from ...options import OptionError, format_size, parse_size
from ...quoting import quoted
from .command import Command, CommandError
from .mounts import Place, failure, last_refusal, located, opened
from .terminal import counted

__all__ = ["COMMANDS"]

RANGES_AT_ONCE = 1000
"""Ranges in one value: the kernel takes 64 KiB, and a range has at most 21 characters."""


@contextlib.contextmanager
def _located(path: str) -> Iterator[Place]:
    """The mount or backup at a path. A symbolic link is followed to a mount, but not to a backup."""
    with contextlib.ExitStack() as stack:
        try:
            try:
                place, is_link = stack.enter_context(located(path, follow=False)), False
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                place, is_link = stack.enter_context(located(path)), True
        except OSError as error:
            above, name = os.path.split(path)
            if error.errno == errno.ENOTDIR and name.isdecimal():
                raise CommandError(f"{quoted(path)} is a page; name the backup, {quoted(above or '..')}") from None
            raise failure(error, path) from None
        if not place or (place.page_size is None and not place.is_backup):
            raise CommandError(f"{quoted(path)} is neither a mount of ttmfs nor a backup; ttmfs ls shows both")
        if is_link and place.page_size is None:
            raise CommandError(f"{quoted(path)} is a symbolic link; name the backup itself")
        yield place


def _set(place: Place, name: str, value: str) -> None:
    """Set an attribute. CommandError with the daemon's reason if it refuses."""
    try:
        os.setxattr(f"/proc/self/fd/{place.fd}", f"user.ttmfs.{name}", value.encode())
    except OSError as error:
        why = last_refusal(place, error.errno).removeprefix(f"user.ttmfs.{name}: ") or str(error.strerror)
        if isinstance(error, PermissionError) and place.page_size:
            why = "only root and the user who mounted it may change that"
        raise CommandError(f"{quoted(place.path)}: {why}") from None


# --- resize ---


def _add_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="MNT[/NAME]", help="the mount point, or a backup")
    parser.add_argument("size", metavar="SIZE", help="bytes, with k, m, g, t, or %% of RAM; such as 1.5g")
    parser.add_argument("--json", action="store_true", help="an object: path, before, size, in bytes")


def _resize(arguments: argparse.Namespace) -> int:
    try:
        wanted = parse_size(arguments.size)
    except OptionError as error:
        raise CommandError(f"SIZE: {error}") from None
    with _located(arguments.path) as place:
        before = place.number("size")
        _set(place, "size", str(wanted))
        after = place.number("size")
    if arguments.json:
        sys.stdout.write(json.dumps({"path": arguments.path, "before": before, "size": after}) + "\n")
    else:
        sys.stdout.write(f"{quoted(arguments.path)}: {format_size(after)} (was {format_size(before)})\n")
    return 0


# --- drop ---


def _add_drop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backup", metavar="MNT/NAME", help="a backup")
    parser.add_argument("handles", nargs="*", metavar="HANDLES", help="handles and ranges of them, such as 1-5,9")
    parser.add_argument("-a", "--all", action="store_true", help="drop all pages; the backup stays")
    parser.add_argument("--json", action="store_true", help="an object: backup, page_size, counts dropped and pages")


def _drop(arguments: argparse.Namespace) -> int:
    if bool(arguments.handles) == arguments.all:
        raise CommandError("give the handles to drop, such as 1-5,9, or --all; ttmfs map shows which there are")
    try:
        ranges = [pair for text in arguments.handles for pair in parse_ranges(text)]
    except ValueError as error:
        raise CommandError(f"HANDLES: {error}") from None
    with _located(arguments.backup) as place:
        if place.page_size is not None:
            advice = f"name a backup in it, such as {quoted(arguments.backup.rstrip('/'))}/a"
            raise CommandError(f"{quoted(arguments.backup)} is the root of a mount; {advice}")
        with opened("..", place.fd) as root:
            page_size = Place(place.path, root, place.mount).number("page_size")
        limit, before = place.number("size") // page_size, place.number("pages")
        if arguments.all:
            ranges = [(1, limit)] if limit else []
        _check(ranges, limit, arguments.backup)
        for start in range(0, len(ranges), RANGES_AT_ONCE):
            _set(place, "drop", format_ranges(ranges[start : start + RANGES_AT_ONCE]))
        left = place.number("pages")
    dropped = max(0, before - left)
    found = {"backup": arguments.backup, "page_size": page_size, "dropped": dropped, "pages": left}
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        sys.stdout.write(f"{quoted(arguments.backup)}: {counted(dropped, 'page')} dropped, {left} left\n")
    return 0


def _check(ranges: list[tuple[int, int]], limit: int, path: str) -> None:
    """Check that the backup has the handles: otherwise some of them would be dropped before an error."""
    for first, last in ranges:
        if not first or last > limit:
            raise CommandError(f"{quoted(path)} has the handles 1 to {limit}, and not {format_ranges([(first, last)])}")


COMMANDS = (
    Command(
        "resize",
        "Change the budget of a mount, or the size of a backup. Nothing is unmounted, and no page is lost: a size too\n"
        "small for what is stored is refused. Only root and the user who mounted may change the budget.",
        """\
examples:
  ttmfs resize /mnt/ttm 8g            all backups together may hold 8 GiB
  ttmfs resize /mnt/ttm/bo7 1.5g      the backup spans 1.5 GiB
  ttmfs resize --json /mnt/ttm 50%""",
        _add_resize,
        _resize,
        waits_for=lambda arguments: [arguments.path],
    ),
    Command(
        "drop",
        "Drop pages of a backup, by their handles: their memory is free at once, and the backup stays. Handles\n"
        "without a page are no error. ttmfs fini ends a backup.",
        """\
examples:
  ttmfs drop /mnt/ttm/bo7 1-5,9
  ttmfs drop --all /mnt/ttm/bo7
  ttmfs drop --json /mnt/ttm/bo7 1-1000 | jq .dropped""",
        _add_drop,
        _drop,
        waits_for=lambda arguments: [arguments.backup],
    ),
)
