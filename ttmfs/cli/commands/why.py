"""``why``: shows the last refusals of a mount, with their reasons."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from ...quoting import plain, quoted
from .child_process import ask
from .command import Command, CommandError
from .look import Look, looked_at
from .mounts import failure, root_at
from .terminal import age, table

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
    found: list[dict[str, Any]]
    found, restarted = answer.items[0]
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    if found:
        sys.stdout.write("\n".join(table(HEADER, map(_row, found), frozenset(HEADER))) + "\n")
    else:
        sys.stderr.write("nothing was refused since the daemon started\n")
    if restarted is not None:
        when = age(max(0.0, time.time() - restarted))
        sys.stderr.write(
            f"the daemon was restarted {when} ago, and has no reasons from before; the log may have them: "
            f"ttmfs log {quoted(path)}\n"
        )
    return 0


def _refusals(path: str) -> tuple[list[dict[str, Any]], float | None]:
    """The refusals that a mount reports, and when its daemon was restarted, in seconds since 1970, if it ever was.

    The refusals are objects, and their content is not checked.
    """
    with root_at(path) as place:
        text = place.private_attribute("refusals", "refusals")
        try:
            (look,) = (Look(**fields) for fields in looked_at(place.mount))
        except OSError as error:
            raise failure(error, path) from None
    if text is None:
        raise CommandError(f"{quoted(path)}: its daemon has a version that keeps no reasons")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise CommandError(f"{quoted(path)}: its answer is not a list of refusals")
    return found, look.number("serving_since_seconds") if look.number("restarts_total") else None


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
        "most one line in ten seconds for each operation and error. What the kernel refuses by itself, by mode bits\n"
        "or in .shmem, never reaches the daemon.",
        """\
examples:
  ttmfs why /mnt/ttm
  ttmfs why /mnt/ttm --json | jq '.[] | select(.errno == "ENOSPC")'""",
        _add,
        _run,
    ),
)
