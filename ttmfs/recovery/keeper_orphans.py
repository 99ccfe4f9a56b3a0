"""Reaps processes that are not the keeper's own: as process 1 of a container it gets all whose parents have ended.

The keeper imports this module by its path, so it imports only the standard library.
"""

import contextlib
import os


def reap_orphans(own: "set[int]") -> None:
    """Reap the children of this process that have ended, except its own: their deaths are handled elsewhere."""
    with contextlib.suppress(OSError), open("/proc/thread-self/children", encoding="ascii") as children:
        for pid in {*map(int, children.read().split())} - own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
