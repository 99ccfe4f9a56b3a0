"""What is counted, and its text in Prometheus' exposition format. Every metric is declared here, with unit and meaning.

Counters are kept in the state, so the next daemon goes on with them. Gauges are asked for when the text is made, so
they cost nothing until then.

Concurrency: one thread. While a text is made, others are served between two backups.
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

COUNTERS = (
    ("restarts_total", "restarts", 0, "Daemons that took the mount over from one before."),
    ("busy_poll_hits_total", "busy poll hits", 0, "Waits by polling that found a request."),
    ("busy_poll_hits_seconds_total", "busy poll hits", 1, "Time spent polling that found a request."),
    ("busy_poll_misses_total", "busy poll misses", 0, "Waits by polling that found none."),
    ("busy_poll_misses_seconds_total", "busy poll misses", 1, "Time spent polling that found none."),
    ("page_ins_total", "page in", 0, "Requests that waited in a thread for swap or a disk."),
    ("page_in_seconds_total", "page in", 1, "Time that they waited."),
    ("handovers_total", "handover", 0, "Descriptors of backups given to programs."),
)
"""Name, key in the state, 0 for the count or 1 for the sum of ns that follows it, and meaning."""

Samples = Iterable[tuple[str, float]]
"""What follows a metric's name, and the value."""


class _Durations(dict[str, tuple[int, list[int]]]):
    """Maps an operation to the indices in the state's values of its total time and of its buckets.

    The buckets are by the bit length of a duration in ns. A row of the state holds two of them.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def __missing__(self, operation: str) -> tuple[int, list[int]]:
        total = self._state.at(f"operation {operation}") + 1
        rows = [self._state.at(f"duration {half} {operation}") for half in range(len(BOUNDS) // 2 + 1)]
        by_length = (
            next((n for n, bound in enumerate(BOUNDS) if length <= bound), len(BOUNDS)) for length in range(65)
        )
        self[operation] = found = total, [rows[n // 2] + n % 2 for n in by_length]
        return found


class Metrics:
    """The counters of one mount. `values` are the state's, by index; `durations` says where an operation's are."""

    def __init__(self, state: State) -> None:
        self.values = state.values
        self.durations = _Durations(state)
        self._state = state

    def count_error(self, operation: str, number: int) -> None:
        """Count an answer that was an errno."""
        self.values[self._state.at(f"error {operation} {errno.errorcode[number]}")] += 1

    def errors(self, operation: str, number: int) -> int:
        """How often an operation was answered with an errno."""
        return self._state.get(f"error {operation} {errno.errorcode[number]}")

    def place(self, key: str) -> int:
        """The index of a count; its time in ns follows."""
        return self._state.at(key)

    def count_page_in(self, ns: int) -> None:
        """Count a request that waited for pages to be brought in, and how long."""
        place = self._state.at("page in")
        self.values[place] += 1
        self.values[place + 1] += ns

    def count_handover(self) -> None:
        """Count a backup's descriptor that was given to a program."""
        self.values[self._state.at("handover")] += 1

    async def text(self, pool: Pool) -> bytes:
        """All metrics, with the gauges of a pool as of now."""
        swapped, pages = await _swapped(pool), await pool.count_pages()  # first: nothing else waits
        room, lines = pool.room(), list[str]()

        def family(name: str, kind: str, meaning: str, samples: Samples) -> None:
            lines.extend((f"# HELP ttmfs_{name} {meaning}", f"# TYPE ttmfs_{name} {kind}"))
            lines.extend(f"ttmfs_{name}{rest} {value}" for rest, value in samples)

        family("build_info", "gauge", "The version that serves.", [(_labels(version=__version__), 1)])
        family("operation_duration_seconds", "histogram", "Time from a request to its answer.", self._histograms())
        family("operation_errors_total", "counter", "Requests answered with an error.", self._errors())
        for name, key, sum_of_ns, meaning in COUNTERS:
            value = self.values[self._state.at(key) + sum_of_ns]
            family(name, "counter", meaning, [("", value / 1e9 if sum_of_ns else value)])
        where = {"disk": pages} if swapped is None else {"resident": max(0, pages - swapped), "swapped": swapped}
        for name, factor, meaning in ("pages", 1, "Pages"), ("stored_bytes", pool.page_size, "Bytes of the pages"):
            samples = [(_labels(state=state), count * factor) for state, count in where.items()]
            family(name, "gauge", f"{meaning} stored, by where they are.", samples)
        for name, value, meaning in (
            ("page_ins_waiting", pool.blocking_io.count, "Requests that wait for swap or a disk."),
            ("backups", room.backups, "Backups there are."),
            ("size_bytes", room.size, "The budget."),
            ("available_bytes", room.available, "What can be stored before budget or reserve end."),
            ("page_size_bytes", pool.page_size, "Bytes a page."),
            ("swap_free_bytes", bytes_avail(), "Free swap of the machine."),
        ):
            family(name, "gauge", meaning, [("", value)])
        return "\n".join(lines).encode() + b"\n"

    def _histograms(self) -> Samples:
        for operation in self._state.keys("operation"):
            total_time, by_length = self.durations[operation]
            total = 0
            for bound in BOUNDS:
                total += self.values[by_length[bound]]
                yield f"_bucket{_labels(operation=operation, le=2**bound / 1e9)}", total
            total += self.values[by_length[64]]
            yield f"_bucket{_labels(operation=operation, le='+Inf')}", total
            yield f"_sum{_labels(operation=operation)}", self.values[total_time] / 1e9
            yield f"_count{_labels(operation=operation)}", total

    def _errors(self) -> Samples:
        for key in self._state.keys("error"):
            operation, _, name = key.partition(" ")
            yield _labels(operation=operation, errno=name), self._state.get(f"error {key}")


async def _swapped(pool: Pool) -> int | None:
    """How many pages of all backups are swapped out; None if they are on a disk, where there is no such count."""
    swapped, work = 0, pool.blocking_io.slices.begin()
    if not pool.in_memory:
        return None
    for id in list(pool.files.ids_after(0)) if pool.swap.used else ():
        try:
            swapped += await pool.file(id).count_swapped()
        except TtmfsError:  # it was removed meanwhile
            continue
        if work.is_due():
            await work.rest()
    return swapped


def _labels(**labels: object) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
