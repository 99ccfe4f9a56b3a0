"""The manual pages say what the program has: options, exit statuses, commands, names, attributes and errors."""

import os
import re
import subprocess
import sys

import pytest

from harness import REPOSITORY
from ttmfs.options import IGNORED, IGNORED_PREFIXES, OPPOSITES, TABLE, ExitCode

DIRECTORY = REPOSITORY / "docs/man"
PAGES = sorted(path.name for path in DIRECTORY.iterdir())


def plain(roff: str) -> str:
    """The text of a piece of a page, without its macros."""
    lines = [re.sub(r"^\.[A-Z]+ ?", "", line) for line in roff.splitlines()]
    return re.sub(r"\\f.", "", " ".join(lines).replace(r"\-", "-").replace('"', ""))


def part(page: str, macro: str, title: str) -> str:
    """A section (SH) or subsection (SS) of a page."""
    end = r"^\.SH" if macro == "SH" else r"^\.S[HS]"
    found = re.search(rf"^\.{macro} {re.escape(title)}\n(.*?)(?={end}|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"there is no {title}"
    return found[1]


def items(roff: str) -> dict[str, str]:
    """The tagged paragraphs of a piece of a page, by the first word of the tag."""
    return {
        match[1]: plain(match[2])
        for match in re.finditer(
            r"^\.TP\n\.B[IR]* ([a-z0-9_]+)(.*?)(?=^\.(?:TP|PP|S[HS])|\Z)", roff, re.MULTILINE | re.DOTALL
        )
    }


@pytest.fixture(scope="module")
def mount_page() -> str:
    return (DIRECTORY / "mount.ttmfs.8").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_manual_pages_are_valid_roff_with_the_usual_sections(page: str) -> None:
    lint = subprocess.run(["mandoc", "-T", "lint", DIRECTORY / page], capture_output=True, text=True, check=False)
    assert (lint.stdout, lint.stderr, lint.returncode) == ("", "", 0)
    sections = re.findall(r"^\.SH (.*)", (DIRECTORY / page).read_text(), re.MULTILINE)
    wanted = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "FILES", "EXAMPLES", "SEE ALSO"]
    if page.endswith(".3"):
        wanted = ["NAME", "SYNOPSIS", "DESCRIPTION", "RETURN VALUE", "ERRORS", "EXAMPLES", "SEE ALSO"]
    if page.endswith(".5"):
        wanted = ["NAME", "DESCRIPTION", "ERRORS", "EXAMPLES", "SEE ALSO"]
    assert [title for title in sections if title in wanted] == wanted


def test_the_manual_lists_exactly_the_options_and_their_defaults(mount_page: str) -> None:
    found = items(part(mount_page, "SS", "Mount options"))
    assert set(found) == set(TABLE), 'add it to "Mount options" in docs/man/mount.ttmfs.8, or remove it there'
    for name, option in TABLE.items():
        assert found[name].startswith("=") == bool(option.value), name
        if option.value:
            defaults = re.findall(r"\(([^()]*)\)", option.help)
            assert defaults, f"end the help of {name} with its default in brackets, in ttmfs/options.py"
            sentence = f"Default: {defaults[-1]}."
            assert sentence in found[name], f"add {sentence!r} to {name} in docs/man/mount.ttmfs.8"


def test_the_manual_lists_exactly_the_accepted_options_of_mount(mount_page: str) -> None:
    text = part(mount_page, "SS", "Options of mount(8)").partition(".TP")[0]
    macros = [" ".join(re.findall(r"^\.B.*", piece, re.MULTILINE)) for piece in text.split(".PP")]
    kernels, left = (set(re.findall(r"[A-Za-z_]{2,}=?|[xX]-", plain(words))) for words in macros)
    assert kernels - {"BR"} == {"rw", *OPPOSITES}
    assert left - {"BR", "mount", "systemd"} == {*IGNORED, *IGNORED_PREFIXES}


def test_the_manual_lists_exactly_the_exit_statuses(mount_page: str) -> None:
    found = items(part(mount_page, "SH", "EXIT STATUS"))
    assert set(found) == {str(code.value) for code in ExitCode}
    for code in set(ExitCode) - {ExitCode.OK}:
        assert code.meaning.lower() in found[str(code.value)].lower(), code


def help_of(*words: str) -> str:
    command = [sys.executable, "-m", "ttmfs", *words, "--help"]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30).stdout


def test_the_manual_lists_exactly_the_commands_and_their_options() -> None:
    page = part((DIRECTORY / "ttmfs.1").read_text(), "SH", "COMMANDS")
    commands = re.findall(r"^    ([a-z][a-z-]*)(?:  |$)", help_of(), re.MULTILINE)
    assert commands
    shown = sorted(re.findall(r"^\.SS (.*)", page, re.MULTILINE))
    assert shown == sorted(commands), "add the command to COMMANDS in docs/man/ttmfs.1 (.SS NAME), or remove it there"
    for command in commands:
        known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_of(command))) - {"--help"}
        said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", plain(part(page, "SS", command))))
        assert said == known, f"make the options of {command} in docs/man/ttmfs.1 those of its --help"


def test_the_manual_and_the_documentation_have_every_function_of_the_c_library() -> None:
    header = re.sub(r"/\*.*?\*/", "", (REPOSITORY / "c/ttmfs.h").read_text(), flags=re.DOTALL)
    functions = set(re.findall(r"\b(ttmfs_\w+)\(", header))
    assert len(functions) > 15
    assert set(re.findall(r"\b(ttmfs_\w+)\(", plain((DIRECTORY / "ttmfs.3").read_text()))) == functions
    described = set(re.findall(r"`(ttmfs_\w+)\(", (REPOSITORY / "docs/c.md").read_text()))
    assert described == {name for name in functions if "page_ptr" not in name}


def test_the_manual_has_every_name_attribute_and_error_of_the_specification() -> None:
    page = plain((DIRECTORY / "ttmfs.5").read_text())
    specification = (REPOSITORY / "docs/semantics.md").read_text()
    for pattern in r"`(user\.ttmfs\.[a-z_]+)`", r"\b(E[A-Z0-9]{3,})\b", r"\bmnt/(?:a/)?(\.[a-z]+)\b":
        names = set(re.findall(pattern, specification)) - {"EISDIR"}
        assert len(names) > 3
        for name in names:
            assert name in page, f"add {name} to docs/man/ttmfs.5: docs/semantics.md has it"


def test_manual_pages_are_installed_and_refer_to_existing_pages() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    for page in PAGES:
        assert f'"share/man/man{page[-1]}" = ["docs/man/{page}"]' in project
    own = {tuple(page.rsplit(".", 1)) for page in PAGES}
    for page in PAGES:
        text = (DIRECTORY / page).read_text()
        for name, section in re.findall(r"^\.BR ([a-z.]*ttmfs) \((\d)\)", text, re.MULTILINE):
            assert (name, section) in own
