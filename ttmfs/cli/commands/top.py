"""``top``: the requests of the last seconds, by backup and by process."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ...linux.mountinfo import ttmfs_mounts
from ...quoting import plain, quoted
from ..exit_status import ExitStatus
from ..keepers import status_of
from .child_process import ask_all
from .command import Command, CommandError, complain
from .look import BEYOND
from .mounts import root_at
from .terminal import columns, duration, is_terminal, is_utf8, table, user_name
from .watch import SECONDS, add_watch, interval_and_paths, watch

__all__ = ["COMMANDS"]

HEADER = ("BACKUP", "PROCESS", "USER", "OPERATION", "PER S", "TIME", "MEAN")
LEFT = frozenset({"OPERATION", "USER", "PROCESS", "BACKUP"})

LONGEST_NAME = 20
"""Characters of a name on a terminal, beside which the other columns fit into 80."""


class Row(NamedTuple):
    """Requests of one kind for one backup by one process.

    `busy` is the share of the time that they took, with their waits. It can exceed 1.
    """

    mount: str
    backup: str | None
    pid: int  # 0: the kernel
    command: str | None
    uid: int
    operation: str
    per_second: float
    busy: float
    mean_seconds: float


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mounts", nargs="*", metavar="MNT", help="the mount point (default: all mounts)")
    add_watch(parser)
    parser.add_argument("-1", "--once", action="store_true", help="print one table, as without a terminal")
    parser.add_argument("--json", action="store_true", help="a list of objects, once; times are seconds")


def _run(arguments: argparse.Namespace) -> int:
    paths, value = arguments.mounts, arguments.watch
    if arguments.json:
        if value is not None:
            raise CommandError("--watch cannot write JSON; run top --json repeatedly instead")
        rows, errors, status = _look(paths)
        sys.stdout.write(json.dumps([*(row._asdict() for row in rows), *errors], indent=2) + "\n")
        return status
    if value is None and is_terminal(sys.stdout) and not arguments.once:
        value = SECONDS
    if value is not None and not arguments.once:
        seconds, paths = interval_and_paths(value, paths)
        return watch(seconds, lambda: _lines(*_look(paths)[:2]))
    rows, errors, status = _look(paths)
    if status == ExitStatus.FAILED:
        for error in errors:
            complain("top", error["error"])
    else:
        sys.stdout.writelines(line + "\n" for line in _lines(rows, errors))
    return status


def _look(paths: list[str]) -> tuple[list[Row], list[dict[str, Any]], ExitStatus]:
    """What the mounts say, the most time first; the mounts that say nothing; and the exit status."""
    wanted = paths or sorted({mount.path for mount in ttmfs_mounts()})
    if not wanted:
        raise CommandError("no ttmfs is mounted; ttmfs mount MNT mounts one")
    answers = ask_all([(path, lambda path=path: [_recent(path)]) for path in wanted])  # type: ignore[misc]
    rows, errors = list[Row](), list[dict[str, Any]]()
    for path, answer in zip(wanted, answers, strict=True):
        try:
            if answer.error:
                raise CommandError(answer.error)
            rows += _rows(path, answer.items[0])
        except CommandError as why:
            errors.append({"mount": path, "error": str(why)})
    return sorted(rows, key=lambda row: -row.busy), errors, ExitStatus.of(len(errors), len(wanted))


def _recent(path: str) -> Any:
    """What a mount reports. It is JSON, and not checked yet."""
    with root_at(path) as place:
        text = place.private_attribute("recent", "requests")
    if text is None:
        raise CommandError(f"{quoted(path)}: its daemon has a version that does not tell; ttmfs restart replaces it")
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _rows(path: str, found: Any) -> Iterable[Row]:
    """The rows of a mount, whose answer is checked: anyone can serve one."""
    try:
        seconds = max(_checked(found["seconds"]), 1e-6)
        sums: dict[tuple[str | None, int, int, str], list[float]] = {}
        for backup, pid, uid, operation, count, ns in found["requests"]:
            name = None if backup is None else str(backup)
            total = sums.setdefault((name, _process_of(int(pid)), int(uid), str(operation)), [0.0, 0.0])
            total[0] += _checked(count)
            total[1] += _checked(ns) / 1e9
    except (TypeError, ValueError, KeyError, OverflowError):
        raise CommandError(f"{quoted(path)}: its answer is not a list of requests") from None
    for (name, pid, uid, operation), (count, spent) in sums.items():
        mean = spent / count if count else 0.0
        yield Row(path, name, pid, _command_of(pid), uid, operation, count / seconds, spent / seconds, mean)


def _checked(value: Any) -> float:
    """A number that a mount can count. ValueError or TypeError for anything else."""
    if not 0 <= (number := float(value)) < BEYOND:
        raise ValueError("out of range")
    return number


def _process_of(thread: int) -> int:
    """The process of a thread: the kernel tells the daemon which thread asked. The number itself if that has ended."""
    with contextlib.suppress(OSError):
        return int(status_of(f"/proc/{thread}")["Tgid"])
    return thread


def _command_of(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_bytes().decode(errors="replace").removesuffix("\n")
    return None


def _lines(rows: list[Row], errors: list[dict[str, Any]]) -> list[str]:
    several = len({row.mount for row in rows}) > 1
    rate, busy = sum(row.per_second for row in rows), sum(row.busy for row in rows)
    total = f"{rate:.0f} requests a second took {busy:.0%} of the time (last 5 s, or 4096 requests)"
    cells = [
        (
            _shown_backup(row, several=several), _shown_process(row), plain(user_name(row.uid)), plain(row.operation),
            f"{row.per_second:.1f}", f"{row.busy:.1%}", duration(row.mean_seconds),
        )
        for row in rows
    ]  # fmt: skip
    lines = [total, *table(HEADER, cells, LEFT, cut="BACKUP")]
    lines += [plain(str(error["error"])) for error in errors]
    return [line[: columns() - 1] for line in lines] if is_terminal(sys.stdout) else lines


def _shown_process(row: Row) -> str:
    if not row.pid:
        return "(the kernel)"
    return f"{row.pid} {plain(row.command)}" if row.command else f"{row.pid} (ended)"


def _shown_backup(row: Row, *, several: bool) -> str:
    name = "-" if row.backup is None else row.backup
    shown = quoted(os.path.join(row.mount, name) if several else name)
    if len(shown) <= LONGEST_NAME or not is_terminal(sys.stdout):
        return shown
    return shown[: LONGEST_NAME - 1] + ("…" if is_utf8(sys.stdout) else "~")


COMMANDS = (
    Command(
        "top",
        "Show the requests of the last 5 seconds, or the last 4096, by backup, process and operation: how many a\n"
        "second, and which share of the time they took. What takes the most time stands first. On a terminal it is\n"
        "repeated until Ctrl-C. Reads and writes of .shmem do not reach the daemon, and are not shown. Only root and\n"
        "the user who mounted may see it.",
        """\
examples:
  ttmfs top
  ttmfs top --once /mnt/ttm
  ttmfs top --json /mnt/ttm | jq 'group_by(.pid)[] | {pid: .[0].pid, busy: map(.busy) | add}'""",
        _add,
        _run,
    ),
)
