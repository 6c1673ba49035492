"""SENet's bottlenecks in segmentation_models_pytorch and in pretrainedmodels, described by their layers.

Both have the same classes, with squeeze-and-excitation before the sum. timm's SE blocks are timm's own bottlenecks.
"""

from __future__ import annotations

import sys

from torch import nn

from .mapping import BlockMapping

LIBRARIES = ("segmentation_models_pytorch.encoders._senet", "pretrainedmodels.models.senet")

BOTTLENECKS = ("SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck")

MAPPING = BlockMapping(
    [("conv1", "bn1", "relu"), ("conv2", "bn2", "relu"), ("conv3", "bn3"), "se_module"],
    ("downsample.0", "downsample.1"),
    "relu",
)


def mappings() -> dict[type[nn.Module], BlockMapping]:
    """Return the mapping of each class, for those of the libraries that are imported."""
    modules = [sys.modules[name] for name in LIBRARIES if name in sys.modules]
    return {vars(module)[name]: MAPPING for module in modules for name in BOTTLENECKS if hasattr(module, name)}
