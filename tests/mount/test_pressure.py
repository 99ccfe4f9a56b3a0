"""Under pressure: a control group with little memory, a swap of the test's own, and eight processes storing at once.

The daemon lives in the group, so that its store is charged to it. The test keeps no content: it follows from
the page's index, and cannot be compressed.
"""

import contextlib
import errno
import inspect
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness import Mount, count, meminfo
from stores import ZRAM, ControlGroup, swap

pytestmark = pytest.mark.serial

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
LIMIT, SWAP = 256 * MIB, 512 * MIB
RESERVE = 64 * MIB  # the default
OTHERS = 160 * MIB
"""More than the daemon, the kernel, and clients if they are inside, take of a group."""

PROCESSES = 8

Run = tuple[int, int]
"""Pages that are stored or fetched at once: the first's index, and how many."""


def client() -> None:
    """A process that stores or reads runs of pages; its source is run as a program.

    Runs of one page use page files, longer ones use .image. It reads the runs, and writes the outcome of each:
    when storing, the number of pages stored and the errno; when reading, whether they were right.
    """
    import errno
    import json
    import os
    import random
    import sys

    verb, backup, page = sys.argv[1], sys.argv[2], os.sysconf("SC_PAGE_SIZE")
    noise, span = random.Random(1).randbytes((1 << 20) + page), (1 << 20) - 3  # span is prime to 4099

    def content(first: int, count: int) -> bytes:
        """A window of the noise for each page, at a different offset for each index."""
        starts = [idx * 4099 % span for idx in range(first, first + count)]
        return b"".join([noise[start : start + page] for start in starts])

    def opened(count: int, first: int) -> "tuple[int, int]":
        """A descriptor for a run, and the run's offset in it."""
        if count > 1:
            return image, first * page
        return os.open(f"{backup}/{first + 1}", os.O_RDWR | (os.O_CREAT if verb == "store" else 0)), 0

    def store(first: int, count: int) -> "tuple[int, int]":
        fd = image
        try:
            fd, offset = opened(count, first)
            written = os.pwrite(fd, content(first, count), offset)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return 0, error.errno
        finally:
            if fd != image:
                os.close(fd)
        assert written % page == 0
        return written // page, 0

    def fetch(first: int, count: int) -> bool:
        fd, offset = opened(count, first)
        try:
            return os.pread(fd, count * page, offset) == content(first, count)
        finally:
            if fd != image:
                os.close(fd)

    runs = json.load(sys.stdin)
    image = os.open(f"{backup}/.image", os.O_RDWR)
    json.dump([(store if verb == "store" else fetch)(*run) for run in runs], sys.stdout)


CLIENT = inspect.getsource(client) + "client()\n"


def all_at_once(verb: str, backup: Path, runs: list[Run], **popen: Any) -> list[list[tuple[Run, Any]]]:
    """Deal runs out to eight processes, in order. Returns for each process the outcome of each run."""
    hands = [runs[first::PROCESSES] for first in range(PROCESSES)]
    command = [sys.executable, "-c", CLIENT, verb, str(backup)]
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in hands:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen)
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        for process, hand in zip(processes, hands, strict=True):
            assert process.stdin is not None
            json.dump(hand, process.stdin)
            process.stdin.close()
            process.stdin = None
        answers = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * PROCESSES
    return [list(zip(hand, json.loads(answer), strict=True)) for hand, answer in zip(hands, answers, strict=True)]


def cut(size: int, singles: int = 0) -> list[Run]:
    """Runs that cover `size` bytes in random order: 64 KiB to 1 MiB each, the last `singles` bytes in single pages."""
    dice = random.Random(size)
    runs, first, end = [], 0, (size - singles) // PAGE
    while first < end:
        runs.append((first, min(dice.randint(16, 256), end - first)))
        first += runs[-1][1]
    runs += [(idx, 1) for idx in range(end, size // PAGE)]
    return dice.sample(runs, len(runs))


def status(pid: int, name: str) -> int:
    """A row of a process's status, in bytes."""
    rows = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(rows[name].split()[0]) * 1024


def major_faults(pid: int) -> int:
    """How often a process has waited for memory of its own."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[9])


def test_c8_twice_the_memory_is_stored_and_read_back_bit_for_bit(mountpoint: Path, tmp_path: Path) -> None:
    with (
        swap(tmp_path, SWAP),
        ControlGroup(LIMIT) as group,
        Mount(mountpoint, "size=4g", preexec_fn=group.join) as mount,
    ):
        backup = mountpoint / "a"
        backup.mkdir()
        few = [(0, 256), (256, 1)]  # so that the daemon has touched all that it needs
        for verb in "store", "fetch":
            all_at_once(verb, backup, few)
        waited = major_faults(mount.pid)

        runs = cut(SWAP, singles=16 * MIB)
        for hand in all_at_once("store", backup, runs):
            assert all(answer == [run[1], 0] for run, answer in hand)
        assert count(backup, "pages") == SWAP // PAGE
        assert count(backup, "swapped") * PAGE >= SWAP - LIMIT, "the store can be swapped"
        assert status(mount.pid, "VmSwap") == 0, "and what serves it is not"

        random.Random(0).shuffle(runs)
        for hand in all_at_once("fetch", backup, runs):
            assert [run for run, right in hand if not right] == []
        assert count(backup, "swapped") * PAGE >= SWAP - LIMIT
        assert status(mount.pid, "VmSwap") == 0
        assert status(mount.pid, "VmLck") >= status(mount.pid, "VmRSS") // 2
        assert major_faults(mount.pid) - waited < 10, "the daemon waits for no memory of its own"
        assert group.oom_kills() == 0


def test_repeatedly_read_pages_do_not_cause_an_oom_kill(mountpoint: Path, tmp_path: Path) -> None:
    """The kernel takes pages that were read twice recently for needed. In a small group these are soon all pages."""
    with (
        swap(tmp_path, SWAP),
        ControlGroup(LIMIT // 4) as group,
        Mount(mountpoint, "size=4g", preexec_fn=group.join),
    ):
        backup = mountpoint / "a"
        backup.mkdir()
        runs = cut(LIMIT)
        for hand in all_at_once("store", backup, runs):
            assert all(answer == [run[1], 0] for run, answer in hand)
        hands = [runs[first : first + PROCESSES] for first in range(0, len(runs), PROCESSES)]
        again_and_again = [run for hand in hands for run in 2 * hand] * 2  # each process reads what it is dealt twice
        for hand in all_at_once("fetch", backup, again_and_again):
            assert [run for run, right in hand if not right] == []
        assert group.oom_kills() == 0


class Bound(NamedTuple):
    """What limits the room of a control group below its budget."""

    room: int
    """Bytes that fit into its memory and into what it may swap."""
    swap: Callable[[Path], contextlib.AbstractContextManager[None]]
    group: Callable[[], ControlGroup]
    clients_inside: bool = False


def group_of(swap: int) -> ControlGroup:
    """A group that can swap a given amount: all of the test's own swap or, with other swap, up to a limit."""
    return ControlGroup(LIMIT, swap if meminfo("SwapTotal") > SWAP else None)


LITTLE = 192 * MIB
BOUNDS = {
    "the swap is full": Bound(LIMIT + SWAP, lambda path: swap(path, SWAP), lambda: group_of(SWAP)),
    "the group may swap no more": Bound(
        LIMIT + LITTLE,
        lambda path: swap(path, SWAP),
        lambda: ControlGroup(LIMIT, LITTLE),
        clients_inside=True,
    ),
    "the group may not swap": Bound(LIMIT, lambda path: swap(path, SWAP), lambda: ControlGroup(LIMIT, swaps=False)),
}
if ZRAM.is_dir():
    BOUNDS["the memory behind the swap is full"] = Bound(
        LIMIT + LITTLE, lambda path: swap(path, SWAP, takes=LITTLE), lambda: group_of(LITTLE)
    )


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_c6_enospc_comes_before_an_oom_kill(mountpoint: Path, tmp_path: Path, bound: Bound) -> None:
    with (
        bound.swap(tmp_path),
        bound.group() as group,
        Mount(mountpoint, "size=4g", preexec_fn=group.join),
    ):
        backup = mountpoint / "a"
        backup.mkdir()
        inside = {"preexec_fn": group.join} if bound.clients_inside else {}
        answers = all_at_once("store", backup, cut(2 * bound.room, singles=2 * MIB), **inside)
        for hand in answers:
            assert errno.ENOSPC in {number for _, (_, number) in hand}, "every process was told"
        stored = [(first, pages) for hand in answers for (first, _), (pages, _) in hand if pages]
        size = sum(pages for _, pages in stored) * PAGE
        assert count(backup, "pages") * PAGE == size, "nothing of what was refused was stored"
        assert size < bound.room - RESERVE
        assert size > bound.room - RESERVE - OTHERS, "nor was there much room that was not given"

        random.Random(0).shuffle(stored)
        for hand in all_at_once("fetch", backup, stored, **inside):
            assert [run for run, right in hand if not right] == []
        assert group.oom_kills() == 0
