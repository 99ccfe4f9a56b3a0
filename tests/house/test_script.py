"""scripts/test.sh: every part of it runs and reports, whatever else fails."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import REPOSITORY

PARTS = {
    "lower layers": "arithmetic/test_a.py",
    "the house, mixed load, mounts": "house/test_b.py",
    "mounts": "mount/test_c.py",
}
PASSES = "def test_a() -> None:\n    pass\n"
FAILS = "def test_a() -> None:\n    raise OSError\n"
CANNOT_BE_READ = "import nothing.of.that.name\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory with the script, the settings, the tools, and a few tests that all pass."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / "scripts/test.sh", tmp_path / "scripts")
    text = (REPOSITORY / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(
        text.replace('files = ["ttmfs", "mount.py", "tests", "benchmarks"]', 'files = ["ttmfs"]')
    )
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for path in (
        *PARTS.values(),
        "store/test_d.py",
        "model/test_e.py",
        "face/test_f.py",
        "mount/test_g.py",
        *(f"mount/{path.name}" for path in REPOSITORY.glob("tests/mount/test_*.py")),
    ):
        (tmp_path / "tests" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / path).write_text(PASSES)
    (tmp_path / "ttmfs").mkdir()
    (tmp_path / "ttmfs/a.py").write_text('"""Nothing."""\n')
    return tmp_path


def run(copy: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [copy / "scripts/test.sh", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100
    )
    return done.returncode, done.stdout


def test_it_passes_when_all_parts_pass(copy: Path) -> None:
    code, said = run(copy)
    assert said.endswith("--- all parts passed\n"), said
    assert code == 0


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_fails_keeps_no_other_from_running(copy: Path, part: str) -> None:
    (copy / "tests" / PARTS[part]).write_text(FAILS)
    code, said = run(copy)
    assert code == 1
    assert said.endswith(f"--- these parts failed:\n    {part} (exit status 1)\n"), said
    assert len(re.findall(r"=+ .*[0-9] passed", said)) == 3, "each part has its line"


def test_a_module_that_cannot_be_imported_keeps_no_other_from_running(copy: Path) -> None:
    (copy / "tests/store/test_d.py").write_text(CANNOT_BE_READ)
    code, said = run(copy)
    assert code == 1
    assert "3 passed, 1 error" in said


def test_each_tool_of_the_linter_reports(copy: Path) -> None:
    (copy / "ttmfs/a.py").write_text("import os\nx: int  = ''\n")
    code, said = run(copy)
    assert code == 1
    for part in "ruff check", "ruff format", "mypy":
        assert f"    {part} (exit status 1)\n" in said


def test_arguments_are_pytests(copy: Path) -> None:
    code, said = run(copy, "tests/store", "tests/model", "-k", "test_e")
    assert code == 0
    assert "1 passed, 1 deselected" in said
    assert "---" not in said
