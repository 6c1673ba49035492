"""Residual blocks, one of each kind that a net has, on the activations that reach them inside it."""

from __future__ import annotations

from torch import Tensor, nn

from .case import SuiteCase, capture


def residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a torchvision-style net by qualified name: the children of ``layer1`` … ``layer4``."""
    return {
        f"{stage}.{name}": block
        for stage, children in model.named_children()
        if stage.startswith("layer")
        for name, block in children.named_children()
    }


def kind(block: nn.Module, x: Tensor) -> tuple[object, ...]:
    """Return what a block's cost depends on: its class, input shape and convolutions."""
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    return (type(block), x.shape, *((c.out_channels, c.kernel_size, c.stride, c.dilation, c.groups) for c in convs))


def cases(name: str, model: nn.Module, x: Tensor) -> list[SuiteCase]:
    """Return one case per kind of block, named ``<net>.<first block of the kind>``."""
    blocks = residual_blocks(model)
    inputs = capture(model, x, blocks)
    kinds: dict[tuple[object, ...], SuiteCase] = {}
    for inner, block in blocks.items():
        kinds.setdefault(kind(block, inputs[inner]), SuiteCase(f"{name}.{inner}", block, inputs[inner]))
    return list(kinds.values())
