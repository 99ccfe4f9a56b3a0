"""Resets what a daemon inherits from its caller: limits, signals, umask, descriptors, search paths, memory."""

import logging
import os
import resource
import signal

from ..linux import system_calls
from ..options import ExitCode
from .mounting import MountError

__all__ = ["check_limits", "drop_the_callers", "lock_memory", "raise_limits"]

log = logging.getLogger(__name__)

UNLIMITED = resource.RLIM_INFINITY
LEAST_FILES, LEAST_MEMORY = 256, 4 << 30
"""Half of the descriptors are for backups. The daemon has 22 of its own, and had 41 more while 9,000 reads waited.

The memory is for the stacks of all threads that may wait (300 of 8 MiB), pending writes (0.5 GiB), and the program.
"""

LIMITS = (
    (resource.RLIMIT_FSIZE, "RLIMIT_FSIZE", "-f", UNLIMITED),  # a backup is one sparse file, of any size
    (resource.RLIMIT_NOFILE, "RLIMIT_NOFILE", "-n", LEAST_FILES),
    (resource.RLIMIT_AS, "RLIMIT_AS", "-v", LEAST_MEMORY),
    (resource.RLIMIT_DATA, "RLIMIT_DATA", "-d", LEAST_MEMORY),
    (resource.RLIMIT_CPU, "RLIMIT_CPU", "-t", UNLIMITED),  # the kernel kills the daemon at the end of it
)
"""The limits that can break a daemon: number, name, option of ulimit, and the least hard limit that it works with."""


def raise_limits() -> None:
    """Raise each soft limit to the hard one."""
    for limit, *_ in LIMITS:
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))


def check_limits() -> None:
    """Raise MountError if a limit is too low for a daemon."""
    for limit, name, option, least in LIMITS:
        most, _ = resource.getrlimit(limit)
        if most != UNLIMITED and (least == UNLIMITED or most < least):
            needed = "no limit" if least == UNLIMITED else f"{least} at least"
            raise MountError(
                f"{name} is {most}, and ttmfs needs {needed}: raise it with ulimit {option} as root, "
                "or in /etc/security/limits.conf",
                ExitCode.SYSTEM,
            )


def lock_memory() -> None:
    """Keep this process out of swap, as far as RLIMIT_MEMLOCK goes: others wait for it to free their memory."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    try:
        system_calls.lock_memory(most)
    except OSError as error:
        log.debug("this process may be swapped out under pressure (RLIMIT_MEMLOCK is %d): %s", most, error.strerror)


def drop_the_callers() -> None:
    """Reset signals, umask and search paths, and close the caller's descriptors except the standard streams.

    A lock or a pipe of a script must not last as long as the mount. Descriptors from a keeper are no longer
    inheritable, and stay. Search paths become absolute, because a later daemon starts in another directory.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, the status of every child would be 0
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o077)  # files for other users get their mode explicitly
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > 2 and os.get_inheritable(fd):
                os.close(fd)
        except OSError:
            pass  # the listing's own
    for name in "PYTHONPATH", "LD_LIBRARY_PATH":
        if paths := os.environ.get(name):
            os.environ[name] = ":".join(map(os.path.abspath, paths.split(":")))
