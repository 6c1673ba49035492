"""Model what ours would take on a GPU where nobody measured it: by the planner's own model, and by the roofline.

Inference is the sum of the launches that the planner chooses without measurements (tuning/launch_plan.py), with configs
that were proved at their first use, as is the default. Training is plan ``train-conv-bn`` of the roofline with kernels
as good as stock ones (roofline/prediction.py). Neither includes the host; inference leaves out pooling and the
classifier.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from resnet_fast import devices
from resnet_fast.devices import Device
from resnet_fast.errors import UserError
from resnet_fast.roofline import byte_model, prediction
from resnet_fast.tuning import launch_plan
from resnet_fast.tuning.tables import Table

from ..gpu import cases
from .results import MeasuredCell

PEER = "resnet_fast"
INFERENCE = "sum of the launches that the planner's model chooses; without pooling, classifier and host"
TRAINING = "roofline, plan train-conv-bn, with kernels as good as stock ones; without optimizer and host"
PLAN = "train-conv-bn"


@dataclass(frozen=True)
class ModelledTime:
    """A time that nobody measured. ``how`` names the model."""

    peer: str
    ms: float
    images_per_s: float
    how: str


@dataclass(frozen=True)
class ModelledLaunch:
    """One launch: its work and its modelled seconds."""

    name: str
    flops: int
    nbytes: int
    seconds: float


def ours(cell: MeasuredCell) -> ModelledTime | None:
    """Return what ours would take in place of a time that the cell lacks; None where there is a time, or no model."""
    device, dtype = devices.detect(cell.run.device), _dtype(cell)
    if device is None or dtype is None or any(t.ours for t in cell.times):
        return None
    try:
        if cell.kind == "training":
            items = byte_model.net_work(cell.net, PLAN, cell.batch, cell.image, dtype)
            seconds, how = prediction.predict_time(items, device, PLAN).seconds, TRAINING
        else:
            seconds, how = sum(one.seconds for one in _plans(cell, device, dtype)), INFERENCE
    except UserError:  # a net, an image size or a dtype that no plan is for
        return None
    return ModelledTime(PEER, seconds * 1e3, cell.batch / seconds, how)


def launches(cell: MeasuredCell) -> list[ModelledLaunch]:
    """Return the launches of ours in inference, as :func:`ours` sums them."""
    device, dtype = devices.detect(cell.run.device), _dtype(cell)
    if device is None or dtype is None:
        return []
    table, found = Table(cell.run.device), []
    for plan in _plans(cell, device, dtype):
        for launch, config in plan.chosen:
            pick = launch_plan.fastest_modelled(launch, device, table, hopeful=True)
            assert pick is not None  # the plan has the same table
            found.append(ModelledLaunch(f"{launch} {config}", launch.flops(), launch.min_bytes(), pick[1]))
    return found


def training_seconds(net: str, batch: int, device_name: str, dtype: str = "bfloat16") -> dict[str, float]:
    """Return the modelled seconds of a training step of ours by kind of kernel; empty where there is no model."""
    device = devices.detect(device_name)
    if device is None:
        return {}
    try:
        items = byte_model.net_work(net, PLAN, batch, None, dtype)
    except UserError:  # a net that is not known
        return {}
    seconds: dict[str, float] = defaultdict(float)
    for item in items:
        seconds[item.kernel] += prediction.predict_time((item,), device, PLAN).seconds
    return dict(seconds)


def net_work(cell: MeasuredCell, plan: str) -> tuple[int, int] | None:
    """Return the operations of a cell's net and the least bytes of a plan; None for a net that is not known."""
    dtype = _dtype(cell)
    if dtype is None:
        return None
    try:
        items = byte_model.net_work(cell.net, plan, cell.batch, cell.image, dtype)
    except UserError:
        return None
    return sum(item.flops for item in items), sum(item.nbytes for item in items)


def _dtype(cell: MeasuredCell) -> str | None:
    """Return the dtype of the tensors between kernels; None where it is none of the models'."""
    dtype = cell.precision.removeprefix("AMP ")
    return dtype if dtype in ("bfloat16", "float16", "float32") else None


def _plans(cell: MeasuredCell, device: Device, dtype: str) -> list[launch_plan.LaunchPlan]:
    table = Table(cell.run.device)
    parts = cases.specs(cell.net, cell.batch, dtype, cell.image).values()
    return [launch_plan.plan_launches(spec, device, table, hopeful=True) for spec in parts]
