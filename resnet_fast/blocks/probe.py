"""Compare the description of a foreign block with what the block computes, on random numbers in float64.

A mapping may forget a layer, order layers wrongly, or describe another release of a library. So a copy of the block
with random weights runs its stock forward, and beside it each described layer by PyTorch's own functions, in eval and
in training mode. Nothing is fused unless both agree.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..calls import Pool
from ..errors import named
from . import described
from .mapping import BlockMapping
from .obstacles import is_altered, obstacle
from .plan import PlannedLayer

_SIZE = (12, 20)
"""Height and width of the probe: even, so that strides and poolings agree however they round."""

_RTOL = 1e-9
"""Of the largest output. Sums of some thousand products round by about 1e-13; a forgotten layer changes everything."""

_variants: dict[Any, tuple[str, str] | None] = {}


def check(cls: Any, m: nn.Module) -> tuple[str, str] | None:
    """Return what was expected and what came, if the mapping of ``cls`` is wrong for this stock module; else None.

    Each variant of a class (types of its layers, its own plain attributes) is compared once.
    """
    kept = tuple((k, v) for k, v in sorted(m.__dict__.items()) if k != "training" and isinstance(v, (bool, str)))
    layers = tuple((name, type(part), type(part).forward) for name, part in m.named_modules() if part is not m)
    key = cls, kept, layers
    if key not in _variants:
        reason = compare(cls.stock_class, cls.mapping, m)
        _variants[key] = None if not reason else tuple(reason.removeprefix("expected ").split(", got ", 1))  # type: ignore[assignment]
    return _variants[key]


def kinds(mapping: BlockMapping, m: nn.Module) -> tuple[Any, ...] | str:
    """Return what the containers of a stock or fused block are, or why one of them may not be passed by."""
    found: list[Any] = []
    for path in described.containers(m, mapping):
        container = described.at(m, path)
        if container is None:
            found.append(None)
            continue
        if is_altered(container):
            return obstacle(f"{'.'.join(path)} to be a plain module", container)
        # The names of its children, too: a Sequential may have got another layer.
        found.append((type(container), type(container).forward, tuple(container._modules)))
    return tuple(found)


def unlike(
    stock_class: type[nn.Module], mapping: BlockMapping, m: nn.Module, checked: dict[Any, str], believed: bool = False
) -> str:
    """Return why the mapping does not describe ``m`` with the containers that it has now; empty if it does.

    Args:
        stock_class: the class whose forward counts.
        checked: what was found for each kind of container; a new kind is compared and kept.
        believed: in a compiler, which cannot compare, take an unknown kind as described if it has no other children.
    """
    key = kinds(mapping, m)
    if isinstance(key, str):
        return key
    found = checked.get(key)
    if found is not None:
        return found
    if torch.compiler.is_compiling():
        unseen = "expected containers that a call or accelerate() has seen, got others; it runs unfused"
        return "" if believed and described.is_complete(m, mapping) else unseen
    found = checked[key] = compare(stock_class, mapping, m)
    return found


def compare(stock_class: type[nn.Module], mapping: BlockMapping, m: nn.Module) -> str:
    """Return why the mapping does not describe ``m``, of this class or a fused one; empty if it does."""
    name = f"{stock_class.__module__}.{stock_class.__qualname__}"
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng([]):
        block = _copy(stock_class, m)
        for training in (False, True):
            block.train(training)
            reading = described.read(block, mapping)
            if reading.reason:  # the call will say why
                return _exchanged(block, mapping)
            convs = [step for step in reading.steps if hasattr(step, "conv")]
            x = torch.randn(2, convs[0].conv.in_channels, *_SIZE, dtype=torch.float64, device="cpu")
            torch.manual_seed(0)
            try:
                want = stock_class.forward(block, x.clone())
            except Exception as error:
                return f"expected {name} to run on an image of {_SIZE}, got {named(error)}"
            torch.manual_seed(0)
            try:
                got = evaluate(reading, mapping.residual, x.clone())
            except Exception as error:
                return f"expected {name} with the layers of its mapping, got {named(error)} from them"
            if not isinstance(want, Tensor) or want.shape != got.shape:
                shape = tuple(want.shape) if isinstance(want, Tensor) else f"a {type(want).__name__}"
                return f"expected {name} to return {tuple(got.shape)} as its mapping says, got {shape}"
            far = float((want - got).abs().max() / want.abs().max().clamp_min(1e-300))
            if not far <= _RTOL:
                mode = "training" if training else "eval"
                return f"expected {name} to compute what its mapping says, got a difference of {far:.1e} in {mode} mode"
    return ""


def _exchanged(block: nn.Module, mapping: BlockMapping) -> str:
    """Return which layer has a norm where its mapping names the convolution, or the other way round; empty if none."""
    forms = [form.projection for form in mapping.plan.forms]
    for layer in (*mapping.plan.main, *forms):
        if isinstance(layer, PlannedLayer):
            conv, norm = described.at(block, layer.conv), described.at(block, layer.norm or ())
            if isinstance(conv, _NormBase) or isinstance(norm, _ConvNd):
                return (
                    f"expected {layer.names[0]} to be a convolution and {layer.names[1]} its norm, got them exchanged"
                )
    return ""


def _copy(stock_class: type[nn.Module], m: nn.Module) -> Any:
    """Return a copy of the block on the CPU in float64 with random weights and without hooks."""
    memo: dict[int, Any] = {}
    for t in (*m.parameters(), *m.buffers()):
        dtype = torch.float64 if t.is_floating_point() else t.dtype
        fresh = torch.zeros(t.shape, dtype=dtype, device="cpu")
        if t.is_floating_point():
            if t.dim() > 1:
                fresh.normal_(0, max(1, t.numel() // max(1, t.shape[0])) ** -0.5)
            else:
                fresh.uniform_(0.5, 1.5)
        memo[id(t)] = nn.Parameter(fresh, False) if isinstance(t, nn.Parameter) else fresh
    for part in m.modules():
        for key, value in part.__dict__.items():
            # hooks, and what a sharded module keeps, its process group for one, under a key that is no name
            if isinstance(value, dict) and ("hooks" in key or not key.isidentifier()):
                memo[id(value)] = type(value)()
    block: Any = stock_class.__new__(stock_class)
    memo[id(m)] = block
    # Without a forward of its own, which a layer of the hub is to a module.
    fields = {k: v for k, v in m.__dict__.items() if k != "forward" and not k.startswith("_resnet_fast")}
    block.__dict__ = copy.deepcopy(fields, memo)
    for part in block.modules():
        if part is not block and hasattr(part, "stock_class"):
            part.__class__ = part.stock_class
    return block


def evaluate(reading: Any, residual: bool, x: Tensor) -> Tensor:
    """Return what a reading says, computed by PyTorch's own functions."""
    y = x
    for step in reading.steps:
        if isinstance(step, Pool):
            y = F.max_pool2d(y, *step)
        elif isinstance(step, nn.Module):
            y = step(y)
        else:
            y = _layer(step, y)
    if not residual:
        return y
    shortcut = x if reading.before is None else reading.before(x)
    if reading.projection is not None:
        shortcut = _layer(reading.projection, shortcut)
    y = y + shortcut
    return F.relu(y) if reading.relu else y


def _layer(piece: Any, x: Tensor) -> Tensor:
    conv = piece.conv
    y = piece.norm(F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups))
    return F.relu(y) if piece.relu else y
