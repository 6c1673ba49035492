"""Any launch, of inference or of a training step: what may run it, how long that takes by the model, and which launches
a problem has. What the tuners share. Torch-free."""

from __future__ import annotations

from .. import flags
from ..devices import Device
from ..spec import BlockSpec, ConvSpec, LaunchSpec
from . import configs, heuristic, training
from .configs import Config
from .routes import routes

KERNELS = (*configs.SHIPPED, *training.KERNELS)
"""The names of all kernels that are tuned."""


def is_training(launch: LaunchSpec) -> bool:
    """Is it one of a training step?"""
    return launch.kernel in training.KERNELS


def candidates(launch: LaunchSpec, device: Device) -> tuple[Config, ...]:
    """Every config that the rules admit, and PyTorch's own kernels where they are an alternative."""
    assert device.gpu is not None
    if is_training(launch):
        return (*training.candidates(launch, device.gpu, flags.PROLOGUE.read() == "packed"), training.CUDNN)
    return (*configs.candidates(launch, device.gpu), *configs.stock_candidates(launch))


def predict(launch: LaunchSpec, config: Config, device: Device) -> float:
    """Seconds of a config of ours under the model."""
    return (training if is_training(launch) else heuristic).predict(launch, config, device)


def expected(launch: LaunchSpec, device: Device) -> float:
    """Seconds under the model of what it would choose; 0 where it has nothing to choose from."""
    if is_training(launch):
        ours = (c for c in candidates(launch, device) if not c.stock)
        return min((training.predict(launch, c, device) for c in ours), default=0.0)
    found = heuristic.choose(launch, device)
    return 0.0 if found is None else found[1]


def launches_of(spec: ConvSpec | BlockSpec, device: Device) -> tuple[LaunchSpec, ...]:
    """Every launch of every route of a problem, or of its training step, that ``device`` has a candidate for."""
    if spec.grad or spec.batch_stats:
        found = training.launches(spec)
    else:
        found = tuple(launch for route in routes(spec) for launch in route.launches)
    return tuple(launch for launch in dict.fromkeys(found) if candidates(launch, device))
