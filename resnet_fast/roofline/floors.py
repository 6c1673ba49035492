"""Compute the least time that a device needs for a plan's launches.

The floor of a launch is ``max(nbytes / bandwidth, flops / rate)`` (Williams et al., Roofline, 2009), without a cost for
the launch itself. The floor of a net is the sum over its launches.

On a GPU a floor is a bound of the model, not of nature: bytes count as if no cache held anything before the call, so a
problem that fits a cache may beat its floor when it runs repeatedly. On a CPU it is a real bound (cpu_ceilings.py):

- the ceilings are the best rates ever measured, plus an allowance;
- only the bytes beyond what caches can hold before and after the call come from memory, the others from a cache;
- products with a padding's zeros do not count, because kernels leave them out.

L2 bandwidth is not included: how often a launch reads an operand from L2 depends on its tile, which only
tuning/heuristic.py knows. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ..devices import Device
from ..errors import UserError
from ..spec import NetSpec, Spec
from .byte_model import Work, work


@dataclass(frozen=True)
class Floor:
    """A least time.

    Attributes:
        seconds: the floor.
        bound: memory or compute, whichever takes longer.
        origin: the origin of the ceiling that binds; ``mixed`` in a sum of different ones.
        memory_s, compute_s: seconds by memory and by operations.
        nbytes: bytes read plus written.
        flops: two per multiply-add.
        device, plan: what it was computed for.
    """

    seconds: float
    bound: str
    origin: str
    memory_s: float
    compute_s: float
    nbytes: int
    flops: int
    device: str
    plan: str

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.nbytes if self.nbytes else 0.0

    def to_dict(self) -> dict[str, float | int | str]:
        """Return one flat row for CSV or JSON."""
        return asdict(self) | {"intensity": self.intensity}


def launch_floor(item: Work, device: Device, plan: str) -> Floor:
    """Return the floor of one launch."""
    rate = device.rate(item.dtype)
    memory_s, compute_s, origin = item.nbytes / device.bandwidth.value, item.flops / rate.value, device.bandwidth.origin
    if device.cache is not None:
        flops = item.flops if item.least_flops is None else item.least_flops
        compute_s = flops / rate.value
        memory_s = max(0, item.nbytes - 2 * device.cache.nbytes) / device.bandwidth.value
        if memory_s < (cached_s := item.nbytes / device.cache.bandwidth.value):
            memory_s, origin = cached_s, device.cache.bandwidth.origin
    memory = memory_s >= compute_s
    return Floor(
        seconds=max(memory_s, compute_s),
        bound="memory" if memory else "compute",
        origin=origin if memory else rate.origin,
        memory_s=memory_s,
        compute_s=compute_s,
        nbytes=item.nbytes,
        flops=item.flops,
        device=device.name,
        plan=plan,
    )


def floor(items: Iterable[Work], device: Device, plan: str) -> Floor:
    """Return the sum of the floors of launches that run one after another.

    Args:
        items: launches of :func:`resnet_fast.roofline.byte_model.work`.
        device: the ceilings.
        plan: a label for the result.

    Returns:
        The sum; its ``bound`` is the kind that takes most of the time.

    Raises:
        UserError: there are no items, or the device has no rate for a dtype.
    """
    floors = [launch_floor(item, device, plan) for item in items]
    if not floors:
        raise UserError("at least one problem", "none", "pass the values of tuning.shapes.problems(...)")
    seconds = sum(f.seconds for f in floors)
    in_memory = sum(f.seconds for f in floors if f.bound == "memory")
    origins = {f.origin for f in floors}
    return Floor(
        seconds=seconds,
        bound="memory" if in_memory >= seconds / 2 else "compute",
        origin=origins.pop() if len(origins) == 1 else "mixed",
        memory_s=sum(f.memory_s for f in floors),
        compute_s=sum(f.compute_s for f in floors),
        nbytes=sum(f.nbytes for f in floors),
        flops=sum(f.flops for f in floors),
        device=device.name,
        plan=plan,
    )


def floor_seconds(spec: Spec | NetSpec, device: Device, plan: str = "block") -> Floor:
    """Return the floor of one problem, with its launches one after another."""
    return floor(work(spec, plan), device, plan)


def net_floor(specs: Iterable[Spec], device: Device, plan: str = "block") -> Floor:
    """Return the sum of the floors of problems that run one after another."""
    return floor((item for spec in specs for item in work(spec, plan)), device, plan)
