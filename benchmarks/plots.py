"""SVG plots: operations side by side, latency against numbers, bandwidth against request and page size."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from placements import UNPINNED

__all__ = ["draw"]

COLOURS = {
    "ttmfs": "#0072b2",
    "ttmfs busy_poll=off": "#56b4e9",
    "tmpfs.py": "#d55e00",
    "bindfs": "#e69f00",
    "memfs_ll": "#009e73",
    "passthrough_hp": "#cc79a7",
    "other ttmfs": "#000000",
    "tmpfs": "#666666",
}
SHADES = ("#0072b2", "#009e73", "#cc79a7")  # of ttmfs' page sizes
STYLE = {"svg.hashsalt": "ttmfs", "svg.fonttype": "none", "font.size": 9.0, "axes.axisbelow": True}
UNITS = ((1 << 20, "MiB"), (1 << 10, "KiB"))


def draw(groups: Mapping[str, Any], machine: str, directory: Path) -> list[Path]:
    """Draw the measured groups. Return the written files."""
    kinds = {"operations": _operations, "bulk": _bulk, "latency": _latency}
    written = []
    directory.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for name, plot in kinds.items():
            if name in groups:
                figure = plot(groups[name])
                figure.text(0.01, 0.005, machine, fontsize=6, color="#555555")
                path = directory / f"{name}.svg"
                # No date: the same figures give the same file.
                figure.savefig(path, format="svg", metadata={"Date": None})
                written.append(path)
    return written


def _figure(columns: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(9.0, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))  # type: ignore[union-attr,call-arg]
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(axis="y", which="major", color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    return figure, list(axes)


def _operations(group: Mapping[str, Any]) -> Figure:
    """Bars show the median, and lines the least and the most of the rounds. Client and daemons are unpinned."""
    found = group["placements"][UNPINNED]
    figure, (time, cpu) = _figure(2, 4.4)
    latency = found["microseconds"]
    for ax in time, cpu:
        ax.set_xticks(range(len(latency)), list(latency), rotation=35, ha="right")
    width = 0.85 / len(found["systems"])
    for number, name in enumerate(found["systems"]):
        places = [n + (number - (len(found["systems"]) - 1) / 2) * width for n in range(len(latency))]
        values = [row[name] for row in latency.values()]
        middle = [statistics.median(its) for its in values]
        ends = [
            [m - min(its) for m, its in zip(middle, values, strict=True)],
            [max(its) - m for m, its in zip(middle, values, strict=True)],
        ]
        bars = time.bar(places, middle, width, color=COLOURS[name], edgecolor=COLOURS[name], label=name)
        for bar, operation in zip(bars, latency, strict=True):
            bar.set_fill(name not in found["cached"][operation])
        time.errorbar(places, middle, ends, fmt="none", ecolor="black", elinewidth=0.7)
        both = [
            statistics.median(found["daemon_cpu_microseconds"][op][name])
            + statistics.median(found["client_cpu_microseconds"][op][name])
            for op in latency
        ]
        cpu.bar(places, both, width, color=COLOURS[name])
    time.set_title("time an operation, us (lines: least to most; hollow: without the daemon)", fontsize=9)
    cpu.set_title("CPU time an operation, daemon + client, us", fontsize=9)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _lines(ax: Axes, by_number: Mapping[Any, Sequence[float]], label: str, colour: str, style: str = "-") -> None:
    """Medians as a line, the rounds' spread as a band. Keys from JSON may be strings."""
    numbers = [int(number) for number in by_number]
    values = list(by_number.values())
    ax.plot(numbers, [statistics.median(v) for v in values], style, color=colour, label=label, marker="o", markersize=3)
    ax.fill_between(numbers, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, linewidth=0)


def _latency(found: Mapping[str, Any]) -> Figure:
    kinds = ("open+read+close", "pread", "create+write+close")
    figure, axes = _figure(len(kinds), 4.0)
    for ax, kind in zip(axes, kinds, strict=True):
        for name, by_count in found["pages"][kind].items():
            _lines(ax, by_count, f"{name}, by pages", COLOURS[name])
        for name, by_count in found["backups"][kind].items():
            _lines(ax, by_count, f"{name}, by backups", COLOURS[name], "--")
        ax.set(xscale="log", title=f"{kind}, us")
        ax.xaxis.set_major_formatter("{x:,.0f}")
    axes[len(axes) // 2].set_xlabel("number of pages or backups")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _bulk(found: Mapping[str, Any]) -> Figure:
    sweep = found["sweep_mib_per_second"]
    figure, axes = _figure(len(sweep), 4.0)
    for ax, (way, by_name) in zip(axes, sweep.items(), strict=True):
        shades = iter(SHADES)
        for name, by_size in by_name.items():
            _lines(ax, by_size, name, COLOURS.get(name) or next(shades))
        sizes = [int(size) for size in next(iter(by_name.values()))]
        ax.set(xscale="log", title=f"{way}, MiB/s", xlabel="request size")
        ax.set_xticks(sizes, list(map(_size_text, sizes)))
        ax.minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _size_text(size: int) -> str:
    return next(f"{size // unit} {name}" for unit, name in UNITS if size >= unit)
