"""A whole net in one call: the compiled graph equals its parts and follows every edit."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import resnet_fast
from resnet_fast import numerics, packing_budget, paper_nets, parameter_cache
from resnet_fast.backends.onednn import net as module
from resnet_fast.spec import ConvSpec, NetSpec
from tests.support.nets import randomize
from tests.support.processes import in_threads

NETS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10),
    "basic": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    "grouped": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=16),
    "dilated": lambda: ResNet(
        Bottleneck, [1, 1, 2, 2], num_classes=10, replace_stride_with_dilation=[False, True, True]
    ),
    "plain": paper_nets.plain18,
    "cifar plain": paper_nets.cifar_plain20,
    "cifar": lambda: paper_nets.cifar_resnet20(shortcut="B"),
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Compile at the first call; return the list that collects the input shapes compiled for."""
    shapes: list[torch.Size] = []
    compile_graph = module._compile

    def spy(call: object, spec: NetSpec, x: torch.Tensor, measured: list[int]) -> object:
        shapes.append(x.shape)
        return compile_graph(call, spec, x, measured)

    monkeypatch.setattr(module, "calls_before_compiling", lambda spec: 0)
    monkeypatch.setattr(module, "_compile", spy)
    return shapes


def randomized(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(NETS[name]()).eval()


@torch.inference_mode()
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_is_as_accurate_as_eager(name: str, dtype: torch.dtype, compiled: list[torch.Size]) -> None:
    stock = randomized(name).to(dtype)
    x = torch.randn(2, 3, 48, 48).to(dtype)
    reference, eager = copy.deepcopy(stock).double()(x.double()), stock(x)
    out = resnet_fast.accelerate(stock)(x)
    assert compiled == [x.shape]
    numerics.assert_close(out, reference, eager, gemm_k=512 * 9)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_equals_its_parts_and_comes_when_it_is_earned(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module.compute_dtype(dtype) != dtype:
        pytest.skip("this CPU has no bfloat16")
    calls: list[int] = []
    compile_graph = module._compile
    monkeypatch.setattr(module, "_compile", lambda *args: calls.append(len(outputs)) or compile_graph(*args))
    monkeypatch.setattr(packing_budget, "COMPILE", packing_budget.COMPILE / 15)
    net, x = resnet_fast.accelerate(randomized("bottleneck").to(dtype)), torch.randn(1, 3, 64, 64).to(dtype)
    outputs = [net(x)]
    (plan,) = parameter_cache.values_of(net.conv1.weight)
    patience = module.calls_before_compiling(plan.spec)
    assert module.CALLS_BEFORE_COMPILING < patience < 20
    for _ in range(patience + 1):
        outputs.append(net(x))
    assert calls == [patience]
    for out in outputs[1:]:
        if dtype == torch.bfloat16:
            assert torch.equal(out, outputs[0])
        else:
            torch.testing.assert_close(out, outputs[0], rtol=1e-5, atol=1e-5)


def test_a_large_call_earns_the_graph_at_the_fifth() -> None:
    spec = NetSpec((ConvSpec(n=32, h=224, w=224, ci=64, co=64, r=3, s=3, padding=(1, 1)),))
    assert module.calls_before_compiling(spec) == 4 == module.CALLS_BEFORE_COMPILING


@torch.inference_mode()
def test_sizes_that_come_in_turn_never_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compile", lambda *args: pytest.fail("compiled"))
    monkeypatch.setattr(module, "calls_before_compiling", lambda spec: 1)
    net = resnet_fast.accelerate(randomized("basic"), backend="onednn")
    for size in (32, 40, 48, 56, 64) * 3:
        net(torch.randn(1, 3, size, size))


@torch.no_grad()
def test_an_edit_reaches_the_graph(compiled: list[torch.Size]) -> None:
    stock = randomized("basic")
    x = torch.randn(2, 3, 48, 48)
    fused = resnet_fast.accelerate(copy.deepcopy(stock), backend="onednn")
    fused(x)
    for edit in (
        lambda n: n.layer3[0].conv2.weight.mul_(0.5),
        lambda n: n.layer1[0].bn2.bias.data.add_(1),
        lambda n: n.layer4[0].downsample[1].running_mean.fill_(0.3),
        lambda n: setattr(n.bn1, "eps", 0.1),
    ):
        for net in (stock, fused):
            edit(net)
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4)
    assert len(compiled) == 5


@contextmanager
def missing_switch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch._C, "_jit_set_llga_enabled")
        yield


@contextmanager
def no_torchscript() -> Iterator[None]:
    torch.jit._state.disable()
    try:
        yield
    finally:
        torch.jit._state.enable()


OFF: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "_jit_set_llga_enabled": missing_switch,
    "PYTORCH_JIT=0": no_torchscript,
    "optimized_execution": lambda: torch.jit.optimized_execution(False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OFF)
def test_what_torch_has_switched_off_is_noticed_and_said_once(
    name: str, compiled: list[torch.Size], caplog: pytest.LogCaptureFixture
) -> None:
    module._say_once.cache_clear()
    stock = randomized("basic")
    x = torch.randn(1, 3, 48, 48)
    expected = stock(x)
    fused = resnet_fast.accelerate(stock)
    with OFF[name](), caplog.at_level("INFO", "resnet_fast"):
        for _ in range(3):
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
    assert not compiled
    assert [name in m for m in caplog.messages if "part by part" in m] == [True]
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
    assert compiled == [x.shape]


@torch.no_grad()
def test_without_onednn_the_reference_runs(compiled: list[torch.Size]) -> None:
    stock = randomized("basic")
    x = torch.randn(1, 3, 48, 48)
    expected = stock(x)
    fused = resnet_fast.accelerate(stock)
    with torch.backends.mkldnn.flags(enabled=False):
        for _ in range(6):
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
    assert not compiled


@torch.no_grad()
def test_a_compiler_that_fails_leaves_the_parts(
    monkeypatch: pytest.MonkeyPatch, compiled: list[torch.Size], caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[int] = []

    def fail(*args: object) -> object:
        tried.append(1)
        raise RuntimeError("could not create a primitive\nC++ stack")

    monkeypatch.setattr(module, "_compile", fail)
    stock = randomized("basic")
    x = torch.randn(1, 3, 48, 48)
    expected = stock(x)
    fused = resnet_fast.accelerate(stock)
    for _ in range(3):
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
    assert tried == [1]
    assert [m for m in caplog.messages if "could not create a primitive" in m and "stack" not in m]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Return weak references to the memory of every weight that a graph is compiled from."""
    found: list[weakref.ref[Any]] = []
    fold = module._Convolution.of

    def of(conv: Any, norm: Any, dtype: torch.dtype) -> Any:
        folded = fold(conv, norm, dtype)
        array = folded.weight.permute(0, 2, 3, 1).numpy().copy()  # which lives as long as the tensor's storage
        found.append(weakref.ref(array))
        return folded._replace(weight=torch.from_numpy(array).permute(0, 3, 1, 2))

    monkeypatch.setattr(module._Convolution, "of", staticmethod(of))
    return found


@torch.no_grad()
@pytest.mark.parametrize("end", ["weights change", "clear_derived", "net dies"])
def test_a_graph_frees_its_weights(end: str, compiled: list[torch.Size], memory: list[weakref.ref[Any]]) -> None:
    net, x = resnet_fast.accelerate(randomized("basic"), backend="onednn"), torch.randn(1, 3, 32, 32)
    net(x)
    first = list(memory)
    assert compiled == [x.shape] and first and all(ref() is not None for ref in first)
    if end == "weights change":
        net.layer1[0].conv1.weight.mul_(1.01)
        net(x)
        assert len(memory) == 2 * len(first)
    elif end == "clear_derived":
        resnet_fast.clear_derived()
    else:
        del net
    gc.collect()
    assert not [ref for ref in first if ref() is not None]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident set is read from Linux' /proc")
@torch.no_grad()
def test_compiling_again_and_again_does_not_fill_the_memory(compiled: list[torch.Size]) -> None:
    """Covers one net with changing weights, and nets that come and go. One compile holds 20 MB of weights."""
    libc = ctypes.CDLL(None)

    def resident() -> float:
        gc.collect()
        libc.malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    x = torch.randn(1, 3, 32, 32)
    sizes = []
    for _ in range(4):
        net = resnet_fast.accelerate(randomized("basic"), backend="onednn")
        for _ in range(3):
            net.layer1[0].conv1.weight.mul_(1.01)
            net(x)
        sizes.append(resident())
    assert len(compiled) == 12
    assert sizes[-1] - sizes[0] < 30, sizes  # nine compiles, 180 MB of weights


def test_threads_run_a_net_while_one_of_them_compiles(compiled: list[torch.Size]) -> None:
    stock = randomized("basic")
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    xs = [torch.randn(n, 3, 32, 32) for n in (1, 2)]
    with torch.no_grad():
        expected = [stock(x) for x in xs]

    def work(k: int) -> None:
        with torch.no_grad():
            for i in range(12):
                j = (i // 4 + k) % 2
                torch.testing.assert_close(fused(xs[j]), expected[j], rtol=1e-4, atol=1e-4)

    in_threads(*(partial(work, k) for k in range(4)))
    assert compiled


@torch.no_grad()
def test_compiling_leaves_the_process_wide_switch_alone(compiled: list[torch.Size]) -> None:
    before = torch._C._jit_llga_enabled()
    resnet_fast.accelerate(randomized("basic"))(torch.randn(1, 3, 32, 32))
    assert compiled and torch._C._jit_llga_enabled() == before


@torch.no_grad()
def test_the_memory_of_many_sizes_is_bounded(compiled: list[torch.Size]) -> None:
    """A graph takes two copies of the weights, and at most three copies are kept: a second graph replaces the first."""
    parameter_cache.clear()
    stock = randomized("basic")
    fused = resnet_fast.accelerate(copy.deepcopy(stock), backend="onednn")
    for size in (32, 40, 48, 56, 32):
        x = torch.randn(1, 3, size, size)
        for _ in range(2):
            torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4)
        states = [plan.state for plan in parameter_cache.values_of(fused.conv1.weight)]
        assert module.nbytes(states) <= 3.1 * states[-1].weights
    assert len(compiled) == 5
