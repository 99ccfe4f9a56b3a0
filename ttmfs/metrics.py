"""What is counted, and its text in Prometheus' exposition format. Every metric is declared here, with unit and meaning.

Counters are incremented by the face; gauges are asked for when the text is made, so that they cost nothing between.
"""

import errno
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from .pool import Pool, bytes_avail

__all__ = ["Metrics"]


@dataclass(slots=True)
class Timing:
    """How many requests of a kind were carried out, and how long that took in all."""

    count: int = 0
    nanoseconds: int = 0


@dataclass
class Metrics:
    """The counters of one daemon, by operation."""

    operations: defaultdict[str, Timing] = field(default_factory=lambda: defaultdict(Timing))
    errors: Counter[tuple[str, int]] = field(default_factory=Counter)

    def text(self, pool: Pool) -> bytes:
        """All metrics, with the gauges of a pool as of now."""
        lines: list[str] = []

        def family(name: str, kind: str, help_: str, samples: Mapping[str, float]) -> None:
            lines.extend((f"# HELP {name} {help_}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{labels} {value}" for labels, value in samples.items())

        operations = sorted(self.operations)
        counts = {_labels(operation=o): self.operations[o].count for o in operations}
        family("ttmfs_operations_total", "counter", "Requests carried out.", counts)
        seconds = {_labels(operation=o): self.operations[o].nanoseconds / 1e9 for o in operations}
        family("ttmfs_operation_seconds_total", "counter", "Time spent carrying out requests.", seconds)
        errors = {_labels(operation=o, errno=errno.errorcode[n]): self.errors[o, n] for o, n in sorted(self.errors)}
        family("ttmfs_operation_errors_total", "counter", "Requests answered with an error.", errors)
        room = pool.room()
        family("ttmfs_backups", "gauge", "Backups there are.", {"": room.backups})
        family("ttmfs_stored_bytes", "gauge", "Bytes of the pages stored.", {"": room.stored})
        family("ttmfs_stored_pages", "gauge", "Pages stored.", {"": room.stored // pool.page_size})
        family("ttmfs_size_bytes", "gauge", "The budget.", {"": room.size})
        family(
            "ttmfs_available_bytes", "gauge", "What can be stored before budget or reserve end.", {"": room.available}
        )
        family("ttmfs_page_size_bytes", "gauge", "Bytes a page.", {"": pool.page_size})
        family("ttmfs_swap_free_bytes", "gauge", "Free swap of the machine.", {"": bytes_avail()})
        return "\n".join(lines).encode() + b"\n"


def _labels(**labels: str) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
