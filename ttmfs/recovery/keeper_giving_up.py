"""What a keeper says when it gives up, and how it ends the dead mount when it is let go.

The keeper imports this module by its path, so it imports only the standard library.
"""

import contextlib
import errno
import os

UNMOUNT_SECONDS = 10.0
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def last_words(why: str, mountpoint: str, *, has_store: bool, in_unit: bool) -> str:
    """Why the keeper, this process, gave up, where the pages are, and what to do."""
    me = os.getpid()
    rescue = os.path.join(PACKAGE, "cli", "rescue.py")  # it works when the rest of the package does not
    where = (
        f"its pages are safe as long as this process, {me}, lives. "
        f"To get them out: ttmfs rescue {me} DIRECTORY (or python3 {rescue} {me} DIRECTORY)"
    )
    if not has_store:
        where = "its pages are in its store, which another machine may have"
    again = "restart this unit" if in_unit else f"ttmfs restart {mountpoint} (or kill -USR1 {me})"
    end = "stop it" if in_unit else f"ttmfs umount --force {mountpoint} (or kill {me})"
    return f"gave up: {why}. {mountpoint} is dead, but {where}. To try again: {again}. To let them go: {end}"


def unmount(mountpoint: str) -> None:
    """Unmount the mount that is dead since the keeper gave up."""
    import subprocess  # only here, since the keeper is to stay small

    try:
        os.statvfs(mountpoint)
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                words = ["fusermount3", "-u", "-z", "--", mountpoint]
                subprocess.run(words, check=False, timeout=UNMOUNT_SECONDS)
