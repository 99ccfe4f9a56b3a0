"""The command ``ttmfs``, and ``python -m ttmfs``.

Up to :func:`ttmfs.cli.main.main` an interruption ends the process as it would end any program that has not begun, and
not in the middle of an import, with a traceback.
"""

import signal
import sys

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not where the caller has it ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .cli.main import main as run


def main() -> int:
    """The command: its exit status."""
    return run(in_child=True)


if __name__ == "__main__":
    sys.exit(main())
