"""``python3 -m resnet_fast.benchmarks.gpu.tune``: measure the launches of the usual nets into the shipped table.

One case per launch, the nets and batches in the order of importance, within each the most expensive launch first. The
table (``resnet_fast/tuning/tables/<gpu>.json``) is what a run resumes from: a launch with a time or a refusal for every
candidate is not measured again. A launch with candidates that crash or hang is a failed row; other launches keep
their times.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_fast import devices
from resnet_fast.devices import Device
from resnet_fast.errors import BackendError
from resnet_fast.io.safe_files import json_text
from resnet_fast.spec import BlockSpec, ConvSpec, LaunchSpec
from resnet_fast.tuning import configs, launch_plan, launches, tables, time_model
from resnet_fast.tuning.tables import Table

from . import cases as cases_of
from . import report
from .session import ROOT, GpuCase, Row, Session, Settings, begin, gpu_name, settings_from, write_text
from .worker import WorkerPool

BATCHES = (256, 1, 32, 128, 8)
NETS = ("resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
LIMIT_S = 120.0


@dataclass(frozen=True)
class Group:
    """A net at a batch size. Its launches are tuned together, and summed up at the end."""

    net: str
    batch: int
    dtype: str = "bfloat16"
    image: int | None = None
    train: bool = False
    frozen: bool = False

    def __str__(self) -> str:
        kind = " training" + (" with frozen norms" if self.frozen else "") if self.train else ""
        return f"{self.net} {self.dtype} batch {self.batch}{kind}"

    def specs(self) -> dict[str, ConvSpec | BlockSpec]:
        found = cases_of.specs(self.net, self.batch, self.dtype, self.image, self.train)
        return {name: spec.with_(batch_stats=False) for name, spec in found.items()} if self.frozen else found


def groups(settings: Settings) -> tuple[Group, ...]:
    """List ResNet-50 at batch 256, inference and training, with frozen norms also at batch 8, then other batches, then
    other nets, large batches first."""
    if settings.quick:
        return (Group("cifar_resnet20", 1, "float32", 8),)
    (first, *others), (large, *batches) = NETS, BATCHES
    return (
        *(Group(first, large, train=train) for train in (False, True)),
        *(Group(first, batch, train=True, frozen=True) for batch in (large, 8)),
        *(Group(first, batch) for batch in batches),
        *(Group(net, batch) for batch in BATCHES for net in others),
        *(Group(net, large, train=True) for net in others),
    )


def device_of(settings: Settings) -> Device:
    from resnet_fast.backends.triton import device

    return device.device_of(torch.device(settings.device))


def table_path(settings: Settings) -> Path:
    """Return the path of the table that comes with the package; in the interpreter, of one next to the results."""
    file = f"{devices.file_stem(gpu_name(settings.device))}.json"
    return (tables.SHIPPED if settings.on_gpu else settings.path) / file


def read_table(settings: Settings) -> Table:
    return tables.read(table_path(settings), gpu_name(settings.device))


def _todo(settings: Settings) -> Iterator[LaunchSpec]:
    """Every launch that has a candidate, in order, repeats included."""
    device = device_of(settings)
    for group in groups(settings):
        found = (launch for spec in group.specs().values() for launch in launches.launches_of(spec, device))
        yield from sorted(dict.fromkeys(found), key=lambda x: -launches.expected_seconds(x, device))


def cases(settings: Settings) -> list[GpuCase]:
    """List one case per launch."""
    return [
        GpuCase(f"tune {launch}", _Tune(launch, settings), limit_s=LIMIT_S) for launch in dict.fromkeys(_todo(settings))
    ]


class _Tune:
    """Measure one launch into the table; its row names the fastest config."""

    def __init__(self, launch: LaunchSpec, settings: Settings) -> None:
        self.launch, self.settings = launch, settings

    def __call__(self) -> Row:
        from resnet_fast.dispatch import tune

        path, device = table_path(self.settings), torch.device(self.settings.device)
        tuned = tune.tune_launches([self.launch], device, LIMIT_S, path=path)
        return self.row(tuned.table) | {"refused": [[config, reason] for _, config, reason in tuned.refused]}

    def row(self, table: Table) -> Row:
        """Return best and stock times in microseconds, and the model's prediction for the best."""
        times = {name: us for name, us in table.times(self.launch).items() if us is not None}
        stock = [times[name] for name in configs.STOCK if name in times]
        row: Row = {"status": "measured", "kernel": self.launch.kernel, "stock_us": min(stock, default=None)}
        ours = {name: us for name, us in times.items() if name not in configs.STOCK}
        if not ours:
            return row | {"note": "no candidate of ours is usable"}
        best = min(ours, key=lambda name: ours[name])
        row |= {"ours": best, "ours_us": ours[best]}
        device = device_of(self.settings)
        config = {str(c): c for c in launches.candidates(self.launch, device)}.get(best)
        if config is not None:
            modelled = time_model.predict_seconds(self.launch, config, device) * 1e6
            row |= {"modelled_us": round(modelled, 2), "model_error": round(modelled / ours[best] - 1, 3)}
        row["note"] = f"{best}, {ours[best]:.1f} us" + (f", stock {min(stock):.1f} us" if stock else ", no stock form")
        return row


def complete(launch: LaunchSpec, table: Table, device: Device) -> bool:
    """Return whether the table has a time or a refusal for every candidate."""
    return {str(c) for c in launches.candidates(launch, device)} <= table.times(launch).keys()


def summary(group: Group, device: Device, table: Table) -> Row | None:
    """Compare what dispatch now chooses with PyTorch's best, per stage and in sum; None where not all is measured."""
    stages: dict[str, dict[str, Any]] = {}
    for name, spec in group.specs().items():
        try:
            chosen = launch_plan.plan_launches(spec, device, table)
            stock = launch_plan.stock_seconds(spec, device, table)
        except BackendError:  # every candidate was refused
            return None
        if not chosen.measured or stock is None:
            return None
        stage = stages.setdefault(name.split(".")[1], {"best_us": 0.0, "stock_us": 0.0, "plans": {}})
        stage["best_us"] += chosen.seconds * 1e6
        stage["stock_us"] += stock * 1e6
        plan = chosen.route.fusion
        stage["plans"][plan] = stage["plans"].get(plan, 0) + 1
    best, stock_us = (sum(stage[key] for stage in stages.values()) for key in ("best_us", "stock_us"))
    return {"group": str(group), "batch": group.batch, "best_us": best, "stock_us": stock_us, "stages": stages}


def summaries(settings: Settings) -> list[Row]:
    """Of every group of inference that is measured throughout; a training step's sum is ``resnet-fast tune --train``'s,
    its time that of make gpu-bench."""
    device, table = device_of(settings), read_table(settings)
    inference = (group for group in groups(settings) if not group.train)
    found = (summary(group, device, table) for group in inference) if table.entries else ()
    return [row for row in found if row]


def print_summaries(session: Session, found: list[Row]) -> None:
    for row in found:
        ratio = row["stock_us"] / row["best_us"]
        rate = row["batch"] / row["best_us"] * 1e6
        session.say(f"{row['group']}: measured launches sum to {row['best_us']:.0f} us, {rate:,.0f} img/s;")
        session.say(f"    stock {row['stock_us']:.0f} us, speedup {ratio:.2f}")
        for stage, part in row["stages"].items():
            plans = ", ".join(f"{plan} x {n}" for plan, n in part["plans"].items())
            text = f"    {stage:8s} {part['best_us']:9.1f} us, stock {part['stock_us']:9.1f} us,"
            session.say(f"{text} speedup {part['stock_us'] / part['best_us']:.2f} ({plans})")


def main() -> int:
    settings = settings_from("tune", (__doc__ or "").splitlines()[0])
    path = table_path(settings)
    if settings.fresh:
        path.unlink(missing_ok=True)
    session = begin(settings)
    everything, device, table = cases(settings), device_of(settings), read_table(settings)
    by_name = {f"tune {launch}": launch for launch in _todo(settings)}
    if ROOT not in settings.path.parents:  # results go elsewhere: the table too

        def keep_a_copy() -> None:
            if path.exists() and path.parent != settings.path:
                shutil.copyfile(path, settings.path / "tuning.json")

        session.on_row = keep_a_copy
    try:
        with WorkerPool(f"{__package__}.tune", session) as pool:
            pool.run(session.todo(everything, lambda case: complete(by_name[case.name], table, device)))
        found = summaries(settings)
        print_summaries(session, found)
        write_text(settings.path / "tune_summary.json", json_text(found, indent=1) + "\n")
    finally:
        report.write(settings)
    return session.finish(everything)


if __name__ == "__main__":
    sys.exit(main())
