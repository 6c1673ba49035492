"""Sphinx's settings for the documentation site: `make docs`.

The source folder is the root of the repository: so relative links are right on GitHub and in the site. The navigation
is the index, docs/README.md: its sections, and the pages that the table of each links. No other list of pages exists.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import pages  # noqa: E402 - this folder

project = "resnet_fast"
copyright = "the authors of resnet_fast, Apache-2.0"
release = version = pages.version()

root_doc = "docs/README"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**.md"]
exclude_patterns = [".*", "benchmarks", "build", "csrc", "dist", "examples", "out", "resnet_fast", "tests", "docs/site"]

myst_heading_anchors = 4
"""Headings have GitHub's anchors."""

autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "resnet_fast"
html_show_sphinx = html_show_copyright = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]

suppress_warnings = ["myst.header"]  # a page of tables may begin with a third-level heading


def fill(app: Sphinx, name: str, source: list[str]) -> None:
    """Add to a page what only the site can show, titles in links, and no links to folders of the source."""
    page = ROOT / f"{name}.md"
    text = re.sub(r"<!-- site: (\w+) -->", lambda found: pages.GENERATED[found[1]](), source[0])
    text = pages.without_links_to_folders(text, page)
    source[0] = pages.with_titles(text) + pages.navigation(text, page)


def add_pages(app: Sphinx, error: Exception | None) -> None:
    """Write index.html, which a reader opens, at the top of the site, and the report page."""
    if error is None and app.builder.name == "html":
        shutil.copy(HERE / "index.html", Path(app.outdir) / "index.html")
        (Path(app.outdir) / "docs" / pages.REPORT).write_text(pages.report_page(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", fill)
    app.connect("build-finished", add_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
