"""The command ``ttmfs``, and ``python -m ttmfs``.

Until :func:`ttmfs.cli.main.main` begins, SIGINT kills the process. Otherwise Ctrl-C during an import would print a
traceback.
"""

import signal
import sys

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # unless the caller ignores SIGINT
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .cli.main import main as run


def main() -> int:
    """Run the command. Returns its exit status."""
    return run(in_child=True)


if __name__ == "__main__":
    sys.exit(main())
