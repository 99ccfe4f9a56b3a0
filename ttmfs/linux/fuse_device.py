"""The device /dev/fuse: whether this process can open it, and what to do if it cannot."""

import os

__all__ = ["ADVICE", "PATH", "error"]

PATH = "/dev/fuse"
ADVICE = "as root: modprobe fuse, then chmod 0666 /dev/fuse; for a container: --device /dev/fuse"


def error() -> str:
    """Return why this process cannot open it; "" if it can. A control group can forbid it, whatever the mode."""
    try:
        os.close(os.open(PATH, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""
