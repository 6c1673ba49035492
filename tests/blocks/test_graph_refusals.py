"""Calls that run without a CUDA graph and how they are counted; failed captures; inputs that are not on a GPU."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.blocks import recorder as recorder_module
from tests.support.graph_cases import (
    CpuRecorder,
    change_weight,
    eager,
    fallbacks,
    image,
    replays,
    small,
)


@contextmanager
def global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        yield
    finally:
        handle.remove()


class Watching(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_function_mode(model: nn.Module) -> Tensor:
    with Watching(), torch.no_grad():
        return model(image())


def with_grad(model: nn.Module) -> Tensor:
    out = model(image())
    assert out.requires_grad
    return out


def under_vmap(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.func.vmap(model)(image()[:, None])


def with_tangents(model: nn.Module) -> Tensor:
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        return model(image())


def with_global_hook(model: nn.Module) -> Tensor:
    with global_hook(), torch.no_grad():
        return model(image())


def empty(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(image(0))


def parameter(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(nn.Parameter(image()))


class Own(nn.Linear):
    pass


def own_layer(model: nn.Module) -> Tensor:
    model.fc = Own(64, 10).eval()
    with torch.no_grad():
        return model(image())


def hooked(model: nn.Module) -> Tensor:
    model.layer3[0].conv1.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        return model(image())


def replaced_forward(model: nn.Module) -> Tensor:
    model.fc.forward = lambda x: x
    with torch.no_grad():
        return model(image())


def partly_training(model: nn.Module) -> Tensor:
    model.layer1[0].bn1.train()
    with torch.no_grad():
        return model(image())


def replica(model: nn.Module) -> Tensor:
    model._is_replica = True
    with torch.no_grad():
        return model(image())


COUNTED = {
    with_grad: "autograd is on; wrap inference in torch.inference_mode()",
    under_vmap: "torch.func transforms",
    with_tangents: "forward-mode autograd is on",
    with_global_hook: "a global module hook",
    empty: "the batch is empty",
    in_function_mode: "a torch function mode is on",
    parameter: "expected a plain Tensor, got Parameter",
    own_layer: r"fc is a .*Own, whose Python code a replay would not run",
    hooked: "layer3.0.conv1 has a hook",
    replaced_forward: "fc has a hook or a replaced forward",
    partly_training: "layer1.0.bn1 is in training mode",
    replica: "DataParallel",
}


@pytest.mark.parametrize("call", COUNTED)
@pytest.mark.parametrize("used", [False, True])
def test_what_runs_eagerly_is_counted(
    call: Callable[[nn.Module], Tensor], used: bool, net: nn.Module, recorder: type[CpuRecorder]
) -> None:
    if used:
        with torch.no_grad():
            net(image())
    before = len(recorder.captures), replays()
    resnet_fast.reset_stats()
    call(net)
    assert (len(recorder.captures), replays() + before[1]) == before
    assert [r for r in resnet_fast.stats()["fallbacks"] if r.startswith("the net runs without its CUDA graph: ")]
    assert re.search(COUNTED[call], fallbacks())
    with resnet_fast.strict(), pytest.raises(resnet_fast.BackendError, match="strict mode: the net runs without its"):
        call(net)


def test_a_replaced_class_is_not_replayed(
    net: nn.Module, recorder: type[CpuRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, relu, linear = image(), nn.ReLU.forward, nn.Linear.forward
    with torch.no_grad():
        net(x)
        with monkeypatch.context() as patched:
            patched.setattr(nn.ReLU, "forward", lambda self, t: 2 * relu(self, t))
            assert torch.equal(net(x), eager(net, x))
            assert "nn.modules.activation.ReLU.forward, got another" in fallbacks()
        assert replays() == 1
        with monkeypatch.context() as patched:
            patched.setattr(nn.Linear, "forward", lambda self, t: 2 * linear(self, t))
            assert torch.equal(net(x), eager(net, x))
            assert "the forward of fc's class was replaced, which a replay would not run" in fallbacks()
        assert replays() == 1
        net(x)
    assert replays() == 2


def function_as_classifier(model: nn.Module) -> None:
    del model.fc
    model.fc = torch.sin


def function_that_hides_the_classifier(model: nn.Module) -> None:
    object.__setattr__(model, "fc", torch.sin)


def function_as_shortcut(model: nn.Module) -> None:
    model.layer1[0].downsample = torch.sin


@pytest.mark.parametrize("edit", [function_as_classifier, function_that_hides_the_classifier, function_as_shortcut])
def test_a_function_in_place_of_a_layer_is_not_replayed(
    edit: Callable[[nn.Module], None], net: nn.Module, recorder: type[CpuRecorder]
) -> None:
    x = image()
    with torch.no_grad():
        net(x)
        edit(net)
        assert torch.equal(net(x), eager(net, x))
    assert replays() == 1 and "is a function, which a replay would not run" in fallbacks()


def test_an_obstacle_that_goes_away(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    with torch.no_grad():
        handle = net.layer3[0].conv1.register_forward_hook(lambda *args: None)
        net(image())
        handle.remove()
        net(image())
    assert len(recorder.captures) == 1 and replays() == 1


def test_who_looks_at_the_layers_sees_them(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = image()
    with torch.no_grad():
        net(x)
        resnet_fast.reset_stats()
        with FlopCounterMode(display=False) as flops:
            net(x)
        assert flops.get_total_flops() > 0
        assert len(resnet_fast.explain(net, x).rows) == 4
        recorder.recording = True  # a capture of the caller's
        net(x)
        recorder.recording = False
        torch.jit.trace(net, x, check_trace=False)
    torch.fx.symbolic_trace(net)
    assert replays() == 0 and "CUDA graph" not in fallbacks()


def test_compile_export_and_script_take_the_layers(net: nn.Module) -> None:
    x = image()
    with torch.no_grad():
        want = eager(net, x)
        torch.testing.assert_close(torch.jit.script(net)(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), want, rtol=1e-4, atol=1e-4)
    assert replays() == 0 and "CUDA graph" not in fallbacks()


def test_errors_are_those_of_the_net(net: nn.Module) -> None:
    plain = resnet_fast.accelerate(copy.deepcopy(net))
    bad: tuple[Any, ...] = (torch.randn(2, 4, 32, 32), torch.randn(3, 32, 32), image().long(), None)
    for x in bad:
        with torch.no_grad():
            with pytest.raises(Exception) as want:
                plain(x)
            with pytest.raises(type(want.value)) as got:
                net(x)
        assert str(got.value) == str(want.value)
    assert "CUDA graph" not in fallbacks()
    with torch.no_grad():
        net(image())
    assert replays() == 1


def test_a_failed_capture_leaves_the_net_usable(
    net: nn.Module, recorder: type[CpuRecorder], caplog: pytest.LogCaptureFixture
) -> None:
    recorder.broken = "operation not permitted\nmore lines"
    x = image()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(net(x), eager(net, x))
        reason = "the net runs without its CUDA graph: capturing it failed: RuntimeError: operation not permitted"
        assert resnet_fast.stats()["fallbacks"][reason] == 3
        assert [r.message for r in caplog.records].count(reason) == 1
        with resnet_fast.strict(), pytest.raises(resnet_fast.BackendError, match="capturing it failed"):
            net(x)
        recorder.broken = ""
        net(x)
        assert replays() == 0  # not tried again until something changes
        change_weight(net)
        net(x)
    assert replays() == 1


def test_the_first_error_of_a_capture_is_named(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: recorder_module.Recorder, fn: recorder_module.Forward, x: Tensor) -> Any:
        try:
            raise ValueError("the cause")
        finally:
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(CpuRecorder, "capture", capture)
    try:
        raise KeyError("of the caller's")
    except KeyError:
        with torch.no_grad():
            net(image())
    assert "capturing it failed: ValueError: the cause" in fallbacks()


def test_a_cpu_input_is_refused() -> None:
    model = resnet_fast.accelerate(small(), cuda_graph=True)
    refusal = "cuda_graph=True was asked for: expected an input on cuda, got one on cpu; move the model and its input"
    with torch.no_grad(), pytest.raises(resnet_fast.BackendError, match=refusal):
        model(image())
    with pytest.raises(resnet_fast.BackendError, match=refusal):
        model.train()(image())
    assert model.to("meta").eval()(image().to("meta")).shape == (2, 10)
