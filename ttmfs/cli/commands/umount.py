"""``umount``: ends mounts, and waits until their processes have ended and the memory is released.

The mounts are not touched, except in child processes: a mount may be dead, or hang.
"""

import argparse
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ...linux.mountinfo import Mounted, mounts
from ...linux.unmount import PROGRAM
from ...quoting import quoted
from ..exit_status import ExitStatus
from ..keepers import is_stopped, keepers, servers
from .child_process import ask
from .command import Command, CommandError, complain
from .mounts import mount_at
from .terminal import user_name

__all__ = ["COMMANDS"]

FUSERMOUNT = "fusermount3"
UNMOUNT_SECONDS = 20.0

NOTICE_SECONDS = 2.0
"""Seconds after which it looks for what else keeps them from ending."""

END_SECONDS = 60.0
"""Seconds within which daemon and keeper must end. The keeper kills a daemon that hangs after 30 s."""


class _Busy(CommandError):
    """The mount is in use. `users` has an object for each process that is known."""

    def __init__(self, text: str, users: list[dict[str, Any]]) -> None:
        super().__init__(text)
        self.users = users


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mounts", nargs="+", metavar="MNT", help="a mount point")
    parser.add_argument(
        "-l", "--lazy", action="store_true", help="detach a mount that is in use; it ends when the last user ends"
    )
    parser.add_argument("-f", "--force", action="store_true", help="release the pages that a dead mount's keeper holds")
    parser.add_argument("--json", action="store_true", help="a list of objects: mount, seconds, error, users")


def _run(arguments: argparse.Namespace) -> int:
    found: list[dict[str, Any]] = []
    for path in arguments.mounts:
        began, error, users = time.monotonic(), None, list[dict[str, Any]]()
        try:
            _unmount(path, lazy=arguments.lazy, force=arguments.force)
        except CommandError as why:
            error, users = str(why), getattr(why, "users", [])
            complain("umount", error)
        found.append({"mount": path, "seconds": round(time.monotonic() - began, 3), "error": error, "users": users})
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return ExitStatus.of(sum(bool(row["error"]) for row in found), len(found))


def _unmount(path: str, *, lazy: bool, force: bool) -> None:
    """Unmount, and wait for the end. CommandError says why it is still mounted, or what still runs."""
    mount = mount_at(path)
    what = quoted(mount.path)
    if os.geteuid() not in (0, mount.served_by):
        server = quoted(user_name(mount.served_by))
        raise CommandError(f"{what} is served by user {server}: only that user and root may unmount it")
    with _processes_of(mount) as serving:
        answer = _errno_of(mount)
        if answer == errno.ENOTCONN and (keeper := _keeper_of(mount)) in serving:
            if not force:
                raise CommandError(
                    f"{what} is dead, but its keeper {keeper} holds its pages. ttmfs restart {what} tries again; "
                    f"ttmfs rescue {keeper} DIRECTORY copies them; ttmfs umount --force {what} releases them"
                )
            signal.pidfd_send_signal(serving[keeper], signal.SIGTERM)
            _wait([serving[keeper]], END_SECONDS)
        if _is_mounted(mount):
            _detach(mount, lazy=lazy, is_silent=answer is None)
        if here := [quoted(found.path) for found in mounts() if found.device == mount.device]:
            sys.stderr.write(f"{what} is unmounted; its pages stay, because it is also mounted at {', '.join(here)}\n")
            return
        left = _wait([*serving.values()], 0.0 if lazy else NOTICE_SECONDS)
        if left and lazy:
            sys.stderr.write(f"{what} is detached; its pages are released when the last process closes its files\n")
            return
        if left:
            _check_stopped([pid for pid, fd in serving.items() if fd in left], mount)
            _check_other_namespaces(mount)
        if left := _wait(left, END_SECONDS - NOTICE_SECONDS):
            still = " and ".join(str(pid) for pid, fd in serving.items() if fd in left)
            raise CommandError(
                f"{what} is unmounted, but after {END_SECONDS:g} s this still runs: process {still}; "
                "see its log: journalctl -t ttmfs -t ttmfs-keeper"
            )


def _check_stopped(serving: list[int], mount: Mounted) -> None:
    """CommandError if all processes that serve the mount are stopped, so that they do not end."""
    if all(is_stopped(pid, mount.served_by) for pid in serving):
        named = " and ".join(map(str, serving))
        raise CommandError(
            f"{quoted(mount.path)} is unmounted, but its pages stay until process {named} ends, which is stopped: "
            f"kill -CONT {' '.join(map(str, serving))} continues it"
        )


def _check_other_namespaces(mount: Mounted) -> None:
    """CommandError if another mount namespace has a copy of the mount."""
    from .holders import other_namespaces
    from .users import in_a_line

    if elsewhere := other_namespaces(mount):
        users = [{"pid": user.pid, "uses": dict(user.uses), "description": str(user)} for user in elsewhere]
        raise _Busy(
            f"{quoted(mount.path)} is unmounted here, but its pages stay, because it is still mounted elsewhere: "
            f"{in_a_line(elsewhere)}. End these processes, or unmount it there: nsenter --mount --target PID umount "
            f"{quoted(mount.path)}",
            users,
        )


def _keeper_of(mount: Mounted) -> int:
    """The process id of a mount's keeper; 0 if it has none."""
    return next((keeper.pid for keeper in keepers(mount.served_by) if keeper.device == mount.device), 0)


@contextmanager
def _processes_of(mount: Mounted) -> Iterator[dict[int, int]]:
    """The processes that serve a mount, each with a pidfd."""
    found: dict[int, int] = {}
    with ExitStack() as stack:
        for pid in servers(mount.device, mount.served_by):
            with suppress(ProcessLookupError):
                found[pid] = os.pidfd_open(pid)
                stack.callback(os.close, found[pid])
        still = servers(mount.device, mount.served_by)  # a number may have been given to another process
        yield {pid: pidfd for pid, pidfd in found.items() if pid in still}


def _wait(pidfds: list[int], seconds: float) -> list[int]:
    """Wait for the end of processes. Those that still run after some seconds."""
    left, end = list(pidfds), time.monotonic() + seconds
    while left:
        ended, _, _ = select.select(left, [], [], max(0.0, end - time.monotonic()))
        if not ended:
            break
        left = [fd for fd in left if fd not in ended]
    return left


def _errno_of(mount: Mounted) -> int | None:
    """How the mount answers: 0, or an errno. ENOTCONN: nobody serves it. None: it does not answer."""

    def number() -> int:
        try:
            os.statvfs(mount.path)
        except OSError as error:
            return error.errno or 0
        return 0

    return next(iter(ask(mount.path, number).items), None)


def _is_mounted(mount: Mounted) -> bool:
    return any(found.path == mount.path and found.device == mount.device for found in mounts())


def _detach(mount: Mounted, *, lazy: bool, is_silent: bool) -> None:
    """Unmount: root by umount2(2), following no link, and users by fusermount3."""
    what = quoted(mount.path)
    if os.geteuid():
        words = [FUSERMOUNT, "-u", *(["-z"] if lazy else []), "--", mount.path]
    else:
        words = [sys.executable, "-I", "-S", PROGRAM, mount.path, *(["lazy"] if lazy else [])]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=UNMOUNT_SECONDS, check=False, env={**os.environ, "LC_ALL": "C"})  # fmt: skip
    except FileNotFoundError:
        raise CommandError(f"{FUSERMOUNT} is not installed; install the package fuse3") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{what} was not unmounted within {UNMOUNT_SECONDS:g} s; try again") from None
    if done.returncode and _is_mounted(mount):
        if "busy" in done.stderr:
            raise _busy(mount, is_silent=is_silent)
        raise CommandError(f"{what}: {done.stderr.strip() or f'status {done.returncode}'}")


def _busy(mount: Mounted, *, is_silent: bool) -> _Busy:
    """Who uses a mount, and what to do."""
    from .holders import Holders
    from .users import in_a_line

    what = quoted(mount.path)
    below = [quoted(found.path) for found in mounts() if found.path.startswith(f"{mount.path}/")]
    holders = Holders(mount)
    users = [{"pid": user.pid, "uses": dict(user.uses), "description": str(user)} for user in holders.found]
    why = [f"{path} is mounted in it: unmount that first" for path in below]
    if holders.found:
        why.append(in_a_line(holders.found))
    if holders.hidden:
        why.append(f"{holders.hidden} processes of other users could not be examined; root sees them")
    if holders.holds_this_process:
        why.append("your working directory is in it: leave it with cd")
    if is_silent:
        remedy = f"ttmfs doctor {what} says what to do"
        why.append(f"it does not answer, and programs that wait for it cannot be seen ({remedy})")
    if not why:
        why.append("no process of this PID namespace uses it; perhaps one of a container, or a loop device")
    advice = f"End or leave what uses it and try again, or detach it now: ttmfs umount --lazy {what}"
    return _Busy(f"{what} is busy and stays mounted: {'; '.join(why)}. {advice}", users)


COMMANDS = (
    Command(
        "umount",
        "End mounts and release their pages, except those in store=DIR. It returns once the daemon and its keeper\n"
        "have ended, so that the memory is free. A mount in use stays, and the message names the processes: users see\n"
        "their own processes, root sees all in this PID namespace. Only root and the user who mounted may unmount.",
        """\
examples:
  ttmfs umount /mnt/ttm
  ttmfs umount --lazy /mnt/ttm      detach it now; it ends when the last program closes its files
  ttmfs umount --force /mnt/ttm     dead, and the pages are not wanted any more""",
        _add,
        _run,
    ),
)
