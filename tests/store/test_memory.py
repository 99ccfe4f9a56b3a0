"""How much memory the machine and the control groups can still provide."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import meminfo, wait_until
from stores import ControlGroup
from ttmfs.linux import memory

LIMIT = 200 << 20


def in_group(program: str) -> str:
    """The output of a program in a control group with LIMIT bytes of memory, in which nothing else runs."""
    with ControlGroup(LIMIT) as group:
        done = subprocess.run(
            [sys.executable, "-c", program], preexec_fn=group.join, stdout=subprocess.PIPE, text=True, check=True
        )
    return done.stdout


def test_c15_bytes_avail_is_the_free_swap() -> None:
    def equal() -> bool:
        before, said, after = meminfo("SwapFree"), memory.bytes_avail(), meminfo("SwapFree")
        return before == said == after

    wait_until(equal, "bytes_avail to equal the free swap")


def test_the_limit_of_a_control_group_counts() -> None:
    swap = meminfo("SwapTotal")
    printed = int(in_group("from ttmfs.linux import memory; print(memory.available())"))
    assert 100 << 20 < printed <= LIMIT + max(swap, meminfo("SwapTotal"))


def test_a_reserve_admits_writes_that_leave_it_free() -> None:
    in_group("""
from ttmfs.linux import memory
from ttmfs.linux.memory import Reserve
free = memory.available()
reserve = Reserve(free // 2)
assert reserve.admits(1 << 20)
assert not reserve.admits(free)
assert abs(reserve.headroom() - free // 2) < free // 10
assert not Reserve(2 * free).admits(1)
assert Reserve(2 * free).headroom() == 0
""")


def test_a_reserve_measures_again_before_the_seen_memory_is_used_up() -> None:
    """A reserve admits at most a quarter of the memory that it last measured, and then measures again."""
    in_group("""
from ttmfs.linux import memory
from ttmfs.linux.memory import Reserve
reserve, free, admitted = Reserve(0), memory.available(), 0
while admitted < 2 * free:
    assert reserve.admits(free // 8), "nothing is stored, so every question finds the same room"
    admitted += free // 8
""")


def test_the_limits_of_version_2_control_groups_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are as Linux 6 writes them. No such hierarchy has to be mounted."""
    parent, child = tmp_path / "slice", tmp_path / "slice" / "unit"
    child.mkdir(parents=True)
    stat = "anon 1\ninactive_file 2000\nactive_file 1000\nshmem 5"
    files = {"memory.current": "400000", "memory.max": "1000000", "memory.swap.max": "max", "memory.stat": stat}
    for name, text in files.items():
        (parent / name).write_text(text + "\n")
        (child / name).write_text({"memory.max": "max"}.get(name, text) + "\n")
    monkeypatch.setattr(memory, "control_groups", lambda: [child, parent])
    (parent / "memory.swap.max").write_text("0\n")
    assert memory.available() == 603_000
    shutil.rmtree(parent)
