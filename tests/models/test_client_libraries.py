"""Libraries that build on ResNets, unmodified: torchvision, timm, segmentation_models_pytorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.blocks.fused import Fused
from tests.support import nets


def fused_blocks(model: nn.Module) -> int:
    return sum(isinstance(m, Fused) for m in model.modules())


def compare(model: nn.Module, x: Any, train: bool = True) -> tuple[nn.Module, nn.Module]:
    """Assert that reference is bit-equal and auto within tolerance, in eval and (for one output tensor) in training."""
    stock = nets.randomize(model).eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        want = stock(x)
        with resnet_fast.use_backend("reference"):
            nets.assert_equal(fused(x), want)
        torch.testing.assert_close(fused(x), want, rtol=1e-3, atol=1e-3)
    if train:
        torch.manual_seed(0)
        expected = nets.train_step(stock.train(), x)
        torch.manual_seed(0)
        nets.assert_equal(nets.train_step(fused.train(), x), expected)
        stock.eval()
        fused.eval()
    return stock, fused


def test_fpn_backbone_with_frozen_norms() -> None:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    stock = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3).eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    assert fused_blocks(fused) == 8
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-3, atol=1e-4)
    grads = []
    for model in (stock, fused):
        sum(v.square().mean() for v in model.train()(x).values()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert grads[1]["body.conv1.weight"] is None
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_faster_rcnn() -> None:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    torch.manual_seed(0)
    stock = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=96).eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = [torch.rand(3, 96, 80)]
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        want, got = stock(x), fused(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_deeplabv3() -> None:
    from torchvision.models.segmentation import deeplabv3_resnet50

    model = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)
    stock, fused = compare(model, torch.randn(1, 3, 32, 32), train=False)
    assert fused_blocks(fused) == 16
    assert list(fused.state_dict()) == list(stock.state_dict())


TIMM = [
    ("resnet18", {}),
    ("resnet26", {"output_stride": 8}),
    ("resnet26d", {}),
    ("resnet10t", {}),
    ("seresnet18", {}),
    ("resnetblur18", {}),
    ("resnet18", {"global_pool": "catavgmax", "drop_rate": 0.3}),
    ("resnet18", {"norm_layer": nn.GroupNorm}),
    ("resnet18", {"act_layer": nn.SiLU}),
]


def timm_net(name: str, **kwargs: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    if kwargs.get("norm_layer") is nn.GroupNorm:
        kwargs["norm_layer"] = lambda channels, **_: nn.GroupNorm(8, channels)
    return timm.create_model(name, pretrained=False, num_classes=10, **kwargs)


@pytest.mark.parametrize(("name", "kwargs"), TIMM, ids=[f"{n} {', '.join(k)}".strip() for n, k in TIMM])
def test_timm(name: str, kwargs: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 64, 64)
    stock, fused = compare(timm_net(name, **kwargs), x)
    with torch.no_grad():
        for method in ("forward_features", "forward_intermediates"):
            with resnet_fast.use_backend("reference"):
                nets.assert_equal(getattr(fused, method)(x), getattr(stock, method)(x))
        resnet_fast.reset_stats()
        fused(x)
    calls = resnet_fast.stats()["calls"]
    blocks = {c: n for c, n in calls.items() if not c.startswith(("stem", "conv"))}
    backends = {c.split("/")[1] for c in blocks}
    if name == "resnetblur18":  # its strided blocks have the blur, and run in pieces around it
        assert blocks == {"basic_block/onednn": 5}
        assert calls["conv_bn_act/onednn"] == 1 + 3 * 3
    elif {"norm_layer", "act_layer"} & set(kwargs):
        assert backends == {"stock"}
    else:
        assert backends <= {"onednn"}


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("resnet26d", {"bottleneck/onednn": 8, "conv_bn_act/onednn": 2 + 3, "stem/onednn": 1}),
        ("seresnet18", {"conv_bn_act/onednn": 8 * 2 + 3, "stem/onednn": 1}),
        ("ecaresnet26t", {"conv_bn_act/onednn": 2 + 8 * 3 + 4, "stem/onednn": 1}),
        ("resnetaa34d", {"basic_block/onednn": 13, "conv_bn_act/onednn": 3 + 3 * 3}),
    ],
)
def test_timm_fuses_every_convolution_around_additions(name: str, calls: dict[str, int]) -> None:
    """Deep stems, pooled shortcuts, squeeze-and-excitation and blur: every convolution with a norm is in an op."""
    fused = resnet_fast.accelerate(timm_net(name).eval())
    resnet_fast.reset_stats()
    with torch.no_grad():
        fused(torch.randn(1, 3, 32, 32))
    assert resnet_fast.stats() == {"calls": calls, "fallbacks": {}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet50", "resnet50d", "seresnet50", "resnetblur50", "resnext50_32x4d", "wide_resnet50_2"]
)
def test_timm_deeper(name: str) -> None:
    compare(timm_net(name), torch.randn(2, 3, 64, 64))


def test_timm_features_only() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet26d", pretrained=False, features_only=True, out_indices=(1, 3))
    _, fused = compare(model, torch.randn(1, 3, 64, 64), train=False)
    assert fused_blocks(fused) == 6  # timm drops the stage after the last index


def test_timm_features_through_fx() -> None:
    timm = pytest.importorskip("timm")
    stock = nets.randomize(timm_net("resnet18")).eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(1, 3, 64, 64)
    want, got = (timm.models.FeatureGraphNet(m, out_indices=(2, 4))(x) for m in (stock, fused))
    nets.assert_equal(list(got), list(want))


def test_timm_stochastic_depth() -> None:
    """In training they run in pieces (stock on a CPU) with the same random numbers; in eval each block is one op."""
    x = torch.randn(2, 3, 32, 32)
    _, fused = compare(timm_net("resnet18", drop_path_rate=0.5, drop_block_rate=0.0), x)
    resnet_fast.reset_stats()
    with torch.no_grad():
        fused.eval()(x)
        assert resnet_fast.stats()["calls"] == {"basic_block/onednn": 8, "stem/onednn": 1}
        resnet_fast.reset_stats()
        fused.train()(x)
    assert not any(name.endswith("/stock") for name in resnet_fast.stats()["calls"])


def test_timm_grad_checkpointing() -> None:
    model = timm_net("resnet18")
    model.set_grad_checkpointing(True)
    compare(model, torch.randn(2, 3, 32, 32))


def test_timm_freeze_and_unfreeze() -> None:
    """timm replaces the norms of an accelerated net with frozen ones, and back."""
    from timm.utils import freeze, unfreeze

    stock = nets.randomize(timm_net("resnet18")).train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(4, 3, 64, 64)  # norms of few values would blow rounding up
    for model in (stock, fused):
        freeze(model, ["layer1", "layer2", "bn1"])
    want, got = nets.train_step(stock, x), nets.train_step(fused, x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    for model in (stock, fused):
        unfreeze(model, ["layer1", "layer2", "bn1"])
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(nets.train_step(fused, x)["out"], nets.train_step(stock, x)["out"])


def test_timm_script_keeps_the_model() -> None:
    stock = nets.randomize(timm_net("resnet18")).eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    classes = [type(m) for m in fused.modules()]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(fused)(x), stock(x), rtol=1e-4, atol=1e-4)
    assert [type(m) for m in fused.modules()] == classes


def test_timm_pickles_and_restores() -> None:
    import pickle

    stock = nets.randomize(timm_net("resnet18")).eval()
    fused = pickle.loads(pickle.dumps(resnet_fast.accelerate(copy.deepcopy(stock))))
    assert fused_blocks(fused) == 9
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        nets.assert_equal(resnet_fast.restore(fused)(x), stock(x))
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]


def test_timm_reset_classifier_and_compile() -> None:
    torch._dynamo.reset()
    stock = nets.randomize(timm_net("resnet18")).eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    for model in (stock, fused):
        model.reset_classifier(0)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), stock(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoder", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_segmentation_models(encoder: str, output_stride: int) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    if output_stride == 32:
        model = smp.Unet(encoder, encoder_weights=None, classes=2)
    else:
        model = smp.DeepLabV3Plus(encoder, encoder_weights=None, classes=2, encoder_output_stride=output_stride)
    _, fused = compare(model, torch.randn(2, 3, 64, 64))
    assert fused_blocks(fused) == (8 if encoder == "resnet18" else 16)


def test_a_dilated_encoder_in_place() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    stock = nets.randomize(smp.Unet("resnet18", encoder_weights=None)).encoder.eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        fused(x)
        for encoder in (stock, fused):
            encoder.make_dilated(8)
        with resnet_fast.use_backend("reference"):
            nets.assert_equal(fused(x), stock(x))
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-3, atol=1e-3)
