"""The level of the log, which can change while the mount serves.

Concurrency: one thread.
"""

import logging
from collections.abc import Callable

from ..options import parse_level

__all__ = ["LogLevel"]


class LogLevel:
    """The level of one mount: debug, info, warning or error. `followers` are called with each new one."""

    def __init__(self) -> None:
        self.level = "info"
        self.followers: list[Callable[[str], None]] = []

    def change(self, level: str) -> None:
        """Log lines of this level and above. Raises OptionError for any other text."""
        self.level = parse_level(level)
        logging.getLogger().setLevel(level.upper())
        for follow in self.followers:
            follow(level)
