"""Predict a net's time on a GPU with kernels as good as the stock ones, from the floors of its launches.

A prediction is ``floor / reached + launch_s`` per launch. ``reached`` and ``launch_s`` are what stock kernels of that
kind achieved on an H100 (:func:`calibration`), so the result is what a plan would give with kernels as good as those,
and no more. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from ..devices import H100, Device
from ..errors import UserError
from .byte_model import Work, net_work
from .floors import Floor, floor, launch_floor


@dataclass(frozen=True)
class StockRates:
    """Measured images/s by batch size of ResNet-50 at 224 in bfloat16 on an H100 SXM (torch 2.11).

    ``plan`` is the fusion plan that comes closest. Batch sizes for which Python limited the speed are omitted.
    """

    what: str
    plan: str
    images_per_s: tuple[tuple[int, float], ...]


MEASURED = (
    StockRates(
        "best stock inference: cuDNN's fused ops, BN folded, CUDA graph",
        "conv",
        ((1, 2575), (8, 12810), (32, 20746), (128, 24164), (256, 25700)),
    ),
    StockRates(
        "torch.compile inference, frozen, CUDA graph", "conv", ((1, 2224), (32, 19750), (128, 21671), (256, 22800))
    ),
    StockRates("eager inference", "separate", ((128, 12359), (256, 12986))),
    StockRates("eager AMP training step", "train-eager", ((128, 3753), (256, 4013))),
    StockRates("best stock training step: torch.compile, AMP", "train-bn-two-pass", ((256, 5692),)),
)

PROFILE_S = {
    ("conv", "dgrad", "wgrad"): 18.5e-3,
    ("bn_stats",): 9.005e-3,
    ("bn",): 5.375e-3,
    ("relu",): 3.187e-3,
    ("add", "add_grad"): 5.471e-3,
    ("relu_grad",): 4.709e-3,
    ("bn_reduce",): 5.709e-3,
    ("bn_grad",): 7.021e-3,
    ("maxpool",): 0.862e-3,
    ("maxpool_grad",): 1.835e-3,
}
"""Measured seconds of an eager AMP training step's kernels by kind: ResNet-50, batch 256, the H100 of MEASURED."""

_LIKE = {"bn_act": "bn", "block_end": "bn", "bn_act_grad": "bn_grad", "block_end_grad": "bn_grad"}
"""Kernels that no stock path has, and the stock kernel that they are assumed to be as good as."""


@dataclass(frozen=True)
class Calibration:
    """What stock kernels reached on an H100, so that ``seconds = floor / reached + launch_s`` per launch.

    ``fused`` and ``launch_s`` are the least-squares fit of relative errors to the best stock inference at five batch
    sizes.

    Attributes:
        fused: fraction of the floor reached by every kernel that is not in ``by_kernel``.
        launch_s: seconds per launch, including ramp-up, the latency of the first loads and the tail of the last wave.
        by_kernel: fraction of the floor reached by kernel, from :data:`PROFILE_S`.
        error: the largest relative error of the fit.
    """

    fused: float
    launch_s: float
    by_kernel: tuple[tuple[str, float], ...]
    error: float

    def reached(self, kernel: str) -> float:
        """Return the fraction of the floor that ``kernel`` reached."""
        return dict(self.by_kernel).get(_LIKE.get(kernel, kernel), self.fused)


def _measured_kernels() -> dict[str, float]:
    items = net_work("resnet50", "train-eager", 256)
    reached: dict[str, float] = {}
    for kernels, seconds in PROFILE_S.items():
        least = floor((i for i in items if i.kernel in kernels), H100, "train-eager").seconds
        # ReLU and add come out 2-4 % faster than memory allows: the end of one tensor is still in L2
        reached |= dict.fromkeys(kernels, min(1.0, least / seconds))
    return reached


@cache
def calibration() -> Calibration:
    """Return the fit to :data:`MEASURED` and :data:`PROFILE_S`, computed once."""
    known, rows = _measured_kernels(), []
    for batch, rate in MEASURED[0].images_per_s:
        items = net_work("resnet50", MEASURED[0].plan, batch)
        floors = [(i.kernel, launch_floor(i, H100, "conv").seconds) for i in items]
        fused = sum(s for kernel, s in floors if kernel not in known)
        rest = sum(s / known[kernel] for kernel, s in floors if kernel in known)
        rows.append((fused * rate / batch, len(items) * rate / batch, 1 - rest * rate / batch))
    (uu, uv, uw), (vv, vw) = ([sum(r[i] * r[j] for r in rows) for j in range(i, 3)] for i in (0, 1))
    determinant = uu * vv - uv * uv
    slowdown, launch_s = (uw * vv - vw * uv) / determinant, (vw * uu - uw * uv) / determinant
    error = max(abs(slowdown * u + launch_s * v - w) for u, v, w in rows)
    return Calibration(1 / slowdown, launch_s, tuple(known.items()), error)


@dataclass(frozen=True)
class Prediction:
    """The time of launches with kernels as good as stock ones, see :class:`Calibration`; always modelled.

    Attributes:
        seconds: the predicted time.
        bound: memory, compute or launch, whichever takes most of the time.
        launches: number of launches.
        floor: their floor.
    """

    seconds: float
    bound: str
    launches: int
    floor: Floor

    def to_dict(self) -> dict[str, float | int | str]:
        """Return one flat row: the floor's, with its time and bound named ``floor_s`` and ``floor_bound``."""
        row = self.floor.to_dict()
        row["floor_s"], row["floor_bound"] = row.pop("seconds"), row.pop("bound")
        return row | {"predicted_s": self.seconds, "bound": self.bound, "launches": self.launches}


def predict_time(items: Iterable[Work], device: Device, plan: str) -> Prediction:
    """Predict the time of launches that run one after another in a CUDA graph.

    Args:
        items: launches of :func:`resnet_fast.roofline.byte_model.work`.
        device: a GPU.
        plan: a label for the result.

    Raises:
        UserError: the device is no GPU.
    """
    if device.gpu is None:
        raise UserError("a GPU to predict for", device.name, "use floor() for its bound")
    items, fit = tuple(items), calibration()
    least = floor(items, device, plan)
    spent = dict.fromkeys(("memory", "compute", "launch"), 0.0)
    for item in items:
        f = launch_floor(item, device, plan)
        busy = f.seconds / fit.reached(item.kernel)
        spent["launch" if fit.launch_s > busy else f.bound] += busy + fit.launch_s
    return Prediction(sum(spent.values()), max(spent, key=lambda kind: spent[kind]), len(items), least)
