"""The program that a systemd unit starts instead of ``mount.py``. It counts failed starts and stops trying in time.

::

    ttmfs-service ARGUMENTS OF mount.py... MOUNTPOINT

A unit that fails loses its stored descriptors, and with them every page. A unit with a start limit fails in the end,
and one without a limit tries without end while every client hangs. So the unit has no limit, and this program

- becomes ``mount.py``, after a delay that grows with each start in a row that failed. It counts starts in an eventfd
  named STARTS among the stored descriptors. A daemon that serves has the manager drop it;
- after MOST_FAILED_STARTS closes the connection, so that waiting clients get an error, and stays as an active unit that
  holds the pages. Its status says how to copy them out. A restart kills it, and the next one tries again. A stop
  releases the pages;
- ends with NOT_AGAIN if the first start failed: nothing is lost, and the unit is not started again.

It imports as little as possible, so that a broken upgrade is unlikely to break it.
"""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys

from ..recovery.keeper_client import Keeper, inherited
from ..recovery.keeper_protocol import CONNECTION, MOST_FAILED_STARTS, STARTS, STATE

__all__ = ["main"]

NOT_AGAIN = 69
"""EX_UNAVAILABLE of sysexits.h. The units name it in RestartPreventExitStatus=."""

FIRST_DELAY, LONGEST_DELAY = 0.2, 3.0
UNMOUNT_SECONDS = 10.0
COMM = "ttmfs-keeper"
"""The name of this process while it holds pages. ``ttmfs rescue MOUNTPOINT`` looks for it."""


def main() -> int:
    """Become the daemon, or hold the pages of the last one."""
    words, environment = sys.argv[1:], dict(os.environ)
    held = inherited()
    manager = Keeper.found(held)
    if not manager or not words:
        sys.stderr.write("ttmfs-service: only for units of a service manager that stores descriptors; run mount.py\n")
        return 1
    if (starts := held.get(STARTS, -1)) < 0:
        starts = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        manager.keep({STARTS: starts})
    failed = _count_of(starts)
    if failed and STATE not in held:
        sys.stderr.write("<3>ttmfs-service: not tried again: nothing was mounted, see above for the reason\n")
        return NOT_AGAIN
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if failed >= MOST_FAILED_STARTS:
        return _hold(manager, held, words[-1], failed)
    os.eventfd_write(starts, failed + 1)
    if failed and signal.sigtimedwait({signal.SIGTERM}, min(LONGEST_DELAY, FIRST_DELAY * 2 ** (failed - 1))):
        return _let_go(manager, held, words[-1])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    program = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "mount.py")
    try:
        for fd in held.values():
            os.set_inheritable(fd, True)  # again; LISTEN_PID is right, since this process stays
        os.execve(program, [program, "-f", *words], environment)
    except OSError as error:
        sys.stderr.write(f"<3>ttmfs-service: {program}: {error.strerror}; install ttmfs again\n")
        return 4


def _hold(manager: Keeper, held: "dict[str, int]", mountpoint: str, failed: int) -> int:
    """Disconnect the mount point, and hold the pages until someone restarts or stops the unit."""
    with open("/proc/self/comm", "w") as name:
        name.write(COMM)
    _disconnect(manager, held)
    me = os.getpid()
    text = (
        f"gave up after {failed} failed starts. {mountpoint} is dead, but its pages are safe. To get them out: "
        f"ttmfs rescue {me} DIRECTORY. To try again: restart this unit. To let them go: stop it"
    )
    sys.stderr.write(f"<2>ttmfs-service: {text}\n")
    sys.stderr.flush()
    manager.tell("READY=1", f"STATUS={text}")
    while not signal.sigtimedwait({signal.SIGTERM}, manager.watchdog or 3600):
        manager.tell("WATCHDOG=1")
    return _let_go(manager, held, mountpoint)


def _count_of(starts: int) -> int:
    """How many starts have failed. Sets the count to 0, so that after giving up another try begins anew."""
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(starts)
    return 0


def _disconnect(manager: Keeper, held: "dict[str, int]") -> None:
    """Close the connection here and in the manager's store."""
    if CONNECTION in held:
        os.close(held.pop(CONNECTION))
    manager.tell("FDSTOREREMOVE=1", f"FDNAME={CONNECTION}")


def _let_go(manager: Keeper, held: "dict[str, int]", mountpoint: str) -> int:
    """Unmount the dead mount. The pages are released when this process ends."""
    manager.tell("STOPPING=1")
    _disconnect(manager, held)
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        program = shutil.which("fusermount3")
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED) and program:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run([program, "-u", "-z", "--", mountpoint], check=False, timeout=UNMOUNT_SECONDS)
    return 0
