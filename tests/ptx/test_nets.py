"""Small nets on kernels as compiled for sm_80 and sm_90: a few steps of training, and inference of a whole net.

A trajectory is compared with the one in float64 and with eager's own. What differs is the distance that the net moved:
the parameters less those that it started with. Rounding flips some ReLUs, in ours and in eager's, so all parameters are
judged together, by the error that eager's have.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from resnet_fast import accelerate, explain, native, numerics, use_backend
from resnet_fast.backends.triton import submission
from resnet_fast.backends.triton.training import chain
from resnet_fast.tools.ptx_machine import ptx_machine
from tests.support import nets, train_nets
from tests.support.nets import assert_equal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason),
]

STEPS = 4


class Trained(NamedTuple):
    """A run: the loss of each step, and all parameters and running statistics less those at its start."""

    losses: Tensor
    moved: Tensor


def train(net: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype) -> Trained:
    """Train ``net`` for a few steps: in autocast to a 16-bit ``dtype``, with scaled gradients in float16.

    By SGD: Adam divides a gradient by its size, so that where the true one is 0, as before a norm on batch statistics,
    errors of rounding take whole steps, in eager's run as in ours.
    """
    state = [t for t in net.state_dict().values() if t.is_floating_point()]
    before = [t.clone() for t in state]
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", 2.0**10, enabled=dtype == torch.float16)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
            out = net(x)
        loss = train_nets.loss_of(out, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    assert not scaler.is_enabled() or scaler.get_scale() == 2.0**10, "no step was skipped"
    moved = [(now - then).flatten() for now, then in zip(state, before, strict=True)]
    return Trained(torch.stack(losses), torch.cat(moved))


@pytest.mark.parametrize(
    ("kind", "dtype", "arch"),
    [
        ("bottleneck", torch.bfloat16, 80),
        ("basic", torch.float16, 90),
        ("cifar", torch.float32, 80),
        ("cifar", torch.bfloat16, 90),
        ("cifar", torch.float16, 80),
        ("bottleneck", torch.float32, 90),
    ],
)
def test_a_net_trains_as_eager_does(kind: str, dtype: torch.dtype, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "_plans", {})  # earlier tests of this process may have submitted in another way
    net, x = train_nets.build(kind), torch.randn(3, 3, 13, 11)
    labels = torch.arange(3) % train_nets.CLASSES
    exact = train(copy.deepcopy(net).double(), x.double(), labels, torch.float64)
    eager = train(copy.deepcopy(net), x, labels, dtype)
    runs = []
    for seed in (1, 2):
        with ptx_machine(arch, seed=seed) as machine:
            fused = train_nets.twin(copy.deepcopy(net))
            runs.append(train(fused, x, labels, dtype))
            assert {way for plan in chain._plans.values() for way in plan.passes.ways} == {submission.NATIVELY}
        assert len(machine.launches) > 10 * STEPS
    assert_equal(*runs)
    (ours, _) = runs
    allowed = math.sqrt(STEPS) * numerics.floor(dtype, 4608)
    for what in Trained._fields:
        report = numerics.compare(*(getattr(run, what).double() for run in (ours, exact, eager)))
        assert not report.mismatched, f"{what}: {report}"
        assert report.rel <= numerics.FACTOR * report.eager_rel + allowed, f"{what}: {report}"
    assert ours.losses[-1] < ours.losses[0] and bool(ours.losses.isfinite().all())


@pytest.mark.parametrize(("dtype", "arch"), [(torch.bfloat16, 80), (torch.float16, 90)])
def test_a_whole_net_infers_as_eager_does(dtype: torch.dtype, arch: int) -> None:
    net = nets.basic().eval().to(dtype, memory_format=torch.channels_last)
    x = torch.randn(3, 3, 37, 33).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        eager, exact = net(x), copy.deepcopy(net).double()(x.double())
        found = []
        for seed in (1, 2):
            with ptx_machine(arch, seed=seed), use_backend("triton"):
                fused = accelerate(copy.deepcopy(net))
                found.append(fused(x))
                assert {row.backend for row in explain(fused, x).rows} == {"triton"}
    assert_equal(*found)
    numerics.assert_close(found[0], exact, eager, 4608)
