"""The built package in Hugging Face's own library: found, loaded, checked, and put into models by ``kernelize``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet as stock

from tests.support import hub_package

kernels = pytest.importorskip("kernels", minversion="0.17", reason="needs Hugging Face's kernels: pip install kernels")

X = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _stock_classes() -> Iterator[None]:
    """Take back what ``replace_kernel_forward_from_hub`` writes into the classes of other libraries."""
    yield
    for cls in (stock.BasicBlock, stock.Bottleneck):
        for name in ("kernel_layer_name", "kernel_condition"):
            if name in cls.__dict__:
                delattr(cls, name)


def kernelized(model: Any, classes: dict[type[nn.Module], str], mode: Any) -> Any:
    """Return the model after ``kernelize`` put our layers into it; it raises if one does not fit."""
    mapping = {}
    for cls, layer in classes.items():
        kernels.replace_kernel_forward_from_hub(cls, cls.__name__)
        mapping[cls.__name__] = {"cpu": kernels.LocalLayerRepository(hub_package.built(), layer_name=layer)}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        return kernels.kernelize(model, mode=mode, use_fallback=False)


def test_the_library_accepts_metadata_and_digest() -> None:
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    for variant in ("torch-cuda", "torch-cpu"):
        folder = hub_package.built() / "build" / variant
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert str(metadata.name) == "resnet-fast" and metadata.id.startswith("_resnet_fast_")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))


def test_the_library_loads_the_variant_of_this_torch() -> None:
    package = kernels.get_local_kernel(hub_package.built())
    backend = "cuda" if torch.version.cuda else "cpu"
    assert package.__name__.startswith(f"_resnet_fast_{backend}_")
    assert package.__all__ == ["layers", "stats", "strict", "use_backend"]


@pytest.mark.parametrize("block", [stock.BasicBlock, stock.Bottleneck])
def test_a_kernelized_net_equals_stock_in_inference_and_in_training(block: Any) -> None:
    package = kernels.get_local_kernel(hub_package.built())
    model = stock.ResNet(block, [1] * 4, num_classes=10).eval()
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    fused = kernelized(copy.deepcopy(model), {block: block.__name__}, mode)
    with package.strict(), torch.inference_mode():
        torch.testing.assert_close(fused(X), model(X))
    for m in (model, fused):
        m.train()(X).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), fused.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), fused.buffers(), strict=True))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_transformers_resnet_equals_stock(kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers' ResNet: pip install transformers")
    from transformers.models.resnet import modeling_resnet as theirs

    config = transformers.ResNetConfig(
        layer_type=kind, hidden_sizes=[16, 32, 32, 64], depths=[1, 2, 1, 1], embedding_size=16
    )
    model = transformers.ResNetModel(config).eval()
    names = ("ResNetBasicLayer", "ResNetBottleNeckLayer", "ResNetEmbeddings")
    fused = kernelized(copy.deepcopy(model), {getattr(theirs, name): name for name in names}, kernels.Mode.TRAINING)
    with kernels.get_local_kernel(hub_package.built()).strict(), torch.inference_mode():
        torch.testing.assert_close(fused(X).last_hidden_state, model(X).last_hidden_state)
    for m in (model, fused):
        m.train()(X).last_hidden_state.square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), fused.parameters(), strict=True))
