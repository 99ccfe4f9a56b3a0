#!/usr/bin/env python3
"""Draws docs/pictures/dashboard.png: the panels of docs/metrics/dashboard.json, from a real mount under load.

A real Prometheus scrapes ``ttmfs export`` for some minutes, and then evaluates the very queries of the dashboard. Only
the drawing is ours, because the project's tests have no Grafana. It needs root, matplotlib, and
Prometheus (Debian: prometheus; its path can be given in PROMETHEUS). It adds swap of 256 MiB to the machine meanwhile.

    sudo unshare --mount env PYTHONPATH=tests .venv/bin/python scripts/dashboard_picture.py

The mount is /mnt/ttm, on a tmpfs over /mnt: hence the mount namespace.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness import REPOSITORY, Mount, run, wait_until
from stores import swap
from ttmfs.client import Backup

EXPORTER, PROMETHEUS = 10912, 10913
"""Ports on the loopback interface."""

RATE_INTERVAL, STEP = "10s", 1
CONFIG = f"""
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs: [{{job_name: ttmfs, static_configs: [{{targets: ["127.0.0.1:{EXPORTER}"]}}]}}]
"""
UNITS = {"bytes": (1 << 20, "MiB"), "s": (1e-3, "ms"), "reqps": (1, "1/s"), "short": (1, ""), "none": (1, "")}
MOST_LINES = 8


def load(mount: Path, ended: threading.Event) -> None:
    """Store, read, write back and drop pages, in phases; set an attribute that is refused."""
    page, pages = os.sysconf("SC_PAGE_SIZE"), 8192
    blocks = bytes(random.Random(7).randbytes(page * 64))
    for number in itertools.count():
        path = mount / f"bo{number % 6}"
        with Backup.open(path) if path.exists() else Backup.create(path, size=pages * page) as backup:
            with open(path / ".image", "r+b", buffering=0) as image:
                for start in range(0, pages, 64):
                    os.pwrite(image.fileno(), blocks, start * page)
                    if ended.wait(0.005):
                        return
                if number % 2:
                    os.fsync(image.fileno())
            for _ in range(1200):
                handle = random.randrange(1, pages)
                with contextlib.suppress(OSError):
                    (path / str(handle)).read_bytes()
                    os.setxattr(path, "user.ttmfs.size", b"nonsense")
                if ended.wait(0.002):
                    return
            if number % 3 == 2:
                backup.drop_pages(numpy.arange(1, pages // 2, dtype=numpy.uint64))


def answer(query: str, start: float, end: float) -> list[dict[str, Any]]:
    """The series of a query, from Prometheus."""
    words = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": STEP})
    with urllib.request.urlopen(f"http://127.0.0.1:{PROMETHEUS}/api/v1/query_range?{words}", timeout=60) as text:
        found = json.load(text)
    assert found["status"] == "success", found
    result: list[dict[str, Any]] = found["data"]["result"]
    return result


def queries(panel: dict[str, Any]) -> list[tuple[str, str]]:
    """The queries of a panel with Grafana's variables filled in, and the names of their lines."""
    filled = []
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", RATE_INTERVAL)
        filled.append((query.replace("$instance", ".*").replace("$mount", ".*"), target["legendFormat"]))
    return filled


def draw(axes: Axes, panel: dict[str, Any], start: float, end: float) -> None:
    """Draw a panel: what its queries give between two times."""
    factor, unit = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
    lines = []
    for query, legend in queries(panel):
        for series in answer(query, start, end):
            name = legend
            for label, value in series["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            points = [(float(at) - start, float(value) / factor) for at, value in series["values"] if value != "NaN"]
            if points:
                lines.append((max(value for _, value in points), name, points))
    assert lines, f"{panel['title']} shows nothing"
    for _, name, points in sorted(lines, reverse=True)[:MOST_LINES]:
        style = "default" if unit else "steps-post"
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, drawstyle=style)
    left = f"; {len(lines) - MOST_LINES} lines with lower values are left out" if len(lines) > MOST_LINES else ""
    axes.set_title(f"{panel['title']}{f' ({unit})' if unit else ''}{left}", fontsize=9, loc="left")
    if unit == "ms":
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # room for the legend
    axes.set_xlim(0, end - start)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2, loc="upper left", framealpha=0.6)


def picture(start: float, end: float, file: Path) -> None:
    """Draw all panels where the dashboard has them."""
    panels = json.loads((REPOSITORY / "docs/metrics/dashboard.json").read_text())["panels"]
    rows = [[*row] for _, row in itertools.groupby(panels, key=lambda panel: panel["gridPos"]["y"])]
    figure = Figure(figsize=(14, 15), layout="constrained")
    parts = figure.subfigures(len(rows), 1, height_ratios=[row[0]["gridPos"]["h"] for row in rows])
    for part, row in zip(parts, rows, strict=True):
        places = part.subplots(1, len(row), squeeze=False, width_ratios=[panel["gridPos"]["w"] for panel in row])
        for axes, panel in zip(places[0], row, strict=True):
            draw(axes, panel, start, end)
    figure.supxlabel("seconds since the start of the load", fontsize=8)
    figure.savefig(file, dpi=80)


def record(directory: Path, seconds: float, file: Path) -> None:
    """Mount, load, scrape, and draw. In the middle the daemon is killed twice."""
    prometheus = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
    if not prometheus:
        sys.exit("dashboard_picture: there is no prometheus: apt install prometheus, or set PROMETHEUS to its path")
    (directory / "prometheus.yml").write_text(CONFIG)
    point = Path("/mnt/ttm")
    export = [sys.executable, "-m", "ttmfs", "export", "--listen", f"127.0.0.1:{EXPORTER}", point]
    serve = [prometheus, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
             f"--web.listen-address=127.0.0.1:{PROMETHEUS}", "--log.level=error"]  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(swap(directory))
        run(f"mount -t tmpfs tmpfs {point.parent}")
        stack.callback(run, f"umount {point.parent}")
        point.mkdir()
        mount = stack.enter_context(Mount(point, "size=160m"))
        mount.expect_restarts()
        for words in export, serve:
            process = stack.enter_context(subprocess.Popen(words, cwd=REPOSITORY))
            stack.callback(process.terminate)

        def scraped() -> bool:
            with contextlib.suppress(OSError):
                return bool(answer("ttmfs_up", time.time() - 1, time.time()))
            return False

        wait_until(scraped, "Prometheus", 60)
        ended, start = threading.Event(), time.time()
        worker = threading.Thread(target=lambda: load_again(point, ended))
        worker.start()
        for _ in range(int(seconds) // 10):
            time.sleep(10)
            mount.watch_anew()
            if abs(time.time() - start - seconds / 2) < 6:
                mount.kill()
        ended.set()
        worker.join()
        picture(start, time.time(), file)


def load_again(mount: Path, ended: threading.Event) -> None:
    """The load; a full mount is emptied."""
    while not ended.is_set():
        try:
            load(mount, ended)
        except OSError as error:
            sys.stderr.write(f"{error}: ending the backups\n")
            for path in mount.iterdir():
                with contextlib.suppress(OSError):
                    os.truncate(path / ".image", 0)
            ended.wait(1)


def main() -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs/pictures/dashboard.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ttmfs-dashboard-") as directory:
        record(Path(directory), arguments.seconds, arguments.output)


if __name__ == "__main__":
    main()
