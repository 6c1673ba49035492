"""Draw the pictures of docs/how-it-works.md: `python docs/site/figures.py` writes docs/images/*.svg.

A picture has its own panel, light or dark with the reader's system, so that its text is legible on any page. It is 480
units wide: on a phone its text stays readable.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "images"
WIDTH = 480
STYLE = """
.panel{fill:#ffffff;stroke:#d0d7de} text{fill:#1f2328;font:14px system-ui,sans-serif} .small{font-size:12.5px}
.title{font-weight:600} .chip{fill:#ddf4ff;stroke:#0969da} .memory{fill:#fff1e5;stroke:#bc4c00}
.plain{fill:#f6f8fa;stroke:#8c959f} .line{stroke:#57606a;stroke-width:1.5;fill:none} .head{fill:#57606a}
@media (prefers-color-scheme:dark){
.panel{fill:#161b22;stroke:#30363d} text{fill:#e6edf3} .chip{fill:#0c2d6b;stroke:#58a6ff}
.memory{fill:#5a1e02;stroke:#f0883e} .plain{fill:#21262d;stroke:#8b949e} .line{stroke:#9198a1} .head{fill:#9198a1}}
"""


class Picture:
    """The parts of one picture, from top to bottom. Positions are in the picture's units."""

    def __init__(self, height: int, title: str):
        self.height, self.title = height, title
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str) -> None:
        """Draw a box with its lines of text in the middle."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{kind}"/>')
        for index, line in enumerate(lines):
            self.text(x + width / 2, y + height / 2 + 5 + 17 * (index - (len(lines) - 1) / 2), line, "small", "middle")

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.parts.append(f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" class="line" marker-end="url(#head)"/>')

    def svg(self) -> str:
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto">'
            '<path d="M0 0L8 4L0 8z" class="head"/></marker></defs>',
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{self.height - 2}" rx="8" class="panel"/>',
            *self.parts,
            "</svg>\n",
        ])  # fmt: skip


def block_fusion() -> Picture:
    """Stock layers and fused launches of a bottleneck, side by side."""
    layers = ["conv1 1x1", "bn1", "relu", "conv2 3x3", "bn2", "relu", "conv3 1x1", "bn3", "add shortcut", "relu"]
    step, top = 40, 62
    picture = Picture(top + step * len(layers) + 46, "A bottleneck: ten stock layers, and three fused convolutions")
    picture.text(120, 30, "stock layers", "title", "middle")
    picture.text(360, 30, "fused", "title", "middle")
    picture.text(120, 49, "each reads and writes memory", "small", "middle")
    picture.text(360, 49, "one pass per convolution", "small", "middle")
    for index, layer in enumerate(layers):
        y = top + step * index
        picture.box(40, y, 160, 28, "chip" if layer.startswith("conv") else "plain", layer)
        picture.arrow(120, y + 28, 120, y + step)
    fused = [(0, 3, "bn1 folded, relu"), (3, 3, "bn2 folded, relu"), (6, 4, "bn3 folded, add, relu")]
    for name, (first, count, epilogue) in zip(("conv1", "conv2", "conv3"), fused, strict=True):
        y, height = top + step * first, step * count - 12
        picture.box(270, y, 180, height, "chip", name, epilogue)
        picture.arrow(360, y + height, 360, y + height + 12)
    bottom = top + step * len(layers)
    picture.box(40, bottom, 160, 28, "memory", "y, in memory")
    picture.box(270, bottom, 180, 28, "memory", "y, in memory")
    return picture


def tile_life() -> Picture:
    """What one program of a fused convolution does, from its first load to its only store."""
    picture = Picture(500, "The life of a tile: loaded, multiplied and summed on the chip, finished there, stored once")
    picture.text(240, 28, "one program computes one tile of y", "title", "middle")
    picture.box(24, 44, 130, 46, "memory", "tile of x", "pixels x channels")
    picture.box(174, 44, 130, 46, "memory", "tile of weights", "BatchNorm folded")
    picture.box(324, 44, 132, 46, "memory", "shortcut, bias")
    picture.parts.append('<rect x="24" y="124" width="432" height="284" rx="8" class="plain"/>')
    picture.text(404, 398, "on the chip", "title", "middle")
    picture.arrow(89, 90, 89, 164)
    picture.arrow(239, 90, 239, 164)
    picture.box(44, 166, 240, 58, "chip", "multiply, add to fp32 sums", "next channels or filter position")
    picture.parts.append('<path d="M284 184H306V208H288" class="line" marker-end="url(#head)"/>')
    picture.text(312, 200, "loop over K", "small")
    picture.arrow(164, 224, 164, 262)
    picture.box(44, 264, 240, 34, "chip", "+ bias")
    picture.arrow(164, 298, 164, 314)
    picture.box(44, 316, 240, 34, "chip", "+ shortcut, ReLU")
    picture.arrow(164, 350, 164, 364)
    picture.box(44, 366, 240, 32, "chip", "round to the dtype of y")
    picture.parts.append('<path d="M420 90V281H290" class="line" marker-end="url(#head)"/>')
    picture.parts.append('<path d="M420 281V333H290" class="line" marker-end="url(#head)"/>')
    picture.arrow(164, 398, 164, 442)
    picture.box(44, 444, 240, 36, "memory", "tile of y: stored once")
    picture.text(312, 467, "orange: GPU memory", "small")
    return picture


def figure_labels() -> Picture:
    """Which label a figure gets: by what it was obtained from."""
    rows = [
        ("memory", "measured", "a clock, on the machine that is named", "a time, a peak of memory, an accuracy"),
        ("chip", "counted", "shapes, machine code, counters of a run", "bytes, launches, registers, products"),
        ("chip", "simulated", "the kernel, run without its GPU", "right or wrong, and what to count"),
        ("plain", "modelled", "counts, and a device's ceilings", "a time that nobody has measured"),
    ]
    picture = Picture(48 + 92 * len(rows), "Labels of figures: measured, counted, simulated, modelled")
    picture.text(160, 28, "where it comes from", "small")
    for index, (kind, label, source, gives) in enumerate(rows):
        y = 42 + 92 * index
        picture.box(20, y, 120, 76, kind, label)
        picture.text(160, y + 30, source)
        picture.text(160, y + 54, f"gives: {gives}", "small")
    return picture


PICTURES = {"block-fusion": block_fusion, "tile-life": tile_life, "figure-labels": figure_labels}


def main() -> None:
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
