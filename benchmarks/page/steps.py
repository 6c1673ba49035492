"""Write the section of the report page about the parts of a step: its kernels by kind, and instructions on the host."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from . import markup, modelled
from .markup import NONE, label, origin, paragraph, table
from .results import HostInstructions, ResultSet, StepProfile

CATEGORIES = (
    ("ends of blocks", "block_end"),
    ("max-pool", "max_pool|maxpool|_pool_"),
    (
        "BatchNorm",
        "batch_norm|_statistics_|_coefficients_|_finalize_|_channel_sums_|_merge_kernel|_sum_kernel|_apply_backward_"
        "|_constant_kernel",
    ),
    (
        "convolutions",
        "wgrad|dgrad|fprop|nvjet|xmma|[Ii]mplicit_?[Gg]emm|gemm|AddPadding|conv|bottleneck|_stem_|_reduce_splits_|_pack_"
        "|_fold_|_transpose_",
    ),
    ("residual adds", "CUDAFunctor_add"),
    ("ReLU", "clamp|threshold|BinaryFunctor<"),
    ("copies and fills", "copy|[Mm]emset|[Mm]emcpy|fill|_zero_kernel"),
)
"""What a kernel does, by a pattern in its name; the first that is found counts."""

OTHERS, REST = "other kernels", "not listed: shorter kernels and idle time"
ORDER = (*(name for name, _ in CATEGORIES), OTHERS, REST)


def category(kernel: str) -> str:
    """Return what a kernel of a profile does, by its name."""
    return next((name for name, pattern in CATEGORIES if re.search(pattern, kernel)), OTHERS)


def parts_of(profile: StepProfile, step_ms: float | None) -> dict[str, tuple[float, int]]:
    """Return milliseconds and launches by category; the rest of ``step_ms`` is :data:`REST`."""
    found: dict[str, tuple[float, int]] = {}
    for kernel, launches, us in profile.kernels:
        name = category(kernel)
        ms, count = found.get(name, (0.0, 0))
        found[name] = ms + us / 1e3, count + launches
    listed = sum(ms for ms, _ in found.values())
    if step_ms is not None and step_ms > listed:
        found[REST] = step_ms - listed, 0
    return found


Bar = tuple[str, str, dict[str, tuple[float, int]]]
"""A path, how its times were obtained, and milliseconds and launches by category."""


def steps(results: ResultSet) -> str:
    """Return where a step's time goes: profiles of kernels, ours by the model, and instructions on the host."""
    groups: dict[tuple[object, ...], list[StepProfile]] = {}
    for one in results.profiles:
        groups.setdefault((one.run, one.of, one.net, one.batch), []).append(one)
    out = [_step(results, profiles) for profiles in groups.values()]
    out += [_host(one) for one in results.hosts]
    return "\n".join(out) or paragraph("No profile of a step is in these folders.")


def _step(results: ResultSet, profiles: Sequence[StepProfile]) -> str:
    """One kind of step: a bar per path that was profiled, and ours by the model where it was not."""
    first = profiles[0]
    bars: list[Bar] = [(one.peer, "measured", parts_of(one, _step_ms(results, one))) for one in profiles]
    model: dict[str, tuple[float, int]] = {}
    if first.of == "training" and not any(one.peer.startswith(modelled.PEER) for one in profiles):
        for kernel, seconds in modelled.training_seconds(first.net, first.batch, first.run.device).items():
            name = category(kernel)
            model[name] = model.get(name, (0.0, 0))[0] + seconds * 1e3, 0
        bars += [(modelled.PEER, "modelled", model)] if model else []
    what = f"A {first.of} step of {first.net} at batch {first.batch}"
    notes = "; ".join(dict.fromkeys(one.note for one in profiles if one.note)) or "all kernels"
    said = notes[0].upper() + notes[1:]
    caption = f"{escape(what)}. {escape(origin(first.run, first.run.commit, first.run.date))}. {escape(said)}."
    if model:
        caption += f" Ours: {escape(modelled.TRAINING)}. BatchNorm, ReLU and adds run inside its convolutions."
    rows = [row for bar in bars for row in _rows(bar)]
    headings = ("kind of kernel", "path", "ms", "share", "launches")
    pictures = "".join(_picture(bar, max(map(_total, bars))) for bar in bars)
    return (
        f"<h3>{escape(what)}</h3>" + markup.figure(pictures, caption) + table(escape(what), headings, rows, (2, 3, 4))
    )


def _step_ms(results: ResultSet, profile: StepProfile) -> float | None:
    """Return the time of the profiled step without the profiler, if it was measured in the same run."""
    where = profile.run, profile.of, profile.net, profile.batch
    alike = (c for c in results.cells if (c.run, c.kind, c.net, c.batch) == where)
    return next((t.ms for c in alike for t in c.times if t.peer == profile.peer), None)


def _total(bar: Bar) -> float:
    return sum(ms for ms, _ in bar[2].values())


def _picture(bar: Bar, longest: float) -> str:
    peer, how, parts = bar
    spans = []
    for name in (name for name in ORDER if name in parts):
        ms = parts[name][0]
        text = f"<b>{escape(name)}</b>" if ms > 0.08 * longest else ""  # a narrower part has no room for its name
        width = f"width:{100 * ms / longest:.2f}%"
        spans.append(
            f'<span class="f{ORDER.index(name)}" style="{width}" title="{escape(name)}: {ms:.1f} ms">{text}</span>'
        )
    said = f"{escape(peer)}, {how}: {_total(bar):.1f} ms by kind of kernel, as in the table below"
    return (
        f"<div>{escape(peer)} {label(how)} {_total(bar):.1f} ms</div>"
        f'<div class="stack {how}" role="img" aria-label="{said}">{"".join(spans)}</div>'
    )


def _rows(bar: Bar) -> list[tuple[str, list[str]]]:
    peer, how, parts = bar
    out = []
    for name in sorted(parts, key=lambda n: -parts[n][0]):
        ms, launches = parts[name]
        key = f'<span class="key f{ORDER.index(name)}" aria-hidden="true"></span>'
        cells = [key + escape(name), f"{escape(peer)} {label(how)}", f"{ms:.2f}", f"{100 * ms / _total(bar):.0f} %"]
        out.append(("modelled" if how == "modelled" else "", [*cells, str(launches or "") or NONE]))
    return out


def _host(host: HostInstructions) -> str:
    rows = [
        ("", [escape(case), f"{ours / 1e6:,.1f}", f"{stock / 1e6:,.1f}", f"{ours / stock:.2f}"])
        for case, ours, stock in host.steps
    ]
    caption = (
        f"{label('counted')} millions of instructions of a step on the host, on a GPU that computes nothing. Those of "
        "cuDNN, cuBLAS and the driver are missing, and they are stock's: the ratio of a step that launches its kernels "
        "is an upper bound, that of a replayed graph is none. "
        f"{escape(host.run.device)}; {escape(host.run.versions_text)}."
    )
    return "<h3>Instructions on the host</h3>" + table(
        caption, ("step", "ours", "stock", "ours / stock"), rows, (1, 2, 3)
    )
