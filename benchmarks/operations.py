"""Page operations side by side: latency, CPU time and round trips, by the CPUs of client and daemon."""

import contextlib
import itertools
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from placements import UNPINNED, mounted_at, placements
from plan import Plan
from report import Target, ratio, spread, table
from systems import (
    BINDFS,
    EXAMPLE,
    MEMFS,
    OFF,
    OTHER,
    PASSTHROUGH,
    TMPFS,
    TTMFS,
    System,
    Ttmfs,
    side_by_side,
)
from workloads import (
    OPERATIONS,
    Cost,
    Pages,
    check,
    check_requests,
    know_names,
    measure,
    pages_of,
)

__all__ = ["HELD", "KNOWN", "STORING", "report", "run", "targets"]

FILES = ("create+write+close", "open+read+close", "open+write+close", "unlink")
HELD = ("stat uncached", "pread", "pwrite")
STORING = ("create+write+close", "pwrite", "open+write+close")
KNOWN = ("open+read+close", "open+write+close", "unlink")
"""Operations by names that were looked up right before."""

PINNED = (TTMFS, OTHER, MEMFS, PASSTHROUGH, BINDFS, TMPFS)
EVERY = (TTMFS, OFF, OTHER, EXAMPLE, MEMFS, PASSTHROUGH, BINDFS, TMPFS)
BARS: dict[str, dict[str, float]] = {
    OFF: dict.fromkeys(FILES, 0.45) | dict.fromkeys(HELD, 0.55),
    EXAMPLE: dict(zip(FILES, (0.15, 0.30, 0.15, 0.15), strict=True)),
    MEMFS: dict(zip(FILES, (0.85, 0.70, 0.70, 0.85), strict=True)) | dict.fromkeys(HELD, 1.25),
    BINDFS: dict(zip(FILES, (0.85, 1.00, 1.00, 0.85), strict=True)) | dict.fromkeys(HELD, 1.10),
}
"""The most time of ttmfs relative to another system, by operation."""

CACHED = 0.5
"""If the daemon used fewer microseconds of CPU an operation, the kernel answered, without the daemon."""


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    """Every operation on every system, in turns, for each placement."""
    size = 4 * plan.operations * System.page_size + (64 << 20)
    found: dict[str, Any] = {"pages": plan.operations, "held": plan.held, "missing": {}, "placements": {}}
    for name, place in placements().items():
        systems, missing = side_by_side(size, EVERY if name == UNPINNED else PINNED)
        with mounted_at(place, directory, systems):
            found["placements"][name] = _take_turns(plan, systems)
        found["missing"] |= missing
    return found


def _take_turns(plan: Plan, systems: list[System]) -> dict[str, Any]:
    """Figures are microseconds an operation, one value a round."""
    costs: dict[str, dict[str, list[Cost]]] = {name: {system.name: [] for system in systems} for name in OPERATIONS}
    trips: dict[str, Counter[str]] = {name: Counter() for name in OPERATIONS}
    homes = {system.name: system.new("a") for system in systems}
    for turn in range(plan.rounds + 1):  # the first one warms up and does not count
        pages = {system.name: pages_of(system, homes[system.name], plan.operations) for system in systems}
        order = systems[turn % len(systems) :] + systems[: turn % len(systems)]
        for operation, system in itertools.product(OPERATIONS, order):
            try:
                cost, seen = _once(plan, system, operation, pages[system.name])
            except FileNotFoundError as error:  # when the kernel forgets a name, memfs_ll removes the file
                hint = "; a drop_caches or a lack of memory does this: run again" if system.name == MEMFS else ""
                raise RuntimeError(f"{system.name} lost {error.filename}{hint}") from error
            if not turn:
                continue
            costs[operation][system.name].append(cost)
            if isinstance(system, Ttmfs):
                check_requests(operation, seen, plan.operations)
            if system.name == TTMFS:
                trips[operation].update(seen)
    return {
        "systems": [system.name for system in systems],
        "microseconds": _figures(costs, "latency"),
        "daemon_cpu_microseconds": _figures(costs, "daemon"),
        "client_cpu_microseconds": _figures(costs, "client"),
        "cached": {
            name: [other for other, its in row.items() if other not in (TTMFS, OFF, OTHER, TMPFS) and _not_asked(its)]
            for name, row in costs.items()
        },
        "requests": {
            name: {
                kind: round(count / plan.rounds / plan.operations, 2) for kind, count in sorted(found.items()) if count
            }
            for name, found in trips.items()
        },
    }


def _once(plan: Plan, system: System, operation: str, pages: Pages) -> tuple[Cost, Counter[str]]:
    """The cost of an operation to each page, and the requests that a ttmfs saw."""
    if operation in KNOWN:
        know_names(pages)
    if operation in STORING:
        pages.content = os.urandom(pages.size)
    with pages.holding(plan.held) if operation in HELD else contextlib.nullcontext():
        before = _requests(system)
        cost = measure(system, operation, pages)
        seen = _requests(system)
    seen.subtract(before)
    if operation in STORING:
        check(pages, pages.some(plan.held) if operation in HELD else pages.paths)
    return cost, seen


def _not_asked(costs: list[Cost]) -> bool:
    """Whether the kernel answered. (For ttmfs, ``.stats`` has already shown that it did not.)"""
    return statistics.median(cost.daemon for cost in costs) < CACHED


def _requests(system: System) -> Counter[str]:
    return system.requests() if isinstance(system, Ttmfs) else Counter()


def _figures(costs: dict[str, dict[str, list[Cost]]], what: str) -> dict[str, dict[str, list[float]]]:
    """The cost of each operation on each system, one value a round: one of the fields of Cost."""
    return {
        operation: {name: [round(getattr(cost, what), 3) for cost in its] for name, its in row.items()}
        for operation, row in costs.items()
    }


def targets(found: dict[str, Any]) -> list[Target]:
    def one(place: str, operation: str, other: str, bound: float) -> Target:
        row = found["placements"][place]["microseconds"][operation]
        cached = other in found["placements"][place]["cached"][operation]
        measured = None if cached else ratio(row.get(TTMFS), row.get(other))
        return Target(f"{operation} / {other}", measured, bound, note=place)

    return [
        one(place, operation, other, bound)
        for place in found["placements"]
        for other, bars in BARS.items()
        if other in PINNED or place == UNPINNED
        for operation, bound in bars.items()
    ]


def report(found: dict[str, Any]) -> str:
    parts = [
        f"Page operations, microseconds each: median (least to most) of the rounds; {found['pages']} pages a round,\n"
        f"{found['held']} of them open for stat, pread and pwrite. One client; systems take turns. Names were looked\n"
        f"up right before. In {MEMFS}, files are opened with O_DIRECT, because its page cache would answer reads.\n"
        "*: the kernel answered, not the daemon (page cache, or passthrough)."
    ]
    for place, its in found["placements"].items():
        parts += _tables(f"Client and daemon on {place}." if place != UNPINNED else "Client and daemon unpinned.", its)
    trips = found["placements"][UNPINNED]["requests"]
    parts += [
        "Round trips a page of ttmfs, counted by .stats (no close waits for its release).",
        table(
            ("operation", "together", "requests"),
            [
                [op, f"{sum(trips[op].values()):.2f}", ", ".join(f"{k} {c:g}" for k, c in trips[op].items())]
                for op in trips
            ],
        ),
    ]
    parts += [f"NOT MEASURED: {name}: {why}" for name, why in found["missing"].items()]
    return "\n\n".join(parts)


def _tables(title: str, its: dict[str, Any]) -> list[str]:
    """The tables of one placement."""
    names, latency = its["systems"], its["microseconds"]
    others = [name for name in names if name != TTMFS]

    def middle(whose: str, operation: str, name: str) -> float:
        return float(statistics.median(its[f"{whose}_cpu_microseconds"][operation][name]))

    def cell(text: str, operation: str, name: str) -> str:
        return text if name not in its["cached"][operation] else f"{text} *"

    def relative(operation: str, name: str) -> str:
        bar = BARS.get(name, {}).get(operation)
        text = f"{ratio(latency[operation][TTMFS], latency[operation][name]):.2f}"
        return cell(text if bar is None else f"{text} ({bar:g})", operation, name)

    return [
        title,
        table(
            ("operation", *names),
            [[op, *(cell(spread(latency[op][n]), op, n) for n in names)] for op in OPERATIONS],
        ),
        f"{title} The time of ttmfs relative to each other system (median of the rounds' ratios). In brackets: the\n"
        "most that the project wants.",
        table(("operation", *others), [[op, *(relative(op, n) for n in others)] for op in OPERATIONS]),
        f"{title} CPU time an operation in microseconds, medians: daemon + client.",
        table(
            ("operation", *names),
            [
                [op, *(f"{middle('daemon', op, name):.1f} + {middle('client', op, name):.1f}" for name in names)]
                for op in OPERATIONS
            ],
        ),
    ]
