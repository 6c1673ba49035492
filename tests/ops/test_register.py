"""The torch.library side of every op: opcheck, fake strides, FLOPs, autocast, compile, export, TorchScript."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._prims_common import check_significant_strides
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.support.op_cases import BLOCKS, OPS, Call, Problem, make


def small(op: str, **options: Any) -> Problem:
    """Return the smallest problem of each op that has all of its parts."""
    return make(op, **{"ci": 4, "co": 4, "h": 5, "w": 6, "stride": 2 if op in BLOCKS else 1, **options})


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Reset dynamo: every test compiles the same ``forward`` for another op and must not see other guards."""
    torch._dynamo.reset()


def default(op: str) -> Any:
    return getattr(torch.ops.resnet_fast, op).default


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout,backend", [("nchw", "reference"), ("nhwc", "onednn")])
def test_opcheck_eval(op: str, layout: str, backend: str) -> None:
    torch.library.opcheck(default(op), (*small(op, layout=layout).args(), backend))


@pytest.mark.parametrize("op", OPS)
def test_opcheck_with_gradients(op: str) -> None:
    torch.library.opcheck(default(op), small(op, tracked=False, batch_stats=True).copy(grad=True).args())


@pytest.mark.parametrize("op", OPS)
def test_opcheck_training(op: str) -> None:
    # Running statistics are updated without an alias annotation, as aten::batch_norm does it: no schema check.
    tests = ("test_autograd_registration", "test_faketensor")
    p = small(op, batch_stats=True, layout="nhwc").copy(grad=True)
    torch.library.opcheck(default(op), p.args(), test_utils=tests)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [{}, {"h": 1, "w": 1, "stride": 1}, {"n": 1, "h": 8, "w": 1}])
@pytest.mark.parametrize("x_layout,weight_layout", [("nchw", "nchw"), ("nhwc", "nchw"), ("nchw", "nhwc")])
def test_fake_shape_and_strides_are_the_real_ones(
    op: str, backend: str, dtype: torch.dtype, shape: dict[str, int], x_layout: str, weight_layout: str
) -> None:
    pool = (1, 1, 0) if shape.get("w") == 1 else (3, 2, 1)
    p = small(op, layout=x_layout, weight_layout=weight_layout, dtype=dtype, pool=pool, **shape)
    real = p.run(backend)
    with FakeTensorMode() as mode:
        fake = p.map(lambda k, t: mode.from_tensor(t)).run(backend)
    assert fake.shape == real.shape and fake.dtype == real.dtype
    same, _ = check_significant_strides(fake, real, only_cuda=False)
    assert same, (fake.stride(), real.stride())


def flops(fn: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("options", [{}, {"n": 3, "h": 8, "bias": True, "layout": "nhwc"}, {"dilation": 2}])
def test_flop_formula_counts_as_eager_is_counted(op: str, options: dict[str, Any]) -> None:
    p = small(op, **options)
    with torch.no_grad():
        expected = flops(p.eager)
        assert flops(p.run) == expected
    assert expected > 0


@pytest.mark.parametrize("op", OPS)
def test_flops_of_a_backward_are_counted(op: str) -> None:
    ours, stock = small(op).copy(grad=True), small(op).copy(grad=True)
    assert flops(lambda: ours.run().sum().backward()) == flops(lambda: stock.eager().sum().backward())


@pytest.mark.parametrize("op", ["conv_bn_act", "bottleneck"])
def test_flop_formula_of_groups(op: str) -> None:
    p = make(op, ci=8, co=8, groups=4)
    with torch.no_grad():
        assert flops(p.run) == flops(p.eager)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch_stats", [False, True])
def test_autocast_equals_eager_under_autocast(op: str, batch_stats: bool) -> None:
    p = small(op, batch_stats=batch_stats)
    # A block in an autocast net gets the previous block's 16-bit output; a stem gets float32 images.
    p = p.map(lambda k, t: t.bfloat16() if k == "x" and op != "stem" else t)
    ours, stock = p.copy(grad=True), p.copy(grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = ours.run("reference"), stock.eager()
    assert y.dtype == torch.bfloat16 and torch.equal(y, z)
    y.float().sum().backward()
    z.float().sum().backward()
    for (name, a), b in zip(ours.leaves().items(), stock.leaves().values(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(ours.statistics().items(), stock.statistics().values(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b), name
        assert torch.equal(a, p.tensors()[name]) != batch_stats, name


@pytest.mark.parametrize("op", OPS)
def test_autocast_rounds_a_float32_input_and_residual(op: str) -> None:
    p = small(op, residual=op not in ("stem",))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = p.run("reference")
    rounded = p.map(lambda k, t: t.bfloat16() if k in ("x", "residual") else t)
    assert y.dtype == torch.bfloat16 and torch.equal(y, rounded.run("reference"))


def test_disabled_autocast_and_float64_are_left_alone() -> None:
    p = small("conv_bn_act")
    with torch.autocast("cpu", torch.bfloat16):
        assert p.to(torch.float64).run("reference").dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert p.run("reference").dtype == torch.float32


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_compiled_eval_equals_eager(op: str, backend: str) -> None:
    call = Call(small(op, layout="nhwc"), backend)
    x = torch.randn_like(call.x)
    with torch.no_grad():
        expected = call(x)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        y = compiled(x)
    assert torch.equal(y, expected) and y.stride() == expected.stride()


@pytest.mark.parametrize("op", OPS)
def test_compiled_training_equals_eager(op: str) -> None:
    p = small(op, batch_stats=True)
    ours, stock = Call(p), Call(p)
    x = torch.randn_like(p.x)
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    z = stock(x)
    assert torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(ours.named_buffers(), stock.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_inductor_runs_the_op_and_its_training() -> None:
    p = small("bottleneck", h=8, w=8)
    call, x = Call(p), torch.randn_like(p.x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), call(x))
    train = Call(small("conv_bn_act", batch_stats=True))
    twin = Call(train.problem)
    x = torch.randn_like(train.problem.x)
    torch.compile(train, fullgraph=True)(x).sum().backward()
    twin(x).sum().backward()
    torch.testing.assert_close(train.weight0.grad, twin.weight0.grad)
    torch.testing.assert_close(train.mean0, twin.mean0)


@pytest.mark.parametrize("op", OPS)
def test_export_keeps_one_op_and_a_dynamic_batch(op: str) -> None:
    call = Call(small(op, n=3))
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(call, (call.problem.x,), dynamic_shapes={"x": {0: batch}})
        x = torch.randn(5, *call.problem.x.shape[1:])
        assert torch.equal(program.module()(x), call(x))
    assert sum(f"resnet_fast.{op}" in str(n.target) for n in program.graph.nodes) == 1


def _scripted(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return torch.ops.resnet_fast.conv_bn_act(
        x, weight, None, [1, 1], [1, 1], [1, 1], 1, gamma, beta, mean, var, False, 0.1, 1e-3, True
    )


def test_torchscript_calls_the_op() -> None:
    p = small("conv_bn_act")
    script = torch.jit.script(_scripted)
    tensors = [p.tensors()[k] for k in ("x", "weight0", "gamma0", "beta0", "mean0", "var0")]
    assert torch.equal(script(*tensors), p.run())


def test_trailing_defaults_may_be_left_out() -> None:
    p = small("conv_bn_act")
    op = torch.ops.resnet_fast.conv_bn_act
    expected = p.run("reference")
    assert torch.equal(op(*p.args()[:-1], backend="reference"), expected)
    assert torch.equal(op(*p.args()[:-1], residual=None, backend="reference"), expected)
    q = small("conv_bn_act", residual=True)
    assert torch.equal(op(*q.args()[:-1], residual=q.residual, backend="reference"), q.eager())
