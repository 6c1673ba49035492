"""List the launches that tuning measures, of inference and of training steps, and what may run each. Torch-free."""

from __future__ import annotations

from .. import flags
from ..devices import Device
from ..spec import LaunchSpec, Spec
from . import configs, heuristic, training_configs
from .configs import Config
from .routes import folded_routes, planned, routes
from .time_model import predict_seconds
from .training_configs import is_training

KERNELS = (*configs.SHIPPED, *training_configs.KERNELS)
"""The names of all kernels that are tuned."""


def candidates(launch: LaunchSpec, device: Device) -> tuple[Config, ...]:
    """Return every config that the rules admit, and PyTorch's own kernels where they are an alternative."""
    assert device.gpu is not None
    if is_training(launch):
        packed = not launch.folded and flags.PROLOGUE.read() == "packed"
        return (*training_configs.measurable(launch, device.gpu, packed), training_configs.CUDNN)
    return (*configs.candidates(launch, device.gpu), *configs.stock_candidates(launch))


def expected_seconds(launch: LaunchSpec, device: Device) -> float:
    """Return the predicted seconds of the config that the model would select; 0 where it has no candidate."""
    if is_training(launch):
        ours = (c for c in candidates(launch, device) if not c.stock)
        return min((predict_seconds(launch, c, device) for c in ours), default=0.0)
    found = heuristic.select(launch, device)
    return 0.0 if found is None else found[1]


def launches_of(spec: Spec, device: Device) -> tuple[LaunchSpec, ...]:
    """Return every launch of every route of a problem, or of its training step, that ``device`` has a candidate for."""
    found: tuple[LaunchSpec, ...] = ()
    if spec.grad or spec.batch_stats:
        found = training_configs.training_launches(spec)
    if not spec.batch_stats:
        of = folded_routes(spec) if spec.grad else routes(planned(spec))
        found += tuple(launch for route in of for launch in route.launches)
    return tuple(launch for launch in dict.fromkeys(found) if candidates(launch, device))
