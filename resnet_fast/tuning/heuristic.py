"""Select a config without a measurement: the candidate with the least time under time_model.py. Torch-free."""

from __future__ import annotations

from functools import lru_cache

from ..devices import Device
from ..spec import LaunchSpec
from . import configs, training_configs
from .configs import Config
from .time_model import predict_seconds
from .training_configs import CUDNN


@lru_cache(maxsize=4096)
def rank(launch: LaunchSpec, device: Device) -> tuple[tuple[Config, float], ...]:
    """Return the candidates of an inference launch with their predicted seconds, fastest first.

    Configs whose output must be proved first (:func:`configs.needs_proof`) are left out: only a measurement admits
    them.
    """
    gpu = device.gpu
    assert gpu is not None
    legal = [c for c in configs.candidates(launch, gpu) if not configs.needs_proof(launch, c)]
    return tuple(sorted(((c, predict_seconds(launch, c, device)) for c in legal), key=lambda pair: pair[1]))


def select(launch: LaunchSpec, device: Device) -> tuple[Config, float] | None:
    """Return the candidate with the least predicted time, and that time; None where there is no candidate."""
    return next(iter(rank(launch, device)), None)


@lru_cache(maxsize=4096)
def select_training(launch: LaunchSpec, device: Device, packed: bool, refused: frozenset[str] = frozenset()) -> Config:
    """Return the candidate of a training launch with the least predicted time; cuDNN where none is left.

    Args:
        launch: a launch of a training step.
        device: a GPU with known ceilings.
        packed: whether a prologue in 16-bit pairs is wanted, where the launch may take one.
        refused: configs, as printed, that gave a wrong answer when they were measured.
    """
    assert device.gpu is not None
    legal = [c for c in training_configs.candidates(launch, device.gpu, packed) if str(c) not in refused]
    return min(legal, key=lambda c: predict_seconds(launch, c, device), default=CUDNN)
