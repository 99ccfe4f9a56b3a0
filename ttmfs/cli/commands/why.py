"""``why``: shows the last refusals of a mount, with their reasons."""

from __future__ import annotations

import argparse
import errno
import json
import sys
import time
from typing import Any

from ...quoting import plain, quoted
from .child_process import ask
from .command import Command, CommandError
from .mounts import located
from .terminal import table

__all__ = ["COMMANDS"]

HEADER = ("TIME", "USER", "PROCESS", "OPERATION", "ERROR", "REASON")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mount", metavar="MNT", help="the mount point")
    parser.add_argument(
        "--json", action="store_true", help="a list of objects: time, operation, errno, reason, uid, pid, command"
    )


def _run(arguments: argparse.Namespace) -> int:
    path: str = arguments.mount
    answer = ask(path, lambda: _refusals(path))
    if answer.error:
        raise CommandError(answer.error)
    found: list[dict[str, Any]] = answer.items[0]
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    elif found:
        sys.stdout.write("\n".join(table(HEADER, map(_row, found), frozenset(HEADER))) + "\n")
    else:
        sys.stderr.write("nothing was refused since the daemon started\n")
    return 0


def _refusals(path: str) -> list[dict[str, Any]]:
    """The refusals that a mount reports. They are objects, and their content is not checked."""
    try:
        with located(path) as place:
            if not place or place.page_size is None:
                raise CommandError(f"{quoted(path)} is not a mount point of ttmfs; give MNT, not a backup in it")
            text = place.attribute("refusals")
    except OSError as error:
        if error.errno == errno.EPERM:
            raise CommandError(f"{quoted(path)}: only root and the user who mounted it may see refusals") from None
        raise
    if text is None:
        raise CommandError(f"{quoted(path)}: its daemon has a version that keeps no reasons")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise CommandError(f"{quoted(path)}: its answer is not a list of refusals")
    return found


def _row(refusal: dict[str, Any]) -> tuple[str, ...]:
    at, pid, command = refusal.get("time", 0), refusal.get("pid"), refusal.get("command")
    try:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except (TypeError, ValueError, OverflowError, OSError):
        when = "?"
    process = "-" if pid is None else f"{plain(str(pid))} {plain(str(command))}" if command else plain(str(pid))
    user = "-" if refusal.get("uid") is None else plain(str(refusal["uid"]))
    return when, user, process, *(plain(str(refusal.get(key))) for key in ("operation", "errno", "reason"))


COMMANDS = (
    Command(
        "why",
        "Show why the last 64 refused requests were refused, the newest last. A caller gets only an errno; the daemon\n"
        "keeps the reason until it is replaced. Only root and the user who mounted may see it. The log has it too, at\n"
        "most one line in ten seconds for each operation and error.",
        """\
examples:
  ttmfs why /mnt/ttm
  ttmfs why /mnt/ttm --json | jq '.[] | select(.errno == "ENOSPC")'""",
        _add,
        _run,
    ),
)
