"""Page operations on resident pages while swap is in use, beside the same without swap."""

import contextlib
import itertools
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import meminfo
from operations import HELD, KNOWN, STORING
from plan import Plan
from report import Target as Target
from report import ratio, spread, table
from systems import TMPFS, System, Tmpfs, Unavailable, checkouts, mounted, wait_until
from workloads import OPERATIONS, Pages, know_names, measure, pages_of

__all__ = ["report", "run", "targets"]

ZRAM = Path("/sys/class/zram-control")
SWAP_BYTES, SWAPPED_BYTES = 256 << 20, 16 << 20
MADV_PAGEOUT = 21
NOTICED_SECONDS = 0.1  # a daemon may ask the kernel less often
WITHOUT, WITH = "without swap", "swap in use"


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    """Microseconds an operation, one value a round, by operation, system, and whether swap is in use."""
    size = 4 * plan.operations * System.page_size + (64 << 20)
    systems: list[System] = [*checkouts(size), Tmpfs(TMPFS, size)]
    found: dict[str, Any] = {kind: {system.name: {WITHOUT: [], WITH: []} for system in systems} for kind in OPERATIONS}
    try:
        with _zram() as device, mounted(directory, systems):
            homes = {system.name: system.new("a") for system in systems}
            for turn in range(plan.rounds + 1):
                for state in (WITHOUT, WITH) if turn % 2 else (WITH, WITHOUT):
                    with _swap_in_use(device) if state == WITH else contextlib.nullcontext():
                        _check_swap(state)
                        pages = {s.name: pages_of(s, homes[s.name], plan.operations) for s in systems}
                        for kind, system in itertools.product(OPERATIONS, systems):
                            took = _once(plan, system, kind, pages[system.name])
                            if turn:
                                found[kind][system.name][state].append(took)
                        _check_swap(state)
    except Unavailable as error:
        return {"missing": {"swap": str(error)}, "microseconds": {}}
    return {"missing": {}, "microseconds": found}


def _once(plan: Plan, system: System, kind: str, pages: Pages) -> float:
    if kind in KNOWN:
        know_names(pages)
    if kind in STORING:
        pages.content = os.urandom(pages.size)
    with pages.holding(plan.held) if kind in HELD else contextlib.nullcontext():
        return measure(system, kind, pages).latency


@contextlib.contextmanager
def _zram() -> Iterator[str]:
    """A new zram device that is ready for swapon(8)."""
    if not ZRAM.is_dir():
        raise Unavailable("the kernel has no zram: modprobe zram")
    number = (ZRAM / "hot_add").read_text().strip()

    def removed() -> bool:
        with contextlib.suppress(OSError):  # another process has it open
            (ZRAM / "hot_remove").write_text(number)
        return not Path(f"/sys/block/zram{number}").exists()

    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(SWAP_BYTES))
        subprocess.run(["mkswap", f"/dev/zram{number}"], check=True, capture_output=True)
        yield f"/dev/zram{number}"
    finally:
        wait_until(removed, "zram to go")


@contextlib.contextmanager
def _swap_in_use(device: str) -> Iterator[None]:
    """Swap to a device, and have the kernel swap out some memory of this process, which nobody uses."""
    subprocess.run(["swapon", "-p", "32000", device], check=True)
    try:
        with mmap.mmap(-1, SWAPPED_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as unused:
            for start in range(0, SWAPPED_BYTES, mmap.PAGESIZE):
                unused[start] = 1
            unused.madvise(MADV_PAGEOUT)
            time.sleep(NOTICED_SECONDS)
            yield
    finally:
        subprocess.run(["swapoff", device], check=True)
        time.sleep(NOTICED_SECONDS)


def _check_swap(state: str) -> None:
    now = meminfo()
    used = now["SwapTotal"] - now["SwapFree"]
    if state == WITHOUT and used:
        raise Unavailable(f"this machine already has {used >> 20} MiB in swap: swapoff -a")
    if state == WITH and not used:
        raise Unavailable("the kernel swapped nothing out")


def targets(_: dict[str, Any]) -> list[Target]:
    """Return no targets: the ratio shows whether swap costs anything."""
    return []


def report(found: dict[str, Any]) -> str:
    parts = [f"NOT MEASURED: {name}: {why}" for name, why in found["missing"].items()]
    if not found["microseconds"]:
        return "\n\n".join(parts)
    names = next(iter(found["microseconds"].values()))
    return "\n\n".join(
        (
            "Page operations, microseconds each, on pages that are all resident: without swap, and while other memory\n"
            "is in swap (zram): median (least to most) of the rounds, in turns. In brackets: swap in use / without.",
            table(
                ("operation", *(f"{name}: {state}" for name in names for state in (WITHOUT, WITH))),
                [
                    [kind, *(text for its in row.values() for text in _cells(its))]
                    for kind, row in found["microseconds"].items()
                ],
            ),
        )
    )


def _cells(its: dict[str, list[float]]) -> tuple[str, str]:
    return spread(its[WITHOUT]), f"{spread(its[WITH])} [{ratio(its[WITH], its[WITHOUT]):.2f}]"
