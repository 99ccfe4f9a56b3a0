"""The program that a systemd unit starts: it becomes the keeper, with what the service manager stored.

::

    ttmfs-service ARGUMENTS OF ttmfs mount... MOUNTPOINT

``ttmfs mount -f`` as a unit's main process does the same. But this program imports as little as possible, so that a
broken upgrade is unlikely to break it: a unit that fails loses its stored descriptors, and with them every page.
"""

import os
import re
import sys
from itertools import pairwise
from typing import NoReturn

from ..recovery.keeper_client import become_keeper, inherited, is_managed
from ..recovery.log_sink import TERMINAL

__all__ = ["main"]


def main() -> NoReturn:
    """Become the keeper of a unit. It starts the daemon."""
    words, held = sys.argv[1:], inherited()
    if not is_managed() or not words:
        sys.exit("ttmfs-service: only for units of a service manager that stores descriptors; run ttmfs mount")
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "mount.py")
    become_keeper(held, _log_of(words), [sys.executable, program, "-f", *words])


def _log_of(words: "list[str]") -> str:
    """The sink that ``-o log=`` names. Without it, standard error, which leads to the journal."""
    options = ",".join(after for word, after in pairwise(words) if word == "-o")
    found = re.findall(r"(?:^|,)log=((?:\\.|[^,\\])*)", options) or ["auto"]
    return TERMINAL if found[-1] == "auto" else re.sub(r"\\(.)", r"\1", found[-1])
