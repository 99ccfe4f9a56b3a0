"""Unmounts a path without following a symbolic link on it. A program of its own, so that a caller can stop waiting.

The paths in mountinfo have no links. One that is found there all the same was made meanwhile, by a user who may write
to a directory above. It could lead root to another mount.

It is run by its path: python -I -S unmount.py PATH [lazy]. It uses only the standard library.
"""

import ctypes
import os
import struct
import sys

__all__ = ["PROGRAM", "unmount"]

PROGRAM = __file__

_OPENAT2, _AT_FDCWD, _RESOLVE_NO_SYMLINKS = 437, -100, 0x04  # include/uapi/linux/openat2.h
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8


def unmount(path: str, *, lazy: bool) -> None:
    """umount2(2), with MNT_DETACH if `lazy`. Raises OSError: EBUSY if the mount is in use, ELOOP if there is a link."""
    libc = ctypes.CDLL(None, use_errno=True)
    above, name = map(os.fsencode, os.path.split(path))
    how = struct.pack("=QQQ", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS)
    parent = libc.syscall(ctypes.c_long(_OPENAT2), _AT_FDCWD, above, how, ctypes.c_size_t(len(how)))
    _check(parent, path)
    os.fchdir(parent)
    _check(libc.umount2(name, _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)), path)


def _check(result: int, path: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


if __name__ == "__main__":
    try:
        unmount(sys.argv[1], lazy=sys.argv[2:] == ["lazy"])
    except OSError as error:
        sys.exit(error.strerror)
