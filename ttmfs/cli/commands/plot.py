"""The picture of ``map -o``: which pages of a backup exist, and where they are, drawn with matplotlib.

A cell represents a few consecutive pages. Its colour shows where they are, and its shade shows how many of
them exist. matplotlib is an extra (``ttmfs[plot]``) and is imported only here.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import sys
import warnings
from typing import TYPE_CHECKING

from ...quoting import quoted
from .command import CommandError
from .terminal import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .cells import Cell, View

__all__ = ["FORMATS", "check_is_installed", "picture"]

FORMATS = ("png", "svg", "pdf")

ACROSS, DOWN = 64, 32
"""The most cells in a row, and the most rows."""

ABSENT = "#e9ebee"
IN_MEMORY = ("#fdd0a2", "#fda050", "#e2620a")
MIXED = ("#d6c4e0", "#b287c4", "#8846a0")
SWAPPED_OUT = ("#b0d0ec", "#62a0d6", "#1860ae")
"""Three shades of each: up to a third of the pages exist, some, all."""

MOST_LABELS = 6
"""The most labels on an axis, so that they do not overlap."""


def check_is_installed() -> None:
    """Raise CommandError, which says what to install, if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError(
            f"a picture needs matplotlib: {quoted(sys.executable)} -m pip install 'matplotlib>=3.8,<4' "
            "(the extra ttmfs[plot]); without -o the map is drawn as text"
        )


def picture(name: str, view: View, kind: str) -> bytes:
    """The picture of a view, as the content of a file of `kind`, one of FORMATS."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, across = max(1, -(-len(view.cells) // ACROSS)), min(ACROSS, max(1, len(view.cells)))
    figure = Figure(figsize=(9.6, 2.6 + 0.13 * max(rows, 8)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_cells(axes, view, rows, across)
    _label_axes(axes, view, rows, across)
    _add_legend(axes, view)
    axes.set_title(name, loc="left", fontweight="bold", parse_math=False)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a script that the font lacks
        figure.savefig(file, format=kind, dpi=150)
    return file.getvalue()


def _colour(cell: Cell) -> str:
    return (IN_MEMORY, MIXED, SWAPPED_OUT)[cell.location][cell.fullness - 1] if cell.fullness else ABSENT


def _draw_cells(axes: Axes, view: View, rows: int, across: int) -> None:
    from matplotlib.colors import to_rgb

    colours = [to_rgb(_colour(cell)) for cell in view.cells]
    colours += [(1.0, 1.0, 1.0)] * (rows * across - len(colours))
    image = [colours[start : start + across] for start in range(0, len(colours), across)]
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, across, rows, 0))
    axes.set_xticks(range(across + 1), minor=True)
    axes.set_yticks(range(rows + 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label_axes(axes: Axes, view: View, rows: int, across: int) -> None:
    """Handles on the left and bytes on the right, of the first cell in a row; pages within a row below."""
    some = range(0, rows, -(-rows // MOST_LABELS))
    first_pages = [view.first + row * ACROSS * view.step for row in some]
    axes.set_yticks([row + 0.5 for row in some], [f"{page + 1:,}" for page in first_pages])
    axes.set_ylabel("handle")
    right = axes.secondary_yaxis("right")
    right.set_yticks([row + 0.5 for row in some], [size(page * view.page_size) for page in first_pages])
    right.set_ylabel("bytes from the start")
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    columns = range(0, across + 1, max(1, across // 8))
    axes.set_xticks(list(columns), [f"+{column * view.step:,}" for column in columns])
    axes.set_xlabel("; ".join(("pages", *view.facts)), wrap=True)


def _add_legend(axes: Axes, view: View) -> None:
    from matplotlib.patches import Patch

    rows = [
        (colour, f"{what}: {pages:,} page{'s' * (pages != 1)}, {size(pages * view.page_size)}")
        for colour, (what, pages) in zip((ABSENT, IN_MEMORY[-1], SWAPPED_OUT[-1]), view.counts.items(), strict=True)
    ]
    if view.swapped and view.step > 1:
        rows.append((MIXED[-1], "cells with both"))
    figure = axes.get_figure(root=True)
    assert figure
    figure.legend(
        handles=[Patch(color=colour, label=label) for colour, label in rows],
        title="paler: fewer of the cell's pages exist" if view.step > 1 else None,
        ncols=2, loc="outside lower center", frameon=False,
    )  # fmt: skip
