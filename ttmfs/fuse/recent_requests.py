"""The requests of the last seconds, which are noted at each request, and summed up when somebody asks.

Compiled code writes them to a ring, which takes a few ns::

    entry   node 8 | pid 4 | uid 4 | opcode 1, ns 7 | end of the request, ns 8     (bytes)

Python appends them to `latest`. That would take 0.2 us for each, or 2 % of a read, so of short requests it is done for
one in eight, chosen by the clock. Each then counts for eight.

Concurrency: one thread. While the sums are made, others are served.
"""

import json
import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import TtmfsError
from ..linux.fuse_protocol import Request
from ..linux.system_calls import XATTR_SIZE_MAX
from ..stores.time_slices import TimeSlices
from .inodes import HANDLE_BITS, MAX_BACKUP_ID

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

_OPCODE_SHIFT = 56
_NS = np.uint64((1 << _OPCODE_SHIFT) - 1)
_FIELDS = np.dtype([("node", "u8"), ("pid", "u4"), ("uid", "u4"), ("took", "u8"), ("end", "u8")])

Entries = np.ndarray[Any, np.dtype[Any]]


class RecentRequests:
    """Those of one daemon. `names` are the names of requests by opcode."""

    def __init__(self) -> None:
        self.ring = array("Q", bytes(_FIELDS.itemsize * ENTRIES))
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
        now = time.perf_counter_ns()
        ring = np.frombuffer(self.ring.tobytes(), _FIELDS)[: min(self.written[0], ENTRIES)]
        parts = ring, await _packed(list(self.latest), slices)
        oldest = max(now - WINDOW, self._began)
        for part, most in zip(parts, (ENTRIES, LATEST), strict=True):
            if len(part) == most:  # it has forgotten what was before
                oldest = max(oldest, int(part["end"].min()))
        entries = np.concatenate(parts)
        is_sample = (np.arange(len(entries)) >= len(ring)) & (entries["took"] & _NS <= SHORT)
        is_shown = entries["end"] >= max(0, oldest)
        sums = _sums(entries[is_shown], np.where(is_sample, SAMPLED, 1)[is_shown].astype("u8"))
        rows, room = list[str](), XATTR_SIZE_MAX - 100
        for backup, pid, uid, opcode, count, ns in sums:
            row = json.dumps([_name(backup, name_of), pid, uid, self.names.get(opcode, str(opcode)), count, ns])
            room -= len(row) + 1
            if room < 0:
                break
            rows.append(row)
        seconds = max(now - oldest, 1) / 1e9
        return f'{{"seconds":{seconds:.6f},"left_out":{len(sums) - len(rows)},"requests":[{",".join(rows)}]}}'


async def _packed(latest: list[tuple[Request, int, int]], slices: TimeSlices) -> Entries:
    """Requests that Python noted, as entries of the ring."""
    work, packed = slices.begin(), np.zeros(len(latest), _FIELDS)
    for start in range(0, len(latest), AT_ONCE):
        part = latest[start : start + AT_ONCE]
        packed[start : start + AT_ONCE] = [
            (request.node, request.pid, request.uid, request.opcode << _OPCODE_SHIFT | ns, end)
            for request, ns, end in part
        ]
        if work.slice_is_over():
            await work.rest()
    return packed


def _name(backup: int, name_of: Callable[[int], str]) -> str | None:
    try:
        return name_of(backup) if backup else None
    except TtmfsError:
        return None


def _sums(entries: Entries, weights: "np.ndarray[Any, np.dtype[np.uint64]]") -> list[tuple[int, ...]]:
    """Backup, pid, uid, opcode, count and ns of each kind of request. The kind that took the most time comes first."""
    if not len(entries):
        return []
    opcode, ns = entries["took"] >> np.uint64(_OPCODE_SHIFT), (entries["took"] & _NS) * weights
    backup = entries["node"] >> np.uint64(HANDLE_BITS) & np.uint64(MAX_BACKUP_ID)
    about, caller = backup << np.uint64(8) | opcode, entries["pid"] | entries["uid"].astype("u8") << np.uint64(32)
    order = np.lexsort((caller, about))
    about, caller, ns, weights = about[order], caller[order], ns[order], weights[order]
    is_first = np.r_[True, (about[1:] != about[:-1]) | (caller[1:] != caller[:-1])]
    firsts = np.flatnonzero(is_first)
    counts, totals = np.add.reduceat(weights, firsts), np.add.reduceat(ns, firsts)
    return sorted(
        (
            (what >> 8, who & 0xFFFFFFFF, who >> 32, what & 0xFF, count, total)
            for what, who, count, total in zip(
                about[firsts].tolist(), caller[firsts].tolist(), counts.tolist(), totals.tolist(), strict=True
            )
        ),
        key=lambda row: -row[-1],
    )
