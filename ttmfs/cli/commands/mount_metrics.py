"""The metrics of all mounts of this machine, each with the label `mount`, as a collector for prometheus_client.

Each mount's ``.stats`` is read and parsed in a child process, which is abandoned if the mount does not answer in time.
The text of a mount that another user serves can say anything, and fill a database with names. So such a mount gives
only whether it answers, unless it was named.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ...linux.mountinfo import Mounted, ttmfs_mounts
from ...quoting import quoted
from ...version import __version__
from ..rescue import open_file
from .child_process import Answer, ask_all
from .command import complain
from .mounts import LONGEST_STATS, opened
from .terminal import user_name

__all__ = ["MountMetrics"]

FRESH = 1.0
"""Seconds for which metrics count as new: many scrapes cost no more than one a second."""

MOST_SAMPLES = 10_000
MOST_OF_STRANGERS = 64
"""Most mounts of other users that one scrape looks at, because each costs a process."""

DENIED, DEAD, SILENT, INVALID, ABSENT, HIDDEN, FAILED = REASONS = (
    "denied", "dead", "silent", "invalid", "absent", "hidden", "failed",
)  # fmt: skip

OWN = ("ttmfs_up", "ttmfs_export_")
"""The exporter's own metrics. No mount may give them."""

Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]
"""Name, type, help, and samples: name, labels, value."""


class MountMetrics(Collector):
    """Reads the mounts again at each scrape. With `named`, absolute paths, it reads only the mounts at these."""

    def __init__(self, named: Sequence[str] = ()) -> None:
        self._named = named
        self._collected: tuple[float, list[Metric]] = (0.0, [])
        self._reported: dict[str, str] = {}  # by path: the reason that was logged last

    def describe(self) -> list[Metric]:
        """Nothing: the mounts are not to be read at registration."""
        return []

    def collect(self) -> list[Metric]:
        """All metrics as of now, or of the last second."""
        if time.monotonic() - self._collected[0] > FRESH:
            metrics = [*self._collect()]
            self._collected = time.monotonic(), metrics
        return self._collected[1]

    def _collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("ttmfs_up", "Whether the mount answers.", labels=["mount"])
        failures = GaugeMetricFamily(
            "ttmfs_export_failure", f"Why a mount is not shown: {', '.join(REASONS)}.", labels=["mount", "reason"]
        )
        mounts, left_out = self._mounts()
        reasons = dict.fromkeys(self._named, ABSENT)
        for mount in mounts:
            reasons.pop(mount.path, None)
        families: dict[str, Metric] = {}
        answers = ask_all([(mount.path, partial(self._read, mount)) for mount in mounts])
        for mount, answer in zip(mounts, answers, strict=True):
            found, reason = _judged(answer)
            if not reason and not _added(families, found, mount.path):
                reason = INVALID
            if reason:
                reasons[mount.path] = reason
            else:
                up.add_metric([_label(mount.path)], 1)
        for path, reason in reasons.items():
            failures.add_metric([_label(path), reason], 1)
            if reason != DENIED:
                up.add_metric([_label(path)], 0)
        self._report(reasons, {mount.path: mount for mount in mounts})
        yield up
        yield failures
        yield GaugeMetricFamily("ttmfs_export_mounts_left_out", "Mounts of other users beyond the limit.", left_out)
        build = GaugeMetricFamily("ttmfs_export_build_info", "The version of the exporter.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        yield from families.values()

    def _mounts(self) -> tuple[list[Mounted], int]:
        """The mounts to read, those of root and of this user first, and how many are left out."""
        topmost = {mount.path: mount for mount in ttmfs_mounts()}
        if self._named:
            return [topmost[path] for path in self._named if path in topmost], 0
        found = sorted(topmost.values(), key=lambda mount: not _is_trusted(mount))
        by_device = {mount.device: mount for mount in reversed(found)}  # a bind mount has the device of the first
        by_label = {_label(mount.path): mount for mount in by_device.values()}  # any user can choose a path
        mounts = [mount for mount in found if by_label.get(_label(mount.path)) is mount]
        most = sum(map(_is_trusted, mounts)) + MOST_OF_STRANGERS
        return mounts[:most], len(mounts[most:])

    def _read(self, mount: Mounted) -> Iterator[dict[str, Any]]:
        """What a mount answers, in a child process: its families, or why there are none."""
        try:
            with opened(mount.path) as root:
                if os.fstat(root).st_dev != mount.st_dev:
                    yield {"reason": HIDDEN}
                    return
                with open(open_file(".stats", root), "rb") as file:
                    text = file.read(LONGEST_STATS + 1)
        except OSError as error:
            reasons = {errno.EACCES: DENIED, errno.EPERM: DENIED, errno.ENOTCONN: DEAD}
            yield {"reason": reasons.get(error.errno or 0, FAILED)}
            return
        wanted = self._named or _is_trusted(mount)
        yield {"families": parsed(text) if wanted else [], "reason": ""}

    def _report(self, reasons: dict[str, str], mounts: dict[str, Mounted]) -> None:
        """Log what has changed: a mount that cannot be read, or can be again."""
        for path, reason in reasons.items():
            if self._reported.get(path) != reason:
                complain("export", f"{quoted(path)}: {_explained(reason, mounts.get(path))}")
        for path in self._reported.keys() - reasons.keys():
            complain("export", f"{quoted(path)}: " + ("answers again" if path in mounts else "is no longer mounted"))
        self._reported = reasons


def _is_trusted(mount: Mounted) -> bool:
    return mount.served_by in (0, os.geteuid())


def _explained(reason: str, mount: Mounted | None) -> str:
    name = user_name(mount.served_by) if mount else ""
    return {
        DENIED: f"is not shown to this user; mount it with allow_other, or run ttmfs export as {name}",
        DEAD: "is dead; ttmfs doctor says what to do",
        SILENT: "does not answer; ttmfs doctor says what to do",
        INVALID: "its .stats is not valid, or has metrics of other names",
        ABSENT: "no ttmfs is mounted there",
        HIDDEN: "is hidden by another mount on the same path",
        FAILED: "cannot be read; ttmfs doctor says what to do",
    }[reason]


def _label(path: str) -> str:
    """A path as the value of a label. Bytes that are not UTF-8 become escapes, because labels are UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _judged(answer: Answer) -> tuple[list[Family], str]:
    """The families in an answer, and why there are none."""
    if answer.is_silent:
        return [], SILENT
    if answer.error or not answer.items:
        return [], INVALID
    found = answer.items[0]
    return found.get("families", []), found["reason"]


def parsed(text: bytes) -> list[Family]:
    """The families in a text. ValueError if it is none of ttmfs, or too long."""
    if len(text) > LONGEST_STATS:
        raise ValueError("too long")
    families: list[Family] = []
    count = 0
    for metric in text_string_to_metric_families(text.decode()):
        samples = [(sample.name, sample.labels, sample.value) for sample in metric.samples]
        count += len(samples)
        if not metric.name.startswith("ttmfs_") or metric.name.startswith(OWN) or count > MOST_SAMPLES:
            raise ValueError(f"{metric.name} does not belong there")
        families.append((metric.name, metric.type, metric.documentation, samples))
    return families


def _added(families: dict[str, Metric], found: list[Family], path: str) -> bool:
    """Add what a mount gives, with its label. False, and nothing is added, if types differ or a sample comes twice."""
    if any(name in families and families[name].type != kind for name, kind, _, _ in found):
        return False
    keys = [(name, *sorted(labels.items())) for _, _, _, samples in found for name, labels, _ in samples]
    if len({*keys}) < len(keys):
        return False
    for name, kind, meaning, samples in found:
        family = families.setdefault(name, Metric(name, meaning, kind))
        for sample, labels, value in samples:
            family.add_sample(sample, {**labels, "mount": _label(path)}, value)
    return True
