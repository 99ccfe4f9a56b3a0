"""``doctor``: checks the machine and its mounts, and says what to do. It changes nothing and needs no privilege."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...linux import fuse_device, memory
from ...linux.mountinfo import Mounted, ttmfs_mounts
from ...linux.system_calls import swap_space
from ...options import BASE_PAGE_SIZE
from ...quoting import plain, quoted
from ...version import __version__
from ..keepers import Keeper, daemons, is_stopped, keepers
from ..rescue import open_file
from .child_process import PATIENCE, Answer, ask_all
from .command import Command
from .mounts import config, mount_at, opened
from .terminal import has_colours, painted, size, user_name

__all__ = ["COMMANDS", "OK", "Check", "asked", "checks_of"]

State = Literal["ok", "warning", "problem"]
OK: State = "ok"
WARNING: State = "warning"
PROBLEM: State = "problem"

COLOURS = {OK: "32", WARNING: "33", PROBLEM: "1;31"}

LONGEST_STATS = 1 << 20  # bytes
NO_LIMIT = 1 << 62


class Check(NamedTuple):
    """What was checked, its state, what was found, and what to do about it."""

    what: str
    state: State
    found: str
    do: str = ""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", metavar="MNT", help="check only these mounts (default: all)")
    parser.add_argument("--json", action="store_true", help="a list of objects: what, state, found, do")


def _run(arguments: argparse.Namespace) -> int:
    wanted = [mount_at(path) for path in arguments.paths] or [*{m.path: m for m in ttmfs_mounts()}.values()]
    checks = [check() for check in (*MACHINE, *(FOR_USERS if os.geteuid() else ()))]
    answers = ask_all([(mount.path, partial(asked, mount)) for mount in wanted])
    by_device = {keeper.device: keeper for keeper in keepers()}
    for mount, answer in zip(wanted, answers, strict=True):
        checks += checks_of(mount, answer, by_device.get(mount.device))
    if arguments.json:
        sys.stdout.write(json.dumps([check._asdict() for check in checks], indent=1) + "\n")
    else:
        _show(checks)
    return int(any(check.state == PROBLEM for check in checks))


def _show(checks: list[Check]) -> None:
    colours, width = has_colours(sys.stdout), max(len(check.what) for check in checks)
    for check in checks:
        state = painted(f"{check.state:<7}", COLOURS[check.state], colours=colours)
        sys.stdout.write(f"{state}  {check.what:<{width}}  {plain(check.found)}\n")
        if check.do:
            sys.stdout.write(f"{'':{11 + width}}-> {plain(check.do)}\n")
    counts = {state: sum(check.state == state for check in checks) for state in (PROBLEM, WARNING)}
    found = ", ".join(f"{count} {state}{'s' * (count != 1)}" for state, count in counts.items() if count)
    sys.stdout.write(f"{found or 'no problems'}\n")


# --- the machine ---


def _either(what: str, is_well: object, ok: str, bad: str, do: str, state: State = WARNING) -> Check:
    return Check(what, OK, ok) if is_well else Check(what, state, bad, do)


def _read(path: str) -> str:
    """The content of a file of the kernel or the system; nothing if it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _fuse_device() -> Check:
    error = fuse_device.error()
    bad = f"cannot be opened: {error}"
    return _either(fuse_device.PATH, not error, "can be opened", bad, fuse_device.ADVICE, PROBLEM)


def _fusermount() -> Check:
    if not (path := shutil.which("fusermount3")):
        return Check("fusermount3", PROBLEM, "is not installed", "apt install fuse3")
    works = not os.geteuid() or os.stat(path).st_mode & stat.S_ISUID
    bad = f"{path} is not set-user-ID, so users cannot mount"
    return _either("fusermount3", works, path, bad, f"as root: chmod u+s {path}", PROBLEM)


def _kernel() -> Check:
    release = os.uname().release
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    for needed, state, lacks in (
        ((6, 1), PROBLEM, "ttmfs needs Linux 6.1 or newer"),
        ((6, 5), WARNING, "before 6.5 (cachestat), finding swapped-out pages is slow"),
        ((6, 9), WARNING, "before 6.9 (FUSE_NOTIFY_RESEND), open files are lost when a daemon is killed"),
    ):  # fmt: skip
        if version < needed:
            return Check("kernel", state, f"{release}: {lacks}", "use a newer kernel")
    return Check("kernel", OK, release)


def _swap() -> Check:
    total, free = swap_space()
    found = f"{size(free)} of {size(total)} is free" if total else "there is none, so pages cannot leave memory"
    if total and _read("/proc/sys/vm/swappiness").strip() == "0":
        bad = "vm.swappiness is 0: the kernel swaps pages out only as a last resort"
        return Check("swap", WARNING, bad, "sysctl vm.swappiness=60")
    return _either("swap", total and free >= total // 10, found, found, "add a device, a file or zram: see swapon(8)")


def _control_group() -> Check:
    """The limits of this process' control group. A daemon that a service starts has its own."""
    ram = os.sysconf("SC_PHYS_PAGES") * BASE_PAGE_SIZE
    for group in memory.control_groups():
        for name in "memory.max", "memory.limit_in_bytes", "memory.high":
            limit = memory.read_number(group / name)
            if limit is not None and limit < min(ram, NO_LIMIT):
                return Check(
                    "control group", WARNING, f"{quoted(group)} limits memory to {size(limit)} ({name})",
                    "for mounts made from here: choose size= below it, or raise the limit",
                )  # fmt: skip
    return Check("control group", OK, "it has no limit below the memory of the machine")


def _locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return _either(
        "RLIMIT_MEMLOCK", soft == resource.RLIM_INFINITY, "the daemon can lock its memory",
        f"{size(soft)}: the daemon itself can be swapped out, and is slow then",
        "set memlock to unlimited in /etc/security/limits.conf, or LimitMEMLOCK= in the unit",
    )  # fmt: skip


def _syslog() -> Check:
    return _either(
        "syslog", os.path.exists("/dev/log"), "/dev/log exists",
        "/dev/log does not exist: the log of daemons in the background is lost",
        "mount with log=FILE, or start a syslog service",
    )  # fmt: skip


def _version() -> Check:
    return Check("ttmfs", OK, f"{__version__}, Python {sys.version.split()[0]}")


def _pyfuse3() -> Check:
    try:
        importlib.import_module("pyfuse3")
    except ImportError as error:
        install = "pip install pyfuse3 (Debian: python3-pyfuse3)"
        return Check("pyfuse3", PROBLEM, f"cannot be imported: {error}", install)
    return Check("pyfuse3", OK, importlib.metadata.version("pyfuse3"))


def _compiled() -> Check:
    found = importlib.util.find_spec("ttmfs.fuse.compiled_requests")
    return _either(
        "compiled requests", found, "are installed: C code answers the plain requests for pages in memory",
        "are not installed: Python answers all requests, which takes longer",
        "install a C compiler and Python's headers (Debian: gcc, python3-dev), then ttmfs again",
    )  # fmt: skip


def _allow_other() -> Check:
    allowed = re.search(r"^\s*user_allow_other\b", _read("/etc/fuse.conf"), re.MULTILINE)
    return _either(
        "allow_other", allowed, "users may give it (user_allow_other in /etc/fuse.conf)",
        "users cannot let others into their mounts", "if you want that: add user_allow_other to /etc/fuse.conf",
    )  # fmt: skip


def _user_namespaces() -> Check:
    command, is_allowed = ["unshare", "-U", "-r", "-m", "true"], False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        is_allowed = not subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False).returncode
    return _either(
        "user namespaces", is_allowed, "you may create them: your mounts have a private tmpfs",
        "you may not create them: backups lie in a directory instead",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), or raise user.max_user_namespaces",
    )  # fmt: skip


MACHINE = (_fuse_device, _fusermount, _kernel, _swap, _control_group, _syslog, _version, _pyfuse3, _compiled)
FOR_USERS = (_allow_other, _user_namespaces, _locked_memory)


# --- mounts ---


def asked(mount: Mounted) -> Iterator[dict[str, Any]]:
    """What a mount answers. It runs in a child process, and checks the answer, because anyone can serve a mount."""
    try:
        with opened(mount.path) as root:
            full = not os.fstatvfs(root).f_bavail
            if os.fstat(root).st_dev != mount.st_dev:
                yield {"error": "is hidden by another mount on the same path"}
                return
            with open(open_file(".stats", root), "rb") as file:
                built = re.search(rb'ttmfs_build_info\{version="([^"]{1,40})"', file.read(LONGEST_STATS))
            version = built[1].decode(errors="replace") if built else "?"
            yield {"full": full, "config": config(root), "version": version}
    except OSError as error:
        yield {"errno": error.errno, "error": error.strerror or str(error)}


def checks_of(mount: Mounted, answer: Answer, keeper: Keeper | None) -> Iterator[Check]:
    """What is to be said of a mount, given what :func:`asked` found, and its keeper if that may be examined."""
    what = quoted(mount.path)
    found: dict[str, Any] = answer.items[0] if answer.items else {"error": answer.error}
    if answer.is_silent:
        yield Check(what, PROBLEM, f"has not answered for {PATIENCE:g} s", _advice_for_silent(what, mount, keeper))
    elif found.get("errno") == errno.ENOTCONN:
        yield _dead(what, mount, keeper)
    elif found.get("errno") in (errno.EACCES, errno.EPERM):
        yield Check(what, OK, "belongs to another user, and is not shown to you")
    elif "error" in found:
        yield Check(what, PROBLEM, found["error"], "see its log: journalctl -t ttmfs")
    else:
        yield _alive(what, mount, keeper, found["config"], found["version"])
        if found["full"]:
            yield Check(
                what, WARNING, "is full: storing fails with ENOSPC",
                f"drop pages, or raise its size: ttmfs resize {what} SIZE" if _is_trusted(mount)
                else f"{_server(mount)} serves it, and can raise its size",
            )  # fmt: skip


def _server(mount: Mounted) -> str:
    return f"user {user_name(mount.served_by)}"


def _is_trusted(mount: Mounted) -> bool:
    """Whether root or the caller serves it. Another user's daemon could report the process id of any process."""
    return mount.served_by in (0, os.geteuid())


def _advice_for_silent(what: str, mount: Mounted, keeper: Keeper | None) -> str:
    """What to do about a mount that hangs. Killing the daemon loses nothing, because its keeper starts another."""
    if keeper is None and not _is_trusted(mount):
        advice = f"{_server(mount)} serves it: run ttmfs doctor as that user"
        return advice if os.geteuid() else f"{advice}, or umount -l {what}"
    if keeper is None:
        return "its daemon may be stopped, or its disk slow; if a service serves it: systemctl restart"
    if keeper.is_stopped:
        return f"kill -CONT {keeper.pid} continues its keeper, which is stopped"
    serving = daemons(keeper.pid)
    stopped = next(filter(is_stopped, serving), None)
    advice = f"ttmfs restart {what} restarts its daemon"
    if stopped:
        advice = f"kill -CONT {stopped} continues its daemon, which is stopped"
    if serving:
        advice += f"; kill -KILL {serving[0]} makes its keeper, {keeper.pid}, start another daemon, and no page is lost"
    return advice


def _dead(what: str, mount: Mounted, keeper: Keeper | None) -> Check:
    if os.geteuid() and mount.served_by != os.geteuid():
        return Check(what, WARNING, "is dead, and belongs to another user", "ask that user, or root")
    if keeper:
        wake = f"kill -CONT {keeper.pid}, because it is stopped; " if keeper.is_stopped else ""
        return Check(
            what, PROBLEM, f"is dead, but its keeper {keeper.pid} holds the pages",
            f"{wake}ttmfs restart {what} tries again; ttmfs rescue {keeper.pid} DIRECTORY copies the pages",
        )  # fmt: skip
    if mount.served_by != os.geteuid():
        advice = f"run ttmfs doctor as that user; umount -l {what} ends it"
        return Check(what, PROBLEM, f"is dead, and belongs to {_server(mount)}", advice)
    return Check(
        what, PROBLEM, "is dead: daemon and keeper are gone, or belong to another user",
        f"ttmfs mount {what} mounts it again (pages of a store= are kept); fusermount3 -u {what} ends it",
    )  # fmt: skip


def _alive(what: str, mount: Mounted, keeper: Keeper | None, found: dict[str, Any], version: str) -> Check:
    if not _is_trusted(mount):
        return Check(what, OK, f"answers; {_server(mount)} serves it")
    kept_by = found.get("keeper_pid")
    if version != __version__:
        advice = f"ttmfs restart {what} starts the installed version" if kept_by else "unmount it, and mount it again"
        return Check(what, WARNING, f"is served by version {version}, installed is {__version__}", advice)
    if not kept_by:
        lost = "" if found.get("store") else ", and its pages are lost"
        bad = f"answers, but has no keeper: if the daemon is killed, it is dead{lost}"
        return Check(what, WARNING, bad, "mount it again with keeper=on")
    if keeper and keeper.is_stopped:
        bad = f"answers, but its keeper {keeper.pid} is stopped, and would not replace a daemon that dies"
        return Check(what, WARNING, bad, f"kill -CONT {keeper.pid}")
    serves = "compiled" if found.get("loop") == "compiled" else "Python"
    return Check(what, OK, f"answers; daemon {found.get('daemon_pid')} ({serves}), keeper {kept_by}")


COMMANDS = (
    Command(
        "doctor",
        "Check what ttmfs needs of this machine, the limits of this process, and the mounts; say what to do. It\n"
        "changes nothing. Run it as the user who will mount.\n\n"
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
