"""``resnet-fast roofline``: what bounds a net on a GPU, launch by launch, without having that GPU."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import limits
from .. import roofline as model
from ..errors import UserError, missing_package
from .output import show

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = tuple(name for name, _ in model.H100.rates)

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
    name: Annotated[str, typer.Argument(help="The net; `resnet-fast summary` lists some.")] = "resnet50",
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(model.gpus())}.")] = "h100",
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 256,
    image: Annotated[int | None, typer.Option(help="Side of the image in pixels; by default the net's own.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Element type: {', '.join(DTYPES)}.")] = "bfloat16",
    plan: Annotated[str, typer.Option(help=f"Fusion plan: {', '.join(model.PLANS)}.")] = "tail",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture to draw, .png, .svg or .pdf; by default none.")] = None,
) -> None:
    """Floor and predicted time of every launch, block and fusion plan of a net on a GPU that need not be here."""
    device = model.gpu(gpu)
    if batch < 1:
        raise UserError("a batch of 1 or more images", str(batch), "correct --batch")
    items = model.net_work(name, plan, batch, image, dtype)
    limits.check_input(batch, image, planes=0)
    plans = {p: model.net_work(name, p, batch, image, dtype) for p in model.PLANS}
    if plot is not None:
        _draw(plot, f"{name}, batch {batch}, {dtype}, plan {plan}", items, device, plan)
    on_h100 = device is model.H100 and (name, dtype, image or 224) == ("resnet50", "bfloat16", 224)
    measured = list(_measured(batch)) if on_h100 else []
    if json:
        typer.echo(json_module.dumps(_json(name, batch, device, plan, plans, measured), indent=2))
        return
    title = f"{name}, batch {batch}, {dtype}, on {device.name}"
    fit = model.calibration()
    show(
        _ceilings(device, dtype),
        _launches(f"{title}: launches of plan {plan}", items, device, plan),
        _plans(f"{title}: plans", batch, plans, device),
        *(_line(row) for row in measured),
        READING.format(fused=fit.fused, launch=fit.launch_s * 1e6, error=fit.error),
        MEGABYTES,
        f"written: {plot}" if plot else "for the picture: --plot roofline.png",
    )


def _ceiling(what: str, ceiling: model.Ceiling, unit: str, scale: float) -> tuple[str, ...]:
    peak = f"{ceiling.published / scale:,.4g} {unit}" if ceiling.published else ""
    return what, f"{ceiling.value / scale:,.4g} {unit}", ceiling.origin, peak, ceiling.source


def _ceilings(device: model.Device, dtype: str) -> Table:
    from rich.table import Table

    table = Table("ceiling", "value", "origin", "published peak", "source", title=device.name, title_justify="left")
    table.add_row(*_ceiling("copy bandwidth", device.bandwidth, "TB/s", 1e12))
    table.add_row(*_ceiling(f"{dtype} products", device.rate(dtype), "TFLOP/s", 1e12))
    if device.gpu is not None:
        table.add_row(*_ceiling("L2 reads", device.gpu.l2_bandwidth, "TB/s", 1e12))
        table.add_row(*_ceiling("launch", device.gpu.launch_s, "us", 1e-6))
    return table


def _launches(title: str, items: tuple[model.Work, ...], device: model.Device, plan: str) -> Table:
    """One row per launch, and the sum of every block that has several."""
    from rich.table import Table

    table = Table("layer", "what", "kernel", title=title, title_justify="left")
    for column in ("MB", "GFLOP", "FLOP/B", "floor us", "predicted us"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bound")

    def row(part: str, what: str, kernel: str, of: tuple[model.Work, ...]) -> None:
        p = model.predict(of, device, plan)
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


def _plans(title: str, batch: int, plans: dict[str, tuple[model.Work, ...]], device: model.Device) -> Table:
    from rich.table import Table

    table = Table("plan", title=title, title_justify="left")
    for column in ("launches", "MB/img", "activations", "floor img/s", "predicted img/s", "predicted ms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bound")
    table.add_column("what is fused")
    for plan, items in plans.items():
        p = model.predict(items, device, plan)
        table.add_row(
            plan,
            str(p.launches),
            f"{p.floor.nbytes / batch / 1e6:,.1f}",
            f"{_activations(items) / batch / 1e6:,.1f}",
            f"{batch / p.floor.seconds:,.0f}",
            f"{batch / p.seconds:,.0f}",
            f"{p.seconds * 1e3:,.3f}",
            p.bound,
            model.PLANS[plan],
            end_section=plan == list(model.INFERENCE)[-1],
        )
    return table


def _activations(items: tuple[model.Work, ...]) -> int:
    return sum(item.activations for item in items)


def _measured(batch: int) -> Iterator[dict[str, Any]]:
    """What was measured at this batch, beside the plan that it comes close to."""
    for m in model.MEASURED:
        rate = dict(m.images_per_s).get(batch)
        if rate is None:
            continue
        p = model.predict(model.net_work("resnet50", m.plan, batch), model.H100, m.plan)
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
    device: model.Device,
    plan: str,
    plans: dict[str, tuple[model.Work, ...]],
    measured: list[dict[str, Any]],
) -> dict[str, Any]:
    launches = [asdict(item) | model.predict((item,), device, plan).to_dict() for item in plans[plan]]
    totals = {
        p: model.predict(items, device, p).to_dict() | {"activations": _activations(items)}
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


def _draw(path: Path, title: str, items: tuple[model.Work, ...], device: model.Device, plan: str) -> None:
    """Intensity against rate, both logarithmic: the roofs, and a point per launch with operations, by kernel."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("matplotlib", "which draws the picture", error, "bench", "leave out --plot") from error

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rate = device.rate(items[0].dtype)
    low, high = 1.0, 10 * rate.value / device.bandwidth.value
    roofs = {"copy": device.bandwidth} | ({"if all were in L2:": device.gpu.l2_bandwidth} if device.gpu else {})
    for (label, roof), style in zip(roofs.items(), ("-", ":"), strict=False):  # a CPU has no L2 here
        ridge = rate.value / roof.value
        axes.plot(
            [low, ridge],
            [low * roof.value / 1e12, rate.value / 1e12],
            style,
            color="black",
            label=f"{label} {roof.value / 1e12:.2f} TB/s ({roof.origin})",
        )
    flat = [rate.value / max(roof.value for roof in roofs.values()), high]
    text = f"{items[0].dtype} {rate.value / 1e12:,.0f} TFLOP/s ({rate.origin})"
    axes.plot(flat, [rate.value / 1e12] * 2, "--", color="black", label=text)
    points: dict[str, list[tuple[float, float]]] = {}
    for item in items:
        p = model.predict((item,), device, plan)
        if item.flops:
            points.setdefault(item.kernel, []).append((p.floor.intensity, item.flops / p.seconds / 1e12))
    for kernel, xy in points.items():
        intensity, reached = zip(*xy, strict=True)
        axes.scatter(intensity, reached, s=24, alpha=0.8, label=f"{kernel} (predicted)")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of memory traffic", ylabel="TFLOP/s")
    axes.set_title(f"{title}, {device.name}", fontsize=10)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # matplotlib: an unknown suffix is a ValueError
        raise UserError(
            "a picture file to write", f"{path} ({error})", "correct --plot, such as roofline.png"
        ) from error
