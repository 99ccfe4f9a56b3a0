"""The daemon's metrics, in Prometheus' exposition format. Every metric is declared here, with unit and meaning.

Counters begin at 0 with each daemon, except `restarts_total`. Gauges are computed when the text is made, so they cost
nothing until then.

Concurrency: one thread. While a text is made, others are served between two backups.
"""

import errno
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable

from ..errors import TtmfsError
from ..model.pool import Pool, bytes_avail
from ..version import __version__

__all__ = ["Metrics"]

BOUNDS = (12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32)
"""Upper bounds of the buckets of durations, as exponents of 2, in ns: 4 us to 4.3 s, each four times the one before."""

BUCKET_OF_LENGTH = tuple(
    next((n for n, bound in enumerate(BOUNDS) if length <= bound), len(BOUNDS)) for length in range(65)
)
"""The bucket of a duration, by the bit length of its ns."""

TOTAL_NS = len(BOUNDS) + 1
"""The index of the sum of all durations, after the buckets."""

Samples = Iterable[tuple[str, float]]
"""What follows a metric's name, and the value."""


class Metrics:
    """The counters of one daemon.

    `restarts` is the number of daemons that have taken this mount over. `loop` says what answers plain requests.
    """

    def __init__(self, restarts: int = 0, loop: str = "python") -> None:
        self.restarts, self.loop = restarts, loop
        self._since = time.time()
        self.durations: defaultdict[str, array[int]] = defaultdict(lambda: array("q", bytes(8 * (TOTAL_NS + 1))))
        """By operation: the counts of the buckets, and the sum. Compiled code counts in the same arrays."""
        self.errors: Counter[tuple[str, int]] = Counter()  # by operation and errno
        self.busy_poll = [0, 0, 0, 0]  # hits, ns of hits, misses, ns of misses
        self._page_ins = self._page_in_ns = 0

    def count(self, operation: str, ns: int) -> None:
        """Count a request that was answered, and how long that took."""
        counts = self.durations[operation]
        counts[BUCKET_OF_LENGTH[ns.bit_length()]] += 1
        counts[TOTAL_NS] += ns

    def count_page_in(self, ns: int) -> None:
        """Count a request that waited for pages to be brought in, and how long."""
        self._page_ins += 1
        self._page_in_ns += ns

    async def text(self, pool: Pool) -> bytes:
        """All metrics, with the gauges of a pool as of now."""
        swapped, pages = await _swapped(pool), await pool.count_pages()  # first: nothing else waits
        room, lines = pool.room(), list[str]()

        def family(name: str, kind: str, meaning: str, samples: Samples) -> None:
            lines.extend((f"# HELP ttmfs_{name} {meaning}", f"# TYPE ttmfs_{name} {kind}"))
            lines.extend(f"ttmfs_{name}{rest} {value}" for rest, value in samples)

        serving = _labels(version=__version__, loop=self.loop)
        family("build_info", "gauge", "The version that serves, and what answers plain requests.", [(serving, 1)])
        family("operation_duration_seconds", "histogram", "Time from a request to its answer.", self._histograms())
        family("operation_errors_total", "counter", "Requests answered with an error.", self._errors())
        hits, hits_ns, misses, misses_ns = self.busy_poll
        for name, value, meaning in (
            ("restarts_total", self.restarts, "Daemons that took the mount over from one before."),
            ("busy_poll_hits_total", hits, "Waits by polling that found a request."),
            ("busy_poll_hits_seconds_total", hits_ns / 1e9, "Time spent polling that found a request."),
            ("busy_poll_misses_total", misses, "Waits by polling that found no request."),
            ("busy_poll_misses_seconds_total", misses_ns / 1e9, "Time spent polling that found no request."),
            ("page_ins_total", self._page_ins, "Requests that waited in a thread for swap or a disk."),
            ("page_in_seconds_total", self._page_in_ns / 1e9, "Time that they waited."),
        ):
            family(name, "counter", meaning, [("", value)])
        where = {"disk": pages} if swapped is None else {"resident": max(0, pages - swapped), "swapped": swapped}
        for name, factor, meaning in ("pages", 1, "Pages"), ("stored_bytes", pool.page_size, "Bytes of the pages"):
            samples = [(_labels(state=state), count * factor) for state, count in where.items()]
            family(name, "gauge", f"{meaning} stored, by where they are.", samples)
        for name, value, meaning in (
            ("page_ins_waiting", pool.blocking_io.waiting, "Requests that wait for swap or a disk."),
            ("backups", room.backups, "Backups there are."),
            ("size_bytes", room.size, "The budget."),
            ("available_bytes", room.available, "What can be stored before budget or reserve end."),
            ("page_size_bytes", pool.page_size, "Bytes a page."),
            ("swap_free_bytes", bytes_avail(), "Free swap of the machine."),
            ("serving_since_seconds", self._since, "When this daemon began to serve, in seconds since 1970."),
        ):
            family(name, "gauge", meaning, [("", value)])
        return "\n".join(lines).encode() + b"\n"

    def _histograms(self) -> Samples:
        for operation, counts in sorted(self.durations.items()):
            if not any(counts):
                continue
            total = 0
            for bound, count in zip(BOUNDS, counts, strict=False):
                total += count
                yield f"_bucket{_labels(operation=operation, le=2**bound / 1e9)}", total
            total += counts[len(BOUNDS)]
            yield f"_bucket{_labels(operation=operation, le='+Inf')}", total
            yield f"_sum{_labels(operation=operation)}", counts[TOTAL_NS] / 1e9
            yield f"_count{_labels(operation=operation)}", total

    def _errors(self) -> Samples:
        for (operation, number), count in sorted(self.errors.items()):
            yield _labels(operation=operation, errno=errno.errorcode[number]), count


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
        if work.slice_is_over():
            await work.rest()
    return swapped


def _labels(**labels: object) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
