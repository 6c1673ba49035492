"""benchmarks/train.py: all competitors start alike, what is measured of each, and the row of one that fails."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fast.benchmarks import compare, providers, report, train
from resnet_fast.cli.bench import bench
from resnet_fast.errors import UserError
from resnet_fast.io.images import Photo
from resnet_fast.models import registry
from tests.support.cli import invoke

TINY = train.TrainBenchOptions(model="cifar_resnet20", size=16, batches=(4,), rounds=2, steps=3)
PARAMETERS = sum(p.numel() for p in registry.build("cifar_resnet20").parameters())


@pytest.fixture(autouse=True)
def photos(monkeypatch: pytest.MonkeyPatch) -> list[Photo]:
    generator = torch.Generator().manual_seed(0)
    found = [Photo(n, torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=generator)) for n in "abc"]
    monkeypatch.setattr(compare.images, "load", lambda paths, limit: found)
    return found


def _run(**changes: object) -> compare.BenchReport:
    return train.run(dataclasses.replace(TINY, **changes))  # type: ignore[arg-type]


def test_ours_and_stock_channels_last_are_one_training_on_the_cpu() -> None:
    steps: list[tuple[int, int, str]] = []
    random = torch.get_rng_state()
    found = train.run(TINY, lambda *step: steps.append(step))
    rows = {row.provider: row for row in found.rows}
    assert list(rows) == ["eager-nchw", "eager-nhwc", "resnet_fast"]
    nchw, nhwc, ours = rows.values()
    assert ours.loss_first == nhwc.loss_first and ours.loss_last == nhwc.loss_last
    assert ours.loss_difference == 0 and nhwc.loss_difference == 0
    assert nchw.loss_first == pytest.approx(nhwc.loss_first, rel=1e-5)
    assert nchw.loss_difference == nchw.loss_last - nhwc.loss_last
    # a padded shortcut is a module's own: bit for bit, such blocks train on their own layers
    layers = "reference (PyTorch's own layers) x 8, stock (PyTorch's own layers) x 2"
    assert f"{layers}; onednn: expected a call without autograd" in ours.note
    assert nchw.note == nhwc.note == ""
    for row in rows.values():
        assert row.peak_mib > 3 * 4 * PARAMETERS / train.MIB  # parameters, momentum, gradients, and activations
        assert row.q1_ms <= row.median_ms <= row.q3_ms and row.images_per_s == pytest.approx(4e3 / row.median_ms)
        assert (row.precision, row.steps) == ("float32", 3) and row.samples >= 4
    assert ours.peak_mib == pytest.approx(nhwc.peak_mib, rel=0.02)
    assert max(nchw.ratio, nhwc.ratio) == 1.0
    assert steps[-1][:2] == (18, 18) and [s[0] for s in steps] == sorted(s[0] for s in steps)
    assert set(found.samples) == {f"cifar_resnet20 float32 4 {name}" for name in rows}
    assert found.provenance["steps"] == 3 and "torch.profiler" in found.provenance["memory"]
    assert torch.equal(torch.get_rng_state(), random)


def test_a_seed_gives_the_same_losses_and_bfloat16_others() -> None:
    options: dict[str, object] = {"providers": ("eager-nhwc",), "steps": 2, "rounds": 1}
    first, again, bfloat16 = (_run(**options, dtypes=(dtype,)).rows[0] for dtype in ("float32", "float32", "bfloat16"))
    assert (first.loss_first, first.loss_last) == (again.loss_first, again.loss_last)
    assert bfloat16.precision == "bfloat16" and bfloat16.loss_first != first.loss_first
    assert bfloat16.loss_first == pytest.approx(first.loss_first, rel=0.05)


def test_competitors_that_fail_keep_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(nn.Module):
        """Fails in its third call."""

        def __init__(self, net: nn.Module):
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("no kernel image\nand a stack dump")
            return self.net(x)

    def refuses(net: nn.Module) -> nn.Module:
        raise UserError("another net", "this one", "wait")

    def spoiled(net: nn.Module) -> nn.Module:
        nn.init.constant_(net.fc.weight, math.nan)  # type: ignore[arg-type, union-attr]
        return net

    wraps = {"eager-nchw": refuses, "eager-nhwc": Late, "compile": spoiled}
    trainers = [dataclasses.replace(t, wrap=wraps.get(t.name, t.wrap)) for t in providers.TRAINING]
    monkeypatch.setattr(providers, "TRAINING", tuple(trainers))
    found = _run(providers=train.NAMES, rounds=1)
    *failed, ours = found.rows
    notes = [row.note for row in failed]
    assert notes[:2] == ["UserError: expected another net, got this one; wait", "RuntimeError: no kernel image"]
    assert notes[2].startswith("NotFinite: the loss is nan")
    assert all(row.median_ms is None and row.loss_first is None and row.samples == 0 for row in failed)
    assert ours.median_ms > 0 and ours.ratio is None and ours.loss_difference is None  # no stock path to relate to
    assert list(found.samples) == ["cifar_resnet20 float32 4 resnet_fast"]


def test_a_failure_while_timing_keeps_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = train._Contender.measure_peak

    def last(contender: train._Contender) -> None:
        measure(contender)
        contender.parts = iter(())

    monkeypatch.setattr(train._Contender, "measure_peak", last)
    (row,) = _run(providers=("eager-nhwc",), steps=1).rows
    assert row.median_ms is None and row.note == "StopIteration" and row.loss_last is not None


def test_a_spent_budget_shortens_the_losses_of_all_alike_and_says_so() -> None:
    rows = _run(budget=1e-3, rounds=50, providers=("eager-nhwc", "resnet_fast")).rows
    for row in rows:
        assert row.steps == 1 and row.loss_last == row.loss_first and row.median_ms > 0
        assert "the budget ended the losses after 1 of 3 steps" in row.note


def test_batches_are_seeded_crops_labelled_by_photograph(photos: list[Photo]) -> None:
    recipe = TINY.recipe(4, "float32", 16)
    parts = train.batches(photos, recipe, 10)
    assert [tuple(part.images.shape) for part in parts] == [(4, 3, 16, 16)] * 3
    assert torch.cat([part.labels for part in parts]).tolist() == [0, 1, 2] * 4
    again = train.batches(photos, recipe, 10)
    assert all(torch.equal(a.images, b.images) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0].images[0], parts[0].images[3])
    assert torch.cat([part.labels for part in train.batches(photos, recipe, 2)]).tolist() == [0, 1, 0] * 4


def test_what_ran_is_the_difference_of_two_counts() -> None:
    before = {"calls": {"a/triton": 2, "b/stock": 1}, "fallbacks": {"b runs its stock layers: odd": 1}}
    after = {
        "calls": {"a/triton": 5, "b/stock": 1, "c/stock": 1},
        "fallbacks": {"b runs its stock layers: odd": 1, "c runs its stock layers: hooked: yes": 1},
    }
    assert train.ran_on(before, after) == "triton x 3, stock (PyTorch's own layers) x 1; hooked: yes"
    assert train.ran_on(after, after) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": (16, 1)}, "expected training batches >= 2, got 16, 1"),
        ({"batches": ()}, "expected batch sizes >= 1, got none"),
        ({"steps": 0}, "expected --steps >= 1, got 0"),
        ({"dtypes": ("float32", "float16")}, "got float16 on the CPU; use --dtype bfloat16, or --device cuda"),
        ({"dtypes": ("int8",)}, "expected dtypes among"),
        ({"providers": ("openvino",)}, "providers among eager-nchw, .* for --suite train, got 'openvino'"),
        ({"providers": ()}, "expected providers among .* got none"),
        ({"rounds": 0}, "expected --rounds >= 1, got 0"),
        ({"device": "cuda:99"}, "CUDA devices that PyTorch sees, got 'cuda:99'"),
        ({"model": "resnet5"}, "resnet5"),
    ],
)
def test_options_that_cannot_be_used(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _run(**changes)


def test_compile_is_for_who_asks_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train.default_providers("cpu") == TINY.providers == ("eager-nchw", "eager-nhwc", "resnet_fast")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train.default_providers("cuda") == train.NAMES
    with pytest.raises(UserError, match="got 'tpu'"):
        train.default_providers("tpu")


def test_command_prints_json_and_writes_every_format(tmp_path: Path) -> None:
    result = invoke(bench, "--suite", "train", "--model", "cifar_resnet20", "--size", 16, "--batch", 4, "--rounds", 1,
                      "--steps", 2, "--dtype", "float32", "--out", tmp_path / "o", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [r["provider"] for r in found["rows"]] == ["eager-nchw", "eager-nhwc", "resnet_fast"]
    assert {"peak_mib", "loss_first", "loss_last", "loss_difference", "steps"} <= set(found["rows"][0])
    assert json.loads((tmp_path / "o" / "bench.json").read_text()) == found
    assert (tmp_path / "o" / "bench.csv").read_text().startswith("case,provider,")
    assert (tmp_path / "o" / "bench.png").stat().st_size > 1000
    text = (tmp_path / "o" / "bench.md").read_text()
    assert f"| {' | '.join(report.TRAIN_HEADINGS)} |" in text
    assert "Measured by the CPU allocator's events in torch.profiler." in text


def test_steps_are_refused_for_another_suite(tmp_path: Path) -> None:
    result = invoke(bench, "--suite", "models", "--steps", 3, "--out", tmp_path / "o")
    assert isinstance(result.exception, UserError) and "expected --steps with --suite train" in str(result.exception)
