"""The factories: torchvision's ten nets and the paper's own, bit for bit on the reference, within budget on oneDNN."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import paper_nets
from resnet_fast.blocks.fused import Fused
from resnet_fast.models import factories, registry
from resnet_fast.tuning.shapes import ARCHS
from tests.support import nets

TEN = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip
LARGE = {"resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2"}
PAPER = [name for name in ARCHS if name not in TEN]


def build(name: str, randomize: Callable[[nn.Module], nn.Module], **kwargs: Any) -> nn.Module:
    """The stock net with weights from one block of noise: torchvision's initialisation takes seconds."""
    with torch.device("meta"):
        model = registry.build(name, num_classes=10, **kwargs)
    model = model.to_empty(device="cpu")
    block = torch.randn(997)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                fan = p[0].numel()
                values = block.repeat(-(-p.numel() // 997))[: p.numel()]
                p.copy_(values.view(p.shape)).mul_((1.5 / fan) ** 0.5)
            else:
                p.zero_()
        for b in model.buffers():
            b.zero_()
    return randomize(model)


def sized(names: list[str]) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in names]


@pytest.mark.parametrize("name", TEN)
def test_state_dict_is_torchvisions(name: str) -> None:
    import torchvision

    with torch.device("meta"):
        want = getattr(torchvision.models, name)().state_dict()
        ours = getattr(resnet_fast, name)()
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in want.items()
    ]
    ours.load_state_dict(want, strict=True, assign=True)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_the_same_seed_gives_torchvisions_initialisation(name: str) -> None:
    import torchvision

    torch.manual_seed(3)
    want = getattr(torchvision.models, name)()
    torch.manual_seed(3)
    ours = getattr(resnet_fast, name)()
    nets.assert_equal(dict(ours.state_dict()), dict(want.state_dict()))
    want.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", sized(TEN))
def test_outputs_and_gradients_are_torchvisions_bit_for_bit(name: str) -> None:
    """On the reference: eval, then one training step with all gradients and statistics, then restored."""
    model = build(name, nets.randomize)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 64 if name == "resnet18" else 33, 32)

    def results() -> list[Any]:
        model.load_state_dict(state)
        with torch.no_grad():
            out = model.eval()(x)
        return [out, nets.train_step(model.train(), x)]

    want = results()
    assert want[0].isfinite().all()
    resnet_fast.accelerate(model)
    with resnet_fast.use_backend("reference"):
        resnet_fast.reset_stats()
        nets.assert_equal(results(), want)
        assert set(resnet_fast.stats()["fallbacks"]) == set()
    resnet_fast.restore(model)
    assert not [m for m in model.modules() if isinstance(m, Fused)]
    nets.assert_equal(results(), want)


F32, BF16 = torch.float32, torch.bfloat16
NCHW, NHWC = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    [
        ("resnet18", F32, NCHW),
        ("resnet18", F32, NHWC),
        ("resnet18", BF16, NHWC),
        ("resnet50", F32, NHWC),
        pytest.param("resnet50", F32, NCHW, marks=pytest.mark.slow),
        pytest.param("resnet50", BF16, NCHW, marks=pytest.mark.slow),
        ("resnext50_32x4d", F32, NHWC),
        pytest.param("wide_resnet50_2", F32, NHWC, marks=pytest.mark.slow),
    ],
)
def test_onednn_stays_within_twice_eagers_error(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = build(name, nets.randomize).eval().to(dtype=dtype, memory_format=layout)
    stock = build(name, nets.randomize).eval().to(dtype=dtype, memory_format=layout)
    stock.load_state_dict(model.state_dict())
    resnet_fast.accelerate(model, backend="onednn")
    side = 64 if dtype == torch.float32 else 32
    x = torch.randn(2, 3, side, side).to(dtype=dtype, memory_format=layout)
    nets.assert_close_to_eager(model, stock, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet34", *sorted(LARGE)])
def test_onednn_stays_within_twice_eagers_error_in_large_nets(name: str) -> None:
    model = build(name, nets.randomize).eval()
    stock = build(name, nets.randomize).eval()
    stock.load_state_dict(model.state_dict())
    nets.assert_close_to_eager(resnet_fast.accelerate(model, backend="onednn"), stock, torch.randn(1, 3, 64, 64))


def frozen(channels: int) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(channels)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
        ("resnet50", {"replace_stride_with_dilation": [True, True, True]}),
        ("resnet18", {"zero_init_residual": True}),
        ("resnet18", {"norm_layer": group_norm}),
        ("resnet50", {"width_per_group": 32}),
        ("resnet50", {"width_per_group": 4, "groups": 16}),
        ("resnet18", {"num_classes": 3}),
        ("resnet18", {"progress": False}),
    ],
)
def test_each_torchvision_argument(name: str, kwargs: dict[str, Any]) -> None:
    import torchvision

    ours = factories.FACTORIES[name](**kwargs).eval()
    with torch.device("meta"):
        stock = getattr(torchvision.models, name)(**kwargs).eval()
    stock.to_empty(device="cpu").load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 40, 40)
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(ours(x), stock(x))
        nets.assert_equal(nets.train_step(ours.train(), x), nets.train_step(stock.train(), x))
    nets.assert_close_to_eager(ours.eval(), stock.eval(), x)


def test_zero_init_residual_zeroes_the_last_norm() -> None:
    model = resnet_fast.resnet18(zero_init_residual=True)
    assert not model.layer1[0].bn2.weight.any()
    assert model.layer1[0].bn1.weight.all()


def test_frozen_norms_from_the_argument() -> None:
    """Its formula is x * scale + shift in the input's dtype, so eager's last bits differ from batch_norm's."""
    model = nets.randomize(resnet_fast.resnet18(norm_layer=frozen, num_classes=10)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = resnet_fast.restore(model)(x)
        resnet_fast.accelerate(model)
        resnet_fast.reset_stats()
        torch.testing.assert_close(model(x), want)
        assert not resnet_fast.stats()["fallbacks"]


def test_sync_norms_from_the_argument() -> None:
    model = nets.randomize(resnet_fast.resnet18(norm_layer=nn.SyncBatchNorm, num_classes=10)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        got = model(x)
        nets.assert_equal(got, resnet_fast.restore(model)(x))


def test_weights_are_checked_by_torchvision() -> None:
    with pytest.raises(Exception) as stock:
        import torchvision

        torchvision.models.resnet18(weights="IMAGENET1K_V9")
    with pytest.raises(type(stock.value), match=str(stock.value)):
        resnet_fast.resnet18(weights="IMAGENET1K_V9")


def test_weights_reach_torchvisions_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """``weights`` and ``progress`` arrive where torchvision downloads, here from a table in memory."""
    from torchvision.models import ResNet18_Weights, resnet18

    state, asked = nets.randomize(resnet18()).state_dict(), []
    monkeypatch.setattr(
        ResNet18_Weights, "get_state_dict", lambda self, progress, check_hash: asked.append((self, progress)) or state
    )
    for weights in ("DEFAULT", "IMAGENET1K_V1", ResNet18_Weights.IMAGENET1K_V1):
        model = resnet_fast.resnet18(weights=weights, progress=False)
        nets.assert_equal(dict(model.state_dict()), dict(state))
    assert asked == [(ResNet18_Weights.IMAGENET1K_V1, False)] * 3
    with pytest.raises(ValueError, match="num_classes"):
        resnet_fast.resnet18(weights="DEFAULT", num_classes=10)


def test_factories_take_a_backend() -> None:
    model = resnet_fast.resnet18(num_classes=10, backend="reference").eval()
    resnet_fast.reset_stats()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert resnet_fast.stats()["calls"] == {"basic_block/reference": 8, "stem/reference": 1}
    with pytest.raises(resnet_fast.UserError, match="expected a backend among"):
        resnet_fast.resnet18(backend="warp")


def test_factories_have_names_and_documentation() -> None:
    for name in ARCHS:
        factory = getattr(resnet_fast, name)
        assert factory.__name__ == name
        assert name in (inspect.getdoc(factory) or "")


def test_an_unknown_net_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="resnet19"):
        _ = resnet_fast.resnet19


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize(("name", "stride_in_1x1"), [("resnet18", False), ("resnet50", False), ("resnet50", True)])
def test_the_papers_variants(name: str, shortcut: str, stride_in_1x1: bool) -> None:
    model = build(name, nets.randomize, shortcut=shortcut, stride_in_1x1=stride_in_1x1)
    check_paper_net(model, torch.randn(2, 3, 40, 40))


@pytest.mark.parametrize("name", [n for n in PAPER if not n.endswith(("110", "1202", "plain34", "56"))])
def test_the_papers_own_nets(name: str) -> None:
    check_paper_net(nets.randomize(getattr(paper_nets, name)(num_classes=10)), torch.randn(2, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PAPER if n.endswith(("110", "1202", "plain34", "56"))])
def test_the_papers_deepest_nets(name: str) -> None:
    check_paper_net(nets.randomize(getattr(paper_nets, name)(num_classes=10)), torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_cifar_shortcuts(shortcut: str) -> None:
    model = nets.randomize(paper_nets.cifar_resnet20(shortcut=shortcut))
    check_paper_net(model, torch.randn(2, 3, 32, 32))


def check_paper_net(model: nn.Module, x: torch.Tensor) -> None:
    """As for torchvision's: stock and the reference agree bit for bit, oneDNN is within budget."""
    import copy

    stock = copy.deepcopy(model)
    resnet_fast.accelerate(model)
    resnet_fast.reset_stats()
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(model.eval()(x), stock.eval()(x))
        nets.assert_equal(nets.train_step(model.train(), x), nets.train_step(stock.train(), x))
    assert not [call for call in resnet_fast.stats()["calls"] if call.endswith("/stock")]
    nets.assert_close_to_eager(model.eval(), stock.eval(), x)
