"""The order of the modules: each imports only from those above it, and pyfuse3 stays in its two."""

import ast
import re
from pathlib import Path

import pytest

from harness import REPOSITORY

PACKAGE = REPOSITORY / "ttmfs"

ORDER = (
    "handles errors version quoting options linux mountinfo connection fusermount inherited checked state keeper "
    "service memory turns waiting ledger quota store backup pool inodes access refusals texts kernel_cache tree "
    "metrics handover operations busy_poll session background page_array client keepers rescue mount_helper cli"
).split()

COMMANDS = (
    "terminal command apart mounts cells plot manifest users backups ls map save load fd doctor why rescue".split()
)
USED_BY_COMMANDS = set(
    "handles errors version quoting options linux mountinfo checked memory inodes client keepers rescue".split()
)
"""What they know of the rest: none of the server."""


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports; those of its own package without a name before, of that above it with a dot."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found.update("." * (node.level - 1) + name for name in names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__", "__main__"}


def test_the_map_for_contributors_shows_every_module() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"`ttmfs/(\w+)\.py`", text)) == {*ORDER, "__init__", "__main__"}


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_up_the_list_only(module: str) -> None:
    own = imports_of(PACKAGE / f"{module}.py") & set(ORDER)
    assert own <= set(ORDER[: ORDER.index(module)])


def test_every_command_has_its_place() -> None:
    assert {path.stem for path in (PACKAGE / "commands").glob("*.py")} == {*COMMANDS, "__init__"}


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_know_nothing_of_the_server(module: str) -> None:
    own = imports_of(PACKAGE / "commands" / f"{module}.py")
    assert own & {f".{name}" for name in ORDER} <= {f".{name}" for name in USED_BY_COMMANDS}
    assert own & set(COMMANDS) <= set(COMMANDS[: COMMANDS.index(module)])
    assert not own & {"pyfuse3", "trio"}


@pytest.mark.parametrize("module", ORDER)
def test_only_the_face_and_the_session_know_pyfuse3(module: str) -> None:
    assert ("pyfuse3" in imports_of(PACKAGE / f"{module}.py")) == (module in ("operations", "session"))


def test_mount_py_stays_short() -> None:
    assert len((REPOSITORY / "mount.py").read_text().splitlines()) < 70
