"""Write the sections of the report page: peers, roofline, the parts of a step, history, checks, origins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from . import charts, markup, modelled
from .charts import Mark, Series
from .markup import NONE, commit_text, label, origin, paragraph, table
from .results import MeasuredCell, PeerTime, ResultSet, Run, devices_of


def peers(results: ResultSet) -> str:
    """Return a table per cell: ours and each peer, with ratios and errors."""
    if not results.cells:
        return paragraph("No net was measured in these folders.")
    out = [
        paragraph(
            "A ratio is the time of the fastest stock path over the path's own time: above 1 is faster than all that "
            "PyTorch alone offers. 'Ours against it' is a path's time over that of the fastest of ours. Only times "
            "that were measured in one run are divided. Of several runs on one device, the latest is shown here, the "
            "others in the history. "
            f"A {label('modelled')} row stands where ours was not measured. It has no ratio."
        )
    ]
    for device in devices_of(results.cells):
        out.append(f"<h3>{escape(device)}</h3>")
        cells = _latest([cell for cell in results.cells if cell.run.device == device])
        for kind in ("inference", "training"):
            for cell in sorted((c for c in cells if c.kind == kind), key=_order):
                out.append(_cell_table(cell))
    return "\n".join(out)


def _latest(cells: Sequence[MeasuredCell]) -> list[MeasuredCell]:
    """Return those cells of which no run measured the same case at a later date."""
    dates: dict[str, str] = {}
    for cell in cells:
        dates[cell.case] = max(cell.date, dates.get(cell.case, ""))
    return [cell for cell in cells if cell.date == dates[cell.case]]


def _order(cell: MeasuredCell) -> tuple[str, str, int, str]:
    return cell.net, cell.precision, cell.batch, cell.case


def _cell_table(cell: MeasuredCell) -> str:
    best, times = cell.best_stock, sorted(cell.times, key=lambda t: t.ms)
    model = modelled.ours(cell)
    mine = min((t for t in times if t.ours), key=lambda t: t.ms, default=None)
    fastest = max([t.images_per_s for t in times] + ([model.images_per_s] if model else []), default=1.0)
    rows = [("ours" if t.ours else "", _time_cells(t, best, mine, fastest)) for t in times]
    if model:
        cells = [f"{escape(model.peer)} {label('modelled')}", _bar("modelled", model.images_per_s / fastest)]
        cells += [f"{model.ms:.3f}", f"{model.images_per_s:,.0f}", "no ratio: not measured", NONE, NONE, NONE, ""]
        rows.append(("ours modelled", cells))
    rows += [("", [escape(peer), "", *[NONE] * 6, escape(why)]) for peer, why in cell.missing]
    size = f", {cell.image}x{cell.image}" if cell.image else ""
    what = f"{cell.net}{size}, {cell.precision}, batch {cell.batch}"
    plain = f"{cell.kind} {cell.net} batch {cell.batch}"
    caption = f"{label('measured')} {escape(what)}. {escape(origin(cell.run, cell.commit, cell.date))}."
    if cell.kind in cell.case and cell.case != plain:
        caption += f" Case: {escape(cell.case)}."
    if model:
        caption += f" {label('modelled')} {escape(model.how)}."
    always = {
        HEADINGS.index(name) for name in ("path", "", "ms per batch", "images/s", "x best stock", "numeric error")
    }
    shown = [i for i in range(len(HEADINGS)) if i in always or any(row[i] not in ("", NONE) for _, row in rows)]
    cut = [(kind, [row[i] for i in shown]) for kind, row in rows]
    numbers = [at for at, i in enumerate(shown) if 2 <= i < HEADINGS.index("note")]
    whole = [at for at, i in enumerate(shown) if i == HEADINGS.index("note")]
    return f"<h4>{escape(cell.kind.capitalize())}, batch {cell.batch}, {escape(cell.precision)}</h4>" + table(
        caption, [HEADINGS[i] for i in shown], cut, numbers, whole, bar=1
    )


HEADINGS = (
    "path", "", "ms per batch", "images/s", "x best stock", "ours against it", "numeric error", "peak GiB", "note"
)  # fmt: skip
"""Columns of a cell's table. Those after the images per second that are empty are left out, but the two that matter."""


def _time_cells(time: PeerTime, best: PeerTime | None, mine: PeerTime | None, fastest: float) -> list[str]:
    ratio = NONE if best is None else f"{best.ms / time.ms:.2f}" + (" (best stock)" if time is best else "")
    spread = (
        f' <span class="soft">({time.quartiles[0]:.3f}&ndash;{time.quartiles[1]:.3f})</span>' if time.quartiles else ""
    )
    return [
        escape(time.peer),
        _bar("ours" if time.ours else "stock" if time.stock else "", time.images_per_s / fastest),
        f"{time.ms:.3f}{spread}",
        f"{time.images_per_s:,.0f}",
        ratio,
        NONE if mine is None or time.ours else f"{time.ms / mine.ms:.2f} x as fast",
        escape(time.error) or "not recorded",
        NONE if time.peak_gib is None else f"{time.peak_gib:.2f}",
        escape(time.note),
    ]


def _bar(kind: str, share: float) -> str:
    return f'<span class="b {kind}" style="width:{100 * share:.1f}%" aria-hidden="true"></span>'


def roofline(results: ResultSet) -> str:
    """Return a scatter per run that knows its card's ceilings: measured nets and launches, modelled launches."""
    parts = [_scatter(results, run) for run in results.runs if run in results.ceilings]
    parts = [part for part in parts if part]
    intro = paragraph(
        "Right is more work per byte, up is faster. Under the slope memory is the limit, under the flat line the "
        "tensor cores. Operations and bytes are counted from shapes (a path's least bytes, by the fusion that it is "
        f"closest to); times are {label('measured')} for filled marks, {label('modelled')} for hollow ones."
    )
    return intro + "\n".join(parts) if parts else paragraph("No run in these folders measured its card's ceilings.")


def _ceiling(results: ResultSet, run: Run, begin: str) -> float | None:
    known = results.ceilings[run]
    return next((value for name, (value, _) in known.items() if name == begin), None)


def _scatter(results: ResultSet, run: Run) -> str:
    bandwidth, rate = (_ceiling(results, run, name) for name in ("copy", "product bfloat16"))
    if bandwidth is None or rate is None:
        return ""
    cells = [c for c in results.cells if c.run == run and c.kind == "inference"]
    series = [*_net_series(cells), *_launch_series(results, run)]
    largest = max(cells, key=lambda c: c.batch, default=None)
    if largest is not None and modelled.ours(largest) is not None:
        found = modelled.launches(largest)
        marks = tuple(
            Mark(one.flops / one.nbytes, one.flops / one.seconds, f"{one.name}: {one.seconds * 1e6:.1f} us modelled")
            for one in found
        )
        series.append(Series(f"resnet_fast, launches at batch {largest.batch} (modelled)", 0, marks, True))
    if not series:
        return ""
    title = f"Roofline of {run.device}: {', '.join(one.name for one in series)}; figures in the table below"
    rows = [
        ("modelled" if one.modelled else "", [
            escape(one.name), label("modelled" if one.modelled else "measured"), f"{m.x:,.1f}", f"{m.y / 1e12:,.1f}",
            f"{100 * m.y / min(rate, m.x * bandwidth):.0f} %", escape(m.text),
        ])
        for one in series
        for m in one.marks
    ]  # fmt: skip
    headings = ("series", "how", "FLOP/B", "TFLOP/s", "of the ceiling", "what")
    tabular = table(f"Points of the picture. {escape(run.device)}.", headings, rows, (2, 3, 4), (5,))
    caption = (
        f"{label('measured')} ceilings: copy {bandwidth / 1e12:.2f} TB/s, bfloat16 products {rate / 1e12:.0f} TFLOP/s. "
        f"{escape(origin(run, run.commit, run.date))}."
    )
    picture = charts.roofline(title, bandwidth, rate, series) + charts.legend(series)
    heading = f"<h3>{escape(run.device)}</h3>"
    return heading + markup.figure(picture, caption) + markup.details("The same figures as a table", tabular)


PLANS = {"eager": "separate", "folded": "separate", "cuDNN": "conv", "torch.compile": "conv", "resnet_fast": "tail"}
"""The byte model that a GPU path's kernels come closest to, by how its name begins."""


def _net_series(cells: Sequence[MeasuredCell]) -> list[Series]:
    """Whole nets: one series per path."""
    found: dict[str, list[Mark]] = {}
    for cell in sorted(cells, key=_order):
        for time in cell.times:
            plan = next((plan for begin, plan in PLANS.items() if time.peer.startswith(begin)), None)
            work = modelled.net_work(cell, plan) if plan else None
            if work is None:
                continue
            flops, nbytes = work
            text = f"{cell.net}, batch {cell.batch}: {time.ms:.3f} ms"
            found.setdefault(time.peer, []).append(Mark(flops / nbytes, flops / time.ms * 1e3, text))
    others = [name for name in found if not name.startswith(modelled.PEER)]
    return [
        Series(
            f"{name}, whole net", 1 + others.index(name) % (charts.COLOURS - 1) if name in others else 0, tuple(marks)
        )
        for name, marks in found.items()
    ]


def _launch_series(results: ResultSet, run: Run) -> list[Series]:
    """Single convolutions: ours, and the faster of cuDNN's forms."""
    sides: dict[str, list[Mark]] = {"ours": [], "cuDNN": []}
    for launch in results.launches:
        if launch.run != run:
            continue
        us = dict(launch.us)
        stock = min((value for name, value in us.items() if name != "ours"), default=None)
        for side, value in (("ours", us.get("ours")), ("cuDNN", stock)):
            if value:
                text = f"{launch.name}, batch {launch.batch}: {value:.1f} us"
                sides[side].append(Mark(launch.flops / launch.nbytes, launch.flops / value * 1e6, text))
    names = {"ours": ("resnet_fast, one convolution", 0), "cuDNN": ("cuDNN, one convolution", 5)}
    return [Series(*names[side], tuple(marks)) for side, marks in sides.items() if marks]


def history(results: ResultSet) -> str:
    """Return images per second over dates, per device, net and batch."""
    groups: dict[tuple[str, str, str, str, int], list[MeasuredCell]] = {}
    for cell in [*results.earlier, *results.cells]:
        where = cell.run.device, cell.kind, cell.net, cell.precision, cell.batch
        groups.setdefault(where, []).append(cell)
    if not groups:
        return paragraph("No net was measured in these folders.")
    out, single = [], []
    for where, cells in sorted(groups.items()):
        dates = sorted({cell.date for cell in cells})
        if len(dates) < 2:
            single.append((where, cells))
            continue
        out.append(_over_dates(where, cells, dates))
    if single:
        rows = []
        for (device, kind, net, precision, batch), cells in single:
            best, mine = (_fastest(cells, ours) for ours in (False, True))
            what = f"{kind}, {net}, {precision}, batch {batch}"
            first = cells[0]
            versions = f"{first.run.versions_text}, {commit_text(first.commit)}"
            rows.append(
                (
                    "",
                    [
                        escape(what),
                        escape(device),
                        escape(first.date[:10] or "not recorded"),
                        best,
                        mine,
                        escape(versions),
                    ],
                )
            )
        caption = f"{label('measured')} on one date so far: a line needs two. Images per second of the fastest path."
        headings = ("what", "device", "date", "stock", "resnet_fast", "versions")
        out.append(table(caption, headings, rows, (2, 3, 4), (1, 5)))
    return "\n".join(out)


def _fastest(cells: Iterable[MeasuredCell], ours: bool) -> str:
    found = [t for cell in cells for t in cell.times if t.ours == ours and (ours or t.stock)]
    if not found:
        return "not measured"
    best = max(found, key=lambda t: t.images_per_s)
    return f"{best.images_per_s:,.0f}"


def _over_dates(where: tuple[str, str, str, str, int], cells: Sequence[MeasuredCell], dates: Sequence[str]) -> str:
    device, kind, net, precision, batch = where
    names = list(dict.fromkeys(time.peer for cell in cells for time in cell.times))
    others = [name for name in names if not name.startswith(modelled.PEER)]
    series, rows = [], []
    for name in names:
        marks = []
        for cell in sorted(cells, key=lambda c: c.date):
            for time in cell.times:
                if time.peer != name:
                    continue
                when = f"{cell.date[:10] or 'no date'}, {commit_text(cell.commit)}, {cell.run.versions_text}"
                marks.append(
                    Mark(dates.index(cell.date), time.images_per_s, f"{name}: {time.images_per_s:,.0f}, {when}")
                )
                rows.append(("ours" if time.ours else "", [escape(name), escape(when), f"{time.images_per_s:,.0f}"]))
        colour = 0 if name not in others else 1 + others.index(name) % (charts.COLOURS - 1)
        series.append(Series(name, colour, tuple(marks)))
    what = f"{kind}, {net}, {precision}, batch {batch}"
    title = f"Images per second over dates, {what} on {device}; figures in the table below"
    picture = charts.history(title, dates, series, "images/s") + charts.legend(series)
    caption = f"{label('measured')} {escape(what)}. {escape(device)}; versions and commits in the table."
    tabular = table(escape(what), ("path", "when", "images/s"), rows, (2,), (1,))
    heading = f"<h3>{escape(what.capitalize())}</h3>"
    return heading + markup.figure(picture, caption) + markup.details("The same figures as a table", tabular)


def checks(results: ResultSet) -> str:
    """Return numeric checks by status, nets one by one, and what failed."""
    out = []
    for run in dict.fromkeys(one.run for one in results.checks):
        own = [one for one in results.checks if one.run == run]
        counts = {status: sum(one.status == status for one in own) for status in dict.fromkeys(o.status for o in own)}
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        largest = max((one.ratio for one in own if one.ratio is not None), default=None)
        worst = f" Largest error over eager's own: {largest:.2f}." if largest is not None else ""
        out.append(paragraph(f"{escape(run.device)}: {escape(said)}.{worst}"))
        rows = [
            (
                "",
                [
                    escape(one.case),
                    escape(one.status),
                    f"{one.error:.1e}",
                    NONE if one.ratio is None else f"{one.ratio:.2f}",
                ],
            )
            for one in own
            if one.error is not None and one.case.startswith("net ")
        ]
        if rows:
            caption = f"{label('measured')} errors of whole nets relative to fp64. {escape(run.device)}."
            out.append(table(caption, ("net", "status", "error", "over eager's"), rows, (2, 3)))
    if results.failed:
        lines = "".join(
            f"<li>{escape(run.device)}: {escape(case)}: {escape(why)}</li>" for run, case, why in results.failed
        )
        out.append(f"<h3>Failed: {len(results.failed)}</h3><ul>{lines}</ul>")
    return "\n".join(out)


def origins(results: ResultSet) -> str:
    """Return where every figure comes from, and what of the folders was not used."""
    out = []
    for run in results.runs:
        facts = {
            "device": run.device,
            "versions": run.versions_text,
            "date": run.date or "not recorded",
            "commit": run.commit or "not recorded",
            "command": run.command,
            "source": run.source,
        }
        lines = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items() if value)
        out.append(f"<h3>{escape(run.name)}</h3><dl>{lines}</dl>")
    for name, lines_cut in results.cut.items():
        word = "line" if lines_cut == 1 else "lines"
        out.append(paragraph(f"{escape(name)}: {lines_cut} unfinished {word} left out; the run was cut there."))
    if results.other:
        out.append(paragraph(f"Not results, left out: {escape(', '.join(results.other))}.", "soft"))
    return "\n".join(out)
