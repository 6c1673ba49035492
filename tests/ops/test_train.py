"""Training ops on our kernels: fakes, compilers, autograd's other modes, autocast, strides, refusals."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._prims_common import check_significant_strides
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torchvision.models.resnet import BasicBlock
from triton.runtime import interpreter

from resnet_fast import BackendError, UserError, accelerate, explain, use_backend
from tests.support import train_cases
from tests.support.op_cases import OPS, Call, Problem
from tests.support.train_cases import fused, same, step

pytestmark = pytest.mark.interpret


def case(op: str, dtype: torch.dtype = torch.float32, **options: Any) -> Problem:
    """Return a smaller problem than those of the numerical tests."""
    return train_cases.case(op, dtype, **{"h": 4, "w": 3, "ci": 16, "co": 16 if op == "basic_block" else 8, **options})


@pytest.mark.parametrize("autocast", [False, True])
def test_a_warm_step_is_looked_up_once(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager step goes past the dispatcher, also in autocast, and a warm one is looked up once.

    The interpreter's own calls would be a million of those that are counted: launches do nothing here.
    """
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **kwargs: None)
    block, x = accelerate(BasicBlock(16, 16), backend="triton"), torch.randn(2, 16, 4, 4).requires_grad_()
    counts: Counter[str] = Counter()

    def count(frame: Any, event: str, arg: Any) -> None:
        files = [f.f_code.co_filename for f in (frame, frame.f_back)]  # not what a backend calls
        if event == "call" and "/resnet_fast/" in files[0] and not any("/backends/" in file for file in files):
            counts[frame.f_code.co_name] += 1

    def one() -> None:
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            y = block(x)
        y.float().sum().backward()

    one()
    sys.setprofile(count)
    try:
        one()
    finally:
        sys.setprofile(None)
    assert counts["key_of"] == 1
    assert counts["spec_of"] == counts["choose"] == counts["bind"] == counts["_flatten"] == 0
    assert counts["leaves"] == 1
    assert counts["with_leaves"] <= 2


def train_op(p: Problem) -> Any:
    return getattr(torch.ops.resnet_fast, f"{p.op}_train").default


def backward_op(p: Problem) -> Any:
    return getattr(torch.ops.resnet_fast, f"{p.op}_backward").default


def needs(p: Problem) -> list[bool]:
    """Return which leaves exist."""
    leaves = p.leaves()
    count = len(p.convs)
    per_conv = [[f"{name}{i}" in leaves for i in range(count)] for name in ("weight", "bias")]
    per_norm = [[f"{name}{i}" in leaves for i in range(len(p.norms))] for name in ("gamma", "beta")]
    return ["x" in leaves, "residual" in leaves, *(n for group in (*per_conv, *per_norm) for n in group)]


def assert_like(fake: Tensor, real: Tensor) -> None:
    assert fake.shape == real.shape and fake.dtype == real.dtype and fake.device == real.device
    assert check_significant_strides(fake, real, only_cuda=False)[0], (fake.shape, fake.stride(), real.stride())


FAKES: dict[str, dict[str, Any]] = {
    "float16": {"dtype": torch.float16},
    "float32_nchw": {"layout": "nchw"},
    "recompute": {"dtype": torch.float16, "save": "recompute", "bias": True},
    "frozen": {"dtype": torch.float16, "batch_stats": False},
}


@pytest.mark.parametrize(
    "op,name",
    [
        *((op, "float16") for op in OPS),
        ("basic_block", "recompute"),
        ("conv_bn_act", "float32_nchw"),
        ("bottleneck", "frozen"),
        ("stem", "frozen"),
    ],
)
def test_fake_outputs_are_like_the_real_ones(op: str, name: str) -> None:
    options = dict(FAKES[name])
    save = options.pop("save", "raw")
    p = case(op, **options, stride=2 if op == "bottleneck" else 1)
    options = ("triton", save)
    y, saved = train_op(p)(*p.args(), *options)
    dy = train_cases.cotangent(y)
    grads = backward_op(p)(dy, y, saved, *p.args(), *options, needs=needs(p))
    assert [g.numel() > 0 for g in grads] == needs(p)
    with FakeTensorMode() as mode:
        q = p.map(lambda k, t: mode.from_tensor(t))
        fake_y, fake_saved = train_op(p)(*q.args(), *options)
        fakes = [mode.from_tensor(t) for t in (dy, y)]
        fake_grads = backward_op(p)(*fakes, [mode.from_tensor(t) for t in saved], *q.args(), *options, needs=needs(p))
    for fake, real in zip([fake_y, *fake_saved, *fake_grads], [y, *saved, *grads], strict=True):
        assert_like(fake, real)


FROZEN = [("bottleneck", True), ("conv_bn_act", True), ("bottleneck", False)]
"""An op and whether its norms use batch statistics."""


@pytest.mark.parametrize("op,batch_stats", FROZEN)
def test_opcheck(op: str, batch_stats: bool) -> None:
    p = case(op, batch_stats=batch_stats)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(train_op(p), (*p.copy(grad=True).args(), "triton"), test_utils=tests)
    y, saved = train_op(p)(*p.args(), "triton")
    args = (train_cases.cotangent(y), y, saved, *p.args(), "triton")
    torch.library.opcheck(backward_op(p), args, {"needs": needs(p)}, test_utils=tests)


@pytest.mark.parametrize("op,batch_stats", FROZEN)
def test_compiled_training_equals_eager(op: str, batch_stats: bool) -> None:
    torch._dynamo.reset()
    p = case(op, torch.float16, batch_stats=batch_stats)
    ours, compiled = Call(p, "triton"), Call(p, "triton")
    counter = CompileCounterWithBackend("aot_eager")

    def run(call: Callable[[Tensor], Tensor], module: Call) -> dict[str, Tensor]:
        x = p.x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = call(x)
        y.backward(train_cases.cotangent(y))
        grads = {name: t.grad for name, t in module.named_parameters() if t.grad is not None}
        return {"y": y.detach(), "grad x": x.grad, **grads, **dict(module.named_buffers())}

    same(run(torch.compile(compiled, fullgraph=True, backend=counter), compiled), run(ours, ours))
    assert counter.frame_count == 1
    assert any(f"resnet_fast.{op}" in str(n.target) for g in counter.graphs for n in g.graph.nodes)


@pytest.mark.parametrize(
    "op,batch_stats", [("bottleneck", True), ("stem", True), ("conv_bn_act", True), ("basic_block", False)]
)
def test_a_derivative_in_a_graph_is_the_same_and_goes_no_further(op: str, batch_stats: bool) -> None:
    p = case(op, batch_stats=batch_stats)
    expected = step(p, fused)
    q = p.copy(grad=True)
    y = fused(q)
    leaves = q.leaves()
    dy = train_cases.cotangent(y).requires_grad_()
    grads = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=True)
    for name, g in zip(leaves, grads, strict=True):
        assert torch.equal(g, expected[f"grad {name}"]), name
    with pytest.raises(BackendError, match=r"double backward.*use_backend\('reference'\)"):
        sum(g.sum() for g in grads).backward()


def test_the_reference_differentiates_twice_where_ours_does_not() -> None:
    q = case("conv_bn_act").copy(grad=True)
    with use_backend("reference"):
        (g,) = torch.autograd.grad(fused(q).square().sum(), [q.x], create_graph=True)
        g.square().sum().backward()
    assert q.convs[0].weight.grad is not None


@pytest.mark.parametrize("op,batch_stats", [*((op, True) for op in OPS), ("basic_block", False)])
def test_forward_mode_raises(op: str, batch_stats: bool) -> None:
    p = case(op, batch_stats=batch_stats)
    with forward_ad.dual_level():
        dual = p.map(lambda k, t: forward_ad.make_dual(t, torch.ones_like(t)) if k == "x" else t)
        with pytest.raises(BackendError, match=r"forward-mode.*use_backend\('reference'\)"):
            fused(dual)
        with use_backend("reference"):
            assert forward_ad.unpack_dual(fused(dual)).tangent is not None


@pytest.mark.parametrize("op", ["bottleneck", "conv_bn_act"])
def test_without_autograd_the_same_is_computed(op: str) -> None:
    p = case(op, torch.float16)
    expected = step(p, fused)
    for context in (torch.no_grad, torch.inference_mode):
        q = p.copy()
        with context():
            y = fused(q)
        assert not y.requires_grad and y.is_inference() == (context is torch.inference_mode)
        same({"y": y, **q.statistics()}, {k: expected[k] for k in ("y", *q.statistics())})
    assert all(not torch.equal(t, p.tensors()[name]) for name, t in q.statistics().items())


def test_running_statistics_of_inference_tensors_are_updated() -> None:
    """Runs a net in training mode that was built in inference mode."""
    p = case("conv_bn_act")
    expected = step(p, fused)
    with torch.inference_mode():
        q = p.copy()
        fused(q)
    assert torch.equal(q.statistics()["mean0"], expected["mean0"])


@pytest.mark.parametrize("options", [{"tracked": False}, {"batch_stats": False}], ids=["trained", "frozen"])
def test_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    p = case("basic_block", torch.float16, **options)
    same(step(p, fused), step(p, lambda q: checkpoint(lambda x: fused(q), q.x, use_reentrant=False)))


def test_a_whole_recomputation_updates_running_statistics_as_torch_does() -> None:
    """They are updated a second time. By default a recomputation ends at the last saved tensor, before our update."""
    p = case("conv_bn_act")

    def under(run: Callable[[Problem], Tensor]) -> dict[str, Tensor]:
        with set_checkpoint_early_stop(False):
            return step(p, lambda q: checkpoint(lambda x: run(q), q.x, use_reentrant=False))

    ours, torchs = under(fused), under(lambda q: q.eager())
    for name in torchs:
        torch.testing.assert_close(ours[name], torchs[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "op,dtype,batch_stats",
    [
        ("basic_block", torch.float16, True),
        ("conv_bn_act", torch.bfloat16, True),
        ("basic_block", torch.bfloat16, False),
    ],
)
def test_autocast_keeps_fp32_parameters_and_gradients(op: str, dtype: torch.dtype, batch_stats: bool) -> None:
    p = case(op, batch_stats=batch_stats)
    q = p.copy(grad=True)
    with torch.autocast("cpu", dtype):
        y = fused(q)
    assert y.dtype == dtype
    y.backward(train_cases.cotangent(y))
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in q.leaves().values())
    assert all(t.dtype == torch.float32 for t in q.statistics().values())
    narrow = step(p.map(lambda k, t: t.to(dtype) if k == "x" else t), fused)
    same({"y": y.detach()}, {"y": narrow["y"]})
    for name, t in q.leaves().items():
        assert torch.equal(t.grad, narrow[f"grad {name}"].float()), name


@pytest.mark.parametrize("op", ["basic_block", "conv_bn_act"])
def test_a_scaled_loss_scales_the_gradients(op: str) -> None:
    """GradScaler relies on it: backward is linear, and a power of two commutes with every rounding."""
    p = case(op)
    dy = train_cases.cotangent(p.eager())
    one, scaled = step(p, fused, dy=dy), step(p, fused, dy=dy * 1024)
    for name, t in one.items():
        assert torch.equal(scaled[name], t * 1024 if name.startswith("grad") else t), name


def test_an_overflow_of_the_scaled_loss_shows() -> None:
    """GradScaler skips a step when it finds infinities."""
    p = case("conv_bn_act", torch.float16)
    p.convs[0].weight.mul_(256)
    p.norms[0].var.fill_(1.0)
    p = train_cases.replace(p, norms=(p.norms[0]._replace(batch_stats=False),))
    dy = torch.full_like(p.to(torch.float64).eager(), 6e4)
    for run in (fused, train_cases.stock):
        assert not step(p, run, dy=dy)["grad x"].isfinite().all()


def test_saved_tensor_hooks_see_what_is_saved() -> None:
    p = case("bottleneck", torch.float16)
    expected = step(p, fused)
    seen: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        seen.append(tuple(t.shape))
        return t.detach().clone()

    def unpack(t: Tensor) -> Tensor:
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = step(p, fused)
    same(found, expected)
    n, h, w = p.x.shape[0], *p.x.shape[2:]
    for conv in p.convs:
        assert (n, conv.weight.shape[0], h, w) in seen and tuple(conv.weight.shape) in seen
    assert tuple(p.x.shape) in seen and (10, p.convs[0].weight.shape[0]) in seen


def test_a_profiler_shows_both_passes() -> None:
    p = case("basic_block")
    expected = step(p, fused)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        found = step(p, fused)
    same(found, expected)
    names = {event.key for event in seen.key_averages()}
    assert {"resnet_fast::basic_block_train", "resnet_fast::basic_block_backward"} <= names


@pytest.mark.parametrize("op", ["bottleneck", "conv_bn_act"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
def test_strides_are_kept(op: str, layout: str) -> None:
    p = case(op, layout=layout, residual=op == "conv_bn_act")
    q, r = p.copy(grad=True), p.copy(grad=True)
    y, z = fused(q), r.eager()
    assert check_significant_strides(y, z, only_cuda=False)[0]
    y.backward(train_cases.cotangent(y))
    z.backward(train_cases.cotangent(z))
    for (name, a), b in zip(q.leaves().items(), r.leaves().values(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert check_significant_strides(a.grad, b.grad, only_cuda=False)[0], name
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)


def test_a_gradient_of_any_strides_is_taken() -> None:
    p = case("basic_block")
    dy = train_cases.cotangent(p.eager())
    expected = step(p, fused, dy=dy)
    same(step(p, fused, dy=dy.contiguous()), expected)
    one = dy[:, :1].expand_as(dy)  # stride 0, as the gradient of a sum
    same(step(p, fused, dy=one), step(p, fused, dy=one.clone()))


@pytest.mark.parametrize("grad", [True, False])
def test_an_output_may_be_changed_in_place(grad: bool) -> None:
    """The output is no view, so autograd allows ``y += head(y)``, even if a frozen net made y."""
    factor = torch.ones((), requires_grad=True)
    for op in OPS:
        p = case(op)
        with nullcontext() if grad else torch.no_grad():
            y = fused(p.copy(grad=grad))
        y.mul_(factor)
        assert y.requires_grad


def test_one_value_per_channel_is_refused_as_torch_does() -> None:
    p = train_cases.make("conv_bn_act", n=1, h=1, w=1, batch_stats=True)
    for run in (fused, lambda q: q.eager()):
        with pytest.raises(ValueError, match=r"more than (one|1) value per channel"):
            run(p)


@pytest.mark.parametrize("name", ["weight0", "gamma1", "mean2"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_tensor_on_another_device_is_refused(name: str, grad: bool) -> None:
    p = case("bottleneck", stride=2).copy(grad=grad)
    with pytest.raises(UserError, match="where x is"):
        fused(p.map(lambda k, t: t.detach().to("meta").requires_grad_(t.requires_grad) if k == name else t))


def test_float64_is_the_references() -> None:
    p = case("conv_bn_act").to(torch.float64).copy(grad=True)
    assert p.run("auto").dtype == torch.float64
    with pytest.raises(BackendError, match="expected one of float32, bfloat16, float16, got float64"):
        fused(p)


def test_an_empty_batch_is_refused_by_name_only() -> None:
    p = train_cases.make("conv_bn_act", n=0, batch_stats=True)
    with pytest.raises(BackendError, match="at least one element to train on"):
        fused(p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_explain_lists_the_configs_of_a_training_step(dtype: torch.dtype) -> None:
    net = accelerate(nn.Sequential(BasicBlock(16, 16)), backend="triton").train()
    before = {name: t.clone() for name, t in net.named_buffers()}
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        found = explain(net, torch.randn(2, 16, 4, 3))
    (row,) = found.rows
    assert (row.op, row.backend, row.layer) == ("basic_block", "triton", "0")
    assert row.detail.startswith("training, forward / dgrad / wgrad: ") and row.detail.count(" | ") == 1
    assert ("packed" in row.detail) == (dtype == torch.float16)
    assert row.detail in str(found)
    assert all(torch.equal(t, before[name]) for name, t in net.named_buffers())
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        (row,) = explain(net, torch.randn(2, 16, 4, 3)).rows
    assert row.detail.startswith("training with folded norms, forward conv: ")
