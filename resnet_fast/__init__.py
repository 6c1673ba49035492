"""resnet_fast: fused conv-BN-ReLU-add kernels behind drop-in ResNets.

    import resnet_fast
    model = resnet_fast.accelerate(torchvision.models.resnet50()).eval()      # or resnet_fast.resnet50()

Importing this defines the ops ``torch.ops.resnet_fast.*`` and touches no device; torchvision is imported by the first
factory or ``accelerate`` call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ops
from ._version import __version__
from .derived import clear as clear_derived
from .dispatch.explain import Explanation, explain
from .dispatch.record import reset_stats, stats, strict
from .dispatch.select import use_backend
from .errors import BackendError, UserError
from .models.accelerate import accelerate, restore
from .tuning.shapes import ARCHS

if TYPE_CHECKING:
    from .models.resnet import Factory

    resnet18: Factory
    resnet34: Factory
    resnet50: Factory
    resnet101: Factory
    resnet152: Factory
    resnext50_32x4d: Factory
    resnext101_32x8d: Factory
    resnext101_64x4d: Factory
    wide_resnet50_2: Factory
    wide_resnet101_2: Factory

__all__ = [
    "BackendError",
    "Explanation",
    "UserError",
    "__version__",
    "accelerate",
    "clear_derived",
    "explain",
    "ops",
    "reset_stats",
    "restore",
    "stats",
    "strict",
    "use_backend",
    *ARCHS,
]


def __getattr__(name: str) -> Any:
    """The factories, by net name: they import torchvision, which costs more than the rest of the package."""
    if name in ARCHS:
        from .models.resnet import FACTORIES

        return FACTORIES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
