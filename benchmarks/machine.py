"""A description of the machine, and its memory in use."""

import ctypes
import os
import platform
import re
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyfuse3

from ttmfs.cli.commands.page_operations import wake_up_microseconds

__all__ = ["SETTLED", "SLAB", "Slab", "anonymous", "available", "describe", "meminfo", "record"]

SLAB = ("SUnreclaim", "SReclaimable")
HALT_POLL = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")
SETTLED = 64 << 10  # bytes: slab is at rest if it changes by no more between two looks
QUIET_SECONDS, LOOK_SECONDS = 10.0, 0.1  # the longest wait for slab to rest; the time between two looks


def record() -> dict[str, Any]:
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    libfuse = ctypes.CDLL(pyfuse3.__file__)  # its symbols resolve through this module, for any version
    libfuse.fuse_pkgversion.restype = ctypes.c_char_p
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "processor": models[0] if models else "",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "page_size": os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "libfuse": libfuse.fuse_pkgversion().decode(),
        "pyfuse3": version("pyfuse3"),
        "guest_halt_poll_ns": _number(HALT_POLL),
        "wake_up_microseconds": wake_up_microseconds(),
        "load_average_before": os.getloadavg()[0],
    }


def _number(path: Path) -> int | None:
    return int(path.read_text()) if path.exists() else None


def describe(found: dict[str, Any]) -> str:
    return (
        f"Linux {found['kernel']} {found['architecture']}, {found['cores']} cores ({found['processor']}), "
        f"{found['memory_bytes'] >> 20} MiB, Python {found['python']}, libfuse {found['libfuse']}, "
        f"pyfuse3 {found['pyfuse3']}; waking a process on another CPU takes {found['wake_up_microseconds']} us, "
        f"guest_halt_poll_ns {found['guest_halt_poll_ns']}; load before: {found['load_average_before']:.2f}"
    )


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {row[0][:-1]: int(row[1]) * 1024 for row in rows}


def available() -> int:
    """Bytes available without swapping."""
    return meminfo()["MemAvailable"]


class Slab:
    """SUnreclaim and SReclaimable in bytes, once they no longer change: the kernel frees much slab memory with a delay.

    On a busy machine they never rest. After QUIET_SECONDS in total, `at_rest` is False.
    """

    def __init__(self) -> None:
        self.at_rest = True
        self._left = QUIET_SECONDS

    def read_settled(self) -> dict[str, int]:
        now = self._read()
        while self.at_rest:
            time.sleep(LOOK_SECONDS)
            before, now = now, self._read()
            if all(abs(now[name] - before[name]) <= SETTLED for name in SLAB):
                break
            self._left -= LOOK_SECONDS
            self.at_rest = self._left > 0
        return now

    def forget(self) -> dict[str, int]:
        """Have the kernel drop dentries and inodes until it frees no more. It spares recently used ones."""
        os.sync()
        now = self.read_settled()
        while True:
            Path("/proc/sys/vm/drop_caches").write_text("2\n")
            before, now = now, self.read_settled()
            if not self.at_rest or sum(before.values()) - sum(now.values()) <= SETTLED:
                return now

    def _read(self) -> dict[str, int]:
        Path("/proc/sys/vm/stat_refresh").read_bytes()  # adds the counters of each CPU to the sums
        rows = meminfo()
        return {name: rows[name] for name in SLAB}


def anonymous(pid: int) -> int:
    """The anonymous memory of a process in bytes."""
    return int(re.findall(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0]) * 1024
