"""``doctor``: looks at the machine and its mounts, and says what to do. It changes nothing, and needs no right."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.metadata
import json
import os
import pwd
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...linux import memory
from ...linux.mountinfo import Mounted, ttmfs_mounts
from ...linux.system_calls import swap_space
from ...options import BASE_PAGE_SIZE
from ...quoting import plain, quoted
from ...version import __version__
from ..keepers import Keeper, children, is_stopped, keepers
from ..rescue import open_file
from .apart import PATIENCE, Answer, ask, ask_all
from .command import Command, CommandError
from .mounts import config, opened
from .terminal import has_colours, painted, size

__all__ = ["COMMANDS"]

OK: Literal["ok"] = "ok"
WARNING: Literal["warning"] = "warning"
PROBLEM: Literal["problem"] = "problem"

COLOURS = {OK: "32", WARNING: "33", PROBLEM: "1;31"}

LONGEST_STATS = 1 << 20  # bytes
FEW_FILES = 1024
FUSE = "/dev/fuse"
_NO_LIMIT = 1 << 62


class Check(NamedTuple):
    """What was looked at, how it is, and what to do about it, if anything."""

    what: str
    state: Literal["ok", "warning", "problem"]
    found: str
    do: str = ""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", metavar="MNT", help="these mounts alone (all that there are)")
    parser.add_argument("--json", action="store_true", help="a list of objects: what, state, found, do")


def _run(arguments: argparse.Namespace) -> int:
    places = {mount.path: mount for mount in ttmfs_mounts()}
    if arguments.paths:
        wanted = [_place_of(path, places) for path in arguments.paths]
        places = {place: places[place] for place in wanted}
    checks = [check for look in LOOKS for check in look()]
    answers = ask_all([(mount.path, partial(_asked, mount)) for mount in places.values()])
    kept = keepers()
    for mount, answer in zip(places.values(), answers, strict=True):
        keeper = next((keeper for keeper in kept if keeper.device == mount.device), None)
        checks += _mount(mount, answer, keeper)
    if arguments.json:
        sys.stdout.write(json.dumps([check._asdict() for check in checks], indent=1) + "\n")
    else:
        _show(checks)
    return int(any(check.state == PROBLEM for check in checks))


def _place_of(path: str, places: Iterable[str]) -> str:
    """Where the mount at a path is. The mount itself is not touched: it may hang."""
    place = os.path.abspath(path)
    if place not in places:
        above, name = os.path.split(place)
        found = ask(path, lambda: os.path.join(os.path.realpath(above), name))
        place = found.items[0] if found.items else place
    if place not in places:
        raise CommandError(f"{quoted(path)} is no mount of ttmfs")
    return place


def _asked(mount: Mounted) -> list[dict[str, Any]]:
    return [_ask(mount)]


def _show(checks: list[Check]) -> None:
    colours, width = has_colours(sys.stdout), max(len(check.what) for check in checks)
    for check in checks:
        state = painted(f"{check.state:<7}", COLOURS[check.state], colours=colours)
        sys.stdout.write(f"{state}  {check.what:<{width}}  {plain(check.found)}\n")
        if check.do:
            sys.stdout.write(f"{'':{11 + width}}-> {plain(check.do)}\n")
    counts = {state: sum(check.state == state for check in checks) for state in (PROBLEM, WARNING)}
    if not any(counts.values()):
        sys.stdout.write("all is well\n")
    else:
        sys.stdout.write(", ".join(f"{n} {state}{'s' * (n != 1)}" for state, n in counts.items() if n) + "\n")


# --- the machine ---


def _fuse() -> Iterator[Check]:
    if not os.path.exists(FUSE):
        yield Check(
            FUSE, PROBLEM, "is not there", "modprobe fuse; in a container give it the device: --device /dev/fuse"
        )
    elif not os.access(FUSE, os.R_OK | os.W_OK):
        yield Check(
            FUSE, PROBLEM, "may not be opened by you", f"chmod 0666 {FUSE}, as root; udev does it on most systems"
        )
    else:
        try:
            os.close(os.open(FUSE, os.O_RDWR | os.O_CLOEXEC))
            yield Check(FUSE, OK, "can be opened")
        except OSError as error:  # a control group can forbid it, whatever the mode
            yield Check(
                FUSE, PROBLEM, error.strerror or str(error), "allow the device in the container, or modprobe fuse"
            )
    if not (found := shutil.which("fusermount3")):
        yield Check("fusermount3", PROBLEM, "is not installed", "apt install fuse3")
    elif os.geteuid() and not os.stat(found).st_mode & 0o4000:
        yield Check("fusermount3", PROBLEM, f"{found} is not set-user-id, so users cannot mount", f"chmod u+s {found}")
    else:
        yield Check("fusermount3", OK, found)
    if os.geteuid():
        allowed = False
        with contextlib.suppress(OSError):
            allowed = bool(re.search(r"^\s*user_allow_other\b", Path("/etc/fuse.conf").read_text(), re.MULTILINE))
        if allowed:
            yield Check("allow_other", OK, "users may give it (user_allow_other in /etc/fuse.conf)")
        else:
            yield Check(
                "allow_other", WARNING, "a user's mount cannot be shown to others",
                "if that is wanted: user_allow_other in /etc/fuse.conf",
            )  # fmt: skip


def _kernel() -> Iterator[Check]:
    text = os.uname().release
    match = re.match(r"(\d+)\.(\d+)", text)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    for needed, state, lacks in (
        ((5, 14), PROBLEM, "writeback and dropping need 5.14"),
        ((6, 5), WARNING, "before 6.5 (cachestat) reading holes of .image, and counting swapped-out pages, are slow"),
        ((6, 9), WARNING, "before 6.9 (FUSE_NOTIFY_RESEND) open files are lost when a daemon is killed"),
    ):  # fmt: skip
        if version < needed:
            yield Check("kernel", state, f"{text}: {lacks}", "use a newer kernel")
            return
    yield Check("kernel", OK, text)


def _memory() -> Iterator[Check]:
    total, free = swap_space()
    if not total:
        yield Check("swap", WARNING, "there is none, so pages cannot leave memory", "swapon a device, a file or zram")
    elif free < total // 10:
        yield Check(
            "swap", WARNING, f"{size(free)} of {size(total)} are free", "add some: swapon a device, a file or zram"
        )
    else:
        yield Check("swap", OK, f"{size(free)} of {size(total)} are free")
    with contextlib.suppress(OSError):
        if Path("/proc/sys/vm/swappiness").read_text().strip() == "0":
            yield Check(
                "swappiness", WARNING, "is 0: pages leave memory only when all else fails", "sysctl vm.swappiness=60"
            )
    with contextlib.suppress(OSError):
        text = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
        chosen = re.search(r"\[(\w+)\]", text)
        if chosen and chosen[1] in ("always", "force"):
            yield Check(
                "shmem_enabled", WARNING, f"is {chosen[1]}: small pages can take 2 MiB each, which budgets do not show",
                "echo never >/sys/kernel/mm/transparent_hugepage/shmem_enabled, or advise",
            )  # fmt: skip
        elif chosen:
            yield Check("shmem_enabled", OK, f"is {chosen[1]}")
    yield from _group()


def _group() -> Iterator[Check]:
    """The limits of this process' control group; a daemon of a service has its own."""
    ram = os.sysconf("SC_PHYS_PAGES") * BASE_PAGE_SIZE
    for group in memory.control_groups():
        for name in "memory.max", "memory.limit_in_bytes", "memory.high":
            limit = memory.read_number(group / name)
            if limit is not None and limit < min(ram, _NO_LIMIT):
                yield Check(
                    "control group", WARNING, f"{quoted(group)} has {name} of {size(limit)}",
                    "mounts made from here store no more than that in memory: keep size= below it, or raise it",
                )  # fmt: skip
                return
    yield Check("control group", OK, "no limit of memory here below the machine's")


def _rights() -> Iterator[Check]:
    if os.geteuid():
        try:
            may = not subprocess.run(
                ["unshare", "-U", "-r", "-m", "true"], capture_output=True, timeout=PATIENCE, check=False
            ).returncode
        except (OSError, subprocess.TimeoutExpired):
            may = False
        if may:
            yield Check("user namespaces", OK, "can be made: a user's mount has a private tmpfs")
        else:
            yield Check(
                "user namespaces", WARNING, "may not be made by you: backups lie in a directory instead",
                "sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), or user.max_user_namespaces",
            )  # fmt: skip
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < FEW_FILES:
        yield Check(
            "RLIMIT_NOFILE", WARNING, f"{hard} files at most, one a backup that is in use", "ulimit -n, limits.conf"
        )
    else:
        yield Check("RLIMIT_NOFILE", OK, f"{soft} files, up to {hard if hard >= 0 else 'any number'}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() and soft != resource.RLIM_INFINITY:
        yield Check(
            "RLIMIT_MEMLOCK", WARNING, f"{size(soft)}: the daemon's memory can be swapped out, and be slow then",
            "memlock unlimited in /etc/security/limits.conf, or LimitMEMLOCK= of the unit",
        )  # fmt: skip
    else:
        yield Check("RLIMIT_MEMLOCK", OK, "the daemon's memory can be locked")
    if os.path.exists("/dev/log"):
        yield Check("syslog", OK, "/dev/log is there")
    else:
        yield Check(
            "syslog", WARNING, "no /dev/log: what daemons in the background say is lost", "run mount.py -f, or a syslog"
        )


def _software() -> Iterator[Check]:
    yield Check("ttmfs", OK, f"{__version__}, Python {sys.version.split()[0]}")
    try:
        pyfuse3 = importlib.import_module("pyfuse3")  # whether it can be is the question
    except ImportError as error:
        yield Check("pyfuse3", PROBLEM, f"cannot be imported: {error}", "pip install pyfuse3 (Debian: python3-pyfuse3)")
        return
    version = importlib.metadata.version("pyfuse3")
    if callable(getattr(pyfuse3, "_wait_fuse_readable", None)):
        yield Check("pyfuse3", OK, f"{version}; busy polling finds its function")
    else:
        yield Check("pyfuse3", WARNING, f"{version} lacks the function for busy polling: requests take twice as long",
                    "pip install 'pyfuse3>=3.4,<3.6'")  # fmt: skip


LOOKS = (_fuse, _kernel, _memory, _rights, _software)


# --- mounts ---


def _ask(mount: Mounted) -> dict[str, Any]:
    """What a mount answers. In a process apart, as it may hang; and checked, as it may be anyone's."""
    try:
        with opened(mount.path) as root:
            full = not os.fstatvfs(root).f_bavail
            if os.fstat(root).st_dev != mount.st_dev:
                return {"errno": 0, "error": "another mount lies over it"}
            with open(open_file(".stats", root), "rb") as file:
                built = re.search(rb'ttmfs_build_info\{version="([^"]{1,40})"', file.read(LONGEST_STATS))
            return {
                "full": full,
                "config": config(root),
                "version": built[1].decode(errors="replace") if built else "?",
            }
    except OSError as error:
        return {"errno": error.errno, "error": error.strerror or str(error)}


def _mount(mount: Mounted, answer: Answer, keeper: Keeper | None) -> Iterator[Check]:
    what = quoted(mount.path)
    found: dict[str, Any] = answer.items[0] if answer.items else {"errno": 0, "error": answer.error}
    is_strangers = mount.served_by not in (0, os.geteuid())
    if answer.is_silent:
        yield _silent(what, mount, keeper)
    elif found.get("errno") == errno.ENOTCONN:
        yield _dead(what, mount, keeper)
    elif found.get("errno") in (errno.EACCES, errno.EPERM):
        yield Check(what, OK, "is another user's, and not shown to you")
    elif "error" in found:
        yield Check(what, PROBLEM, found["error"], "its log says more: journalctl -t ttmfs")
    else:
        yield _alive(what, mount, keeper, found["config"], found["version"])
        if found["full"]:
            yield Check(
                what, WARNING, "is full: what is stored now is refused (ENOSPC)",
                "drop pages, or give it more: setfattr -n user.ttmfs.size -v SIZE " + what if not is_strangers
                else f"only {_who(mount)}, who serves it, can give it more",
            )  # fmt: skip


def _who(mount: Mounted) -> str:
    """The user who serves a mount."""
    try:
        return f"user {pwd.getpwuid(mount.served_by).pw_name}"
    except KeyError:
        return f"user {mount.served_by}"


def _silent(what: str, mount: Mounted, keeper: Keeper | None) -> Check:
    """A mount that hangs. A killed daemon costs nothing, since its keeper starts another."""
    found = f"has not answered for {PATIENCE:g} s"
    if keeper is None:
        if mount.served_by not in (0, os.geteuid()):
            do = f"{_who(mount)} serves it: run ttmfs doctor as that user" + f", or umount -l {what}" * (
                not os.geteuid()
            )
        else:
            do = "its daemon may be stopped, or its disk slow; if a service serves it: systemctl restart"
        return Check(what, PROBLEM, found, do)
    daemons = children(keeper.pid)
    stopped = [pid for pid in daemons if is_stopped(pid)]
    if keeper.is_stopped:
        do = f"kill -CONT {keeper.pid} lets its keeper go on, which is stopped"
    elif stopped:
        do = f"kill -CONT {stopped[0]} lets its daemon go on, which is stopped"
    else:
        do = f"kill -USR1 {keeper.pid} restarts its daemon"
    if daemons and not keeper.is_stopped:
        do += f"; kill -KILL {daemons[0]} has its keeper, {keeper.pid}, start another, and no page is lost"
    return Check(what, PROBLEM, found, do)


def _dead(what: str, mount: Mounted, keeper: Keeper | None) -> Check:
    if os.geteuid() and mount.served_by != os.geteuid():
        return Check(what, WARNING, "is dead, and another user's", "only that user, and root, can do something")
    if keeper:
        wake = f"kill -CONT {keeper.pid}, as it is stopped; " if keeper.is_stopped else ""
        return Check(
            what, PROBLEM, f"is dead, but its keeper {keeper.pid} holds the pages",
            f"{wake}kill -USR1 {keeper.pid} tries again; ttmfs rescue {keeper.pid} DIRECTORY gets the pages out",
        )  # fmt: skip
    if mount.served_by != os.geteuid():
        return Check(
            what, PROBLEM, f"is dead, and {_who(mount)}'s", f"run ttmfs doctor as that user; umount -l {what} ends it"
        )
    return Check(
        what, PROBLEM, "is dead: daemon and keeper are gone, or are another user's",
        f"mount.py {what} mounts anew (with store= its pages are there again); fusermount3 -u {what} ends it",
    )  # fmt: skip


def _alive(what: str, mount: Mounted, keeper: Keeper | None, found: dict[str, Any], version: str) -> Check:
    if mount.served_by not in (0, os.geteuid()):  # what it says of processes could be anyone's
        return Check(what, OK, f"answers; {_who(mount)} serves it")
    kept_by = found.get("keeper_pid")
    if version != __version__:
        return Check(
            what, WARNING, f"is served by version {version}, installed is {__version__}",
            f"kill -USR1 {kept_by}: the new one takes it over" if kept_by else "mount it anew",
        )  # fmt: skip
    if not kept_by:
        lost = "" if found.get("store") else ", and then its pages are gone"
        return Check(
            what, WARNING, f"answers, but has no keeper: a daemon that is killed leaves it dead{lost}", "keeper=on"
        )
    if keeper and keeper.is_stopped:
        return Check(
            what, WARNING, f"answers, but its keeper {keeper.pid} is stopped: a daemon that dies is not replaced",
            f"kill -CONT {keeper.pid}",
        )  # fmt: skip
    native = "programs get descriptors" if found.get("descriptors") else "programs use .image"
    return Check(what, OK, f"answers; daemon {found.get('daemon_pid')}, keeper {kept_by}; {native}")


COMMANDS = (
    Command(
        "doctor",
        "Look at what ttmfs needs of this machine, at limits that hold here, and at the mounts there are; say what to\n"
        "do. Nothing is changed. Run it as the user who will mount.\n\n"
        "exit status: 0 if there is no problem (there may be warnings); 1 if there is.",
        """\
examples:
  ttmfs doctor
  ttmfs doctor /mnt/ttm
  ttmfs doctor --json | jq '.[] | select(.state == "problem")'""",
        _add,
        _run,
    ),
)
