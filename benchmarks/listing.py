"""Listing many pages and dropping all of them, beside a tmpfs directory with as many page files."""

import os
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from plan import FULL, Plan
from processes import together
from report import Target, ratio, spread, table
from systems import TMPFS, TTMFS, System, Tmpfs, Ttmfs, checkouts, mounted
from workloads import Pages, create, pause, store

__all__ = ["make_files", "report", "run", "targets"]

ROUNDS = 5  # at most, because each round makes a million files
WARM_UP_PAGES = 100
COLD, WARM, DROP = "cold", "warm", "drop"


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    """Microseconds an entry of each round. Each round makes all pages again: the kernel knows none of their names."""
    size = plan.many_pages * System.page_size + (256 << 20)
    systems = [*checkouts(size), Tmpfs(TMPFS, size)]
    found: dict[str, dict[str, list[float]]] = {step: {s.name: [] for s in systems} for step in (COLD, WARM, DROP)}
    with mounted(directory, systems):
        for turn in range(min(plan.rounds, ROUNDS) + 1):
            for system in systems:
                if turn:
                    for step, nanoseconds in _round(system, plan.many_pages).items():
                        found[step][system.name].append(nanoseconds / plan.many_pages / 1000)
                else:
                    _round(system, WARM_UP_PAGES)
    return {"pages": plan.many_pages, "microseconds_an_entry": found}


def _round(system: System, pages: int) -> dict[str, int]:
    """Nanoseconds of each step, with new pages."""
    home = system.new("a")
    if isinstance(system, Ttmfs):
        store(home, pages, system.page_size)
        drop = ["truncate", "-s", "0", str(home / ".image")]
    else:
        make_files(home, pages, system.page_size)
        drop = ["rm", "-r", str(home)]
    pause()
    took = {COLD: _list(home, pages), WARM: _list(home, pages)}
    start = time.perf_counter_ns()
    subprocess.run(drop, check=True)
    took[DROP] = time.perf_counter_ns() - start
    if isinstance(system, Ttmfs):
        home.rmdir()  # fails if a page is left
    return took


def make_files(directory: Path, count: int, size: int) -> None:
    """Make page files, with one process for each CPU."""
    workers = len(os.sched_getaffinity(0))
    together([partial(_make, directory, range(1 + n, count + 1, workers), size) for n in range(workers)])


def _make(directory: Path, handles: range, size: int) -> dict[str, Any]:
    create(Pages([f"{directory}/{handle}" for handle in handles], size, os.urandom(size)))
    return {}


def _list(directory: Path, count: int) -> int:
    """Nanoseconds to read all names."""
    start = time.perf_counter_ns()
    with os.scandir(directory) as entries:
        listed = sum(1 for _ in entries)
    elapsed = time.perf_counter_ns() - start
    if listed != count:
        raise RuntimeError(f"{directory} lists {listed} pages, not {count}")
    return elapsed


def targets(found: dict[str, Any]) -> list[Target]:
    took, pages = found["microseconds_an_entry"], found["pages"]
    note = f"{pages:,} pages" + ("" if pages == FULL.many_pages else f", not {FULL.many_pages:,}")
    return [
        Target("listing, an entry, cold", statistics.median(took[COLD][TTMFS]), 3.0, unit="us", note=note),
        Target("listing, an entry, warm", statistics.median(took[WARM][TTMFS]), 1.5, unit="us", note=note),
        Target("truncate -s 0 .image / rm -r of a tmpfs directory", ratio(took[DROP][TTMFS], took[DROP][TMPFS]), 0.1,
               note=note),
    ]  # fmt: skip


def report(found: dict[str, Any]) -> str:
    took = found["microseconds_an_entry"]
    names = {COLD: "listing, names not known yet", WARM: "listing again", DROP: "truncate -s 0 .image; rm -r"}
    return "\n\n".join(
        (
            f"{found['pages']:,} pages in a directory, microseconds an entry: median (least to most) of "
            f"{len(took[COLD][TTMFS])} rounds.\n"
            "Listing is os.scandir, names only. Its loop in Python is a part of the time. Systems take turns.\n"
            "In brackets: the ratio to ttmfs.",
            table(
                ("", *took[COLD]),
                [
                    [text, *(f"{spread(row, 3)} [{ratio(row, took[step][TTMFS]):.2f}]" for row in took[step].values())]
                    for step, text in names.items()
                ],
            ),
        )
    )
