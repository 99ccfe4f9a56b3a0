"""The output of commands: sizes and ages for people, tables, colours, and a progress bar.

Colours and bars are only for terminals, and not if TERM is dumb or, for colours, NO_COLOR is set.
"""

import contextlib
import functools
import os
import pwd
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self, TextIO

__all__ = [
    "ProgressBar", "age", "columns", "counted", "duration", "has_colours", "is_terminal", "is_utf8", "painted", "size",
    "table", "user_name", "wrapped",
]  # fmt: skip

UNITS = "KMGTPE"

GAP, LEAST_WIDTH = "  ", 12
"""What stands between the columns of a table, and characters below which no column is shortened."""


def is_terminal(stream: TextIO) -> bool:
    """Whether it is a terminal on which the cursor can move."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def has_colours(stream: TextIO) -> bool:
    """Whether to write colours to it."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def is_utf8(stream: TextIO) -> bool:
    """Whether it accepts more than ASCII."""
    return (stream.encoding or "ascii").lower().replace("-", "") == "utf8"


def columns() -> int:
    """The width of the terminal, or COLUMNS; 80 without a terminal."""
    return max(20, shutil.get_terminal_size((80, 24)).columns)


def painted(text: str, colour: str, *, colours: bool) -> str:
    """A text in a colour of SGR parameters such as ``1;34``."""
    return f"\x1b[{colour}m{text}\x1b[0m" if colours else text


def size(count: float) -> str:
    """Bytes for a person, in powers of 1024: 12K, 1.5M."""
    if count < 1024:
        return str(int(count))
    for unit in UNITS:
        count /= 1024
        if count < 9.95:
            return f"{count:.1f}".removesuffix(".0") + unit
        if count < 999.5:
            break
    return f"{count:.0f}{unit}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: ``1 backup``, ``2 backups``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def age(seconds: float) -> str:
    """A span of time in its largest unit: 12s, 3m, 5h, 9d."""
    for unit, length in ("d", 86400), ("h", 3600), ("m", 60):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


@functools.cache
def user_name(uid: int) -> str:
    """The name of a user, or the number if the user has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shortened(text: str, width: int) -> str:
    """A text with its middle cut out if it is longer than a width: the ends of a path say the most."""
    if len(text) <= width:
        return text
    mark = "…" if is_utf8(sys.stdout) else "~"
    head = (width - 1) // 2
    return text[:head] + mark + text[len(text) - (width - 1 - head) :]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: frozenset[str], cut: str = "") -> list[str]:
    """Lines of aligned columns: those named in `left` to the left, the others to the right.

    On a terminal, the texts of the column `cut` are shortened as far as the lines need to fit.
    """
    cells = [list(row) for row in (header, *rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(header))]
    if cut and is_terminal(sys.stdout):
        n = header.index(cut)
        others = sum(widths) - widths[n] + len(GAP) * (len(widths) - 1)
        widths[n] = min(widths[n], max(LEAST_WIDTH, columns() - 1 - others))
        for row in cells:
            row[n] = _shortened(row[n], widths[n])
    return [
        GAP.join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]


def duration(seconds: float | None) -> str:
    """A time for a person: 12us, 3.4ms, 1.2s."""
    if seconds is None:
        return "-"
    for factor, unit in (1e6, "us"), (1e3, "ms"), (1, "s"):
        if (value := seconds * factor) < 999.5 or unit == "s":
            return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"
    raise AssertionError


def wrapped(line: str, indent: int) -> list[str]:
    """A line, broken at the edge of a terminal. The lines after the first begin with `indent` blanks."""
    if not is_terminal(sys.stdout):
        return [line]
    return textwrap.wrap(line, columns() - 1, subsequent_indent=" " * indent, break_on_hyphens=False) or [""]


class ProgressBar:
    """A bar with rate and remaining time, on standard error if that is a terminal, for one thread.

    It is shown during a ``with``.
    """

    INTERVAL = 0.1

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._shown = is_terminal(sys.stderr)
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._draw()
        return self

    def advance(self, count: int) -> None:
        """Count bytes that are done."""
        self._done += count
        if time.monotonic() > self._drawn + self.INTERVAL:
            self._draw()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            if kind is None:
                self._draw()
            with contextlib.suppress(OSError):
                sys.stderr.write("\n" if kind is None else "\r\x1b[K")
                sys.stderr.flush()

    def _draw(self) -> None:
        if not self._shown:
            return
        self._drawn = time.monotonic()
        spent = self._drawn - self._began
        share = self._done / self._total if self._total else 1.0
        rate = self._done / spent if spent > 0 else 0.0
        tail = f" {share:4.0%}  {size(self._done):>5} of {size(self._total)}"
        if rate:
            left = (self._total - self._done) / rate
            tail += f"  {size(rate):>5}/s  " + (f"{_clock(left)} left" if left else _clock(spent)).ljust(9)
        full, empty, cut = ("█", "░", "…") if is_utf8(sys.stderr) else ("#", ".", "~")
        what, width = self._what, columns() - 1
        if len(what) > (room := width - len(tail)):  # the end of a path says more than its beginning
            what = cut + what[len(what) - max(0, room - 1) :]
        bar, room = "", min(30, width - len(what) - len(tail) - 1)
        if room >= 5:
            filled = int(share * room)
            bar = f" {full * filled}{empty * (room - filled)}"
        with contextlib.suppress(OSError):  # a closed terminal is no reason to stop
            sys.stderr.write("\r" + f"{what}{bar}{tail}"[:width] + "\x1b[K")
            sys.stderr.flush()
