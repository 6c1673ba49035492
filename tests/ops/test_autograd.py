"""Derivatives through the ops: gradcheck, double backward, forward mode, torch.func, and leaves without gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.support.op_cases import OPS, Problem, make

TINY: dict[str, Any] = {"n": 2, "h": 3, "w": 4, "ci": 2, "co": 2, "dtype": torch.float64}


def function(p: Problem) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the op as a function of its leaves, and the leaves."""
    names = list(p.leaves())

    def fn(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        return p.map(lambda k, t: given.get(k, t)).run("auto")

    return fn, tuple(t.detach().clone().requires_grad_() for t in p.leaves().values())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch_stats", [False, True])
def test_gradcheck_with_forward_mode(op: str, batch_stats: bool) -> None:
    fn, leaves = function(make(op, batch_stats=batch_stats, tracked=not batch_stats, residual=op != "stem", **TINY))
    assert gradcheck(fn, leaves, check_forward_ad=True)


@pytest.mark.parametrize("op", ["conv_bn_act", "stem"])
def test_double_backward(op: str) -> None:
    fn, leaves = function(make(op, batch_stats=True, tracked=False, **TINY))
    assert gradgradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize("op", ["bottleneck", "basic_block"])
def test_double_backward_of_a_block_equals_eager(op: str) -> None:
    p = make(op, stride=2, batch_stats=True, **TINY)

    def second(q: Problem, y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), list(q.leaves().values()), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), list(q.leaves().values())))

    ours, stock = p.copy(grad=True), p.copy(grad=True)
    for a, b in zip(second(ours, ours.run()), second(stock, stock.eager()), strict=True):
        assert torch.equal(a, b)


def tangent(p: Problem, run: Any) -> Tensor | None:
    with forward_ad.dual_level():
        dual = p.map(lambda k, t: forward_ad.make_dual(t, torch.ones_like(t)) if k == "x" else t)
        return forward_ad.unpack_dual(run(dual)).tangent


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_is_not_lost(op: str, grad_mode: bool) -> None:
    p = make(op, ci=4, co=4)
    with torch.set_grad_enabled(grad_mode):
        ours, stock = tangent(p, lambda q: q.run()), tangent(p, lambda q: q.eager())
    assert ours is not None and torch.equal(ours, stock) and ours.abs().sum() > 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_func_jvp_equals_eager(op: str, grad_mode: bool) -> None:
    p = make(op, ci=4, co=4)

    def jvp(run: Any) -> Tensor:
        with torch.set_grad_enabled(grad_mode):
            return torch.func.jvp(
                lambda x: run(p.map(lambda k, t: x if k == "x" else t)), (p.x,), (torch.ones_like(p.x),)
            )[1]

    assert torch.equal(jvp(lambda q: q.run()), jvp(lambda q: q.eager()))


@pytest.mark.parametrize("op", OPS)
def test_func_grad_and_vjp_equal_eager(op: str) -> None:
    p = make(op, ci=4, co=4)

    def grad(run: Any) -> Tensor:
        return torch.func.grad(lambda x: run(p.map(lambda k, t: x if k == "x" else t)).square().sum())(p.x)

    assert torch.equal(grad(lambda q: q.run()), grad(lambda q: q.eager()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", OPS)
def test_vmap_over_inputs_is_right_or_says_why_not(op: str) -> None:
    p = make(op, ci=4, co=4)
    xs = torch.stack([p.x, p.x + 1, p.x * 2])

    def one(x: Tensor) -> Tensor:
        return p.map(lambda k, t: x if k == "x" else t).run("reference")

    expected = torch.stack([one(x) for x in xs])
    if op in ("bottleneck", "basic_block"):
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.func.vmap(one)(xs)
    else:
        assert torch.equal(torch.func.vmap(one)(xs), expected)


@pytest.mark.parametrize("op", OPS)
def test_no_graph_is_built_where_none_is_needed(op: str) -> None:
    p = make(op).copy(grad=True)
    with torch.no_grad():
        assert not p.run().requires_grad
    with torch.inference_mode():
        assert p.run().is_inference()
    assert p.run().grad_fn is not None
    assert make(op).run().grad_fn is None


@pytest.mark.parametrize("op", OPS)
def test_batch_statistics_are_updated_without_a_graph(op: str) -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        p = make(op, batch_stats=True)
        ours, stock = p.copy(), p.copy()
        with context:
            assert torch.equal(ours.run(), stock.eager())
        for a, b, before in zip(
            ours.statistics().values(), stock.statistics().values(), p.statistics().values(), strict=True
        ):
            assert torch.equal(a, b) and not torch.equal(a, before)
