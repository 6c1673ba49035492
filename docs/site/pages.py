"""What the site adds to the pages: navigation, the reference, and tables read from result files.

A page says where with a comment that GitHub does not show: `<!-- site: NAME -->`, a name of :data:`GENERATED`.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPORT = "report.html"
"""The report page, beside the page of performance."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def version() -> str:
    from resnet_fast import __version__

    return __version__


def links(text: str, page: Path) -> list[Path]:
    """Return the pages that `text` links, each once, in order."""
    found = [(page.parent / path).resolve() for _, path, _ in LINK.findall(text) if path.endswith(".md")]
    return list(dict.fromkeys(path for path in found if path.is_relative_to(ROOT)))


def without_links_to_folders(text: str, page: Path) -> str:
    """Replace each link to a folder by its text: the site has pages and files, no listings."""
    return LINK.sub(lambda found: found[1] if (page.parent / found[2]).is_dir() else found[0], text)


def with_titles(text: str) -> str:
    """Show a page's title in place of its file's name in links: ``[x.md](x.md)`` becomes ``[](x.md)``."""

    def link(found: re.Match[str]) -> str:
        named = found[1].removesuffix(".md") == Path(found[2]).stem and found[2].endswith(".md")
        return f"[]({found[2]}{found[3] or ''})" if named and found[1] != "README" else found[0]

    return LINK.sub(link, text)


def navigation(text: str, page: Path) -> str:
    """Return hidden tables of contents of an index: one for each section of docs/README.md, one of another README.md.

    In docs/README.md, a page stands under the first section whose table links it.
    """
    if page.name != "README.md" or page.parent == ROOT:
        return ""
    sections = [("", text)]
    if page.parent == ROOT / "docs":
        parts = [part.partition("\n") for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]]
        rows = [(title, re.findall(r"^\|.*$", body, re.MULTILINE)) for title, _, body in parts]
        sections = [(title, "\n".join(body)) for title, body in rows]
    shown = {page}
    tables = []
    for caption, body in sections:
        own = [path for path in links(body, page) if path not in shown]
        if caption == "":
            own = [path for path in own if path.parent == page.parent]
        shown.update(own)
        title = f":caption: {caption}\n" if caption else ""
        names = [os.path.relpath(path.with_suffix(""), page.parent) for path in own]
        entries = "\n".join("Overview <../README>" if name == "../README" else name for name in names)
        if entries:
            tables.append(f"```{{toctree}}\n:hidden:\n{title}\n{entries}\n```\n")
    return "\n" + "\n".join(tables)


def table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def reference() -> str:
    """Return the public names of the package, from their docstrings, and the schemas of the ops."""
    import torch  # the ops are defined with it

    import resnet_fast
    from resnet_fast.tuning.shapes import ARCHS

    names = [name for name in resnet_fast.__all__ if name not in (*ARCHS, "__version__", "ops")]
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for name in names:
        value = getattr(resnet_fast, name)
        if inspect.isclass(value):
            kinds["Errors" if issubclass(value, Exception) else "Classes"].append(name)
        else:
            kinds["Functions"].append(name)
    out = []
    for kind, members in kinds.items():
        directive, options = "autofunction", ""
        if kind != "Functions":
            directive, options = "autoclass", "   :members:\n"
        body = "\n".join(f".. {directive}:: resnet_fast.{name}\n{options}" for name in sorted(members))
        out.append(f"## {kind}\n\n```{{eval-rst}}\n{body}```\n")
    others = ", ".join(f"`{name}`" for name in ARCHS if name != "resnet50")
    out.append(
        "## Nets\n\n```{eval-rst}\n.. autofunction:: resnet_fast.resnet50\n```\n\n"
        f"The same function for each other net: {others}.\n"
    )
    ops = [
        getattr(torch.ops.resnet_fast, name).default for name in ("conv_bn_act", "bottleneck", "basic_block", "stem")
    ]
    schemas = "\n\n".join(str(op._schema).replace(", ", ",\n    ") for op in ops)
    out.append(f"## Ops\n\nThe dispatcher's schemas of `torch.ops.resnet_fast`:\n\n```text\n{schemas}\n```\n")
    return "\n".join(out)


def performance() -> str:
    """Return tables of the result files: counted tables, experiments, and each GPU that `make gpu-bench` measured."""
    return "\n".join([gpus(), traffic(), machine_code(), experiments()])


def report_page() -> str:
    """Return the report page: the committed result files, and what was counted on the host."""
    from resnet_fast.benchmarks import page

    return page.build([ROOT / "benchmarks" / "results", ROOT / "docs" / "tables" / "host-instructions.json"])


def gpus() -> str:
    reports = sorted((ROOT / "benchmarks" / "results").glob("*/report.md"))
    text = (
        f'## Measured on GPUs\n\n<a href="{REPORT}">The benchmark report</a> shows every result file on one page.\n\n'
    )
    if not reports:
        return text + "So far they hold stock PyTorch's times. None of our kernels has been timed on a GPU yet.\n"
    for report in reports:
        body = re.sub(r"^(#+)", r"\1##", report.read_text(encoding="utf-8"), flags=re.MULTILINE)
        text += f"### {report.parent.name}\n\n{body}\n\n"
    return text


def traffic() -> str:
    folder = ROOT / "docs" / "tables"
    nets = json.loads((folder / "traffic.json").read_text())["net"]
    keys = list(next(iter(nets.values())))
    text = "## Bytes of ResNet-50's inference, counted\n\n"
    text += table(
        ["plan", *keys],
        [[plan, *(f"{row[key]:,.1f}".removesuffix(".0") for key in keys)] for plan, row in nets.items()],
    )
    text += "\nEvery launch: [traffic](tables/traffic.md).\n\n## Bytes of ResNet-50's training step, counted\n\n"
    text += "Rows that begin with counted, and the last three, are counted; plans and least bytes are modelled.\n\n"
    step = json.loads((folder / "training-traffic.json").read_text())["net"]
    text += table(["per image", "MB"], [[key, f"{value:,.1f}"] for key, value in step.items()])
    return text + "\nEvery block: [training-traffic](tables/training-traffic.md).\n"


def machine_code() -> str:
    lines = []
    for stem in ("static-budgets", "training-budgets", "cuda-budgets"):
        rows = json.loads((ROOT / "docs" / "tables" / f"{stem}.json").read_text())
        for arch, compiler in sorted({(row["arch"], row["compiler"]) for row in rows}):
            own = [row for row in rows if (row["arch"], row["compiler"]) == (arch, compiler)]
            most = max(row["registers"] for row in own)
            spills = sum(row["local_bytes"] > 0 for row in own)
            lines.append([f"[{stem}](tables/{stem}.md)", f"sm_{arch}", compiler, len(own), most, spills])
    header = ["table", "for", "compiler", "kernels and configs", "most registers", "with spills"]
    return "## Machine code, counted\n\n" + table(header, lines)


def experiments() -> str:
    lines = []
    for path in sorted((ROOT / "docs" / "experiments" / "logs").glob("*.jsonl")):
        last = [row for line in path.read_text().splitlines() if (row := json.loads(line))["kind"] == "epoch"][-1]
        errors = [f"{100 * last[key]:.1f} %" for key in ("train_error", "val_error")]
        lines.append([path.stem, f"{last['epoch']:g}", *errors])
    return (
        "## The paper's experiments, measured\n\nError after the last epoch of the reduced protocol, from the logs of "
        "[these runs](experiments/README.md):\n\n"
        + table(["run", "epochs", "training error", "validation error"], lines)
    )


def wheels() -> str:
    """Return the environments in which the files of a release were installed and run."""
    rows = json.loads((ROOT / "docs" / "tables" / "wheels.json").read_text())["environments"]
    names = {"python": "Python", "torch": "torch", "torchvision": "torchvision", "triton": "Triton"}
    return table([*names.values()], [[row[key].partition("+")[0] for key in names] for row in rows])


GENERATED: dict[str, Callable[[], str]] = {"reference": reference, "performance": performance, "wheels": wheels}
"""What a comment `<!-- site: NAME -->` stands for."""
