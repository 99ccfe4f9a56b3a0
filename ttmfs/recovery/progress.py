"""How far a request got that is carried out in steps, noted where another daemon can find it."""

__all__ = ["Progress"]


class Progress:
    """How far a request got: a number that only grows, and outlasts the daemon. 0: nothing is done yet."""

    __slots__ = ("_place", "_table", "done")

    def __init__(self, table: "memoryview | None" = None, place: int = 0) -> None:
        self._table, self._place = table, place
        self.done: int = table[place] if table else 0

    def reach(self, done: int) -> None:
        """Note that so much is done. To be called before anyone else is served."""
        self.done = done
        if self._table:
            self._table[self._place] = done
