"""Compilers, exporters, TorchScript and tracers, and the graph that each gets."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet

import resnet_fast
from resnet_fast import paper_nets
from tests.support import nets
from tests.support.nets import twin


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


class Recorder:
    """A dynamo backend that keeps the graph and runs it unchanged."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_compiled_eval_is_one_graph_of_our_ops(kind: str) -> None:
    stock, fused = twin(getattr(nets, kind)())
    recorder = Recorder()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(fused, fullgraph=True, backend=recorder)
    with torch.no_grad():
        nets.assert_close_to_eager(compiled, stock, x)
        nets.assert_equal(compiled(x), fused(x))
    (graph,) = recorder.graphs
    found = [t for t in targets(graph.graph) if t.startswith("resnet_fast.")]
    op = "basic_block" if kind == "basic" else kind
    assert sorted({t.split(".")[1] for t in found}) == sorted({op, "stem"})
    assert len(found) == 6


@pytest.mark.parametrize("kind", ["basic", pytest.param("bottleneck", marks=pytest.mark.slow)])
def test_compiled_training_equals_stock_compiled(kind: str) -> None:
    stock = getattr(nets, kind)().train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 32, 32)
    for model in (stock, fused):
        model.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        want, got = nets.train_step(stock, x), nets.train_step(fused, x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        nets.assert_equal(got["buffers"], want["buffers"])


def test_the_first_call_of_a_process_may_be_compiled() -> None:
    """What is computed once must not be computed under a lock, which a compiler cannot trace."""
    program = """
import torch, resnet_fast
net = resnet_fast.accelerate(resnet_fast.resnet18(num_classes=4)).train()
torch.compile(net, fullgraph=True, backend="eager")(torch.randn(2, 3, 32, 32)).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_compiled_eval_with_gradients() -> None:
    stock, fused = twin()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(nets.train_step(fused, x)["x"], nets.train_step(stock, x)["x"])
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(leaf).sum().backward()
    stock(other).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_compiled_with_dynamic_shapes() -> None:
    stock, fused = twin()
    recorder = Recorder()
    compiled = torch.compile(fused, fullgraph=True, backend=recorder, dynamic=True)
    for shape in ((2, 3, 64, 56), (3, 3, 48, 40), (5, 3, 67, 35)):
        nets.assert_close_to_eager(compiled, stock, torch.randn(shape))
    assert len(recorder.graphs) == 1


def test_compiled_follows_weight_updates_and_mode_flips() -> None:
    stock, fused = twin()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled(x)
        for model in (stock, fused):
            model.layer2[0].conv1.weight.mul_(1.5)
            model.bn1.running_mean.add_(0.5)
    nets.assert_close_to_eager(compiled, stock, x)
    with torch.no_grad():
        stock.train()(x)
        fused.train()
        compiled(x)
        stock.eval()
        fused.eval()
    torch.testing.assert_close(fused.bn1.running_mean, stock.bn1.running_mean)
    nets.assert_close_to_eager(compiled, stock, x)


def test_a_block_with_a_pooled_shortcut_compiles_into_one_graph() -> None:
    timm = pytest.importorskip("timm")
    block = resnet_fast.accelerate(timm.create_model("resnet18d", num_classes=4)).eval().layer2[0]
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), block(x))


def test_compiled_under_autocast() -> None:
    _, fused = twin()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(x), fused(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


def test_compiled_with_an_unfused_block() -> None:
    """Its stock layers go into the same graph."""
    _, fused = twin()
    fused.layer2[0].relu = nn.SiLU()
    stock = resnet_fast.restore(copy.deepcopy(fused))
    recorder = Recorder()
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend=recorder)
        nets.assert_close_to_eager(compiled, stock, torch.randn(2, 3, 32, 32))
    assert sum(t.startswith("resnet_fast.basic_block") for t in targets(recorder.graphs[0].graph)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_inductor(train: bool) -> None:
    """Training is compared with the compiled stock net: Inductor's convolutions and sums differ from eager's."""
    stock = nets.bottleneck().train(train)
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(4, 3, 64, 64)  # a last stage with few values per channel would have gradients of noise
    if train:
        for model in (stock, fused):
            model.compile(fullgraph=True)
        torch.testing.assert_close(nets.train_step(fused, x), nets.train_step(stock, x), rtol=1e-4, atol=1e-5)
    else:
        nets.assert_close_to_eager(torch.compile(fused, fullgraph=True), stock, x)


@pytest.mark.parametrize("kind", ["basic", pytest.param("bottleneck", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strict", [False, True])
def test_export_shows_the_stock_layers_and_runs_for_any_batch(kind: str, strict: bool) -> None:
    """The program equals the stock net's node by node, as quantizers and other runtimes expect."""
    stock, fused = twin(getattr(nets, kind)())
    x = torch.randn(2, 3, 32, 32)
    resnet_fast.reset_stats()
    with torch.no_grad():
        want, program = (
            torch.export.export(m, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},), strict=strict)
            for m in (stock, fused)
        )
    assert targets(program.graph) == targets(want.graph)
    assert not resnet_fast.stats()["fallbacks"]
    for n in (1, 2, 5):
        y = torch.randn(n, 3, 32, 32)
        nets.assert_equal(program.module()(y), want.module()(y))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    nets.assert_close_to_eager(torch.export.load(file).module(), stock, x)
    assert sorted(program.state_dict) == sorted(stock.state_dict())


@pytest.mark.slow
def test_files_that_run_where_we_are_not_installed(tmp_path: Path) -> None:
    _, fused = twin()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.export.save(torch.export.export(fused, (x,)), tmp_path / "net.pt2")
        torch.jit.script(fused).save(tmp_path / "net.pt")
        torch.save((x, fused(x)), tmp_path / "data.pt")
    script = """
import sys, torch
sys.modules["resnet_fast"] = None
x, want = torch.load("data.pt")
for net in (torch.export.load("net.pt2").module(), torch.jit.load("net.pt")):
    with torch.no_grad():
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_export_of_a_training_net() -> None:
    stock = nets.basic().train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 32, 32)
    module = torch.export.export(fused, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(module(x), stock(x))
    torch.testing.assert_close(dict(module.named_buffers())["bn1.running_mean"], stock.bn1.running_mean)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_script_shows_the_stock_layers_and_keeps_the_model(kind: str) -> None:
    stock, fused = twin(getattr(nets, kind)())
    classes = [type(m) for m in fused.modules()]
    scripted = torch.jit.script(fused)
    assert [type(m) for m in fused.modules()] == classes
    assert "resnet_fast::" not in str(scripted.inlined_graph)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        nets.assert_equal(scripted(x), stock(x))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    nets.assert_close_to_eager(torch.jit.load(file), stock, x)
    got, want = nets.train_step(scripted.train(), x), nets.train_step(stock.train(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def swap_relu(model: nn.Module) -> None:
    model.layer1[0].relu = nn.SiLU()


def circular(model: nn.Module) -> None:
    model.layer1[0].conv2.padding_mode = "circular"
    model.layer1[0].conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


def no_statistics(model: nn.Module) -> None:
    model.layer1[0].bn1 = nn.BatchNorm2d(64, track_running_stats=False)


def no_affine(model: nn.Module) -> None:
    model.layer1[0].bn1 = nn.BatchNorm2d(64, affine=False)


def group_norm(model: nn.Module) -> None:
    model.layer1[0].bn1 = nn.GroupNorm(4, 64)


def frozen_norm(model: nn.Module) -> None:
    from torchvision.ops import FrozenBatchNorm2d

    model.layer1[0].bn1 = FrozenBatchNorm2d(64)


def identity_norm(model: nn.Module) -> None:
    model.layer1[0].conv1 = nn.Conv2d(64, 64, 3, padding=1)
    model.layer1[0].bn1 = nn.Identity()


def own_pool(model: nn.Module) -> None:
    model.maxpool = nn.AvgPool2d(2)


def padded_shortcut(model: nn.Module) -> None:
    from resnet_fast.paper_nets import PadShortcut

    model.layer2[0].downsample = PadShortcut(2, 64, 128)


@pytest.mark.parametrize(
    "edit",
    [swap_relu, circular, no_statistics, no_affine, group_norm, frozen_norm, identity_norm, own_pool, padded_shortcut],
)
def test_script_of_an_edited_net(edit: Callable[[nn.Module], None]) -> None:
    """TorchScript must keep the edits that make eager blocks run unfused."""
    model = nets.basic()
    edit(model)
    stock, fused = twin(model)
    x = torch.randn(2, 3, 32, 32)
    nets.assert_close_to_eager(torch.jit.script(fused), stock, x)
    got, want = nets.train_step(torch.jit.script(fused.train()), x), nets.train_step(stock.train(), x)
    torch.testing.assert_close(got["out"], want["out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_plain20"])
def test_script_of_the_papers_nets(name: str) -> None:
    stock, fused = twin(nets.randomize(getattr(paper_nets, name)()))
    x = torch.randn(2, 3, 32, 32)
    nets.assert_close_to_eager(torch.jit.script(fused), stock, x)


def test_trace_sees_stock_layers() -> None:
    stock, fused = twin()
    x = torch.randn(2, 3, 32, 32)
    traced = torch.jit.trace(fused, x)
    graph = str(traced.inlined_graph)
    assert "resnet_fast::" not in graph
    assert graph.count("aten::_convolution") == 14
    with torch.no_grad():
        nets.assert_equal(traced(x), stock(x))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_symbolic_trace_has_torchvisions_node_names(kind: str) -> None:
    stock, fused = twin(getattr(nets, kind)())
    want, got = torch.fx.symbolic_trace(stock), torch.fx.symbolic_trace(fused)
    assert [(n.op, n.name, str(n.target)) for n in got.graph.nodes] == [
        (n.op, n.name, str(n.target)) for n in want.graph.nodes
    ]
    x = torch.randn(2, 3, 32, 32)
    nets.assert_equal(got(x), stock(x))


TRACED: dict[str, Callable[[], nn.Module]] = {
    "net": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]),
    "block": lambda: resnet.BasicBlock(3, 3),
    "bottleneck": lambda: resnet.Bottleneck(3, 1, downsample=nn.Conv2d(3, 4, 1)),
    "stage": lambda: nn.Sequential(resnet.BasicBlock(3, 3)),
    "cifar": paper_nets.cifar_resnet20,
    "plain block": lambda: paper_nets.PlainBlock(3, 4),
    "timm": lambda: pytest.importorskip("timm").create_model("resnet18"),
    "timm with additions": lambda: pytest.importorskip("timm").create_model("seresnet18"),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_symbolic_trace_is_the_stock_one_and_scripts(name: str) -> None:
    stock, fused = twin(TRACED[name]())
    want, got = torch.fx.symbolic_trace(stock), torch.fx.symbolic_trace(fused)
    assert got.code == want.code
    x = torch.randn(2, 3, 32, 32)
    for scripted in (torch.jit.script(got), torch.jit.script(fused)):
        torch.testing.assert_close(scripted(x), stock(x))
        torch.testing.assert_close(scripted.train()(x), stock.train()(x))
        stock.eval()
        scripted.eval()
        stock.load_state_dict(fused.state_dict())


def test_script_compiles_what_was_put_into_a_stock_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return 2 * self.relu(self.bn1(self.conv1(x)))

    monkeypatch.setattr(resnet.BasicBlock, "forward", doubled)
    # TorchScript compiles once per class and kinds of children; no other test has a block with these.
    stock, fused = twin(resnet.BasicBlock(3, 3, downsample=nn.Identity()))
    x = torch.randn(2, 3, 8, 8)
    nets.assert_equal(torch.jit.script(fused)(x), stock(x))
    nets.assert_equal(fused(x), stock(x))


@pytest.mark.parametrize("node", ["layer2.0.relu_1", "layer1.0.conv1", "layer3", "layer3.0.add", "relu", "flatten"])
def test_feature_extractor_is_bit_equal(node: str) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    stock, fused = twin()
    assert get_graph_node_names(fused) == get_graph_node_names(stock)
    x = torch.randn(2, 3, 32, 32)
    for mode in (False, True):
        want = create_feature_extractor(stock.train(mode), [node])(x)
        nets.assert_equal(create_feature_extractor(fused.train(mode), [node])(x), want)


def test_intermediate_layer_getter() -> None:
    from torchvision.models._utils import IntermediateLayerGetter

    stock, fused = twin()
    layers = {"layer2": "a", "layer4": "b"}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = IntermediateLayerGetter(stock, layers)(x)
        got = IntermediateLayerGetter(fused, layers)(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        with resnet_fast.use_backend("reference"):
            nets.assert_equal(IntermediateLayerGetter(fused, layers)(x), want)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_holds_standard_operators_only(dynamo: bool) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    _, fused = twin()
    file = io.BytesIO()
    x = torch.randn(1, 3, 32, 32)
    if dynamo:
        program = torch.onnx.export(fused, (x,), dynamo=True, verbose=False)
        assert program is not None
        model = program.model_proto
    else:
        torch.onnx.export(fused, (x,), file, dynamo=False)
        model = onnx.load_from_string(file.getvalue())
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 14
