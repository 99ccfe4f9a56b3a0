"""``status``: one screen about a mount, or one line for each mount of the machine."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from ...linux.mountinfo import Mounted, ttmfs_mounts
from ...quoting import plain, quoted
from ..exit_status import ExitStatus
from ..keepers import Keeper, daemons, keepers, process, status_of
from .check import OK, Check
from .child_process import ask_all
from .command import Command, CommandError
from .look import Look, Operation, given_options, looked_at
from .mount_checks import asked, checks_of, store_checks
from .mounts import mount_at
from .terminal import age, columns, counted, duration, is_terminal, size, table, user_name, wrapped
from .watch import add_watch, interval_and_paths, watch

__all__ = ["COMMANDS"]

BETWEEN_LOOKS = 0.5
"""Seconds between the two looks that give the rates."""

MOST_ERRORS = 4
"""Kinds of errors that the screen shows, and at most as many operations as fit."""

LEFT = frozenset({"MOUNT", "STATE", "OPERATION"})


class Report(NamedTuple):
    """What was found out about a mount. `look` is None if it did not answer."""

    mount: Mounted
    problems: list[Check]
    look: Look | None
    before: Look | None  # an earlier look, for the rates
    keeper: Keeper | None
    daemon: int  # its process id; 0: there is none, or it may not be examined
    is_closed: bool  # to this user, who is not the one who mounted it

    @property
    def seconds(self) -> float | None:
        """The time between the two looks; None if there was one look, or another daemon between them."""
        if not self.look or not self.before:
            return None
        since = [look.number("serving_since_seconds") for look in (self.before, self.look)]
        return self.look.at - self.before.at if since[0] == since[1] else None


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mounts", nargs="*", metavar="MNT", help="the mount point (default: a line for each mount)")
    add_watch(parser)
    parser.add_argument("--json", action="store_true", help="a list of objects; sizes are bytes, times seconds")


def _run(arguments: argparse.Namespace) -> int:
    paths: list[str] = arguments.mounts
    if arguments.watch is not None:
        if arguments.json:
            raise CommandError("--watch cannot write JSON; run status --json repeatedly instead")
        return _watch(arguments.watch, paths)
    reports = _reports(paths, {})
    if any(report.look for report in reports):
        time.sleep(BETWEEN_LOOKS)
        reports = _reports(paths, {report.mount.path: report.look for report in reports})
    if arguments.json:
        sys.stdout.write(json.dumps([_as_json(report) for report in reports], indent=2) + "\n")
    else:
        sys.stdout.writelines(line + "\n" for line in _lines(reports, whole=bool(paths), is_watched=False))
    failed = sum(report.look is None and not (report.is_closed and not paths) for report in reports)
    return ExitStatus.of(failed, len(reports))


def _watch(value: str, paths: list[str]) -> int:
    seconds, paths = interval_and_paths(value, paths)
    looks: dict[str, Look | None] = {}

    def lines() -> list[str]:
        reports = _reports(paths, looks)
        looks.update({report.mount.path: report.look for report in reports})
        return _lines(reports, whole=bool(paths), is_watched=True)

    return watch(seconds, lines)


# --- what there is ---


def _reports(paths: Sequence[str], before: dict[str, Look | None]) -> list[Report]:
    """The reports of some mounts, or of all."""
    wanted = [mount_at(path) for path in paths] or [*{m.path: m for m in ttmfs_mounts()}.values()]
    if not wanted:
        raise CommandError("no ttmfs is mounted; ttmfs mount MNT mounts one")
    answers = ask_all([(mount.path, partial(_work, mount)) for mount in wanted])
    by_device = {keeper.device: keeper for keeper in keepers()}
    stores, reports = dict(store_checks(wanted, answers, by_device)), []
    for mount, answer in zip(wanted, answers, strict=True):
        keeper = by_device.get(mount.device)
        checks = [*checks_of(mount, answer, keeper), *filter(None, [stores.get(mount.path)])]
        problems = [check for check in checks if check.state != OK]
        look = Look(**answer.items[1]) if len(answer.items) > 1 else None
        serving = daemons(keeper.pid) if keeper else []
        is_closed = bool(answer.items) and answer.items[0].get("errno") in (errno.EACCES, errno.EPERM)
        pid = serving[0] if serving else 0
        report = Report(mount, problems, look, before.get(mount.path), keeper, pid, is_closed)
        reports.append(report._replace(problems=[*problems, *_waits(report)]))
    return reports


def _work(mount: Mounted) -> Iterator[dict[str, Any]]:
    """What ttmfs doctor asks, and a look. It runs in a child process."""
    for found in asked(mount):
        yield found
        if "error" not in found:
            yield from looked_at(mount)


def _waits(report: Report) -> Iterator[Check]:
    """What a mount waits for."""
    what = quoted(report.mount.path)
    if report.look and (waiting := int(report.look.number("page_ins_waiting"))):
        yield Check(
            what, "warning", f"{waiting} requests wait for swap or a disk",
            "see ttmfs status --watch: if the number stays, the device is slow or does not answer",
        )  # fmt: skip


def _facts_of(pid: int) -> dict[str, Any]:
    """A process of root's or the caller's: its state and the bytes of RAM that it takes."""
    with contextlib.suppress(OSError, KeyError, ValueError), process(pid) as directory:
        found = status_of(directory)
        state = "stopped" if found["State"][:1] in ("T", "t") else "running"
        return {"pid": pid, "state": state, "rss_bytes": int(found["VmRSS"].split()[0]) * 1024}
    return {}


def _operations(report: Report) -> dict[str, tuple[Operation, Operation | None]]:
    """By name: the requests since the daemon started, and those between the two looks."""
    if not report.look:
        return {}
    earlier = report.before.operations if report.before and report.seconds else {}
    return {
        name: (one, one.since(earlier.get(name, Operation(0, 0.0, ()))) if report.seconds else None)
        for name, one in sorted(report.look.operations.items(), key=lambda item: -item[1].requests)
    }


def _as_json(report: Report) -> dict[str, Any]:
    found: dict[str, Any] = {
        "mount": report.mount.path,
        "source": report.mount.source,
        "answers": report.look is not None,
        "closed": report.is_closed,
        "problems": [check._asdict() for check in report.problems],
        "keeper": _facts_of(report.keeper.pid) if report.keeper else None,
    }
    if not (look := report.look):
        return found | {"daemon": _facts_of(report.daemon) if report.daemon else None}
    config, seconds, built = look.config, report.seconds, look.labels("build_info")
    return found | {
        "size_bytes": int(look.number("size_bytes")),
        "stored_bytes": int(sum(look.metrics.get("stored_bytes", {}).values())),
        "free_bytes": int(look.number("available_bytes")),
        "reserve_bytes": config.get("reserve"),
        "page_size_bytes": int(look.number("page_size_bytes")),
        "pages": {state: int(count) for state, count in look.by_label("pages", "state").items()},
        "backups": int(look.number("backups")),
        "operations": {
            name: {
                "count": int(one.requests), "per_second": now.requests / seconds if now and seconds else None,
                "mean_seconds": one.mean, "p50_seconds": one.quantile(0.5), "p99_seconds": one.quantile(0.99),
            }
            for name, (one, now) in _operations(report).items()
        },
        "errors": [{"operation": name, "errno": code, "count": count} for name, code, count in look.errors],
        "refusals": look.refusals,
        "restarts": int(look.number("restarts_total")),
        "serving_since": look.number("serving_since_seconds"),
        "daemon": _facts_of(report.daemon) | {
            "pid": config.get("daemon_pid"), "version": built.get("version"), "loop": built.get("loop"),
            "standby": config.get("standby"),
        },
        "store": config.get("store"),
        "options": given_options(config, report.mount.served_by),
        "log": config.get("log_to"), "log_level": config.get("log_level"),
    }  # fmt: skip


# --- what is shown ---


def _lines(reports: Sequence[Report], *, whole: bool, is_watched: bool) -> list[str]:
    if not whole:
        return [*_cut(_overview(reports)), *(line for report in reports for line in _problems(report))]
    lines: list[str] = []
    for report in reports:
        lines += [""] * bool(lines) + _screen(report, is_watched=is_watched)
    return lines


def _cut(lines: list[str]) -> list[str]:
    """The lines of a table, cut at the edge of a terminal."""
    return [line[: columns() - 1] for line in lines] if is_terminal(sys.stdout) else lines


def _overview(reports: Sequence[Report]) -> list[str]:
    """A table with a line for each mount."""
    header = ("MOUNT", "BACKUPS", "SIZE", "STORED", "FREE", "SWAPPED", "OPS/s", "STATE")
    rows = []
    for report in reports:
        state = "; ".join(check.found for check in report.problems) or ("closed" if report.is_closed else "answers")
        look = report.look
        if not look:
            rows.append((quoted(report.mount.path), *["-"] * 6, plain(state)))
            continue
        stored = look.by_label("stored_bytes", "state")
        rates = [now.requests for _, now in _operations(report).values() if now]
        rows.append((
            quoted(report.mount.path), f"{look.number('backups'):.0f}", size(look.number("size_bytes")),
            size(sum(stored.values())), size(look.number("available_bytes")), size(stored.get("swapped", 0)),
            f"{sum(rates) / report.seconds:.0f}" if report.seconds else "-", plain(state),
        ))  # fmt: skip
    return table(header, rows, LEFT, cut="MOUNT")


def _screen(report: Report, *, is_watched: bool) -> list[str]:
    """All about one mount."""
    title = f"{quoted(report.mount.path)} (source {plain(report.mount.source)})"
    facts = [*_contents(report), *_processes(report)] if report.look else [*_processes(report)]
    width = max((len(name) for name, _ in facts), default=0)
    lines = [title, *_problems(report)]
    if report.is_closed:
        lines += wrapped(f"  closed to other users, root included: ask as user {user_name(report.mount.served_by)}", 4)
        return lines
    for name, text in facts:
        lines += wrapped(f"  {name:<{width}}  {plain(text)}", width + 4)
    return [*lines, *_cut(_latencies(report, is_watched=is_watched))]


def _problems(report: Report) -> Iterator[str]:
    for check in report.problems:
        yield from wrapped(f"  {check.state}: {plain(check.what)} {plain(check.found)}", 4)
        yield from wrapped(f"    -> {plain(check.do)}", 7)


def _contents(report: Report) -> Iterator[tuple[str, str]]:
    """What the mount holds, and with which options."""
    look = report.look
    assert look
    config, number = look.config, look.number
    stored, page = look.by_label("stored_bytes", "state"), size(number("page_size_bytes"))
    reserve = f", reserve {size(config['reserve'])}" if isinstance(config.get("reserve"), int) else ""
    total = size(sum(stored.values()))
    yield "budget", f"{size(number('size_bytes'))}: {total} stored, {size(number('available_bytes'))} free{reserve}"
    pages = look.by_label("pages", "state")
    places = (f"{pages[state]:.0f} {words}" for state, words in PLACES if state in pages)
    yield "pages", f"{', '.join(places)}, of {page} each, in {counted(int(number('backups')), 'backup')}"
    store = config.get("store")
    durable = f", durable={config.get('durable')}" if config.get("store_counter") else ""
    held = f", held by {config.get('store_host')} (taken {config.get('store_counter')} times)" if durable else ""
    yield "store", f"{store}{held}{durable}" if store else "a private tmpfs"
    yield "options", given_options(config, report.mount.served_by) or "all as by default"
    yield "errors", _errors(look)
    if look.refusals is not None:
        more = f" (ttmfs why {quoted(report.mount.path)})" if look.refusals else ""
        yield "refusals", f"{look.refusals} kept, 64 at most{more}"


PLACES = (("resident", "in memory"), ("swapped", "swapped out"), ("disk", "on disk"))


def _errors(look: Look) -> str:
    found = look.errors
    if not found:
        return "none since the daemon started"
    left = sum(count for _, _, count in found[MOST_ERRORS:])
    shown = ", ".join(f"{name} {code} {count}" for name, code, count in found[:MOST_ERRORS])
    return shown + f", {left} others" * bool(left)


def _processes(report: Report) -> Iterator[tuple[str, str]]:
    """Which processes serve the mount, since when, and where they log."""
    look, facts = report.look, _facts_of(report.daemon)
    words = [f"pid {report.daemon or (look.config.get('daemon_pid') if look else None) or 'unknown'}"]
    words += [facts["state"], f"{size(facts['rss_bytes'])} of RAM"] if facts else []
    if look:
        built, config = look.labels("build_info"), look.config
        since = max(0.0, time.time() - look.number("serving_since_seconds"))
        words += [f"version {built.get('version')}", f"serving for {age(since)}"]
        words += [f"the {built.get('loop')} loop answers", f"standby {config.get('standby')}"]
        count = int(look.number("restarts_total"))
        yield "restarts", f"{count}, the last one {age(since)} ago" if count else "none"
        yield "log", f"{config.get('log_to')}, level {config.get('log_level')}"
    yield "daemon", ", ".join(words)
    if report.keeper:
        keeper = _facts_of(report.keeper.pid)
        yield "keeper", f"pid {report.keeper.pid}, {keeper.get('state', 'unknown')}"
    elif look and look.config.get("keeper_pid"):
        yield "keeper", f"pid {look.config['keeper_pid']}"
    else:
        yield "keeper", "none, or another user's"


def _latencies(report: Report, *, is_watched: bool) -> list[str]:
    """The table of operations. The times are of the requests between two looks if it is watched."""
    rows = []
    for name, (one, now) in _operations(report).items():
        if is_watched and now and not now.requests:
            continue
        timed = now if is_watched and now else one
        rate = f"{now.requests / report.seconds:.0f}" if now and report.seconds else "-"
        bounds = (f"<{duration(timed.quantile(share))}" for share in (0.5, 0.99))
        rows.append((plain(name), rate, duration(timed.mean), *bounds, f"{one.requests:.0f}"))
    if not rows:
        return []
    span = "between two looks" if is_watched else "since the daemon started"
    lines = table(("OPERATION", "PER SECOND", "MEAN", "P50", "P99", "COUNT"), rows, LEFT)
    return ["", *lines, f"(times: {span}; P50 and P99 are upper bounds)"]


COMMANDS = (
    Command(
        "status",
        "Show a mount on one screen: budget, pages by place, rate and latency of operations, errors, restarts, daemon\n"
        "and keeper. Without MNT, show a line for each mount. What is wrong stands first, with the command that mends\n"
        "it. Rates include the requests of the command itself.\n\n"
        "exit status: 0 if all mounts answer; 1 if some do not; 2 if none does. Mounts that other users closed count\n"
        "only if you name them.",
        """\
examples:
  ttmfs status                    a line for each mount
  ttmfs status /mnt/ttm           one screen
  ttmfs status --watch=1 /mnt/ttm
  ttmfs status --json | jq '.[] | {mount, free_bytes, restarts}'""",
        _add,
        _run,
    ),
)
