"""Write ``report.md``: the results of the commands on one GPU as tables, made from the rows on disk alone.

"Measured" is a time taken on this GPU, "modelled" what the roofline or the heuristic says; the model's error is
modelled / measured - 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import markdown
from .session import Row, Settings, read_rows, write_text


def write(settings: Settings) -> None:
    """Write the report again, from all rows on disk."""
    write_text(settings.path / "report.md", to_markdown(settings))


def to_markdown(settings: Settings) -> str:
    """Return the page; parts without rows are left out."""
    folder = settings.path
    check, tune, bench = (_latest(folder / f"{name}.jsonl") for name in ("check", "tune", "bench"))
    parts = [_environment(folder), _ceilings(bench), _inference(bench), _training(bench), _convs(bench)]
    parts += [_tuning(folder, tune), _first_contact(check), _check(check), _failures([*check, *tune, *bench])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _latest(path: Path) -> list[Row]:
    """The latest row of every case, whatever versions it was made with."""
    return list({row["case"]: row for row in read_rows(path)}.values())


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is aligned left, the others right."""
    return markdown.table(headings, rows, [":---", *[markdown.RIGHT] * (len(headings) - 1)])


def percent(value: float | None) -> str:
    """Return a share as percents with a sign."""
    return "-" if value is None else f"{value * 100:+.0f} %"


def _environment(folder: Path) -> str:
    try:
        known = json.loads((folder / "env.json").read_text())
    except (OSError, ValueError):
        return "# Results"
    wanted = ("date", "commit", "driver", "cuda", "cudnn", "torch", "triton", "python", "cpu", "config_space")
    lines = [f"- {name}: {known[name]}" for name in wanted if known.get(name)]
    return f"# {known.get('gpu', 'Results')}\n\n" + "\n".join(lines)


def _ceilings(rows: list[Row]) -> str:
    found = [row for row in rows if row["case"].startswith("ceiling") and row["status"] == "measured"]
    if not found:
        return ""
    scales = {"B/s": (1e-12, "TB/s"), "FLOP/s": (1e-12, "TFLOP/s"), "s": (1e6, "us")}
    cells = []
    for row in found:
        scale, unit = scales[row["unit"]]
        modelled = f"{row['modelled'] * scale:.3g} {unit}" if "modelled" in row else "-"
        name = row["case"].removeprefix("ceiling ")
        cells.append([name, f"{row['value'] * scale:.3g} {unit}", modelled, percent(row.get("model_error"))])
    return "## What the card can do\n\n" + table(("", "measured", "model's figure", "model error"), cells)


def _nets(rows: list[Row], kind: str) -> list[Row]:
    """Rows of whole nets, small batches first."""
    return sorted((row for row in rows if row.get("kind") == kind), key=lambda row: int(row["batch"]))


def _best_stock(row: Row) -> float | None:
    # Rows of before there were other runtimes do not say what is stock: all of them but ours.
    stock = (p["ms"] for name, p in row["peers"].items() if p.get("stock", not name.startswith("resnet_fast")))
    return min(stock, default=None)


def _inference(rows: list[Row]) -> str:
    parts = []
    for row in _nets(rows, "inference"):
        best = _best_stock(row)
        cells = [_net_cells(name, part, best) for name, part in row["peers"].items()]
        heading = ("", "ms", "img/s", "x best stock", "peak GiB", "modelled ms", "model error", "differs by")
        notes = [f"- {name}: {why}" for name, why in (row["skipped"] | row["errors"]).items()]
        blocks = [f"### {row['case']}, {row['precision']}", table(heading, cells) if cells else "", "\n".join(notes)]
        parts.append("\n\n".join(filter(None, blocks)))
    said = (
        "Medians of one interleaved run per table, a call at a time from an idle GPU; ratios are to the fastest stock "
        "path of the same table. Differs by: relative distance of the output from that of the first row."
    )
    return "## Inference, measured\n\n" + said + "\n\n" + "\n\n".join(parts) if parts else ""


def _net_cells(name: str, part: Row, best: float | None) -> list[str]:
    ratio = "-" if best is None else f"{best / part['ms']:.2f}"
    return [
        name,
        f"{part['ms']:.3f}",
        f"{part['images_per_s']:,.0f}",
        ratio,
        f"{part['peak_gib']:.2f}" if "peak_gib" in part else "-",
        f"{part['modelled_ms']:.3f} ({part['model']})",
        percent(part["model_error"]),
        f"{part['difference']:.1e}" if "difference" in part else "-",
    ]


def _training(rows: list[Row]) -> str:
    cells, notes = [], []
    for row in _nets(rows, "training"):
        for name, part in row["peers"].items():
            cells.append([str(row["batch"]), *_net_cells(name, part, _best_stock(row))[:-1]])
        notes += [f"- batch {row['batch']}, {n}: {why}" for n, why in (row["skipped"] | row["errors"]).items()]
    if not cells:
        return ""
    heading = ("batch", "", "ms", "img/s", "x best stock", "peak GiB", "modelled ms", "model error")
    said = "A step: forward, backward, SGD with momentum."
    return f"## Training, measured\n\n{said}\n\n{table(heading, cells)}" + ("\n\n" + "\n".join(notes) if notes else "")


def _convs(rows: list[Row]) -> str:
    parts = []
    found = [row for row in rows if row["case"].startswith("conv ") and row["status"] == "measured"]
    for batch in sorted({row["batch"] for row in found}, reverse=True):
        group = [row for row in found if row["batch"] == batch]
        heading = (
            *("conv", "config of ours", "ours us", "cudnn us", "cudnn_fused us", "x best stock"),
            *("floor us", "of floor", "modelled us", "model error"),
        )
        sums = [
            sum(
                min((q[1] for n, q in row["us"].items() if (n == "ours") == ours), default=0.0) * row["times"]
                for row in group
            )
            for ours in (True, False)
        ]
        floor = sum(row["floor_us"] * row["times"] for row in group)
        text = f"### Batch {batch}\n\n{table(heading, [_conv_cells(row) for row in group])}\n\n"
        parts.append(text + f"Sum over the net: ours {sums[0]:.0f} us, stock {sums[1]:.0f} us, floor {floor:.0f} us.")
    said = "Medians with a cold L2; the config was measured by the tuner, or chosen by the heuristic (modelled)."
    return "## Convolutions, measured\n\n" + said + "\n\n" + "\n\n".join(parts) if parts else ""


def _conv_cells(row: Row) -> list[str]:
    us = {name: q[1] for name, q in row["us"].items()}
    ours, stock = us.get("ours"), min((us[n] for n in us if n != "ours"), default=None)
    return [
        f"{row['conv']} x {row['times']}",
        f"{row['config']} ({row['config_from']})",
        *(f"{us[n]:.1f}" if n in us else "-" for n in ("ours", "cudnn", "cudnn_fused")),
        f"{stock / ours:.2f}" if ours and stock else "-",
        f"{row['floor_us']:.1f} ({row['bound']})",
        f"{row['floor_us'] / ours * 100:.0f} %" if ours else "-",
        f"{row['modelled_us']:.1f}" if "modelled_us" in row else "-",
        percent(row.get("model_error")),
    ]


def _tuning(folder: Path, rows: list[Row]) -> str:
    try:
        sums = json.loads((folder / "tune_summary.json").read_text())
    except (OSError, ValueError):
        sums = []
    if not sums and not rows:
        return ""
    cells = []
    for row in sums:
        rate = f"{row['batch'] / row['best_us'] * 1e6:,.0f}"
        ratio = f"{row['stock_us'] / row['best_us']:.2f}"
        stages = ", ".join(f"{s} {part['stock_us'] / part['best_us']:.2f}" for s, part in row["stages"].items())
        cells.append([row["group"], f"{row['best_us']:.0f}", f"{row['stock_us']:.0f}", ratio, rate, stages])
    refused = [(row["case"], config, why) for row in rows for config, why in row.get("refused", ())]
    text = "## Tuning: sums of measured launches\n\n"
    if cells:
        text += table(("net", "best us", "stock us", "speedup", "img/s", "speedup by stage"), cells) + "\n\n"
    text += f"{len(rows)} launches measured, {len(refused)} candidates refused while compiling, running or matching."
    if refused:
        text += "\n\n" + table(
            ("launch", "candidate", "reason"), [(case, config, why[:120]) for case, config, why in refused[:50]]
        )
    return text


def _first_contact(rows: list[Row]) -> str:
    found = [row for row in rows if row["case"].startswith(("cold start ", "host ", "second device "))]
    if not found:
        return ""
    cells = [[r["case"], r["status"], r.get("error") or r.get("reason") or r.get("note", "")] for r in found]
    what = "Cold start: the first step with empty caches. Host: CPU time of a step, ours and stock PyTorch's in turn."
    return f"## First contact\n\n{what}\n\n" + table(("", "status", ""), cells)


def _check(rows: list[Row]) -> str:
    found = [row for row in rows if row["case"].startswith("config ")]
    nets = [row for row in rows if row["case"].startswith(("net ", "build", "test"))]
    if not found and not nets:
        return ""
    parts = ["## Check: configs against fp64 and eager's own error"]
    for title, group in (
        ("Four warps, and eight for 1x1", [r for r in found if not r.get("needs_proof")]),
        ("Eight warps beyond 1x1 (miscompiled elsewhere: pytorch#173068)", [r for r in found if r.get("needs_proof")]),
    ):
        keys = sorted({(_kernel(row), row.get("precision", "-")) for row in group})
        cells = []
        for kernel, precision in keys:
            of = [row for row in group if (_kernel(row), row.get("precision", "-")) == (kernel, precision)]
            counts = [str(sum(row["status"] == s for row in of)) for s in ("passed", "failed", "refused")]
            ratios = [row["ratio"] for row in of if row.get("ratio") is not None]
            cells.append([kernel, precision, *counts, f"{max(ratios):.2f}" if ratios else "-"])
        if cells:
            heading = ("kernel", "precision", "passed", "failed", "refused", "largest error / eager's")
            parts.append(f"### {title}\n\n{table(heading, cells)}")
    if nets:
        cells = [[r["case"], r["status"], r.get("error") or r.get("reason") or _ratio(r)] for r in nets]
        parts.append("### Build, tests and nets\n\n" + table(("", "status", ""), cells))
    reasons: dict[str, int] = {}
    for row in found:
        if row["status"] == "refused":
            reason = row["reason"].split(", got ")[0]
            reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        cells = [[why, str(n)] for why, n in sorted(reasons.items(), key=lambda item: -item[1])]
        parts.append("### Why configs were not admitted\n\n" + table(("rule", "times"), cells))
    return "\n\n".join(parts)


def _kernel(row: Row) -> str:
    return str(row.get("kernel") or row["case"].split(":")[0].removeprefix("config "))


def _ratio(row: Row) -> str:
    return f"error {row['rel']:.1e}, {row['ratio']} x eager's" if row.get("ratio") is not None else row.get("note", "")


def _failures(rows: list[Row]) -> str:
    failed = [row for row in rows if row["status"] == "failed"]
    if not failed:
        return ""
    lines = [f"- {row['case']}: {row['error']}" for row in failed]
    return f"## Failed: {len(failed)}\n\n" + "\n".join(lines)
