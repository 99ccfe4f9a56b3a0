"""Speed of ``ttmfs.client``: 1 GiB in 4 KiB pages, stored and copied back, beside numpy's own copy.

``python benchmarks/client.py``, as root, prints a table of medians. All kinds take turns in one run.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from ttmfs.client import Backup  # noqa: E402 # works without an installation

PAGE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the copied data (1024)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (5)")
    arguments = parser.parse_args()
    count = (arguments.mib << 20) // PAGE
    source = np.random.default_rng(1).integers(0, 256, (count, PAGE), np.uint8)
    target = np.ones_like(source)
    times: dict[str, list[float]] = {}

    def timed(what: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        times.setdefault(what, []).append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, REPOSITORY / "mount.py", directory, "-o", "size=4g,backup_size=4g"], check=True)
        try:
            natively = Backup.create(f"{directory}/natively")
            mounted = Backup.create(f"{directory}/mounted", native=False)
            assert natively.is_native
            handles = np.arange(1, count + 1, dtype=np.uint64)
            for _ in range(arguments.rounds):
                timed("numpy, between two arrays", lambda: np.copyto(target, source))
                timed("numpy, into a new array", source.copy)
                for name, backup in ("natively", natively), ("through the mount", mounted):
                    timed(f"{name}: backup_pages, new", lambda: backup.backup_pages(source, 0))  # noqa: B023
                    timed(f"{name}: backup_pages, again", lambda: backup.backup_pages(source, 0))  # noqa: B023
                    target[:] = 0
                    timed(f"{name}: copy_pages", lambda: backup.copy_pages(target, handles))  # noqa: B023
                    assert (target[:: count // 64] == source[:: count // 64]).all()
                    timed(f"{name}: drop_pages", lambda: backup.drop_pages(handles))  # noqa: B023
            natively.fini()
            mounted.fini()
        finally:
            subprocess.run(["umount", directory], check=True)
    unit = statistics.median(times["numpy, between two arrays"])
    print(f"{arguments.mib} MiB in pages of {PAGE}, medians of {arguments.rounds}")
    for what, found in times.items():
        median = statistics.median(found)
        spread = f"{min(found):.3f} to {max(found):.3f}"
        speed = f"{arguments.mib / 1024 / median:6.2f} GiB/s  {unit / median:5.2f} of numpy"
        print(f"{what:<36} {median:7.3f} s  {spread:<16} {speed}")


if __name__ == "__main__":
    main()
