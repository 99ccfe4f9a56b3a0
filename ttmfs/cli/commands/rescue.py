"""``rescue`` as a command. :mod:`ttmfs.cli.rescue` itself works without this package."""

from .. import rescue
from .command import Command

__all__ = ["COMMANDS"]

COMMANDS = (
    Command(
        "rescue",
        rescue.DESCRIPTION,
        rescue.EXAMPLES,
        rescue.add_arguments,
        rescue.run,
        interrupted=rescue.INTERRUPTED,
        waits_for=lambda _: [],
    ),
)
