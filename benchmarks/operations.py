"""Page operations side by side: latency, CPU time and round trips."""

import contextlib
import itertools
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from plan import Plan
from report import Target, ratio, spread, table
from systems import BINDFS, EXAMPLE, OFF, TTMFS, System, Ttmfs, mounted, side_by_side
from workloads import (
    OPERATIONS,
    UNKNOWN,
    Cost,
    Pages,
    check,
    check_requests,
    forget_names,
    know_names,
    measure,
)

__all__ = ["HELD", "figures", "report", "run", "targets"]

FILES = ("create+write+close", "open+read+close", "open+write+close", "unlink")
HELD = ("stat uncached", "pread", "pwrite")
STORING = ("create+write+close", "pwrite", "open+write+close")
OF_EXAMPLE = dict(zip(FILES, (0.15, 0.30, 0.15, 0.15), strict=True))
OF_OFF = dict.fromkeys(FILES, 0.45) | dict.fromkeys(HELD, 0.55)
CACHED = 1.0
"""If the daemon used fewer microseconds of CPU an operation, the kernel's page cache answered."""


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    """Every operation on every system, in turns. Figures are microseconds an operation, one value a round."""
    systems, missing = side_by_side(4 * plan.operations * os.sysconf("SC_PAGE_SIZE") + (64 << 20))
    costs: dict[str, dict[str, list[Cost]]] = {name: {system.name: [] for system in systems} for name in OPERATIONS}
    trips: dict[str, Counter[str]] = {name: Counter() for name in OPERATIONS}
    with mounted(directory, systems):
        homes = {system.name: system.new("a") for system in systems}
        for turn in range(plan.rounds + 1):  # the first one warms up and does not count
            pages = {system.name: Pages.of(homes[system.name], plan.operations, system.page_size) for system in systems}
            order = systems[turn % len(systems) :] + systems[: turn % len(systems)]
            for operation, system in itertools.product(OPERATIONS, order):
                its = pages[system.name]
                if operation == UNKNOWN:
                    forget_names()
                if operation in OF_EXAMPLE and operation != "create+write+close":
                    know_names(its)
                if operation in STORING:
                    its.content = os.urandom(its.size)
                with its.holding(plan.held) if operation in HELD else contextlib.nullcontext():
                    before = _requests(system)
                    cost = measure(system, operation, its)
                    seen = _requests(system)
                seen.subtract(before)
                if turn and isinstance(system, Ttmfs):
                    check_requests(operation, seen, plan.operations)
                if operation in STORING:
                    check(its, its.some(plan.held) if operation in HELD else its.paths)
                if turn:
                    costs[operation][system.name].append(cost)
                    if system.name == TTMFS:
                        trips[operation].update(seen)
    return {
        "pages": plan.operations,
        "held": plan.held,
        "missing": missing,
        "systems": [system.name for system in systems],
        "microseconds": figures(costs, "latency"),
        "daemon_cpu_microseconds": figures(costs, "daemon"),
        "client_cpu_microseconds": figures(costs, "client"),
        "cached": {
            name: [other for other, its in row.items() if other in (EXAMPLE, BINDFS) and _not_asked(its)]
            for name, row in costs.items()
        },
        "requests": {
            name: {
                kind: round(count / plan.rounds / plan.operations, 2) for kind, count in sorted(found.items()) if count
            }
            for name, found in trips.items()
        },
    }


def _not_asked(costs: list[Cost]) -> bool:
    """Whether the kernel answered from its page cache. (For ttmfs, ``.stats`` has already shown that it did not.)"""
    return statistics.median(cost.daemon for cost in costs) < CACHED


def _requests(system: System) -> Counter[str]:
    return system.requests() if isinstance(system, Ttmfs) else Counter()


def figures(costs: dict[str, dict[str, list[Cost]]], what: str) -> dict[str, dict[str, list[float]]]:
    """The cost of each operation on each system, one value a round: one of the fields of Cost."""
    return {
        operation: {name: [round(getattr(cost, what), 3) for cost in its] for name, its in row.items()}
        for operation, row in costs.items()
    }


def targets(found: dict[str, Any]) -> list[Target]:
    def one(operation: str, other: str, bound: float) -> Target:
        row = found["microseconds"][operation]
        return Target(f"{operation} / {other}", ratio(row.get(TTMFS), row.get(other)), bound)

    return [
        *(one(operation, EXAMPLE, bound) for operation, bound in OF_EXAMPLE.items()),
        *(one(operation, OFF, bound) for operation, bound in OF_OFF.items()),
        *(one(operation, BINDFS, 1.0) for operation in OF_OFF),
    ]


def report(found: dict[str, Any]) -> str:
    names = found["systems"]
    latency, trips = found["microseconds"], found["requests"]

    def middle(whose: str, operation: str, name: str) -> float:
        return float(statistics.median(found[f"{whose}_cpu_microseconds"][operation][name]))

    def cell(text: str, operation: str, name: str) -> str:
        return text if name not in found["cached"][operation] else f"{text} *"

    others = [name for name in names if name != TTMFS]
    parts = [
        f"Page operations, microseconds each: median (least to most) of the rounds; {found['pages']} pages a round,\n"
        f"{found['held']} of them open for stat, pread and pwrite. One client; systems take turns. Names were looked\n"
        "up right before. Unknown names: after `echo 2 > /proc/sys/vm/drop_caches`. ttmfs lets the kernel keep names\n"
        "for 1 s, tmpfs.py for 300 s, and a tmpfs keeps them itself.",
        table(
            ("operation", *names),
            [[op, *(cell(spread(latency[op][n]), op, n) for n in names)] for op in OPERATIONS],
        ),
        "The time of ttmfs relative to each other system (median of the rounds' ratios).",
        table(
            ("operation", *others),
            [
                [op, *(cell(f"{ratio(latency[op][TTMFS], latency[op][n]):.2f}", op, n) for n in others)]
                for op in OPERATIONS
            ],
        ),
        "CPU time an operation in microseconds, medians: daemon + client. Polling trades CPU time for latency.",
        table(
            ("operation", *names),
            [
                [op, *(f"{middle('daemon', op, name):.1f} + {middle('client', op, name):.1f}" for name in names)]
                for op in OPERATIONS
            ],
        ),
        "Round trips a page of ttmfs, counted by .stats (no close waits for its release).",
        table(
            ("operation", "together", "requests"),
            [
                [op, f"{sum(trips[op].values()):.2f}", ", ".join(f"{k} {c:g}" for k, c in trips[op].items())]
                for op in trips
            ],
        ),
    ]
    if any(found["cached"].values()):
        parts.insert(2, "*: the kernel's page cache answered, not the daemon. Do not compare these.")
    parts += [f"NOT MEASURED: {name}: {why}" for name, why in found["missing"].items()]
    return "\n\n".join(parts)
