"""A long run of a mixed load on a store on Ceph, while its servers and the daemon are killed.

    python tests/soak_distributed.py [--seconds 600] [--seed N]

Every answered write is verified, and any error or loss ends it with exit status 1. The end reports what was done.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ceph import Ceph, Client
from harness import MOUNT_COMMAND, wait_until
from load import Load
from soak import main

__all__ = ["soak"]

CLIENTS = 4
PAUSE = 3.0
"""Seconds between two events, on average. A server takes about 3 s to be back."""

DOWN = 2.0
"""The most seconds that a server stays away."""


def soak(directory: Path, seconds: float, seed: int) -> str:
    """Run for a time. Returns what was done. Raises AssertionError for any failure."""
    chance, events = random.Random(seed), Counter[str]()
    mountpoint, log = directory / "mnt", directory / "log"
    mountpoint.mkdir()
    settings = {"mds cap revoke eviction timeout": 60}
    with Ceph("bluestore", settings=settings) as ceph, Client(ceph, directory / "ceph") as client:
        (client.path / "store").mkdir()
        options = f"store={client.path}/store,backup_size=64m,store_timeout=120"
        with log.open("wb") as file:
            process = subprocess.Popen([*MOUNT_COMMAND, "-f", "-o", options, str(mountpoint)], stderr=file)
        wait_until(lambda: b"serving /" in log.read_bytes(), "the mount", 30)

        def down(kill: Callable[[], None], start: Callable[[], None]) -> None:
            kill()
            time.sleep(chance.uniform(0, DOWN))
            start()

        def kill_daemon() -> None:
            os.kill(json.loads((mountpoint / ".config").read_text())["daemon_pid"], signal.SIGKILL)

        kinds: dict[str, Callable[[], None]] = {
            "kills of the OSD": lambda: down(ceph.kill_osd, ceph.start_osd),
            "kills of the MDS": lambda: down(ceph.kill_mds, ceph.start_mds),
            "stops of the OSD": lambda: down(ceph.stop_osd, ceph.continue_osd),
            "kills of the daemon": kill_daemon,
        }
        try:
            with Load(mountpoint, clients=CLIENTS, seed=seed, shmem=False) as load:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    name = chance.choice(list(kinds))
                    kinds[name]()
                    events[name] += 1
                    load.check()
                    time.sleep(chance.expovariate(1 / PAUSE))
        finally:
            subprocess.run(["umount", "-l", mountpoint], check=True)
            process.wait(60)
    said, done = log.read_text(), load.result
    assert "Traceback" not in said, said
    assert "gave up" not in said, said
    happened = ", ".join(f"{count} {name}" for name, count in sorted(events.items()))
    return (
        f"{seconds:.0f} s, seed {seed}: {happened}; {sum(done.steps.values())} steps by {CLIENTS} clients; "
        f"0 errors, 0 lost of {done.pages} pages read again, longest wait {done.slowest:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main(soak, __doc__))
