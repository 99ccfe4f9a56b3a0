"""The CPU time of an idle daemon: right after a burst of operations, and over a longer time."""

import os
import statistics
import time
from pathlib import Path
from typing import Any

from plan import Plan
from report import Target, spread, table
from systems import OFF, OTHER, TTMFS, System, mounted, side_by_side
from workloads import store

__all__ = ["report", "run", "targets"]

BURST = 500  # operations
LOOKS = (0.001, 0.002, 0.005, 0.0095)  # seconds after the burst
LATEST = 0.010
WATCH_SECONDS = 0.1
TRIES = 20


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    systems, _ = side_by_side(64 << 20, (TTMFS, OFF, OTHER))
    after: dict[str, list[list[float]]] = {system.name: [] for system in systems}
    with mounted(directory, systems):
        pages = {}
        for system in systems:
            store(system.new("a"), 1, system.page_size)
            pages[system.name] = os.open(system.path / "a/1", os.O_RDONLY)
        try:
            for turn in range(plan.rounds + 1):
                for system in systems:
                    used = _after_burst(system, pages[system.name])
                    if turn:
                        after[system.name].append(used)
        finally:
            for fd in pages.values():
                os.close(fd)
        time.sleep(WATCH_SECONDS)  # closing them was a burst, too
        before = {system.name: _ticks(system) for system in systems}
        time.sleep(plan.idle_seconds)
        ticks = {system.name: _ticks(system) - before[system.name] for system in systems}
    return {"seconds": plan.idle_seconds, "ticks": ticks, "looks_seconds": [0, *LOOKS, WATCH_SECONDS], "after": after}


def _after_burst(system: System, page: int) -> list[float]:
    """The CPU time of the daemon in microseconds since the last answer of a burst: at each of LOOKS, and at the end.

    If the last of LOOKS comes later than 10 ms after the burst, the burst is repeated.
    """
    for _ in range(TRIES):
        for _ in range(BURST):
            os.pread(page, system.page_size, 0)
        begin = time.perf_counter()
        base = system.cpu()
        used = [0.0]
        for look in LOOKS:
            time.sleep(max(0.0, begin + look - time.perf_counter()))
            used.append((system.cpu() - base) / 1000)
        if time.perf_counter() - begin > LATEST:
            continue
        time.sleep(WATCH_SECONDS)
        used.append((system.cpu() - base) / 1000)
        return used
    raise TimeoutError(f"the machine was too busy to look at the daemon within 10 ms of a burst, {TRIES} times")


def _ticks(system: System) -> int:
    """utime + stime of /proc/PID/stat."""
    fields = Path(f"/proc/{system.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _late(found: dict[str, Any], name: str) -> list[float]:
    """CPU time used later than 10 ms after the burst."""
    return [used[-1] - used[-2] for used in found["after"][name]]


def targets(found: dict[str, Any]) -> list[Target]:
    seconds = found["seconds"]
    late = statistics.median(_late(found, TTMFS))
    return [
        Target("CPU ticks while idle", found["ticks"][TTMFS], 0, unit="ticks", note=f"in {seconds:g} s"),
        Target("CPU time later than 10 ms after a burst", late, 0, unit="us", note=f"in {WATCH_SECONDS * 1000:g} ms"),
    ]


def report(found: dict[str, Any]) -> str:
    head = ["", *(f"until {1000 * look:g} ms" for look in found["looks_seconds"][1:]), "later than 10 ms"]
    rows = [
        [
            name,
            *(spread([used[n] for used in after], 0) for n in range(1, len(head) - 1)),
            spread(_late(found, name), 0),
        ]
        for name, after in found["after"].items()
    ]
    ticks = "; ".join(f"{name} {count}" for name, count in found["ticks"].items())
    return "\n\n".join(
        (
            f"CPU time of the daemon in microseconds, after the last answer of a burst of {BURST} preads.",
            table(head, rows),
            f"CPU ticks (utime + stime) of the idle daemon in {found['seconds']:g} s: {ticks}.",
        )
    )
