"""CUDA graphs of whole nets: when one is replayed, when it is stale, and what runs eagerly.

Without a GPU a stand-in for the recorder replays, on static CPU buffers, a copy of the net as it was at the capture: a
graph that ought to be stale gives wrong numbers here as it would there. The tests marked ``gpu`` use the real one.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

import resnet_fast
from resnet_fast import derived, numerics
from resnet_fast.blocks import graph
from resnet_fast.models import paper


def randomized(model: nn.Module) -> nn.Module:
    """In eval, with statistics and norms as after training."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 2)
    return model.eval()


def small() -> nn.Module:
    """A CIFAR net with one block per stage."""
    model = paper.cifar_resnet20(shortcut="B")
    for stage in (model.layer1, model.layer2, model.layer3):
        del stage[1:]
    return randomized(model)


def large() -> nn.Module:
    return randomized(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10))


class CpuRecorder(graph.Recorder):
    """What a CUDA recorder does, with the device left out. ``net``: whose forward the captures are of."""

    device_type = "cpu"
    net: ClassVar[nn.Module]
    recording: ClassVar[bool] = False
    broken: ClassVar[str] = ""
    captures: ClassVar[list[CpuRecorder]] = []

    def __init__(self, device: torch.device):
        self.device = device
        self.lock = threading.Lock()
        self.drained = 0

    @staticmethod
    def is_recording() -> bool:
        return CpuRecorder.recording

    def warm_up(self, fn: graph.Forward, x: Tensor, layout: torch.memory_format) -> Tensor:
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        static = torch.empty_like(x, memory_format=layout).copy_(x)
        fn(static)
        return static

    def capture(self, fn: graph.Forward, x: Tensor) -> tuple[Callable[[], None], Tensor]:
        if CpuRecorder.broken:
            raise RuntimeError(CpuRecorder.broken)
        CpuRecorder.captures.append(self)
        frozen = resnet_fast.accelerate(copy.deepcopy(CpuRecorder.net))
        y = fn(x)

        def launch() -> None:
            with torch.no_grad():
                y.copy_(frozen(x))

        return launch, y

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self.lock:
            yield

    def drain(self) -> None:
        self.drained += 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[CpuRecorder]:
    monkeypatch.setattr(graph, "Recorder", CpuRecorder)
    for name, value in {"captures": [], "recording": False, "broken": ""}.items():
        monkeypatch.setattr(CpuRecorder, name, value)
    resnet_fast.reset_stats()
    return CpuRecorder


@pytest.fixture
def net(recorder: type[CpuRecorder], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model = resnet_fast.accelerate(small(), cuda_graph=True)
    monkeypatch.setattr(recorder, "net", model, raising=False)
    return model


def eager(model: nn.Module, x: Tensor) -> Tensor:
    """The same net launch by launch."""
    with torch.no_grad():
        return resnet_fast.accelerate(copy.deepcopy(model))(x)


def fallbacks() -> str:
    return "; ".join(resnet_fast.stats()["fallbacks"])


def replays() -> int:
    return resnet_fast.stats()["calls"].get("cuda_graph/replay", 0)


def image(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size)


def test_replays_follow_the_input_and_outputs_stay(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    xs = [image() for _ in range(3)]
    with torch.no_grad():
        ys = [net(x) for x in xs]
    assert len(recorder.captures) == 1 and replays() == 3
    assert len({y.data_ptr() for y in ys}) == 3
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(y, eager(net, x))


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "cifar_plain20", "timm"])
def test_every_kind_of_net(name: str, recorder: type[CpuRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "timm":
        model = pytest.importorskip("timm").create_model("resnet18", num_classes=0)  # its output has no layer behind it
    elif name == "resnet18":
        model = resnet_fast.resnet18(num_classes=10)
    else:
        model = getattr(paper, name)()
    model = resnet_fast.accelerate(randomized(model), cuda_graph=True)
    monkeypatch.setattr(recorder, "net", model, raising=False)
    x = image()
    with torch.inference_mode():
        model(x)
        assert torch.equal(model(x), eager(model, x))
    assert len(recorder.captures) == 1 and replays() == 2


def test_a_net_inside_a_model_is_replayed(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    model = resnet_fast.accelerate(nn.Sequential(nn.AvgPool2d(2), net, nn.Softmax(1)), cuda_graph=True)
    with torch.no_grad():
        model(image(size=64))
    assert replays() == 1


def test_a_graph_serves_inference_mode_and_no_grad(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    x = image()
    with torch.inference_mode():
        first = net(x.clone())
    with torch.no_grad():
        second = net(x)
    assert first.is_inference() and not second.is_inference()
    assert torch.equal(first, second) and len(recorder.captures) == 1


def change_weight(model: nn.Module) -> None:
    model.layer2[0].conv1.weight.mul_(0.5)


def change_statistics(model: nn.Module) -> None:
    model.layer3[0].bn2.running_mean.add_(1)


def change_classifier(model: nn.Module) -> None:
    model.fc.bias.add_(1)


def load(model: nn.Module) -> None:
    model.load_state_dict(small().state_dict())


def load_assigned(model: nn.Module) -> None:
    model.load_state_dict(small().state_dict(), assign=True)


def to_double(model: nn.Module) -> None:
    model.double()


def replace_classifier(model: nn.Module) -> None:
    model.fc = nn.Linear(64, 4).eval()


def replace_activation(model: nn.Module) -> None:
    model.layer1[0].relu = nn.SiLU().eval()


def dilate(model: nn.Module) -> None:
    model.layer1[0].conv2.dilation = model.layer1[0].conv2.padding = (2, 2)


def change_eps(model: nn.Module) -> None:
    model.bn1.eps = 0.1


def train_a_little(model: nn.Module) -> None:
    """Statistics only: no weight changes."""
    model.train()
    with torch.no_grad():
        model(3 + image())
    model.eval()


def train_a_stage(model: nn.Module) -> None:
    model.layer1.train()
    with torch.no_grad():
        model.layer1(torch.randn(2, 16, 32, 32))
    model.eval()


def restore_a_stage(model: nn.Module) -> None:
    resnet_fast.restore(model.layer1)


EDITS = [
    change_weight, change_statistics, change_classifier, load, load_assigned, to_double, replace_classifier,
    replace_activation, dilate, change_eps, train_a_little, train_a_stage, restore_a_stage,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_net_is_recorded_anew(edit: Any, net: nn.Module, recorder: type[CpuRecorder]) -> None:
    x = image()
    with torch.no_grad():
        before = net(x)
        edit(net)
        x = x.to(net.conv1.weight.dtype)
        want = eager(net, x)
        assert want.shape != before.shape or not torch.equal(want.float(), before) or edit is restore_a_stage
        for _ in range(2):
            torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)
    assert len(recorder.captures) == 2


def test_the_second_forward_after_an_edit_reads_the_second_weights(net: nn.Module) -> None:
    x = image()
    with torch.no_grad():
        for _ in range(3):
            change_weight(net)
            assert torch.equal(net(x), eager(net, x))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.requires_grad_(False),
        lambda m: m.train().eval(),
        lambda m: m.conv1.weight,
        lambda m: setattr(m, "note", "mine"),
        lambda m: resnet_fast.accelerate(m, cuda_graph=True),
        lambda m: m.register_forward_hook(lambda *args: None),
    ],
)
def test_what_changes_nothing_records_nothing(edit: Any, net: nn.Module, recorder: type[CpuRecorder]) -> None:
    with torch.no_grad():
        net(image())
        edit(net)
        net(image())
    assert len(recorder.captures) == 1 and replays() == 2


def test_a_graph_per_shape_and_dtype_but_not_per_layout(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    x = image()
    with torch.no_grad():
        nhwc, gaps = x.contiguous(memory_format=torch.channels_last), image(4, 64)[::2, :, ::2, ::2]
        for y in (x, x[:1], image(size=40), x, nhwc, gaps, x[:1].expand(2, -1, -1, -1)):
            torch.testing.assert_close(net(y), eager(net, y), rtol=1e-4, atol=1e-5)
    assert len(recorder.captures) == 3 and len(set(recorder.captures)) == 1


def test_a_net_that_keeps_the_layout_has_a_graph_for_each(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    x = image()
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        net(x)
        net(x.contiguous(memory_format=torch.channels_last))
        assert torch.equal(net(x), eager(net, x))
    assert len(recorder.captures) == 2


def test_another_backend_is_another_graph(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    x = image()
    with torch.no_grad():
        net(x)
        with resnet_fast.use_backend("reference"):
            net(x)
        net(x)
        resnet_fast.accelerate(net, backend="reference", cuda_graph=True)
        net(x)
    assert len(recorder.captures) == 3  # the last: a block's own request is part of what it is


@pytest.mark.parametrize("switch", ["benchmark", "deterministic"])
def test_torchs_switches_are_seen(
    switch: str, net: nn.Module, recorder: type[CpuRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        net(image())
        monkeypatch.setattr(torch.backends.cudnn, switch, not getattr(torch.backends.cudnn, switch))
        net(image())
    assert len(recorder.captures) == 2


def test_the_least_recently_used_graph_goes(
    net: nn.Module, recorder: type[CpuRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "GRAPHS", 2)
    with torch.no_grad():
        for n in (1, 2, 1, 3):
            net(image(n))
        assert (len(recorder.captures), recorder.captures[0].drained) == (3, 1)
        net(image(1))
        assert len(recorder.captures) == 3
        net(image(2))
    assert (len(recorder.captures), recorder.captures[0].drained) == (4, 2)
    assert len(set(recorder.captures)) == 1


def test_stale_graphs_go_before_new_ones_come(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    with torch.no_grad():
        for n in (1, 2, 3):
            net(image(n))
        change_weight(net)
        net(image(1))
    assert recorder.captures[0].drained == 3
    assert len(set(recorder.captures)) == 2


def test_training_frees_the_graphs(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    with torch.no_grad():
        net(image())
    net.train()
    resnet_fast.reset_stats()
    net(image()).sum().backward()
    assert recorder.captures[0].drained == 1 and "CUDA graph" not in fallbacks()


def test_clear_derived_frees_the_graphs(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    with torch.no_grad():
        net(image())
        resnet_fast.clear_derived()
        assert recorder.captures[0].drained == 1
        net(image())
    assert len(recorder.captures) == 2


def test_graphs_die_with_the_net(recorder: type[CpuRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(CpuRecorder):
        def capture(self, fn: graph.Forward, x: Tensor) -> tuple[Callable[[], None], Tensor]:
            self.captures.append(self)
            return (lambda: None), fn(x)

    monkeypatch.setattr(graph, "Recorder", Plain)
    model = resnet_fast.accelerate(small(), cuda_graph=True)
    with torch.no_grad():
        model(image())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and recorder.captures[0].drained == 1


def test_a_graph_keeps_the_weights_that_it_reads(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for three input sizes are kept, graphs for eight."""
    made: list[graph.Graph] = []
    init = graph.Graph.__init__
    monkeypatch.setattr(graph.Graph, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1])
    with torch.no_grad():
        net(image(1))
        plans = [v for e in derived._cache[net.conv1.weight].values() for v in e.values.values()]
        for n in range(2, 7):
            net(image(n))
        kept = [v for e in derived._cache[net.conv1.weight].values() for v in e.values.values()]
    assert plans and any(all(p is not k for k in kept) for p in plans)
    assert all(any(p is read for read in made[0]._reads) for p in plans)
    assert any(isinstance(r, torch.UntypedStorage) and r.data_ptr() == net.fc.weight.data_ptr() for r in made[0]._reads)


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


def in_autocast(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return model(image())


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
    in_autocast: "autocast is on",
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
    def capture(self: graph.Recorder, fn: graph.Forward, x: Tensor) -> Any:
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


class FakeCuda:
    """torch.cuda as far as the recorder uses it, writing down in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.log: list[str] = []
        self.current = self.Stream("main")
        for name in ("Stream", "Event", "CUDAGraph", "stream", "graph", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.log.append("clear"), raising=False)

    def Stream(self, device: object) -> Any:
        class Stream:
            name = device if isinstance(device, str) else "side"
            wait_stream = staticmethod(lambda other: self.log.append(f"{Stream.name} waits for {other.name}"))
            wait_event = staticmethod(lambda event: self.log.append(f"{Stream.name} waits for event"))

        return Stream

    def Event(self) -> Any:
        class Event:
            record = staticmethod(lambda stream: self.log.append(f"event on {stream.name}"))
            synchronize = staticmethod(lambda: self.log.append("synchronize"))

        return Event

    def CUDAGraph(self) -> Any:
        class CUDAGraph:
            replay = staticmethod(lambda: self.log.append("replay"))
            pool = staticmethod(lambda: "pool")

        return CUDAGraph

    def current_stream(self, device: torch.device) -> Any:
        return self.current

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"begin {pool}")
        self.current = stream
        try:
            yield
        except ZeroDivisionError:
            raise RuntimeError("broken capture") from None  # and the stream stays current
        self.log.append("end")


def test_the_recorder_orders_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    x = image()
    recorder = graph.Recorder(x.device)
    static = recorder.warm_up(lambda x: cuda.log.append(cuda.current.name) or x, x, torch.channels_last)
    assert cuda.log == ["side waits for main", *["side"] * graph.WARM_UPS, "main waits for side"]
    assert torch.equal(static, x) and static.is_contiguous(memory_format=torch.channels_last)
    cuda.log.clear()
    launch, y = recorder.capture(lambda x: cuda.log.append(cuda.current.name) or x, static)
    assert cuda.log == ["begin None", "clear", "side", "clear", "end"]
    recorded = graph.Graph(recorder, launch, static, y, [])
    cuda.log.clear()
    cuda.current = cuda.Stream("other")
    assert torch.equal(recorded.replay(2 * x), 2 * x)
    assert cuda.log == ["other waits for event", "replay", "event on other"]
    cuda.log.clear()
    with pytest.raises(RuntimeError, match="broken capture"):
        recorder.capture(lambda x: x * (1 // 0), static)
    assert cuda.log == ["begin pool", "clear", "clear", "begin pool", "end"]
    assert cuda.current.name == "other"
    cuda.log.clear()
    del recorded
    assert cuda.log == ["synchronize"]


def test_a_cpu_input_is_refused() -> None:
    model = resnet_fast.accelerate(small(), cuda_graph=True)
    refusal = "cuda_graph=True was asked for: expected an input on cuda, got one on cpu; move the model and its input"
    with torch.no_grad(), pytest.raises(resnet_fast.BackendError, match=refusal):
        model(image())
    assert model.train()(image()).requires_grad
    assert model.to("meta").eval()(image().to("meta")).shape == (2, 10)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "copy"])
def test_copies_record_their_own(way: str, net: nn.Module, recorder: type[CpuRecorder]) -> None:
    x = image()
    size = len(pickle.dumps(net))
    with torch.no_grad():
        net(x)
        assert len(pickle.dumps(net)) == size
        assert not [k for k in net.state_dict() if "graph" in k]
        if way == "copy":
            other = copy.copy(net)
        elif way == "deepcopy":
            other = copy.deepcopy(net)
        else:
            file = io.BytesIO()
            torch.save(net, file) if way == "torch.save" else pickle.dump(net, file)
            file.seek(0)
            other = torch.load(file, weights_only=False) if way == "torch.save" else pickle.load(file)
        recorder.net = other
        if way != "copy":
            change_weight(other)
        assert torch.equal(other(x), eager(other, x))
        recorder.net = net
        assert torch.equal(net(x), eager(net, x))
    assert len(recorder.captures) == 2


def test_threads_get_their_own_results(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    xs = [image(1 + i % 2) for i in range(16)]
    wants = [eager(net, x) for x in xs]
    wrong: list[int] = []

    def work(start: int) -> None:
        with torch.inference_mode():
            for i in range(start, 16, 4):
                for _ in range(3):
                    if not torch.equal(net(xs[i]), wants[i]):
                        wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and replays() == 48 and len(recorder.captures) == 2


# On a GPU


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    resnet_fast.reset_stats()
    return large().cuda()


def check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """``y`` against float64, as good as the stock net's."""
    plain = resnet_fast.restore(copy.deepcopy(model))
    with torch.no_grad():
        numerics.assert_close(y, copy.deepcopy(plain).double()(x.double()), plain(x), gemm_k=4608)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gpu_replays(on_gpu: nn.Module, backend: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = resnet_fast.accelerate(on_gpu.to(dtype), backend=backend, cuda_graph=True)
    xs = [image(size=64).to("cuda", dtype).contiguous(memory_format=layout) for _ in range(3)]
    with torch.inference_mode():
        ys = [model(x) for x in xs]
    assert replays() == 3 and resnet_fast.stats()["calls"]["cuda_graph/capture"] == 1
    assert "CUDA graph" not in fallbacks()
    for x, y in zip(xs, ys, strict=True):
        check(model, x, y)


@pytest.mark.gpu
def test_gpu_weights_may_change(on_gpu: nn.Module) -> None:
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    with torch.no_grad():
        model(x)
        for edit in (change_weight, change_statistics, change_classifier, dilate, change_eps):
            edit(model)
            check(model, x, model(x))
        model.load_state_dict(large().state_dict())
        check(model, x, model(x))
        model.half()
        check(model, x.half(), model(x.half()))
    assert replays() == 8 and resnet_fast.stats()["calls"]["cuda_graph/capture"] == 8


@pytest.mark.gpu
def test_gpu_training_between(on_gpu: nn.Module) -> None:
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        with torch.inference_mode():
            y = model.eval()(x)
        check(model, x, y.clone())
        model.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert replays() == 3


@pytest.mark.gpu
def test_gpu_many_shapes_share_memory(on_gpu: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "GRAPHS", 3)
    model = resnet_fast.accelerate(on_gpu, cuda_graph=True)
    xs = [image(n, 64).cuda() for n in (1, 2, 3, 4, 5)]
    with torch.inference_mode():
        ys = [[model(x) for x in xs] for _ in range(2)]
    for round_ in ys:
        for x, y in zip(xs, round_, strict=True):
            check(model, x, y.clone())


@pytest.mark.gpu
def test_gpu_streams_take_turns(on_gpu: nn.Module) -> None:
    model = resnet_fast.accelerate(on_gpu, cuda_graph=True)
    streams = [torch.cuda.Stream() for _ in range(3)]
    xs = [image(8, 128).cuda() for _ in range(24)]
    with torch.inference_mode():
        wants = [model(x) for x in xs]
        torch.cuda.synchronize()
        got = []
        for i, x in enumerate(xs):
            with torch.cuda.stream(streams[i % 3]):
                got.append(model(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y, want in zip(got, wants, strict=True))
    check(model, xs[0], wants[0].clone())


@pytest.mark.gpu
def test_gpu_threads(on_gpu: nn.Module) -> None:
    model = resnet_fast.accelerate(on_gpu, cuda_graph=True)
    xs = [image(1 + i % 3, 64).cuda() for i in range(24)]
    with torch.inference_mode():
        wants = [model(x) for x in xs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(start: int) -> None:
        stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            for i in range(start, 24, 4):
                y = model(xs[i])
                stream.synchronize()
                if not torch.equal(y, wants[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and replays() == 48


@pytest.mark.gpu
def test_gpu_memory_is_given_back(on_gpu: nn.Module) -> None:
    def used() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    x = image(64, 256).cuda()
    model = resnet_fast.accelerate(on_gpu)
    with torch.inference_mode():
        model(x)
        before = used()
        resnet_fast.accelerate(model, cuda_graph=True)(x)
        during = used()
        resnet_fast.accelerate(model)(x)
    assert during - before > x.nbytes
    assert used() - before < (during - before) / 2


@pytest.mark.gpu
def test_gpu_failed_capture(on_gpu: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    forward = type(model).eager_forward

    def synchronizing(self: Any, x: Tensor, *rest: Any) -> Tensor:
        assert x.sum().isfinite().item()  # waits for the GPU, which a capture cannot
        return forward(self, x, *rest)

    with torch.inference_mode():
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "eager_forward", synchronizing)
            stream = torch.cuda.current_stream()
            y = model(x)
            assert torch.cuda.current_stream() == stream
        torch.rand(2, device="cuda")
        check(model, x, y.clone())
        assert "capturing it failed" in fallbacks() and replays() == 0
        resnet_fast.clear_derived()
        check(model, x, model(x).clone())
    assert replays() == 1


@pytest.mark.gpu
def test_gpu_inside_a_capture_of_the_callers(on_gpu: nn.Module) -> None:
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    with torch.no_grad():
        want = model(x)
        mine = torch.cuda.CUDAGraph()
        with torch.cuda.graph(mine):
            y = model(x)
        mine.replay()
    torch.testing.assert_close(y, want)
    assert replays() == 1 and "CUDA graph" not in fallbacks()


@pytest.mark.gpu
def test_gpu_refusals(on_gpu: nn.Module) -> None:
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    with torch.no_grad():
        with torch.autocast("cuda", torch.float16):
            assert model(x).dtype == torch.float16
        model.layer3[0].conv1.register_forward_hook(lambda *args: None)
        check(model, x, model(x))
    assert "autocast is on" in fallbacks() and "layer3.0.conv1 has a hook" in fallbacks() and replays() == 0
    with torch.no_grad(), pytest.raises(resnet_fast.BackendError, match="expected an input on cuda"):
        model(x.cpu())
