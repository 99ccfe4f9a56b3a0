"""Targets, and tables in plain text that is also Markdown."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Target", "bytes_text", "ratio", "ratios", "spread", "table", "targets_table"]


@dataclass(frozen=True)
class Target:
    """A bound and the measured figure, which is None if it could not be measured."""

    what: str
    measured: float | None
    bound: float
    at_most: bool = True  # else at least
    unit: str = ""  # "" for a ratio
    note: str = ""

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    @property
    def verdict(self) -> str:
        return "not measured" if self.measured is None else "met" if self.met else "MISSED"

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "verdict": self.verdict}


def ratios(values: Sequence[float], to: Sequence[float]) -> list[float]:
    """The ratio of each round, because noise affects both values of a round in the same way."""
    return [value / other for value, other in zip(values, to, strict=True)]


def ratio(values: Sequence[float] | None, to: Sequence[float] | None) -> float | None:
    """The median of the rounds' ratios; None if one of the two was not measured."""
    return statistics.median(ratios(values, to)) if values and to else None


def spread(values: Sequence[float] | None, digits: int = 1) -> str:
    """Median, least and most."""
    if not values:
        return "-"
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def bytes_text(size: int) -> str:
    for unit, shift in ("GiB", 30), ("MiB", 20), ("KiB", 10):
        if size >> shift and not size % (1 << shift):
            return f"{size >> shift} {unit}"
    return f"{size} B"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with its first column aligned to the left, and the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def text(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join((first, *others))} |"

    rule = "|".join("-" * (width + 1) + ("-" if not column else ":") for column, width in enumerate(widths))
    return "\n".join((text(lines[0]), f"|{rule}|", *map(text, lines[1:])))


def targets_table(targets: Iterable[Target]) -> str:
    def row(target: Target) -> tuple[str, str, str, str]:
        unit = f" {target.unit}" if target.unit else ""
        measured = "-" if target.measured is None else f"{target.measured:.3g}{unit}"
        what = target.what + (f" ({target.note})" if target.note else "")
        return what, measured, f"{'at most' if target.at_most else 'at least'} {target.bound:g}{unit}", target.verdict

    return table(("target", "measured", "wanted", "verdict"), map(row, targets))
