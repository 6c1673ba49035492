"""CUDA graphs of whole nets: when one is replayed or stale, and which memory is kept or freed."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import paper_nets, parameter_cache
from resnet_fast.blocks import inference_graph
from resnet_fast.blocks import recorder as recorder_module
from tests.support.graph_cases import (
    EDITS,
    CpuRecorder,
    change_weight,
    eager,
    image,
    replays,
    restore_a_stage,
    small,
)
from tests.support.nets import randomize
from tests.support.processes import in_threads


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
        model = pytest.importorskip("timm").create_model("resnet18", num_classes=0)  # its output has no layer after it
    elif name == "resnet18":
        model = resnet_fast.resnet18(num_classes=10)
    else:
        model = getattr(paper_nets, name)()
    model = resnet_fast.accelerate(randomize(model.eval()), cuda_graph=True)
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
    monkeypatch.setattr(inference_graph, "GRAPHS", 2)
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
        net.train()(image())
    assert recorder.captures[0].drained == 1


def test_clear_derived_frees_the_graphs(net: nn.Module, recorder: type[CpuRecorder]) -> None:
    with torch.no_grad():
        net(image())
        resnet_fast.clear_derived()
        assert recorder.captures[0].drained == 1
        net(image())
    assert len(recorder.captures) == 2


def test_graphs_die_with_the_net(recorder: type[CpuRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(CpuRecorder):
        def capture(self, fn: recorder_module.Forward, x: Tensor) -> tuple[Callable[[], None], Tensor]:
            self.captures.append(self)
            return (lambda: None), fn(x)

    monkeypatch.setattr(recorder_module, "Recorder", Plain)
    model = resnet_fast.accelerate(small(), cuda_graph=True)
    with torch.no_grad():
        model(image())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and recorder.captures[0].drained == 1


def test_a_graph_keeps_the_weights_that_it_reads(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer plans than graphs are kept."""
    monkeypatch.setattr(importlib.import_module("resnet_fast.ops.infer"), "SIZES", 3)
    made: list[inference_graph.Graph] = []
    init = inference_graph.Graph.__init__
    monkeypatch.setattr(
        inference_graph.Graph, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1]
    )
    with torch.no_grad():
        net(image(1))
        plans = parameter_cache.values_of(net.conv1.weight)
        for n in range(2, 7):
            net(image(n))
        kept = parameter_cache.values_of(net.conv1.weight)
    assert plans and any(all(p is not k for k in kept) for p in plans)
    assert all(any(p is read for read in made[0]._reads) for p in plans)
    assert any(isinstance(r, torch.UntypedStorage) and r.data_ptr() == net.fc.weight.data_ptr() for r in made[0]._reads)


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

    in_threads(*(partial(work, start) for start in range(4)))
    assert not wrong and replays() == 48 and len(recorder.captures) == 2
