"""An unmounted tmpfs: made and resized with the mount API of fsopen(2), with or without privilege.

For a caller without privilege it is made in a new user namespace. This file, run as a program by its path, is the
helper process that enters the namespace.
"""

import ctypes
import errno
import os
import socket
import subprocess
import sys
from typing import Any

__all__ = ["NeedsUserNamespace", "new_tmpfs", "resize_tmpfs"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_FSOPEN, _FSCONFIG, _FSMOUNT, _FSPICK = 430, 431, 432, 433  # include/uapi/asm-generic/unistd.h
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = _FSPICK_CLOEXEC = 1
_FSPICK_EMPTY_PATH = 8
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE, _FSCONFIG_CMD_RECONFIGURE = 0, 1, 6, 7
_MOUNT_ATTR = 0x2 | 0x4 | 0x8 | 0x10  # nosuid, nodev, noexec, noatime
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


class NeedsUserNamespace(OSError):
    """The caller needs a user namespace to make a tmpfs, and could not create it."""


def new_tmpfs(**options: str | None) -> tuple[int, int | None]:
    """Make a tmpfs. It exists until its last descriptor is closed.

    `options` are those of tmpfs(5); None stands for a flag. Returns a descriptor of its directory and one of the user
    namespace that owns it, or None if the caller is privileged. Raises OSError, and NeedsUserNamespace.
    """
    try:
        return _new(options), None
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
    words = [name if value is None else f"{name}={value}" for name, value in options.items()]
    here, there = socket.socketpair()
    with here, there:
        try:
            _run_helper("make", str(there.fileno()), *words, keep=(there.fileno(),))
        except OSError as error:
            raise NeedsUserNamespace(error.errno, error.strerror) from error
        _, (directory, namespace), _, _ = socket.recv_fds(here, 16, 2)
    return directory, namespace


def resize_tmpfs(directory: int, namespace: int | None, **limits: int) -> None:
    """Change the limits of a tmpfs: `size` (bytes) and `nr_inodes`. OSError(EINVAL) if it holds more."""
    if namespace is None:
        _resize(directory, limits)
    else:
        words = [f"{name}={value}" for name, value in limits.items()]
        _run_helper("resize", str(directory), str(namespace), *words, keep=(directory, namespace))


def _new(options: dict[str, str | None]) -> int:
    context = _syscall("fsopen", _FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    try:
        for name, value in options.items():
            _configure(context, name, value)
        _syscall("fsconfig create", _FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _syscall("fsmount", _FSMOUNT, context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR)
    finally:
        os.close(context)
    try:  # an O_PATH descriptor, as fsmount gives, cannot list, and a service manager does not store it
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)


def _resize(directory: int, limits: dict[str, int]) -> None:
    context = _syscall("fspick", _FSPICK, directory, b"", _FSPICK_EMPTY_PATH | _FSPICK_CLOEXEC)
    try:
        for name, value in limits.items():
            _configure(context, name, str(value))
        _syscall("fsconfig reconfigure", _FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def _configure(context: int, name: str, value: str | None) -> None:
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    text = None if value is None else value.encode()
    _syscall(f"tmpfs option {name}={value}", _FSCONFIG, context, command, name.encode(), text, 0)


def _syscall(what: str, number: int, *arguments: Any) -> int:
    wide = (ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    return _checked(_libc.syscall(ctypes.c_long(number), *wide), what)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# --- the helper ---


def _run_helper(*arguments: str, keep: tuple[int, ...]) -> None:
    """Run this file as a program. Its exit status is the errno; its standard error says what failed."""
    command = [sys.executable, "-I", "-S", __file__, *arguments]
    helper = subprocess.run(command, pass_fds=keep, capture_output=True, text=True, timeout=30, check=False)
    if helper.returncode:
        raise OSError(helper.returncode, helper.stderr.strip() or os.strerror(helper.returncode))


def _helper_main(command: str, *arguments: str) -> None:
    if command == "make":
        channel, words = int(arguments[0]), arguments[1:]
        uid, gid = os.geteuid(), os.getegid()
        _checked(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "unshare user namespace")
        for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        options = {name: value if equals else None for name, equals, value in (word.partition("=") for word in words)}
        with socket.socket(fileno=channel) as there:
            namespace = os.open("/proc/self/ns/user", os.O_RDONLY)
            socket.send_fds(there, [b"made"], [_new(options), namespace])
    else:
        directory, namespace = map(int, arguments[:2])
        _checked(_libc.setns(namespace, _CLONE_NEWUSER), "setns user namespace")
        _checked(_libc.unshare(_CLONE_NEWNS), "unshare mount namespace")  # fspick needs privilege over it
        _resize(directory, {name: int(value) for name, _, value in (w.partition("=") for w in arguments[2:])})


if __name__ == "__main__":
    try:
        _helper_main(*sys.argv[1:])
    except OSError as failure:
        sys.stderr.write(str(failure.strerror))
        sys.exit(failure.errno)
