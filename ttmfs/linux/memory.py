"""Available memory and swap of the machine and of this process' control group. In bytes.

Functions ask the kernel at each call. :class:`Reserve` and :class:`Swap` keep the answers for a while.
"""

import contextlib
import os
import time
from array import array
from pathlib import Path

from . import system_calls

__all__ = ["Reserve", "Swap", "available", "bytes_avail", "control_groups", "read_number"]

_CGROUPS = Path("/sys/fs/cgroup")
_ZRAM_KNOWN = 16 << 20
_NO_LIMIT = 1 << 60  # cgroup v1 writes "none" as the largest number of pages


def bytes_avail() -> int:
    """Return the free swap in bytes. ``ttm_backup_bytes_avail()``. A hint: backing up works without swap, too."""
    return system_calls.swap_space()[1]


def available() -> int:
    """Return the bytes that can be stored before an OOM kill: MemAvailable and swap, or less in a control group."""
    meminfo = _meminfo()
    swap, taken = _usable_swap() if meminfo["SwapFree"] else (0, 0)
    swap = min(swap, meminfo["SwapFree"])  # a container can be shown less than there is
    groups = control_groups()
    group_swap = swap if groups and _swaps(groups[0]) else 0
    return min([meminfo["MemAvailable"] + swap - taken, *(_headroom(group, group_swap) for group in groups)])


class Reserve:
    """Memory and swap that storing pages must leave free.

    Asking the kernel costs as much as storing several pages. So an answer is used for a tenth of a second at most, and
    for a quarter of the room that it showed.
    """

    LIFETIME = 100_000_000  # ns

    def __init__(self, size: int) -> None:
        self.size = size
        self._left = 0
        self._expires = 0

    def headroom(self) -> int:
        """Return the bytes that can be stored now without touching the reserve."""
        return max(0, available() - self.size)

    def admits(self, size: int) -> bool:
        """Whether `size` more bytes may be stored."""
        now = time.monotonic_ns()
        if size > self._left or now > self._expires:
            headroom = self.headroom()
            self._expires = now + self.LIFETIME
            self._left = max(headroom // 4, size) if size <= headroom else 0
        if size > self._left:
            return False
        self._left -= size
        return True


class Swap:
    """Whether there may be pages in swap. It asks the kernel a hundred times a second at most."""

    LIFETIME = 10_000_000  # ns

    def __init__(self) -> None:
        self.known = array("q", (False, 0))
        """Whether any is in use, and until when that counts, in ns of time.monotonic_ns(). Compiled code reads it."""
        self._counted = 0

    @property
    def used(self) -> bool:
        """Whether any swap is in use. The answer is at most 10 ms old."""
        if (now := time.monotonic_ns()) > self.known[1]:
            size, free = system_calls.swap_space()
            self.known[0], self.known[1] = free < size, now + self.LIFETIME
        return bool(self.known[0])

    def renew_counts(self) -> None:
        """Make the kernel renew its counts of the pages in this process' control group, by reading them.

        The kernel decides by them which pages to swap out, yet they can be two seconds old. If most pages were read
        twice since, it finds none to swap out, and kills the process.
        """
        if (now := time.monotonic_ns()) > self._counted:
            for group in control_groups()[:1]:
                with contextlib.suppress(OSError):
                    (group / "memory.stat").read_bytes()
            self._counted = now + self.LIFETIME

    def page_out_begins(self) -> None:
        """Note that swap is in use from now on."""
        self.known[0], self.known[1] = True, time.monotonic_ns() + self.LIFETIME


def _meminfo() -> dict[str, int]:
    wanted = {"MemAvailable", "SwapFree"}
    with open("/proc/meminfo", encoding="ascii") as file:
        rows = (line.split() for line in file)
        return {row[0][:-1]: int(row[1]) * 1024 for row in rows if row[0][:-1] in wanted}


def _usable_swap() -> tuple[int, int]:
    """Return the bytes that can be swapped out, and the memory that zram would need to hold them."""
    usable = taken = 0
    with open("/proc/swaps", encoding="utf-8", errors="surrogateescape") as file:
        next(file)
        for line in file:
            path, _, size, used, _ = line.split()  # blanks in a path are escaped
            free = (int(size) - int(used)) * 1024
            if (name := os.path.basename(path)).startswith("zram"):
                free, memory = _zram(name, free)
                taken += memory
            usable += free
    return usable, taken


def _zram(name: str, free: int) -> tuple[int, int]:
    """The same for one zram device that has `free` bytes unused.

    The pages that it holds tell how well pages compress. Before it holds some, its own memory limit is taken as if
    nothing could be compressed. The machine's memory is taken as if pages took none, or nothing would be swapped out.
    """
    try:
        stored, _, held, limit = map(int, Path(f"/sys/block/{name}/mm_stat").read_text().split()[:4])
    except (OSError, ValueError):
        return free, 0
    known = stored >= _ZRAM_KNOWN
    share = min(1.0, max(held, 1) / stored) if known else 1.0
    if limit:
        free = min(free, int(max(0, limit - held) / share))
    return free, int(free * share) if known else 0


def _swaps(group: Path) -> bool:
    """Whether the kernel swaps out pages of a group that is at its limit: not at swappiness 0."""
    swappiness = read_number(group / "memory.swappiness")  # v1: each has its own
    return (read_number(Path("/proc/sys/vm/swappiness")) if swappiness is None else swappiness) != 0


def control_groups() -> list[Path]:
    """The memory control group of this process and its ancestors, as far as they are visible."""
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        rows = [line.rstrip("\n").split(":", 2) for line in file]
    for _, controllers, path in rows:
        if "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
        elif not controllers and (_CGROUPS / "cgroup.controllers").exists():
            root = _CGROUPS
        else:
            continue
        group = root / path.lstrip("/")
        return [g for g in (group, *group.parents) if g.is_relative_to(root) and g.is_dir()]
    return []


def _headroom(group: Path, swap_free: int) -> int:
    """Return the bytes that a group's members can still charge, with what can be reclaimed and swapped out."""
    if (usage := read_number(group / "memory.current")) is not None:  # v2
        limit, swap_limit = read_number(group / "memory.max"), read_number(group / "memory.swap.max")
        swap = swap_free
        if swap_limit is not None:
            swap = min(swap_free, max(0, swap_limit - (read_number(group / "memory.swap.current") or 0)))
        return _NO_LIMIT if limit is None else limit - usage + _page_cache(group, "") + swap
    if (usage := read_number(group / "memory.usage_in_bytes")) is None:
        return _NO_LIMIT  # the root group of v2, which has no limits
    limit, both = read_number(group / "memory.limit_in_bytes"), read_number(group / "memory.memsw.limit_in_bytes")
    headroom = _NO_LIMIT
    if limit is not None and limit < _NO_LIMIT:
        headroom = limit - usage + _page_cache(group, "total_") + swap_free
    if both is not None and both < _NO_LIMIT:
        used = read_number(group / "memory.memsw.usage_in_bytes") or 0
        headroom = min(headroom, both - used + _page_cache(group, "total_"))
    return headroom


def _page_cache(group: Path, prefix: str) -> int:
    """The file pages of a group, which the kernel drops before it swaps. Shmem is not counted."""
    names = {f"{prefix}inactive_file", f"{prefix}active_file"}
    try:
        rows = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return sum(int(row[1]) for row in rows if row[0] in names)
    except OSError:
        return 0


def read_number(path: os.PathLike[str]) -> int | None:
    """The number in a control file; None for "max" or a missing file."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)
