"""The time of pyfuse3 and the kernel with nothing behind them (``null.py``), and their part of ttmfs' time."""

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

from bandwidth import WAYS
from operations import HELD, figures
from plan import Plan
from report import Target, ratio, spread, table
from systems import BINDFS, NULL, TMPFS, TTMFS, System, mounted, side_by_side
from workloads import (
    OPERATIONS,
    REQUEST_BYTES,
    UNKNOWN,
    Cost,
    Pages,
    buffer,
    know_names,
    measure,
    pause,
    transfer,
    write_image,
)

__all__ = ["report", "run", "targets"]

CREATE = "create+write+close"


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    """Microseconds an operation, and MiB/s of requests of 1 MiB, one value a round. Systems take turns."""
    size = 4 * plan.operations * os.sysconf("SC_PAGE_SIZE") + 2 * plan.bulk_bytes + (64 << 20)
    systems, missing = side_by_side(size, (NULL, TTMFS, BINDFS, TMPFS))
    with mounted(directory, systems):
        homes = {system.name: system.new("a") for system in systems}
        costs = _operations(plan, systems, homes)
        speeds = _transfers(plan, homes)  # last: after this work, client and daemon run on different CPUs for a while
    return {
        "systems": list(homes),
        "missing": missing,
        "microseconds": figures(costs, "latency"),
        "mib_per_second": speeds,
    }


def _operations(plan: Plan, systems: list[System], homes: dict[str, Path]) -> dict[str, dict[str, list[Cost]]]:
    kinds = [name for name in OPERATIONS if name != UNKNOWN]
    costs: dict[str, dict[str, list[Cost]]] = {kind: {name: [] for name in homes} for kind in kinds}
    for turn in range(plan.rounds + 1):
        order = systems[turn % len(systems) :] + systems[: turn % len(systems)]
        pages = {system.name: Pages.of(homes[system.name], plan.operations, system.page_size) for system in systems}
        for kind, system in itertools.product(kinds, order):
            its = pages[system.name]
            if kind == CREATE:
                its.content = os.urandom(its.size)
            else:
                know_names(its)
            with its.holding(plan.held) if kind in HELD else contextlib.nullcontext():
                cost = measure(system, kind, its)
            if turn:
                costs[kind][system.name].append(cost)
    return costs


def _transfers(plan: Plan, homes: dict[str, Path]) -> dict[str, dict[str, list[float]]]:
    names, request = list(homes), buffer(REQUEST_BYTES)
    speeds: dict[str, dict[str, list[float]]] = {way: {name: [] for name in names} for way in WAYS}
    with contextlib.ExitStack() as stack:
        files = {}
        for name, home in homes.items():
            has_image = name in (TTMFS, NULL)
            path, flags = home / (".image" if has_image else "file"), os.O_RDWR | (0 if has_image else os.O_CREAT)
            files[name] = os.open(path, flags)
            stack.callback(os.close, files[name])
            write_image(files[name], plan.bulk_bytes, request)
        for turn in range(plan.rounds + 1):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            for (way, act), name in itertools.product(WAYS.items(), order):
                pause()
                speed = plan.bulk_bytes / (1 << 20) / transfer(act, files[name], plan.bulk_bytes, request)
                if turn:
                    speeds[way][name].append(speed)
    return speeds


def targets(_: dict[str, Any]) -> list[Target]:
    """Return no targets: these figures only help to understand the other groups."""
    return []


def report(found: dict[str, Any]) -> str:
    names, latency, speeds = found["systems"], found["microseconds"], found["mib_per_second"]

    def rows(figures: dict[str, dict[str, list[float]]], digits: int) -> list[list[str]]:
        return [
            [what, *(f"{spread(row[name], digits)} [{ratio(row[name], row[NULL]):.2f}]" for name in names)]
            for what, row in figures.items()
        ]

    parts = [
        "null.py is pyfuse3 with prepared answers: all time that is not the filesystem's.\n"
        "Microseconds an operation. In brackets: the ratio to null.py.",
        table(("operation", *names), rows(latency, 1)),
        "Requests of 1 MiB over existing pages, MiB/s. null.py copies written data twice and read data once.",
        table(("", *names), rows(speeds, 0)),
    ]
    parts += [f"NOT MEASURED: {name}: {why}" for name, why in found["missing"].items()]
    return "\n\n".join(parts)
