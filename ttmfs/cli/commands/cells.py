"""The data of a map: cells of a few consecutive pages, and the part of the backup that they cover."""

from typing import NamedTuple

from .terminal import size

__all__ = ["Cell", "View"]


class Cell(NamedTuple):
    """Consecutive pages: how many handles they have, how many exist, and how many are swapped out."""

    span: int
    pages: int
    swapped: int

    @property
    def fullness(self) -> int:
        """0 to 3: no page exists, up to a third, some, all."""
        return 0 if not self.pages else 3 if self.pages == self.span else 1 if self.pages * 3 <= self.span else 2

    @property
    def location(self) -> int:
        """0 to 2: all pages are in memory, some are swapped out, all are swapped out."""
        return 0 if not self.swapped else 2 if self.swapped == self.pages else 1


class View(NamedTuple):
    """The part of a backup that a map shows, from the page `first` up to `past`, of `limit` pages."""

    first: int
    past: int
    limit: int
    step: int  # pages in a cell
    cells: list[Cell]
    pages: int
    swapped: int
    page_size: int
    knows_swap: bool  # which pages are swapped out

    @property
    def facts(self) -> list[str]:
        """The text beside the picture."""
        facts = [f"handles {self.first + 1} to {self.past}"]
        if (self.first, self.past) != (0, self.limit):
            facts = [f"{facts[0]} of {self.limit}", "(from the first page stored to the last; --whole shows all)"]
        facts.append(f"a cell is {self.step} page{'s' * (self.step > 1)} ({size(self.step * self.page_size)})")
        if not self.knows_swap:
            facts.append("which pages are swapped out is not known here: the backup's own file is not accessible")
        return facts

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of pages in the legend."""
        in_memory = self.pages - self.swapped
        return {"absent": self.limit - self.pages, "in memory": in_memory, "swapped out": self.swapped}
