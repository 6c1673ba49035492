"""Which kernels of the cuda backend run a problem, and the reason when none does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from resnet_fast import native
from resnet_fast.backends import cuda
from resnet_fast.backends.cuda import bottleneck, conv_bn_act, plan, stem
from resnet_fast.spec import BlockSpec, ConvSpec, Epilogue
from resnet_fast.tuning import shapes

H100, A100, RTX = 227 << 10, 163 << 10, 99 << 10


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    """Return the emulator's module, which knows how much shared memory each kernel takes."""
    if not native.emulator_status():
        pytest.skip(native.emulator_status().reason)
    yield


def blocks(net: str, dtype: str = "bfloat16") -> dict[str, BlockSpec]:
    return shapes.blocks(net, 2, dtype=dtype)


@pytest.mark.parametrize(
    ("block", "shared", "whole"),
    [
        ("r50.layer1.0", H100, True),
        ("r50.layer1.1", H100, True),
        ("r50.layer1.1", A100, True),
        ("r50.layer1.1", RTX, False),
        ("r50.layer2.0", H100, False),
        ("r50.layer2.1", H100, True),
        ("r50.layer2.1", A100, True),
        ("r50.layer3.1", H100, False),
    ],
)
def test_blocks_that_one_launch_runs(block: str, shared: int, whole: bool) -> None:
    verdict = bottleneck.verdict(blocks("resnet50")[block], shared, streamed=True)
    assert bool(verdict) == whole
    assert whole or (verdict.reason.startswith("expected ") and verdict.reason.endswith("run one by one"))


def test_weights_that_do_not_stay_on_chip_are_predicted_to_be_slower() -> None:
    verdict = bottleneck.verdict(blocks("resnet50")["r50.layer2.1"], H100)
    assert not verdict and "expected 64 channels between, whose weights stay on chip, got 128" in verdict.reason


def test_reasons_name_what_is_in_the_way() -> None:
    spec = blocks("resnet50")["r50.layer1.1"]
    assert "shared memory per block, got a GPU with 101,376" in bottleneck.verdict(spec, RTX).reason
    assert "channels between and out" in bottleneck.verdict(blocks("resnet50")["r50.layer3.1"], H100).reason
    assert "of stride 1" in bottleneck.verdict(blocks("resnet50")["r50.layer2.0"], H100).reason
    given = BlockSpec(spec.op, spec.convs, "given")
    assert "got a tensor" in bottleneck.verdict(given, H100).reason
    basic = blocks("resnet18")["r18.layer1.0"]
    assert "expected a bottleneck, got basic_block" in bottleneck.verdict(basic, H100).reason


@pytest.mark.parametrize("net", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_every_part_of_a_net_is_accepted_in_16_bit(net: str) -> None:
    parts = [shapes.problems(net, 2, dtype="float16")[f"{next(iter(blocks(net))).split('.')[0]}.conv1"]]
    for part in [*parts, *blocks(net, "float16").values()]:
        assert plan.verdict(part), part


def conv(**changes: object) -> ConvSpec:
    plain = ConvSpec(n=1, h=8, w=8, ci=64, co=64, r=3, s=3, stride=(1, 1), padding=(1, 1), dtype="bfloat16")
    return plain.with_(**changes)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (conv(dtype="float32"), "expected one of"),
        (conv(groups=2), "without groups, got 2 groups"),
        (conv(ci=20), "multiples of 8"),
        (conv(grad=True), "without autograd"),
        (conv(batch_stats=True), "running statistics"),
    ],
    ids=["dtype", "groups", "channels", "autograd", "statistics"],
)
def test_convolutions_that_are_refused(spec: ConvSpec, reason: str) -> None:
    assert reason in cuda._supports(spec).reason


def test_other_stems_are_refused() -> None:
    pool = Epilogue(relu=True, pool=(3, 2, 1))
    wide = conv(ci=3, co=32, r=7, s=7, stride=(2, 2), padding=(3, 3), epilogue=pool)
    assert "expected a 7x7 stride 2" in stem.verdict(wide).reason
    assert stem.verdict(wide.with_(co=64))


def test_packed_weights_are_the_convolutions_in_steps_of_64() -> None:
    """Each step is (Cmid, 64): conv1's, conv2's nine taps, then conv3's and the projection's for each Cmid of Co."""
    w1, w2 = torch.randn(64, 128, 1, 1), torch.randn(64, 64, 3, 3)
    w3, wp = torch.randn(256, 64, 1, 1), torch.randn(256, 128, 1, 1)
    zero = torch.zeros(64)
    packed = bottleneck.pack(
        [(w1, zero), (w2, zero), (w3, torch.zeros(256)), (wp, torch.ones(256))], True, torch.float32
    )
    assert packed.weights.shape == (2 + 9 + 4 * 3, 64, 64)
    assert torch.equal(packed.weights[1], w1[:, 64:, 0, 0])
    assert torch.equal(packed.weights[2 + 5], w2[:, :, 1, 2])
    assert torch.equal(packed.weights[11 + 3], w3[64:128, :, 0, 0])
    assert torch.equal(packed.weights[11 + 3 + 2], wp[64:128, 64:, 0, 0])
    assert torch.equal(packed.bias3, torch.ones(256))


def test_a_padded_1x1_is_the_general_kernels() -> None:
    assert conv_bn_act.kernel(conv(r=1, s=1, padding=(0, 0))) == "conv_bn_act_1x1"
    assert conv_bn_act.kernel(conv(r=1, s=1, padding=(1, 1))) == "conv_bn_act"
