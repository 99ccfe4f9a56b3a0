"""The few system calls that Python lacks. Each raises OSError with the errno and what was tried.

Numbers are those of the generic table, the same on every architecture for calls this new
(``include/uapi/asm-generic/unistd.h``). All of it is synchronous: none of these calls waits for anything but memory.

Run as a program, by its path, this file is the helper through which a user without privilege makes and resizes a tmpfs:
what needs a user namespace happens there, and the caller stays outside.
"""

import ctypes
import errno
import mmap
import os
import socket
import subprocess
import sys
from typing import Any

__all__ = [
    "cached_pages",
    "new_tmpfs",
    "new_tmpfs_as_user",
    "punch_hole",
    "rename",
    "reserve_range",
    "resize_tmpfs",
    "resize_tmpfs_as_user",
]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_FSOPEN, _FSCONFIG, _FSMOUNT, _FSPICK, _CACHESTAT = 430, 431, 432, 433, 451
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = _FSPICK_CLOEXEC = 1
_FSPICK_EMPTY_PATH = 8
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE, _FSCONFIG_CMD_RECONFIGURE = 0, 1, 6, 7
_MOUNT_ATTR = 0x2 | 0x4 | 0x8 | 0x10  # nosuid, nodev, noexec, noatime
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_RENAME_NOREPLACE = 1
_MAP_FAILED = ctypes.c_void_p(-1).value
_PAGE_SIZE: int = os.sysconf("SC_PAGE_SIZE")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *arguments: Any) -> int:
    wide = (ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    return _checked(_libc.syscall(ctypes.c_long(number), *wide), what)


# --- the new mount API: fsopen(2) and its kin ---


def new_tmpfs(**options: str | None) -> int:
    """A directory descriptor of a new tmpfs that is mounted nowhere and lives as long as a descriptor of it does.

    `options` are tmpfs' own, None standing for a flag. Needs CAP_SYS_ADMIN over the mount namespace.
    """
    context = _syscall("fsopen", _FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    try:
        for name, value in options.items():
            _configure(context, name, value)
        _syscall("fsconfig create", _FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _syscall("fsmount", _FSMOUNT, context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR)
    finally:
        os.close(context)
    try:  # fsmount's descriptor behaves as O_PATH; an ordinary one can list and be kept by a service manager
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)


def resize_tmpfs(directory: int, size: int) -> None:
    """Give a tmpfs another budget, in bytes. OSError(EINVAL) if it holds more than that already."""
    context = _syscall("fspick", _FSPICK, directory, b"", _FSPICK_EMPTY_PATH | _FSPICK_CLOEXEC)
    try:
        _configure(context, "size", str(size))
        _syscall("fsconfig reconfigure", _FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def _configure(context: int, name: str, value: str | None) -> None:
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    text = None if value is None else value.encode()
    _syscall(f"tmpfs option {name}={value}", _FSCONFIG, context, command, name.encode(), text, 0)


# --- the same without privilege: a child in a user namespace of its own does it ---


def new_tmpfs_as_user(**options: str | None) -> tuple[int, int]:
    """As :func:`new_tmpfs`, for anyone who may make user namespaces. Gives the directory and the namespace it is of."""
    words = [name if value is None else f"{name}={value}" for name, value in options.items()]
    here, there = socket.socketpair()
    with here, there:
        _run_helper("make", str(there.fileno()), *words, keep=(there.fileno(),))
        _, descriptors, _, _ = socket.recv_fds(here, 16, 2)
    directory, namespace = descriptors
    return directory, namespace


def resize_tmpfs_as_user(directory: int, namespace: int, size: int) -> None:
    """As :func:`resize_tmpfs`, for a tmpfs of :func:`new_tmpfs_as_user`."""
    _run_helper("resize", str(directory), str(namespace), str(size), keep=(directory, namespace))


def _run_helper(*arguments: str, keep: tuple[int, ...]) -> None:
    """Run this file as a program; its exit status is the errno, its standard error what failed."""
    command = [sys.executable, "-I", "-S", __file__, *arguments]
    helper = subprocess.run(command, pass_fds=keep, capture_output=True, text=True, timeout=30, check=False)
    if helper.returncode:
        raise OSError(helper.returncode, helper.stderr.strip() or os.strerror(helper.returncode))


def _help(command: str, *arguments: str) -> None:
    """What the helper does."""
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
            socket.send_fds(there, [b"made"], [new_tmpfs(**options), namespace])
    else:
        directory, namespace, size = map(int, arguments)
        _checked(_libc.setns(namespace, _CLONE_NEWUSER), "setns user namespace")
        _checked(
            _libc.unshare(_CLONE_NEWNS), "unshare mount namespace"
        )  # fspick asks for rights over the mount namespace
        resize_tmpfs(directory, size)


# --- files ---


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free a range of a file; it reads as zeros afterwards and SEEK_DATA skips it."""
    _checked(_libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length), "fallocate punch")


def reserve_range(fd: int, offset: int, length: int) -> None:
    """Allocate what a range of a file lacks, all of it or (ENOSPC) nothing. It is a hole to SEEK_DATA until written."""
    _checked(_libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, length), "fallocate")


def rename(directory: int, old: str, new: str, *, replace: bool) -> None:
    """renameat2(2) within one directory; with `replace` false OSError(EEXIST) if the new name is taken."""
    flags = 0 if replace else _RENAME_NOREPLACE
    _checked(_libc.renameat2(directory, os.fsencode(old), directory, os.fsencode(new), flags), "renameat2")


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted"))


def cached_pages(fd: int, length: int) -> int:
    """How many base pages of a file's first `length` bytes are in memory. Touches none. cachestat(2), Linux 6.5."""
    where, answer = _Range(0, length), _Cachestat()
    try:
        _syscall("cachestat", _CACHESTAT, fd, ctypes.byref(where), ctypes.byref(answer), 0)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return _cached_pages_by_mincore(fd, length)
    return int(answer.cache)


def _cached_pages_by_mincore(fd: int, length: int) -> int:
    """The same on an older kernel. The mapping is never touched: a read of it would put pages into the holes."""
    count, window = 0, 1 << 30
    for offset in range(0, length, window):
        size = min(window, length - offset)
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
        if address == _MAP_FAILED:
            _checked(-1, "mmap")
        try:
            vector = ctypes.create_string_buffer(-(-size // _PAGE_SIZE))
            _checked(_libc.mincore(address, size, vector), "mincore")
        finally:
            _libc.munmap(address, size)
        count += sum(byte & 1 for byte in vector.raw)
    return count


if __name__ == "__main__":
    try:
        _help(*sys.argv[1:])
    except OSError as failure:
        sys.stderr.write(str(failure.strerror))
        sys.exit(failure.errno)
