"""Small stock nets with statistics as after training, their accelerated copies, and comparisons bit for bit."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fast


def randomize(model: nn.Module) -> nn.Module:
    """Give BatchNorm parameters and statistics as after training: a fresh norm (1, 0, 0, 1) hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.dim() == 1 and t.is_floating_point() and not name.startswith("fc"):
                centre = 1.0 if name.endswith(("weight", "var")) else 0.0
                t.copy_(centre + 0.6 * (torch.rand(t.shape, generator=generator) - 0.5))
    return model


@functools.lru_cache
def _template(kind: str) -> nn.Module:
    """Build the net without options once: initialising takes longer than most of its tests."""
    from torchvision.models import resnet

    with torch.inference_mode(False):
        return randomize(resnet.ResNet(getattr(resnet, kind), [2, 1, 1, 1], num_classes=10))


def _build(kind: str, **kwargs: Any) -> nn.Module:
    from torchvision.models import resnet

    if not kwargs:
        return copy.deepcopy(_template(kind))
    return randomize(resnet.ResNet(getattr(resnet, kind), [2, 1, 1, 1], **({"num_classes": 10} | kwargs)))


def basic(**kwargs: Any) -> nn.Module:
    """Return torchvision's ResNet of basic blocks: one per stage, an identity block in the first, 10 classes."""
    return _build("BasicBlock", **kwargs)


def bottleneck(**kwargs: Any) -> nn.Module:
    """Return the same net of bottlenecks."""
    return _build("Bottleneck", **kwargs)


def assert_equal(got: Any, want: Any) -> None:
    """Assert equality bit for bit, through any nesting; NaN equals NaN."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_equal(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_equal(one, other)
    else:
        assert got == want


def train_step(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Run forward and backward in the model's mode; return the output, all gradients, and all buffers afterwards."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    (out.float().square().mean() + out.float().sum() * 0.1).backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return {"out": out.detach(), "x": x.grad, "grads": grads, "buffers": buffers}


def assert_close_to_eager(fused: nn.Module, stock: nn.Module, x: Tensor, gemm_k: int = 4608) -> None:
    """Assert that eval outputs are within twice eager's own error to float64.

    Every convolution rounds, and a net's few outputs may by chance have less error than usual: the floor is that
    of one sum over all layers' products, along which errors walk at random.
    """
    from resnet_fast import numerics

    layers = sum(isinstance(m, nn.Conv2d) for m in stock.modules())
    with torch.no_grad():
        ref = copy.deepcopy(stock).double()(x.double())
        numerics.assert_close(fused(x), ref, stock(x), gemm_k * layers)


class Checkpointed(nn.Module):
    """A net that runs its stages again in backward."""

    def __init__(self, net: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor) -> Tensor:
        n = self.net
        x = n.relu(n.bn1(n.conv1(x)))
        x = n.maxpool(x) if hasattr(n, "maxpool") else x
        for name, stage in n.named_children():
            if name.startswith("layer"):
                x = checkpoint(stage, x, use_reentrant=self.reentrant)
        return n.fc(torch.flatten(n.avgpool(x), 1))


def twin(model: nn.Module | None = None, backend: str = "auto") -> tuple[nn.Module, nn.Module]:
    """Return a stock net in eval mode (default ``basic()``) and an accelerated copy of it."""
    stock = (basic() if model is None else model).eval()
    return stock, resnet_fast.accelerate(copy.deepcopy(stock), backend)
