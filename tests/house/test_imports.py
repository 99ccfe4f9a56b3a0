"""The direction of imports: each package imports from itself and from those before it. pyfuse3 stays in its modules."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from harness import REPOSITORY

PACKAGE = REPOSITORY / "ttmfs"
PACKAGES = "linux stores model recovery fuse daemon client cli".split()
"""In their order, after the modules that lie in ttmfs/ itself."""

TOP = {"__init__", "__main__", "errors", "handles", "options", "quoting", "version"}
ALONE = {"recovery.keeper_protocol", "linux.tmpfs", "linux.unmount", "cli.exit_status", "cli.keepers"}
"""Run by their path with the standard library alone, or imported by what is: they import nothing of ttmfs."""

BY_COMMANDS = {"linux", "client", "cli", "model.arguments", "fuse.inodes"}
"""What the commands know of the rest: nothing of the server but two modules of arithmetic."""

FACES = {PACKAGE / "aio", PACKAGE / "torch"}
"""What a program imports, as from ``ttmfs`` itself: each shows the names of one module of the client."""

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py") and path.parent.joinpath(path.stem) not in FACES
)


def imports_of(module: str) -> Iterator[str]:
    """What a module imports: modules of ttmfs by their names inside it, other modules by their top-level name."""
    here = module.split(".")[:-1]
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join([*above, name]) for name in names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def place(module: str) -> int:
    """The position in the order of a module of ttmfs, or of something imported from it; -1 for ttmfs/ itself."""
    package = module.partition(".")[0]
    return PACKAGES.index(package) if package in PACKAGES else -1


def own_imports(module: str) -> set[str]:
    """The modules of ttmfs that a module imports."""
    return {name for name in imports_of(module) if name in MODULES or name.partition(".")[0] in PACKAGES}


def test_every_module_belongs_to_a_listed_package() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP | {face.name for face in FACES}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*PACKAGES}


def test_the_map_for_contributors_shows_every_module() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    shown = {name.replace("/", ".") for name in re.findall(r"`ttmfs/([\w/]+)\.py`", text)}
    faces = {"__init__", "__main__", *(face.name for face in FACES)}
    assert shown == {name for name in MODULES if not name.startswith("cli.commands.")} | faces


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_earlier_packages_only(module: str) -> None:
    later = {name for name in own_imports(module) if place(name) > place(module)}
    assert not later


@pytest.mark.parametrize("module", sorted(ALONE))
def test_modules_that_run_by_path_import_nothing_of_ttmfs(module: str) -> None:
    assert not own_imports(module)


@pytest.mark.parametrize("module", ["recovery.keeper", "cli.rescue", "linux.tmpfs"])
def test_programs_that_run_by_path_need_only_neighbours_and_the_standard_library(module: str) -> None:
    """A neighbour needs no more than the program does."""
    package, _, name = module.rpartition(".")
    left, seen = {name}, set[str]()
    while left:
        neighbour = left.pop()
        seen.add(neighbour)
        for imported in (name.removeprefix(f"{package}.") for name in imports_of(f"{package}.{neighbour}")):
            if f"{package}.{imported}" in MODULES:
                left |= {imported} - seen
            else:
                assert imported in sys.stdlib_module_names, f"{neighbour} imports {imported}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("cli.commands.")])
def test_commands_import_nothing_of_the_server(module: str) -> None:
    for name in own_imports(module):
        assert place(name) < 0 or name in BY_COMMANDS or name.partition(".")[0] in BY_COMMANDS
    assert not {*imports_of(module)} & {"pyfuse3", "trio"}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_named_modules_import_pyfuse3(module: str) -> None:
    assert ("pyfuse3" in imports_of(module)) == (module in ("fuse.operations", "fuse.through_pyfuse3"))


def test_the_daemon_imports_no_numpy() -> None:
    """Imports are most of the time of a takeover without a standby, and numpy's would add half as much again."""
    code = "import sys, ttmfs.daemon.command_line; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


def test_mount_py_stays_short() -> None:
    assert len((REPOSITORY / "mount.py").read_text().splitlines()) < 70
