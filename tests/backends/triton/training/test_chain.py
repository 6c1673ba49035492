"""Whole training steps in the interpreter: every op, its gradients and running statistics against fp64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from resnet_fast import accelerate
from resnet_fast.tuning import launch_plan
from resnet_fast.tuning.launch_plan import TrainingConfigs
from resnet_fast.tuning.training_configs import CUDNN
from tests.support import train_cases
from tests.support.op_cases import OPS, Problem
from tests.support.train_cases import case, check, fused, pooled_gap, same, step, stock

pytestmark = pytest.mark.interpret

DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def passengers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every wgrad take passengers along, as the large tiles of ResNet-50 do; narrow layers have small tiles."""
    from resnet_fast.backends.triton.training import pack

    monkeypatch.setattr(pack, "takes_passengers", lambda config: config != CUDNN)


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Send the named directions ("fwd dgrad wgrad") to cuDNN and the others to our kernels."""
    from resnet_fast.backends.triton.training import chain

    real = launch_plan.plan_training

    def send(cudnn: str) -> None:
        def plan(*args: Any) -> TrainingConfigs:
            own = real(*args)
            return TrainingConfigs(
                *(CUDNN if name in cudnn.split() else getattr(own, name) for name in TrainingConfigs.__annotations__)
            )

        chain._plans.clear()
        monkeypatch.setattr(launch_plan, "plan_training", plan)

    yield send
    chain._plans.clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each convolution kernel runs."""
    from resnet_fast.backends.triton.training import convolution

    counts: Counter[str] = Counter()

    def counted(name: str) -> None:
        module = getattr(convolution, name)
        real = getattr(module, name)

        def launch(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, launch)

    for name in ("conv_fwd", "conv_dgrad", "conv_wgrad"):
        counted(name)
    return counts


CASES: dict[str, dict[str, Any]] = {
    "bottleneck": {"op": "bottleneck"},
    "bottleneck_projection": {"op": "bottleneck", "co": 12, "projection": True},
    "bottleneck_stride2": {"op": "bottleneck", "co": 16, "stride": 2, "h": 7, "w": 5},
    "bottleneck_given": {"op": "bottleneck", "co": 16, "stride": 2, "residual": True},
    "basic_block": {"op": "basic_block", "co": 16},
    "basic_block_projection": {"op": "basic_block", "co": 8, "projection": True},
    "basic_block_stride2": {"op": "basic_block", "co": 24, "stride": 2, "h": 7},
    "basic_block_given": {"op": "basic_block", "residual": True},
    "conv_bn_act": {"op": "conv_bn_act"},
    "conv_bn": {"op": "conv_bn_act", "relu": False, "k": 1, "stride": 2},
    "conv_bn_add": {"op": "conv_bn_act", "relu": False, "residual": True},
    "conv_bn_add_act": {"op": "conv_bn_act", "residual": True, "ci": 5, "stride": 2},
}


# fp32 takes the same launches in the same order, with exact prologues: one case of each op shows it.
IN_FP32 = ("bottleneck_projection", "bottleneck_stride2", "basic_block_projection", "basic_block_given", "conv_bn_act")


@pytest.mark.parametrize(
    "name,dtype", [(name, dtype) for name in CASES for dtype in DTYPES if dtype != torch.float32 or name in IN_FP32]
)
def test_a_step_is_within_the_budget(name: str, dtype: torch.dtype) -> None:
    check(case(dtype=dtype, **CASES[name]))


@pytest.mark.parametrize("name", ["bottleneck_stride2", "conv_bn_act"])
def test_a_bfloat16_step(name: str) -> None:
    check(case(dtype=torch.bfloat16, **CASES[name]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0)])
def test_a_stem(dtype: torch.dtype, pool: tuple[int, int, int]) -> None:
    options: dict[str, Any] = {"op": "stem", "ci": 3, "co": 8, "k": 7, "stride": 2, "h": 9, "w": 8, "pool": pool}
    p = next(p for p in (case(dtype=dtype, **options) for _ in range(100)) if pooled_gap(p) > 4e-3)
    check(p)


def test_an_exact_prologue(monkeypatch: pytest.MonkeyPatch) -> None:
    p = case(dtype=torch.float16, **CASES["bottleneck_stride2"])
    packed = step(p, fused)
    monkeypatch.setenv("RESNET_FAST_PROLOGUE", "exact")
    exact = step(p, fused)
    check(p, exact)
    assert not torch.equal(exact["y"], packed["y"])


OPTIONS: dict[str, dict[str, Any]] = {
    "no_affine": {"affine": False},
    "untracked": {"tracked": False},
    "bias": {"bias": True},
    "frozen_norm": {"frozen": (1,), "bias": True},
    "frozen_norms": {"frozen": (0, 1, 2, 3), "bias": True},
    "frozen_projection": {"frozen": (3,)},
    "groups": {"ci": 32, "co": 32, "groups": 8},
    "dilation": {"dilation": 2},
    "nchw": {"layout": "nchw"},
    "sliced": {"layout": "sliced_nhwc"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_block(name: str) -> None:
    options = {"co": 8, "projection": True, **OPTIONS[name]}
    affine = options.get("affine", True)
    p = case("bottleneck", torch.float16 if affine else torch.float32, **options)
    check(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{"present": False, "bias": True}, {"frozen": (0,)}, {"frozen": (0,), "bias": True}]
)
def test_a_graph_without_batch_statistics(dtype: torch.dtype, options: dict[str, Any]) -> None:
    absent = not options.get("present", True)
    check(case("conv_bn_act", dtype, **options, relu=not absent, batch_stats=not absent))


ROUTES = [
    ("bottleneck_stride2", "fwd"),
    ("bottleneck_stride2", "dgrad"),
    ("basic_block", "wgrad"),
    ("basic_block", "fwd wgrad"),
    ("bottleneck_stride2", "fwd dgrad wgrad"),
]


@pytest.mark.parametrize("name,cudnn", ROUTES)
def test_any_direction_on_cudnn(name: str, cudnn: str, routes: Callable[[str], None], launches: Counter[str]) -> None:
    routes(cudnn)
    check(case(dtype=torch.float16, **CASES[name]))
    assert {f"conv_{name}" for name in cudnn.split()} == {"conv_fwd", "conv_dgrad", "conv_wgrad"} - launches.keys()


def test_a_stem_and_a_compact_projection_on_cudnn(routes: Callable[[str], None]) -> None:
    routes("fwd dgrad wgrad")
    options: dict[str, Any] = {"ci": 3, "co": 8, "k": 7, "stride": 2, "h": 9, "w": 8}
    check(case("stem", **options))
    check(case("basic_block", co=24, stride=2))


@pytest.mark.parametrize("name", ["bottleneck_projection", "basic_block"])
def test_recomputing_changes_no_bit(name: str) -> None:
    p = case(dtype=torch.float16, **CASES[name])
    kept: list[int] = []

    def run(save: str) -> dict[str, Tensor]:
        sizes: list[int] = []

        def pack(t: Tensor) -> Tensor:
            sizes.append(t.nbytes)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found = step(p, lambda q: getattr(torch.ops.resnet_fast, q.op)(*q.args(), "triton", save))
        kept.append(sum(sizes))
        return found

    raw, recomputed = run("raw"), run("recompute")
    same(raw, recomputed)
    assert kept[0] - kept[1] == raw["y"].nbytes


def test_two_runs_are_equal_bit_for_bit() -> None:
    p = case("bottleneck", torch.float16, co=16, stride=2)
    same(step(p, fused), step(p, fused))


@pytest.mark.parametrize("name", ["bottleneck_stride2", "basic_block"])
def test_passengers_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers coefficients, packing and sums over splits in the launch of a wgrad or dgrad, and in their own."""
    from resnet_fast.backends.triton.training import norm_gradient, pack

    monkeypatch.setenv("RESNET_FAST_SUBMIT", "python")  # a planned pass of compiled kernels would not launch anew
    launched: list[int] = []
    real = norm_gradient.coefficients
    monkeypatch.setattr(norm_gradient, "coefficients", lambda *a, **k: launched.append(1) or real(*a, **k))
    p = case(dtype=torch.float16, **CASES[name])
    together, most = step(p, fused), len(launched)
    monkeypatch.setattr(pack, "takes_passengers", lambda config: False)
    same(step(p, fused), together)
    assert len(launched) - most > most


FROZEN: dict[str, tuple[Callable[[str], bool], dict[str, int]]] = {
    # what needs no gradient: launches of dgrad and wgrad in a bottleneck with a projection
    "x": (lambda name: name == "x", {"conv_dgrad": 2, "conv_wgrad": 4}),
    "weights": (lambda name: name.startswith("weight"), {"conv_dgrad": 4}),
    "x_and_first_weight": (lambda name: name in ("x", "weight0"), {"conv_dgrad": 2, "conv_wgrad": 3}),
    "all_but_the_last_norm": (lambda name: name not in ("gamma2", "beta2"), {}),
    "all_but_the_last_layer": (lambda name: name not in ("weight2", "gamma2"), {"conv_wgrad": 1}),
    "all_below_the_second": (lambda name: name == "x" or name[-1] in "0", {"conv_dgrad": 1, "conv_wgrad": 3}),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_needs_no_gradient_is_not_computed(name: str, launches: Counter[str]) -> None:
    frozen, expected = FROZEN[name]
    p = case("bottleneck", co=16, stride=2)
    found = step(p, fused, frozen)
    assert {k: n for k, n in launches.items() if k != "conv_fwd"} == expected
    truth = step(p.to(train_cases.WIDE), lambda q: q.eager(), frozen, train_cases.cotangent(found["y"]))
    for key, t in truth.items():
        torch.testing.assert_close(found[key].double(), t, rtol=1e-4, atol=1e-4)


def test_a_given_shortcut_alone_needs_a_gradient(launches: Counter[str]) -> None:
    p = case("basic_block", torch.float16, residual=True)
    found = step(p, fused, lambda name: name != "residual")
    assert launches.keys() == {"conv_fwd"}
    dy = train_cases.cotangent(found["y"])
    assert torch.equal(found["grad residual"], torch.where(found["y"] > 0, dy, 0))


def test_outputs_and_gradients_share_no_memory() -> None:
    for p in (case("conv_bn_act", relu=False, residual=True), case("basic_block", co=16)):
        q = p.copy(grad=True)
        y = fused(q)
        dy = train_cases.cotangent(y)
        y.backward(dy)
        tensors = [y, dy, *q.tensors().values(), *(t.grad for t in q.leaves().values() if t.grad is not None)]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_twenty_steps_of_running_statistics() -> None:
    p = case("conv_bn_act", h=4, w=4, ci=8, k=1)
    ours, torchs = p.copy(), p.copy()
    with torch.no_grad():
        for _ in range(20):
            x = torch.randn_like(p.x) * 2 + 5
            fused(replace(ours, x=x))
            replace(torchs, x=x).eager()
    for (name, a), b in zip(ours.statistics().items(), torchs.statistics().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}])
def test_norms_with_other_books(options: dict[str, Any]) -> None:
    """Covers a cumulative average of the batches and no running statistics, compared with torch's own modules."""

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, **options)

    torchs = nn.Sequential(BasicBlock(8, 8, norm_layer=norm)).train()
    ours = nn.Sequential(BasicBlock(8, 8, norm_layer=norm)).train()
    ours.load_state_dict(torchs.state_dict())
    accelerate(ours, backend="triton")
    for _ in range(3):
        x = torch.randn(2, 8, 4, 5)
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(ours.named_buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    y = ours(x)
    assert y.grad_fn is not None
    assert len(list(ours.buffers())) == (6 if "momentum" in options else 0)


@pytest.mark.parametrize("op,value", [*((op, float("nan")) for op in OPS), ("conv_bn_act", float("inf"))])
def test_what_is_not_finite_shows_where_it_shows_in_torch(op: str, value: float) -> None:
    p = case(op, **({"co": 16} if op == "basic_block" else {}))
    p.x[1, 3, 2, 2] = value
    ours, torchs = step(p, fused), step(p, stock)
    for name, t in torchs.items():
        if not train_cases.is_zero(p, name):
            assert torch.equal(ours[name].isfinite(), t.isfinite()), name
            if not name.startswith(("mean", "var")) or value != value:
                assert torch.equal(ours[name].isnan(), t.isnan()), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_running_mean_far_from_the_batch(dtype: torch.dtype) -> None:
    """At two standard deviations, stored values and their rounding are three times as large as eager's."""
    p = case("basic_block", dtype, co=16, drift=2.0)
    ours = step(p, fused)
    dy = train_cases.cotangent(ours["y"])
    eager, truth = step(p, stock), step(p.to(train_cases.WIDE), lambda q: q.eager(), dy=dy)
    for name, t in truth.items():
        error, eagers = ((s[name].double() - t).norm() / t.norm() for s in (ours, eager))
        assert error <= 6 * eagers + torch.finfo(dtype).eps, name


def test_a_poisoned_running_mean_does_not_poison_the_batch() -> None:
    p = case("conv_bn_act", torch.float16)
    expected = step(p, fused)
    p.norms[0].mean[::2] = float("nan")
    found = step(p, fused)
    numbers = [name for name in found if not name.startswith("mean")]
    for name in numbers:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-2)
    assert torch.equal(found["mean0"].isnan(), p.norms[0].mean.isnan())


FAILING = [
    ("pack", "launch", 0),
    ("conv_fwd", "conv_fwd", 0),
    ("conv_fwd", "conv_fwd", 1),
    ("batch_norm", "finalize", 0),
    ("block_end", "block_end", 1),
]


@pytest.mark.parametrize("module,name,done", FAILING)
def test_a_launch_that_fails(module: str, name: str, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has changed but the running statistics of the ``done`` norms before it, as in stock PyTorch."""
    from resnet_fast.backends.triton import training

    p = case("basic_block", torch.float16, co=16)
    target = getattr(training, module)
    real, calls = getattr(target, name), iter(range(100))
    failing = 0 if name == "block_end" else done

    def launch(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == failing:
            raise RuntimeError("launch failed")
        return real(*args, **kwargs)

    q = p.copy(grad=True)
    with monkeypatch.context() as broken:
        broken.setattr(target, name, launch)
        with pytest.raises(RuntimeError, match="launch failed"):
            fused(q)
    for key, t in q.tensors().items():
        moved = key.startswith(("mean", "var")) and int(key[-1]) < done
        assert torch.equal(t, p.tensors()[key]) != moved, key
        t.data.copy_(p.tensors()[key])
    same(step(q, fused), step(p, fused))


def test_running_statistics_have_a_new_version() -> None:
    """What was derived from them is derived again, see parameter_cache.py; those of a frozen norm are as they were."""
    p = case("bottleneck", frozen=(1,))
    before = {name: t._version for name, t in p.statistics().items()}
    fused(p)
    for name, t in p.statistics().items():
        assert (t._version == before[name]) == (name[-1] == "1"), name


def test_a_backward_launch_that_fails_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton.training import convolution

    def launch(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("launch failed")

    q = case("basic_block", co=16).copy(grad=True)
    y = fused(q)
    with monkeypatch.context() as broken:
        broken.setattr(convolution.conv_dgrad, "conv_dgrad", launch)
        with pytest.raises(RuntimeError, match="launch failed"):
            y.sum().backward(retain_graph=True)
    assert all(t.grad is None for t in q.leaves().values())
    y.sum().backward()
    assert all(t.grad is not None for t in q.leaves().values())


@pytest.mark.parametrize("changed", ["y", "x", "weight1"])
def test_a_tensor_changed_before_backward_is_noticed(changed: str) -> None:
    q = case("basic_block", co=16).copy(grad=True)
    y = fused(q)
    with torch.no_grad():
        (q.tensors() | {"y": y.detach()})[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_may_change_before_backward() -> None:
    """After an EMA copy or a second forward, the first backward still uses the values of its own forward."""
    p = case("bottleneck", torch.float16, co=16, stride=2)
    expected = step(p, fused)
    q = p.copy(grad=True)
    y = getattr(torch.ops.resnet_fast, q.op)(*q.args(), "triton", "recompute")
    for t in q.statistics().values():
        t.add_(3.0)
    y.backward(train_cases.cotangent(y))
    for name, t in q.leaves().items():
        assert torch.equal(t.grad, expected[f"grad {name}"]), name


@pytest.mark.parametrize("op", ["conv_bn_act", "basic_block"])
def test_gradients_of_two_steps_add_up(op: str) -> None:
    p = case(op, **({"co": 16} if op == "basic_block" else {}))
    once, q = step(p, fused), p.copy(grad=True)
    y = fused(q)
    y.backward(train_cases.cotangent(y), retain_graph=True)
    y.backward(train_cases.cotangent(y))
    for name, t in q.leaves().items():
        assert torch.equal(t.grad, 2 * once[f"grad {name}"]), name


def test_a_problem_counts_what_it_holds() -> None:
    """Inputs have gammas of both signs and 0, no activation near 0, and ReLUs that decide both ways."""
    p: Problem = case("bottleneck", co=16, stride=2)
    y = p.to(train_cases.WIDE).eager(relu=False)
    assert y.abs().min() > 1e-2 and (y > 0).any() and (y < 0).any()
    for norm in p.norms:
        assert norm.weight is not None and {-1.0, 0.0, 1.0} == set(norm.weight.sign().tolist())
