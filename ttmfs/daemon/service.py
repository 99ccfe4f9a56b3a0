"""What a service manager starts in place of ``mount.py``: it counts the starts that fail, waits when too many did.

::

    ttmfs-service ARGUMENTS OF mount.py... MOUNTPOINT

A unit that fails loses the descriptors that are kept for it, and so every page; one whose starts are limited fails in
the end; and one without a limit tries for ever, while every client hangs. So the unit has no limit, and this program
runs before each daemon. It

- becomes ``mount.py``, a little later after each start in a row that failed. How many did is noted in a memfd that is
  kept with the rest, by the name of STARTS; a daemon that serves writes it anew;
- when they are too many (``restart_tries=``, ``restart_seconds=`` of the last daemon that served), closes the
  connection, of which the kernel makes errors for all who wait, and lives on, with the pages, as a unit that is well:
  its status says how to get them out. A restart has it try again, a stop lets the pages go;
- ends with NOT_AGAIN, for which the unit starts no other, after a first start that failed: there is nothing to lose.

It imports as little as can be, and nothing that a broken upgrade is likely to break.
"""

import contextlib
import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import time

from ..recovery.keeper import CONNECTION, LEFT, RESTART, STARTS, STATE, Keeper, inherited

__all__ = ["main", "note_service"]

NOT_AGAIN = 69
"""EX_UNAVAILABLE of sysexits.h. The units name it in RestartPreventExitStatus=."""

FIRST_DELAY, LONGEST_DELAY = 0.2, 3.0
UNMOUNT_SECONDS = 10.0
COMM = "ttmfs-keeper"
"""Its name while it holds pages, by which ``ttmfs rescue MOUNTPOINT`` finds it."""

_NOTE = struct.Struct("<IIdd")
"""Starts since a daemon served; how many and how many seconds may pass until they are too many; when the first was."""


def note_service(starts: int, tries: int, seconds: float) -> None:
    """Note in the memfd of STARTS that a daemon serves."""
    os.pwrite(starts, _NOTE.pack(0, tries, seconds, 0.0), 0)


def main() -> int:
    """Become the daemon, or hold what daemons left."""
    words = sys.argv[1:]
    manager = Keeper.of_environment()
    if not manager or not words:
        sys.stderr.write(
            "ttmfs-service: it is for units of a service manager with a store of descriptors; run mount.py\n"
        )
        return 1
    held = inherited()
    if STARTS not in held:
        held[STARTS] = os.memfd_create("ttmfs-starts")
        os.pwrite(held[STARTS], _NOTE.pack(0, 1, 0.0, 0.0), 0)
        manager.keep({STARTS: held[STARTS]})
    failed, tries, seconds, since = _read_note(held[STARTS])
    now = time.monotonic()
    since = since or now
    if failed and STATE not in held:
        sys.stderr.write("<3>ttmfs-service: not tried again: nothing was mounted, see above for the reason\n")
        return NOT_AGAIN
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, RESTART})
    if STATE in held and (failed >= tries or (failed and now > since + seconds)):
        return _hold(manager, held, words[-1], failed)
    os.pwrite(held[STARTS], _NOTE.pack(failed + 1, tries, seconds, since), 0)
    if failed and signal.sigtimedwait({signal.SIGTERM}, min(LONGEST_DELAY, FIRST_DELAY * 2 ** (failed - 1))):
        return _let_go(manager, held, words[-1])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, RESTART})
    program = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "mount.py")
    try:
        os.execve(program, [program, "-f", *words], manager.environment(held))
    except OSError as error:
        sys.stderr.write(f"<3>ttmfs-service: {program}: {error.strerror}; install ttmfs again\n")
        return 4


def _hold(manager: Keeper, held: "dict[str, int]", mountpoint: str, failed: int) -> int:
    """Make the mountpoint dead, and hold the pages until someone decides."""
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
    while True:
        came = signal.sigtimedwait({signal.SIGTERM, RESTART}, manager.watchdog or 3600)
        if came is None:
            manager.tell("WATCHDOG=1")
        elif came.si_signo == RESTART:
            note_service(held[STARTS], *_limits(held))
            return LEFT
        else:
            return _let_go(manager, held, mountpoint)


def _read_note(starts: int) -> "tuple[int, int, float, float]":
    """What is noted in the memfd of STARTS; as at the first start if another version noted it in another way."""
    found = os.pread(starts, _NOTE.size + 1, 0)
    return _NOTE.unpack(found) if len(found) == _NOTE.size else (0, 1, 0.0, 0.0)


def _limits(held: "dict[str, int]") -> "tuple[int, float]":
    _, tries, seconds, _ = _read_note(held[STARTS])
    return tries, seconds


def _disconnect(manager: Keeper, held: "dict[str, int]") -> None:
    """Close the connection wherever it is kept."""
    if CONNECTION in held:
        os.close(held.pop(CONNECTION))
    manager.tell("FDSTOREREMOVE=1", f"FDNAME={CONNECTION}")


def _let_go(manager: Keeper, held: "dict[str, int]", mountpoint: str) -> int:
    """Take the dead mount away. The pages go with this process."""
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
