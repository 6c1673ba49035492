"""Lay pages out in headless Chromium, opened from disk, and say where one is wider than its window.

One Chromium loads all pages, one after another, into a frame of the wanted width: style sheets see that width, as on a
phone. No package is needed, only the program.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import LIMIT_S

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = """<!DOCTYPE html><meta charset="utf-8"><body><pre id="found"></pre><script>
const pages = %s, widths = %s, found = [];
const frame = document.createElement("iframe");
document.body.append(frame);
(async () => {
  for (const width of widths) {
    frame.style = `width:${width}px;height:900px;border:0`;
    for (const page of pages) {
      await new Promise((done) => { frame.onload = done; frame.src = page; });
      const inside = frame.contentDocument;
      if (inside.fonts) await inside.fonts.ready;
      const root = inside.documentElement;
      const wide = Math.max(root.scrollWidth, inside.body.scrollWidth);
      const row = {page, width, wide, text: inside.body.innerText.trim().length, parts: []};
      if (wide > width) for (const part of inside.body.querySelectorAll("*")) {
        const out = part.getBoundingClientRect().right > width + 1 || part.scrollWidth > width;
        if (out) row.parts.push(part.outerHTML.slice(0, 120));
      }
      row.parts = row.parts.slice(-5);  // the inmost ones
      const texts = [...inside.querySelectorAll("svg.chart text")].filter((t) => t.getBoundingClientRect().width);
      const boxes = texts.map((t) => t.getBoundingClientRect());
      row.smallest = Math.min(...texts.map((t, i) => boxes[i].height), 99);
      row.outside = texts.filter((t, i) => boxes[i].right > width + 1 || boxes[i].left < -1).map((t) => t.textContent);
      row.overlaps = [];
      for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
        const a = boxes[i], b = boxes[j];
        if ([i, j].some((k) => texts[k].hasAttribute("transform"))) continue;  // its box is larger than it
        if (a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
          row.overlaps.push([texts[i].textContent, texts[j].textContent]);
      }
      found.push(row);
    }
  }
  document.getElementById("found").textContent = JSON.stringify(found);
  document.title = "done";
})();
</script>"""


def program() -> str:
    """Return Chromium's path; skip the test where there is none."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"expected a browser among {', '.join(CHROMIUM)}, got none (Debian: apt-get install chromium)")
    return found


def layouts(pages: Sequence[Path], widths: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Lay out each page at each width.

    Args:
        pages: HTML files.
        widths: of the window, in CSS pixels.
        folder: where the program and the browser's profile go.

    Returns:
        Per page and width: ``page``, ``width``, ``wide`` (what the page takes), ``text`` (characters shown), ``parts``
        (elements that stick out), and of its charts: ``smallest`` (height of a text), ``outside`` and ``overlaps``.
    """
    browser = program()
    driver = folder / "layouts.html"
    driver.write_text(PROGRAM % (json.dumps([page.resolve().as_uri() for page in pages]), json.dumps(list(widths))))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        "--disable-dev-shm-usage",
        "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}",
        "--timeout=240000",
    ]
    command += ["--virtual-time-budget=600000", "--window-size=1600,1000", "--dump-dom", driver.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    shown = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown and shown[1], done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(html.unescape(shown[1]))
    assert len(rows) == len(pages) * len(widths)
    return rows


def faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per page and width that is empty, scrolls sideways, or has chart texts that cannot be read."""
    out = []
    for row in rows:
        where = f"{row['page'].rpartition('/html/')[2]} at {row['width']}"
        if not row["text"]:
            out.append(f"{where}: empty")
        if row["wide"] > row["width"]:
            out.append(f"{where}: {row['wide']} wide: {row['parts']}")
        if row["outside"] or row["overlaps"] or row["smallest"] < 11:
            out.append(f"{where}: charts: {row['outside']} {row['overlaps']} {row['smallest']}")
    return out
