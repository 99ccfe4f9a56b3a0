"""Many concurrent clients: throughput, CPU time, fair shares, and a reader beside a streaming client."""

import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from plan import Plan
from processes import percentile, together
from report import Target, ratio, spread, table
from systems import BINDFS, EXAMPLE, MEMFS, OFF, OTHER, PASSTHROUGH, TMPFS, TTMFS, System, Ttmfs, mounted, side_by_side
from workloads import REQUEST_BYTES, buffer, create, pages_of, pause, store

__all__ = ["report", "run", "targets"]

NAMES = (TTMFS, OFF, OTHER, MEMFS, PASSTHROUGH, BINDFS, TMPFS)
PAGES = 32  # of each client
SHARE = 0.5
"""The least share of the slowest client: its operations, relative to those of the median client."""

STREAM_BYTES = 16 << 20


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    systems, missing = side_by_side(max(2 * STREAM_BYTES, plan.clients * PAGES * 4096) + (64 << 20), NAMES)
    found: dict[str, Any] = {
        "clients": plan.clients,
        "seconds": plan.client_seconds,
        "stream_seconds": plan.stream_seconds,
        "missing": missing | {EXAMPLE: "left out: its page cache answers reads and writes of open pages"},
        "rounds": {system.name: [] for system in systems},
        "fairness": [],
    }
    with mounted(directory, systems):
        homes = {s.name: [_home(s, f"c{number}") for number in range(plan.clients)] for s in systems}
        for turn in range(plan.rounds + 1):
            for system in systems:
                one = _at_once(system, homes[system.name][:1], plan.client_seconds)
                all_ = _at_once(system, homes[system.name], plan.client_seconds)
                if turn:
                    found["rounds"][system.name].append({"one": one, "all": all_})
        (ttmfs,) = (system for system in systems if system.name == TTMFS)
        home = homes[TTMFS][0]
        streamed = ttmfs.new("streamed")
        store(streamed, STREAM_BYTES // ttmfs.page_size, ttmfs.page_size)
        for turn in range(plan.rounds + 1):
            pause()
            (alone,) = together([partial(_reader, home, plan.stream_seconds / 2)])
            pause()
            beside, stream = together(
                [partial(_reader, home, plan.stream_seconds), partial(_streamer, streamed, plan.stream_seconds)]
            )
            if turn:
                found["fairness"].append({"alone": alone, "beside": beside, "stream": stream})
    return found


def _home(system: System, name: str) -> Path:
    """A client's pages."""
    directory = system.new(name)
    if isinstance(system, Ttmfs):
        store(directory, PAGES, system.page_size)
    else:
        pages = pages_of(system, directory, PAGES)
        pages.content = os.urandom(system.page_size)
        create(pages)
    return directory


def _at_once(system: System, homes: list[Path], seconds: float) -> dict[str, Any]:
    """The work of concurrent clients in the given time, in a mix of open+read+close, pread and pwrite."""
    pause()
    before = system.cpu()
    clients = together([partial(_client, home, seconds, system.open_flags) for home in homes])
    pause()
    daemon = system.cpu() - before
    counts = [client["operations"] for client in clients]
    total = sum(counts)
    return {
        "operations_per_second": sum(count / client["seconds"] for count, client in zip(counts, clients, strict=True)),
        "cpu_microseconds": (daemon + sum(client["cpu_ns"] for client in clients)) / total / 1000,
        "operations": counts,
        "share": min(counts) / statistics.median(counts),
        "p50_microseconds": [client["p50"] for client in clients],
        "p99_microseconds": [client["p99"] for client in clients],
        "longest_microseconds": [client["longest"] for client in clients],
    }


def _client(home: Path, seconds: float, flags: int) -> dict[str, Any]:
    open_, read, close, pread, pwrite, clock = os.open, os.read, os.close, os.pread, os.pwrite, time.perf_counter_ns
    paths, size = [f"{home}/{handle}" for handle in range(1, PAGES + 1)], System.page_size
    held, content = os.open(paths[0], os.O_RDWR | flags), os.urandom(size)
    took: list[int] = []
    cpu, begin = time.process_time_ns(), clock()
    before, end = begin, begin + int(seconds * 1e9)
    while True:
        for path in paths:
            fd = open_(path, flags)
            read(fd, size)
            close(fd)
            after = clock()
            took.append(after - before)
            pread(held, size, 0)
            before = clock()
            took.append(before - after)
            pwrite(held, content, 0)
            after = clock()
            took.append(after - before)
            before = after
            if after > end:
                close(held)
                return {
                    "operations": len(took),
                    "seconds": (after - begin) / 1e9,
                    "cpu_ns": time.process_time_ns() - cpu,
                    **_percentiles(took),
                }


def _percentiles(took: list[int]) -> dict[str, float]:
    """In microseconds."""
    return {"p50": percentile(took, 50) / 1000, "p99": percentile(took, 99) / 1000, "longest": max(took) / 1000}


def _reader(home: Path, seconds: float) -> dict[str, Any]:
    """Read a page repeatedly, by turns opened each time and through an open descriptor."""
    path, size, clock = f"{home}/1", System.page_size, time.perf_counter_ns
    held = os.open(path, os.O_RDONLY)
    opened: list[int] = []
    kept: list[int] = []
    end = clock() + int(seconds * 1e9)
    while (start := clock()) < end:
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, size)
        os.close(fd)
        middle = clock()
        os.pread(held, size, 0)
        opened.append(middle - start)
        kept.append(clock() - middle)
    os.close(held)
    return {"open+read+close": _percentiles(opened), "pread": _percentiles(kept)}


def _streamer(backup: Path, seconds: float) -> dict[str, Any]:
    """Write and read an image in requests of 1 MiB, in turns."""
    fd, request = os.open(backup / ".image", os.O_RDWR), buffer(REQUEST_BYTES)
    moved, offset = 0, 0
    begin = time.perf_counter()
    while time.perf_counter() < begin + seconds:
        moved += os.pwrite(fd, request, offset) + os.preadv(fd, [request], offset)
        offset = (offset + REQUEST_BYTES) % STREAM_BYTES
    os.close(fd)
    return {"mib_per_second": moved / (1 << 20) / (time.perf_counter() - begin)}


def _column(found: dict[str, Any], name: str, which: str, what: str) -> list[Any]:
    return [turn[which][what] for turn in found["rounds"].get(name, [])]


def _p99(found: dict[str, Any], which: str) -> list[float]:
    """The 99th percentile of the slower kind of reading, in ms."""
    return [max(turn[which][kind]["p99"] for kind in ("open+read+close", "pread")) / 1000 for turn in found["fairness"]]


def targets(found: dict[str, Any]) -> list[Target]:
    cpu, speed = "cpu_microseconds", "operations_per_second"
    many = f"{found['clients']} clients"
    cpu_ratio = ratio(_column(found, TTMFS, "all", cpu), _column(found, OFF, "all", cpu))
    speed_ratio = ratio(_column(found, TTMFS, "all", speed), _column(found, TTMFS, "one", speed))
    share = statistics.median(_column(found, TTMFS, "all", "share"))
    beside = statistics.median(_p99(found, "beside"))
    return [
        Target(f"CPU time an operation, daemon and {many} / {OFF}", cpu_ratio, 1.2),
        Target(f"throughput of {many} / throughput of one", speed_ratio, 1.0, at_most=False),
        Target(f"fair shares: least operations of {many} / median client", share, SHARE, at_most=False),
        Target("99th percentile of a page read beside a stream", beside, 5, unit="ms"),
    ]


def report(found: dict[str, Any]) -> str:
    def row(name: str) -> list[str]:
        cells = [
            spread(_column(found, name, which, what), 0 if what.startswith("op") else 1)
            for what in ("operations_per_second", "cpu_microseconds")
            for which in ("one", "all")
        ]
        shares = _column(found, name, "all", "share")
        p99 = [max(values) / 1000 for values in _column(found, name, "all", "p99_microseconds")]
        return [name, *cells, spread(shares, 2), spread(p99, 2)]

    count = found["clients"]
    head = ["", "1: op/s", f"{count}: op/s", "1: CPU us/op", f"{count}: CPU us/op", "least share", "p99 ms"]
    fairness = []
    for kind in "open+read+close", "pread":
        for which in "alone", "beside":
            turns = [turn[which][kind] for turn in found["fairness"]]
            fairness.append(
                [f"{kind}, {which}", *(spread([t[p] / 1000 for t in turns], 3) for p in ("p50", "p99", "longest"))]
            )
    streams = [turn["stream"]["mib_per_second"] for turn in found["fairness"]]
    parts = [
        f"{count} concurrent processes, and 1, each in its own directory, for {found['seconds']:g} s:\n"
        "open+read+close, pread and pwrite in turns. Median (least to most) of the rounds. Operations a second of\n"
        "all clients together. CPU time of daemon and clients. Least share: the operations of the slowest client\n"
        "relative to the median client. p99: the longest 99th percentile of any client.",
        table(head, [row(name) for name in found["rounds"]]),
        f"A page read, ms, alone and beside a client that writes and reads .image: {spread(streams, 0)} MiB/s.",
        table(["", "median", "99th percentile", "longest"], fairness),
        *(f"NOT MEASURED: {name}: {why}" for name, why in found["missing"].items()),
    ]
    return "\n\n".join(parts)
