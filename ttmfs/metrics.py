"""What is counted, and its text in Prometheus' exposition format. Every metric is declared here, with unit and meaning.

Counters are incremented by the face; gauges are asked for when the text is made, so that they cost nothing between.
"""

import errno
from collections.abc import Mapping

from .pool import Pool, bytes_avail
from .state import State

__all__ = ["Metrics"]


class _Places(dict[str, int]):
    """Where in the state's values the count of an operation is, and behind it the nanoseconds that it took in all."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __missing__(self, operation: str) -> int:
        self[operation] = place = self._state.at(f"operation {operation}")
        return place


class Metrics:
    """The counters of one mount, by operation. They are kept in its state, and go on from one daemon to the next."""

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

    def text(self, pool: Pool) -> bytes:
        """All metrics, with the gauges of a pool as of now."""
        lines: list[str] = []

        def family(name: str, kind: str, help_: str, samples: Mapping[str, float]) -> None:
            lines.extend((f"# HELP {name} {help_}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{labels} {value}" for labels, value in samples.items())

        operations = self._state.keys("operation")
        counts = {_labels(operation=o): self.values[self.places[o]] for o in operations}
        family("ttmfs_operations_total", "counter", "Requests carried out.", counts)
        seconds = {_labels(operation=o): self.values[self.places[o] + 1] / 1e9 for o in operations}
        family("ttmfs_operation_seconds_total", "counter", "Time spent carrying out requests.", seconds)
        errors = {}
        for key in self._state.keys("error"):
            operation, _, name = key.partition(" ")
            errors[_labels(operation=operation, errno=name)] = self._state.get(f"error {key}")
        family("ttmfs_operation_errors_total", "counter", "Requests answered with an error.", errors)
        restarts = self._state.get("restarts")
        family("ttmfs_restarts_total", "counter", "Daemons that took the mount over from one before.", {"": restarts})
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
