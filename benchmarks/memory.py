"""Kernel memory of a stored page, and growth of the daemon's own memory with pages or backups."""

import os
import shutil
from pathlib import Path
from typing import Any

from listing import make_files
from machine import SETTLED, SLAB, Slab, anonymous, available
from plan import FULL, Plan
from report import Target, table
from systems import TMPFS, TTMFS, System, Tmpfs, Ttmfs, mounted
from workloads import OPERATIONS, REQUEST_BYTES, pages_of, store

__all__ = ["report", "run", "targets"]

SPARE = 2 << 30  # bytes of memory that the benchmark leaves free
WARM_UP = 20  # operations of each kind
LOOKS = 4
STORED, STORED_FORGOTTEN, NAMED, NAMED_FORGOTTEN = STATES = (
    "stored by .image",
    "stored by .image, names forgotten",
    "names known",
    "names known, then forgotten",
)
LIMIT = "unreclaimable kernel memory a page"


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    room = max(0, available() - SPARE) // System.page_size
    many, most, backups = min(plan.many_pages, room), min(plan.most_pages, room), max(plan.backup_counts)
    size = (many + backups) * System.page_size + (256 << 20)
    ttmfs, tmpfs = Ttmfs(TTMFS, size), Tmpfs(TMPFS, size)
    of_pages, of_backups = Ttmfs(TTMFS, most * System.page_size + (64 << 20)), Ttmfs(TTMFS, size)
    with mounted(directory, [ttmfs, tmpfs, of_pages, of_backups]):
        slab = Slab()
        slab_bytes = {TTMFS: _slab(slab, ttmfs, many)}
        os.truncate(ttmfs.path / "a/.image", 0)
        slab_bytes[TMPFS] = _slab(slab, tmpfs, many)
        shutil.rmtree(tmpfs.path / "a")  # both make room for the rest
        return {
            "slab_pages": many,
            "slab_bytes": slab_bytes,
            "at_rest": slab.at_rest,
            "pages": most,
            "wanted_pages": plan.most_pages,
            "backups": backups,
            "daemon_bytes_by_pages": _daemon_by_pages(of_pages, most),
            "daemon_bytes_by_backups": _daemon_by_backups(of_backups, backups),
        }


def _slab(slab: Slab, system: System, pages: int) -> dict[str, dict[str, float]]:
    """Growth of slab in bytes a page, by state. The pages stay."""
    found = {}
    home = system.new("a")
    _warm_up(system, home)
    base = slab.forget()
    if isinstance(system, Ttmfs):
        store(home, pages, system.page_size)
        _check_stored(system, pages)
        found[STORED] = _each(slab.read_settled(), base, pages)
        found[STORED_FORGOTTEN] = _each(slab.forget(), base, pages)
    else:
        make_files(home, pages, system.page_size)
    with os.scandir(home) as entries:
        listed = sum(entry.stat().st_size == system.page_size for entry in entries)
    if listed != pages:
        raise RuntimeError(f"{listed} pages are listed, not {pages}")
    found[NAMED] = _each(slab.read_settled(), base, pages)
    found[NAMED_FORGOTTEN] = _each(slab.forget(), base, pages)
    return found


def _check_stored(system: Ttmfs, pages: int) -> None:
    if (stored := system.stored_pages()) != pages:
        raise RuntimeError(f"{stored} pages are stored, not {pages}")


def _each(now: dict[str, int], base: dict[str, int], pages: int) -> dict[str, float]:
    return {name: (now[name] - base[name]) / pages for name in SLAB}


def _warm_up(system: System, home: Path) -> None:
    """Do every operation once, so that lasting allocations happen now. Leaves no page."""
    pages = pages_of(system, home, WARM_UP)
    pages.content = os.urandom(system.page_size)
    for name, act in OPERATIONS.items():
        if name == "unlink":
            os.listdir(home)
        with pages.holding(WARM_UP if os.path.exists(pages.paths[0]) else 0):
            act(pages)


def _daemon_by_pages(system: Ttmfs, pages: int) -> list[int]:
    """The daemon's own memory without pages and with `pages` pages."""
    warm, home = system.new("warm"), system.new("a")
    before = _most(system, warm)
    store(home, pages, system.page_size)
    _check_stored(system, pages)
    after = _most(system, warm)
    os.truncate(home / ".image", 0)
    return [before, after]


def _daemon_by_backups(system: Ttmfs, backups: int) -> list[int]:
    """The daemon's own memory with one backup and with `backups` more. Each of them was used."""
    warm = system.new("warm")
    before, page = _most(system, warm), os.urandom(system.page_size)
    for number in range(backups):
        (system.new(f"b{number}") / "1").write_bytes(page)
    return [before, _most(system, warm)]


def _most(system: System, home: Path) -> int:
    """The largest own memory of a daemon during all operations: the buffer of a large request comes and goes."""
    looks = []
    for _ in range(LOOKS):
        store(home, REQUEST_BYTES // system.page_size, system.page_size)
        looks.append(anonymous(system.pid))
        os.truncate(home / ".image", 0)
        _warm_up(system, home)
        looks.append(anonymous(system.pid))
    return max(looks)


def _left(found: dict[str, Any], name: str, state: str) -> float:
    """Memory that is left after drop_caches cannot be reclaimed, even if it counts as reclaimable."""
    return float(sum(found["slab_bytes"][name][state].values()))


def _growth(found: dict[str, Any], what: str) -> int:
    before, after = found[f"daemon_bytes_by_{what}"]
    return int(after - before)


def targets(found: dict[str, Any]) -> list[Target]:
    def note(count: int, wanted: int) -> str:
        return f"{count:,}" + ("" if count == wanted else f", not {wanted:,}")

    backups = found["backups"]
    left = _left(found, TTMFS, STORED_FORGOTTEN) if found["at_rest"] else None
    return [
        Target(f"{LIMIT}, {STORED_FORGOTTEN}", left, 20, unit="bytes",
               note=note(found["slab_pages"], FULL.many_pages)),
        Target("daemon memory, growth with pages", _growth(found, "pages") / 1024, 1024, unit="KiB",
               note=note(found["pages"], FULL.most_pages)),
        Target("daemon memory, growth a backup", _growth(found, "backups") / backups, 1024, unit="bytes",
               note=note(backups, max(FULL.backup_counts))),
    ]  # fmt: skip


def report(found: dict[str, Any]) -> str:
    names = (TTMFS, TMPFS)

    def row(state: str) -> list[str]:
        cells = []
        for name in names:
            values = found["slab_bytes"][name].get(state)
            cells += [f"{value:.1f}" for value in (*values.values(), sum(values.values()))] if values else ["-"] * 3
        return [state, *cells]

    rows = []
    for what, count in ("pages", found["pages"]), ("backups", found["backups"]):
        before, after = found[f"daemon_bytes_by_{what}"]
        rows.append(
            [f"{count:,} {what}", f"{before >> 10} KiB", f"{after >> 10} KiB", f"{(after - before) / count:.1f}"]
        )
    parts = [
        f"Kernel memory, bytes a page at {found['slab_pages']:,} pages: growth of SUnreclaim and SReclaimable\n"
        f"since the empty directory, to {SETTLED / found['slab_pages']:.2g} bytes, at rest. Names known: every\n"
        "name was listed, and stat(2) called for each. Forgotten: after `echo 2 > /proc/sys/vm/drop_caches`. The\n"
        "rest of both cannot be reclaimed then. The target is for this rest, with pages stored by .image. While\n"
        "the kernel knows names, it needs more memory. A tmpfs never releases the dentries of its page files.",
        table(("state", *(f"{n}: {k}" for n in names for k in ("unreclaim", "reclaim", "both"))), map(row, STATES)),
        f"The daemon's own memory (RssAnon), before and after: the largest of {2 * LOOKS} looks between operations.",
        table(("", "before", "after", "bytes for each"), rows),
    ]
    if not found["at_rest"]:
        parts.insert(2, "NOT MEASURED: kernel memory: the machine was not at rest, so do not use the figures above.")
    if found["pages"] < found["wanted_pages"]:
        parts.append(f"NOT MEASURED: {found['wanted_pages']:,} pages: this machine has memory for {found['pages']:,}.")
    return "\n\n".join(parts)
