"""Makes the pictures of the documents from real runs: docs/pictures/map-*.png and watch.svg. Run it as root.

It has a mount namespace, swap (zram) and a control group of its own, which end with it. With STILLS=DIRECTORY in the
environment it also writes the frames of the recording there.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from stores import ControlGroup, swap  # noqa: E402
from terminal_recording import Recorder, svg  # noqa: E402

PICTURES = ROOT / "docs/pictures"
PAGE, MIB = 4096, 1 << 20
TTMFS = [sys.executable, "-m", "ttmfs"]
MOUNT = Path("/mnt/ttm")


@contextmanager
def mounted(options: str, group: ControlGroup | None = None) -> Iterator[None]:
    """A mount at MOUNT, its daemon in a control group."""
    MOUNT.mkdir(exist_ok=True)
    command = [*TTMFS, "mount", str(MOUNT), "-o", options]
    subprocess.run(command, check=True, cwd=ROOT, preexec_fn=group.join if group else None)
    try:
        yield
    finally:
        ttmfs("umount", str(MOUNT))


def ttmfs(*words: str) -> None:
    """Run a command of ttmfs."""
    subprocess.run([*TTMFS, *words], check=True, cwd=ROOT)


def store(image: Path, first: int, past: int) -> bytes:
    """Store pages of random bytes in a range of pages. Returns them."""
    pages = os.urandom((past - first) * PAGE)
    with image.open("r+b") as file:
        file.seek(first * PAGE)
        file.write(pages)
    return pages


def make_maps() -> None:
    """A backup with runs of pages and holes: in memory, and after writeback, when a part was read again."""
    with mounted("size=256m,backup_size=64m"):
        backup = MOUNT / "bo7"
        backup.mkdir()
        image = backup / ".image"
        store(image, 0, 4096)
        for first in range(4096, 8192, 64):
            store(image, first, first + 24)
        store(image, 9216, 12288)
        for first in range(13312, 16384, 256):
            store(image, first, first + 160)
        ttmfs("map", str(backup), "-o", str(PICTURES / "map-before.png"))
        ttmfs("writeback", str(backup))
        with image.open("rb") as file:
            file.seek(9216 * PAGE)
            file.read(1536 * PAGE)
        ttmfs("map", str(backup), "-o", str(PICTURES / "map-after.png"))


LIMIT, COLUMNS, LINES = 144, 80, 8
"""MiB of memory for the daemon and its pages; the size of the terminal. The daemon itself takes about 40 MiB."""

TURN, TURNS, PAUSE = 1024, 16, 0.25
"""Programs store and read this number of pages at once, in this number of turns, with a pause in seconds after each."""


def use_backups(recorder: Recorder) -> None:
    """Store three backups of 64 MiB, and read the first again."""
    recorder.caption = f"three empty backups; the daemon and its pages may take {LIMIT} MiB"
    recorder.watch(2)
    sums: dict[str, hashlib._Hash] = {}
    for name in "weights", "kv-cache", "activations":
        recorder.caption = f"a program stores 64 MiB in {name}"
        if sums:
            recorder.caption += ": the kernel makes room, and swaps out pages"
        sums[name] = hashlib.sha256()
        for first in range(0, TURN * TURNS, TURN):
            sums[name].update(store(MOUNT / name / ".image", first, first + TURN))
            recorder.watch(PAUSE)
    recorder.caption = "a program reads weights again: its pages come back, others leave"
    found = hashlib.sha256()
    with (MOUNT / "weights/.image").open("rb") as file:
        for _ in range(TURNS):
            found.update(file.read(TURN * PAGE))
            recorder.watch(PAUSE)
    if found.digest() != sums["weights"].digest():
        raise SystemExit("weights has other bytes than were stored")
    recorder.caption = "weights has the checksum that it was stored with"
    recorder.watch(1)


def make_recording() -> None:
    """The table of backups while programs store more than the memory limit, and read some of it again."""
    with ControlGroup(LIMIT * MIB) as group, mounted("size=512m,backup_size=64m,standby=off,reserve=0", group):
        for name in "weights", "kv-cache", "activations":
            (MOUNT / name).mkdir()
        with Recorder([*TTMFS, "ls", "--watch=0.5", str(MOUNT)], COLUMNS, LINES) as recorder:
            use_backups(recorder)
    title, about = (
        f"$ ttmfs ls --watch=0.5 {MOUNT}",
        "ttmfs ls --watch under memory pressure: pages move to swap and back",
    )
    (PICTURES / "watch.svg").write_text(svg(recorder.frames, title, about, COLUMNS))
    if directory := os.environ.get("STILLS"):  # single frames, to look at
        for number in range(len(recorder.frames)):
            still = svg(recorder.frames, title, about, COLUMNS, still=number)
            Path(directory, f"{number:03}.svg").write_text(still)


def main() -> None:
    """Make all of them, or those that are named."""
    if "TTMFS_PICTURES" not in os.environ:  # its own mount namespace
        os.environ["TTMFS_PICTURES"] = "1"
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv])
    makers = {"maps": make_maps, "recording": make_recording}
    with tempfile.TemporaryDirectory() as directory, swap(Path(directory), 512 * MIB):
        for name in sys.argv[1:] or makers:
            makers[name]()


if __name__ == "__main__":
    main()
