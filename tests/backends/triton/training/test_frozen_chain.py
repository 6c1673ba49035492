"""Whole training steps without batch statistics in the interpreter: gradients against fp64, launches, saved memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

import resnet_fast
from resnet_fast import devices
from resnet_fast.tuning import launch_plan, training_configs
from resnet_fast.tuning.launch_plan import FoldedConfigs
from resnet_fast.tuning.routes import folded_routes
from resnet_fast.tuning.training_configs import CUDNN, folded_launches
from tests.support import train_cases, train_nets
from tests.support.dgrad_cases import GEOMETRIES
from tests.support.launches import before_each
from tests.support.op_cases import OPS
from tests.support.train_cases import case, check, fused, pooled_gap, step, stock

pytestmark = pytest.mark.interpret

H100 = devices.gpu("h100").gpu


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the launches of each kernel."""
    counts: Counter[str] = Counter()
    before_each(monkeypatch, lambda name: counts.update([name.strip("_").removesuffix("_kernel")]))
    return counts


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Send the named directions ("fwd dgrad wgrad") of a call's convolutions to PyTorch's kernels."""
    from resnet_fast.backends.triton.training import frozen_chain

    real = launch_plan.plan_folded

    def choose(names: str) -> None:
        def plan(spec: Any, *args: Any) -> FoldedConfigs:
            own = real(spec, *args)
            if "fwd" in names:
                route = folded_routes(spec)[0]
                own = replace(own, route=route, forward=(CUDNN,) * len(route.launches))
            every = {f"{name}s": (CUDNN,) * len(spec.convs) for name in ("dgrad", "wgrad") if name in names}
            return replace(own, **every)

        frozen_chain._plans.clear()
        monkeypatch.setattr(launch_plan, "plan_folded", plan)

    yield choose
    frozen_chain._plans.clear()


CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bottleneck": (torch.float16, {"op": "bottleneck"}),
    "bottleneck in bfloat16": (torch.bfloat16, {"op": "bottleneck", "co": 12, "projection": True}),
    "bottleneck in fp32": (torch.float32, {"op": "bottleneck", "co": 12, "projection": True, "bias": True}),
    "stride 2": (torch.float16, {"op": "bottleneck", "co": 16, "stride": 2, "h": 7, "bias": True}),
    "groups and dilation": (torch.float16, {"op": "bottleneck", "ci": 32, "co": 32, "groups": 8, "dilation": 2}),
    "given shortcut": (torch.float16, {"op": "bottleneck", "co": 16, "stride": 2, "residual": True}),
    "basic block": (torch.float16, {"op": "basic_block", "co": 16}),
    "basic block, stride 2": (torch.float16, {"op": "basic_block", "co": 24, "stride": 2, "h": 7}),
    "nchw": (torch.float16, {"op": "basic_block", "layout": "nchw", "co": 16}),
    "sliced": (torch.float16, {"op": "basic_block", "layout": "sliced_nhwc", "co": 16}),
    "no affine": (torch.float32, {"op": "basic_block", "affine": False, "co": 16}),
    "convolution": (torch.bfloat16, {"op": "conv_bn_act", "ci": 5, "stride": 2}),
    "without a relu": (torch.float16, {"op": "conv_bn_act", "relu": False, "residual": True}),
    "without a norm": (torch.float16, {"op": "conv_bn_act", "relu": False, "present": False, "bias": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_within_the_budget(name: str) -> None:
    dtype, options = CASES[name]
    check(case(dtype=dtype, batch_stats=False, **options))


STOCK: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "all with biases": ("fwd dgrad wgrad", torch.float16, {"op": "bottleneck", "co": 16, "stride": 2, "bias": True}),
    "all with groups": ("fwd dgrad wgrad", torch.float16, {"op": "bottleneck", "ci": 32, "co": 32, "groups": 8}),
    "all in bfloat16": ("fwd dgrad wgrad", torch.bfloat16, {"op": "basic_block", "co": 16}),
    "all in fp32": ("fwd dgrad wgrad", torch.float32, {"op": "basic_block", "co": 24, "stride": 2, "h": 7}),
    "all behind a given shortcut": ("fwd dgrad wgrad", torch.float16, {"op": "bottleneck", "co": 16, "residual": True}),
    "forward": ("fwd", torch.float16, {"op": "bottleneck", "co": 12, "projection": True}),
    "dgrad": ("dgrad", torch.float16, {"op": "bottleneck", "co": 16, "stride": 2, "h": 7}),
    "wgrad": ("wgrad", torch.float16, {"op": "basic_block", "layout": "nchw", "co": 16}),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_a_step_with_launches_of_pytorch_is_within_the_budget(
    name: str, send: Callable[[str], None], launches: Counter[str]
) -> None:
    directions, dtype, options = STOCK[name]
    send(directions)
    check(case(dtype=dtype, batch_stats=False, **options))
    ran = {kernel.removesuffix("_fwd") for kernel in launches}
    kernels = {"fwd": "conv_bn_act_1x1 conv_bn_act_3x3", "dgrad": "conv_dgrad", "wgrad": "conv_wgrad"}
    for direction, of in kernels.items():
        assert bool(ran & set(of.split())) == (direction not in directions), (direction, ran)


def test_a_stem_with_launches_of_pytorch(send: Callable[[str], None]) -> None:
    send("fwd wgrad")
    options: dict[str, Any] = {"op": "stem", "ci": 3, "co": 8, "k": 7, "stride": 2, "h": 9, "w": 8, "pool": (3, 2, 1)}
    steps = (case(dtype=torch.float16, batch_stats=False, **options) for _ in range(100))
    check(next(p for p in steps if pooled_gap(p) > 4e-3))


def test_nan_shows_with_launches_of_pytorch_too(send: Callable[[str], None]) -> None:
    send("fwd dgrad wgrad")
    p = case("basic_block", batch_stats=False, co=16)
    p.x[1, 3, 2, 2] = float("nan")
    ours, torchs = step(p, fused), step(p, stock)
    for name, t in torchs.items():
        assert torch.equal(ours[name].isnan(), t.isnan()), name


@pytest.mark.parametrize("pool,dtype", [((3, 2, 1), torch.float16), ((2, 2, 0), torch.float32)])
def test_a_stem(pool: tuple[int, int, int], dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"op": "stem", "ci": 3, "co": 8, "k": 7, "stride": 2, "h": 9, "w": 8, "pool": pool}
    steps = (case(dtype=dtype, batch_stats=False, **options) for _ in range(100))
    check(next(p for p in steps if pooled_gap(p) > 4e-3))


@pytest.mark.parametrize("name", ["3x3_stride2", "1x1_whole_blocks", "3x3_stride2_dilation3", "groups_merged"])
def test_a_launch_is_within_the_budget(name: str) -> None:
    """Covers dgrad behind a ReLU and wgrad of any geometry; the same check proves a config on a GPU."""
    from resnet_fast.backends.triton.training.problem import launch_problem

    conv = GEOMETRIES[name].with_(dtype="float16", grad=True)
    for launch in folded_launches(conv, masked=True):
        config = training_configs.admitted(launch, H100, packed=False)[-1]
        launch_problem(launch).check(config)


@pytest.mark.parametrize("kernel", ["conv_dgrad", "conv_wgrad"])
def test_a_proof_covers_what_a_step_adds(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong sum of gradients, or a shortcut's gradient that is not added, is noticed."""
    from resnet_fast.backends.triton.training import folded_problem

    monkeypatch.setattr(folded_problem.configs, "needs_proof", lambda *_: True)
    conv = GEOMETRIES["3x3_stride2_even"].with_(dtype="float16", grad=True)
    launch = next(one for one in folded_launches(conv, masked=False) if one.kernel == kernel)
    config = training_configs.admitted(launch, H100, packed=False)[-1]
    random = folded_problem.folded_problem(launch)
    random.check(config)
    module = getattr(folded_problem.folded_convolution, kernel)
    name = "products" if kernel == "conv_wgrad" else "conv_dgrad"
    real = getattr(module, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        if kernel == "conv_dgrad":
            return real(*args[:7], None, *args[8:])
        found = real(*args, **kwargs)
        return found if found.q is None else found._replace(q=found.q * 1.01)

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        random.check(config)


WANTED: dict[str, tuple[Callable[[str], bool], dict[str, int]]] = {
    # what needs no gradient: launches of dgrad and wgrad in a bottleneck with a projection
    "norms, as FrozenBatchNorm2d": (
        lambda name: name.startswith(("gamma", "beta")),
        {"conv_dgrad": 4, "conv_wgrad": 4},
    ),
    "x": (lambda name: name == "x", {"conv_dgrad": 2, "conv_wgrad": 4}),
    "all but x": (lambda name: name != "x", {"conv_dgrad": 4}),
    "all but the last beta": (lambda name: name != "beta2", {"channel_sums": 1}),
    "all below the second": (lambda name: name == "x" or name[-1] in "0", {"conv_dgrad": 1, "conv_wgrad": 3}),
}


@pytest.mark.parametrize("name", WANTED)
def test_what_needs_no_gradient_is_not_computed(name: str, launches: Counter[str]) -> None:
    without, expected = WANTED[name]
    p = case("bottleneck", batch_stats=False, co=16, stride=2)
    found = step(p, fused, without)
    assert {k: n for k, n in launches.items() if k in ("conv_dgrad", "conv_wgrad", "channel_sums")} == expected
    truth = step(p.to(train_cases.WIDE), lambda q: q.eager(), without, train_cases.cotangent(found["y"]))
    for key, t in truth.items():
        torch.testing.assert_close(found[key].double(), t, rtol=1e-4, atol=1e-4)


def test_a_constant_alone_needs_no_wgrad(launches: Counter[str]) -> None:
    """beta and bias: the sums of g are enough. With gamma the products are needed, and dW is not written."""
    p = case("bottleneck", batch_stats=False, co=16, stride=2, bias=True)

    def without(name: str) -> bool:
        return not name.startswith(("beta", "bias"))

    found = step(p, fused, without)
    assert launches["channel_sums"] == 4 and launches["fold_gradient"] == 1 and not launches["conv_wgrad"]
    truth = step(p.to(train_cases.WIDE), lambda q: q.eager(), without, train_cases.cotangent(found["y"]))
    for key, t in truth.items():
        torch.testing.assert_close(found[key].double(), t, rtol=1e-4, atol=1e-4)
    launches.clear()
    step(p, fused, lambda name: not name.startswith("gamma"))
    assert launches["conv_wgrad"] == 4 and not launches["channel_sums"]


def test_sums_of_many_walks() -> None:
    """More than a program adds at once, with channels that no block divides."""
    from resnet_fast.backends.triton.training import channel_sums, fold_gradient
    from resnet_fast.backends.triton.training.folded_convolution import Sums

    conv = GEOMETRIES["1x1_whole_blocks"].with_(ci=16, co=20)
    g = torch.randn(3, 20, 31, 29).contiguous(memory_format=torch.channels_last)
    q = channel_sums.channel_sums(g)
    assert len(q) > 1
    torch.testing.assert_close(q.double().sum(0), g.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)
    many = torch.randn(2 * fold_gradient.ELEMENTS + 3, 20)
    vectors, dbeta = torch.rand(3, 20), torch.empty(20)
    weight = torch.randn(20, 16, 1, 1)
    fold_gradient.fold_gradients(
        [fold_gradient.Wanted(conv, weight, vectors, Sums(None, many), None, None, dbeta, None)]
    )
    torch.testing.assert_close(dbeta.double(), many.double().sum(0), rtol=1e-5, atol=1e-4)


def test_launches_of_a_block(launches: Counter[str]) -> None:
    """One for each convolution and direction, and three besides; a projection shares the last convolution's forward."""
    step(case("basic_block", torch.float16, batch_stats=False, co=16), fused)
    assert launches == {
        "fold": 1, "conv_bn_act_3x3_fwd": 2, "transpose": 1, "conv_dgrad": 2, "conv_wgrad": 2, "fold_gradient": 1,
    }  # fmt: skip
    launches.clear()
    step(case("basic_block", torch.float16, batch_stats=False, co=24, stride=2), fused)
    assert launches.total() == 1 + 2 + 1 + 3 + 3 + 1


@pytest.mark.parametrize("op", ["bottleneck", "stem"])
def test_only_activations_are_saved(op: str) -> None:
    """Apart from input, output and parameters: what is between the convolutions, or a byte per window of a max-pool."""
    options: dict[str, Any] = {"ci": 3, "k": 7, "stride": 2} if op == "stem" else {}
    q = case(op, torch.float16, batch_stats=False, **options).copy(grad=True)
    given = {t.data_ptr() for t in q.tensors().values()}
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fused(q)
    kept = [t for t in saved if t.data_ptr() not in given and t.data_ptr() != y.data_ptr()]
    images = [t for t in kept if t.dim() == 4]
    if op == "stem":
        assert [(t.shape, t.dtype) for t in images] == [(y.shape, torch.uint8)]
    else:
        assert all((t >= 0).all() for t in images)
        assert sum(t.nbytes for t in images) == 2 * y.nbytes * q.convs[0].weight.shape[0] // y.shape[1]
    assert [tuple(t.shape) for t in kept if t.dim() != 4] == [(3, len(c.weight)) for c in q.convs]


def test_statistics_and_gamma_may_change_before_backward() -> None:
    """The backward pass uses the factors of its own forward pass; a changed parameter is an error, as in PyTorch."""
    p = case("basic_block", torch.float16, batch_stats=False, co=16)
    expected, q = step(p, fused), p.copy(grad=True)
    y = fused(q)
    for t in q.statistics().values():
        t.add_(3.0)
    y.backward(train_cases.cotangent(y), retain_graph=True)
    for name, t in q.leaves().items():
        assert torch.equal(t.grad, expected[f"grad {name}"]), name
    with torch.no_grad():
        q.norms[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_nan_shows_where_it_shows_in_torch(op: str) -> None:
    p = case(op, batch_stats=False, **({"co": 16} if op == "basic_block" else {}))
    p.x[1, 3, 2, 2] = float("nan")
    ours, torchs = step(p, fused), step(p, stock)
    for name, t in torchs.items():
        assert torch.equal(ours[name].isnan(), t.isnan()), name


@pytest.mark.parametrize("frozen", [pytest.param("eval mode", marks=pytest.mark.slow), "FrozenBatchNorm2d"])
def test_a_net_trains_as_in_torch(frozen: str) -> None:
    """Three steps of a small ResNet with bottlenecks; with FrozenBatchNorm2d its stem is frozen, as in detectors."""
    net = train_nets.freeze_norms(train_nets.imagenet(Bottleneck), frozen)
    if frozen != "eval mode":
        net.conv1.requires_grad_(False)
    x, labels = train_nets.images(2, 9, 8)
    resnet_fast.reset_stats()
    nets = [train_nets.twin(net), copy.deepcopy(net), copy.deepcopy(net).double()]
    before = [t.double() for t in net.state_dict().values()]
    for one in nets:
        trained = [t for t in one.parameters() if t.requires_grad]
        for _ in range(3):
            own = x.to(trained[0].dtype)
            grads = torch.autograd.grad(train_nets.loss_of(one(own), labels), trained)
            with torch.no_grad():
                for t, g in zip(trained, grads, strict=True):
                    t -= 0.1 * g
    calls = train_nets.calls()
    ours, eager, exact = (
        torch.cat([(t.double() - b).flatten() for t, b in zip(n.state_dict().values(), before, strict=True)])
        for n in nets
    )
    assert exact.norm() > 0
    assert (ours - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.norm()
    assert {f"{op}/triton": 3 * count for op, count in (("bottleneck", 2), ("stem", 1))}.items() <= calls.items()
