"""``tune()``: what it measures, refuses and writes; kernels run in Triton's interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import resnet_fast
from resnet_fast import BackendError, UserError, devices
from resnet_fast.dispatch import catalog
from resnet_fast.dispatch import tune as tuning
from resnet_fast.spec import LaunchSpec, Verdict
from resnet_fast.tuning import configs, launch_plan, proofs, shapes, tables, training_configs
from resnet_fast.tuning.routes import launch

INTERPRETER = "Triton interpreter"
H100 = devices.gpu("h100")


def block(n: int = 1, backend: str = "triton") -> tuple[nn.Module, Tensor]:
    """Return a basic block of 16 channels and its input (n, 16, 3, 3): two launches of conv_bn_act_3x3."""
    place: dict[str, Any] = {"dtype": torch.float16, "memory_format": torch.channels_last}
    net = resnet_fast.accelerate(nn.Sequential(BasicBlock(16, 16)).eval().to(**place), backend=backend)
    return net, torch.randn(n, 16, 3, 3).to(**place)


class Progress(list):
    """Collects the calls of ``on_progress``."""

    def __call__(self, done: int, total: int, what: str) -> None:
        self.append((done, total, what))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuning.Tuned, Progress]:
    """Return the result of one complete run."""
    path, progress = tmp_path_factory.mktemp("tune") / "new" / "table.json", Progress()
    net, x = block()
    return resnet_fast.tune(net, x, on_progress=progress, path=path), progress


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the 3x3 kernel's launcher with one that treats one config differently."""
    from resnet_fast.backends.triton import launchers

    def exchange(config: str, other: Callable[[Any, Tensor], Tensor]) -> None:
        right = launchers.LAUNCHERS["conv_bn_act_3x3"]

        def wrong(spec: Any, used: Any, *rest: Any) -> Tensor:
            y = right(spec, used, *rest)
            return other(spec, y) if config in ("all", str(used)) else y

        monkeypatch.setitem(launchers.LAUNCHERS, "conv_bn_act_3x3", wrong)

    return exchange


BAD = "64x16x16 w4 s4"


@pytest.mark.interpret
def test_every_launch_of_every_route_is_measured_on_every_candidate(run: tuple[tuning.Tuned, Progress]) -> None:
    tuned, _ = run
    assert (tuned.measured, tuned.kept, tuned.left) == (2, 0, 0)
    assert len(tuned.launches) == 2 and {one.kernel for one in tuned.launches} == {"conv_bn_act_3x3"}
    for one in tuned.launches:
        assert H100.gpu is not None
        expected = (*configs.candidates(one, H100.gpu), *configs.stock_candidates(one))
        assert set(tuned.table.times(one)) == {str(c) for c in expected}
        assert all(t is None or t > 0 for t in tuned.table.times(one).values())


@pytest.mark.interpret
def test_progress_counts_the_launches_before_they_are_measured(run: tuple[tuning.Tuned, Progress]) -> None:
    tuned, progress = run
    assert [(done, total) for done, total, _ in progress] == [(0, 2), (1, 2)]
    assert {what for _, _, what in progress} == {str(one) for one in tuned.launches}


@pytest.mark.interpret
def test_the_table_on_disk_is_the_reports(run: tuple[tuning.Tuned, Progress]) -> None:
    tuned, _ = run
    assert tables.read(tuned.path, INTERPRETER) == tuned.table
    assert json.loads(tuned.path.read_text())["versions"]["torch"] == torch.__version__
    assert str(tuned.path) in str(tuned) and "2 launches measured, 0 known before" in str(tuned)


@pytest.mark.interpret
def test_what_a_machine_cannot_run_is_refused_with_its_reason(run: tuple[tuning.Tuned, Progress]) -> None:
    tuned, _ = run  # a CPU has no cuDNN
    assert {candidate for _, candidate, _ in tuned.refused} == {"cudnn_fused"}
    assert all("cudnn_convolution" in reason and "\n" not in reason for _, _, reason in tuned.refused)
    assert all(tuned.table.times(one)["cudnn_fused"] is None for one in tuned.launches)


@pytest.mark.interpret
def test_rows_and_totals_of_a_report(run: tuple[tuning.Tuned, Progress]) -> None:
    tuned, _ = run
    rows = tuned.rows()
    for row, one in zip(rows, tuned.launches, strict=True):
        times = {k: t for k, t in tuned.table.times(one).items() if t is not None}
        assert row.best is not None and row.us == times[row.best] == min(times.values())
        assert row.stock_us == times["cudnn"] and row.refused == 1
        assert row.speedup == pytest.approx(times["cudnn"] / min(times.values())) and row.speedup >= 1
    assert tuned.net_us == pytest.approx(sum(row.us or 0 for row in rows))
    assert tuned.net_stock_us == pytest.approx(sum(row.stock_us or 0 for row in rows))


@pytest.mark.interpret
def test_a_second_run_measures_nothing(run: tuple[tuning.Tuned, Progress]) -> None:
    tuned, _ = run
    before, progress = tuned.path.stat().st_mtime_ns, Progress()
    again = resnet_fast.tune(*block(), on_progress=progress, path=tuned.path)
    assert (again.measured, again.kept, again.left, again.refused) == (0, 2, 0, [])
    assert progress == [] and tuned.path.stat().st_mtime_ns == before
    assert again.table == tuned.table and again.net_us == tuned.net_us


@pytest.mark.interpret
def test_only_what_is_missing_is_measured(run: tuple[tuning.Tuned, Progress], tmp_path: Path) -> None:
    tuned, _ = run
    first, second = tuned.launches
    kept = {name: 7e9 for name in tuned.table.times(first) if name != BAD}
    tables.Table(INTERPRETER, {str(first): kept, str(second): dict(tuned.table.times(second))}).save(tmp_path / "t")
    again = resnet_fast.tune(*block(), path=tmp_path / "t")
    assert (again.measured, again.kept) == (1, 1)
    times = again.table.times(first)
    assert kept.items() <= times.items() and 0 < (times[BAD] or 0) < 7e9


@pytest.mark.interpret
def test_a_budget_of_zero_leaves_all_for_the_next_run(tmp_path: Path) -> None:
    tuned = resnet_fast.tune(*block(), budget_s=0, path=tmp_path / "t")
    assert (tuned.measured, tuned.kept, tuned.left) == (0, 0, 2)
    assert list(tmp_path.iterdir()) == [] and tuned.net_us is tuned.net_stock_us is None
    assert "2 left for the next run" in str(tuned)
    assert [(row.best, row.us, row.speedup) for row in tuned.rows()] == [(None, None, None)] * 2


@pytest.mark.interpret
def test_a_wrong_answer_is_refused_with_its_reason_and_never_chosen(
    broken: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(BAD, lambda spec, y: y * 2)
    net, x = block()
    tuned = resnet_fast.tune(net, x, path=tmp_path / "t")
    refused = {(name, candidate): reason for name, candidate, reason in tuned.refused}
    for one in tuned.launches:
        assert tuned.table.times(one)[BAD] is None
        assert refused[str(one), BAD].startswith("AssertionError: ")
        assert sum(t is not None for t in tuned.table.times(one).values()) == 2

    from resnet_fast.backends.triton import plan

    for forget in ([], ["cudnn"], ["cudnn", "64x32x32 w4 s4"]):  # measured ones, then the model's
        table = tables.Table(INTERPRETER, {name: {k: t for k, t in times.items() if k not in forget}
                                           for name, times in tuned.table.entries.items()})  # fmt: skip
        monkeypatch.setattr(plan, "table_of", lambda device, table=table: table)
        resnet_fast.clear_derived()
        (row,) = resnet_fast.explain(net, x).rows
        assert BAD not in row.detail and ("measured" in row.detail) == (len(forget) < 2)
        with torch.inference_mode():
            assert torch.isfinite(net(x)).all()
    resnet_fast.clear_derived()


@pytest.mark.interpret
def test_a_failure_at_full_size_is_a_refusal(broken: Callable[..., None], tmp_path: Path) -> None:
    def fail(spec: Any, y: Tensor) -> Tensor:
        if spec.n > proofs.BATCH:
            raise RuntimeError("too\nlarge")
        return y

    broken(BAD, fail)
    tuned = resnet_fast.tune(*block(proofs.BATCH + 1), path=tmp_path / "t")
    assert [(c, r) for _, c, r in tuned.refused if c == BAD] == [(BAD, "RuntimeError: too large")] * 2
    assert all(tuned.table.times(one)["64x32x32 w4 s4"] for one in tuned.launches)


@pytest.mark.interpret
def test_a_model_whose_choice_fails_can_be_tuned(broken: Callable[..., None]) -> None:
    """Tuning is what makes the choice succeed."""

    def fail(spec: Any, y: Tensor) -> Tensor:
        raise RuntimeError("out of resources")

    net, x = block()
    specs = tuning.specs_of(net, x)
    broken("all", fail)
    assert tuning.specs_of(net, x) == specs != []


@pytest.mark.interpret
def test_memory_that_ran_out_is_no_refusal(broken: Callable[..., None], tmp_path: Path) -> None:
    """Another process may have used the memory, so nothing is recorded."""

    def fail(spec: Any, y: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    net, x = block()
    launches = tuning.launches_of(tuning.specs_of(net, x), x.device)
    broken("all", fail)
    with pytest.raises(torch.OutOfMemoryError):
        tuning.tune_launches(launches, x.device, path=tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.interpret
def test_an_interrupt_leaves_the_table_as_far_as_it_got(tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resnet_fast.tune(*block(), on_progress=interrupt, path=tmp_path / "t")
    assert len(tables.read(tmp_path / "t", INTERPRETER).entries) == 1
    again = resnet_fast.tune(*block(), budget_s=0, path=tmp_path / "t")
    assert (again.kept, again.left) == (1, 1)


@pytest.mark.interpret
def test_the_default_table_is_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "cache"))
    tuned = resnet_fast.tune(*block(), budget_s=0)
    assert tuned.path == tmp_path / "cache" / "tuning" / "triton-interpreter.json"
    assert tuning.table_file(torch.device("cpu")) == tuned.path


@pytest.mark.interpret
def test_a_model_that_cannot_be_tuned_says_why(tmp_path: Path) -> None:
    net, x = block()
    with pytest.raises(UserError, match=r"expected an input with elements, got shape \(0, 16, 3, 3\)"):
        resnet_fast.tune(net, x[:0])
    for other in (nn.Sequential(BasicBlock(16, 16)).half().eval(), block(backend="auto")[0]):
        with pytest.raises(UserError, match=r"whose convolutions run on Triton, got none .*accelerate\(model\)"):
            resnet_fast.tune(other, x)
    with pytest.raises(UserError, match="expected a model that launches stem, got one that launches conv_bn_act_3x3"):
        resnet_fast.tune(net, x, only="stem")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "table.json", tmp_path):
        with pytest.raises(UserError, match=r"expected a tuning table .*can be written, got .*; name another"):
            resnet_fast.tune(net, x, path=path)


def training_block() -> tuple[nn.Module, Tensor]:
    """Return a basic block of 16 channels in training mode, and its input (2, 16, 4, 4)."""
    net = nn.Sequential(BasicBlock(16, 16)).to(memory_format=torch.channels_last)
    return resnet_fast.accelerate(net.train(), backend="triton"), torch.randn(2, 16, 4, 4)


def tuned_step(net: nn.Module, x: Tensor, **options: Any) -> tuning.Tuned:
    with torch.autocast("cpu", torch.float16):
        return resnet_fast.tune(net, x, **options)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuning.Tuned:
    """Tune a training step."""
    return tuned_step(*training_block(), path=tmp_path_factory.mktemp("train") / "t")


@pytest.mark.interpret
def test_a_training_step_is_measured_in_every_direction(step: tuning.Tuned) -> None:
    assert (step.measured, step.left, step.refused) == (6, 0, [])
    assert [one.kernel for one in step.launches] == list(training_configs.KERNELS) * 2
    assert [one.prologue for one in step.launches] == [False] * 3 + [True] * 3
    for one in step.launches:
        assert H100.gpu is not None
        packed = {str(c) for c in training_configs.candidates(one, H100.gpu, packed=True)}
        times = step.table.times(one)
        assert set(times) == packed | {"cudnn"} and all("packed" in c for c in packed)
        assert all(us is not None and us > 0 for us in times.values())
    rows = step.rows()
    assert step.net_us == pytest.approx(sum(row.us or 0 for row in rows))
    assert step.net_stock_us == pytest.approx(sum(row.stock_us or 0 for row in rows))


@pytest.mark.interpret
def test_a_table_decides_per_convolution_and_direction(step: tuning.Tuned) -> None:
    fwd, dgrad, wgrad = step.launches[3:]
    times = {
        str(fwd): {"cudnn": 1.0},
        str(dgrad): {c: 9.0 if c == "cudnn" else 1.0 for c in step.table.times(dgrad)},
        str(wgrad): {c: None for c in step.table.times(wgrad) if c != "cudnn"},
    }
    found = launch_plan.plan_training(fwd.last, True, H100, tables.Table(INTERPRETER, times), packed=True)
    assert found.fwd == training_configs.CUDNN == found.wgrad and found.dgrad.kernel == "conv_dgrad"


@pytest.mark.interpret
def test_a_frozen_step_is_measured_beside_pytorchs_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, dgrad and wgrad; cuDNN's fused kernel is refused where there is none. The next step runs the fastest."""
    from resnet_fast.backends.triton import device
    from resnet_fast.backends.triton.training import frozen_chain

    every = tuning.launches.candidates

    def few(one: LaunchSpec, model: devices.Device) -> tuple[configs.Config, ...]:
        found = every(one, model)
        return (next(c for c in found if not c.stock), *(c for c in found if c.stock))

    monkeypatch.setattr(tuning.launches, "candidates", few)
    net, x = training_block()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    tuned = tuned_step(net, x, path=tmp_path / "t")
    assert (tuned.measured, tuned.left) == (6, 0) and {c for _, c, _ in tuned.refused} == {"cudnn_fused"}
    assert [one.folded for one in tuned.launches].count(True) == 4
    assert all(tuned.table.times(one)["cudnn"] is not None for one in tuned.launches)
    rows = tuned.rows()
    assert tuned.net_us == pytest.approx(sum(row.us or 0 for row in rows))
    assert tuned.net_stock_us == pytest.approx(sum(row.stock_us or 0 for row in rows))
    monkeypatch.setattr(frozen_chain, "table_of", lambda _: tuned.table)  # of the interpreter none is read
    device.forget_tables()
    with torch.autocast("cpu", torch.float16):
        (told,) = {row.detail for row in resnet_fast.explain(net, x).rows if row.backend == "triton"}
    for row, one in zip(rows, tuned.launches, strict=True):
        assert (f"cudnn runs {one}: {row.stock_us:.1f} us measured, ours" in told) == (row.best == "cudnn"), told
    assert any(row.best == "cudnn" for row in rows)  # beside an interpreter


@pytest.mark.interpret
def test_tuning_a_training_step_moves_no_statistic(tmp_path: Path) -> None:
    net, x = training_block()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    assert tuned_step(net, x, budget_s=0, path=tmp_path / "t").left == 6
    assert net.training and all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.interpret
def test_a_wrong_gradient_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton.training import conv_wgrad, wgrad_sum

    real = conv_wgrad.conv_wgrad

    def wrong(*args: Any) -> Any:
        dw, reduction = real(*args)
        wgrad_sum.reduce_splits(reduction)
        return 1.01 * dw, wgrad_sum.NO_REDUCTION

    monkeypatch.setattr(conv_wgrad, "conv_wgrad", wrong)
    tuned = tuned_step(*training_block(), path=tmp_path / "t", only="conv_wgrad")
    assert tuned.measured == 2 and tuned.refused
    assert all("over the budget" in reason for _, _, reason in tuned.refused)
    for one in tuned.launches:
        assert {c for c, us in tuned.table.times(one).items() if us is not None} == {"cudnn"}


@pytest.mark.interpret
def test_only_one_kernel(tmp_path: Path) -> None:
    tuned = resnet_fast.tune(*block(), budget_s=0, path=tmp_path / "t", only="conv_bn_act_3x3")
    assert tuned.left == 2
    assert str(tuning.default_device()) == "cpu"


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Verdict], None]]:
    """Decide whether Triton is available."""

    def decide(verdict: Verdict) -> None:
        monkeypatch.setattr(catalog, "availability", lambda: {"triton": verdict})

    return decide


def test_without_triton_it_says_what_is_missing(triton: Callable[[Verdict], None]) -> None:
    triton(Verdict.no("a CUDA device", "none", "use another backend"))
    net, x = block()
    for call in (lambda: resnet_fast.tune(net, x), tuning.default_device):
        with pytest.raises(
            BackendError, match=r"tuning needs the Triton backend: expected a CUDA device, got none; use"
        ):
            call()


def test_an_unknown_kernel_lists_the_close_ones(triton: Callable[[Verdict], None]) -> None:
    triton(Verdict.yes())
    with pytest.raises(UserError, match=r"expected the name of a kernel, got 'bottlenek'; did you mean bottleneck\?"):
        resnet_fast.tune(*block(), only="bottlenek")


def test_a_model_on_another_device_is_an_error(
    triton: Callable[[Verdict], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    triton(Verdict.yes())
    monkeypatch.setattr(tuning, "_triton_devices", lambda: ("cuda",))
    with pytest.raises(UserError, match="expected a model and an input on cuda, got an input on cpu; move both there"):
        resnet_fast.tune(*block())


def test_a_row_says_what_is_known() -> None:
    one = launch(shapes.problems("resnet50")["r50.layer1.0.conv1"])
    times: dict[str, float | None] = {"a": 4.0, "b": 2.0, "cudnn": 5.0, "cudnn_fused": 3.0, "c": None, "d": None}
    for known, expected in (
        (times, ("b", 2.0, 3.0, 1.5, 2)),
        ({"a": 1.0}, ("a", 1.0, None, None, 0)),
        ({"a": None}, (None, None, None, None, 1)),
        ({}, (None, None, None, None, 0)),
    ):
        tuned = tuning.Tuned(tables.Table("gpu", {str(one): known}), Path("t"), (one,))
        (row,) = tuned.rows()
        assert (row.best, row.us, row.stock_us, row.speedup, row.refused) == expected
        assert row.launch == str(one)


def test_the_best_of_a_row_is_what_runs() -> None:
    """The report and the choice agree on ties and refusals."""
    spec = shapes.problems("resnet50", dtype="bfloat16")["r50.layer3.1.conv2"]
    one = launch(spec)
    assert H100.gpu is not None
    names = [str(c) for c in configs.candidates(one, H100.gpu)]
    table = tables.Table("gpu", {str(one): {"cudnn": 3.0, names[0]: 3.0, names[1]: None, names[2]: 4.0}})
    (row,) = tuning.Tuned(table, Path("t"), (one,)).rows()
    assert row.best == str(launch_plan.plan_launches(spec, H100, table).configs[0])


def test_public_names() -> None:
    assert resnet_fast.tune is tuning.tune and resnet_fast.Tuned is tuning.Tuned
    assert {"tune", "Tuned"} <= set(dir(resnet_fast))
