"""What the machine and the control groups still give."""

import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import meminfo
from ttmfs.linux import memory
from ttmfs.linux.memory import Reserve

CGROUP_V1 = Path("/sys/fs/cgroup/memory")


def test_c15_bytes_avail_is_the_free_swap() -> None:
    assert memory.bytes_avail() == meminfo("SwapFree")


def test_available_is_about_what_the_kernel_says() -> None:
    assert 0 < memory.available() <= 1.1 * (meminfo("MemAvailable") + meminfo("SwapFree"))


def test_a_reserve_admits_what_leaves_it_untouched() -> None:
    free = memory.available()
    reserve = Reserve(free // 2)
    assert reserve.admits(1 << 20)
    assert not reserve.admits(free)
    assert abs(reserve.headroom() - free // 2) < free // 10
    assert not Reserve(2 * free).admits(1)
    assert Reserve(2 * free).headroom() == 0


def test_a_reserve_asks_again_before_what_it_saw_is_given_out() -> None:
    """A quarter of what was left at most goes out on one answer, so admitting never runs ahead of storing."""
    reserve = Reserve(0)
    free = memory.available()
    admitted = 0
    while admitted < 2 * free:
        assert reserve.admits(free // 8), "nothing is stored, so every question finds the same room"
        admitted += free // 8


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group of version 1 with a limit of 200 MiB on memory."""
    group = CGROUP_V1 / f"ttmfs-test-{secrets.token_hex(8)}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(200 << 20))
    yield group
    group.rmdir()


@pytest.mark.skipif(not CGROUP_V1.is_dir(), reason="no cgroup v1 memory controller here")
def test_a_control_groups_limit_counts(cgroup: Path) -> None:
    code = "import sys; from ttmfs.linux import memory; print(memory.available())"
    inside = f"echo 0 > {cgroup}/tasks && exec {sys.executable} -c '{code}'"
    printed = int(subprocess.check_output(["sh", "-c", inside], text=True))
    assert 100 << 20 < printed <= (200 << 20) + meminfo("SwapFree")


def test_control_groups_of_version_2_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic, on files as Linux 6 writes them; no such hierarchy need be mounted here."""
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
