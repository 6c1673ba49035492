"""The documentation site: it builds without a warning, and shows what only the site has."""

from __future__ import annotations

import html
import re
import runpy
import sys
from pathlib import Path

import pytest

import resnet_fast
from resnet_fast.tuning.shapes import ARCHS
from tests.support import ROOT
from tests.support.processes import run_python

SITE = ROOT / "docs" / "site"
BUILD = """
import sys
from sphinx.cmd.build import main
root, out = sys.argv[1:]
sys.exit(main(["-q", "-W", "--keep-going", "-c", f"{root}/docs/site", "-d", f"{out}/doctrees", root, f"{out}/html"]))
"""


def text(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    done = run_python(BUILD, ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "html"
    first = re.search(r'url=([^"]+)', (out / "index.html").read_text())
    assert first is not None and (out / first[1]).is_file()

    reference = (out / "docs" / "reference.html").read_text(encoding="utf-8")
    others = {*ARCHS, "ops", "__version__"} - {"resnet50"}
    assert [name for name in {*resnet_fast.__all__} - others if f'id="resnet_fast.{name}"' not in reference] == []
    words = text(out / "docs" / "reference.html")
    assert [name for name in ARCHS if name not in words] == []
    assert "resnet_fast::conv_bn_act(Tensor x" in words

    performance = text(out / "docs" / "performance.html")
    assert "stock, plan train-eager" in performance and "cifar_resnet110" in performance and "sm_90" in performance

    home = (out / first[1]).read_text(encoding="utf-8")
    sidebar = home.partition('class="sidebar-tree"')[2].partition("</ul></div>")[0]
    assert all(f'href="{page}"' in sidebar for page in ("start.html", "faq.html", "../CHANGELOG.html", "limits.html"))
    assert "limits.md" not in text(out / first[1])  # links show titles
    for page in out.rglob("*.html"):  # opened from disk: nothing is fetched, and no link leads to a Markdown file
        own = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', own), page.name
        links = re.findall(r'<a [^>]*href="([^"#:]+)[#"]', own)
        assert [link for link in links if not (page.parent / link).is_file()] == [], page.name


def test_pictures_are_those_that_the_program_draws(capsys: pytest.CaptureFixture[str]) -> None:
    """`python docs/site/figures.py` writes them again after a change."""
    drawn = runpy.run_path(str(SITE / "figures.py"))["PICTURES"]
    assert len(drawn) == 3
    for name, draw in drawn.items():
        assert (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8") == draw().svg(), name


def test_the_sidebar_is_the_index() -> None:
    """The sections of docs/README.md, each page once, no page left out."""
    sys.path.insert(0, str(SITE))
    try:
        import pages
    finally:
        sys.path.remove(str(SITE))
    index = ROOT / "docs" / "README.md"
    tables = pages.navigation(index.read_text(encoding="utf-8"), index)
    captions = re.findall(r":caption: (.*)", tables)
    assert captions == re.findall(r"^## (.*)$", index.read_text(encoding="utf-8"), re.MULTILINE)
    entries = [line for line in tables.splitlines() if line and not line.startswith((":", "`"))]
    assert len(entries) == len(set(entries)) and {"start", "../CHANGELOG", "notes/host-time"} <= set(entries)
