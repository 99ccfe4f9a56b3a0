"""What ``doctor`` says of running mounts, and how each is mended. Another user's mount can answer anything."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ...linux.mountinfo import CEPH, NFS, Mounted, mounted_above
from ...quoting import quoted
from ...version import __version__
from ..keepers import Keeper, daemons, is_stopped, keepers
from ..rescue import open_file
from .check import OK, PROBLEM, WARNING, Check
from .child_process import PATIENCE, Answer, ask_all
from .command import CommandError
from .mounts import config, opened, version_of
from .terminal import user_name

__all__ = ["asked", "checks_of", "of_mounts", "store_checks"]

FULL = "is full: storing fails with ENOSPC"
SCARCE = (
    "stores no more, although its budget is not used up: memory and swap are down to reserve=, or a quota is used up"
)

HIDDEN = "is hidden by another mount on the same path"
LONGEST_RECORD = 1 << 12  # bytes


def of_mounts(mounts: Sequence[Mounted]) -> Iterator[Check]:
    """The checks of mounts, each asked in a child process. After them those of their stores on other machines."""
    answers = ask_all([(mount.path, partial(asked, mount)) for mount in mounts])
    by_device = {keeper.device: keeper for keeper in keepers()}
    for mount, answer in zip(mounts, answers, strict=True):
        yield from checks_of(mount, answer, by_device.get(mount.device))
    for _, check in store_checks(mounts, answers, by_device):
        yield check


def store_checks(
    mounts: Sequence[Mounted], answers: Sequence[Answer], by_device: Mapping[object, Keeper]
) -> Iterator[tuple[str, Check]]:
    """Whether stores on distributed filesystems answer, and which machine holds them; by the path of the mount.

    `answers` are what :func:`asked` found first, and `by_device` are keepers by the device of their mount.
    """
    found = [(mount, _store(mount, answer, by_device.get(mount.device)))
             for mount, answer in zip(mounts, answers, strict=True)]  # fmt: skip
    stores = [(mount.path, *store) for mount, store in found if store]
    holders = ask_all([(store, partial(_holder, store)) for _, store, _ in stores])
    for (path, store, kind), answer in zip(stores, holders, strict=True):
        yield path, _of_store(f"store {quoted(store)}", kind, answer)


def _store(mount: Mounted, answer: Answer, keeper: Keeper | None) -> tuple[str, str] | None:
    """The store of a mount, if it lies on a distributed filesystem, and the type of that.

    A mount whose store does not answer may not answer either. Then the keeper's command line names the store.
    """
    found = answer.items[0] if answer.items else {}
    store = found.get("config", {}).get("store")
    if store is None and keeper:
        options = (option for word in keeper.words for option in word.split(","))
        store = next((option[6:] for option in options if option.startswith("store=")), None)
    if not _is_trusted(mount) or not isinstance(store, str) or not store.startswith("/"):
        return None
    below = mounted_above(store)
    return (store, below.type) if below and below.type in CEPH | NFS else None


def _of_store(what: str, kind: str, answer: Answer) -> Check:
    """What is to be said of a store on a filesystem of a kind, given what :func:`_holder` found."""
    if answer.is_silent:
        return Check(
            what, PROBLEM, f"{kind} has not answered for {PATIENCE:g} s: requests fail after store_timeout=",
            "look at the servers (ceph -s), and at the network to them",
        )  # fmt: skip
    if not answer.items:
        advice = "run ttmfs doctor as the user who mounted it" if os.geteuid() else "look at its log"
        return Check(what, WARNING, f"its holder cannot be read: {answer.error}", advice)
    if (host := answer.items[0]) != socket.gethostname():
        return Check(
            what, PROBLEM, f"{kind} answers, and the machine {quoted(host)} holds it: this one has lost it",
            "its keeper takes it again when that machine lets it go; until then use the mount there",
        )  # fmt: skip
    return Check(what, OK, f"{kind} answers; this machine, {quoted(host)}, holds it")


def _holder(store: str) -> Iterator[str]:
    """The machine that holds a store, from its record."""
    with opened(store) as directory, open(open_file(".ttmfs", directory), "rb") as file:
        try:
            yield str(json.loads(file.read(LONGEST_RECORD).rstrip(b"\0 \n"))["host"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise CommandError("its .ttmfs names no machine") from None


def asked(mount: Mounted) -> Iterator[dict[str, Any]]:
    """What a mount answers. It runs in a child process, and checks the answer, because anyone can serve a mount."""
    try:
        with opened(mount.path) as root:
            room = os.fstatvfs(root)
            full = "" if room.f_bavail else SCARCE if room.f_bfree else FULL
            if os.fstat(root).st_dev != mount.st_dev:
                yield {"error": HIDDEN}
                return
            yield {"full": full, "version": version_of(root), "config": config(root)}
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
        do = f"umount {what} ends that mount" if found["error"] == HIDDEN else "see its log: journalctl -t ttmfs"
        yield Check(what, PROBLEM, found["error"], do)
    else:
        yield _alive(what, mount, keeper, found["config"], found["version"])
        if found["full"]:
            yield Check(what, WARNING, found["full"], _advice_for_full(what, mount, found["full"]))


def _advice_for_full(what: str, mount: Mounted, full: str) -> str:
    if full == SCARCE:
        return "free memory, add swap (swapon(8)), or drop pages; ttmfs why tells which it is"
    if _is_trusted(mount):
        return f"drop pages, or raise its size: ttmfs resize {what} SIZE"
    return f"{_server(mount)} serves it, and can raise its size"


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
        f"ttmfs mount {what} mounts it again (pages of a store= are kept); ttmfs umount {what} ends it",
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
