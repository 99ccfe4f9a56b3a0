"""``log``: shows where a mount logs and from which level on, and changes the level."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from ...options import LEVELS
from ...quoting import plain, quoted
from .child_process import ask
from .command import Command, CommandError
from .mounts import Place, config, failure, root_at

__all__ = ["COMMANDS"]

READ_BY = {
    "syslog": "syslog; read it with journalctl -t ttmfs -t ttmfs-keeper, or in /var/log/syslog",
    "journal": "the journal; read it with journalctl -t ttmfs -t ttmfs-keeper",
    "terminal": "standard error of the process that was started with -f, or the journal of its unit",
    "stderr": "standard error",
}


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mount", metavar="MNT", help="the mount point")
    parser.add_argument("level", metavar="LEVEL", nargs="?", choices=LEVELS, help=f"log from {', '.join(LEVELS)} on")
    parser.add_argument("--json", action="store_true", help="an object: log_to, log_level")


def _run(arguments: argparse.Namespace) -> int:
    path, level = arguments.mount, arguments.level
    answer = ask(path, lambda: _changed(path, level))
    if answer.error:
        raise CommandError(answer.error)
    found: dict[str, Any] = answer.items[0]
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        where = str(found["log_to"])
        sys.stdout.write(f"level: {plain(str(found['log_level']))}\nlog: {plain(READ_BY.get(where, where))}\n")
    return 0


def _changed(path: str, level: str | None) -> dict[str, Any]:
    """Change the level of a mount, if one is given. Returns what its ``.config`` says then."""
    with root_at(path) as place:
        if level:
            _change(place, level)
        found = config(place.fd)
    return {name: found.get(name) for name in ("log_to", "log_level")}


def _change(place: Place, level: str) -> None:
    try:
        os.setxattr(f"/proc/self/fd/{place.fd}", "user.ttmfs.log_level", level.encode())
    except PermissionError:
        raise CommandError(f"{quoted(place.path)}: only root and the user who mounted it may change that") from None
    except OSError as error:
        raise failure(error, place.path) from None


COMMANDS = (
    Command(
        "log",
        "Show where a mount logs, and from which level on. With LEVEL, change that while the mount serves. A restart\n"
        "of the daemon keeps the level; the next mount has that of its options.",
        """\
examples:
  ttmfs log /mnt/ttm
  ttmfs log /mnt/ttm debug      each request; it slows the mount down
  ttmfs log /mnt/ttm info""",
        _add,
        _run,
    ),
)
