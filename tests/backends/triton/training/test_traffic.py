"""Counted bytes of a training step: whole blocks against what their launches must move, and ResNet-50's table."""

from __future__ import annotations

import json

import pytest

from resnet_fast.benchmarks.tables import training_traffic as traffic
from resnet_fast.spec import BlockSpec, ConvSpec, Epilogue
from tests.support.launch_cases import ADD, conv

pytestmark = pytest.mark.interpret


def bottleneck(ci: int, width: int, co: int, stride: int, h: int, w: int) -> BlockSpec:
    """Return a bottleneck block on one image, with a projection if its input and output differ in shape."""
    ho, wo = -(-h // stride), -(-w // stride)
    convs: list[ConvSpec] = [
        conv(ci, width, 1, n=1, h=h, w=w),
        conv(width, width, 3, n=1, h=h, w=w, stride=stride),
        conv(width, co, 1, n=1, h=ho, w=wo, epilogue=ADD),
    ]
    if stride == 1 and ci == co:
        return BlockSpec("bottleneck", tuple(convs))
    convs.append(conv(ci, co, 1, n=1, h=h, w=w, stride=stride, epilogue=Epilogue()))
    return BlockSpec("bottleneck", tuple(convs), "projection")


BLOCKS = {"identity": bottleneck(64, 16, 64, 1, 8, 7), "projection / 2": bottleneck(32, 16, 64, 2, 8, 6)}


@pytest.mark.parametrize("name", BLOCKS)
def test_activations_within_ten_percent_of_the_least(name: str) -> None:
    spec = BLOCKS[name]
    part, least = traffic.step(spec), traffic.least(spec)
    assert part.activations <= 1.10 * sum(least.values()), traffic.rows_of(name, 1, spec, part)
    for row in traffic.rows_of(name, 1, spec, part):
        assert row.counted >= 0.95 * row.least, row  # a launch that is not counted would look good


def test_the_least_of_an_identity_block_is_82_inner_tensors() -> None:
    inner = 8 * 7 * 16 * 2
    assert sum(traffic.least(BLOCKS["identity"]).values()) == 82 * inner


def test_the_table_holds_the_whole_net_within_the_goal() -> None:
    """Reads docs/tables/training-traffic.json; by the model, stock PyTorch moves 474 MB per image."""
    net = json.loads(traffic.JSON.read_text())["net"]
    assert net["counted activations"] <= 270
    assert 1.0 <= net["counted activations"] / net["least of these launches"] <= 1.10
    assert net["counted activations"] <= 0.60 * net["stock, plan train-eager"]


@pytest.mark.slow
def test_the_tables_last_stage_counts_the_same_again() -> None:
    rows = [r for r in json.loads(traffic.JSON.read_text())["rows"] if r["part"] == "r50.layer4.1"]
    spec, times = traffic.parts()["r50.layer4.1"]
    assert [vars(r) for r in traffic.rows_of("r50.layer4.1", times, spec, traffic.step(spec))] == rows


def test_an_identity_block_with_frozen_norms_moves_58_inner_tensors() -> None:
    """16 forward, 42 backward: 12 for the mask, 18 of the dgrads with the shortcut's gradient, 12 of the wgrads."""
    spec = BLOCKS["identity"]
    inner = 8 * 7 * 16 * 2
    part = traffic.frozen_step(spec)
    assert part.activations == 58 * inner, part.bytes
