"""Bytes that a training step keeps for its backward pass, counted on fake tensors from what autograd saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

import resnet_fast
from resnet_fast.models.registry import build
from tests.support.train_nets import cifar, fewest_programs, images, step, twin

pytestmark = pytest.mark.interpret

IMAGES = 2


def saved_storages(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[StorageWeakRef, tuple[int, torch.Size]]:
    """Return (bytes, shape) of every storage that a forward in autocast saves, without parameters and buffers."""
    own = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    found: dict[StorageWeakRef, tuple[int, torch.Size]] = {}
    kept: list[Tensor] = []  # a storage that is freed could give its address to another

    def pack(t: Tensor) -> Tensor:
        key = StorageWeakRef(t.untyped_storage())
        if key not in own:
            found[key] = t.untyped_storage().nbytes(), t.shape
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype):
        kept.append(model(x))
    return found


def activation_bytes(model: nn.Module, x: Tensor, dtype: torch.dtype) -> int:
    """Return the saved bytes of images, the part that grows with the batch."""
    return sum(
        size for size, shape in saved_storages(model, x, dtype).values() if len(shape) == 4 and shape[0] == len(x)
    )


def megabytes_per_image(name: str, save: str, dtype: torch.dtype) -> float:
    """``save``: ``eager`` for stock layers."""
    model = build(name).to(memory_format=torch.channels_last).train()
    if save != "eager":
        resnet_fast.accelerate(model, backend="triton", save=save)
    resnet_fast.reset_stats()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(IMAGES, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        found = activation_bytes(model, x, dtype) / IMAGES / 1e6
    assert not resnet_fast.stats()["fallbacks"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resnet50_at_224(dtype: torch.dtype) -> None:
    eager, raw, recompute = (megabytes_per_image("resnet50", save, dtype) for save in ("eager", "raw", "recompute"))
    print(f"ResNet-50, {dtype}: {eager:.1f} MB per image in eager AMP, raw {raw:.1f}, recompute {recompute:.1f}")
    assert raw <= 35 < 40 < eager
    assert recompute < 0.7 * raw


def test_resnet18_at_224() -> None:
    eager, raw, recompute = (
        megabytes_per_image("resnet18", save, torch.float16) for save in ("eager", "raw", "recompute")
    )
    print(f"ResNet-18: {eager:.1f} MB per image in eager AMP, raw {raw:.1f}, recompute {recompute:.1f}")
    assert recompute < raw < 0.8 * eager


@pytest.mark.parametrize("save", ["raw", "recompute"])
def test_images_kept_are_raw_outputs_and_block_outputs(save: str) -> None:
    """Real tensors count as fake ones do: the input, every raw output that is not recomputed, every output."""
    net, (x, _) = cifar(), images(2, 8, 8)
    with fewest_programs():
        real = activation_bytes(twin(net, save), x, torch.float16)
    copied = twin(net, save)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert activation_bytes(copied, torch.empty(x.shape), torch.float16) == real
    large, small = 8 * 8 * 8, 16 * 4 * 4
    raws = [large, large, large, small, small]
    dropped = large + small if save == "recompute" else 0
    outputs = [large, large, small]
    padded = small  # a shortcut that a module of its own computed is an argument of the op
    assert real == 2 * 2 * (3 * 8 * 8 + sum(raws) + sum(outputs) + padded - dropped)


@pytest.mark.parametrize("layout", ["kept", "lost"])
def test_saved_tensor_hooks_see_everything(layout: str) -> None:
    """With offloading, hooks store and bring back everything that the backward pass needs, unchanged. An array
    of NumPy is in C order, so the net's stock layers also sum in another order."""
    net, (x, labels) = cifar(), images()
    away = (lambda t: t.clone()) if layout == "kept" else (lambda t: torch.from_numpy(t.numpy().copy(order="C")))
    with fewest_programs():
        want = step(twin(net), x, labels)
        with torch.autograd.graph.saved_tensors_hooks(away, lambda t: t):
            got = step(twin(net), x, labels)
    tolerance = 0.0 if layout == "kept" else 1e-5
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance)
