"""Bar charts that need no text beside them: one page, whole backups, many pages, a takeover.

As a program it draws the charts of a results.json again: python benchmarks/charts.py RESULTS.json DIRECTORY
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from placements import UNPINNED

__all__ = ["draw"]

OURS, OTHERS = "#0072b2", "#b4b9c1"
STYLE = {"svg.hashsalt": "ttmfs", "svg.fonttype": "none", "font.size": 10.0, "axes.titleweight": "bold"}
ONE_PAGE = {
    "create+write+close": "store a new page", "open+read+close": "open, read and close a page",
    "pread": "read a page that is open", "pwrite": "write a page that is open", "unlink": "drop a page",
}  # fmt: skip
LEFT_OUT = ("ttmfs busy_poll=off", "tmpfs.py")  # the tables have them
MANY = {"cold": "list a million pages", "warm": "list them again", "drop": "drop them all"}


@dataclass(frozen=True)
class Panel:
    """Bars of one task: each label with its figure. `marks` follow the figures of some."""

    title: str
    bars: Mapping[str, float]
    marks: Mapping[str, str]


def draw(groups: Mapping[str, Any], machine: str, directory: Path) -> list[Path]:
    """Draw a chart for each measured group. Return the written files."""
    kinds = {"operations": _one_page, "bulk": _whole_backups, "listing": _many_pages, "recovery": _takeover}
    written = []
    directory.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for group, chart in kinds.items():
            if group in groups:
                title, panels, columns = chart(groups[group])
                path = directory / f"chart-{group}.svg"
                # No date: the same figures give the same file.
                _figure(title, panels, columns, machine).savefig(path, format="svg", metadata={"Date": None})
                written.append(path)
    return written


def _figure(title: str, panels: Sequence[Panel], columns: int, machine: str) -> Figure:
    rows = -(-len(panels) // columns)
    heights = [max(len(panel.bars) for panel in panels[row * columns :][:columns]) for row in range(rows)]
    height = 0.28 * sum(heights) + 0.75 * rows + 0.9  # inches
    figure = Figure(figsize=(9.0, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    note = "* answered by the kernel, without the filesystem.  " if any(panel.marks for panel in panels) else ""
    figure.text(0.01, 0.06 / height, note + machine, fontsize=7, color="#5b6470")
    figure.get_layout_engine().set(rect=(0, 0.25 / height, 1, 1 - 0.25 / height), h_pad=0.08)  # type: ignore[union-attr,call-arg]
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for ax, panel in zip(axes.flat, panels, strict=False):
        names = list(panel.bars)
        bars = ax.barh(
            names, list(panel.bars.values()), color=[OURS if _is_ours(name) else OTHERS for name in names], height=0.72
        )
        ax.bar_label(bars, [f"{value:,.3g}{panel.marks.get(name, '')}" if value < 1000 else f"{value:,.0f}"
                            for name, value in panel.bars.items()], padding=3, fontsize=9)  # fmt: skip
        ax.set_title(panel.title, fontsize=10, loc="left")
        ax.invert_yaxis()
        ax.margins(x=0.18)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.tick_params(bottom=False, labelbottom=False, left=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    return figure


def _is_ours(name: str) -> bool:
    return name.startswith((".image", ".shmem", "ttmfs", "with ", "without "))


def _medians(values: Mapping[str, Sequence[float]], *left_out: str) -> dict[str, float]:
    return {name: statistics.median(rounds) for name, rounds in values.items() if rounds and name not in left_out}


def _one_page(group: Mapping[str, Any]) -> tuple[str, list[Panel], int]:
    found = group["placements"][UNPINNED]
    panels = []
    for operation, title in ONE_PAGE.items():
        cached = dict.fromkeys(found["cached"].get(operation, ()), " *")
        panels.append(Panel(title, _medians(found["microseconds"][operation], *LEFT_OUT), cached))
    return "Time for one page, in microseconds (shorter is better)", panels, 2


def _whole_backups(group: Mapping[str, Any]) -> tuple[str, list[Panel], int]:
    panels = [Panel(way, _medians(found), {}) for way, found in group["mib_per_second"].items()]
    return "Whole backups in requests of 1 MiB, in MiB a second (longer is better)", panels, 2


def _many_pages(group: Mapping[str, Any]) -> tuple[str, list[Panel], int]:
    found = group["microseconds_an_entry"]
    panels = [Panel(title, _medians(found[step]), {}) for step, title in MANY.items()]
    return f"A backup of {group['pages']:,} pages, in microseconds a page (shorter is better)", panels, 3


def _takeover(group: Mapping[str, Any]) -> tuple[str, list[Panel], int]:
    panels = []
    for pages, cases in group["milliseconds"].items():
        names = {"ttmfs standby=on": "with a standby", "ttmfs standby=off": "without a standby"}
        bars = {names[name]: statistics.median(took) for name, took in cases.items() if name in names and took}
        panels.append(Panel(f"{int(pages):,} page{'s' if int(pages) > 1 else ''} stored", bars, {}))
    return "From a SIGKILL of the daemon to the next answer, in ms (shorter is better)", panels, 2


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text())
    for made in draw(results["groups"], results["said"], Path(sys.argv[2])):
        print(made)
