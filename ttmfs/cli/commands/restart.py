"""``restart``: has the keeper of a mount replace its daemon, and waits until the next one answers.

The mount itself is asked only in child processes, because its daemon may hang: that is a reason to restart it.
"""

import argparse
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ...linux.mountinfo import Mounted
from ...quoting import plain, quoted
from ..keepers import Keeper, daemons, keepers
from .child_process import ask
from .command import Command, CommandError
from .mounts import config, mount_at, opened, version_of
from .terminal import user_name

__all__ = ["COMMANDS"]

PATIENCE = 60.0
"""Seconds within which the next daemon must answer. The keeper gives up after 30 s without one."""

LOOK_SECONDS = 0.05
LONGEST_GAP = 5.0
"""Seconds without any daemon after which the keeper has given up: it pauses at most 3.2 s between two starts."""


class Server(NamedTuple):
    """Who answers: the process id of the daemon, and its version. 0 and "" if nobody does."""

    daemon_pid: int
    version: str
    errno: int = 0


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mount", metavar="MNT", help="the mount point")
    parser.add_argument("--json", action="store_true", help="an object: mount, keeper_pid, before, after, seconds")


def _run(arguments: argparse.Namespace) -> int:
    mount = mount_at(arguments.mount)
    keeper = _keeper_of(mount)
    before, began = _server(mount.path), time.monotonic()
    if not before.daemon_pid:  # it hangs, or is dead
        before = before._replace(daemon_pid=next(iter(daemons(keeper.pid, mount.served_by)), 0))
    with _held(keeper, mount.served_by) as (pidfd, is_running):
        signal.pidfd_send_signal(pidfd, signal.SIGUSR1)
        after = _wait_for_next(mount, keeper.pid, before, is_running)
    seconds = round(time.monotonic() - began, 3)
    if arguments.json:
        servers = {name: {"daemon_pid": it.daemon_pid, "version": it.version}
                   for name, it in (("before", before), ("after", after))}  # fmt: skip
        found = {"mount": mount.path, "keeper_pid": keeper.pid, **servers, "seconds": seconds}
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        what = f"daemon {before.daemon_pid}, version {before.version or '?'}," if before.daemon_pid else "no daemon"
        text = f"{what} replaced by {after.daemon_pid}, version {after.version}, in {seconds:.2f} s"
        sys.stdout.write(f"{quoted(mount.path)}: {plain(text)}\n")
    return 0


def _keeper_of(mount: Mounted) -> Keeper:
    """The keeper that holds the state of a mount. CommandError if this user may not restart it, or there is none."""
    what = quoted(mount.path)
    keeper = next((keeper for keeper in keepers(mount.served_by) if keeper.device == mount.device), None)
    if keeper:
        if keeper.is_stopped:
            raise CommandError(f"{what}: its keeper is stopped; continue it first: kill -CONT {keeper.pid}")
        return keeper
    if os.geteuid() not in (0, mount.served_by):
        server = quoted(user_name(mount.served_by))
        raise CommandError(f"{what} is served by user {server}: only that user and root may restart it")
    raise CommandError(f"{what} has no keeper that could start another daemon; unmount it, and mount it again")


@contextmanager
def _held(keeper: Keeper, user: int) -> Iterator[tuple[int, Any]]:
    """A descriptor of the keeper's process, and whether it still runs. CommandError if it has ended."""
    try:
        pidfd = os.pidfd_open(keeper.pid)
    except ProcessLookupError:
        raise CommandError(f"the keeper {keeper.pid} has just ended") from None
    try:
        if not any(found.pid == keeper.pid and found.device == keeper.device for found in keepers(user)):
            raise CommandError(f"the keeper {keeper.pid} has just ended")  # the number may be another process's now
        yield pidfd, lambda: not _has_ended(pidfd)
    finally:
        os.close(pidfd)


def _has_ended(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return False


def _server(path: str) -> Server:
    """Who answers at a mount point now."""
    answer = ask(path, lambda: _asked(path))
    return Server(*answer.items[0]) if answer.items else Server(0, "")


def _asked(path: str) -> tuple[int, str, int]:
    try:
        with opened(path) as root:
            version, pid = version_of(root), config(root).get("daemon_pid")
    except OSError as error:
        return 0, "", error.errno or 0
    return pid if isinstance(pid, int) else 0, version, 0


def _wait_for_next(mount: Mounted, keeper: int, before: Server, is_running: Any) -> Server:
    """The daemon that answers after the one before. CommandError if none does in time."""
    what, end, seen = quoted(mount.path), time.monotonic() + PATIENCE, time.monotonic()
    pages = f"its keeper {keeper} holds the pages. The log says why: journalctl -t ttmfs -t ttmfs-keeper"
    while time.monotonic() < end:
        if not is_running():
            raise CommandError(f"{what}: the mount has ended meanwhile")
        serving = daemons(keeper, mount.served_by)
        seen = time.monotonic() if serving else seen
        if serving and before.daemon_pid not in serving:
            after = _server(mount.path)
            if after.errno in (errno.EACCES, errno.EPERM):  # another user's mount is closed even to root
                return Server(serving[0], "?")
            if after.daemon_pid in serving:
                return after
        elif time.monotonic() > seen + LONGEST_GAP:
            raise CommandError(f"{what}: no daemon could start, and the mount is dead; {pages}")
        time.sleep(LOOK_SECONDS)
    raise CommandError(f"{what}: no daemon has answered for {PATIENCE:g} s; {pages}")


COMMANDS = (
    Command(
        "restart",
        "Replace the daemon of a mount by another, of the version that is installed now. No page and no open file is\n"
        "lost; clients wait for a moment. The command returns once the next daemon answers. Only root and the user\n"
        "who mounted may restart it.",
        """\
examples:
  ttmfs restart /mnt/ttm                 after an upgrade, or if the daemon hangs
  ttmfs restart --json /mnt/ttm | jq .seconds""",
        _add,
        _run,
    ),
)
