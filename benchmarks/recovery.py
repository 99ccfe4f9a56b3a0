"""How long a client waits when the daemon is killed: from SIGKILL to the answer of a read, by pages and by backups.

    python benchmarks/recovery.py

Run it as root. It prints the median and the extremes of nine kills for each case, and the keeper's memory.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = os.sysconf("SC_PAGE_SIZE")
CASES = ((1, 1), (1_000, 1), (1_000_000, 1), (1, 10_000))
"""Pages of the first backup, and backups."""

KILLS, PAUSE, REQUEST = 9, 0.3, 256


def measure(mountpoint: Path, pages: int, backups: int) -> str:
    """One line of the table."""
    for number in range(backups):
        (mountpoint / f"b{number}").mkdir()
    with (mountpoint / "b0/.image").open("r+b", buffering=0) as image:
        for first in range(0, pages, REQUEST):
            image.write(bytes([1]) * PAGE * min(REQUEST, pages - first))
    seconds = []
    fd = os.open(mountpoint / "b0/1", os.O_RDONLY)
    try:
        for _ in range(KILLS):
            daemon = json.loads((mountpoint / ".config").read_text())["daemon_pid"]
            time.sleep(PAUSE)
            begun = time.perf_counter()
            os.kill(daemon, signal.SIGKILL)
            os.pread(fd, PAGE, 0)
            seconds.append(time.perf_counter() - begun)
    finally:
        os.close(fd)
    keeper = json.loads((mountpoint / ".config").read_text())["keeper_pid"]
    rows = dict(line.split(":") for line in Path(f"/proc/{keeper}/smaps_rollup").read_text().splitlines()[1:])
    median, least, most = (1e3 * f(seconds) for f in (statistics.median, min, max))
    memory = ", ".join(
        f"{name} {int(rows[name].split()[0]) / 1024:.1f} MiB" for name in ("Rss", "Pss", "Private_Dirty")
    )
    return f"{pages:9} pages {backups:6} backups: {median:4.0f} ms ({least:.0f} to {most:.0f}); keeper {memory}"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ttmfs-recovery-") as directory:
        for pages, backups in CASES:
            command = [sys.executable, str(REPOSITORY / "mount.py"), directory, "-o", "size=8g"]
            subprocess.run(command, check=True)
            try:
                print(measure(Path(directory), pages, backups), flush=True)
            finally:
                subprocess.run(["umount", "-l", directory], check=True)


if __name__ == "__main__":
    main()
