"""The documentation as a site: it builds without a warning, so no link is dead and no page is missing in the menu."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness import REPOSITORY


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_the_site_has_every_document(site: Path) -> None:
    pages = {path.parent.name for path in site.glob("*/index.html")}
    assert {path.stem for path in REPOSITORY.glob("docs/*.md")} | {"contributing", "changelog"} <= pages
    assert "ttmfs" in (site / "index.html").read_text()


def test_the_reference_of_the_api_has_every_public_name(site: Path) -> None:
    text = (site / "api/index.html").read_text()
    for name in "open_pool Pool Backup PageArray shrink BackupEnded NoRoom".split():
        assert re.search(rf'id="ttmfs\.[a-z_.]*{name}"', text), f"add {name} to docs/api.md"


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    """Except that the theme's script fetches mermaid for pages with diagrams."""
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="https?://', page.read_text()), page
