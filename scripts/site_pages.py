"""Adds the documents of the repository's root to the site, and adjusts links to them. A hook of MkDocs (mkdocs.yml)."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages. Their text is read at each build."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Make links between the root's documents and those of docs/ links between pages."""
    if page.file.src_uri in PAGES.values():
        markdown = re.sub(r"\]\((?:docs/)?([^):]+)\)", lambda link: f"]({_target(link[1])})", markdown)
    return re.sub(r"\]\(\.\./([^):]+)\)", lambda link: f"]({_target(link[1])})", markdown)


def _target(link: str) -> str:
    path, mark, anchor = link.partition("#")
    return PAGES.get(path, path) + mark + anchor
