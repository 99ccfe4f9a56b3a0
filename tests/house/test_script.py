"""scripts/test.sh: every part runs and reports, whatever else fails."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import REPOSITORY

PASSES = "def test_a() -> None:\n    pass\n"
FAILS = "def test_a() -> None:\n    raise OSError\n"
CANNOT_BE_IMPORTED = "import nothing.of.that.name\n"
SERIAL = "import pytest\n\n\n@pytest.mark.serial\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory with the script, the settings, the tools, and a few tests that all pass."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / "scripts/test.sh", tmp_path / "scripts")
    text = (REPOSITORY / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(
        re.sub(r'^files = \["ttmfs", .*', 'files = ["ttmfs"]', text, flags=re.MULTILINE)
    )
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in "arithmetic store model face house mount/a mount/b".split():
        write_test(tmp_path, name, PASSES)
    write_test(tmp_path, "mount/serial", SERIAL + PASSES)
    (tmp_path / "ttmfs").mkdir()
    (tmp_path / "ttmfs/a.py").write_text('"""Nothing."""\n')
    return tmp_path


def write_test(copy: Path, name: str, text: str) -> None:
    """Write the module of a layer's tests: "model" is tests/model/test_model.py, "mount/a" tests/mount/test_a.py."""
    layer, _, module = name.partition("/")
    path = copy / "tests" / layer / f"test_{module or layer}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(copy: Path, *arguments: str) -> tuple[int, str]:
    """Run the script; its exit status and its output."""
    done = subprocess.run(
        [copy / "scripts/test.sh", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100
    )
    return done.returncode, done.stdout


def test_the_script_passes_when_all_parts_pass(copy: Path) -> None:
    code, said = run(copy)
    assert said.endswith("--- all parts passed: 8 tests\n"), said
    assert code == 0


def test_a_failing_part_does_not_stop_the_others(copy: Path) -> None:
    write_test(copy, "store", CANNOT_BE_IMPORTED)
    write_test(copy, "mount/a", FAILS)
    write_test(copy, "mount/serial", SERIAL + FAILS)
    (copy / "ttmfs/a.py").write_text("import os\nx: int  = ''\n")
    code, said = run(copy)
    assert code == 1
    failed = [
        ".venv/bin/mypy",
        ".venv/bin/ruff check",
        ".venv/bin/ruff format --check",
        "serial tests",
        "tests/arithmetic tests/store tests/model tests/face",
        "tests/mount/test_a.py",
    ]
    assert said.endswith("".join(["--- these parts failed:\n", *(f"    {part} (exit status 1)\n" for part in failed)]))
    assert "3 passed, 1 error" in said, "the other lower layers ran"
    for module in "house/test_house", "mount/test_b":
        _, _, output = said.partition(f"--- tests/{module}.py\n")
        assert "1 passed" in output.partition("---")[0]


def test_arguments_go_to_pytest(copy: Path) -> None:
    code, said = run(copy, "tests/store", "tests/model", "-k", "test_model")
    assert code == 0
    assert "1 passed, 1 deselected" in said
    assert "---" not in said
