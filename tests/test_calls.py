"""Call records: their tensors and numbers, and that nobody asks for a type of call or spec where a property answers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import resnet_fast
from resnet_fast.calls import Call, Conv, NetCall, Norm, Pool
from resnet_fast.ops.specs import check
from tests.support.op_cases import OPS, make

KINDS = {"Call", "NetCall", "ConvSpec", "BlockSpec", "NetSpec", "LaunchSpec", "Spec"}


def test_types_of_calls_and_specs_are_hardly_asked_for() -> None:
    found = []
    for path in Path(resnet_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                found += [f"{path.name}:{node.lineno}"] if names & KINDS else []
    assert len(found) < 3, found


def call_of(op: str, residual: bool = False) -> Call:
    p = make(op, bias=True, residual=residual)
    pool = Pool(*p.pool) if op == "stem" else None
    return Call(op, p.x, p.convs, p.norms, p.residual, p.relu, pool, p.projection)


@pytest.mark.parametrize("op", OPS)
def test_leaves_are_everything_that_can_have_a_gradient(op: str) -> None:
    call = call_of(op)
    leaves = call.leaves()
    without = [n._replace(mean=None, var=None) for n in call.norms]
    same = call.with_leaves(leaves)
    assert len(leaves) == 2 + 4 * len(call.convs)
    assert all(a is b for a, b in zip(same.leaves(), leaves, strict=True))
    assert same.numbers() == call.numbers() and [n.tensors()[2:] for n in same.norms] == [(None, None)] * len(without)
    marked = call.with_leaves(range(len(leaves)))
    assert (marked.x, marked.added) == (0, 1) and marked.convs[0].weight == 2
    assert marked.norms[-1].bias == len(leaves) - 1
    statistics = [t for n in call.norms for t in (n.mean, n.var)]
    assert {id(t) for t in call.tensors()} == {id(t) for t in (*leaves, *statistics) if t is not None}


@pytest.mark.parametrize("op", OPS)
def test_calls_and_specs_have_one_form(op: str) -> None:
    call = call_of(op, residual=op == "conv_bn_act")
    spec = check(call)
    assert call.parts == (call,) and spec.parts == (spec,)
    assert len(spec.convs) == len(call.convs) and len(spec.main) == len(call.main())
    assert (spec.projection is not None) == call.projection and spec.pool == call.pool
    shortcuts = {"conv_bn_act": "given", "stem": "none"}
    assert spec.shortcut == shortcuts.get(op, "projection" if call.projection else "identity")


def test_a_call_with_other_numbers_is_another_problem() -> None:
    weight, norm = torch.ones(4, 4, 1, 1), Norm(torch.ones(4))
    conv = Conv(weight, None, (1, 1), (0, 0), (1, 1), 1)
    call = Call("conv_bn_act", torch.ones(1, 4, 2, 2), (conv,), (norm,))
    others = [
        call._replace(relu=False),
        call._replace(pool=Pool(3, 2, 1)),
        call._replace(projection=True),
        call._replace(op="stem"),
        call._replace(added=torch.ones(1)),
        call._replace(convs=(conv._replace(groups=2),)),
        call._replace(norms=(norm._replace(eps=1.0),)),
    ]
    assert len({c.numbers() for c in (call, *others)}) == len(others) + 1
    assert NetCall(call.x, (call,)).numbers() != call.numbers()


def test_batch_statistics_are_shared_by_the_norms_that_use_them() -> None:
    call = call_of("bottleneck")
    call = call._replace(norms=(call.norms[0]._replace(batch_stats=True), *call.norms[1:]))
    synced = call.with_sync("group")
    assert call.batch_stats and (call.sync, synced.sync) == ("", "group")
    assert [n.sync for n in synced.norms] == ["group", *[""] * (len(call.norms) - 1)]
