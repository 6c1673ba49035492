"""Counters of compiled kernels by allocation, and as docs/tables has them; the command that measures the machine."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from resnet_fast import native
from resnet_fast.benchmarks import ptx_speed
from resnet_fast.benchmarks.tables import compiled_traffic, compiled_training_traffic
from resnet_fast.tools.ptx_machine import ptx_machine
from tests.support.toy_kernels import copy_kernel

pytestmark = pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)


def test_allocations_of_one_name_are_counted_apart() -> None:
    x, y, z = (torch.zeros(256) for _ in range(3))
    with ptx_machine(80) as machine, machine.one_pass():
        copy_kernel[(1,)](x, y, 256, BLOCK=256)
        copy_kernel[(1,)](y, z, 128, BLOCK=256)
    counted = machine.launches[-1].report.counters["allocations"]
    written = {name: a["bytes_written"] for name, a in counted.items() if name.startswith("y_ptr")}
    assert len(written) == 2 and sorted(written.values()) == [0, 512], "y, and z, which is y_ptr too"
    assert any(name.endswith(" #2") for name in written)


def test_a_tile_step_is_the_difference_of_two_launches() -> None:
    steps = {f"{name}: {n}": (1000 + 50 * n, 7.0 + 2.0 * n) for name in ptx_speed.ARCHS.values() for n in (5, 9)}
    rows = ptx_speed.speeds(steps | {"other": (10, 3.0)})
    assert [(r.warp_instructions, r.cost) for r in rows] == [(50, 2.0), (50, 2.0), (10, 3.0)]
    assert "| 50 | 2,000.00 | 0.00 |" in ptx_speed.table(rows, counts=False)


@pytest.mark.slow
def test_inference_rows_are_those_of_the_table() -> None:
    table = json.loads(compiled_traffic.JSON.read_text())
    launches = [one for one in compiled_traffic.inference_launches() if one.last.ho == 7]
    for row in compiled_traffic.rows(launches[:2]):
        assert asdict(row) in table["launches"]
    layer, arch = "r50.layer2.1.conv1", 80
    assert asdict(compiled_traffic.cuda_rows([layer], [arch])[0]) in table["cuda"]


@pytest.mark.slow
def test_training_rows_are_those_of_the_table() -> None:
    table = json.loads(compiled_training_traffic.JSON.read_text())
    found = compiled_training_traffic.rows(["r50.layer4.1"], [90])
    assert found and all(asdict(row) in table for row in found)
