"""``bench``: a mount beside a tmpfs on this machine, in turns, with a backup of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ...linux import system_calls
from ...linux.tmpfs import new_tmpfs
from ...quoting import plain, quoted
from .command import Command, CommandError
from .mounts import Place, config, root_at
from .page_operations import (
    REQUEST_BYTES,
    Pages,
    buffer,
    create,
    open_read,
    open_write,
    pread,
    pwrite,
    read_image,
    unlink,
    wake_up_microseconds,
    write_image,
)
from .terminal import is_terminal, size, table

__all__ = ["COMMANDS"]

SECONDS, LEAST_ROUNDS = 20.0, 3
PAGES, HELD = 64, 16
"""Pages of a round, and how many of them are open for pread and pwrite."""

IMAGE_BYTES = 8 << 20
MARGIN = 2
"""The room that must be free, relative to what is stored."""

FILES: dict[str, Callable[[Pages], None]] = {
    "create+write+close": create,
    "pread": pread,
    "pwrite": pwrite,
    "open+read+close": open_read,
    "open+write+close": open_write,
    "unlink": unlink,
}
"""The order matters: each operation needs what the one before it left."""

IMAGE = {"1 MiB write": write_image, "1 MiB read": read_image}
SHMEM = ".shmem "
"""Before the names of transfers through ``.shmem``. Beside them stand those of the tmpfs's file."""


@dataclass
class Side:
    """One directory: the backup, or one on a tmpfs. `images` are descriptors by the prefix of a transfer's name."""

    directory: int
    pages: Pages
    images: dict[str, int]
    microseconds: dict[str, list[float]] = field(default_factory=dict)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mount", metavar="MNT", help="the mount point")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long to measure (default: 20)")
    parser.add_argument("--json", action="store_true", help="an object: microseconds, ratios, wake_up_microseconds")


def _run(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.seconds <= 3600:
        raise CommandError("--seconds: give seconds up to 3600")
    path: str = arguments.mount
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    system_calls.die_with(os.getppid(), signal.SIGTERM)  # of a SIGKILL it would leave its backup
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(root_at(path))
        page_size = place.number("page_size")
        _check_room(place, page_size)
        loop = config(place.fd).get("loop")
        mine = stack.enter_context(_in_backup(place, page_size))
        theirs = stack.enter_context(_in_tmpfs(page_size))
        if is_terminal(sys.stderr):
            sys.stderr.write(f"measuring for {arguments.seconds:g} s, in a backup of its own\n")
        rounds = _take_turns(mine, theirs, arguments.seconds)
    found = _result(mine, theirs) | {
        "rounds": rounds, "loop": loop, "page_size": page_size, "wake_up_microseconds": wake_up_microseconds(),
    }  # fmt: skip
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.writelines(plain(line) + "\n" for line in _lines(found))
    return 0


# --- the two directories ---


def _check_room(place: Place, page_size: int) -> None:
    room = os.fstatvfs(place.fd)
    needed, free = MARGIN * (PAGES * page_size + IMAGE_BYTES), room.f_bavail * room.f_frsize
    if free < needed or not room.f_favail:
        raise CommandError(
            f"{quoted(place.path)} has {size(free)} free, and this needs {size(needed)} and a backup's name: "
            "drop pages, or raise its size"
        )


def _descriptor(name: str, directory: int) -> int:
    return os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)


@contextlib.contextmanager
def _in_backup(place: Place, page_size: int) -> Iterator[Side]:
    """A new backup, which is removed at the end, also after an error or Ctrl-C."""
    name = f"ttmfs-bench.{os.getpid()}.{secrets.token_hex(4)}"
    root = f"/proc/self/fd/{place.fd}"
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, root, name)
        os.mkdir(f"{root}/{name}", 0o700)
        directory = os.open(f"{root}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        os.setxattr(directory, "user.ttmfs.size", str(PAGES * page_size + IMAGE_BYTES).encode())
        images = {"": _descriptor(".image", directory)}
        stack.callback(os.close, images[""])
        with contextlib.suppress(OSError):  # uid_size=, shmem=off, or a mount that has no such file
            images[SHMEM] = _descriptor(".shmem", directory)
            stack.callback(os.close, images[SHMEM])
        yield Side(directory, _pages(page_size), images)


def _remove(root: str, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.truncate(f"{root}/{name}/.image", 0)
        os.rmdir(f"{root}/{name}")


@contextlib.contextmanager
def _in_tmpfs(page_size: int) -> Iterator[Side]:
    """A private tmpfs, or where that is not allowed a directory in /dev/shm."""
    with contextlib.ExitStack() as stack:
        try:
            directory, namespace = new_tmpfs(size=str(MARGIN * (PAGES * page_size + IMAGE_BYTES)))
            stack.callback(os.close, directory)
            if namespace is not None:
                os.close(namespace)
        except OSError:
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix="ttmfs-bench.", dir="/dev/shm"))
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, directory)
        image = os.open("image", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
        stack.callback(os.close, image)
        yield Side(directory, _pages(page_size), {"": image, SHMEM: image})


def _pages(page_size: int) -> Pages:
    """Names relative to a directory, so that both sides have paths of the same length."""
    return Pages([str(handle) for handle in range(1, PAGES + 1)], page_size, os.urandom(page_size))


# --- measuring ---


def _take_turns(mine: Side, theirs: Side, seconds: float) -> int:
    """Do every operation on both sides, in turns, until the time is over. Returns the number of rounds."""
    end, request = time.monotonic() + seconds, buffer(REQUEST_BYTES)
    here, turn = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), 0
    try:
        while turn <= LEAST_ROUNDS or time.monotonic() < end:
            sides = [mine, theirs] if turn % 2 else [theirs, mine]
            for name, act in FILES.items():
                for side in sides:
                    os.fchdir(side.directory)
                    with side.pages.holding(HELD) if act in (pread, pwrite) else contextlib.nullcontext():
                        _timed(side, name, PAGES, act, side.pages)
            for prefix in mine.images:
                for name, move in IMAGE.items():
                    for side in sides:
                        count, first = IMAGE_BYTES // REQUEST_BYTES, PAGES * side.pages.size
                        _timed(side, prefix + name, count, move, side.images[prefix], IMAGE_BYTES, request, first)
            turn += 1
    finally:
        os.fchdir(here)
        os.close(here)
    for side in mine, theirs:
        for values in side.microseconds.values():
            del values[0]  # the first round warms up
    return turn - 1


def _timed(side: Side, name: str, count: int, act: Callable[..., None], *arguments: Any) -> None:
    start = time.perf_counter_ns()
    act(*arguments)
    side.microseconds.setdefault(name, []).append((time.perf_counter_ns() - start) / count / 1000)


# --- what is shown ---


def _result(mine: Side, theirs: Side) -> dict[str, Any]:
    medians = [
        {name: round(statistics.median(values), 3) for name, values in side.microseconds.items()}
        for side in (mine, theirs)
    ]
    ratios = {name: round(medians[0][name] / medians[1][name], 2) for name in medians[0]}
    return {"microseconds": {"mount": medians[0], "tmpfs": medians[1]}, "ratios": ratios}


def _lines(found: dict[str, Any]) -> list[str]:
    mount, tmpfs = found["microseconds"]["mount"], found["microseconds"]["tmpfs"]
    rows = [(name, f"{us:.1f}us", f"{tmpfs[name]:.1f}us", f"{found['ratios'][name]:.1f}") for name, us in mount.items()]
    lines = table(("OPERATION", "MOUNT", "TMPFS", "RATIO"), rows, frozenset({"OPERATION"}))
    return [*lines, f"medians of {found['rounds']} rounds, in turns", *_meaning(found)]


def _meaning(found: dict[str, Any]) -> Iterator[str]:
    """What to make of the figures."""
    read, wake = found["microseconds"]["mount"]["pread"], found["wake_up_microseconds"]
    if wake:
        yield (
            f"Waking a process on another CPU takes {wake:.0f} us here. A round trip to the daemon, such as a pread, "
            f"has up to two of these, and took {read:.0f} us."
        )
    if (ratio := found["ratios"].get(SHMEM + "1 MiB read")) is not None:
        yield f"For many pages use .shmem, or ttmfs.client: {ratio:.1f} times the time of a tmpfs. It asks no daemon."
    else:
        yield "There is no .shmem for you here: for many pages use .image, which moves up to 1 MiB a request."
    if found["loop"] == "python":
        yield "Python answers the requests here. Compiled code is faster; ttmfs doctor says whether there is any."


COMMANDS = (
    Command(
        "bench",
        "Measure page operations and transfers of 1 MiB on a mount, in turns with a tmpfs, and say what it means.\n"
        "The command makes a backup of its own and removes it, also after Ctrl-C. Other backups are not touched.",
        """\
examples:
  ttmfs bench /mnt/ttm
  ttmfs bench --seconds 5 --json /mnt/ttm | jq .ratios""",
        _add,
        _run,
        waits_for=lambda arguments: [os.path.join(arguments.mount, "bench")],
    ),
)
