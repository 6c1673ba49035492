"""The way of a call through a whole net, and the batches that may be cut into tiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import resnet_fast
from resnet_fast import paper_nets
from resnet_fast.blocks.net import Way


def net(block: type[BasicBlock | Bottleneck] = BasicBlock) -> nn.Module:
    return resnet_fast.accelerate(ResNet(block, [1, 1, 1, 1], num_classes=10).eval())


def test_plain_inference_runs_the_whole_net_in_one_call() -> None:
    with torch.no_grad():
        assert net().way(torch.randn(2, 3, 32, 32), replay=True) is Way.WHOLE


@pytest.mark.parametrize(
    ("backend", "cuda_graph", "training", "grad", "shape", "way"),
    [
        ("auto", True, False, False, (2, 3, 32, 32), Way.REPLAY),
        ("auto", True, True, True, (2, 3, 32, 32), Way.REPLAY),
        ("auto", False, False, False, (3, 32, 32), Way.LAYERS),
        ("auto", False, True, True, (2, 3, 32, 32), Way.LAYERS),
        ("auto", False, True, False, (2, 3, 32, 32), Way.LAYERS),
        ("auto", False, False, True, (2, 3, 32, 32), Way.LAYERS),
        ("reference", False, False, False, (2, 3, 32, 32), Way.LAYERS),
        ("onednn", False, False, False, (2, 3, 32, 32), Way.WHOLE),
    ],
)
def test_way_by_options_mode_and_input(
    backend: str, cuda_graph: bool, training: bool, grad: bool, shape: tuple[int, ...], way: Way
) -> None:
    model = resnet_fast.accelerate(net(), backend=backend, cuda_graph=cuda_graph).train(training)
    with torch.set_grad_enabled(grad):
        assert model.way(torch.randn(shape), replay=True) is way
        if cuda_graph and not training:
            assert model.way(torch.randn(shape), replay=False) is Way.WHOLE


def test_way_of_a_replaced_function_and_of_an_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        with torch.overrides.BaseTorchFunctionMode():
            assert model.way(x, replay=True) is Way.STOCK
        resnet_fast.reset_stats()
        monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: x)
        assert model.way(x, replay=True) is Way.STOCK
    assert "Conv2d.forward, got another" in str(resnet_fast.stats()["fallbacks"])


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_largest_activation_is_the_largest_tensor_between_layers(block: type[BasicBlock | Bottleneck]) -> None:
    model = net(block)
    sizes: list[int] = []
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, args, out: sizes.append(out[0].numel()))
    with torch.no_grad():
        for h, w in ((64, 64), (33, 47), (224, 224)):
            sizes.clear()
            model(torch.randn(1, 3, h, w))
            assert model.largest_activation(h, w) == pytest.approx(max(sizes), rel=0.1)


def drop_statistics(m: nn.Module) -> None:
    m.layer2[0].bn1 = nn.BatchNorm2d(128, track_running_stats=False).eval()


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "norm in training": lambda m: m.layer2[0].bn1.train(),
    "norm without statistics": drop_statistics,
    "hook": lambda m: m.layer3[0].conv1.register_forward_hook(lambda *args: None),
    "dropout in training": lambda m: m.set_submodule("fc", nn.Sequential(nn.Dropout(), m.fc)),
    "unknown classifier": lambda m: m.set_submodule("fc", nn.Softmax(dim=0)),
    "unknown stage": lambda m: m.set_submodule("layer3", nn.Conv2d(128, 256, 1).eval()),
    "stock block": lambda m: m.layer1.append(BasicBlock(64, 64).eval()),
    "unfused block": lambda m: m.set_submodule("layer1.0.relu", nn.SiLU().eval()),
}


@pytest.mark.parametrize("name", EDITS)
def test_when_images_may_depend_on_one_another(name: str) -> None:
    model = net()
    assert model.images_are_independent()
    EDITS[name](model)
    assert not model.images_are_independent()


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_plain20", "plain18"])
def test_the_papers_nets_may_be_tiled(name: str) -> None:
    assert resnet_fast.accelerate(getattr(paper_nets, name)().eval()).images_are_independent()


def test_a_hook_on_the_net_itself_does_not_matter() -> None:
    model = net()
    model.register_forward_hook(lambda *args: None)
    assert model.images_are_independent()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_image_breaks_its_logits_as_on_the_stock_net(value: float) -> None:
    torch.manual_seed(0)
    stock = ResNet(BasicBlock, [1, 1, 1, 1]).eval()
    x = torch.randn(2, 3, 64, 64)
    x[1, 0, 30, 30] = value
    with torch.inference_mode():
        expected = stock(x)
        out = resnet_fast.accelerate(stock)(x)
        assert (
            torch.equal(out.isfinite(), expected.isfinite()) and not out[1].isfinite().any() and out[0].isfinite().all()
        )
        with resnet_fast.strict(), pytest.raises(resnet_fast.BackendError, match="NaN or infinity"):
            stock(x)
