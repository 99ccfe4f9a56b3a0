"""What the documents claim is run."""

import html
import os
import re
import subprocess
from pathlib import Path

import pytest

from harness import REPOSITORY, mounts_below, wait_until
from ttmfs.fuse.directories import BackupDirectory, Root
from ttmfs.fuse.xattrs import XATTRS
from ttmfs.options import TABLE, ExitCode, help_text

FENCE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples(document: Path) -> list[tuple[str, str]]:
    """The commands of a document's console blocks, each with the output that it shows."""
    found: list[tuple[str, str]] = []
    for block in FENCE.findall(document.read_text()):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            else:
                command, output = found[-1]
                found[-1] = command, output + line + "\n"
    return found


def matches(expected: str, got: str) -> bool:
    """Whether an output is what a document shows; ``...`` there is anything, and runs of blanks are alike."""
    parts = [re.escape(" ".join(part.split())) for part in expected.strip().split("...")]
    return re.fullmatch(".*".join(parts), " ".join(got.split())) is not None


@pytest.mark.serial  # swap of another test would change what the examples show
@pytest.mark.parametrize("name", ["docs/semantics.md", "docs/recipes.md"])
def test_examples_in_documents_print_what_they_show(name: str, tmp_path: Path) -> None:
    commands = examples(REPOSITORY / name)
    for file, text in FILE.findall((REPOSITORY / name).read_text()):
        (tmp_path / file).write_text(text)
    assert len(commands) > 20
    path = f"{REPOSITORY}:{REPOSITORY / '.venv/bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "LC_ALL": "C", "COLUMNS": "80"}
    try:
        for command, expected in commands:
            shell = ["bash", "-c", command.replace("REPOSITORY", str(REPOSITORY))]
            done = subprocess.run(
                shell, cwd=tmp_path, env=environment, text=True, timeout=30, check=False,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert matches(expected, done.stdout), f"$ {command}\n{done.stdout}instead of\n{expected}"
    finally:
        for mounted in mounts_below(tmp_path):
            subprocess.run(["fusermount3", "-u", "-z", mounted], check=False)
    wait_until(lambda: not mounts_below(tmp_path), "the unmounting")


def test_the_demo_runs_without_error(tmp_path: Path) -> None:
    # In its own mount namespace: a copy of the mount in another process' new namespace would keep the daemon alive.
    demo = ["unshare", "--mount", "--propagation", "private", str(REPOSITORY / "scripts/demo.sh")]
    done = subprocess.run(demo, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^held: (\d+) pages stored, .* restored bit for bit", done.stdout, re.MULTILINE)


def test_help_names_every_option_and_exit_code() -> None:
    text = help_text()
    for option in TABLE.values():
        assert f"  {option.name}" in text
        assert option.help in text
    for code in ExitCode:
        assert re.search(rf"^  {code.value} +{re.escape(code.meaning)}$", text, re.MULTILINE)


def test_the_manual_names_every_option() -> None:
    manual = (REPOSITORY / "README.md").read_text()
    for name in TABLE:
        assert f"`{name}" in manual


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
        assert f"| `{package.parent.name}/` |" in text


def test_the_specification_lists_every_extended_attribute() -> None:
    """Those of a backup in its table, those of the root in the paragraph below it, and no others."""
    section = (REPOSITORY / "docs/semantics.md").read_text().partition("## Extended attributes")[2].partition("```")[0]
    of_backup, _, of_root = section.partition("On the mount's root")
    for text, node in (of_backup, BackupDirectory), (of_root, Root):
        assert set(re.findall(r"`(user\.ttmfs\.\w+)`", text)) >= {name.decode() for name in XATTRS[node]}
    assert set(re.findall(r"`(user\.ttmfs\.\w+)`", section)) == {name.decode() for t in XATTRS.values() for name in t}


def test_documents_use_plain_phrases() -> None:
    """The style is subject, verb, object. These phrases mark sentences that readers had to read twice."""
    twice = re.compile(r"\b(whoever|so many|so much|who waits|of which|(gone|goes) on with|lest|anew)\b", re.IGNORECASE)
    texts = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("docs/man/*")]
    assert len(texts) > 10
    assert not [(text.name, found[0]) for text in texts for found in twice.finditer(text.read_text())]
