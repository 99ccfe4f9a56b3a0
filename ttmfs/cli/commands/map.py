"""``map``: draws a backup, and shows where its pages are absent, in memory or swapped out.

A cell represents a few consecutive pages. Its character shows how many of them exist, and its colour shows where they
are. Cells with swapped-out pages have other characters, so that the picture can be read without colours.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...quoting import quoted
from .cells import Cell, View
from .command import Command, CommandError, reason
from .mounts import backup_at
from .plot import ACROSS, DOWN, FORMATS, check_is_installed, picture
from .terminal import columns, has_colours, is_terminal, is_utf8, painted, size

if TYPE_CHECKING:
    from ...client.backup import Backup

__all__ = ["COMMANDS"]

LINES = 16
"""Lines of cells on a terminal."""

MARGIN = 12
"""Columns for the handle before each line."""

EMPTY_SHARE = 16
"""Only the range from the first page to the last is shown if the backup is this many times larger."""

UNICODE, ASCII = ("·", "░▒█", "⠂⠶⣿"), (".", "-+#", ":oO")
"""The characters of absent pages, of pages in memory and of swapped-out pages: up to a third exist, some, all."""

IN_MEMORY, MIXED, SWAPPED_OUT, ABSENT = "33", "35", "34", "2"
"""Colours, as SGR parameters."""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backup", metavar="MNT/NAME", help="the backup")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--stored", action="store_true", help="show only the range from the first stored page to the last"
    )
    which.add_argument("--whole", action="store_true", help="show the whole backup, even if it is mostly empty")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path,
        help="write a picture instead: .png, .svg or .pdf; - is a PNG on standard output",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="the runs of pages, by handle, and how many of each are swapped out"
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.output:
        raise CommandError("--json writes text, -o a picture: give one of the two")
    if str(arguments.output) == "-" and is_terminal(sys.stdout):
        raise CommandError("a terminal cannot show a PNG: redirect it to a file or a program")
    kind = _kind(arguments.output) if arguments.output else ""
    with backup_at(arguments.backup) as backup:
        if arguments.json:
            _print_json(arguments.backup, backup)
            return 0
        width, lines = (ACROSS, DOWN) if arguments.output else (columns() - MARGIN, LINES)
        view = _view(backup, width * lines, arguments)
    if arguments.output:
        _write(arguments.output, picture(quoted(arguments.backup), view, kind))
        return 0
    sys.stdout.write("\n".join(_picture(quoted(arguments.backup), view, width)) + "\n")
    return 0


def _kind(output: Path) -> str:
    """The format of the picture. CommandError if it is unknown, or matplotlib is missing."""
    kind = "png" if str(output) == "-" else output.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise CommandError(f"{quoted(output)}: the ending says what to write: .png, .svg or .pdf")
    check_is_installed()
    return kind


def _print_json(path: str, backup: Backup) -> None:
    where, runs = backup.residency(), []
    for first, past in backup.runs():
        run = {"first": first + 1, "last": past}
        if backup.is_native:
            run["swapped"] = backup.residency_of(first, past).swapped if where.swapped else 0
        runs.append(run)
    about = {"backup": path, "page_size": backup.page_size, "size": backup.size}
    sys.stdout.write(json.dumps({**about, **where.__dict__, "runs": runs}, indent=1) + "\n")


def _view(backup: Backup, room: int, arguments: argparse.Namespace) -> View:
    """The view of a backup, in at most `room` cells."""
    limit, where = max(1, backup.size // backup.page_size), backup.residency()
    runs = [(first, min(past, limit)) for first, past in backup.runs() if first < limit]
    first, past = 0, limit
    stored = (runs[0][0], runs[-1][1]) if runs else (0, limit)
    if runs and not arguments.whole and (arguments.stored or (stored[1] - stored[0]) * EMPTY_SHARE <= limit):
        first, past = stored
    step = -(-(past - first) // room)
    counts = [0] * -(-(past - first) // step)
    for start, end in runs:
        for number in range((start - first) // step, -(-(end - first) // step)):
            at = first + number * step
            counts[number] += min(end, at + step) - max(start, at)
    knows_swap = backup.is_native or not where.swapped
    cells = []
    for number, count in enumerate(counts):
        at = first + number * step
        end, cold = min(past, at + step), 0
        if count and where.swapped and knows_swap:
            cold = min(count, backup.residency_of(at, end).swapped)
        cells.append(Cell(end - at, count, cold))
    return View(first, past, limit, step, cells, where.pages, where.swapped, backup.page_size, knows_swap)


def _picture(name: str, view: View, width: int) -> list[str]:
    colours = has_colours(sys.stdout)
    absent, in_memory, swapped_out = UNICODE if is_utf8(sys.stdout) else ASCII

    def drawn(cell: Cell) -> tuple[str, str]:
        if not cell.fullness:
            return absent, ABSENT
        chars = swapped_out if cell.swapped * 2 >= cell.pages else in_memory
        return chars[cell.fullness - 1], (IN_MEMORY, MIXED, SWAPPED_OUT)[cell.location]

    facts = view.facts
    lines = [painted(name, "1", colours=colours), *([", ".join(facts)] if len(facts) == 2 else facts)]
    for start in range(0, len(view.cells), width):
        handle = view.first + start * view.step + 1
        text, before = "", ""
        for char, colour in map(drawn, view.cells[start : start + width]):
            if colours and colour != before:
                text += f"\x1b[0;{colour}m"
                before = colour
            text += char
        lines.append(f"{handle:>{MARGIN - 2}} {text}" + "\x1b[0m" * colours)
    keys = zip((absent, in_memory, swapped_out), (ABSENT, IN_MEMORY, SWAPPED_OUT), strict=True)
    for (what, count), (chars, colour) in zip(view.counts.items(), keys, strict=True):
        key = painted(f"{chars:<3}", colour, colours=colours)
        lines.append(f"{key} {what:<11} {count:>10} pages {size(count * view.page_size):>6}")
    if view.swapped and colours:
        lines.append(painted("purple: cells with both", MIXED, colours=True))
    return lines


def _write(path: Path, data: bytes) -> None:
    if str(path) == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    try:
        path.write_bytes(data)
    except OSError as error:
        raise CommandError(reason(error, path)) from None


COMMANDS = (
    Command(
        "map",
        "Draw which pages of a backup are absent, in memory, and swapped out: on the terminal, or with -o as a\n"
        "picture for a report. A backup that is mostly empty is shown from its first page to its last.",
        """\
examples:
  ttmfs map /mnt/ttm/bo7
  ttmfs map /mnt/ttm/bo7 -o bo7.png
  ttmfs map --json /mnt/ttm/bo7 | jq '.runs | length'""",
        _add,
        _run,
        uses_client=True,
        waits_for=lambda arguments: [arguments.backup],
    ),
)
