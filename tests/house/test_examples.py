"""The examples in documents, and the demo, are run."""

import contextlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from harness import REPOSITORY, mounts_below, wait_until
from stores import swap

FENCE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```\w+\n(?:#|//) (\S+\.\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


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


DOCUMENTS = [
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md")))
    if examples(path)
]


@pytest.mark.serial  # swap of another test would change what the examples show
@pytest.mark.parametrize("name", DOCUMENTS)
def test_examples_in_documents_print_what_they_show(name: str, tmp_path: Path) -> None:
    commands = examples(REPOSITORY / name)
    for file, text in FILE.findall((REPOSITORY / name).read_text()):
        (tmp_path / file).write_text(text)
    path = f"{REPOSITORY}:{REPOSITORY / '.venv/bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(tmp_path), "LC_ALL": "C", "COLUMNS": "80"}
    with swap(tmp_path) if name == "README.md" else contextlib.nullcontext():
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
