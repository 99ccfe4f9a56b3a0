"""The benchmarks measure what they say, and their tables, JSON and plots agree."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from harness import REPOSITORY, children, mounts_below, wait_until

BENCH = REPOSITORY / "benchmarks/bench.py"
GROUPS = "operations parallel bulk latency listing swap recovery memory idle".split()
PLACEMENTS = ["one CPU", "two CPUs", "unpinned"]
BESIDE = "tmpfs.py", "bindfs", "memfs_ll", "passthrough_hp"  # where they cannot be had, the output says so
pytest.importorskip("matplotlib", reason="the extra bench is not installed")


def start(directory: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(BENCH), "--tiny", "--json", str(directory / "found.json"), "--plots", str(directory)]
    return subprocess.Popen(
        [*command, *arguments],
        env={**os.environ, "TMPDIR": str(directory)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(bench: "subprocess.Popen[str]", seconds: float = 300) -> tuple[str, str]:
    """Wait for a benchmark. Returns its output. One that hangs is asked to end, so that it unmounts."""
    try:
        return bench.communicate(timeout=seconds)
    finally:
        if bench.poll() is None:
            bench.terminate()
            bench.communicate(timeout=120)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One tiny run of everything: the directory with its output, its JSON, and its tables."""
    directory = tmp_path_factory.mktemp("bench")
    bench = start(directory, "--check")
    said, log = finish(bench)
    assert (directory / "found.json").exists(), said + log
    found = json.loads((directory / "found.json").read_text())
    assert bench.returncode == any(target["verdict"] != "met" for target in found["targets"]), said + log
    assert not mounts_below(directory)
    return directory, found, said


def test_every_part_has_figures_and_a_table(run: tuple[Path, dict[str, Any], str]) -> None:
    _, found, said = run
    assert list(found["groups"]) == GROUPS
    assert not found["failed"]
    for name in GROUPS:
        assert f"\n## {name}\n" in said
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))


def test_the_table_shows_the_median_of_the_rounds(run: tuple[Path, dict[str, Any], str]) -> None:
    _, found, said = run
    for place, group in found["groups"]["operations"]["placements"].items():
        table = said.partition(f"\nClient and daemon {'' if place == 'unpinned' else 'on '}{place}.\n")[2]
        for operation, row in group["microseconds"].items():
            line = re.search(rf"^\| {re.escape(operation)} +\| .*$", table, re.MULTILINE)
            assert line
            cells = [cell.strip() for cell in line[0].split("|")[2:-1]]
            for name, cell in zip(group["systems"], cells, strict=True):
                assert cell.startswith(f"{statistics.median(row[name]):.1f} ("), operation
                assert len(row[name]) == found["plan"]["rounds"]


def test_page_operations_are_measured_on_one_cpu_on_two_and_unpinned(run: tuple[Path, dict[str, Any], str]) -> None:
    places = list(run[1]["groups"]["operations"]["placements"])
    assert places == (PLACEMENTS if len(os.sched_getaffinity(0)) > 1 else ["one CPU", "unpinned"])


def test_processor_time_and_memory_are_those_of_the_daemon(run: tuple[Path, dict[str, Any], str]) -> None:
    """The keeper's are not measured. It does nothing meanwhile."""
    groups = run[1]["groups"]
    for group in groups["operations"]["placements"].values():
        for row in group["daemon_cpu_microseconds"].values():
            assert min(row["ttmfs"]) > 0
    assert min(groups["memory"]["daemon_bytes_by_pages"]) > 10 << 20


def test_the_output_names_figures_that_were_not_measured(run: tuple[Path, dict[str, Any], str]) -> None:
    _, found, said = run
    group = found["groups"]["operations"]
    for name in BESIDE:
        assert (name in group["placements"]["unpinned"]["systems"]) != (name in group["missing"])
        if name in group["missing"]:
            assert f"NOT MEASURED: {name}: " in said


def test_every_target_has_a_verdict(run: tuple[Path, dict[str, Any], str]) -> None:
    _, found, _ = run
    assert len(found["targets"]) > 30
    for target in found["targets"]:
        measured, bound = target["measured"], target["bound"]
        if measured is None:
            assert target["verdict"] == "not measured"
        else:
            met = measured <= bound if target["at_most"] else measured >= bound
            assert target["verdict"] == ("met" if met else "MISSED"), target


def test_plots_show_the_measured_figures(run: tuple[Path, dict[str, Any], str]) -> None:
    directory, found, _ = run
    for name in "operations", "latency", "bulk":
        text = (directory / f"{name}.svg").read_text()
        assert xml.etree.ElementTree.fromstring(text).tag.endswith("svg")
        assert found["machine"]["kernel"] in text
        assert "ttmfs" in text


def test_two_checkouts_are_measured_in_one_run(tmp_path: Path) -> None:
    bench = start(tmp_path, "--only", "listing", "--program", str(REPOSITORY))
    said, log = finish(bench)
    assert bench.returncode == 0, said + log
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["groups"]["listing"]["microseconds_an_entry"]["cold"]) == ["ttmfs", "other ttmfs", "tmpfs"]


def test_a_directory_without_the_program_is_refused(tmp_path: Path) -> None:
    bench = start(tmp_path, "--program", str(tmp_path))
    _, log = finish(bench)
    assert bench.returncode == 2
    assert "no checkout of ttmfs" in log


def test_an_interrupted_benchmark_leaves_nothing_behind(tmp_path: Path) -> None:
    bench = start(tmp_path, "--only", "operations", "--rounds", "1000")
    try:
        wait_until(lambda: mounts_below(tmp_path), "a mount", 60)
        bench.send_signal(signal.SIGINT)
    finally:
        finish(bench)
    assert bench.returncode != 0
    assert not mounts_below(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not children(os.getpid()) - {bench.pid}
