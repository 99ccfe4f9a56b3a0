"""The documents name what the program has."""

import html
import json
import re

import pytest

from harness import REPOSITORY
from ttmfs.cli.main import COMMANDS
from ttmfs.fuse.directories import BackupDirectory, Root
from ttmfs.fuse.xattrs import XATTRS
from ttmfs.options import TABLE, ExitCode, help_text


def test_help_names_every_option_and_exit_code() -> None:
    text = help_text()
    for option in TABLE.values():
        assert f"  {option.name}" in text
        assert option.help in text
    for code in ExitCode:
        assert re.search(rf"^  {code.value} +{re.escape(code.meaning)}$", text, re.MULTILINE)


def test_the_documentation_names_every_option() -> None:
    text = (REPOSITORY / "docs/options.md").read_text()
    for name in TABLE:
        assert f"`{name}" in text, f"add `{name}` to the table in docs/options.md"


def test_the_documentation_names_every_command() -> None:
    text = (REPOSITORY / "docs/commands.md").read_text()
    for name in COMMANDS:
        assert f"`ttmfs {name}" in text, f"add `ttmfs {name}` to the table in docs/commands.md"


@pytest.mark.parametrize("document", [*sorted(p.name for p in REPOSITORY.glob("*.md")), "docs"])
def test_links_between_documents_have_targets(document: str) -> None:
    path = REPOSITORY / document
    for page in sorted(path.glob("*.md")) if path.is_dir() else [path]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_picture_of_the_architecture_is_made_from_its_source() -> None:
    source = (REPOSITORY / "docs/pictures/overview.dot").read_text()
    picture = html.unescape((REPOSITORY / "docs/pictures/overview.svg").read_text())
    labels = [line for label in re.findall(r'label="([^"]*)"', source) for line in label.split(r"\n")]
    assert len(labels) > 10
    assert sorted(re.findall(r"<text [^>]*>([^<]*)</text>", picture)) == sorted(labels)


def test_the_architecture_names_every_package() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text()
    for package in REPOSITORY.glob("ttmfs/*/__init__.py"):
        assert f"| `{package.parent.name}/` |" in text, "add it to the table of packages in docs/architecture.md"


def test_the_specification_lists_every_extended_attribute() -> None:
    """Attributes of a backup stand in its table, those of the root in the paragraph below it."""
    section = (REPOSITORY / "docs/semantics.md").read_text().partition("## Extended attributes")[2].partition("```")[0]
    of_backup, _, of_root = section.partition("On the mount's root")
    for text, node in (of_backup, BackupDirectory), (of_root, Root):
        missing = {name.decode() for name in XATTRS[node]} - set(re.findall(r"`(user\.ttmfs\.\w+)`", text))
        assert not missing, f'add {missing} to "Extended attributes" in docs/semantics.md'
    unknown = set(re.findall(r"`(user\.ttmfs\.\w+)`", section)) - {n.decode() for t in XATTRS.values() for n in t}
    assert not unknown, f"docs/semantics.md has {unknown}, and ttmfs/fuse/xattrs.py has not"


def test_documents_use_plain_phrases() -> None:
    """The style is subject, verb, object. These phrases mark sentences that readers had to read twice."""
    twice = re.compile(r"\b(whoever|so many|so much|who waits|of which|(gone|goes) on with|lest|anew)\b", re.IGNORECASE)
    texts = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("docs/man/*")]
    assert len(texts) > 10
    assert not [(text.name, found[0]) for text in texts for found in twice.finditer(text.read_text())]


def test_the_charts_show_the_figures_of_the_tables() -> None:
    text = (REPOSITORY / "docs/performance.md").read_text()
    shown = json.loads((REPOSITORY / "docs/pictures/figures.json").read_text())
    figures = re.findall(r"\[\s*([\d.]+)\s*\]", json.dumps(shown["groups"]))
    assert len(figures) > 40
    for figure in figures:
        number = re.escape(figure.removesuffix(".0"))
        assert re.search(rf"\b{number}(\.0|0)?\b", text), figure


@pytest.mark.parametrize("picture", sorted(p.name for p in REPOSITORY.glob("docs/pictures/*.[sp][vn]g")))
def test_each_picture_is_shown_with_a_text_in_its_place(picture: str) -> None:
    texts = [path.read_text() for path in (REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"))]
    assert any(re.search(rf"!\[[^\]]{{20,}}\]\([^)]*{re.escape(picture)}\)", text) for text in texts)


@pytest.mark.parametrize("page", sorted(p.name for p in REPOSITORY.glob("docs/*.md") if p.name != "decisions.md"))
def test_sentences_have_at_most_25_words(page: str) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", (REPOSITORY / "docs" / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    pieces = re.split(r"\n\s*\n|\n(?= *[-*] | *\d+\. |\||#)", re.sub(r"\]\([^)]*\)", "]", text))
    prose = (" ".join(piece.split()).removeprefix("- ") for piece in pieces if not piece.startswith("|"))
    sentences = [s for piece in prose for s in re.split(r"(?<=[.:!?;])\)? +", piece)]
    assert not [s for s in sentences if len(s.split()) > 25]
