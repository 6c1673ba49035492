"""The residual blocks and stems of transformers' own ResNets, described by their layers.

``ResNetModel`` and its backbone share their structure with RT-DETR's ResNet-D (a stem of three convolutions, shortcuts
that pool before they project). DETR and its relatives use timm's nets instead.
"""

from __future__ import annotations

import sys

from torch import nn

from .mapping import BlockMapping, Form, LayerPath

LIBRARIES = {
    "transformers.models.resnet.modeling_resnet": "ResNet",
    "transformers.models.rt_detr.modeling_rt_detr_resnet": "RTDetrResNet",
}
"""Module -> what the names of its classes begin with."""


def _layer(path: str) -> LayerPath:
    return LayerPath(f"{path}.convolution", f"{path}.normalization", f"{path}.activation")


def _block(count: int) -> BlockMapping:
    return BlockMapping([_layer(f"layer.{i}") for i in range(count)], _SHORTCUTS, "activation")


_SHORTCUTS: list[Form] = [
    ("shortcut.convolution", "shortcut.normalization"),
    ("shortcut.0", "shortcut.1.convolution", "shortcut.1.normalization"),
    ("shortcut",),
]

BASIC, BOTTLENECK = _block(2), _block(3)
STEM = BlockMapping([_layer("embedder"), "pooler"], residual=False)
DEEP_STEM = BlockMapping([*[_layer(f"embedder.{i}") for i in range(3)], "pooler"], residual=False)


def stages() -> set[type[nn.Module]]:
    """Return the classes of stages, which loop over their blocks, of the modules of transformers that are imported."""
    found = [getattr(sys.modules.get(module), prefix + "Stage", None) for module, prefix in LIBRARIES.items()]
    return {cls for cls in found if cls is not None}


def mappings() -> dict[type[nn.Module], BlockMapping]:
    """Return the mapping of each class, for those modules of transformers that are imported."""
    found = {}
    for module, prefix in LIBRARIES.items():
        stem = DEEP_STEM if prefix == "RTDetrResNet" else STEM
        for name, mapping in (("BasicLayer", BASIC), ("BottleNeckLayer", BOTTLENECK), ("Embeddings", stem)):
            cls = getattr(sys.modules.get(module), prefix + name, None)
            if cls is not None:
                found[cls] = mapping
    return found
