"""``warm``: which kernels a model needs, found without launching one, and what the process after it compiles."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import resnet_fast
from resnet_fast.backends.triton import ahead, launch
from resnet_fast.dispatch import catalog
from resnet_fast.ops import warm as warming

compiler_only = pytest.mark.skipif(launch.INTERPRETED, reason="needs Triton's compiler")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Note the kernels that would be compiled."""
    found: list[str] = []

    def compile_all(jobs: list[Any], workers: int, on_progress: Any = None) -> dict[str, str]:
        found.extend(job.name for job in jobs)
        return {}

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "compile_all", compile_all)
    return found


def net(**kwargs: Any) -> nn.Module:
    return resnet_fast.accelerate(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10, **kwargs)).eval()


X = torch.empty(2, 3, 64, 64)


@compiler_only
def test_inference_and_training_need_different_kernels(given: list[str]) -> None:
    report = resnet_fast.warm(net(), X, gpu="h100")
    assert report.compiled == report.kernels == len(given) > 4 and not report.there and not report.failed
    assert not [name for name in given if "bwd" in name or "wgrad" in name]
    given.clear()
    resnet_fast.warm(net(), X, train=True, gpu="h100")
    assert {"conv_fwd_kernel", "conv_wgrad_kernel", "conv_dgrad_kernel", "pool_end_bwd_kernel"} <= set(given)


@compiler_only
def test_nothing_in_the_model_changes_or_is_called(given: list[str]) -> None:
    model, called = net().train(), []
    model.layer1[0].register_forward_hook(lambda *_: called.append("inner"))
    model.register_forward_pre_hook(lambda *_: called.append("outer"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    resnet_fast.reset_stats()
    resnet_fast.warm(model, X, train=True, gpu="h100")
    assert given and not called and model.training
    assert resnet_fast.stats() == {"calls": {}, "fallbacks": {}}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@compiler_only
def test_a_net_with_cuda_graphs_and_a_frozen_norm(given: list[str]) -> None:
    model = resnet_fast.accelerate(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), cuda_graph=True)
    resnet_fast.warm(model, X, gpu="h100")
    assert len(given) > 4
    model.train().layer1[0].bn1.eval()
    resnet_fast.warm(model, X, train=True, gpu="h100")
    assert "constant_kernel" in given and not model.layer1[0].bn1.training


@compiler_only
def test_gradients_that_nobody_wants_need_no_kernel(given: list[str]) -> None:
    model = net()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("layer4", "fc")))
    resnet_fast.warm(model, X, train=True, gpu="h100")
    some = len(given)
    given.clear()
    for p in model.parameters():
        p.requires_grad_()
    resnet_fast.warm(model, X, train=True, gpu="h100")
    assert 0 < some < len(given)


@compiler_only
def test_autocast_decides_the_dtype_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []

    def compile_ahead(calls: Any, target_of: Any, on_progress: Any = None) -> Any:
        planned[:] = calls

    monkeypatch.setattr(ahead, "compile_ahead", compile_ahead)
    resnet_fast.warm(net(), X, train=True, gpu="h100", rounded=torch.bfloat16)
    assert {call.spec.dtype for call in planned} == {"bfloat16"}
    resnet_fast.warm(net(), X, train=True, gpu="h100")
    assert {call.spec.dtype for call in planned} == {"float32"}
    resnet_fast.warm(net().half(), X.half(), batches=(1, 5), gpu="h100")
    assert [call.spec.n for call in planned] == [1] * 5 + [5] * 5


@compiler_only
def test_a_block_outside_of_a_net(given: list[str]) -> None:
    block = resnet_fast.accelerate(nn.Sequential(Bottleneck(64, 16), nn.ReLU(inplace=True)))
    resnet_fast.warm(block, torch.empty(2, 64, 8, 8), train=True, gpu="a100")
    assert "conv_dgrad_kernel" in given


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"gpu": None}, resnet_fast.BackendError, "expected a GPU to compile for, got none; name one of h100"),
        ({"gpu": "h1000"}, resnet_fast.UserError, "did you mean h100"),
        ({"batches": (1, 0)}, resnet_fast.UserError, r"batches of at least 1, such as \(1, 8\), got \(1, 0\)"),
        ({"batches": 8}, resnet_fast.UserError, "batches of at least 1, .* got 8"),
        ({"x": X[:0]}, resnet_fast.UserError, "an input with elements"),
        ({"x": [X]}, resnet_fast.UserError, "a tensor to warm with, got list"),
        ({"model": "resnet18"}, resnet_fast.UserError, r"an nn\.Module, got str"),
        ({"model": nn.Conv2d(3, 8, 3)}, resnet_fast.UserError, "call resnet_fast.accelerate"),
    ],
)
@compiler_only
def test_a_mistake_is_an_error(change: dict[str, Any], error: type[Exception], said: str) -> None:
    arguments: dict[str, Any] = {"model": net(), "x": X, "gpu": "h100", **change}
    if torch.cuda.is_available() and change == {"gpu": None}:
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=said):
        resnet_fast.warm(**arguments)


def test_an_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "impls", lambda op: ())
    with pytest.raises(resnet_fast.BackendError, match="unset TRITON_INTERPRET"):
        resnet_fast.warm(net(), X, gpu="h100")


@pytest.fixture
def first_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many calls each first step compiles for."""
    found: list[int] = []

    class Module:
        target_of = staticmethod(lambda gpu, device: None)
        compile_ahead = staticmethod(lambda calls, target_of, on_progress=None: found.append(len(calls)))

    monkeypatch.setattr(warming, "_ahead", Module)
    monkeypatch.setattr(warming, "_chosen", lambda *_: True)
    return found


def test_a_first_training_step_compiles_once_per_input(first_steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = net().train()
    for size in (64, 64, 96):
        warming.ready_to_train(model, torch.empty(2, 3, size, size))
    assert first_steps == [5, 5]
    monkeypatch.setattr(warming, "TRAINING_SIZES", 3)
    for size in (128, 160):
        warming.ready_to_train(model, torch.empty(2, 3, size, size))
    assert first_steps == [5, 5, 5]
    monkeypatch.setattr(warming, "TRAINING_SIZES", 100)
    monkeypatch.setenv("RESNET_FAST_COMPILE_WORKERS", "0")
    warming.ready_to_train(model, torch.empty(3, 3, 64, 64))
    assert first_steps == [5, 5, 5]


def test_a_model_that_cannot_be_planned_still_trains(first_steps: list[int], caplog: pytest.LogCaptureFixture) -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    model = net()
    model.avgpool = nn.Sequential(Reads(), model.avgpool)
    with caplog.at_level(logging.INFO, logger="resnet_fast"):
        warming.ready_to_train(model.train(), X)
    assert not first_steps and "kernels are compiled one by one" in caplog.text


SECOND = """
import json, os
from triton import knobs
from resnet_fast.benchmarks import null_gpu
null_gpu.install(compile_kernels=True)
import tests.ops.test_warm as here
compiled = []
knobs.compilation.listener = lambda src, cache_hit, **_: None if cache_hit else compiled.append(src.name)
here.both(device="cuda", run=lambda model, x, train: here.step(model, x, train))
print(json.dumps([compiled, sum(null_gpu.launches().values())]), flush=True)
os._exit(0)  # autograd's thread for the null GPU never ends
"""


def both(device: str, run: Callable[[nn.Module, Tensor, bool], Any]) -> None:
    """Call ``run`` for inference and for training of a small block."""
    for train in (False, True):
        torch.manual_seed(0)
        model = resnet_fast.accelerate(nn.Sequential(BasicBlock(16, 16)).train(train)).to(device)
        x = torch.empty(2, 16, 8, 8, dtype=torch.bfloat16, device=device)
        run(model if train else model.to(torch.bfloat16), x.contiguous(memory_format=torch.channels_last), train)


def step(model: nn.Module, x: Tensor, train: bool) -> None:
    """Run inference or a training step."""
    with torch.set_grad_enabled(train):
        y = model(x)
    if train:
        y.backward(torch.empty_like(y))


@compiler_only
@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "auto"])
def test_the_next_process_compiles_nothing(workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launches are real up to the driver: a GPU that computes nothing, with Triton's compiler and cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    reports: list[Any] = []
    both("cpu", lambda model, x, train: reports.append(resnet_fast.warm(model, x, train, gpu="h100")))
    assert [report.failed for report in reports] == [(), ()] and all(report.compiled for report in reports)
    environment = {**os.environ, "RESNET_FAST_COMPILE_WORKERS": workers}
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    compiled, launched = json.loads(done.stdout.splitlines()[-1])
    assert compiled == [] and launched >= 10  # a pass of one block each, without and with gradients


FIRST_STEP = """
import json, logging, os, threading
from triton import knobs
from resnet_fast.benchmarks import null_gpu
null_gpu.install(compile_kernels=True)
import tests.ops.test_warm as here
logging.basicConfig(level=logging.INFO, format="%(message)s")
threads = []
name = lambda: threading.current_thread().name
knobs.compilation.listener = lambda src, cache_hit, **_: None if cache_hit else threads.append(name())
here.train_a_block()
print(json.dumps(threads), flush=True)
os._exit(0)  # autograd's thread for the null GPU never ends
"""


def train_a_block() -> None:
    """Run the first training step of a block that is in no net."""
    block = resnet_fast.accelerate(BasicBlock(16, 16)).cuda()
    x = torch.empty(2, 16, 8, 8, dtype=torch.bfloat16, device="cuda")
    step(block, x.contiguous(memory_format=torch.channels_last), train=True)


@compiler_only
@pytest.mark.slow
def test_a_block_outside_of_a_net_compiles_each_pass_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "RESNET_FAST_COMPILE_WORKERS": "2", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_STEP]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    threads = json.loads(done.stdout.splitlines()[-1])
    assert len(threads) >= 8 and all(name.startswith("resnet-fast-compile") for name in threads)
    lines = re.findall(r"compiled (\d+) kernels in", done.stderr)
    assert len(lines) == 2 and sum(map(int, lines)) == len(threads)  # forward and backward pass
