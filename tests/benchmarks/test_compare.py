"""benchmarks/compare.py: refused options, and the row that each kind of competitor gets."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resnet_fast.benchmarks import compare, providers
from resnet_fast.errors import UserError
from resnet_fast.io.images import Photo
from resnet_fast.spec import Verdict

TINY = compare.BenchOptions(model="cifar_resnet20", batches=(1, 4), rounds=2, providers=("good",))


def _provider(name: str, prepare, stock: bool = False, verdict: Verdict | None = None) -> providers.Provider:  # type: ignore[no-untyped-def]
    return providers.Provider(name, stock, lambda *_: Verdict.yes() if verdict is None else verdict, prepare)


def _plain(factor: float = 1.0, pause: float = 0.0):  # type: ignore[no-untyped-def]
    """Return the right answer times ``factor``; a call takes ``pause`` seconds however busy the machine is."""

    @torch.inference_mode()
    def prepare(model: nn.Module, x: Tensor) -> providers.PreparedCall:
        out = model(x) * factor

        def call() -> Tensor:
            time.sleep(pause)
            return out

        return providers.PreparedCall(call, str(x.dtype).removeprefix("torch."), "noted")

    return prepare


def _fails(model: nn.Module, x: Tensor) -> providers.PreparedCall:
    raise RuntimeError("no kernel image\nand a stack dump")


def _wrong_shape(model: nn.Module, x: Tensor) -> providers.PreparedCall:
    return providers.PreparedCall(lambda: torch.zeros(len(x), 3), "float32")


def _nan(model: nn.Module, x: Tensor) -> providers.PreparedCall:
    return providers.PreparedCall(lambda: model(x) * math.nan, "float32")


@pytest.fixture
def photos(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    found = [Photo(n, torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=generator)) for n in "abc"]
    monkeypatch.setattr(compare.images, "load", lambda paths, limit: found)


def _compete(
    monkeypatch: pytest.MonkeyPatch, *competitors: providers.Provider, **changes: object
) -> compare.BenchReport:
    monkeypatch.setattr(providers, "INFERENCE", competitors)
    monkeypatch.setattr(providers, "NAMES", tuple(p.name for p in competitors))
    return compare.run(dataclasses.replace(TINY, providers=providers.NAMES, **changes))


@pytest.mark.usefixtures("photos")
def test_rows_of_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    report = _compete(
        monkeypatch,
        _provider("slow", _plain(pause=0.04), stock=True),
        _provider("fast", _plain(pause=0.01), stock=True),
        _provider("peer", _plain(1 + 1e-3)),
    )
    assert list(report.cells()) == [("cifar_resnet20", "float32", n) for n in (1, 4)]
    for (case, dtype, n), (slow, fast, peer) in report.cells().items():
        assert slow.ratio is not None and slow.ratio < 0.9 and fast.ratio == 1.0
        assert fast.q1_ms <= fast.median_ms <= fast.q3_ms  # type: ignore[operator]
        assert fast.images_per_s == pytest.approx(n * 1e3 / fast.median_ms)  # type: ignore[operator]
        assert fast.precision == "float32" and fast.note == "noted"
        assert 1e-9 < fast.error_l2 < 1e-5 and 1e-9 < fast.error_max < 1e-5  # type: ignore[operator]
        assert peer.error_l2 == pytest.approx(1e-3, rel=0.02)
        assert report.samples[f"{case} {dtype} {n} slow"][0] >= 40e6 and slow.samples >= 4


@pytest.mark.usefixtures("photos")
def test_bfloat16_cell_is_judged_by_the_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def upcast(model: nn.Module, x: Tensor) -> providers.PreparedCall:
        wide = copy.deepcopy(model).double()
        return providers.PreparedCall(torch.inference_mode()(lambda: wide(x.double())), "float64")

    competitors = (_provider("bf16", _plain()), _provider("upcast", upcast))
    rounded, exact = _compete(monkeypatch, *competitors, dtypes=("bfloat16",), batches=(1,), rounds=1, size=8).rows
    assert 1e-4 < rounded.error_l2 < 0.2 and rounded.precision == "bfloat16"  # type: ignore[operator]
    assert exact.error_l2 < 1e-13  # type: ignore[operator]


@pytest.mark.usefixtures("photos")
def test_competitors_that_do_not_run_keep_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    report = _compete(
        monkeypatch,
        _provider("refuses", _plain(), stock=True, verdict=Verdict.no("float64", "float32", "wait")),
        _provider("fails", _fails),
        _provider("wrong", _wrong_shape),
        _provider("nan", _nan),
        _provider("good", _plain()),
        batches=(2,),
    )
    notes = {row.provider: row.note for row in report.rows}
    assert notes["refuses"] == "expected float64, got float32; wait"
    assert notes["fails"] == "RuntimeError: no kernel image"
    assert "expected an output of shape (N, *(10,)), got (2, 3)" in notes["wrong"]
    assert "expected finite outputs, got 20" in notes["nan"]
    good = report.rows[-1]
    assert good.median_ms is not None and good.ratio is None  # no stock path ran: nothing to relate to
    assert all(row.median_ms is None and row.samples == 0 for row in report.rows[:-1])
    assert list(report.samples) == ["cifar_resnet20 float32 2 good"]


@pytest.mark.usefixtures("photos")
def test_same_seed_same_net_and_threads_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []

    def prepare(model: nn.Module, x: Tensor) -> providers.PreparedCall:
        inside.append(torch.get_num_threads())
        return providers.PreparedCall(lambda: model(x), "float32")

    torch.set_num_threads(2)
    errors = [
        _compete(monkeypatch, _provider("good", prepare), batches=(2,), rounds=1, threads=1).rows[0].error_l2
        for _ in range(2)
    ]
    assert errors[0] == errors[1]
    assert inside == [1, 1] and torch.get_num_threads() == 2


@pytest.mark.usefixtures("photos")
def test_progress_reaches_its_end_and_provenance_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "INFERENCE", (_provider("good", _plain()),))
    monkeypatch.setattr(providers, "NAMES", ("good",))
    steps: list[tuple[int, int, str]] = []
    report = compare.run(TINY, lambda *step: steps.append(step))
    assert steps[-1][:2] == (6, 6) and steps[0] == (0, 6, "cifar_resnet20 float32 batch 1: preparing good")
    assert [s[0] for s in steps] == sorted(s[0] for s in steps)
    assert report.provenance["images"] == ["a", "b", "c"] and report.provenance["image_size"] == 32
    assert report.provenance["weights"] == "random, seed 0, calibrated"
    assert {"torch", "cpu", "threads", "commit", "command", "date"} <= set(report.provenance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": ()}, "expected batch sizes >= 1, got none"),
        ({"batches": (1, 0)}, "expected batch sizes >= 1, got 1, 0"),
        ({"dtypes": ("int8",)}, "expected dtypes among float32, .* got 'int8'"),
        ({"dtypes": ()}, "expected dtypes among"),
        ({"providers": ("tvm",)}, "got 'tvm'"),
        ({"providers": ()}, "expected providers among"),
        ({"suite": "kernels"}, "expected a suite among models, blocks, ops, train, got 'kernels'"),
        ({"rounds": 0}, "expected --rounds >= 1, got 0"),
        ({"size": -3}, "expected --size >= 1, got -3"),
        ({"threads": 0}, "expected --threads >= 1, got 0"),
        ({"budget": 0.0}, "expected --budget > 0 seconds"),
        ({"budget": math.nan}, "expected --budget > 0 seconds"),
        ({"device": "tpu"}, "expected a device such as cpu or cuda:0, got 'tpu'"),
        ({"device": "meta"}, "expected device cpu or cuda, got 'meta'"),
        ({"device": "cuda:99"}, "CUDA devices that PyTorch sees, got 'cuda:99'"),
    ],
)
def test_options_that_cannot_be_used(changes: dict[str, object], message: str) -> None:
    options = dataclasses.replace(compare.BenchOptions(), **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        options.check()


def test_unknown_model_and_missing_weights(tmp_path: Path) -> None:
    options = dataclasses.replace(compare.BenchOptions(), providers=("eager-nchw",))
    with pytest.raises(UserError, match="resnet5"):
        compare.run(dataclasses.replace(options, model="resnet5"))
    with pytest.raises(UserError, match="not a file"):
        compare.network("resnet18", [], tmp_path / "none.pth", 32, 0)


@pytest.mark.parametrize(("native", "expected"), [(True, ("float32", "bfloat16")), (False, ("float32",))])
def test_default_dtypes_follow_the_cpu(
    native: bool, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "cpu_has_bf16", lambda: native)
    assert compare.native_dtypes("cpu") == expected


def test_fp64_keeps_the_model_and_the_rounding() -> None:
    net = nn.Conv2d(1, 1, 1).bfloat16()
    x = torch.randn(1, 1, 2, 2).bfloat16()
    out = compare.fp64(net, x)
    assert out.dtype == torch.float64 and net.weight.dtype == torch.bfloat16
    assert torch.equal(out, x.double() * net.weight.double() + net.bias.double())  # type: ignore[union-attr]


def test_the_cost_of_batch_invariant_mode_is_printed() -> None:
    ours, mode = providers.OURS, providers.OURS_INVARIANT
    measured = {ours: {"median_ms": 2.0}, mode: {"median_ms": 3.0}}
    assert compare.cost_of_invariance(mode, measured) == "the mode takes 1.50 x the time of resnet_fast"
    assert compare.cost_of_invariance(ours, measured) == ""
    assert compare.cost_of_invariance(mode, {mode: {"median_ms": 3.0}}) == ""
