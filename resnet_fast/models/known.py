"""The classes of blocks and nets that ``accelerate`` knows, those of :func:`resnet_fast.register_block` included."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from ..blocks.fused import Fused
    from ..blocks.mapped import MappedBlock

_registered: dict[type[nn.Module], type[MappedBlock]] = {}


def fused_classes() -> dict[type[nn.Module], type[Fused]]:
    """Return stock class -> fused class, for the libraries that are imported, as those of a model's classes are."""
    from ..blocks import basic_block, bottleneck, net

    fused: list[type[Fused]] = [basic_block.BasicBlock, bottleneck.Bottleneck, net.ResNet]
    if "resnet_fast.paper_nets" in sys.modules:
        from ..blocks import paper_nets

        fused += [paper_nets.PlainBlock, paper_nets.CifarResNet]
    if "timm.models.resnet" in sys.modules:
        from ..blocks import timm

        fused += [timm.BasicBlock, timm.Bottleneck, timm.ResNet]
    if any(name.startswith("transformers.models.") for name in sys.modules):
        from ..blocks import mapped, transformers

        fused += [mapped.fused_class(*described) for described in transformers.mappings().items()]
    if any(name.endswith("senet") for name in sys.modules):
        from ..blocks import mapped, senet

        fused += [mapped.fused_class(*described) for described in senet.mappings().items()]
    return {cls.stock_class: cls for cls in fused} | _registered


def stage_classes() -> set[type[nn.Module]]:
    """Return the classes whose forward takes x through the blocks in ``layers``, of the libraries that are imported."""
    if not any(name.startswith("transformers.models.") for name in sys.modules):
        return set()
    from ..blocks import transformers

    return transformers.stages()


def add(cls: type[nn.Module], fused: type[MappedBlock]) -> None:
    """Take ``fused`` as the fused class of ``cls`` from now on."""
    from ..blocks.fused import KNOWN

    _registered[cls] = KNOWN[cls] = fused


def is_registered(cls: type[nn.Module]) -> bool:
    """Return whether :func:`resnet_fast.register_block` was called for a class."""
    return cls in _registered
