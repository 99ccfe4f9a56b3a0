"""The command ``ttmfs``, for those who look after mounts. It knows nothing of the server."""

import argparse
import sys

from . import rescue
from .version import __version__

__all__ = ["main"]


def main() -> int:
    """From argv to an exit status: 0; 1 if part of the work failed; 2 if none could be done."""
    parser = argparse.ArgumentParser(prog="ttmfs", description="Look after mounts of ttmfs. mount.py makes them.")
    parser.add_argument("-V", "--version", action="version", version=f"ttmfs {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    rescue.add_arguments(
        commands.add_parser(
            "rescue",
            help="get backups out of a keeper that gave up, as sparse files with checksums",
            description=rescue.DESCRIPTION,
            epilog=rescue.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    arguments = parser.parse_args()
    try:
        return rescue.run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("ttmfs rescue: interrupted; backups that were told of are whole, others are not there\n")
        return 130
