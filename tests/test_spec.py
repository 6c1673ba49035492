"""Problem descriptions against torch itself: sizes, operations, and which input pixels a convolution touches."""

from __future__ import annotations

import dataclasses
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from resnet_fast.spec import BlockSpec, ConvSpec, Epilogue, LaunchSpec, Verdict, conv_out


def _random_specs(count: int) -> list[ConvSpec]:
    rng = random.Random(0)
    specs: list[ConvSpec] = []
    while len(specs) < count:
        groups = rng.choice((1, 1, 2))
        spec = ConvSpec(
            *(rng.choice((1, 2)), rng.randint(1, 12), rng.randint(1, 12)),
            *(2 * groups, 3 * groups, rng.randint(1, 4), rng.randint(1, 4)),
            stride=(rng.randint(1, 5), rng.randint(1, 5)),
            padding=(rng.randint(0, 3), rng.randint(0, 3)),
            dilation=(rng.randint(1, 3), rng.randint(1, 3)),
            groups=groups,
        )
        if spec.ho >= 1 and spec.wo >= 1:
            specs.append(spec)
    return specs


@pytest.mark.parametrize("spec", _random_specs(40), ids=str)
def test_conv_sizes_operations_and_touched_bytes_are_torchs(spec: ConvSpec) -> None:
    x = torch.ones(spec.n, spec.ci, spec.h, spec.w, requires_grad=True)
    weight = torch.ones(spec.co, spec.ci // spec.groups, spec.r, spec.s)
    args = (spec.stride, spec.padding, spec.dilation, spec.groups)
    with FlopCounterMode(display=False) as counter:
        y = F.conv2d(x, weight, None, *args)
    assert y.shape == (spec.n, spec.co, spec.ho, spec.wo)
    assert counter.get_total_flops() == spec.flops() == 2 * spec.macs()
    assert spec.gemm_m * spec.gemm_n * spec.gemm_k * spec.groups == spec.macs()

    y.sum().backward()  # with ones everywhere, an input's gradient counts the windows that read it
    assert x.grad is not None
    elements = int(x.grad.count_nonzero()) + weight.numel() + y.numel()
    assert spec.with_(epilogue=Epilogue(norm=False)).min_bytes() == 4 * elements
    added = spec.with_(epilogue=Epilogue(norm=True, add=True))
    assert added.min_bytes() == 4 * (elements + y.numel()) + 2 * spec.co * 4


def test_stem_stores_the_pooled_output() -> None:
    stem = ConvSpec(2, 31, 45, 3, 8, 7, 7, (2, 2), (3, 3), epilogue=Epilogue(relu=True, pool=(3, 2, 1)))
    x = F.max_pool2d(F.conv2d(torch.zeros(2, 3, 31, 45), torch.zeros(8, 3, 7, 7), None, 2, 3), 3, 2, 1)
    assert stem.op == "stem"
    assert stem.out_hw() == tuple(x.shape[2:])
    unpooled = stem.with_(epilogue=Epilogue(relu=True))
    assert unpooled.op == "conv_bn_act"
    stored = 2 * 8 * (unpooled.ho * unpooled.wo) - x.numel()
    assert unpooled.min_bytes() - stem.min_bytes() == 4 * stored


def test_window_that_does_not_fit_has_no_output() -> None:
    assert conv_out(2, 3, 1, 0, 1) < 1
    assert conv_out(3, 3, 1, 0, 1) == 1


def test_params_count_filter_and_norm() -> None:
    bare = ConvSpec(1, 8, 8, 4, 6, 3, 3, groups=2, epilogue=Epilogue(norm=False))
    assert bare.params() == torch.nn.Conv2d(4, 6, 3, groups=2, bias=False).weight.numel()
    assert bare.with_(epilogue=Epilogue()).params() == bare.params() + 2 * 6


def test_half_precision_halves_activation_and_weight_bytes_only() -> None:
    full = ConvSpec(1, 8, 8, 4, 6, 3, 3, padding=(1, 1))
    norm = 2 * 6 * 4  # scale and shift stay float32
    assert (full.min_bytes() - norm) == 2 * (full.with_(dtype="bfloat16").min_bytes() - norm)


def test_specs_are_values() -> None:
    a, b = ConvSpec(1, 8, 8, 4, 6, 3, 3), ConvSpec(1, 8, 8, 4, 6, 3, 3)
    _ = a.ho  # a cached property must not enter equality, hash or pickle's result
    assert a == b and hash(a) == hash(b) and pickle.loads(pickle.dumps(a)) == b
    assert a != a.with_(grad=True) and a.with_(grad=True).ho == a.ho
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.n = 2  # type: ignore[misc]


def test_with_recomputes_sizes() -> None:
    spec = ConvSpec(1, 8, 8, 4, 6, 3, 3)
    assert (spec.ho, spec.with_(stride=(2, 2)).ho) == (6, 3)


def test_prints_on_one_line_what_distinguishes_it() -> None:
    spec = ConvSpec(2, 8, 9, 4, 6, 3, 3, (2, 1), (1, 2), (1, 3), 2, "bfloat16", "nchw", Epilogue(relu=True, add=True))
    assert str(spec) == "N2 8x9 4->6 3x3/2x1 p1x2 d1x3 g2 bn+add+relu bfloat16 nchw"
    assert str(spec.with_(batch_stats=True, grad=True)).endswith("nchw batch-stats grad")
    assert str(Epilogue(norm=False)) == "none"


def _block(shortcut: str) -> BlockSpec:
    c1 = ConvSpec(1, 8, 8, 4, 8, 3, 3, (2, 2), (1, 1), epilogue=Epilogue(relu=True))
    c2 = ConvSpec(1, 4, 4, 8, 8, 3, 3, padding=(1, 1), epilogue=Epilogue(relu=True, add=True))
    down = ConvSpec(1, 8, 8, 4, 8, 1, 1, (2, 2))
    return BlockSpec("basic_block", (c1, c2, down) if shortcut == "projection" else (c1, c2), shortcut)


def test_block_sums_its_convolutions_and_moves_nothing_in_between() -> None:
    block = _block("projection")
    c1, c2, down = block.convs
    assert block.main == (c1, c2)
    assert block.macs() == c1.macs() + c2.macs() + down.macs()
    assert block.params() == c1.params() + c2.params() + down.params()
    weights = sum(c.co * c.gemm_k * 4 + 2 * c.co * 4 for c in block.convs)
    assert block.min_bytes() == 4 * (8 * 8 * 4 + 4 * 4 * 8) + weights
    assert block.min_bytes() < sum(c.min_bytes() for c in block.convs)


def test_block_reads_a_given_shortcut_besides() -> None:
    given = _block("given")
    assert given.main == given.convs
    identity = BlockSpec(given.op, given.convs, "identity")
    assert given.min_bytes() - identity.min_bytes() == 4 * 4 * 4 * 8


def test_block_changes_every_convolution() -> None:
    block = _block("projection").with_(dtype="bfloat16", grad=True)
    assert {c.dtype for c in block.convs} == {"bfloat16"}
    assert block.grad and not block.batch_stats
    assert str(block) == "N1 8x8 4 -> 3x3/2 8 -> 3x3/1 8 + projection bfloat16 nhwc grad"


def _chain() -> tuple[ConvSpec, ConvSpec, ConvSpec]:
    """Return a 3x3/2, the next 1x1 with an add, and a projection of the block's input to the same shape."""
    conv2 = ConvSpec(2, 8, 8, 16, 16, 3, 3, (2, 2), (1, 1), dtype="float16", epilogue=Epilogue(relu=True))
    conv3 = ConvSpec(2, 4, 4, 16, 64, 1, 1, dtype="float16", epilogue=Epilogue(relu=True, add=True))
    return conv2, conv3, ConvSpec(2, 8, 8, 32, 64, 1, 1, (2, 2), dtype="float16")


def test_launch_of_one_convolution_moves_its_bytes_and_a_bias() -> None:
    _, conv3, _ = _chain()
    launch = LaunchSpec("conv_bn_act_1x1", (conv3,))
    assert launch.min_bytes() == conv3.min_bytes() - 4 * 64  # BN's scale is folded into the weights
    assert (launch.n, launch.dtype, launch.first, launch.last) == (2, "float16", conv3, conv3)
    assert launch.residual and launch.flops() == conv3.flops()


def test_launch_of_a_chain_moves_nothing_in_between() -> None:
    conv2, conv3, _ = _chain()
    chain = LaunchSpec("bottleneck", (conv2, conv3))
    between = 2 * 4 * 4 * 16 * 2  # conv2's output in bytes, which two launches write and read
    apart = sum(LaunchSpec("conv_bn_act", (c,)).min_bytes() for c in (conv2, conv3))
    assert apart - chain.min_bytes() == 2 * between
    assert chain.macs() == conv2.macs() + conv3.macs()
    assert chain.residual and chain.all_convs() == (conv2, conv3)


def test_launch_with_a_projection_reads_the_blocks_input_and_no_residual() -> None:
    conv2, conv3, down = _chain()
    without, launch = LaunchSpec("bottleneck", (conv2, conv3)), LaunchSpec("bottleneck", (conv2, conv3), down)
    residual, touched, weights = 2 * 4 * 4 * 64 * 2, 2 * 4 * 4 * 32 * 2, 64 * 32 * 2
    assert not launch.residual and launch.all_convs() == (conv2, conv3, down)
    assert launch.min_bytes() - without.min_bytes() == touched + weights - residual  # its bias joins the last one's
    assert launch.flops() == sum(c.flops() for c in (conv2, conv3, down))


def test_launch_of_a_stem_stores_the_pooled_output() -> None:
    stem = ConvSpec(2, 32, 32, 3, 8, 7, 7, (2, 2), (3, 3), epilogue=Epilogue(relu=True, pool=(3, 2, 1)))
    assert LaunchSpec("stem", (stem,)).min_bytes() == 4 * (2 * 32 * 32 * 3 + 8 * 3 * 49 + 2 * 8 * 8 * 8 + 8)


def test_launches_are_values_that_print_on_one_line() -> None:
    conv2, conv3, down = _chain()
    launch = LaunchSpec("bottleneck", (conv2, conv3), down)
    again = pickle.loads(pickle.dumps(launch))
    assert again == launch and {launch: 1}[again] == 1
    assert launch != dataclasses.replace(launch, projection=None)
    assert launch != dataclasses.replace(launch, kernel="other")
    assert str(launch) == f"bottleneck: {conv2} -> {conv3} + projection {down}"


def test_verdict_is_its_answer_and_carries_the_sentence() -> None:
    assert Verdict.yes()
    no = Verdict.no("float32", "int8", "call .float()")
    assert not no
    assert no.reason == "expected float32, got int8; call .float()"


def test_a_pickled_spec_does_not_carry_its_hash_to_another_process() -> None:
    import pickle

    spec = ConvSpec(1, 8, 8, 16, 16, 3, 3)
    hash(spec)
    loaded = pickle.loads(pickle.dumps(spec))
    assert loaded == spec and hash(loaded) == hash(spec) and b"_hash" not in pickle.dumps(spec)
