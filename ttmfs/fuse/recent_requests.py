"""The requests of the last seconds, in a ring that is written at each request and summed up when somebody asks.

::

    entry   node 8 | pid 4 | uid 4 | opcode 1, ns 7 | end of the request, ns 8     (bytes)

The compiled code writes the same entries. An entry costs it a few ns, and Python 0.3 us. ``ttmfs top`` shows the sums.

Concurrency: one thread.
"""

import json
import struct
import time
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import TtmfsError
from ..linux.fuse_protocol import Request
from ..linux.system_calls import XATTR_SIZE_MAX
from .inodes import HANDLE_BITS, MAX_BACKUP_ID

__all__ = ["ENTRIES", "RecentRequests"]

ENTRIES = 4096
"""A power of two."""

WINDOW = 5_000_000_000
"""How old a request may be to be shown, in ns."""

_OPCODE_SHIFT = 56
_ENTRY = struct.Struct("=QIIQQ")
_FIELDS = np.dtype([("node", "u8"), ("pid", "u4"), ("uid", "u4"), ("took", "u8"), ("end", "u8")])


class RecentRequests:
    """The ring of one daemon. `names` are the names of requests by opcode."""

    def __init__(self) -> None:
        self.ring = array("Q", bytes(_ENTRY.size * ENTRIES))
        self.written = array("Q", [0])
        """How many requests were written since the start."""
        self.names: dict[int, str] = {}
        self._began = time.perf_counter_ns()

    def note(self, request: Request, ns: int, end: int) -> None:
        """Write a request that was answered after some ns, at a time of time.perf_counter_ns()."""
        written = self.written[0]
        at = written % ENTRIES * _ENTRY.size
        took = request.opcode << _OPCODE_SHIFT | ns
        _ENTRY.pack_into(self.ring, at, request.node, request.pid, request.uid, took, end)
        self.written[0] = written + 1

    def text(self, name_of: Callable[[int], str]) -> str:
        """The sums by backup, process, user and operation as JSON, with the time in seconds that they cover.

        If they do not fit into an extended attribute, those that took the least time are left out. A backup is null if
        a request was about none or if it has ended. `name_of` gives the name of a backup, or raises TtmfsError.
        """
        now, written = time.perf_counter_ns(), self.written[0]
        entries = np.frombuffer(self.ring, _FIELDS)[: min(written, ENTRIES)]
        entries = entries[entries["end"] >= max(0, now - WINDOW)]
        oldest = int(entries["end"].min()) if len(entries) == ENTRIES else max(now - WINDOW, self._began)
        rows: list[str] = []
        sums = _sums(entries)
        room = XATTR_SIZE_MAX - 100
        for backup, pid, uid, opcode, count, ns in sums:
            row = json.dumps([_name(backup, name_of), pid, uid, self.names.get(opcode, str(opcode)), count, ns])
            room -= len(row) + 1
            if room < 0:
                break
            rows.append(row)
        seconds = max(now - oldest, 1) / 1e9
        return f'{{"seconds":{seconds:.6f},"left_out":{len(sums) - len(rows)},"requests":[{",".join(rows)}]}}'


def _name(backup: int, name_of: Callable[[int], str]) -> str | None:
    try:
        return name_of(backup) if backup else None
    except TtmfsError:
        return None


def _sums(entries: "np.ndarray[Any, np.dtype[Any]]") -> list[tuple[int, ...]]:
    """Backup, pid, uid, opcode, count and ns of each kind of request. The kind that took the most time comes first."""
    if not len(entries):
        return []
    shift = np.uint64(_OPCODE_SHIFT)
    opcode, ns = entries["took"] >> shift, entries["took"] & np.uint64((1 << _OPCODE_SHIFT) - 1)
    backup = entries["node"] >> np.uint64(HANDLE_BITS) & np.uint64(MAX_BACKUP_ID)
    about, caller = backup << np.uint64(8) | opcode, entries["pid"] | entries["uid"].astype("u8") << np.uint64(32)
    order = np.lexsort((caller, about))
    about, caller, ns = about[order], caller[order], ns[order]
    is_first = np.r_[True, (about[1:] != about[:-1]) | (caller[1:] != caller[:-1])]
    firsts = np.flatnonzero(is_first)
    counts, totals = np.diff(np.r_[firsts, len(order)]), np.add.reduceat(ns, firsts)
    return sorted(
        (
            (what >> 8, who & 0xFFFFFFFF, who >> 32, what & 0xFF, count, total)
            for what, who, count, total in zip(
                about[firsts].tolist(), caller[firsts].tolist(), counts.tolist(), totals.tolist(), strict=True
            )
        ),
        key=lambda row: -row[-1],
    )
