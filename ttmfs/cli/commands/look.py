"""A look at a mount: its metrics and options, with what can be computed from them.

A child process reads ``.stats`` and ``.config`` (see :mod:`.child_process`). Anyone can serve a mount, so what it
answers is checked here, and shown without control characters.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...linux.mountinfo import Mounted
from ...options import TABLE, OptionError, Options
from ..rescue import open_file
from .mounts import LONGEST_STATS, Place, config, opened

__all__ = ["BEYOND", "Look", "Operation", "given_options", "looked_at"]

BEYOND = 2.0**64
"""No mount counts this far: columns stay narrow whatever a server says."""

SAMPLE = re.compile(r"^ttmfs_([a-z_]{1,60})(?:\{([^}\n]{0,200})\})? ([0-9.e+-]{1,40})$", re.MULTILINE)
LABEL = re.compile(r'([a-z_]{1,20})="([^"]{0,40})"')


class Operation(NamedTuple):
    """The requests of one kind: their number, the sum of their durations in seconds, and the buckets of durations.

    A bucket is (upper bound in seconds, number of requests up to it).
    """

    requests: float
    seconds: float
    buckets: tuple[tuple[float, float], ...]

    def since(self, before: Operation | None) -> Operation:
        """The requests after an earlier look. All of them if the daemon was replaced meanwhile."""
        if before is None or before.requests > self.requests:
            return self
        earlier = dict(before.buckets)
        buckets = tuple((bound, total - earlier.get(bound, 0.0)) for bound, total in self.buckets)
        return Operation(self.requests - before.requests, self.seconds - before.seconds, buckets)

    @property
    def mean(self) -> float | None:
        """Seconds; None if there was no request."""
        return self.seconds / self.requests if self.requests else None

    def quantile(self, share: float) -> float | None:
        """The upper bound, in seconds, of the bucket that holds this share of the requests; None if there was none."""
        return next((bound for bound, total in self.buckets if self.requests and total >= share * self.requests), None)


class Look(NamedTuple):
    """What a mount said at a time of time.monotonic()."""

    at: float
    metrics: dict[str, dict[str, float]]  # by name, and by labels as they are written
    config: dict[str, Any]
    refusals: int | None = None  # None: only root and the mounter may know

    def number(self, name: str, labels: str = "") -> float:
        """The value of a metric; 0 if the mount has none."""
        return self.metrics.get(name, {}).get(labels, 0.0)

    def labels(self, name: str) -> dict[str, str]:
        """The labels of a metric that has one sample."""
        return _labels(next(iter(self.metrics.get(name, {})), ""))

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The values of a metric by one label."""
        return {_labels(labels).get(label, ""): value for labels, value in self.metrics.get(name, {}).items()}

    @property
    def errors(self) -> list[tuple[str, str, int]]:
        """Operation, errno and number of the requests that were answered with an error, the most frequent first."""
        found = [
            ((labels := _labels(text)).get("operation", "?"), labels.get("errno", "?"), int(count))
            for text, count in self.metrics.get("operation_errors_total", {}).items()
        ]
        return sorted(found, key=lambda row: -row[2])

    @property
    def operations(self) -> dict[str, Operation]:
        """The requests since the daemon started, by name."""
        name = "operation_duration_seconds"
        buckets: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for text, total in self.metrics.get(f"{name}_bucket", {}).items():
            labels = _labels(text)
            with contextlib.suppress(ValueError):
                buckets[labels.get("operation", "?")].append((float(labels.get("le", "inf")), total))
        sums = self.by_label(f"{name}_sum", "operation")
        return {
            operation: Operation(count, sums.get(operation, 0.0), tuple(sorted(buckets[operation])))
            for operation, count in self.by_label(f"{name}_count", "operation").items()
        }


def _labels(text: str) -> dict[str, str]:
    return dict(LABEL.findall(text))


def looked_at(mount: Mounted) -> Iterator[dict[str, Any]]:
    """The fields of a Look. To be run in a child process. OSError if the mount does not answer."""
    with opened(mount.path) as root:
        at = time.monotonic()
        with open(open_file(".stats", root), "rb") as file:
            text = file.read(LONGEST_STATS).decode(errors="replace")
        refusals = _count_refusals(Place(mount.path, root, mount))
        yield {"at": at, "metrics": _parsed(text), "config": config(root), "refusals": refusals}


def _parsed(text: str) -> dict[str, dict[str, float]]:
    metrics: dict[str, dict[str, float]] = {}
    for name, labels, value in SAMPLE.findall(text):
        with contextlib.suppress(ValueError):
            if abs(number := float(value)) < BEYOND:
                metrics.setdefault(name, {})[labels] = number
    return metrics


def _count_refusals(root: Place) -> int | None:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if (text := root.attribute("refusals")) is not None:
            return len(json.loads(text))
    return None


def given_options(found: Mapping[str, Any], mounter: int) -> str:
    """The options of a mount that differ from their defaults, as ``-o`` has them, from what ``.config`` says."""
    words = []
    for name, option in TABLE.items():
        value = found.get(name)
        if (
            value is None
            or value is False
            or name == "nr_inodes"
            or (name in ("uid", "gid") and found.get("uid") == mounter)
        ):
            continue
        with contextlib.suppress(ValueError, TypeError):  # among them a 0 that stands for no limit
            text = value if isinstance(value, str) and name != "store" else option.show(value)
            option.parse(text)
            words.append(f"{name}={text}" if option.value else name)
    try:
        return Options.parse(*words).show()
    except OptionError:
        return ",".join(words)
