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
from tests.support import ROOT, browser
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site; a warning fails."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    done = run_python(BUILD, ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site: Path) -> None:
    out = site
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

    assert 'href="report.html"' in (out / "docs" / "performance.html").read_text(encoding="utf-8")
    assert "25,700" in text(out / "docs" / "report.html")

    home = (out / first[1]).read_text(encoding="utf-8")
    sidebar = home.partition('class="sidebar-tree"')[2].partition("</ul></div>")[0]
    assert all(f'href="{page}"' in sidebar for page in ("start.html", "faq.html", "../CHANGELOG.html", "limits.html"))
    assert "limits.md" not in text(out / first[1])  # links show titles
    pages = {page.resolve(): page.read_text(encoding="utf-8") for page in out.rglob("*.html")}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', own)) for page, own in pages.items()}
    for page, own in pages.items():  # opened from disk: nothing is fetched, and no link leads to a Markdown file
        assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', own), page.name
        links = re.findall(r'<a [^>]*href="([^"#:]+)[#"]', own)
        assert [link for link in links if not (page.parent / link).is_file()] == [], page.name
        marked = re.findall(r'<a [^>]*href="([^"#:]*)#([^"]+)"', own)
        targets = [((page.parent / link).resolve() if link else page, html.unescape(anchor)) for link, anchor in marked]
        assert [(to.name, anchor) for to, anchor in targets if anchor not in anchors.get(to, ())] == [], page.name


@pytest.mark.slow
def test_no_page_scrolls_sideways(site: Path, tmp_path: Path) -> None:
    """Every page at the widths of a phone and of a desktop; the report page's charts can be read at both."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    assert browser.faults(browser.layouts(pages, (375, 1440), tmp_path)) == []


@pytest.mark.slow
def test_the_check_of_layouts_can_fail(tmp_path: Path) -> None:
    charts = (
        '<svg class="chart" width="300" height="40"><text x="9" y="20">one</text><text x="15" y="22">two</text></svg>'
    )
    bad = {"wide": '<div style="width:400px">x</div>', "empty": "", "word": f"<p>{'x' * 90}</p>", "chart": charts}
    for name, body in bad.items():
        (tmp_path / f"{name}.html").write_text(f"<!DOCTYPE html><body>{body}</body>")
    rows = browser.layouts([tmp_path / f"{name}.html" for name in bad], (375,), tmp_path)
    found = browser.faults(rows)
    assert len(found) == 4 and "408 wide" in found[0] and "empty" in found[1] and "['two', 'one']" in found[3]


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
