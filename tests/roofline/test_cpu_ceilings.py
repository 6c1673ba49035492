"""A CPU's ceilings: the best of all runs, so that other load cannot raise a floor."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

import resnet_fast
from resnet_fast.devices import Cache, Ceiling, Device
from resnet_fast.models import registry
from resnet_fast.roofline import cpu_ceilings
from resnet_fast.roofline.byte_model import work
from resnet_fast.roofline.floors import floor_seconds
from resnet_fast.spec import ConvSpec

RATES = {"float32": 100.0, "bfloat16": 200.0, "cache": 50.0, "memory": 10.0}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measured(monkeypatch: pytest.MonkeyPatch, **rates: float) -> dict[str, float]:
    monkeypatch.setattr(cpu_ceilings, "measure", lambda: RATES | rates)
    return cpu_ceilings.best(2)[0]


def test_a_busy_machine_lowers_no_ceiling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch) == RATES
    assert measured(monkeypatch, float32=1.0, memory=2.0) == RATES
    assert measured(monkeypatch, cache=60.0, bfloat16=3.0) == RATES | {"cache": 60.0}
    assert measured(monkeypatch, float32=1.0) == RATES | {"cache": 60.0}
    kept = json.loads((folder / "ceilings.json").read_text())["machines"]
    assert list(kept.values()) == [RATES | {"cache": 60.0}]
    assert cpu_ceilings.best(4)[0] == RATES | {"float32": 1.0}  # other threads are another machine


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machines": 3}', '{"machines": {"x": {"float32": 1e400}}}', "\0"])
def test_a_damaged_file_is_replaced(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "ceilings.json").write_text(text)
    assert measured(monkeypatch) == RATES
    assert measured(monkeypatch, float32=1.0) == RATES


def test_a_cache_that_cannot_be_written_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("RESNET_FAST_CACHE", str(folder.parent / "file" / "cache"))
    monkeypatch.setattr(cpu_ceilings, "measure", lambda: RATES)
    rates, place = cpu_ceilings.best(2)
    assert rates == RATES and place.startswith("not kept: ")


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    assert set(cpu_ceilings.measure()) == set(cpu_ceilings.MEASURES)
    assert torch.get_num_threads() == before
    assert cpu_ceilings.cache_bytes() >= 2**15


TOY = Device("toy", Ceiling(1e9, "measured"), (("float32", Ceiling(1e12, "measured")),))
CACHED = Device("toy", *list(vars(TOY).values())[1:3], cache=Cache(1000, Ceiling(1e10, "modelled")))


def test_bytes_that_a_cache_can_hold_cost_no_memory() -> None:
    spec = ConvSpec(1, 4, 4, 8, 8, 1, 1)
    nbytes = floor_seconds(spec, TOY).nbytes
    assert nbytes < 2000
    assert floor_seconds(spec, TOY).memory_s == pytest.approx(nbytes / 1e9)
    found = floor_seconds(spec, CACHED)
    assert found.memory_s == pytest.approx(nbytes / 1e10) and found.origin == "modelled"
    large = ConvSpec(1, 40, 40, 8, 8, 1, 1)
    beyond = floor_seconds(large, TOY).nbytes - 2000
    assert floor_seconds(large, CACHED).memory_s == pytest.approx(beyond / 1e9)


@pytest.mark.parametrize(
    "spec",
    [
        ConvSpec(2, 1, 1, 8, 4, 3, 3, padding=(1, 1)),
        ConvSpec(1, 7, 5, 8, 4, 3, 3, padding=(1, 1), stride=(2, 1)),
        ConvSpec(1, 9, 9, 4, 4, 3, 3, padding=(2, 2), dilation=(2, 2), groups=2),
        ConvSpec(1, 8, 8, 3, 4, 7, 7, padding=(3, 3), stride=(2, 2)),
    ],
)
def test_products_with_a_paddings_zeros_are_no_work(spec: ConvSpec) -> None:
    """Counts with a convolution of ones: each output is the number of its taps on the image."""
    taps = torch.nn.functional.conv2d(
        torch.ones(spec.n, spec.ci, spec.h, spec.w), torch.ones(spec.co, spec.ci // spec.groups, spec.r, spec.s), None,
        spec.stride, spec.padding, spec.dilation, spec.groups,
    ).sum()  # fmt: skip
    (item,) = work(spec, "conv")
    assert item.least_flops == 2 * int(taps) < item.flops == spec.flops()
    assert floor_seconds(spec, CACHED, "conv").compute_s == pytest.approx(2 * int(taps) / 1e12)
    assert floor_seconds(spec, TOY, "conv").compute_s == pytest.approx(spec.flops() / 1e12)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "batch"), [("resnet18", 32, 1), ("resnet18", 96, 2), ("resnet50", 64, 1)])
def test_the_floors_of_a_net_are_no_more_than_its_time(name: str, side: int, batch: int) -> None:
    net = resnet_fast.accelerate(registry.build(name).eval().to(memory_format=torch.channels_last))
    x = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
    explained = resnet_fast.explain(net, x)
    floors = [row.floor_ms for row in explained.rows if row.floor_ms is not None]
    assert len(floors) == len(explained.rows) and all(f > 0 for f in floors)
    times = []
    with torch.inference_mode():
        for _ in range(30):
            start = time.perf_counter()
            net(x)
            times.append(1e3 * (time.perf_counter() - start))
    assert sum(floors) <= min(times), (sum(floors), min(times))
    assert f"sum of the floors above: {sum(floors):.3f} ms" in str(explained)
