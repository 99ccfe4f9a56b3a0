"""Requests of many pages: ``.image`` and ``.shmem`` beside a tmpfs file, by request size and page size."""

import contextlib
import itertools
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plan import Plan
from report import Target, bytes_text, ratio, spread, table
from systems import (
    BINDFS,
    EXAMPLE,
    MEMFS,
    OTHER,
    PASSTHROUGH,
    TMPFS,
    TTMFS,
    System,
    Ttmfs,
    checkouts,
    mounted,
    side_by_side,
)
from workloads import REQUEST_BYTES, Transfer, buffer, pause, read_image, transfer, write_image

__all__ = ["report", "run", "targets"]

WAYS: dict[str, Transfer] = {"write": write_image, "read": read_image}
IMAGE, SHMEM, BESIDE = (".image", ".shmem", "tmpfs file")
PAGE_SIZES = (4 << 10, 64 << 10, 2 << 20)
BULK_TURNS = 3  # for each round: turns are short, and ratios near 1 need many
PIECE_BYTES = 16 << 20  # of one file, before the next file's turn
BOUNDS = {(IMAGE, "write"): 0.45, (IMAGE, "read"): 0.60, (SHMEM, "write"): 0.85, (SHMEM, "read"): 0.85}


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    """All figures are MiB/s, a round each."""
    size = 3 * plan.bulk_bytes + (64 << 20)
    images: dict[str, System] = {
        _page(page_size): Ttmfs(TTMFS, size, page_size=page_size)
        for page_size in PAGE_SIZES
        if page_size >= System.page_size
    }
    others, missing = side_by_side(size, (PASSTHROUGH, BINDFS, TMPFS))
    missing[EXAMPLE] = "left out: its page cache hides that each write copies the whole file"
    missing[MEMFS] = "left out: it is compared by page operations only"
    ends = images | {system.name: system for system in others}
    compared = [system for system in checkouts(size) if system.name == OTHER]
    with mounted(directory, [*ends.values(), *compared]), contextlib.ExitStack() as stack:
        paths = {name: _file(system) for name, system in ends.items()}
        bulk = {IMAGE: paths[next(iter(images))]}
        for system, suffix in [(next(iter(images.values())), ""), *((system, f", {OTHER}") for system in compared)]:
            if suffix:
                bulk[IMAGE + suffix] = _file(system)
            bulk[SHMEM + suffix] = system.new("b") / ".shmem"
        bulk |= {PASSTHROUGH: paths[PASSTHROUGH]} if PASSTHROUGH in paths else {}
        bulk[BESIDE] = paths[TMPFS]
        opened = {name: stack.enter_context(_opened(path)) for name, path in (paths | bulk).items()}
        speeds = _take_turns(plan, bulk, opened)
        sweep = _sweep(plan, {name: opened[name] for name in ends})
    return {
        "bytes": plan.bulk_bytes, "missing": missing, "mib_per_second": speeds, "sweep_mib_per_second": sweep
    }  # fmt: skip


def _take_turns(plan: Plan, bulk: dict[str, Path], opened: dict[str, int]) -> dict[str, dict[str, list[float]]]:
    """By way and file, in requests of 1 MiB over existing pages."""
    request, files = buffer(REQUEST_BYTES), list(bulk)
    speeds: dict[str, dict[str, list[float]]] = {way: {name: [] for name in files} for way in WAYS}
    for turn in range(BULK_TURNS * plan.rounds + 1):
        first = (turn + turn // BULK_TURNS) % len(files)
        order = files[first:] + files[:first]
        if not turn or turn % BULK_TURNS == 1:  # the place of a file in memory changes its speed
            for name in order:
                path = bulk[name]
                os.truncate(path.with_name(".image") if path.name == ".shmem" else path, 0)
                write_image(opened[name], plan.bulk_bytes, request)
        for way, act in WAYS.items():
            seconds = dict.fromkeys(files, 0.0)
            for start, name in itertools.product(range(0, plan.bulk_bytes, PIECE_BYTES), order):
                pause()
                seconds[name] += transfer(act, opened[name], min(PIECE_BYTES, plan.bulk_bytes), request, start)
            if turn:
                for name, took in seconds.items():
                    speeds[way][name].append(plan.bulk_bytes / (1 << 20) / took)
    return speeds


def _page(page_size: int) -> str:
    return f"ttmfs, pages of {bytes_text(page_size)}"


def _file(system: System) -> Path:
    """The file of many pages of a system."""
    directory = system.new("a")
    return directory / ".image" if isinstance(system, Ttmfs) else directory / "file"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR if path.name.startswith(".") else os.O_RDWR | os.O_CREAT)
    try:
        yield fd
    finally:
        os.close(fd)


def _sweep(plan: Plan, opened: dict[str, int]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """By way, file and request size. The pages exist."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {
        way: {name: {size: [] for size in plan.request_sizes} for name in opened} for way in WAYS
    }
    for fd in opened.values():
        write_image(fd, plan.sweep_bytes, buffer(REQUEST_BYTES))
    for turn in range(plan.rounds + 1):
        for size in plan.request_sizes:
            request = buffer(size)
            length = max(size, min(plan.sweep_bytes, size * plan.sweep_requests) // size * size)
            for way, act in WAYS.items():
                for name, fd in opened.items():
                    pause()
                    speed = length / (1 << 20) / transfer(act, fd, length, request)
                    if turn:
                        found[way][name][size].append(speed)
    return found


def targets(found: dict[str, Any]) -> list[Target]:
    speeds = found["mib_per_second"]
    return [
        Target(
            f"{name}, {way} by 1 MiB / tmpfs file",
            ratio(speeds[way][name], speeds[way][BESIDE]),
            bound,
            at_most=False,
        )
        for (name, way), bound in BOUNDS.items()
    ]


def report(found: dict[str, Any]) -> str:
    speeds, sweep = found["mib_per_second"], found["sweep_mib_per_second"]
    parts = [
        f"Requests of 1 MiB over {bytes_text(found['bytes'])} of existing pages, MiB/s: median (least to\n"
        f"most) of {len(speeds['read'][BESIDE])} rounds. Files take turns of 16 MiB, and are stored again\n"
        "for every third round. In brackets: the ratio to the tmpfs file.",
        table(
            ("", *speeds),
            [
                [name, *(f"{spread(row[name], 0)} [{ratio(row[name], row[BESIDE]):.2f}]" for row in speeds.values())]
                for name in speeds["read"]
            ],
        ),
    ]
    for way, by_name in sweep.items():
        parts += [
            f"{way} of existing pages by request size, MiB/s, medians. (A FUSE request has at most 1 MiB.)",
            table(
                ("", *(bytes_text(int(size)) for size in next(iter(by_name.values())))),
                [
                    [name, *(f"{statistics.median(values):.0f}" for values in by_size.values())]
                    for name, by_size in by_name.items()
                ],
            ),
        ]
    parts += [f"NOT MEASURED: {name}: {why}" for name, why in found["missing"].items()]
    return "\n\n".join(parts)
