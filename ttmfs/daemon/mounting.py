"""Mounts and unmounts by fusermount3, for root and users alike, and checks mount points."""

import contextlib
import errno
import logging
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

from ..linux import fuse_device, mount_rights
from ..linux.mountinfo import TYPE, mounted_at
from ..linux.system_calls import swap_space
from ..options import BASE_PAGE_SIZE, ExitCode, Options, escaped, format_size

__all__ = [
    "MountError",
    "checked_mountpoint",
    "device_at",
    "is_automounter",
    "is_dead",
    "mount",
    "unmount",
    "warn_of_hiding",
    "warn_of_options",
]

log = logging.getLogger(__name__)

FUSERMOUNT = "fusermount3"
ANSWER_SECONDS = 10.0

PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
NEEDED = (PACKAGE, os.path.realpath(sys.executable), sys.prefix, "/dev", "/usr/bin")
"""What a mount must not hide: later daemons are started from there."""


class MountError(Exception):
    """Mounting failed. The text is for the user; `code` is the exit status."""

    def __init__(self, text: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(text)
        self.code = code


def checked_mountpoint(path: str) -> str:
    """The real path of a directory to mount on."""
    try:
        os.statvfs(path)  # unlike stat(2) it asks the filesystem that is mounted there, so it finds a dead mount
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise MountError(f"{path} is not a directory; give an empty one")
        real = os.path.realpath(path)
        if hidden := next((place for place in NEEDED if Path(place).is_relative_to(real)), None):
            raise MountError(f"a mount on {path} would hide {hidden}, which it needs; give an empty directory")
    except FileNotFoundError:
        raise MountError(f"{path} does not exist; make it first: mkdir {path}") from None
    except OSError as error:
        if error.errno == errno.ENOTCONN and (what := mounted_at(os.path.abspath(path))):
            if what.type != TYPE:
                raise MountError(f"a dead mount is in the way at {path}; remove it: {FUSERMOUNT} -u {path}") from None
            log.warning("removing the dead ttmfs at %s", path)
            unmount(os.path.abspath(path))
            return checked_mountpoint(path)
        raise MountError(f"{path}: {error.strerror}") from None
    return real


def warn_of_hiding(mountpoint: str) -> None:
    """Log what a mount hides. As for mount(8) it is no error, but it is seldom meant."""
    found = mounted_at(mountpoint)
    if found and found.type == TYPE:
        log.warning("another ttmfs is mounted at %s already: it is hidden until this one is unmounted", mountpoint)
        return
    with contextlib.suppress(OSError), os.scandir(mountpoint) as entries:
        if next(entries, None):
            log.warning("%s is not empty: what is in it is hidden until this is unmounted", mountpoint)


def warn_of_options(options: Options) -> None:
    """Log what is no error, but seldom meant: more than the machine can hold, or pages that git would record."""
    if options.store is None:
        most = os.sysconf("SC_PHYS_PAGES") * BASE_PAGE_SIZE + swap_space()[0]
        if options.size > most:
            text = "size=%s is more than RAM and swap of this machine, %dm together: storing is refused before that"
            log.warning(text, format_size(options.size), most >> 20)
        return
    store = Path(options.store)
    if checkout := next((place for place in (store, *store.parents) if (place / ".git").exists()), None):
        log.warning("store=%s is in the git checkout %s: name it in .gitignore, or git adds its pages", store, checkout)


def mount(source: str, mountpoint: str, options: Options) -> int:
    """Mount by fusermount3. The connection, which it passes over the socket of _FUSE_COMMFD."""
    words = [f"fsname={escaped(source or 'none')}", "subtype=ttmfs"]
    if options.allow_other or os.geteuid():  # else only root gets in, whom mode bits do not stop (Operations.access)
        words.append("default_permissions")  # costs a round trip for a directory's attributes after each change of it
    words += ["allow_other"] * options.allow_other + ["ro"] * options.ro + [*options.kernel]
    here, there = socket.socketpair()
    with here:
        with there:
            result = _fusermount(["-o", ",".join(words), "--", mountpoint], there.fileno())
        if result.returncode:
            text = result.stderr.strip().removeprefix(f"{FUSERMOUNT}: ") or f"exit status {result.returncode}"
            text, code = f"{FUSERMOUNT} cannot mount at {mountpoint}: {text}", ExitCode.FAILED
            if fuse_device.error():
                text, code = f"{text}; {fuse_device.ADVICE}", ExitCode.SYSTEM
            elif advice := mount_rights.advice(text):
                text, code = f"{text}; {advice}", ExitCode.SYSTEM
            raise MountError(text, code)
        _, descriptors, _, _ = socket.recv_fds(here, 1, 1)
    (connection,) = descriptors
    os.set_inheritable(connection, False)
    return connection


def _fusermount(arguments: list[str], channel: int | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "_FUSE_COMMFD": str(channel), "LC_ALL": "C"}
    keep = () if channel is None else (channel,)
    try:
        return subprocess.run(
            [FUSERMOUNT, *arguments], env=environment, pass_fds=keep, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS, check=False,
            start_new_session=not is_automounter(arguments[-1]),  # Ctrl-C reaches only this process
        )  # fmt: skip
    except FileNotFoundError:
        raise MountError(f"{FUSERMOUNT} is not installed; install the package fuse3", ExitCode.SYSTEM) from None
    except subprocess.TimeoutExpired:
        raise MountError(f"{FUSERMOUNT} did not answer within {ANSWER_SECONDS:.0f} s", ExitCode.SYSTEM) from None
    except OSError as error:
        raise MountError(f"{FUSERMOUNT} cannot be run: {error.strerror}", ExitCode.SYSTEM) from None


def is_automounter(mountpoint: str) -> bool:
    """Whether an automounter waits for this mount.

    The kernel lets only the automounter's process group pass an autofs until the mount is there. So every process that
    mounts must stay in that group. (autofs_oz_mode(); systemd: x-systemd.automount)
    """
    found = mounted_at(mountpoint)
    return found is not None and found.type == "autofs" and f"pgrp={os.getpgrp()}" in found.options


def is_dead(mountpoint: str) -> bool:
    """Whether the ttmfs at a path has no server. The process that serves it must not ask: it would wait for itself."""
    if (what := mounted_at(mountpoint)) and what.type == TYPE:
        try:
            os.statvfs(mountpoint)
        except OSError as error:
            return error.errno == errno.ENOTCONN
    return False


def device_at(mountpoint: str) -> str | None:
    """The device number of the topmost mount at a path, without touching it; None if there is none."""
    return found.device if (found := mounted_at(mountpoint)) else None


def unmount(mountpoint: str) -> None:
    """Unmount lazily, so also while the mount is in use."""
    try:
        result = _fusermount(["-u", "-z", "--", mountpoint])
    except MountError as error:
        log.error("%s", error)
        return
    if result.returncode:
        log.error("cannot unmount %s: %s", mountpoint, result.stderr.strip())
