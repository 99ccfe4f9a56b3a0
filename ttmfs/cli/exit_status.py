"""The exit statuses of the commands. Standard library alone: the rescue program uses it when the package is broken."""

import enum

__all__ = ["ExitStatus"]


class ExitStatus(enum.IntEnum):
    """What a command returns."""

    DONE = 0
    PARTLY = 1
    FAILED = 2
    INTERRUPTED = 130  # 128 and the number of SIGINT, as in a shell

    @classmethod
    def of(cls, failed: int, total: int) -> "ExitStatus":
        """The status of a command after `failed` of `total` pieces of work failed."""
        return cls.DONE if not failed else cls.PARTLY if failed < total else cls.FAILED
