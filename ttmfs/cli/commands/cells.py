"""What a map of a backup shows: cells of a few consecutive pages, and the part of the backup that they cover."""

from typing import NamedTuple

__all__ = ["Cell", "View"]


class Cell(NamedTuple):
    """Some pages in a row: how many there could be, are stored, and are swapped out."""

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
    """The part of a backup that is shown, cell by cell."""

    first: int
    past: int
    limit: int
    step: int
    cells: list[Cell]
    pages: int
    swapped: int
    page_size: int
    knows_swap: bool
