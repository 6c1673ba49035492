"""Launches that split their K steps over programs: the sum, its order, the counters, and a net that shares them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_fast import numerics
from resnet_fast.backends.triton import conv_bn_act_1x1, conv_bn_act_3x3, launch, launchers, net, plan
from resnet_fast.backends.triton.problem import problem
from resnet_fast.calls import Call, Conv, NetCall, Norm
from resnet_fast.ops.specs import spec_of
from resnet_fast.spec import LaunchSpec
from resnet_fast.tuning import configs
from resnet_fast.tuning.configs import Config
from tests.support.launch_cases import ADD, conv

pytestmark = pytest.mark.interpret

CASES = {
    "conv_bn_act_1x1": (conv(200, 72, 1, epilogue=ADD), Config("conv_bn_act_1x1", 32, 64, 32, 4, 2)),
    "conv_bn_act_3x3": (conv(40, 72, 3, epilogue=ADD), Config("conv_bn_act_3x3", 32, 64, 32, 4, 2)),
}


def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the memory of the partial sums begin as NaN."""
    plain = launch.partial_sums

    def partial_sums(*args):
        found = plain(*args)
        return found if found is None else found.fill_(float("nan"))

    monkeypatch.setattr(conv_bn_act_1x1, "partial_sums", partial_sums)
    monkeypatch.setattr(conv_bn_act_3x3, "partial_sums", partial_sums)


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("kernel", CASES)
def test_the_splits_add_up_and_leave_the_counters_zero(
    kernel: str, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poisoned(monkeypatch)
    spec, config = CASES[kernel]
    one, config = LaunchSpec(kernel, (spec,)), replace(config, splits=splits)
    given = problem(one)
    counters = launch.arrivals([(one, config)], given.x)
    assert counters is not None and not counters.any()
    runs = [
        launchers.LAUNCHERS[kernel](one, config, given.packed(config), given.x, given.residual, None, arrivals=counters)
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert not counters.any()
    wide = given.to(torch.float64)
    numerics.assert_close(runs[0], wide.eager(), given.eager(), spec.gemm_k, wide.eager(relu=False))


def test_steps_are_shared_evenly_and_each_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ones times ones count the products, and 8 splits of 7 steps leave one split without any."""
    spec = conv(224, 64, 1).with_(epilogue=conv(1, 1, 1).epilogue)
    one = LaunchSpec("conv_bn_act_1x1", (spec,))
    given = problem(one)
    given.x.fill_(1), given.weights[0].fill_(1), given.biases[0].zero_()
    for splits in (2, 7, 8):
        assert given.run(Config("conv_bn_act_1x1", 32, 64, 32, 4, 2, splits=splits)).eq(224).all()


def test_counters_serve_the_largest_of_several_launches() -> None:
    small, large = (LaunchSpec("conv_bn_act_1x1", (conv(64, 64, 1, n=n),)) for n in (1, 40))
    config = Config("conv_bn_act_1x1", 32, 64, 32, 4, 2, splits=2)
    x = torch.empty(0)
    counters = launch.arrivals([(small, config), (large, config)], x)
    assert counters is not None and counters.numel() >= configs.tiles(large, config) == 79
    assert launch.arrivals([(small, replace(config, splits=1))], x) is None


def test_a_net_whose_launches_split_equals_one_whose_launches_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts of a net share the counters of one call."""
    torch.manual_seed(0)

    def part(ci: int, co: int, k: int) -> Call:
        weight = torch.randn(co, ci, k, k, dtype=torch.float16) / (ci * k * k) ** 0.5
        numbers = ((1, 1), (k // 2, k // 2), (1, 1), 1)
        norm = Norm(torch.rand(co), torch.randn(co), torch.randn(co), torch.rand(co) + 0.5, False, 0.1, 1e-5)
        return Call("conv_bn_act", torch.empty(0), (Conv(weight, None, *numbers),), (norm,))

    x = torch.randn(2, 64, 5, 5, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    call = NetCall(x, (part(64, 128, 1), part(128, 64, 3), part(64, 96, 1)))
    spec = spec_of(call, grad=False)
    submit, launched = launch.submit, []
    monkeypatch.setattr(
        launch, "submit", lambda kernel, *given, **more: launched.append(kernel) or submit(kernel, *given, **more)
    )
    outputs = []
    for splits in (1, 2):
        states = [_retiled(state, splits) for state in net.prepare(call, spec, [])]
        outputs.append(net.run(call, spec, states).double())
    assert launched == [launch._zero_kernel]  # one fill, for the net that splits
    # three roundings to fp16, each of 2^-11 at most
    assert (outputs[1] - outputs[0]).norm() < 3 * 2**-11 * outputs[0].norm()


def _retiled(state: plan.TritonState, splits: int) -> plan.TritonState:
    tiles = {"block_m": 32, "block_n": 64, "block_k": 32, "splits": splits}
    steps = [step._replace(config=replace(step.config, **tiles)) for step in state.launches]
    return replace(state, launches=tuple(steps))
