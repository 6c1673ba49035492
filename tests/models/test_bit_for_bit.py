"""Training on a CPU equals the stock net bit for bit, down to the order in which gradients of one tensor are summed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast import paper_nets
from tests.support import nets


def step(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return outputs, gradients and buffers of a step with a loss over every output."""
    x = x.clone().requires_grad_()
    out = model(x)
    outs = list(out) if isinstance(out, (list, tuple)) else [out]
    sum(t.square().mean() + (t * torch.linspace(0, 1, t.shape[-1])).sum() for t in outs).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"out": [t.detach() for t in outs], "x": x.grad, "grads": grads, "buffers": dict(model.named_buffers())}


def timm_net(name: str, **kwargs: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, **kwargs)


def frozen(block: Any) -> nn.Module:
    return resnet.ResNet(block, [2, 1, 1, 1], num_classes=10, norm_layer=FrozenBatchNorm2d)


NETS: dict[str, Callable[[], nn.Module]] = {
    "pooled shortcuts, every stage an output": lambda: timm_net("resnet18d", features_only=True),
    "pooled shortcuts of bottlenecks": lambda: timm_net("resnet26d", features_only=True),
    "FrozenBatchNorm2d in basic blocks": lambda: frozen(resnet.BasicBlock),
    "FrozenBatchNorm2d in bottlenecks": lambda: frozen(resnet.Bottleneck),
    "padded shortcuts": lambda: paper_nets.cifar_resnet20(shortcut="A"),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_a_step(name: str, training: bool) -> None:
    torch.manual_seed(0)
    stock = nets.randomize(NETS[name]()).train(training)
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 64, 64)
    nets.assert_equal(step(fused, x), step(stock, x))


def test_only_what_needs_a_gradient_takes_the_stock_layers() -> None:
    net = resnet_fast.accelerate(nets.randomize(frozen(resnet.BasicBlock)))
    x = torch.randn(1, 3, 32, 32)
    net.layer4.requires_grad_(True)
    for name in ("conv1", "layer1", "layer2", "layer3"):
        getattr(net, name).requires_grad_(False)
    resnet_fast.reset_stats()
    net(x)
    stats = resnet_fast.stats()
    assert stats["calls"] == {"basic_block/onednn": 4, "basic_block/stock": 1, "stem/onednn": 1}
    ((reason, count),) = stats["fallbacks"].items()
    assert count == 1 and "got FrozenBatchNorm2d, and no training kernels for cpu" in reason
    with torch.no_grad():
        resnet_fast.reset_stats()
        net(x)
    assert not resnet_fast.stats()["fallbacks"]
