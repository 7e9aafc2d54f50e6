"""Sphinx: `make site` builds the pages of this repository as they are, with the navigation of docs/index.md."""

from __future__ import annotations

import re
from typing import Any

project = html_title = "ProxyDet"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
include_patterns = ["*.md", "docs/*.md", "docs/*/*.md", "benchmarks/*.md"]
html_theme = "furo"
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]


def add_navigation(_app: Any, name: str, source: list[str]) -> None:
    """Make the sections and links of the index the navigation, and add the measurements."""
    if name != root_doc:
        return
    trees = [
        (section.splitlines()[0], re.findall(r"\[[^]]+\]\(([^)]+)\.md\)", section))
        for section in re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]
    ]
    for caption, pages in [*trees, ("Measurements", ["../benchmarks/*"])]:
        listed = "\n".join(pages)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{listed}\n```\n"


def setup(app: Any) -> None:
    """Register the navigation."""
    app.connect("source-read", add_navigation)
