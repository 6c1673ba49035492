"""Inputs: layouts, strides, empty and odd sizes, batches in tiles, transforms, inference mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.backends.onednn import tiling
from resnet_fast.blocks.net import Net
from resnet_fast.dispatch import select
from tests.support import nets
from tests.support.nets import twin


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 7), (1, 3, 33, 47), (3, 3, 2, 2), (1, 3, 64, 31)])
def test_image_sizes(shape: tuple[int, ...], kind: str) -> None:
    stock, fused = twin(getattr(nets, kind)())
    x = torch.randn(shape)
    nets.assert_close_to_eager(fused, stock, x)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        nets.assert_equal(fused(x), stock(x))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: x[:, :, 3:35, 5:37],
    "every other pixel": lambda x: x[:, :, ::2, 1::2],
    "flipped": lambda x: x.flip(3),
    "transposed": lambda x: x.transpose(2, 3),
    "channels reversed": lambda x: x[:, [2, 1, 0]],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "one grey plane three times": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "batch stride": lambda x: x[::2],
    "numpy order": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "storage offset": lambda x: torch.cat([torch.zeros(7), x.flatten()])[7:].view(x.shape),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strided_inputs(view: Callable[[Tensor], Tensor]) -> None:
    stock, fused = twin(nets.bottleneck())
    x = view(torch.randn(4, 3, 40, 40))
    before = x.clone()
    nets.assert_close_to_eager(fused, stock, x)
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(fused(x), stock(x))
        nets.assert_equal(nets.train_step(fused.train(), x), nets.train_step(stock.train(), x))
    nets.assert_equal(x, before)


@pytest.mark.parametrize("size", [32, 33])
def test_empty_batch(size: int) -> None:
    stock, fused = twin(nets.bottleneck())
    x = torch.empty(0, 3, size, size)
    with torch.no_grad():
        nets.assert_equal(fused(x), stock(x))
        nets.assert_equal(fused.layer1(torch.empty(0, 64, 8, 8)), stock.layer1(torch.empty(0, 64, 8, 8)))
    nets.assert_equal(nets.train_step(fused, x), nets.train_step(stock, x))


def test_the_input_is_never_written() -> None:
    """The last primitive of a block adds in place only into tensors of its own, never into an input."""
    _, fused = twin()
    y = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        y = y.to(dtype)
        before = y.clone()
        with torch.no_grad():
            fused.to(dtype).layer1(y)
        assert torch.equal(y, before)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 32, 32), r"expected (stem|net): x with 4 dimensions \(N, C, H, W\), got \(3, 32, 32\)"),
        (torch.randn(1, 32, 32, 3), r"x looks like NHWC: permute it"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"expected (stem|net): a floating-point x"),
        (torch.randn(1, 3, 32, 32, dtype=torch.float64), r"expected stem: x and weight of one dtype"),
        (torch.randn(1, 4, 32, 32), r"expected stem: x with 3 channels"),
    ],
)
def test_input_that_no_resnet_takes_is_refused_with_reasons(x: Tensor, message: str) -> None:
    _, fused = twin()
    for context in (torch.no_grad, torch.enable_grad):
        with context(), pytest.raises(resnet_fast.UserError, match=message):
            fused(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_nan_and_infinity_break_the_logits_as_in_the_stock_net(kind: str, bad: float, dtype: torch.dtype) -> None:
    """oneDNN's ReLU turns NaN into 0, and a broken image would get confident logits: the batch runs on reference."""
    stock, fused = twin(getattr(nets, kind)().to(dtype))
    x = torch.randn(3, 3, 32, 32).to(dtype)
    with torch.no_grad():
        fused(x)  # packed weights and plans are there and must not be taken
        x[1, 1, 5, 5] = bad
        resnet_fast.reset_stats()
        want, got = stock(x), fused(x)
        assert want[1].isnan().all() and want[[0, 2]].isfinite().all()
        nets.assert_equal(got, want)
        stats = resnet_fast.stats()
        assert {call.split("/")[1] for call in stats["calls"]} == {"reference"}
        ((reason, count),) = stats["fallbacks"].items()
        assert count == 1 and "its input holds NaN or infinity" in reason
        with resnet_fast.strict(), pytest.raises(resnet_fast.BackendError, match="input holds NaN or infinity"):
            fused(x)
        x[1, 1, 5, 5] = 0
        resnet_fast.reset_stats()
        fused(x)
        assert not resnet_fast.stats()["fallbacks"]


def tiles_of(monkeypatch: pytest.MonkeyPatch, nbytes: int = 1) -> list[int]:
    """Set the cache to ``nbytes``; return a list that collects the sizes of the batches that a stem sees.

    The stem runs as a call of its own, by its stock layers, or as the first part of a whole net's call.
    """
    seen: list[int] = []
    stem_forward, execute = Net.stem_forward, select.execute

    def spy(self: Net, x: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return stem_forward(self, x)

    def spy_net(call: Any, *rest: Any) -> Tensor:
        if call.op == "net" and call.parts[0].op == "stem":
            seen.append(call.x.shape[0])
        return execute(call, *rest)

    monkeypatch.setattr(tiling, "last_level_cache", lambda: nbytes)
    monkeypatch.setattr(Net, "stem_forward", spy)
    monkeypatch.setattr(select, "execute", spy_net)
    return seen


@pytest.mark.parametrize(("images", "per_tile"), [(5, 1), (5, 2), (4, 2), (7, 4), (3, 8)])
def test_tiles_of_a_batch_join_up(images: int, per_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, fused = twin(nets.bottleneck())
    x = torch.randn(images, 3, 32, 32)
    with torch.no_grad():
        whole = fused(x)
        nbytes = per_tile * 2 * 4 * fused.largest_activation(32, 32)
        seen = tiles_of(monkeypatch, nbytes)
        got = fused(x)
    tile = min(images, per_tile)
    assert seen == [tile] * (images // tile) + ([images % tile] if images % tile else [])
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)
    nets.assert_close_to_eager(fused, stock, x)


def test_an_image_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = twin(nets.bottleneck())
    x, other = torch.randn(2, 4, 3, 32, 32)
    other[2] = x[2]
    with torch.no_grad():
        assert torch.equal(fused(x)[2], fused(other)[2])
        tiles_of(monkeypatch)
        # fc multiplies the whole batch at once, which sums its products in another order than for one image
        torch.testing.assert_close(fused(x)[2:3], fused(x[2:3]), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_later_parts_take_more_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = resnet_fast.resnet50().eval()
    x = torch.empty(16, 3, 224, 224)
    parts = fused.parts(x)
    monkeypatch.setattr(tiling, "last_level_cache", lambda: 32 << 20)
    # 802,816 elements per image up to layer2.0's input, then 401,408, then 200,704 and fewer; twice, in 4 bytes
    assert [(len(segment), tile) for segment, tile in fused.segments(parts, x)] == [(5, 4), (4, 8), (8, 16)]
    assert tuple(part for segment, _ in fused.segments(parts, x) for part in segment) == parts
    assert fused.segments(parts, x[:4]) == [(parts, 4)]


def no_tiles(monkeypatch: pytest.MonkeyPatch, fused: nn.Module, grad: bool = False) -> None:
    seen = tiles_of(monkeypatch)
    with torch.set_grad_enabled(grad):
        fused(torch.randn(4, 3, 32, 32))
    assert seen == [4]


def train_one_norm(model: nn.Module) -> None:
    model.layer4[0].bn1.train()


def hook_stage(model: nn.Module) -> None:
    model.layer2.register_forward_hook(lambda *args: None)


def hook_classifier(model: nn.Module) -> None:
    model.fc.register_forward_pre_hook(lambda *args: None)


class MeanOfBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x}


def mixing_stage(model: nn.Module) -> None:
    model.layer3.append(MeanOfBatch())


def mixing_classifier(model: nn.Module) -> None:
    model.fc = nn.Sequential(model.fc, MeanOfBatch())


def mixing_softmax(model: nn.Module) -> None:
    model.fc = nn.Sequential(model.fc, nn.Softmax(dim=0))


def mixing_shortcut(model: nn.Module) -> None:
    model.layer2[0].downsample = nn.Sequential(*model.layer2[0].downsample, MeanOfBatch())


def mixing_pool(model: nn.Module) -> None:
    model.avgpool = nn.Sequential(MeanOfBatch(), model.avgpool)


def dictionary(model: nn.Module) -> None:
    model.fc = Named()


def norm_of_the_batch(model: nn.Module) -> None:
    model.fc = nn.Sequential(model.fc, nn.BatchNorm1d(10, track_running_stats=False).eval())


def stochastic(model: nn.Module) -> None:
    model.fc = nn.Sequential(nn.Dropout(0.5).train(), model.fc)


def unfused_block(model: nn.Module) -> None:
    model.layer1[0].relu = nn.SiLU()


@pytest.mark.parametrize(
    "edit",
    [train_one_norm, hook_stage, hook_classifier, mixing_stage, mixing_classifier, mixing_softmax, mixing_shortcut,
     mixing_pool, dictionary, norm_of_the_batch, stochastic, unfused_block],
)  # fmt: skip
def test_no_tiles_where_they_would_be_seen(edit: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch) -> None:
    stock, fused = twin()
    x = torch.randn(4, 3, 32, 32)
    outs = []
    seen = tiles_of(monkeypatch)
    for model in (stock, fused):
        edit(model)
        torch.manual_seed(3)
        with torch.no_grad():
            outs.append(model(x))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    assert seen == [4]


def test_no_tiles_with_autograd_in_training_or_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = twin()
    no_tiles(monkeypatch, fused, grad=True)
    no_tiles(monkeypatch, fused.train())
    monkeypatch.setenv("RESNET_FAST_BATCH_TILE", "0")
    no_tiles(monkeypatch, fused.eval())


def test_no_tiles_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = twin()
    monkeypatch.setattr(tiling, "last_level_cache", lambda: 1)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []
    with torch.no_grad():
        torch.compile(fused, fullgraph=True, backend=lambda gm, args: graphs.append(gm) or gm.forward)(
            torch.randn(4, 3, 32, 32)
        )
    assert sum("stem" in str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function") == 1


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode(made_inside: bool) -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode(made_inside):
        fused = resnet_fast.accelerate(nets.basic().eval())
        stock = nets.basic().eval()
        stock.load_state_dict(fused.state_dict())
    with torch.inference_mode():
        for _ in range(2):
            got = fused(x)
            torch.testing.assert_close(got, stock(x), rtol=1e-4, atol=1e-4)
            for model in (stock, fused):
                model.layer1[0].conv1.weight.mul_(1.5)
                model.layer1[0].bn1.bias[3] += 1
        assert got.is_inference()
        with resnet_fast.use_backend("reference"):
            nets.assert_equal(fused(x), stock(x))
    if made_inside:
        with torch.no_grad():
            torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4)
    else:  # packed weights made in inference mode must serve calls outside, and the graph must exist there
        nets.assert_close_to_eager(fused, stock, x)
        fused(x).sum().backward()
        assert fused.conv1.weight.grad is not None


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in model.named_parameters()}


def test_functional_call() -> None:
    stock, fused = twin()
    x = torch.randn(2, 3, 32, 32)
    other = {k: v * 1.1 for k, v in params_of(stock).items()}
    with torch.no_grad():
        got, want = (torch.func.functional_call(m, other, (x,)) for m in (fused, stock))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    nets.assert_close_to_eager(fused, stock, x)


def transform(kind: str, model: nn.Module, x: Tensor) -> Any:
    params = params_of(model)

    def loss(p: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (image,)).square().sum()

    if kind == "grad":
        return torch.func.grad(loss)(params, x)
    if kind == "vmap":
        with torch.no_grad():
            return torch.func.vmap(lambda one: model(one[None])[0])(x)
    if kind == "per-sample gradients":
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None])
    if kind == "jvp":
        return torch.func.jvp(model, (x,), (torch.ones_like(x),))
    if kind == "vjp":
        out, pull = torch.func.vjp(model, x)
        return out, pull(torch.ones_like(out))
    if kind == "ensemble":
        stacked = {k: torch.stack([v, v * 1.1]) for k, v in params.items()}
        with torch.no_grad():
            return torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(stacked)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["grad", "vmap", "per-sample gradients", "jvp", "vjp", "ensemble"])
def test_function_transforms(kind: str) -> None:
    stock, fused = twin()
    x = torch.randn(2, 3, 32, 32)
    nets.assert_equal(transform(kind, fused, x), transform(kind, stock, x))


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_ad(grad: bool) -> None:
    """A dual tensor requires no gradient, and its tangent must not be lost. In float64 a single flipped ReLU shows."""
    import torch.autograd.forward_ad as fwad

    tangents = []
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for model in twin():
        model.double().requires_grad_(grad)
        with torch.set_grad_enabled(grad), fwad.dual_level():
            out = model(fwad.make_dual(x, torch.ones_like(x)))
            tangents.append(fwad.unpack_dual(out).tangent.detach())
    assert tangents[0].abs().sum() > 0
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("train", [True, False])
def test_double_backward(train: bool) -> None:
    """Computes a gradient penalty."""
    results = []
    x = torch.randn(2, 3, 32, 32)
    for model in twin():
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model.train(train)(leaf).square().sum(), leaf, create_graph=True)
        g.square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    nets.assert_equal(results[1], results[0])


def test_tensor_subclasses() -> None:
    class Image(torch.Tensor):
        pass

    stock, fused = twin()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got, want = fused(x.as_subclass(Image)), stock(x.as_subclass(Image))
    assert type(got) is type(want)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["", "layer1.0", "layer2"])
def test_what_is_no_tensor_is_refused(part: str) -> None:
    _, fused = twin()
    for x in (torch.zeros(1, 64, 8, 8).numpy(), [torch.zeros(64, 8, 8)]):
        with torch.no_grad(), pytest.raises(resnet_fast.UserError, match=r"a tensor of images .*torch\.as_tensor"):
            fused.get_submodule(part)(x)


def test_several_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    _, fused = twin()
    xs = [torch.randn(1 + i % 3, 3, 32, 32) for i in range(12)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return fused(x)

    want = [run(x) for x in xs]
    resnet_fast.clear_derived()
    with ThreadPoolExecutor(4) as pool:
        torch.testing.assert_close(list(pool.map(run, xs)), want, rtol=1e-5, atol=1e-5)
