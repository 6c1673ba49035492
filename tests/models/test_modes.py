"""Modes of a net: train and eval, dtypes, layouts, devices, frozen parts, every kind of norm, autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import paper_nets
from tests.support import nets
from tests.support.nets import twin

Edit = Callable[[nn.Module], object]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def stock_calls() -> int:
    return sum(n for call, n in resnet_fast.stats()["calls"].items() if call.endswith("/stock"))


def test_train_and_eval_flips_with_weight_changes_between(x: torch.Tensor) -> None:
    """Folded weights must follow what training changes: eval, steps, eval, steps, eval."""
    stock, fused = twin()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (stock, fused)]
    for _ in range(3):
        nets.assert_close_to_eager(fused.eval(), stock.eval(), x)
        with resnet_fast.use_backend("reference"):
            for _ in range(2):
                nets.assert_equal(nets.train_step(fused.train(), x), nets.train_step(stock.train(), x))
                for optimizer in optimizers:
                    optimizer.step()
    nets.assert_equal(dict(fused.state_dict()), dict(stock.state_dict()))


def test_one_training_forward_without_a_step_is_seen_by_eval(x: torch.Tensor) -> None:
    """BatchNorm's own update of its statistics moves no version counter."""
    stock, fused = twin()
    with torch.no_grad():
        before = fused(x)
        for model in (stock, fused):
            model.train()(x * 3 + 1)
            model.eval()
        assert not torch.allclose(fused(x), before)
    nets.assert_close_to_eager(fused, stock, x)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_training_on_auto_equals_stock(kind: str, x: torch.Tensor) -> None:
    stock = getattr(nets, kind)().train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    nets.assert_equal(nets.train_step(fused, x), nets.train_step(stock, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(dtype: torch.dtype, x: torch.Tensor) -> None:
    stock, fused = twin()
    with torch.no_grad():
        fused(x)  # leaves packed float32 weights behind
        want = stock.to(dtype)(x.to(dtype))
        got = fused.to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        with resnet_fast.use_backend("reference"):
            nets.assert_equal(fused(x.to(dtype)), want)
    if dtype != torch.float64:
        nets.assert_close_to_eager(fused, stock, x.to(dtype))
    nets.assert_close_to_eager(fused.float(), stock.float(), x)


def test_double_back_and_forth_follows_the_values(x: torch.Tensor) -> None:
    stock, fused = twin()
    with torch.no_grad():
        fused(x)
    for model in (stock, fused):
        model.half().float()
    nets.assert_close_to_eager(fused, stock, x)


@pytest.mark.parametrize("place", ["bn1", "layer1.0.bn2", "layer2", "layer2.0.downsample.1"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_is_counted_once(place: str, momentum: float | None, x: torch.Tensor) -> None:
    """Runs a norm in training mode inside a net in eval mode, without gradients, as re-estimating statistics does."""
    stock, fast = twin()
    for model in (stock, fast):
        for norm in norms(model):
            norm.momentum = momentum
        model.get_submodule(place).train()
        with torch.no_grad():
            for scale in (1, 2, 3):
                model(x * scale)
    for (name, got), expected in zip(fast.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_a_batch_is_counted_once_in_a_plain_net() -> None:
    fast = resnet_fast.accelerate(paper_nets.cifar_plain20()).eval()
    fast.layer2[0].bn2.train()
    with torch.no_grad():
        fast(torch.randn(2, 3, 32, 32))
    assert [norm.num_batches_tracked.item() for norm in norms(fast)].count(1) == 1
    assert fast.layer2[0].bn2.num_batches_tracked == 1


@pytest.mark.parametrize("part", ["net", "stages"])
def test_parameters_are_swapped_as_in_a_stock_net(part: str, x: torch.Tensor) -> None:
    """``torch.utils.swap_tensors`` refuses tensors with weak references, and kept weights have one to their source."""
    stock, fast = twin()
    other = {k: t * 1.25 if t.is_floating_point() else t.clone() for k, t in stock.state_dict().items()}
    kept = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for change in (
            lambda m: m.double().float(),
            lambda m: m.load_state_dict(other),
            lambda m: m.to(memory_format=torch.channels_last),
        ):
            with torch.no_grad():
                if part == "net":
                    fast(x)
                else:
                    fast.layer2(fast.layer1(torch.randn(1, fast.conv1.out_channels, 8, 8)))
            change(stock)
            change(fast)
            with torch.no_grad():
                torch.testing.assert_close(fast(x), stock(x), rtol=1e-4, atol=1e-4)
        resnet_fast.restore(fast).double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(kept)


@pytest.mark.parametrize("model_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
def test_to_memory_format(
    model_format: torch.memory_format,
    input_format: torch.memory_format,
    x: torch.Tensor,
) -> None:
    stock, fused = twin(nets.bottleneck())
    with torch.no_grad():
        fused(x)
    x = x.contiguous(memory_format=input_format)
    for model in (stock, fused):
        model.to(memory_format=model_format)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        nets.assert_equal(fused(x), stock(x))
    nets.assert_close_to_eager(fused, stock, x)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_block_outputs_have_stock_strides(backend: str) -> None:
    stock, fused = twin(nets.bottleneck())
    for layout in (torch.contiguous_format, torch.channels_last):
        y = torch.randn(2, 64, 8, 8).contiguous(memory_format=layout)
        with torch.no_grad(), resnet_fast.use_backend(backend):
            assert fused.layer1(y).stride() == stock.layer1(y).stride()


def test_meta_without_autograd() -> None:
    _, fused = twin()
    with torch.no_grad():
        assert fused.to("meta")(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_to_meta() -> None:
    stock, fused = twin()
    fused.to("meta")
    for mode in (True, False):
        out = fused.train(mode)(torch.empty(2, 3, 32, 32, device="meta"))
        assert out.device.type == "meta"
        assert out.shape == (2, 10)
    assert fused.layer1(torch.empty(2, 64, 8, 8, device="meta")).shape == (2, 64, 8, 8)
    fused.to_empty(device="cpu").load_state_dict(stock.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        torch.testing.assert_close(fused(x), stock(x), rtol=0, atol=0)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("stages", [("conv1", "bn1", "layer1"), ("layer2", "layer3"), ("fc",), ("layer4",)])
def test_stages_without_gradients(stages: tuple[str, ...], mode: bool, x: torch.Tensor) -> None:
    stock, fused = twin(nets.bottleneck())
    for model in (stock, fused):
        model.train(mode)
        for stage in stages:
            getattr(model, stage).requires_grad_(False)
    with resnet_fast.use_backend("reference"):
        want = nets.train_step(stock, x)
        nets.assert_equal(nets.train_step(fused, x), want)
    assert [n for n, g in want["grads"].items() if g is None] == [
        n for n, p in stock.named_parameters() if n.split(".")[0] in stages
    ]


def test_gradient_of_the_input_alone(x: torch.Tensor) -> None:
    """With all parameters frozen, as for adversarial examples, the graph must still reach the input."""
    stock, fused = twin()
    grads = []
    for model in (stock, fused):
        model.requires_grad_(False)
        leaf = x.clone().requires_grad_()
        model(leaf).sum().backward()
        grads.append(leaf.grad)
    nets.assert_equal(grads[1], grads[0])


def freeze_all(model: nn.Module) -> None:
    for m in norms(model):
        m.eval()


def freeze_first(model: nn.Module) -> None:
    model.bn1.eval()
    model.layer1[0].bn2.eval()
    model.layer2[0].downsample[1].eval()  # type: ignore[index]


def cumulative(model: nn.Module) -> None:
    for m in norms(model):
        m.momentum = None


def other_numbers(model: nn.Module) -> None:
    for i, m in enumerate(norms(model)):
        m.momentum, m.eps = 0.01 * (i + 1), 1e-3 * (i + 1)


def zero_momentum(model: nn.Module) -> None:
    for m in norms(model):
        m.momentum = 0.0


def untracked_later(model: nn.Module) -> None:
    for m in norms(model):
        m.track_running_stats = False


def train_layer3_norm(model: nn.Module) -> None:
    """Put one norm of an eval net into training mode."""
    model.eval()
    model.layer3[0].bn1.train()


@pytest.mark.parametrize("after", [True, False], ids=["edited after", "edited before"])
@pytest.mark.parametrize(
    "edit", [freeze_all, freeze_first, cumulative, other_numbers, zero_momentum, untracked_later, train_layer3_norm]
)
def test_norm_settings(edit: Edit, after: bool, x: torch.Tensor) -> None:
    """Two training steps and an eval forward equal stock's bit for bit, whether the settings change before or after."""
    stock = nets.basic().train()
    fused = copy.deepcopy(stock)
    edit(stock)
    if after:
        edit(resnet_fast.accelerate(fused))
    else:
        edit(fused)
        resnet_fast.accelerate(fused)
    with resnet_fast.use_backend("reference"):
        for _ in range(2):
            nets.assert_equal(nets.train_step(fused, x), nets.train_step(stock, x))
        nets.assert_equal(fused.eval()(x), stock.eval()(x))
    nets.assert_close_to_eager(fused, stock, x)


def no_affine(c: int) -> nn.Module:
    return nn.BatchNorm2d(c, affine=False)


def instance(c: int) -> nn.Module:
    return nn.InstanceNorm2d(c, affine=True)


def no_tracking(c: int) -> nn.Module:
    return nn.BatchNorm2d(c, track_running_stats=False)


def nothing(c: int) -> nn.Module:
    return nn.BatchNorm2d(c, affine=False, track_running_stats=False)


def group(c: int) -> nn.Module:
    return nn.GroupNorm(4, c)


@pytest.mark.parametrize("norm_layer", [no_affine, no_tracking, nothing, group, instance, nn.Identity])
@pytest.mark.parametrize("kind", ["basic", pytest.param("bottleneck", marks=pytest.mark.slow)])
def test_norm_kinds(kind: str, norm_layer: Callable[[int], nn.Module]) -> None:
    """Norms are put in after the build: torchvision only initialises norms that have a weight."""
    x = torch.randn(2, 3, 48, 48) * (0.1 if norm_layer is nn.Identity else 1)
    stock = getattr(nets, kind)()
    for name, m in list(stock.named_modules()):
        if isinstance(m, nn.BatchNorm2d):
            stock.set_submodule(name, norm_layer(m.num_features))
    stock = nets.randomize(stock).train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    resnet_fast.reset_stats()
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(nets.train_step(fused, x), nets.train_step(stock, x))
        nets.assert_equal(fused.eval()(x), stock.eval()(x))
    assert (stock_calls() > 0) == (norm_layer in (group, instance))
    nets.assert_close_to_eager(fused, stock, x)


def test_sync_batch_norm_after_accelerate(x: torch.Tensor) -> None:
    stock = nets.bottleneck().eval()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fast.accelerate(copy.deepcopy(stock)))
    assert type(fused.layer1[0].bn1) is nn.SyncBatchNorm
    resnet_fast.reset_stats()
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        nets.assert_equal(fused.eval()(x), stock(x))
    assert stock_calls() == 0
    nets.assert_close_to_eager(fused, stock, x)


def test_sync_batch_norm_alone_in_its_process_is_batch_norm(x: torch.Tensor) -> None:
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(nets.bottleneck()).train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    resnet_fast.reset_stats()
    nets.assert_equal(nets.train_step(fused, x), nets.train_step(stock, x))
    assert stock_calls() == 0


def test_sync_batch_norm_without_training_kernels_runs_its_own_layers(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resnet_fast.blocks.children.sync_group", lambda norm: "0" if norm.training else "")
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(nets.bottleneck()).train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock), backend="reference")
    resnet_fast.reset_stats()
    nets.assert_equal(nets.train_step(fused, x), nets.train_step(stock, x))
    assert stock_calls() == 6
    assert "Triton's training kernels" in str(resnet_fast.stats()["fallbacks"])


def test_frozen_batch_norm_put_in_later(x: torch.Tensor) -> None:
    from torchvision.ops import FrozenBatchNorm2d

    def freeze(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
                state = child.state_dict()
                frozen.load_state_dict(state)
                setattr(module, name, frozen)
            else:
                freeze(child)

    fused = resnet_fast.accelerate(nets.bottleneck())
    freeze(fused)
    stock = resnet_fast.restore(copy.deepcopy(fused))
    want, got = nets.train_step(stock.train(), x), nets.train_step(fused.train(), x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    nets.assert_equal(got["buffers"], want["buffers"])
    resnet_fast.reset_stats()
    nets.assert_close_to_eager(fused.eval(), stock.eval(), x)
    assert stock_calls() == 0


@pytest.mark.parametrize("kwargs", [{"groups": 4, "width_per_group": 16}, {"width_per_group": 96}])
def test_groups_and_widths(kwargs: dict[str, int], x: torch.Tensor) -> None:
    stock = nets.bottleneck(**kwargs)
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(nets.train_step(fused.train(), x), nets.train_step(stock.train(), x))
    nets.assert_close_to_eager(fused.eval(), stock.eval(), x)


def test_dilated_in_place_after_accelerate(x: torch.Tensor) -> None:
    """Segmentation libraries turn strides into dilation on the living net."""
    stock, fused = twin(nets.bottleneck())
    with torch.no_grad():
        fused(x)
    for model in (stock, fused):
        for m in model.layer4.modules():
            if isinstance(m, nn.Conv2d):
                m.stride = (1, 1)
                if m.kernel_size == (3, 3):
                    m.dilation = m.padding = (2, 2)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        nets.assert_equal(fused(x), stock(x))
    nets.assert_close_to_eager(fused, stock, x)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str, x: torch.Tensor) -> None:
    edited = nets.bottleneck()
    edited.layer1[0].conv1 = nn.Conv2d(64, 64, 1, padding=padding, bias=False)
    stock, fused = twin(edited)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        nets.assert_equal(fused(x), stock(x))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes(mode: str, x: torch.Tensor) -> None:
    stock, fused = twin()
    for model in (stock, fused):
        model.layer1[0].conv1.padding_mode = mode
    nets.assert_close_to_eager(fused, stock, x)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        nets.assert_equal(fused(x), stock(x))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_autocast_equals_stock_on_the_reference(kind: str) -> None:
    """Training and eval under bfloat16 autocast, running statistics kept in float32."""
    stock = getattr(nets, kind)().train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 64, 64)  # of fewer pixels, oneDNN's own bf16 weight gradients vary from run to run

    def run(model: nn.Module) -> list[object]:
        with torch.autocast("cpu", torch.bfloat16):
            step = nets.train_step(model.train(), x)
            with torch.no_grad():
                return [step, model.eval()(x)]

    before = {k: b.clone() for k, b in fused.named_buffers()}
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(run(fused), run(stock))
    assert all(b.dtype == before[k].dtype and not torch.equal(b, before[k]) for k, b in fused.named_buffers())


def test_autocast_on_auto_is_within_budget() -> None:
    from resnet_fast import numerics

    stock = nets.basic().eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ref = copy.deepcopy(stock).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            got, want = fused(x), stock(x)
        numerics.assert_close(got, ref, want, 4608)


def test_autocast_leaves_float64_alone() -> None:
    stock, fused = twin()
    y = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        nets.assert_equal(fused.double().layer1(y), stock.double().layer1(y))
