"""What ``doctor`` says of one thing: its state, what was found, and the command that mends it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from ...quoting import plain
from .terminal import counted, has_colours, painted

__all__ = ["MISSING", "OK", "PROBLEM", "WARNING", "Check", "State", "either", "read", "show", "show_json"]

State = Literal["ok", "missing", "warning", "problem"]
OK: State = "ok"
MISSING: State = "missing"
"""This use needs it. Others do not."""
WARNING: State = "warning"
PROBLEM: State = "problem"

COLOURS = {OK: "32", MISSING: "36", WARNING: "33", PROBLEM: "1;31"}


class Check(NamedTuple):
    """What was checked, its state, what was found, and what to do about it."""

    what: str
    state: State
    found: str
    do: str = ""


Uses = Iterable[tuple[str, list[Check]]]
"""The checks of each use."""


def either(what: str, is_well: object, ok: str, bad: str, do: str, state: State = WARNING) -> Check:
    """A check with one remedy."""
    return Check(what, OK, ok) if is_well else Check(what, state, bad, do)


def read(path: str) -> str:
    """The content of a file of the kernel or the system; nothing if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def show_json(uses: Uses) -> None:
    """Print a list of objects, one for each check."""
    found = [{"use": use, **check._asdict()} for use, checks in uses for check in checks]
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def show(uses: Uses) -> None:
    """Print a heading for each use, a line for each check with what to do below it, and the counts."""
    shown = [(use, checks) for use, checks in uses if checks]
    every = [check for _, checks in shown for check in checks]
    colours, width = has_colours(sys.stdout), max(len(check.what) for check in every)
    for use, checks in shown:
        sys.stdout.write(f"{use}\n")
        for check in checks:
            state = painted(f"{check.state:<7}", COLOURS[check.state], colours=colours)
            sys.stdout.write(f"  {state}  {check.what:<{width}}  {plain(check.found)}\n")
            if check.do:
                sys.stdout.write(f"{'':{13 + width}}-> {plain(check.do)}\n")
    counts = {state: sum(check.state == state for check in every) for state in (PROBLEM, WARNING)}
    found = ", ".join(counted(count, state) for state, count in counts.items() if count)
    missing = ", ".join(use for use, checks in shown if any(check.state == MISSING for check in checks))
    sys.stdout.write(f"{found or 'no problems'}{f'; something is missing for: {missing}' if missing else ''}\n")
