"""Select a config without a measurement: the candidate with the least time under time_model.py. Torch-free."""

from __future__ import annotations

from functools import lru_cache

from ..devices import Device, Gpu
from ..spec import LaunchSpec
from . import configs, time_model, training_configs
from .configs import Config
from .time_model import predict_seconds


@lru_cache(maxsize=4096)
def rank(launch: LaunchSpec, device: Device) -> tuple[tuple[Config, float], ...]:
    """Return the candidates of an inference launch with their predicted seconds, fastest first; see :func:`_drawbacks`.

    Those that need a proof are among them: whether they may run is up to the caller.
    """
    gpu = device.gpu
    assert gpu is not None
    timed = [(c, predict_seconds(launch, c, device)) for c in configs.candidates(launch, gpu)]
    return tuple(sorted(timed, key=lambda pair: (_digits(pair[1]), *_drawbacks(launch, pair[0], gpu))))


def _digits(seconds: float) -> float:
    """Return a time with three digits: the model does not tell closer ones apart."""
    return float(f"{seconds:.3g}")


def _drawbacks(launch: LaunchSpec, config: Config, gpu: Gpu) -> tuple[float, ...]:
    """Return what decides between equal times, less is better.

    Several tiles reach the bandwidth of memory or of L2 in the model. On a GPU that takes loads by the copy engine,
    several programs on a multiprocessor, of which one loads while another multiplies or stores, and many bytes in
    flight.
    """
    programs = time_model.resident(launch, config, gpu)
    return not config.descriptors, -programs, -programs * time_model.bytes_in_flight(launch, config)


def select(launch: LaunchSpec, device: Device) -> tuple[Config, float] | None:
    """Return the fastest candidate that needs no proof, and its predicted seconds; None where there is none."""
    return next((pick for pick in rank(launch, device) if not configs.needs_proof(launch, pick[0])), None)


@lru_cache(maxsize=4096)
def rank_training(
    launch: LaunchSpec, device: Device, packed: bool, left_out: frozenset[Config]
) -> tuple[tuple[Config, float], ...]:
    """Return the candidates of a training launch with their predicted seconds, fastest first.

    Args:
        launch: a launch of a training step.
        device: a GPU with known ceilings.
        packed: whether a prologue in 16-bit pairs is wanted, where the launch may take one.
        left_out: configs that may not run; without them smaller tiles may be candidates.
    """
    assert device.gpu is not None
    legal = training_configs.candidates(launch, device.gpu, packed, left_out)
    return tuple(sorted(((c, predict_seconds(launch, c, device)) for c in legal), key=lambda pair: pair[1]))
