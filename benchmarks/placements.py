"""Which CPUs the client and the daemons of a measurement run on."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from systems import System, mounted

__all__ = ["ONE_CPU", "TWO_CPUS", "UNPINNED", "Placement", "mounted_at", "placements"]

ONE_CPU, TWO_CPUS, UNPINNED = "one CPU", "two CPUs", "unpinned"


@dataclass(frozen=True)
class Placement:
    """The CPUs that the client, and each daemon, may run on."""

    client: set[int]
    daemon: set[int]


def placements() -> dict[str, Placement]:
    """Both on one CPU; each on a CPU of its own, if there are two; and unpinned."""
    every = os.sched_getaffinity(0)
    first, *others = sorted(every)
    found = {ONE_CPU: Placement({first}, {first})}
    if others:
        found[TWO_CPUS] = Placement({first}, {others[0]})
    return found | {UNPINNED: Placement(every, every)}


@contextlib.contextmanager
def mounted_at(place: Placement, directory: Path, systems: Sequence[System]) -> Iterator[None]:
    """Mount systems, with the daemons and this process on their CPUs, as taskset(1) does it."""
    with contextlib.ExitStack() as stack:
        with _on(place.daemon):  # daemons inherit it
            stack.enter_context(mounted(directory, systems))
        stack.enter_context(_on(place.client))
        yield


@contextlib.contextmanager
def _on(cpus: set[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
