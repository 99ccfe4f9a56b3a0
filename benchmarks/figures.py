#!/usr/bin/env python3
"""What a page costs in ttmfs, and in a tmpfs with a file a page beside it: round trips, time and kernel memory.

Measured on real mounts of its own, in one run, the two in turns; nothing is left behind. Needs root.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOUNT_PY = Path(__file__).resolve().parent.parent / "mount.py"
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
SPARE = 16 << 20
WAIT_SECONDS = 30.0
SETTLED = 64 << 10  # bytes by which slab may still change between two looks
SLAB = ("SUnreclaim", "SReclaimable")


def wait_until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"figures: waited {WAIT_SECONDS:.0f} s for {what}")
        time.sleep(0.01)


# --- the two mounts ---


@contextlib.contextmanager
def ttmfs(mountpoint: Path, size: int) -> Iterator[int]:
    """A ttmfs served by a child process, whose id is given. On return it has ended."""
    mountpoint.mkdir()
    before = mountpoint.stat().st_dev
    command = [sys.executable, str(MOUNT_PY), "ttm", str(mountpoint), "-f", "-o", f"size={size}"]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            wait_until(lambda: process.poll() is not None or mountpoint.stat().st_dev != before, "the mount")
            if process.poll() is None:
                yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], check=False)
                raise
        if code:
            log.seek(0)
            sys.exit(f"figures: mount.py ended with {code}: {log.read()}")


@contextlib.contextmanager
def tmpfs(mountpoint: Path, size: int) -> Iterator[None]:
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=0", "figures", str(mountpoint)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)


# --- round trips and time ---


def create(paths: list[str], page: bytes) -> None:
    for path in paths:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(fd, page)
        os.close(fd)


def read(paths: list[str], page: bytes) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        if os.read(fd, PAGE_SIZE) != page:
            sys.exit(f"figures: {path} is not what was stored")
        os.close(fd)


def unlink(paths: list[str], _: bytes) -> None:
    for path in paths:
        os.unlink(path)


STEPS = {"create+write+close": create, "open+read+close": read, "unlink": unlink}


def requests(mountpoint: Path) -> Counter[str]:
    """How many requests of each kind were carried out so far."""
    text = (mountpoint / ".stats").read_text()
    rows = re.findall(r'^ttmfs_operations_total\{operation="(\w+)"\} (\d+)$', text, re.MULTILINE)
    return Counter({name: int(count) for name, count in rows})


def measure_speed(directory: Path, rounds: int, pages: int) -> dict[str, Any]:
    """Microseconds a page of every round, and round trips a page, of each step."""
    times: dict[str, dict[str, list[float]]] = {step: {"ttmfs": [], "tmpfs": []} for step in STEPS}
    trips: dict[str, Counter[str]] = {step: Counter() for step in STEPS}
    size = pages * PAGE_SIZE + SPARE
    fuse, beside = directory / "ttmfs", directory / "tmpfs"
    with ttmfs(fuse, size), tmpfs(beside, size):
        paths = {}
        for name, mountpoint in ("ttmfs", fuse), ("tmpfs", beside):
            (mountpoint / "a").mkdir()
            paths[name] = [f"{mountpoint}/a/{handle}" for handle in range(1, pages + 1)]
        page = os.urandom(PAGE_SIZE)
        requests(fuse)
        first = requests(fuse)
        asking = requests(fuse) - first  # what reading .stats once adds itself
        for turn in range(rounds + 1):  # the first warms up and is not counted
            for name in paths:
                for step, act in STEPS.items():
                    before = requests(fuse) if name == "ttmfs" else None
                    start = time.perf_counter_ns()
                    act(paths[name], page)
                    elapsed = time.perf_counter_ns() - start
                    if not turn:
                        continue
                    times[step][name].append(elapsed / pages / 1000)
                    if before is not None:
                        trips[step].update(requests(fuse))
                        trips[step].subtract(before + asking)
    answer: dict[str, Any] = {}
    for step in STEPS:
        rounded = {name: round(count / rounds / pages, 2) for name, count in sorted(trips[step].items())}
        counts = {name: count for name, count in rounded.items() if count}
        answer[step] = {"round_trips": round(sum(counts.values()), 2), "requests": counts, "microseconds": times[step]}
    return answer


# --- kernel memory ---


def slab() -> dict[str, int]:
    """SUnreclaim and SReclaimable in bytes, once they hold still: the kernel frees much of it with a delay."""

    def look() -> dict[str, int]:
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        return {row[0][:-1]: int(row[1]) * 1024 for row in rows if row[0][:-1] in SLAB}

    now = look()

    def still() -> bool:
        nonlocal now
        time.sleep(0.2)
        before, now = now, look()
        return all(abs(now[name] - before[name]) <= SETTLED for name in SLAB)

    wait_until(still, "the machine to be quiet: SUnreclaim and SReclaimable go on changing")
    return now


def forget() -> dict[str, int]:
    """Let the kernel drop every dentry and inode that it can, until no more goes: it spares what was just used."""
    os.sync()
    now = slab()

    def no_more() -> bool:
        nonlocal now
        Path("/proc/sys/vm/drop_caches").write_text("2\n")
        before, now = now, slab()
        return sum(before.values()) - sum(now.values()) <= SETTLED

    wait_until(no_more, "drop_caches to have dropped all it can")
    return now


def anonymous(pid: int) -> int:
    """The daemon's own memory in bytes."""
    return int(re.findall(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0]) * 1024


def measure_slab(mountpoint: Path, pages: int) -> dict[str, dict[str, float]]:
    """Bytes of slab a page, above what there was before: at each state of a directory of page files."""
    directory = mountpoint / "a"
    directory.mkdir()
    page = os.urandom(PAGE_SIZE)
    for warm_up in create, read, unlink:
        warm_up([f"{directory}/1"], page)
    base = forget()
    states = {}

    def note(state: str, now: dict[str, int]) -> None:
        states[state] = {name: (now[name] - base[name]) / pages for name in SLAB}

    for handle in range(1, pages + 1):
        create([f"{directory}/{handle}"], page)
    stored = os.statvfs(mountpoint)
    if (used := (stored.f_blocks - stored.f_bfree) * stored.f_frsize // PAGE_SIZE) < pages:
        sys.exit(f"figures: {used} pages are stored, not {pages}")
    note("stored", slab())
    note("stored, caches dropped", forget())
    with os.scandir(directory) as entries:
        listed = sum(entry.stat().st_size == PAGE_SIZE for entry in entries)
    if listed != pages:
        sys.exit(f"figures: {listed} pages are listed, not {pages}")
    note("listed", slab())
    note("listed, caches dropped", forget())
    for handle in range(1, pages + 1):
        os.unlink(f"{directory}/{handle}")
    note("all removed", forget())
    return states


def measure_memory(directory: Path, pages: int) -> dict[str, Any]:
    size = pages * PAGE_SIZE + SPARE
    answer: dict[str, Any] = {"pages": pages}
    with ttmfs(directory / "ttmfs", size) as pid:
        before = anonymous(pid)
        answer["ttmfs"] = measure_slab(directory / "ttmfs", pages)
        answer["daemon_bytes_before_and_after"] = [before, anonymous(pid)]
    with tmpfs(directory / "tmpfs", size):
        answer["tmpfs"] = measure_slab(directory / "tmpfs", pages)
    return answer


# --- the report ---


def machine() -> dict[str, Any]:
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "processor": models[0] if models else "",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE,
        "page_size": PAGE_SIZE,
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
    }


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.1f} ({min(values):.1f} to {max(values):.1f})"


def report(found: dict[str, Any]) -> str:
    where, memory = found["machine"], found["memory"]
    lines = [
        f"Linux {where['kernel']} {where['architecture']}, {where['cores']} cores ({where['processor']}), "
        f"{where['memory_bytes'] >> 20} MiB, Python {where['python']}; load before: {where['load_average_before']:.2f}",
        "",
        f"Microseconds a page: median of {found['rounds']} rounds of {found['pages']} pages of {PAGE_SIZE} bytes",
        "(least to most), after a round to warm up; one client, one page after the other, the two in turns.",
        "Round trips: ttmfs_operations_total in .stats, less what reading it adds. No close waits for its release.",
        "",
        f"{'':<19} {'ttmfs':<26} {'tmpfs, a file a page':<26} round trips of ttmfs",
    ]
    for step, row in found["speed"].items():
        times = [f"{spread(row['microseconds'][name]):<26}" for name in ("ttmfs", "tmpfs")]
        counts = ", ".join(f"{name} {count:g}" for name, count in row["requests"].items())
        lines.append(f"{step:<19} {' '.join(times)} {row['round_trips']:g}: {counts}")
    lines += [
        "",
        f"Kernel memory, in bytes a page at {memory['pages']} page files: the growth of SUnreclaim and SReclaimable in",
        "/proc/meminfo (slab; no KernelStack, no PageTables, nor the pages themselves) since the empty directory,",
        "at rest. Caches dropped: after `echo 2 > /proc/sys/vm/drop_caches`. What is left then, of both, cannot be",
        "reclaimed, whatever it is called (a tmpfs holds on to its dentries, which count as SReclaimable).",
        "Listed: every name read, and stat(2) of each. The last row is how far the machine itself went astray.",
        "",
        f"{'':<24} {'ttmfs':<36} tmpfs, a file a page",
        f"{'':<24} {'unreclaim':>9} {'reclaim':>9} {'both':>9}       {'unreclaim':>9} {'reclaim':>9} {'both':>9}",
    ]
    for state in memory["ttmfs"]:
        cells = []
        for name in "ttmfs", "tmpfs":
            values = [memory[name][state][kind] for kind in SLAB]
            cells.append("".join(f"{value:>10.1f}" for value in (*values, sum(values)))[1:])
        lines.append(f"{state:<24} {cells[0]}       {cells[1]}")
    before, after = (size / 1024 for size in memory["daemon_bytes_before_and_after"])
    lines += ["", f"The daemon's own memory (RssAnon): {before:.0f} KiB before, {after:.0f} KiB after."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there as well")
    parser.add_argument("--rounds", type=int, default=9, help="rounds for the times (%(default)s)")
    parser.add_argument("--pages", type=int, default=2000, help="pages a round (%(default)s)")
    parser.add_argument("--memory-pages", type=int, default=100_000, help="pages for the memory (%(default)s)")
    arguments = parser.parse_args()
    if os.geteuid():
        sys.exit("figures: needs root, to mount a tmpfs and to drop the kernel's caches")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("figures: ended by SIGTERM"))
    found: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds, "pages": arguments.pages}
    measures: dict[str, Callable[[Path], dict[str, Any]]] = {
        "speed": lambda directory: measure_speed(directory, arguments.rounds, arguments.pages),
        "memory": lambda directory: measure_memory(directory, arguments.memory_pages),
    }
    for name, measure in measures.items():
        with tempfile.TemporaryDirectory(prefix="ttmfs-figures.") as temporary:
            mounts = Path(temporary)
            found[name] = measure(mounts)
            for mountpoint in mounts.iterdir():
                mountpoint.rmdir()  # fails, rather than empties it, if something is mounted still
    print(report(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
