"""The progress of a request that is carried out in steps, noted where the next daemon finds it."""

__all__ = ["Progress"]


class Progress:
    """How much of a request is done: a number that only grows, and outlasts the daemon."""

    __slots__ = ("_place", "_table", "done")

    def __init__(self, table: "memoryview | None" = None, place: int = 0) -> None:
        self._table, self._place = table, place
        self.done: int = table[place] if table else 0

    def reach(self, done: int) -> None:
        """Note how much is done. Call it before another request is served."""
        self.done = done
        if self._table:
            self._table[self._place] = done
