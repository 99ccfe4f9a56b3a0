"""How long a client waits when the daemon is killed: from SIGKILL to the answer of a read, and the keeper's memory."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from machine import available
from plan import Plan
from report import Target, spread, table
from systems import InUnit, System, Ttmfs, Unavailable, checkouts, knows_option, mounted
from workloads import store

__all__ = ["report", "run", "targets"]

SPARE = 2 << 30  # bytes of memory that the benchmark leaves free
MEMORY = ("Rss", "Pss", "Private_Dirty")
STANDBY = ("standby=on", "standby=off")
STANDBY_SECONDS = 60.0
IN_UNIT = "in a unit"


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    """Milliseconds, one value a kill, by number of pages and by system. Systems take turns."""
    cases: dict[int, dict[str, list[float]]] = {}
    memory: dict[int, dict[str, dict[str, float]]] = {}
    for wanted in plan.recovery_pages:
        systems = _systems((wanted * System.page_size) + (64 << 20))
        pages = min(wanted, max(1, (available() - SPARE) // System.page_size // len(systems)))
        with mounted(directory, systems):
            cases[pages], memory[pages] = _kill_in_turns(plan, systems, pages)
    return {"kills": plan.kills, "wanted_pages": plan.recovery_pages, "milliseconds": cases, "keeper_mib": memory}


def _systems(size: int) -> list[Ttmfs]:
    """Each ttmfs, with and without a standby if it has that option, and in a unit of systemd if that runs."""
    found = []
    for system in checkouts(size):
        options = STANDBY if knows_option(system.checkout, "standby") else ("",)
        for option in options:
            name = f"{system.name} {option}".strip()
            found.append(Ttmfs(name, size, *option.split(), checkout=system.checkout))
            with contextlib.suppress(Unavailable):
                found.append(InUnit(f"{name} {IN_UNIT}", size, *option.split(), checkout=system.checkout))
    return found


def _kill_in_turns(
    plan: Plan, systems: list[Ttmfs], pages: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    took: dict[str, list[float]] = {system.name: [] for system in systems}
    opened = {}
    try:
        for system in systems:
            store(system.new("a"), pages, system.page_size)
            opened[system.name] = os.open(system.path / "a/1", os.O_RDONLY)
        for _ in range(plan.kills):
            for system in systems:
                time.sleep(plan.kill_pause_seconds)
                if "standby=on" in system.name:
                    _wait_for_standby(system.keeper)
                system.find_daemon()
                begin = time.perf_counter_ns()
                os.kill(system.pid, signal.SIGKILL)
                os.pread(opened[system.name], system.page_size, 0)
                took[system.name].append((time.perf_counter_ns() - begin) / 1e6)
    finally:
        for fd in opened.values():
            os.close(fd)
    return took, {system.name: _memory(system.keeper) for system in systems}


def _wait_for_standby(keeper: int) -> None:
    """Wait until a child of the keeper has the name of a standby that is ready."""
    children = Path(f"/proc/{keeper}/task/{keeper}/children")
    end = time.monotonic() + STANDBY_SECONDS
    while not any(Path(f"/proc/{pid}/comm").read_text() == "ttmfs-standby\n" for pid in children.read_text().split()):
        if time.monotonic() > end:
            raise TimeoutError(f"no standby was ready after {STANDBY_SECONDS:g} s")
        time.sleep(0.05)


def _memory(pid: int) -> dict[str, float]:
    """Memory of a process in MiB."""
    rows = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return {name: int(rows[name].split()[0]) / 1024 for name in MEMORY}


def targets(_: dict[str, Any]) -> list[Target]:
    return []


def report(found: dict[str, Any]) -> str:
    cases, memory = found["milliseconds"], found["keeper_mib"]
    names = next(iter(cases.values()))
    parts = [
        "From SIGKILL of the daemon to the answer of a read of an open page, ms: median (least to most) of\n"
        f"{found['kills']} kills. Systems take turns.",
        table(
            ("pages", *names),
            [[f"{int(pages):,}", *(spread(row[name], 0) for name in names)] for pages, row in cases.items()],
        ),
        f"The keeper's memory in MiB: {', '.join(MEMORY)}.",
        table(
            ("pages", *names),
            [
                [f"{int(pages):,}", *(", ".join(f"{mib:.1f}" for mib in row[name].values()) for name in names)]
                for pages, row in memory.items()
            ],
        ),
    ]
    if (most := max(found["wanted_pages"])) not in map(int, cases):
        parts.append(f"NOT MEASURED: {most:,} pages: this machine has memory for {max(map(int, cases)):,} a mount.")
    if not any(name.endswith(IN_UNIT) for name in names):
        parts.append("NOT MEASURED: in a unit of systemd, which does not run here.")
    return "\n\n".join(parts)
