"""The program that serves a mount. It begins with imports that can fail, and says why in one line.

``mount.py`` of the source tree and ``ttmfs/daemon/mount.py`` run it.
"""

import os
import re
import sys

__all__ = ["main"]


def main(name: str) -> int:
    """Mount, and serve the mount until it ends. `name` is the command's, for messages. Returns the exit status."""
    if not os.path.isdir("/proc/self"):
        sys.stderr.write(f"{name}: /proc is not mounted here; mount it first: mount -t proc proc /proc\n")
        return 2
    try:
        from .inherited import raise_limits

        raise_limits()  # under the caller's limits the imports below may fail
        from .command_line import run
    except (ImportError, MemoryError, SystemError) as error:
        # The dynamic linker reports a lack of memory as an ImportError, in several wordings, and Python as a
        # SystemError.
        if isinstance(error, ImportError) and not {"map", "memory"} & set(re.split(r"\W+", str(error))):
            in_tree = name == "mount.py"
            advice = "Run make once, then .venv/bin/python mount.py" if in_tree else "Install ttmfs again"
            sys.stderr.write(f"{name}: {error}. {advice}\n")
        else:  # there may be no memory to format a text
            text = b": there is too little memory to start; ulimit -v and ulimit -d may limit it\n"
            os.writev(2, (name.encode(), text))
        return 2
    except KeyboardInterrupt:
        return 8
    return run(name)
