"""Nothing unproved runs by default, and verdicts hold for one GPU and one toolchain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_fast import devices
from resnet_fast.spec import LaunchSpec
from resnet_fast.tuning import configs, launch_plan, proofs, shapes
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.proofs import Proofs
from resnet_fast.tuning.routes import launch
from resnet_fast.tuning.tables import Table

GPUS = tuple(devices.gpus())
H100 = devices.gpu("h100")
VERSIONS = {"triton": "3.8.0", "driver": "13000", "kernels": "abc"}
Pair = tuple[LaunchSpec, Config]


def inference(net: str, batch: int, gpu: str, hopeful: bool = False, table: Table | None = None) -> Iterator[Pair]:
    """Yield every launch of a net with its config."""
    device = devices.gpu(gpu)
    stem = next(iter(shapes.problems(net, batch, dtype="bfloat16").values()))
    for spec in (stem, *shapes.blocks(net, batch, dtype="bfloat16").values()):
        yield from launch_plan.plan_launches(spec, device, table or Table(device.name), hopeful).chosen


def training(net: str, batch: int, gpu: str, hopeful: bool = False, table: Table | None = None) -> Iterator[Pair]:
    """Yield every launch of a training step with its config."""
    device = devices.gpu(gpu)
    how = {"dtype": "bfloat16", "grad": True, "batch_stats": True}
    stem = next(iter(shapes.problems(net, batch, **how).values()))
    for spec in (stem, *shapes.blocks(net, batch, **how).values()):
        for i, conv in enumerate(spec.convs):
            raw = 0 < i < len(spec.main)
            known = table or Table(device.name)
            yield from launch_plan.plan_training(conv, raw, device, known, True, hopeful).chosen(conv, raw)


def unproved(pairs: Iterator[Pair]) -> list[Pair]:
    return [(one, config) for one, config in pairs if not config.stock and configs.needs_proof(one, config)]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("net", ["resnet18", "resnet50"])
@pytest.mark.parametrize("batch", [1, 8, 32, 256])
def test_no_plan_takes_an_unproved_config_by_default(net: str, batch: int, gpu: str) -> None:
    assert not unproved(inference(net, batch, gpu))
    if batch > 1:
        chosen = list(training(net, batch, gpu))
        assert not unproved(iter(chosen))
        assert not any(config.stock for _, config in chosen)  # another of our configs takes its place


def test_a_hopeful_plan_wants_what_the_model_sees_win() -> None:
    assert len(unproved(inference("resnet50", 256, "h100", hopeful=True))) >= 10
    wanted = unproved(training("resnet50", 256, "h100", hopeful=True))
    assert len(wanted) == 39  # of 51 launches with filters larger than 1x1


def test_a_proved_config_runs_and_a_refused_one_never_does() -> None:
    wanted = unproved(training("resnet50", 64, "h100", hopeful=True))
    known = Table(H100.name)
    for one, config in wanted:
        known.proofs.record(one, config, "")
    assert unproved(training("resnet50", 64, "h100", table=known)) == wanted
    assert unproved(training("resnet50", 256, "h100", table=known))  # a proof holds for every batch size
    for one, config in wanted:
        known.proofs.record(one, config, "AssertionError: wrong")
    for hopeful in (False, True):
        assert not set(unproved(training("resnet50", 64, "h100", hopeful, known))) & set(wanted)


def test_a_time_in_the_table_is_no_proof() -> None:
    one, config = unproved(training("resnet50", 64, "h100", hopeful=True))[0]
    table = Table(H100.name, {str(one): {str(config): 1.0, "cudnn": 5.0}})

    def pick(hopeful: bool) -> Config:
        chosen = launch_plan.plan_training(one.last, one.prologue, H100, table, True, hopeful).chosen(
            one.last, one.prologue
        )
        return dict(chosen)[one]

    assert str(pick(False)) == "cudnn" and pick(True) == config
    table.proofs.record(one, config, "")
    assert pick(False) == config


def test_a_variant_that_a_launch_does_not_know_is_not_proved_at_first_use() -> None:
    """The first dgrad of a basic block adds its shortcut's gradient or not."""
    wanted = {one for one, _ in unproved(training("resnet18", 256, "h100", hopeful=True))}
    assert wanted and not [one for one in wanted if one.kernel == "conv_dgrad" and not one.prologue]


def test_verdicts_are_those_of_a_small_launch() -> None:
    (one, config), *_ = unproved(inference("resnet50", 256, "h100", hopeful=True))
    found = Proofs()
    assert found.verdict(one, config) is None
    assert found.verdict(one, configs.Config(one.kernel, 64, 64, 32, 4)) == ""  # needs no proof
    assert found.verdict(one, Config("cudnn")) == ""
    found.record(one, config, "wrong")
    assert found.verdict(proofs.small(one), config) == "wrong" and found.refusals(one) == {str(config): "wrong"}
    assert proofs.small(one).n == proofs.BATCH


def test_large_images_are_cropped_where_the_filter_still_fits() -> None:
    large = shapes.problems("resnet50", 8, image=(1000, 40), dtype="bfloat16")["r50.layer1.1.conv2"]
    one = proofs.small(launch(large)).last
    assert (one.n, one.h, one.w) == (proofs.BATCH, proofs.SIDE, large.w)
    dilated = launch(large.with_(dilation=(40, 1), padding=(0, 1)))
    assert proofs.small(dilated).last.h == large.h


def kept(tmp_path: Path) -> tuple[Path, LaunchSpec, Config]:
    (one, config), *_ = unproved(inference("resnet50", 256, "h100", hopeful=True))
    new = Proofs("NVIDIA H100", VERSIONS)
    new.record(one, config, "")
    path = tmp_path / "proofs" / "h100.json"
    proofs.add(path, new)
    return path, one, config


def test_verdicts_are_kept_and_added_to(tmp_path: Path) -> None:
    path, one, config = kept(tmp_path)
    assert proofs.read(path, "NVIDIA H100", VERSIONS).verdict(one, config) == ""
    more = Proofs("NVIDIA H100", VERSIONS)
    other = Config(one.kernel, 64, 256, 64, 8)
    more.record(one, other, "AssertionError: off")
    proofs.add(path, more)
    both = proofs.read(path, "NVIDIA H100", VERSIONS)
    assert (both.verdict(one, config), both.verdict(one, other)) == ("", "AssertionError: off")


@pytest.mark.parametrize("changed", VERSIONS)
def test_another_toolchain_proves_again(changed: str, tmp_path: Path) -> None:
    path, one, config = kept(tmp_path)
    assert proofs.read(path, "NVIDIA H100", VERSIONS | {changed: "new"}).verdict(one, config) is None
    assert proofs.read(path, "NVIDIA H200", VERSIONS).verdict(one, config) is None
    assert proofs.read(tmp_path / "none", "NVIDIA H100", VERSIONS).verdicts == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"gpu": "NVIDIA H100"}', json.dumps({
    "gpu": "NVIDIA H100", "versions": VERSIONS, "configs": {"one": {"c": 1}}})])  # fmt: skip
def test_a_damaged_file_is_reported_and_replaced(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "h100.json"
    path.write_text(content)
    assert proofs.read(path, "NVIDIA H100", VERSIONS).verdicts == {}
    assert "is ignored" in caplog.text and "proved again" in caplog.text
    proofs.add(path, Proofs("NVIDIA H100", VERSIONS, {"one": {"c": ""}}))
    assert proofs.read(path, "NVIDIA H100", VERSIONS).verdicts == {"one": {"c": ""}}
