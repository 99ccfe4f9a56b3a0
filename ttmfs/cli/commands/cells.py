"""The data of a map: cells of a few consecutive pages, and the part of the backup that they cover."""

from typing import NamedTuple

__all__ = ["Cell", "View"]


class Cell(NamedTuple):
    """Consecutive pages: how many handles they have, how many exist, and how many are swapped out."""

    span: int
    pages: int
    swapped: int

    @property
    def fullness(self) -> int:
        """0 to 3: none, up to a third, some, all."""
        return 0 if not self.pages else 3 if self.pages == self.span else 1 if self.pages * 3 <= self.span else 2

    @property
    def coldness(self) -> int:
        """0 to 2: in memory, both, swapped out."""
        return 0 if not self.swapped else 2 if self.swapped == self.pages else 1


class View(NamedTuple):
    """The part of a backup that a map shows."""

    first: int
    past: int
    limit: int
    step: int
    cells: list[Cell]
    pages: int
    swapped: int
    page_size: int
    knows_swap: bool
