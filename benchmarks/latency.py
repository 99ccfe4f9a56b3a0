"""Latency of a page operation against the number of pages and of backups."""

import contextlib
import itertools
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from listing import make_files
from plan import FULL, Plan
from report import Target, ratios, spread, table
from systems import BINDFS, EXAMPLE, TMPFS, TTMFS, System, Ttmfs, mounted, side_by_side
from workloads import Pages, measure, store

__all__ = ["report", "run", "targets"]

KINDS = ("open+read+close", "pread", "pwrite", "create+write+close", "unlink")
NEW = ("create+write+close", "unlink")
HELD = ("pread", "pwrite")
TOLERANCE = 0.20


@dataclass(frozen=True)
class Point:
    """One number of pages or backups: its existing pages, and pages that do not exist yet."""

    system: System
    old: Pages
    new: Pages

    @classmethod
    def of(cls, system: System, old: list[str], new: list[str]) -> Self:
        pages = (Pages(paths, system.page_size, os.urandom(system.page_size)) for paths in (old, new))
        return cls(system, *pages)


Points = dict[int, Point]
Figures = dict[str, dict[str, dict[int, list[float]]]]


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    """Microseconds an operation, one value a round, by operation, system and number."""
    size = 2 * sum(plan.page_counts) * System.page_size + (256 << 20)
    systems, missing = side_by_side(size, (TTMFS, EXAMPLE, BINDFS, TMPFS))
    mounts = {count: Ttmfs(TTMFS, size) for count in plan.backup_counts}
    with mounted(directory, [*systems, *mounts.values()]):
        by_pages = {system.name: _by_pages(plan, system) for system in systems}
        by_backups = {TTMFS: {count: _with_backups(plan, system, count) for count, system in mounts.items()}}
        return {
            "operations": plan.latency_operations,
            "missing": missing,
            "pages": _rounds(plan, by_pages),
            "backups": _rounds(plan, by_backups),
        }


def _by_pages(plan: Plan, system: System) -> Points:
    """A directory for each number of pages, in one mount."""
    most = {EXAMPLE: plan.example_pages, BINDFS: plan.bindfs_pages}.get(system.name, max(plan.page_counts))
    points = {}
    for count in plan.page_counts:
        if count <= most:
            home = system.new(f"p{count}")
            if isinstance(system, Ttmfs):
                store(home, count, system.page_size)
            else:
                make_files(home, count, system.page_size)
            old = [f"{home}/{n * count // plan.latency_operations + 1}" for n in range(plan.latency_operations)]
            points[count] = Point.of(system, old, [f"{home}/{count + 1 + n}" for n in range(plan.latency_operations)])
    return points


def _with_backups(plan: Plan, system: System, count: int) -> Point:
    """`count` backups in a mount of its own. Operations are spread over as many backups as possible."""
    homes = [system.new(f"b{number}") for number in range(count)]
    each = -(-plan.latency_operations // count)
    for home in homes:
        store(home, each, system.page_size)
    used = [homes[n * count // plan.latency_operations] for n in range(plan.latency_operations)]
    old = [f"{home}/{n % each + 1}" for n, home in enumerate(used)]
    return Point.of(system, old, [f"{home}/{each + 1 + n}" for n, home in enumerate(used)])


def _rounds(plan: Plan, points: dict[str, Points]) -> Figures:
    found: Figures = {kind: {name: {count: [] for count in its} for name, its in points.items()} for kind in KINDS}
    for turn in range(plan.rounds + 1):
        for name, its in points.items():
            counts = [*its]
            for kind, count in itertools.product(KINDS, counts[turn % len(counts) :] + counts[: turn % len(counts)]):
                point = its[count]
                pages = point.new if kind in NEW else point.old
                with pages.holding(plan.held) if kind in HELD else contextlib.nullcontext():
                    _know_names(pages, kind)
                    took = measure(point.system, kind, pages).latency
                if turn:
                    found[kind][name][count].append(took)
    return found


def _know_names(pages: Pages, kind: str) -> None:
    """Have the kernel look up every name on the path, so that each number of pages causes the same requests."""
    if kind not in HELD:
        for path in {os.path.dirname(path) for path in pages.paths} if kind in NEW else pages.paths:
            os.stat(path)


def _worst(by_count: dict[int, list[float]]) -> float:
    """The ratio to the smallest number that is furthest from 1."""
    first, *others = by_count.values()
    return max((statistics.median(ratios(values, first)) for values in others), key=lambda value: abs(value - 1))


def targets(found: dict[str, Any]) -> list[Target]:
    wanted = {"pages": max(FULL.page_counts), "backups": max(FULL.backup_counts)}
    targets = []
    for what, most in wanted.items():
        for kind, by_name in found[what].items():
            counts = by_name[TTMFS]
            largest = max(map(int, counts))
            note = f"1 to {largest:,} {what}" + ("" if largest == most else f", not {most:,}")
            targets.append(
                Target(f"{kind}, difference from the least number", abs(_worst(counts) - 1), TOLERANCE, note=note)
            )
    return targets


def report(found: dict[str, Any]) -> str:
    parts = [
        f"Latency against the number of pages or backups, microseconds: median (least to most) of the rounds of\n"
        f"{found['operations']} operations, spread evenly over all pages (and backups). Numbers take turns.\n"
        "Every name on the path is looked up right before, so that each number causes the same requests."
    ]
    for what in "pages", "backups":
        for name in next(iter(found[what].values())):
            rows = {kind: by_name[name] for kind, by_name in found[what].items()}
            counts = next(iter(rows.values()))
            head = (f"{name}: {what}", *(f"{int(count):,}" for count in counts))
            parts.append(table(head, [[kind, *map(spread, by_count.values())] for kind, by_count in rows.items()]))
    parts += [f"NOT MEASURED: {name}: {why}" for name, why in found["missing"].items()]
    parts.append(f"{EXAMPLE} and {BINDFS} get fewer pages, because filling them takes too long.")
    return "\n\n".join(parts)
