"""The requests of the last seconds, which are noted at each request, and summed up when somebody asks.

Compiled code writes them to a ring, which takes a few ns::

    entry   node 8 | pid 4 | uid 4 | opcode 1, ns 7 | end of the request, ns 8     (bytes)

Python appends them to `latest`. That would take 0.2 us for each, or 2 % of a read, so of short requests it is done for
one in eight, chosen by the clock. Each then counts for eight.

Concurrency: one thread. While the sums are made, others are served.
"""

import json
import struct
import time
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import chain, islice

from ..errors import TtmfsError
from ..linux.fuse_protocol import Request
from ..linux.system_calls import XATTR_SIZE_MAX
from ..stores.time_slices import TimeSlices
from .inodes import backup_of

__all__ = ["ENTRIES", "RecentRequests"]

ENTRIES, LATEST = 4096, 512
"""Requests that compiled code and Python keep. The former is a power of two."""

WINDOW = 5_000_000_000
"""How old a request may be to be shown, in ns."""

SHORT = 50_000
"""Longest time of a short request, in ns."""

SAMPLE, SAMPLED = 0b111 << 8, 8
"""A short request is noted if these bits of the time in ns are 0: one in SAMPLED."""

AT_ONCE = 256
"""Requests that are looked at before others are served."""

_ENTRY = struct.Struct("=QIIQQ")
_OPCODE_SHIFT = 56
_NS = (1 << _OPCODE_SHIFT) - 1

Entry = tuple[int, int, int, int, int, int, int]
"""Node, pid, uid, opcode, ns, end, and for how many requests it stands."""


class RecentRequests:
    """Those of one daemon. `names` are the names of requests by opcode."""

    def __init__(self) -> None:
        self.ring = array("Q", bytes(_ENTRY.size * ENTRIES))
        self.written = array("Q", [0])
        """How many requests compiled code has written to the ring."""
        self.latest: deque[tuple[Request, int, int]] = deque(maxlen=LATEST)
        """Requests that Python answered, how many ns that took, and when it ended by time.perf_counter_ns()."""
        self.names: dict[int, str] = {}
        self._began = time.perf_counter_ns()

    async def text(self, slices: TimeSlices, name_of: Callable[[int], str]) -> str:
        """The sums by backup, process, user and operation as JSON, with the time in seconds that they cover.

        If they do not fit into an extended attribute, those that took the least time are left out. A backup is null if
        a request was about none or if it has ended. `name_of` gives the name of a backup, or raises TtmfsError.
        """
        now, work = time.perf_counter_ns(), slices.begin()
        oldest, entries = self._since(now), self._entries()
        sums: defaultdict[tuple[int, int, int, int], list[int]] = defaultdict(lambda: [0, 0])  # count, ns
        while part := list(islice(entries, AT_ONCE)):
            for node, pid, uid, opcode, ns, end, weight in part:
                if end >= oldest:
                    total = sums[backup_of(node), pid, uid, opcode]
                    total[0] += weight
                    total[1] += weight * ns
            if work.slice_is_over():
                await work.rest()
        rows, room = list[str](), XATTR_SIZE_MAX - 100
        for (backup, pid, uid, opcode), total in sorted(sums.items(), key=lambda item: -item[1][1]):
            row = json.dumps([_name(backup, name_of), pid, uid, self.names.get(opcode, str(opcode)), *total])
            room -= len(row) + 1
            if room < 0:
                break
            rows.append(row)
            if work.slice_is_over():
                await work.rest()
        seconds = max(now - oldest, 1) / 1e9
        return f'{{"seconds":{seconds:.6f},"left_out":{len(sums) - len(rows)},"requests":[{",".join(rows)}]}}'

    def _since(self, now: int) -> int:
        """From when on all requests are known, within WINDOW."""
        since = max(now - WINDOW, self._began)
        if self.written[0] >= ENTRIES:
            *_, end = _ENTRY.unpack_from(self.ring, self.written[0] % ENTRIES * _ENTRY.size)
            since = max(since, end)
        if len(self.latest) == LATEST:
            since = max(since, self.latest[0][2])
        return since

    def _entries(self) -> Iterator[Entry]:
        """All that is known now, also while more requests come."""
        ring = self.ring.tobytes()[: min(self.written[0], ENTRIES) * _ENTRY.size]
        latest = list(self.latest)
        return chain(
            ((node, pid, uid, took >> _OPCODE_SHIFT, took & _NS, end, 1)
             for node, pid, uid, took, end in _ENTRY.iter_unpack(ring)),
            ((request.node, request.pid, request.uid, request.opcode, ns, end, SAMPLED if ns <= SHORT else 1)
             for request, ns, end in latest),
        )  # fmt: skip


def _name(backup: int, name_of: Callable[[int], str]) -> str | None:
    try:
        return name_of(backup) if backup else None
    except TtmfsError:
        return None
