"""``resnet-fast roofline``: print what bounds a net on a GPU, launch by launch, without having that GPU."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import devices, limits
from ..errors import UserError
from ..io import plots, safe_files
from ..roofline import byte_model, prediction
from .output import show

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = tuple(name for name, _ in devices.H100.rates)

READING = (
    "floor: bytes over bandwidth or operations over rate per launch, no cost for the launch (modelled from the "
    "ceilings above). predicted: with kernels as good as stock ones, {fused:.2f} of the floor's speed in fused "
    "convolutions and {launch:.1f} us per launch, fitted to measured inference on an H100 at five batch sizes within "
    "{error:.0%}; other kernels as profiled there (modelled on every GPU)."
)
MEGABYTES = (
    "MB/img: least bytes read plus written, weights included (modelled). activations: without weights, strided inputs "
    "whole, the convention of hand counts."
)


def roofline(
    name: Annotated[str, typer.Argument(help="The net; `resnet-fast models` lists them.")] = "resnet50",
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(devices.gpus())}.")] = "h100",
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 256,
    image: Annotated[int | None, typer.Option(help="Side of the image in pixels; by default the net's own.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Element type: {', '.join(DTYPES)}.")] = "bfloat16",
    plan: Annotated[str, typer.Option(help=f"Fusion plan: {', '.join(byte_model.PLANS)}.")] = "tail",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture to draw, .png, .svg or .pdf; by default none.")] = None,
) -> None:
    """Print the floor and predicted time of every launch, block and fusion plan of a net on any known GPU."""
    device = devices.gpu(gpu)
    if plot is not None:
        plots.require_matplotlib("which draws the picture", "bench", "leave out --plot")
        plots.check_target(plot, "correct --plot, such as roofline.png")
    if batch < 1:
        raise UserError("a batch of 1 or more images", str(batch), "correct --batch")
    limits.check_input(batch, None if image is None else max(1, image), planes=0)  # net_work says what is too small
    items = byte_model.net_work(name, plan, batch, image, dtype)
    plans = {p: byte_model.net_work(name, p, batch, image, dtype) for p in byte_model.PLANS}
    on_h100 = device is devices.H100 and (name, dtype, image or 224) == ("resnet50", "bfloat16", 224)
    measured = list(_measured(batch)) if on_h100 else []
    if json:
        typer.echo(json_module.dumps(_json(name, batch, device, plan, plans, measured), indent=2))
    else:
        _show(name, batch, dtype, device, plan, plans, measured)
    if plot is not None:
        picture = _draw(f"{name}, batch {batch}, {dtype}, plan {plan}", items, device, plan)
        safe_files.write_whole(plot, plots.encode(picture, plot.suffix.lower(), 150))
    if not json:
        show(f"written: {plot}" if plot else "for the picture: --plot roofline.png")


def _show(
    name: str,
    batch: int,
    dtype: str,
    device: devices.Device,
    plan: str,
    plans: dict[str, tuple[byte_model.Work, ...]],
    measured: list[dict[str, Any]],
) -> None:
    title = f"{name}, batch {batch}, {dtype}, on {device.name}"
    fit = prediction.calibration()
    show(
        _ceilings(device, dtype),
        _launches(f"{title}: launches of plan {plan}", plans[plan], device, plan),
        _plans(f"{title}: plans", batch, plans, device),
        *(_line(row) for row in measured),
        READING.format(fused=fit.fused, launch=fit.launch_s * 1e6, error=fit.error),
        MEGABYTES,
    )


def _ceiling(what: str, ceiling: devices.Ceiling, unit: str, scale: float) -> tuple[str, ...]:
    peak = f"{ceiling.published / scale:,.4g} {unit}" if ceiling.published else ""
    return what, f"{ceiling.value / scale:,.4g} {unit}", ceiling.origin, peak, ceiling.source


def _ceilings(device: devices.Device, dtype: str) -> Table:
    from rich.table import Table

    table = Table("ceiling", "value", "origin", "published peak", "source", title=device.name, title_justify="left")
    table.add_row(*_ceiling("copy bandwidth", device.bandwidth, "TB/s", 1e12))
    table.add_row(*_ceiling(f"{dtype} products", device.rate(dtype), "TFLOP/s", 1e12))
    if device.gpu is not None:
        table.add_row(*_ceiling("L2 reads", device.gpu.l2_bandwidth, "TB/s", 1e12))
        table.add_row(*_ceiling("launch", device.gpu.launch_s, "us", 1e-6))
    return table


def _launches(title: str, items: tuple[byte_model.Work, ...], device: devices.Device, plan: str) -> Table:
    """Return a table with one row per launch, and the sum of every block that has several."""
    from rich.table import Table

    table = Table("layer", "what", "kernel", title=title, title_justify="left")
    for column in ("MB", "GFLOP", "FLOP/B", "floor us", "predicted us"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bound")

    def row(part: str, what: str, kernel: str, of: tuple[byte_model.Work, ...]) -> None:
        p = prediction.predict_time(of, device, plan)
        numbers = (p.floor.nbytes / 1e6, p.floor.flops / 1e9, p.floor.intensity, p.floor.seconds * 1e6, p.seconds * 1e6)
        table.add_row(part, what, kernel, *(f"{n:,.1f}" for n in numbers), p.bound)

    for part, group in groupby(items, key=lambda item: item.part):
        of = tuple(group)
        for item in of:
            row(part, item.name, item.kernel, (item,))
        if len(of) > 1:
            row(part, "sum", "", of)
        table.add_section()
    row("net", "sum", "", items)
    return table


def _plans(title: str, batch: int, plans: dict[str, tuple[byte_model.Work, ...]], device: devices.Device) -> Table:
    from rich.table import Table

    table = Table("plan", title=title, title_justify="left")
    for column in ("launches", "MB/img", "activations", "floor img/s", "predicted img/s", "predicted ms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bound")
    table.add_column("what is fused")
    for plan, items in plans.items():
        p = prediction.predict_time(items, device, plan)
        table.add_row(
            plan,
            str(p.launches),
            f"{p.floor.nbytes / batch / 1e6:,.1f}",
            f"{_activations(items) / batch / 1e6:,.1f}",
            f"{batch / p.floor.seconds:,.0f}",
            f"{batch / p.seconds:,.0f}",
            f"{p.seconds * 1e3:,.3f}",
            p.bound,
            byte_model.PLANS[plan],
            end_section=plan == list(byte_model.INFERENCE)[-1],
        )
    return table


def _activations(items: tuple[byte_model.Work, ...]) -> int:
    return sum(item.activations for item in items)


def _measured(batch: int) -> Iterator[dict[str, Any]]:
    """Yield what was measured at this batch, with the plan that it resembles most."""
    for m in prediction.MEASURED:
        rate = dict(m.images_per_s).get(batch)
        if rate is None:
            continue
        p = prediction.predict_time(byte_model.net_work("resnet50", m.plan, batch), devices.H100, m.plan)
        yield {
            "what": m.what,
            "plan": m.plan,
            "measured_images_per_s": rate,
            "of_floor": rate * p.floor.seconds / batch,
            "predicted_images_per_s": batch / p.seconds,
            "prediction_error": batch / p.seconds / rate - 1,
        }


def _line(row: dict[str, Any]) -> str:
    return (
        "measured: {what}: {measured_images_per_s:,.0f} img/s, {of_floor:.2f} of the floor of plan {plan}; "
        "predicted {predicted_images_per_s:,.0f} ({prediction_error:+.1%})"
    ).format(**row)


def _json(
    name: str,
    batch: int,
    device: devices.Device,
    plan: str,
    plans: dict[str, tuple[byte_model.Work, ...]],
    measured: list[dict[str, Any]],
) -> dict[str, Any]:
    launches = [asdict(item) | prediction.predict_time((item,), device, plan).to_dict() for item in plans[plan]]
    totals = {
        p: prediction.predict_time(items, device, p).to_dict() | {"activations": _activations(items)}
        for p, items in plans.items()
    }
    origin = "floors and predictions are modelled from the device's ceilings, whose origins are given"
    return {
        "net": name,
        "batch": batch,
        "device": asdict(device),
        "plan": plan,
        "origin": origin,
        "launches": launches,
        "plans": totals,
        "measured": measured,
    }


def _draw(title: str, items: tuple[byte_model.Work, ...], device: devices.Device, plan: str) -> Any:
    """Draw rate over intensity, both logarithmic: the roofs as lines, the launches with operations as points.

    Launches of one kernel, intensity and rate are one point, whose area is their share of the predicted time. Points
    are hollow and every kernel has a marker of its own, so that one on another is seen.
    """
    figure, ((axes,),) = plots.figure(1, 1, (9, 6.4))
    rate = device.rate(items[0].dtype)
    total = prediction.predict_time(items, device, plan).seconds
    points: dict[str, dict[tuple[float, float], float]] = {}
    for item in items:
        p = prediction.predict_time((item,), device, plan)
        if item.flops:
            place = round(p.floor.intensity, 2), round(item.flops / p.seconds / 1e12, 3)
            of_kernel = points.setdefault(item.kernel, {})
            of_kernel[place] = of_kernel.get(place, 0) + p.seconds / total
    every = [place for of_kernel in points.values() for place in of_kernel]
    low, high = plots.limits([1.0, *(x for x, _ in every), 10 * rate.value / device.bandwidth.value])
    roofs = {"memory: copy": device.bandwidth} | ({"if all were in L2:": device.gpu.l2_bandwidth} if device.gpu else {})
    for (label, roof), style in zip(roofs.items(), ("-", ":"), strict=False):  # a CPU has no L2 here
        ridge = rate.value / roof.value
        text = f"{label} {roof.value / 1e12:.2f} TB/s ({roof.origin})"
        axes.plot([low, ridge], [low * roof.value / 1e12, rate.value / 1e12], style, color="black", label=text)
    flat = [rate.value / max(roof.value for roof in roofs.values()), high]
    text = f"compute: {items[0].dtype} {rate.value / 1e12:,.0f} TFLOP/s ({rate.origin})"
    axes.plot(flat, [rate.value / 1e12] * 2, "--", color="black", label=text)
    roofs_shown = axes.legend(loc="upper left", fontsize=8, title="Roofs", title_fontsize=8)
    looks = zip(points.items(), plots.COLOURS * len(points), plots.MARKERS * len(points), strict=False)
    kernels = []
    for (kernel, places), colour, marker in looks:
        intensity, reached = zip(*places, strict=True)
        area = [20 + 1500 * share for share in places.values()]
        look = {"marker": marker, "facecolors": "none", "edgecolors": colour, "linewidths": 1.5, "clip_on": False}
        axes.scatter(intensity, reached, s=area, **look)
        label = f"{kernel}: {sum(places.values()):.1%} of the time"
        kernels.append(axes.scatter([], [], s=40, label=label, **look))
    rest = 1 - sum(share for places in points.values() for share in places.values())
    shown = "Launches as predicted; area: share of the time"
    shown += f"\nwithout operations, not shown: {rest:.0%}" if rest > 0.005 else ""
    axes.legend(handles=kernels, loc="lower right", fontsize=8, title=shown, title_fontsize=8)
    axes.add_artist(roofs_shown)
    lowest = min([low * device.bandwidth.value / 1e12, *(y for _, y in every)])
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of memory traffic", ylabel="TFLOP/s")
    axes.set(xlim=(low, high), ylim=(lowest / 1.3, rate.value / 1e12 * 4))
    axes.set_title(f"Roofline of {title}, {device.name}", fontsize=10)
    axes.grid(True, which="both", alpha=0.2)
    return figure
