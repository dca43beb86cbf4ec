"""The settings of the site: `sphinx-build -W docs site` writes it to site/."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("COLUMNS", "100")  # of the help texts on the page of the command line

import cells  # noqa: E402
import reference_pages  # noqa: E402

project = "textmill"
copyright = "its authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["**/README.md"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.xref_missing"]  # links to files outside docs/; a test checks that each leads somewhere
html_theme = "furo"
html_title = "textmill"
html_theme_options = {"source_repository": "", "top_of_page_buttons": []}
html_copy_source = False
html_show_sphinx = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"

reference_pages.write(HERE / "reference")


def run_cells(app: Any, name: str, source: list[str]) -> None:
    """Put the outputs of its blocks under those of a page of the book's path."""
    if name.startswith("book/"):
        os.chdir(HERE.parent)
        source[0] = cells.run_page(source[0], name.removeprefix("book/"), HERE / "book/pictures")


def setup(app: Any) -> None:
    """Connect the pages' blocks to Sphinx."""
    app.connect("source-read", run_cells)
