"""resnet_fast: fused conv-BN-ReLU-add kernels in drop-in ResNets.

    import resnet_fast
    model = resnet_fast.accelerate(torchvision.models.resnet50()).eval()      # or resnet_fast.resnet50()

Importing this defines the ops ``torch.ops.resnet_fast.*``, or has the import of torch define them, and touches no
device; torch and torchvision are imported by the first use of a name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import BackendError, UserError
from .tuning.shapes import ARCHS
from .with_torch import define_ops

if TYPE_CHECKING:
    from . import ops
    from .blocks.mapping import BlockMapping
    from .calls import Pool
    from .dispatch.explain import Explanation, explain
    from .dispatch.record import reset_stats, stats, strict
    from .dispatch.select import use_backend
    from .dispatch.tune import Tuned, tune
    from .impl import Warmed
    from .invariance import batch_invariant
    from .models.accelerate import accelerate, restore
    from .models.factories import Factory
    from .models.freeze import freeze, unfreeze
    from .models.register import register_block
    from .models.report import ModelReport, report
    from .ops.warm import warm
    from .parameter_cache import clear as clear_derived

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
    "BlockMapping",
    "Explanation",
    "ModelReport",
    "Pool",
    "Tuned",
    "UserError",
    "Warmed",
    "__version__",
    "accelerate",
    "batch_invariant",
    "clear_derived",
    "explain",
    "freeze",
    "ops",
    "register_block",
    "report",
    "reset_stats",
    "restore",
    "stats",
    "strict",
    "tune",
    "unfreeze",
    "use_backend",
    "warm",
    *ARCHS,
]

_LAZY = {
    "BlockMapping": "blocks.mapping:BlockMapping",
    "Explanation": "dispatch.explain:Explanation",
    "ModelReport": "models.report:ModelReport",
    "Pool": "calls:Pool",
    "Tuned": "dispatch.tune:Tuned",
    "Warmed": "impl:Warmed",
    "accelerate": "models.accelerate:accelerate",
    "batch_invariant": "invariance:batch_invariant",
    "clear_derived": "parameter_cache:clear",
    "explain": "dispatch.explain:explain",
    "freeze": "models.freeze:freeze",
    "register_block": "models.register:register_block",
    "report": "models.report:report",
    "reset_stats": "dispatch.record:reset_stats",
    "restore": "models.accelerate:restore",
    "stats": "dispatch.record:stats",
    "strict": "dispatch.record:strict",
    "tune": "dispatch.tune:tune",
    "unfreeze": "models.freeze:unfreeze",
    "use_backend": "dispatch.select:use_backend",
    "warm": "ops.warm:warm",
}
"""Public name -> module and attribute that it stands for."""


define_ops()


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used and kept."""
    if name == "ops":
        value: Any = importlib.import_module(".ops", __name__)
    elif name in ARCHS:
        from .models.factories import FACTORIES

        value = FACTORIES[name]
    elif name in _LAZY:
        module, _, attribute = _LAZY[name].partition(":")
        value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
