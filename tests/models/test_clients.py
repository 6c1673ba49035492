"""The clients of docs/clients.md, each from its own package: as the table says, outputs and gradients as stock."""

from __future__ import annotations

import copy
import importlib
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.benchmarks import clients
from tests.support import ROOT, nets

PAGE = (ROOT / "docs" / "clients.md").read_text()
MODULE = {"lerobot": "torchvision"}
"""LeRobot's encoders are built from torchvision as its source does; its own package needs a robot's libraries."""


QUICK = {"timm", "transformers", "segmentation_models_pytorch"}
"""Packages of a development install whose clients are small, but for those of LARGE."""

LARGE = {"Unet, resnet34", "Unet, tu-resnet26d", "Unet, se_resnet50", "SE-ResNet-50-T"}


def marked(client: clients.Client) -> object:
    quick = client.package in QUICK and client.name not in LARGE
    return client if quick else pytest.param(client, marks=pytest.mark.slow)


def name(client: clients.Client) -> str:
    return client.name


def documented() -> dict[str, tuple[int, int]]:
    """Return client -> (fused, all) from the table of the page."""
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]* \| (\d+) of (\d+) \|", PAGE, re.MULTILINE)
    return {name: (int(fused), int(convs)) for name, fused, convs in rows}


def test_the_page_lists_every_client() -> None:
    assert list(documented()) == [client.name for client in clients.CLIENTS]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("client", [marked(c) for c in clients.CLIENTS], ids=name)
def test_a_client_is_fused_as_the_page_says(client: clients.Client) -> None:
    pytest.importorskip(MODULE.get(client.package, client.package))
    outcome = clients.check(client)
    assert (outcome.report.fused, outcome.report.convs) == documented()[client.name]


def test_the_quick_tests_have_their_packages() -> None:
    """In a development install none of them is skipped."""
    extra = re.search(r"^dev = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert extra is not None
    installed = {word.replace("-", "_") for word in re.findall(r'"([\w-]+)', extra[1])}
    assert installed >= QUICK


@pytest.mark.interpret
def test_the_blocks_of_transformers_reach_the_kernels() -> None:
    """One small net of transformers in Triton's interpreter, forward and backward."""
    pytest.importorskip("transformers")
    config = importlib.import_module("transformers").ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", num_labels=4
    )
    stock = nets.randomize(importlib.import_module("transformers").ResNetForImageClassification(config))
    x = torch.randn(1, 3, 32, 32)
    fused = resnet_fast.accelerate(stock, backend="triton").train()
    resnet_fast.reset_stats()
    fused(x).logits.square().sum().backward()
    assert resnet_fast.stats()["calls"] == {"bottleneck/triton": 2, "stem/triton": 1}
    assert all(p.grad is not None for p in fused.parameters())


def test_a_stage_of_transformers_converts_twice() -> None:
    """Its blocks see channels_last, its callers their own layout; copies, pickles and restore know it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic")
    stock, fused = nets.twin(nets.randomize(transformers.ResNetModel(config)))
    x = torch.randn(1, 3, 64, 64)
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        seen: list[Tensor] = []
        for block in model.encoder.stages[0].layers:
            block.register_forward_hook(lambda _, args, y, seen=seen: seen.extend([args[0], y]))
        with torch.no_grad():
            got, want = model(x).last_hidden_state, stock(x).last_hidden_state
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert got.is_contiguous() and len(seen) == 4
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
    restored = resnet_fast.restore(fused)
    assert [type(m) for m in restored.modules()] == [type(m) for m in stock.modules()]


def _tiny() -> tuple[nn.Module, Tensor]:
    return nets.basic(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_lightning() -> None:
    """Two steps of a Trainer equal the stock model's bit for bit."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    net, x = _tiny()
    trained = []
    for model in nets.twin(net):
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 2)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, **quiet).fit(Module(model), data)
        trained.append(dict(model.state_dict()))
    nets.assert_equal(trained[1], trained[0])


@pytest.mark.slow
def test_hugging_face_accelerate() -> None:
    """A step through Accelerator.prepare equals the stock model's bit for bit."""
    accelerate = pytest.importorskip("accelerate")
    net, x = _tiny()
    trained = []
    for model in nets.twin(net):
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model.train(), torch.optim.SGD(model.parameters(), 0.1))
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        trained.append(dict(accelerator.unwrap_model(model).state_dict()))
    nets.assert_equal(trained[1], trained[0])


@pytest.mark.slow
def test_compile_around_an_accelerated_backbone() -> None:
    """A detector's backbone keeps its ops inside torch.compile."""
    torch._dynamo.reset()
    build = importlib.import_module("torchvision.models.detection.backbone_utils").resnet_fpn_backbone
    stock, fused = nets.twin(nets.randomize(build(backbone_name="resnet18", weights=None, trainable_layers=3)))
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        found.extend(str(node.target) for node in graph.graph.nodes if "resnet_fast" in str(node.target))
        return graph.forward

    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        got, want = torch.compile(fused, backend=backend, fullgraph=True)(x), stock(x)
    assert len(found) == 8
    for key, features in want.items():
        torch.testing.assert_close(got[key], features, rtol=1e-3, atol=1e-4)
