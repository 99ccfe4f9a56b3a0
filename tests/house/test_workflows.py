"""The workflows: valid, with pinned actions, and no more rights than they need."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from harness import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def steps(job: Any) -> list[Any]:
    return list(job["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_valid_and_its_actions_have_versions(path: Path) -> None:
    workflow = parsed(path)
    assert workflow["name"] == path.stem
    assert workflow[True], "YAML reads the key on as a truth value"
    assert workflow["permissions"] == {"contents": "read"}, "a job asks for more where it needs more"
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for step in steps(job):
            assert ("uses" in step) != ("run" in step), step
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v[\d.]+|release/v1)", step["uses"])


def test_a_tag_publishes_by_trusted_publishing_with_attestations() -> None:
    workflow = parsed(REPOSITORY / ".github/workflows/publish.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    jobs = workflow["jobs"]
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert not [name for name, job in jobs.items() if name != "publish" and "permissions" in job]
    last = steps(jobs["publish"])[-1]
    assert last["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert last["with"] == {"attestations": True}, "a password would be a stored token"
    assert [s for s in steps(jobs["wheels"]) if s.get("uses", "").startswith("pypa/cibuildwheel@")]


def test_the_changelog_of_the_debian_package_has_the_version() -> None:
    version = re.search(r'__version__ = "(.*)"', (REPOSITORY / "ttmfs/version.py").read_text())
    assert version
    first = (REPOSITORY / "packaging/debian/changelog").read_text().splitlines()[0]
    assert first.startswith(f"ttmfs ({version[1]}) "), "add an entry to packaging/debian/changelog"
