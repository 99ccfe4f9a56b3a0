"""``doctor``: looks at the machine and its mounts, and says what to do. It changes nothing, and needs no right."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.metadata
import json
import os
import re
import resource
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from .. import memory
from ..linux import swap_space
from ..mountinfo import Mounted, ttmfs_mounts
from ..options import BASE_PAGE_SIZE
from ..rescue import keepers
from ..version import __version__
from .command import Command, CommandError
from .terminal import has_colours, painted, quoted, size

__all__ = ["COMMANDS"]

OK: Literal["ok"] = "ok"
WARNING: Literal["warning"] = "warning"
PROBLEM: Literal["problem"] = "problem"

COLOURS = {OK: "32", WARNING: "33", PROBLEM: "1;31"}

ANSWER_SECONDS = 2.0
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
        wanted = {path: os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
                  for path in map(os.path.abspath, arguments.paths)}  # fmt: skip
        for path, place in wanted.items():
            if place not in places:
                raise CommandError(f"{quoted(path)} is no mount of ttmfs")
        places = {place: places[place] for place in wanted.values()}
    checks = [check for look in LOOKS for check in look()]
    checks += [check for mount in places.values() for check in _mount(mount)]
    if arguments.json:
        sys.stdout.write(json.dumps([check._asdict() for check in checks], indent=1) + "\n")
    else:
        _show(checks)
    return int(any(check.state == PROBLEM for check in checks))


def _show(checks: list[Check]) -> None:
    colours, width = has_colours(sys.stdout), max(len(check.what) for check in checks)
    for check in checks:
        state = painted(f"{check.state:<7}", COLOURS[check.state], colours=colours)
        sys.stdout.write(f"{state}  {check.what:<{width}}  {check.found}\n")
        if check.do:
            sys.stdout.write(f"{'':{11 + width}}-> {check.do}\n")
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
                ["unshare", "-U", "-r", "-m", "true"], capture_output=True, timeout=ANSWER_SECONDS, check=False
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


PROBE = """
import json, os, sys
answer = {}
try:
    answer["full"] = not os.statvfs(sys.argv[1]).f_bavail
    answer["config"] = json.load(open(sys.argv[1] + "/.config"))
    text = open(sys.argv[1] + "/.stats").read()
    answer["version"] = text.split('ttmfs_build_info{version="')[1].split('"')[0]
except OSError as error:
    answer["errno"], answer["error"] = error.errno, error.strerror
except (ValueError, IndexError):
    pass
print(json.dumps(answer))
"""
"""A process of its own asks a mount, since one that hangs can only be left to itself."""


def _ask(path: str) -> dict[str, object] | None:
    """What a mount answers; None if it does not, for so long."""
    probe = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PROBE, path], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert probe.stdout
    with probe.stdout as answer:
        if not select.select([answer], [], [], ANSWER_SECONDS)[0]:
            return None
        found = json.loads(answer.read() or "{}")
    probe.wait()
    return found if isinstance(found, dict) else {}


def _mount(mount: Mounted) -> Iterator[Check]:
    what, answer = quoted(mount.path), _ask(mount.path)
    keeping = sorted(pid for pid, words in keepers() if mount.path in words)
    if answer is None:
        who = (
            f"kill -USR1 {keeping[0]} restarts its daemon" if keeping else "its daemon may be stopped, or its disk slow"
        )
        yield Check(what, PROBLEM, f"has not answered for {ANSWER_SECONDS:g} s", who)
    elif answer.get("errno") == errno.ENOTCONN:
        if os.geteuid() and f"user_id={os.geteuid()}" not in mount.options:
            yield Check(what, WARNING, "is dead, and another user's", "only that user, and root, can do something")
        elif keeping:
            yield Check(
                what, PROBLEM, f"is dead, but its keeper {keeping[0]} holds the pages",
                f"kill -USR1 {keeping[0]} tries again; ttmfs rescue {keeping[0]} DIRECTORY gets the pages out",
            )  # fmt: skip
        else:
            yield Check(
                what, PROBLEM, "is dead: daemon and keeper are gone, or are another user's",
                f"mount.py {what} mounts anew (with store= its pages are there again); fusermount3 -u {what} ends it",
            )  # fmt: skip
    elif answer.get("errno") in (errno.EACCES, errno.EPERM):
        yield Check(what, OK, "is another user's, and not shown to you")
    elif "error" in answer:
        yield Check(what, PROBLEM, str(answer["error"]), "its log says more: journalctl -t ttmfs")
    else:
        found = answer.get("config")
        yield from _alive(what, found if isinstance(found, dict) else {}, str(answer.get("version")))
        if answer.get("full"):
            yield Check(
                what, WARNING, "is full: what is stored now is refused (ENOSPC)",
                f"drop pages, or give it more: setfattr -n user.ttmfs.size -v SIZE {what}",
            )  # fmt: skip


def _alive(what: str, found: dict[str, object], version: str) -> Iterator[Check]:
    keeper = found.get("keeper_pid")
    if version != __version__:
        yield Check(
            what, WARNING, f"is served by version {version}, installed is {__version__}",
            f"kill -USR1 {keeper}: the new one takes it over" if keeper else "mount it anew",
        )  # fmt: skip
        return
    if not keeper:
        lost = "" if found.get("store") else ", and then its pages are gone"
        yield Check(
            what, WARNING, f"answers, but has no keeper: a daemon that is killed leaves it dead{lost}", "keeper=on"
        )
        return
    native = "programs get descriptors" if found.get("descriptors") else "programs use .image"
    yield Check(what, OK, f"answers; daemon {found.get('daemon_pid')}, keeper {keeper}; {native}")


COMMANDS = (
    Command(
        "doctor",
        "Look at what ttmfs needs of this machine, at limits that hold here, and at the mounts there are; say what to\n"
        "do. Nothing is changed. What is found is of who asks: ask as the user who mounts.\n\n"
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
