"""What is counted, and its text in Prometheus' exposition format. Every metric is declared here, with unit and meaning.

Counters are kept in the state, and go on from one daemon to the next. Gauges are asked for when the text is made, so
that they cost nothing between.

Concurrency: one thread. While a text is made others are served between some backups and the next.
"""

import errno
from collections.abc import Iterable

from ..errors import TtmfsError
from ..model.pool import Pool, bytes_avail
from ..recovery.state import State
from ..version import __version__

__all__ = ["Metrics"]

BOUNDS = (12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32)
"""Upper bounds of the buckets of durations, as powers of two of ns: 4 us to 4.3 s, each four times the one before."""


class _Places(dict[str, tuple[int, list[int]]]):
    """Of an operation: where in the state's values the ns are that it took in all, and where each bucket's count is.

    The latter by the bit length of a duration in ns. A row of the state has two buckets.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def __missing__(self, operation: str) -> tuple[int, list[int]]:
        place = self._state.at(f"operation {operation}")
        buckets = [self._state.at(f"duration {half} {operation}") for half in range(len(BOUNDS) // 2 + 1)]
        by_length = [
            next((n for n, bound in enumerate(BOUNDS) if length <= bound), len(BOUNDS)) for length in range(65)
        ]
        self[operation] = found = place + 1, [buckets[n // 2] + n % 2 for n in by_length]
        return found


class Metrics:
    """The counters of one mount, by operation."""

    def __init__(self, state: State) -> None:
        self.values = state.values
        self.places = _Places(state)
        self._state = state

    def count_error(self, operation: str, number: int) -> None:
        """Count an answer that was an errno."""
        self.values[self._state.at(f"error {operation} {errno.errorcode[number]}")] += 1

    def errors(self, operation: str, number: int) -> int:
        """How often an operation was answered with an errno."""
        return self._state.get(f"error {operation} {errno.errorcode[number]}")

    def place(self, what: str) -> int:
        """Where in `values` the count of something is. Behind it is the time that it took, in ns."""
        return self._state.at(what)

    def count_page_in(self, ns: int) -> None:
        """Count a request that waited for pages to be brought in, and for how long."""
        place = self._state.at("page in")
        self.values[place] += 1
        self.values[place + 1] += ns

    def count_handover(self) -> None:
        """Count a backup's descriptor that was given to someone."""
        self.values[self._state.at("handover")] += 1

    async def text(self, pool: Pool) -> bytes:
        """All metrics, with the gauges of a pool as of now."""
        swapped, pages = await _swapped(pool), await pool.count_pages()  # first: nothing else of it waits
        room, page_size, text = pool.room(), pool.page_size, _Text()
        text.family("build_info", "gauge", "The version that serves.", [(f'{{version="{__version__}"}}', 1)])
        self._operations(text)
        text.family(
            "restarts_total", "counter", "Daemons that took the mount over from one before.", self._sum("restarts")
        )
        for found, what in ("hits", "that found a request"), ("misses", "that found none"):
            key = f"busy poll {found}"
            text.family(f"busy_poll_{found}_total", "counter", f"Waits by polling {what}.", self._sum(key))
            text.family(
                f"busy_poll_{found}_seconds_total", "counter", f"Time spent polling {what}.", self._seconds(key)
            )
        text.family(
            "page_ins_total", "counter", "Requests that waited in a thread for swap or a disk.", self._sum("page in")
        )
        text.family("page_in_seconds_total", "counter", "Time that they waited.", self._seconds("page in"))
        text.family(
            "page_ins_waiting", "gauge", "Requests that wait for swap or a disk.", [("", pool.store.waiting.count)]
        )
        text.family("handovers_total", "counter", "Descriptors of backups given to programs.", self._sum("handover"))

        text.family("backups", "gauge", "Backups there are.", [("", room.backups)])
        where = {"disk": pages} if swapped is None else {"resident": max(0, pages - swapped), "swapped": swapped}
        states = [(_labels(state=state), count) for state, count in where.items()]
        text.family("pages", "gauge", "Pages stored, by where they are.", states)
        states = [(_labels(state=state), count * page_size) for state, count in where.items()]
        text.family("stored_bytes", "gauge", "Bytes of the pages stored, by where they are.", states)
        text.family("size_bytes", "gauge", "The budget.", [("", room.size)])
        text.family(
            "available_bytes", "gauge", "What can be stored before budget or reserve end.", [("", room.available)]
        )
        text.family("page_size_bytes", "gauge", "Bytes a page.", [("", page_size)])
        text.family("swap_free_bytes", "gauge", "Free swap of the machine.", [("", bytes_avail())])
        return text.encode()

    def _operations(self, text: "_Text") -> None:
        operations = self._state.keys("operation")
        durations: list[tuple[str, float]] = []
        for operation in operations:
            place, by_length = self.places[operation]
            total = 0
            for bound in BOUNDS:
                total += self.values[by_length[bound]]
                durations.append((f"_bucket{_labels(operation=operation, le=2**bound / 1e9)}", total))
            total += self.values[by_length[64]]
            durations.append((f"_bucket{_labels(operation=operation, le='+Inf')}", total))
            durations.append((f"_sum{_labels(operation=operation)}", self.values[place] / 1e9))
            durations.append((f"_count{_labels(operation=operation)}", total))
        text.family("operation_duration_seconds", "histogram", "Time from a request to its answer.", durations)
        errors: list[tuple[str, float]] = []
        for key in self._state.keys("error"):
            operation, _, name = key.partition(" ")
            errors.append((_labels(operation=operation, errno=name), self._state.get(f"error {key}")))
        text.family("operation_errors_total", "counter", "Requests answered with an error.", errors)

    def _sum(self, key: str) -> list[tuple[str, float]]:
        return [("", self._state.get(key))]

    def _seconds(self, key: str) -> list[tuple[str, float]]:
        return [("", self.values[self._state.at(key) + 1] / 1e9)]


class _Text:
    """Families of samples, in the order given."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, help_: str, samples: Iterable[tuple[str, float]]) -> None:
        """Add one: samples are what follows the name, and the value."""
        self._lines += f"# HELP ttmfs_{name} {help_}", f"# TYPE ttmfs_{name} {kind}"
        self._lines += (f"ttmfs_{name}{rest} {value}" for rest, value in samples)

    def encode(self) -> bytes:
        return "\n".join(self._lines).encode() + b"\n"


async def _swapped(pool: Pool) -> int | None:
    """How many pages of all backups are swapped out; None if they lie on a disk, of which there is no such count."""
    store, swapped = pool.store, 0
    work = store.waiting.turns.begin()
    if not store.in_memory:
        return None
    for id in list(store.ids_after(0)) if store.swap.used else ():
        try:
            swapped += await pool.backup(id).count_swapped()
        except TtmfsError:  # it went meanwhile
            continue
        if work.is_due():
            await work.rest()
    return swapped


def _labels(**labels: object) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
