"""Proving configs at their first use: with a prover that lies, refuses or fails, and on the interpreter's kernels."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast import devices, flags
from resnet_fast.errors import BackendError
from resnet_fast.spec import YES, ConvSpec, Epilogue, LaunchSpec
from resnet_fast.tuning import configs, launch_plan
from resnet_fast.tuning import proofs as verdicts
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.launch_plan import LaunchPlan
from resnet_fast.tuning.routes import launch
from resnet_fast.tuning.tables import Table
from tests.support.processes import in_threads

H100 = devices.gpu("h100")
CPU = torch.device("cpu")
SPEC = ConvSpec(
    n=256, h=14, w=14, ci=256, co=256, r=3, s=3, padding=(1, 1), dtype="bfloat16", epilogue=Epilogue(relu=True)
)
Prover = Callable[[LaunchSpec, Config], str]


def settle(table: Table) -> tuple[LaunchPlan, str, bool]:
    from resnet_fast.backends.triton import proofs

    return proofs.settled(
        lambda hopeful: launch_plan.plan_launches(SPEC, H100, table, hopeful),
        lambda plan: plan.chosen,
        lambda one, device: None,
        CPU,
        table,
    )


@pytest.fixture
def prover(monkeypatch: pytest.MonkeyPatch) -> Callable[[Prover], list[str]]:
    """Pretend that there is a GPU, with a prover; return the list of what it is asked."""
    from resnet_fast.backends.triton import proofs

    def install(answer: Prover) -> list[str]:
        asked: list[str] = []

        def prove(one: LaunchSpec, config: Config, problem: Any, device: torch.device) -> str:
            asked.append(str(config))
            return answer(one, config)

        monkeypatch.setattr(proofs, "prove", prove)
        monkeypatch.setattr(proofs, "obstacle", lambda device: ("", True))
        return asked

    return install


def eight(plan: LaunchPlan) -> bool:
    return any(configs.needs_proof(one, config) for one, config in plan.chosen)


def test_what_a_plan_wants_is_proved_once_and_kept(prover: Callable[[Prover], list[str]]) -> None:
    from resnet_fast.backends.triton import proofs

    asked = prover(lambda one, config: "")
    table = Table("Kept")
    plan, note, lasts = settle(table)
    assert eight(plan) and note == "" and lasts and asked == [str(plan.configs[0])]
    settle(table)
    assert len(asked) == 1
    settle(Table("Kept", proofs=proofs.load("Kept")))  # the next process
    assert len(asked) == 1
    settle(Table("Another GPU"))
    assert len(asked) == 2


def test_a_wrong_result_is_refused_with_a_logged_reason_and_the_next_candidate_is_tried(
    prover: Callable[[Prover], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    asked = prover(lambda one, config: "AssertionError: error 3e2" if len(set(asked)) == 1 else "")
    plan, note, lasts = settle(Table("Liar"))
    assert eight(plan) and lasts and len(asked) == 2 and str(plan.configs[0]) == asked[1]
    assert f"{asked[0]} of conv_bn_act_3x3 refused: AssertionError: error 3e2" in note
    assert "is refused on Liar" in caplog.text and asked[0] in caplog.text


def test_where_all_are_refused_a_config_runs_that_needs_no_proof(prover: Callable[[Prover], list[str]]) -> None:
    asked = prover(lambda one, config: "CompilationError: no")
    plan, note, lasts = settle(Table("Refuses"))
    assert not eight(plan) and lasts and note.count("refused: CompilationError") == len(asked) >= 2
    assert plan == launch_plan.plan_launches(SPEC, H100, Table("Refuses"))


def test_full_memory_is_no_verdict(prover: Callable[[Prover], list[str]]) -> None:
    def fail(one: LaunchSpec, config: Config) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    prover(fail)
    table = Table("Full")
    plan, note, lasts = settle(table)
    assert not eight(plan) and not lasts and "not proved, the GPU's memory is full" in note
    assert table.proofs.verdicts == {}


def test_a_broken_context_is_an_error_and_not_tried_again(
    prover: Callable[[Prover], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnet_fast.backends.triton import proofs

    asked = prover(lambda one, config: "")
    monkeypatch.setattr(proofs, "_broken", lambda device: "CUDA error: an illegal memory access")
    table = Table("Broken")
    with pytest.raises(BackendError, match=r"broke the CUDA context .*illegal memory access.*start the process again"):
        settle(table)
    assert table.proofs.verdict(launch(SPEC), plan_config(asked[0])) == "CUDA error: an illegal memory access"


def plan_config(name: str) -> Config:
    return next(c for c in configs.SHIPPED["conv_bn_act_3x3"] if str(c) == name)


@pytest.mark.parametrize(
    ("device", "state", "reason", "lasts"),
    [
        ("cpu", "", "there is no GPU to prove it on", True),
        ("cuda", "off", "RESNET_FAST_PROVE=0", True),
        ("cuda", "tracing", "PyTorch is tracing", False),
        ("cuda", "capturing", "a CUDA graph is being captured", False),
        ("cuda", "", "", False),
    ],
)
def test_when_no_proof_can_run(
    device: str, state: str, reason: str, lasts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnet_fast.backends.triton import proofs

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state == "capturing")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: state == "tracing")
    if state == "off":
        monkeypatch.setenv(flags.PROVE.name, "0")
    assert proofs.obstacle(torch.device(device)) == (reason, lasts)


def test_without_a_proof_the_plan_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton import proofs

    monkeypatch.setattr(proofs, "obstacle", lambda device: ("a CUDA graph is being captured", False))
    plan, note, lasts = settle(Table("Capturing"))
    assert not eight(plan) and not lasts
    assert note.startswith("not proved, a CUDA graph is being captured: ") and "w8" in note


def test_a_proof_sees_no_mode_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton import proofs

    seen: list[Any] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Random:
        def check(self, config: Config) -> None:
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            torch.zeros(2) + 1

    monkeypatch.setattr(proofs, "obstacle", lambda device: ("", True))
    table = Table("Modes")
    with torch.inference_mode(), torch.autocast("cpu"), Spy():
        proofs.settled(
            lambda hopeful: launch_plan.plan_launches(SPEC, H100, table, hopeful),
            lambda plan: plan.chosen, lambda one, device: Random(), CPU, table,
        )  # fmt: skip
    assert seen == [(False, False, False)]


def test_verdicts_that_cannot_be_kept_hold_for_this_process(
    prover: Callable[[Prover], list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Any, new: Any) -> None:
        raise PermissionError(13, "Permission denied")

    asked = prover(lambda one, config: "")
    monkeypatch.setattr(verdicts, "add", fail)
    table = Table("Read-only")
    assert eight(settle(table)[0]) and eight(settle(table)[0]) and len(asked) == 1
    assert "verdicts are not kept" in caplog.text


SMALL = {"n": 1, "h": 6, "w": 6, "ci": 16, "co": 16, "r": 3, "s": 3, "padding": (1, 1), "dtype": "float16"}
EIGHT = {"num_warps": 8, "num_stages": 1}


@pytest.mark.parametrize("wrong", [False, True])
def test_training_needs_one_proof_per_gpu_that_programs_hand_results_over(
    wrong: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from resnet_fast.backends.triton import proofs

    monkeypatch.setenv(flags.CACHE, str(tmp_path))
    monkeypatch.setattr(proofs, "obstacle", lambda device: ("", True))
    monkeypatch.setattr(proofs, "_broken", lambda device: "")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    checked = []

    def check(device: torch.device) -> None:
        checked.append(device)
        if wrong:
            raise AssertionError("the mean of run 3")

    gpu = torch.device("cuda", 1)
    for _ in range(2):  # two processes
        table = Table("Some GPU", proofs=proofs.load("Some GPU"))
        for _ in range(2):
            verdict, lasts = proofs.hand_over(check, gpu, table)
            assert bool(verdict) is not wrong and lasts
            said = r"expected a GPU on which .*, got Some GPU, .*the mean of run 3.*'reference'" if wrong else "$"
            assert re.match(said, verdict.reason)
    assert checked == [gpu]


def test_a_hand_over_that_breaks_the_context_is_refused_in_the_next_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from resnet_fast.backends.triton import proofs

    monkeypatch.setenv(flags.CACHE, str(tmp_path))
    monkeypatch.setattr(proofs, "obstacle", lambda device: ("", True))
    monkeypatch.setattr(proofs, "_broken", lambda device: "CUDA error: an illegal memory access")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    gpu = torch.device("cuda", 0)
    with pytest.raises(BackendError, match=r"broke the CUDA context \(CUDA error: .*; start the process again"):
        proofs.hand_over(lambda device: None, gpu, Table("Some GPU"))
    verdict, lasts = proofs.hand_over(pytest.fail, gpu, Table("Some GPU", proofs=proofs.load("Some GPU")))  # type: ignore[arg-type]
    assert not verdict and lasts and "an illegal memory access" in verdict.reason


def test_threads_prove_the_hand_over_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from resnet_fast.backends.triton import proofs

    monkeypatch.setattr(proofs, "_broken", lambda device: "")
    monkeypatch.setenv(flags.CACHE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    both = threading.Barrier(2)
    monkeypatch.setattr(proofs, "obstacle", lambda device: (both.wait(60) and "", True))  # both found no verdict
    checked, table = [], Table("Some GPU")

    def ask() -> None:
        assert proofs.hand_over(checked.append, torch.device("cuda", 0), table) == (YES, True)

    in_threads(ask, ask)
    assert len(checked) == 1


def test_a_full_memory_is_no_verdict_on_the_hand_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from resnet_fast.backends.triton import proofs

    monkeypatch.setenv(flags.CACHE, str(tmp_path))
    monkeypatch.setattr(proofs, "obstacle", lambda device: ("", True))
    monkeypatch.setattr(proofs, "_broken", lambda device: "")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    gpu, table = torch.device("cuda", 0), Table("Some GPU")

    def full(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    verdict, lasts = proofs.hand_over(full, gpu, table)
    assert verdict and not lasts and verdict.reason.endswith("hand results over: the GPU's memory is full")
    assert not table.proofs.verdicts and not verdicts.user_file("Some GPU").exists()
    assert proofs.hand_over(lambda device: None, gpu, table) == (YES, True)


def test_a_hand_over_that_cannot_be_proved_now_is_named_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton import proofs

    monkeypatch.setattr(proofs, "obstacle", lambda device: ("a CUDA graph is being captured", False))
    verdict, lasts = proofs.hand_over(lambda device: None, torch.device("cuda", 0), Table("Some GPU"))
    assert verdict and not lasts
    assert verdict.reason.startswith("not proved that programs") and verdict.reason.endswith("is being captured")


@pytest.mark.interpret
def test_a_proof_of_an_inference_launch_finds_a_wrong_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton import launchers, proofs
    from resnet_fast.backends.triton.problem import problem

    one = launch(ConvSpec(**SMALL, epilogue=Epilogue(relu=True)))  # type: ignore[arg-type]
    config = Config(one.kernel, 32, 16, 16, **EIGHT)  # type: ignore[arg-type]
    assert proofs.prove(one, config, problem, CPU) == ""
    right = launchers.LAUNCHERS[one.kernel]
    monkeypatch.setitem(launchers.LAUNCHERS, one.kernel, lambda *args: right(*args) * 1.01)
    assert proofs.prove(one, config, problem, CPU).startswith("AssertionError: ")


@pytest.mark.interpret
@pytest.mark.parametrize("keeps", [True, False])
def test_pytorchs_fused_kernel_must_keep_nan(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton import launchers, proofs
    from resnet_fast.backends.triton.problem import problem

    def fused(spec: LaunchSpec, config: Config, packed: Any, x: Any, res: Any, xp: Any) -> Any:
        weight = packed.weight.permute(0, 3, 1, 2)
        y = torch.conv2d(x, weight, packed.bias, *spec.last.geometry()).relu()
        return y if keeps else y.nan_to_num(0.0)

    monkeypatch.setitem(launchers.LAUNCHERS, "cudnn_fused", fused)
    one = launch(ConvSpec(**SMALL, epilogue=Epilogue(relu=True)))  # type: ignore[arg-type]
    why = proofs.prove(one, Config("cudnn_fused"), problem, CPU)
    assert why == "" if keeps else "are NaN in stock PyTorch and finite here" in why


TRAINING = [("conv_fwd", True), ("conv_dgrad", True), ("conv_dgrad", False), ("conv_wgrad", True)]


@pytest.mark.interpret
@pytest.mark.parametrize(("kernel", "prologue"), TRAINING)
@pytest.mark.parametrize("wrong", [False, True])
def test_a_proof_of_a_training_launch_checks_all_that_it_computes(
    kernel: str, prologue: bool, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what a step adds is wrong here, not the plain output: statistics, sums, the added gradient, passengers."""
    from resnet_fast.backends.triton import proofs
    from resnet_fast.backends.triton.training import convolution
    from resnet_fast.backends.triton.training.problem import training_problem

    conv = ConvSpec(**SMALL, batch_stats=True, grad=True)  # type: ignore[arg-type]
    one = LaunchSpec(kernel, (conv,), prologue=prologue)
    config = Config(kernel, 32, 16, 16, packed=True, **EIGHT)  # type: ignore[arg-type]
    if wrong and kernel == "conv_fwd":
        real = convolution.forward

        def off(*args: Any) -> Any:
            y, partials, rows = real(*args)
            return y, None if partials is None else partials * 1.1, rows

        monkeypatch.setattr(convolution, "forward", off)
    elif wrong and prologue:
        to = convolution.dgrad_to
        monkeypatch.setattr(convolution, "dgrad_to", lambda *args: (to(*args)[0], to(*args)[1] * 1.1))
        weight = convolution.wgrad
        monkeypatch.setattr(convolution, "wgrad", lambda *args: weight(*args[:5]))  # leaves its passengers behind
    elif wrong:
        plain = convolution.dgrad
        monkeypatch.setattr(convolution, "dgrad", lambda *args, add=None, **more: plain(*args, **more))
    why = proofs.prove(one, config, training_problem, CPU)
    assert why.startswith("AssertionError: ") if wrong else why == ""
