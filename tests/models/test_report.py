"""report(model): what is fused, and why the rest is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet

import resnet_fast
from resnet_fast import UserError
from tests.support import nets


def test_a_whole_net() -> None:
    model = resnet_fast.accelerate(nets.basic())
    told = resnet_fast.report(model)
    assert told.fused == told.convs == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert [(row.layer, row.op) for row in told.rows][:2] == [("", "stem"), ("layer1.0", "basic_block")]
    assert str(told).splitlines() == [
        "14 of 14 convolutions are fused",
        "1 of 1 as stem in 1 torchvision.models.resnet.ResNet  [the model]",
        "13 of 13 as basic_block in 5 torchvision.models.resnet.BasicBlock  [layer1.0, layer1.1, layer2.0 and 2 more]",
    ]


def test_a_stock_net_asks_for_accelerate() -> None:
    told = resnet_fast.report(nets.basic())
    assert (told.fused, told.convs) == (0, 14)
    assert all(row.op == "stock" and "call accelerate()" in row.reason for row in told.rows)


class Subclass(resnet.BasicBlock):
    pass


def test_reasons_and_layers_outside() -> None:
    model = nets.basic()
    model.layer1[0] = Subclass(64, 64)
    model.layer4[0].relu = nn.SiLU()
    resnet_fast.accelerate(model)
    model.head = nn.Sequential(nn.Conv2d(512, 8, 1), nn.Conv2d(8, 8, 3))
    told = resnet_fast.report(model)
    rows = {row.layer: row for row in told.rows}
    assert (told.fused, told.convs) == (16 - 2 - 3 - 2, 16)
    assert "got its subclass" in rows["layer1.0"].reason
    assert rows["layer4.0"].reason.startswith("expected relu to be a plain ReLU, got SiLU")
    assert (rows["head"].convs, rows["head"].reason) == (2, "outside of the blocks that accelerate() knows")


def test_it_reads_the_model_as_it_is_now_and_runs_nothing() -> None:
    model = resnet_fast.accelerate(nets.basic())
    model.layer2[0].conv1.register_forward_hook(lambda *_: pytest.fail("ran"))
    resnet_fast.reset_stats()
    (row,) = [row for row in resnet_fast.report(model).rows if row.op == "stock"]
    assert row.layer == "layer2.0" and "with a hook" in row.reason
    assert resnet_fast.stats() == {"calls": {}, "fallbacks": {}}


def test_it_wants_a_module() -> None:
    with pytest.raises(UserError, match=r"expected an nn\.Module, got list"):
        resnet_fast.report([nn.Conv2d(1, 1, 1)])  # type: ignore[arg-type]


def test_a_model_without_blocks_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"Sequential without any; .*register_block"):
        resnet_fast.accelerate(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_a_scripted_model_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"call accelerate\(\) before torch\.jit\.script"):
        resnet_fast.accelerate(torch.jit.script(nets.basic()))


def test_a_traced_graph_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"call accelerate\(\) before torch\.fx"):
        resnet_fast.accelerate(torch.fx.symbolic_trace(nets.basic()))


def test_a_compiled_model_is_fused_at_its_next_call() -> None:
    torch._dynamo.reset()
    stock = nets.basic().eval()
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        found.append(sum("resnet_fast" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(stock, backend=backend)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = compiled(x)
        resnet_fast.accelerate(compiled)
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
    assert found == [0, 6]


class Sharded(resnet.BasicBlock):
    """With what FSDP2's derived class of a block has."""

    set_requires_gradient_sync = None


def test_a_sharded_model_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"call accelerate\(\) before it"):
        resnet_fast.accelerate(nn.Sequential(Sharded(8, 8)))


def test_quantized_blocks_keep_their_own_layers() -> None:
    """A block that a quantizer converted has convolutions of other classes, which are its reason."""
    model = nets.basic().eval()
    for block in model.modules():
        if isinstance(block, resnet.BasicBlock):
            block.conv1 = torch.ao.nn.intrinsic.ConvReLU2d(block.conv1, nn.ReLU())
    resnet_fast.accelerate(model)
    assert "expected conv1 to be a plain Conv2d, got ConvReLU2d" in resnet_fast.report(model).rows[1].reason
