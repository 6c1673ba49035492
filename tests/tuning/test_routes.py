"""The routes of every problem: nothing is lost or done twice, and each saves the bytes it promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from resnet_fast.spec import BlockSpec, ConvSpec, Epilogue
from resnet_fast.tuning import shapes
from resnet_fast.tuning.routes import (
    MIN_CHANNELS,
    TAIL_CHANNELS,
    LaunchRoute,
    kernel_for,
    launch,
    merged_groups,
    routes,
    stem_step,
)

NETS = ("resnet18", "resnet50", "resnext50_32x4d", "resnext101_64x4d", "wide_resnet50_2", "cifar_resnet20")


def _by_plan(spec: ConvSpec | BlockSpec) -> dict[str, LaunchRoute]:
    found = {route.fusion: route for route in routes(spec)}
    assert len(found) == len(routes(spec))
    return found


def _blocks(name: str, batch: int = 8) -> dict[str, BlockSpec]:
    return shapes.blocks(name, batch, dtype="bfloat16")


@pytest.mark.parametrize("name", NETS)
def test_every_route_runs_every_convolution_once(name: str) -> None:
    for block in _blocks(name).values():
        for route in routes(block):
            ran = [c for one in route.launches for c in one.all_convs()]
            assert sorted(map(str, ran)) == sorted(map(str, block.convs))
            assert sum(one.macs() for one in route.launches) == block.macs()
            assert route.launches[-1].last == block.main[-1]  # what is stored last is the block's output


@pytest.mark.parametrize("name", NETS)
def test_plain_route_is_first_and_each_further_one_moves_less_in_fewer_launches(name: str) -> None:
    for block in _blocks(name).values():
        found = routes(block)
        assert found[0].fusion == "conv" and len(found[0].launches) == len(block.convs)
        for before, after in pairwise(found):
            assert after.min_bytes() < before.min_bytes()
            assert len(after.launches) < len(before.launches)


def test_projection_runs_before_the_residual_branch_or_inside_its_last_launch() -> None:
    block = _blocks("resnet50")["r50.layer2.0"]
    found = _by_plan(block)
    assert found["conv"].launches[0].first == block.convs[-1]
    assert found["proj"].launches[-1].projection == block.convs[-1]
    assert not found["proj"].launches[-1].residual
    # it saves the projection's output, written and read
    y = block.main[-1].gemm_m * block.main[-1].co * 2
    assert found["conv"].min_bytes() - found["proj"].min_bytes() == 2 * y + 4 * block.main[-1].co


def test_tail_keeps_the_3x3s_output_on_chip_where_it_is_narrow_enough() -> None:
    for name, block in _blocks("resnet50").items():
        found = _by_plan(block)
        conv2 = block.main[1]
        assert ("tail" in found) == (conv2.co <= TAIL_CHANNELS), name
        if "tail" in found:
            plain = found["proj" if block.shortcut == "projection" else "conv"]
            assert plain.min_bytes() - found["tail"].min_bytes() == 2 * conv2.gemm_m * conv2.co * 2
            assert found["tail"].launches[-1].kernel == "bottleneck"


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnext101_64x4d"])
def test_grouped_blocks_have_no_tail(name: str) -> None:
    assert not [block for block in _blocks(name).values() if "tail" in _by_plan(block)]


def test_a_given_shortcut_is_read_by_the_last_launch() -> None:
    block = _blocks("cifar_resnet20")["c20.layer2.0"]
    assert block.shortcut == "given" and list(_by_plan(block)) == ["conv"]
    assert _by_plan(block)["conv"].launches[-1].residual


def test_stem_pools_inside_or_leaves_the_pooling_to_pytorch() -> None:
    stem = shapes.problems("resnet50", 8, dtype="bfloat16")["r50.conv1"]
    found = _by_plan(stem)
    assert list(found) == ["conv", "stem"]
    assert found["conv"].launches[0].last.epilogue == Epilogue(relu=True)
    assert found["stem"].launches[0].last == stem and found["stem"].launches[0].kernel == "stem"
    other = stem.with_(epilogue=replace(stem.epilogue, pool=(2, 2, 0)))
    assert list(_by_plan(other)) == ["conv"]
    assert list(_by_plan(stem.with_(ci=16))) == ["conv"]  # a filter row of 7*16 products is too long
    assert list(_by_plan(stem.with_(epilogue=Epilogue(relu=True)))) == ["conv"]


@pytest.mark.parametrize(
    ("conv", "kernel"),
    [
        (ConvSpec(1, 8, 8, 64, 64, 1, 1), "conv_bn_act_1x1"),
        (ConvSpec(1, 8, 8, 64, 64, 1, 1, (2, 2)), "conv_bn_act_1x1"),
        (ConvSpec(1, 8, 8, 64, 64, 1, 1, padding=(1, 1)), "conv_bn_act"),
        (ConvSpec(1, 8, 8, 64, 64, 3, 3, padding=(1, 1)), "conv_bn_act_3x3"),
        (ConvSpec(1, 8, 8, 64, 64, 3, 3, padding=(2, 2), dilation=(2, 2), groups=2), "conv_bn_act_3x3"),
        (ConvSpec(1, 8, 8, 3, 16, 3, 3, padding=(1, 1)), "conv_bn_act"),
        (ConvSpec(1, 8, 8, 64, 64, 5, 5), "conv_bn_act"),
    ],
    ids=str,
)
def test_kernel_by_shape(conv: ConvSpec, kernel: str) -> None:
    assert kernel_for(conv) == kernel == launch(conv).kernel


@pytest.mark.parametrize(
    ("channels", "groups", "merged"), [(128, 32, 8), (64, 1, 1), (64, 2, 2), (96, 32, 4), (64, 64, 4), (12, 3, 1)]
)
def test_merged_groups_fill_a_tile_and_keep_neighbours_together(channels: int, groups: int, merged: int) -> None:
    conv = ConvSpec(1, 8, 8, channels, channels, 3, 3, groups=groups)
    assert merged_groups(conv) == merged
    assert groups % merged == 0 and (channels // merged >= MIN_CHANNELS or merged == 1)


@pytest.mark.parametrize(("width", "channels", "step"), [(7, 3, 32), (7, 1, 16), (3, 3, 16), (7, 8, 64), (11, 3, 64)])
def test_stem_step_is_the_filter_row_as_a_power_of_two(width: int, channels: int, step: int) -> None:
    assert stem_step(ConvSpec(1, 32, 32, channels, 64, 7, width)) == step
