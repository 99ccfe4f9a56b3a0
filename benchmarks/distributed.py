#!/usr/bin/env python3
"""A store on a small Ceph beside the same work on the bare ceph-fuse mount, in turns: files of a page, and a large one.

Its servers run on this machine, with their data in memory, so the figures compare and do not predict. Prints tables.
Needs root and Debian's packages of Ceph, which ``make setup`` installs.
"""

import argparse
import contextlib
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from report import Target, ratio, spread, table, targets_table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))
from ceph import Ceph, Client  # noqa: E402

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
TTMFS, BARE = "ttmfs", "ceph-fuse"
BARS = {"create+write+close": 1.2, "open+read+close": 0.6, "write by 1 MiB": 1.5, "read by 1 MiB, cached": 1.5}
"""The most time of ttmfs relative to the bare mount."""


@contextlib.contextmanager
def mounted(client: Client, mountpoint: Path, options: str) -> Iterator[None]:
    """A ttmfs with its store in a directory of the client."""
    (client.path / "store").mkdir()
    mountpoint.mkdir()
    words = ["-o", f"store={client.path}/store,backup_size=256m{options}", str(mountpoint)]
    subprocess.run([sys.executable, str(REPOSITORY / "mount.py"), *words], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)
        time.sleep(2)  # the daemon writes everything to the store
        mountpoint.rmdir()


def microseconds(work: Callable[[], int]) -> float:
    """The time of an operation, of work that says how many it did."""
    begun = time.perf_counter_ns()
    count = work()
    return (time.perf_counter_ns() - begun) / 1000 / count


def work_of(home: Path, image: Path, pages: int, mib: int) -> dict[str, Callable[[], int]]:
    """What is timed, by name. The operations of one round remove what they made."""
    paths = [str(home / str(handle)) for handle in range(1, pages + 1)]
    page, block = os.urandom(PAGE), mmap.mmap(-1, MIB)  # at a page boundary, so that a MiB is one request
    block[:] = os.urandom(MIB)

    def create() -> int:
        for path in paths:
            fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
            os.write(fd, page)
            os.close(fd)
        return pages

    def read() -> int:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            assert len(os.read(fd, PAGE)) == PAGE
            os.close(fd)
        return pages

    def write_image() -> int:
        fd = os.open(image, os.O_RDWR)
        for position in range(0, mib * MIB, MIB):
            os.pwrite(fd, block, position)
        os.close(fd)
        return mib

    def read_image() -> int:
        fd = os.open(image, os.O_RDONLY)
        for position in range(0, mib * MIB, MIB):
            assert os.preadv(fd, [block], position) == MIB
        os.close(fd)
        return mib

    return dict(zip(BARS, (create, read, write_image, read_image), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pages", type=int, default=300)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("-o", dest="options", default="", metavar="option,...", help="more mount options of ttmfs")
    arguments = parser.parse_args()
    took: dict[str, dict[str, list[float]]] = {name: {TTMFS: [], BARE: []} for name in BARS}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        client = stack.enter_context(Client(stack.enter_context(Ceph()), directory / "ceph"))
        mountpoint, bare = directory / "ttmfs", client.path / "bare"
        stack.enter_context(mounted(client, mountpoint, f",{arguments.options}" * bool(arguments.options)))
        for turn in range(arguments.rounds + 1):  # the first one warms up
            homes = {TTMFS: (mountpoint / "a", mountpoint / "b"), BARE: (bare, client.path / "image")}
            for system, (home, other) in homes.items():
                home.mkdir()
                image = other / ".image" if system == TTMFS else other
                if system == TTMFS:
                    other.mkdir()
                else:
                    image.touch()
                for name, work in work_of(home, image, arguments.pages, arguments.mib).items():
                    spent = microseconds(work)
                    if turn:
                        took[name][system].append(spent)
                for path in home.iterdir():
                    path.unlink()
                home.rmdir()
                if system == TTMFS:
                    os.truncate(image, 0)
                    other.rmdir()
                else:
                    image.unlink()
    rows = [[name, *(spread(row[system]) for system in (TTMFS, BARE)), f"{ratio(row[TTMFS], row[BARE]):.2f}"]
            for name, row in took.items()]  # fmt: skip
    print(f"Microseconds an operation, or a MiB: median (least to most) of {arguments.rounds} rounds in turns.\n")
    print(table(("work", TTMFS, BARE, "ratio"), rows))
    print()
    print(
        targets_table([Target(f"{n} / {BARE}", ratio(took[n][TTMFS], took[n][BARE]), bar) for n, bar in BARS.items()])
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
