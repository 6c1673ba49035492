"""Batch-invariant mode on the CPU: an image's logits are equal bit for bit in any batch, and what cannot be, raises."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import resnet_fast
from resnet_fast import invariance, parameter_cache
from resnet_fast.blocks import head
from resnet_fast.dispatch import catalog, select
from resnet_fast.errors import BackendError, UserError
from resnet_fast.ops import infer
from resnet_fast.paper_nets import CifarResNet
from resnet_fast.spec import YES, Verdict
from tests.support import nets
from tests.support.nets import randomize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _own_threads(same_threads: None) -> Iterator[None]:
    yield
    parameter_cache.clear()


def _cifar(block: type[nn.Module] = BasicBlock) -> nn.Module:
    return randomize(CifarResNet(block, 1)).eval()


def _differing(net: nn.Module, x: Tensor, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (batch size, first image) of each batch that differs from its images one by one."""
    with torch.inference_mode():
        alone = torch.cat([net(image.clone()) for image in x.split(1)])
        found = []
        for n in sizes:
            for first in sorted({0, len(x) // 2 - n // 2, len(x) - n}):
                if not torch.equal(net(x[first : first + n]), alone[first : first + n]):
                    found.append((n, first))
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_batch_size_gives_the_same_bits(
    backend: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are of an odd size, so that most begin at an address that is not aligned."""
    monkeypatch.setenv("RESNET_FAST_BATCH_INVARIANT", "1")
    torch.set_num_threads(threads)
    net = resnet_fast.accelerate(_cifar().to(dtype), backend)
    every = (backend, dtype, threads) == ("auto", torch.float32, 1)
    x = torch.randn(33 if every else 7, 3, 9, 7).to(dtype)
    assert not _differing(net, x, tuple(range(1, 34)) if every else (2, 7))


@pytest.mark.parametrize("build", [nets.basic, nets.bottleneck])
def test_imagenet_nets(build, one_thread: None) -> None:
    net = resnet_fast.accelerate(build().eval())
    x = torch.randn(5, 3, 40, 40)
    with resnet_fast.batch_invariant():
        assert not _differing(net, x, (2, 5))
    assert _differing(net, x, (2, 5))  # without the mode


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_whole_nets(name: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    net = randomize(getattr(resnet_fast, name)(num_classes=100)).eval().to(dtype)
    with resnet_fast.batch_invariant():
        assert not _differing(net, torch.randn(17, 3, 64, 64).to(dtype), (3, 16, 17))


def test_a_layer_that_gets_the_batch_is_found_out(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """The planted bug: the classifier multiplies the whole batch, as a matrix product of another shape."""
    monkeypatch.setattr(head, "run", lambda net, x: net.head_forward(x))
    net = resnet_fast.accelerate(nets.basic().eval())
    with resnet_fast.batch_invariant():
        assert _differing(net, torch.randn(5, 3, 40, 40), (5,))


def test_a_batch_that_its_backend_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image runs on a backend that takes whole batches, and this batch is too large for it: another may not run."""
    refuses = Verdict.no("one image", "two", "split the batch")
    plain = catalog.impls
    monkeypatch.setattr(
        catalog,
        "impls",
        lambda op: tuple(
            replace(i, batch_invariant=True, supports=lambda s: YES if s.n == 1 else refuses)
            if i.backend == "onednn"
            else i
            for i in plain(op)
        ),
    )
    net = resnet_fast.accelerate(_cifar())
    monkeypatch.setattr(infer, "_ways", {})
    select._choose.cache_clear()
    try:
        with torch.inference_mode(), resnet_fast.batch_invariant():
            net(torch.randn(1, 3, 8, 8))
            with pytest.raises(
                BackendError, match=r"'onednn', which runs one image, to run N2 .*got two; split the batch"
            ):
                net(torch.randn(2, 3, 8, 8))
    finally:
        select._choose.cache_clear()


def test_results_do_not_depend_on_earlier_calls_or_on_other_images(one_thread: None) -> None:
    """Packing and compiling come with calls, and a NaN sends its image, and no other, to the reference."""
    net = resnet_fast.accelerate(_cifar())
    x = torch.randn(4, 3, 12, 12)
    with torch.inference_mode(), resnet_fast.batch_invariant():
        first = net(x)
        resnet_fast.clear_derived()
        for _ in range(40):
            assert torch.equal(net(x[:1]), first[:1])
        broken = x.clone()
        broken[2] = float("nan")
        got = net(broken)
    assert got[2].isnan().all() and torch.equal(got[[0, 1, 3]], first[[0, 1, 3]])


def test_the_mode_takes_effect_at_once(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    net, x = resnet_fast.accelerate(nets.basic().eval(), "onednn"), torch.randn(5, 3, 40, 40)
    with torch.inference_mode():
        plain = [net(x) for _ in range(2)][-1]
        with resnet_fast.batch_invariant():
            inside = net(x)
        outside = net(x)
        monkeypatch.setenv("RESNET_FAST_BATCH_INVARIANT", "1")
        assert torch.equal(net(x), inside)
    assert torch.equal(outside, plain) and not torch.equal(plain, inside)
    assert (plain - inside).abs().max() < 1e-4 * plain.abs().max()


def test_other_ways_to_call_a_net(one_thread: None) -> None:
    """Block by block under a hook, under autocast, frozen, as a stage, with an empty batch."""
    net, x = resnet_fast.accelerate(nets.basic().eval()), torch.randn(3, 3, 40, 40)
    stage, inner = net.layer4, torch.randn(3, 256, 3, 3)
    sizes: list[int] = []
    with resnet_fast.batch_invariant():
        with torch.inference_mode():
            assert net(x[:0]).shape == (0, 10)
        assert not _differing(stage, inner, (2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            assert not _differing(net, x, (3,))
        with resnet_fast.freeze(net):
            assert not _differing(net, x, (3,))
        with net.layer1[0].register_forward_hook(lambda m, args, y: sizes.append(len(y))):
            assert not _differing(net, x, (3,))
    assert 3 in sizes  # a hook sees the batch


class Squeeze(nn.Module):
    """Squeeze-and-excitation with linear layers, as in its paper: matrix products whose rows are the batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, channels // 4), nn.ReLU(), nn.Linear(channels // 4, channels))

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.layers(x.mean((2, 3))).sigmoid()
        return x * scale[:, :, None, None]


def _squeezing() -> nn.Module:
    """Return timm's ResNet-18 whose last block squeezes, accelerated; 512 channels show each order of a sum."""
    timm = pytest.importorskip("timm")
    net = randomize(timm.create_model("seresnet18", num_classes=10)).eval()
    net.layer4[1].se = Squeeze(512)
    return resnet_fast.accelerate(net)


def test_stock_layers_inside_fused_blocks_get_single_images(one_thread: None) -> None:
    """A shortcut that no op computes, and squeeze-and-excitation."""
    own = nets.basic().eval()
    own.layer4[0].downsample = nn.Sequential(nn.Conv2d(256, 512, 1, stride=2), nn.GroupNorm(4, 512))
    for net in (resnet_fast.accelerate(own), _squeezing()):
        with resnet_fast.batch_invariant():
            assert not _differing(net, torch.randn(4, 3, 40, 40), (4,))


def test_a_squeeze_that_gets_the_batch_is_found_out(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """The planted bug: layers between ops get the batch."""
    net = _squeezing()
    stage, x = net.layer4, torch.randn(5, 256, 3, 3)
    with resnet_fast.batch_invariant():
        assert not _differing(stage, x, (5,))
        monkeypatch.setattr(invariance, "singly", lambda function, x: function(x))
        assert _differing(stage, x, (5,))


def test_a_call_like_an_earlier_one_is_not_decided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the batch nor of an image: what was decided and prepared is looked up."""
    net, x = resnet_fast.accelerate(_cifar()), torch.randn(3, 3, 8, 8)
    with torch.inference_mode(), resnet_fast.batch_invariant():
        before = net(x)
        for name in ("spec_of", "_decide_alike"):
            monkeypatch.setattr(infer, name, lambda *_: pytest.fail("decided again"))
        assert torch.equal(net(x), before)
        monkeypatch.undo()
        assert net(x[:2]).shape == (2, 10)


def test_what_is_no_inference_raises() -> None:
    net, x = resnet_fast.accelerate(_cifar()), torch.randn(2, 3, 8, 8)
    with resnet_fast.batch_invariant():
        with pytest.raises(UserError, match=r"expected .*inference in batch-invariant mode, got a call that autograd"):
            net(x)
        with torch.no_grad(), pytest.raises(UserError, match=r"got statistics of the batch; call model\.eval"):
            copy.deepcopy(net).train()(x)
        for p in net.parameters():
            p.requires_grad = p is net.fc.weight
        with pytest.raises(UserError, match="got a classifier that autograd records"):
            net(x)
        with torch.inference_mode(), pytest.raises(UserError, match=r"got torch\.compile, which chooses kernels"):
            torch.compile(net, backend="eager")(x)
        with torch.no_grad(), pytest.raises(BackendError, match=r"batch-invariant mode: .* torch.func transforms"):
            torch.func.vmap(net)(x[:, None])


def test_stock_layers_raise() -> None:
    """A stock layer sees the whole batch, so a block that cannot be fused is an error."""
    net = resnet_fast.accelerate(randomize(CifarResNet(BasicBlock, 1, norm_layer=lambda c: nn.GroupNorm(4, c))).eval())
    with torch.inference_mode(), resnet_fast.batch_invariant(), pytest.raises(BackendError) as caught:
        net(torch.randn(2, 3, 8, 8))
    assert "batch-invariant mode: expected layers that run as our ops" in str(caught.value)
    assert "GroupNorm" in str(caught.value) and "unset RESNET_FAST_BATCH_INVARIANT" in str(caught.value)


def test_explain_says_what_the_mode_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = resnet_fast.accelerate(_cifar()), torch.randn(2, 3, 8, 8)
    assert "invariant" not in str(resnet_fast.explain(net, x))
    monkeypatch.setenv("RESNET_FAST_BATCH_INVARIANT", "1")
    told = resnet_fast.explain(net, x)
    assert all(row.spec.startswith("N1 ") and row.spec.endswith(" invariant") for row in told.rows)
    assert "batch-invariant mode: onednn gets one image at a time, packs at once and compiles no graph" in str(told)


def test_images_in_a_batch_are_made_alike() -> None:
    batch = torch.randn(3, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    alone, second, wide = batch[:1], batch[1:2], torch.randn(2, 3, 5, 9)[..., :5]
    assert invariance.alike(alone) is alone  # PyTorch aligns memory
    for x in (second, wide):
        got = invariance.alike(x)
        assert (
            torch.equal(got, x)
            and got.data_ptr() % invariance.ALIGNMENT == 0
            and got.is_contiguous(memory_format=torch.channels_last if x is second else torch.contiguous_format)
        )
