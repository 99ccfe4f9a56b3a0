"""``doctor``: says for each use of ttmfs what works here and what is missing. It changes nothing."""

from __future__ import annotations

import argparse
import os

from ...linux.mountinfo import ttmfs_mounts
from .check import OK, PROBLEM, Check, show, show_json
from .command import Command
from .machine_checks import USES
from .mount_checks import of_mounts
from .mounts import mount_at

__all__ = ["COMMANDS"]


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", metavar="MNT", help="check only these mounts (default: all)")
    parser.add_argument("--json", action="store_true", help="a list of objects: use, what, state, found, do")


def _run(arguments: argparse.Namespace) -> int:
    wanted = [mount_at(path) for path in arguments.paths] or [*{m.path: m for m in ttmfs_mounts()}.values()]
    uses = [(use, [found for check in checks if (found := check())]) for use, checks in USES]
    uses.append(("mounts", [*of_mounts(wanted), *([_NOT_ROOT] if os.geteuid() else [])]))
    (show_json if arguments.json else show)(uses)
    return int(any(check.state == PROBLEM for _, checks in uses for check in checks))


_NOT_ROOT = Check(
    "only root sees", OK, "mounts without allow_other and keepers of other users, and whether users may mount at all",
    "sudo ttmfs doctor",
)  # fmt: skip


COMMANDS = (
    Command(
        "doctor",
        "Say for each use of ttmfs what works here, what is missing, and the command that mends it: mounts of users,\n"
        "writeback to swap, a service, containers, scale-out, .shmem, rescue, metrics, and the mounts that run. It\n"
        "changes nothing. Run it as the user who will mount.\n\n"
        "states: ok; missing: this use needs it, others do not; warning: it works, with a drawback; problem.\n\n"
        "exit status: 0 if there is no problem; 1 if there is; 2 if MNT is not a mount.",
        """\
examples:
  ttmfs doctor
  ttmfs doctor /mnt/ttm
  ttmfs doctor --json | jq '.[] | select(.state == "problem")'""",
        _add,
        _run,
    ),
)
