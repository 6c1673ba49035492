"""Copies of a net on disk and in memory."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.blocks.fused import Fused
from tests.support import nets
from tests.support.nets import twin
from tests.support.processes import run_python


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_accelerated_equal_and_independent(
    way: Callable[[nn.Module], nn.Module], used: bool, backend: str
) -> None:
    stock, fused = twin(backend=backend)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        if used:
            fused(x)
        other = way(fused)
        assert [type(m) for m in other.modules()] == [type(m) for m in fused.modules()]
        nets.assert_equal(dict(other.state_dict()), dict(stock.state_dict()))
        nets.assert_equal(other(x), fused(x))
        resnet_fast.reset_stats()
        other(x)
        assert set(resnet_fast.stats()["calls"]) == {
            f"{op}/{'onednn' if backend == 'auto' else backend}" for op in ("basic_block", "stem")
        }
        other.layer1[0].conv1.weight.mul_(2)
        nets.assert_close_to_eager(fused, stock, x)
    assert not [m for m in resnet_fast.restore(other).modules() if isinstance(m, Fused)]


def test_used_and_unused_models_pickle_to_the_same_size() -> None:
    """No derived weight travels with the model."""
    _, fused = twin()
    before = len(pickle.dumps(fused))
    with torch.no_grad():
        fused(torch.randn(2, 3, 32, 32))
    assert len(pickle.dumps(fused)) == before


def test_a_whole_model_is_loaded_by_a_fresh_process(tmp_path: Path) -> None:
    """The file names resnet_fast's classes only; loading imports them."""
    _, fused = twin()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.save({"model": fused, "x": x, "y": fused(x)}, tmp_path / "model.pt")
    code = (
        "import sys, torch; d = torch.load(sys.argv[1], weights_only=False); import resnet_fast;"
        "torch.testing.assert_close(d['model'](d['x']), d['y'], rtol=1e-4, atol=1e-4); resnet_fast.restore(d['model']);"
        "sys.exit(type(d['model']).__module__ != 'torchvision.models.resnet')"
    )
    done = run_python(code, str(tmp_path / "model.pt"))
    assert done.returncode == 0, done.stderr


def test_weights_only_checkpoints(tmp_path: Path) -> None:
    stock, fused = twin()
    torch.save(fused.state_dict(), tmp_path / "weights.pt")
    stock.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    torch.save(stock.state_dict(), tmp_path / "weights.pt")
    fused.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True, mmap=True), strict=True, assign=True)
    nets.assert_close_to_eager(fused, stock, torch.randn(1, 3, 32, 32))


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    stock, fused = twin()
    with torch.no_grad():
        fused(torch.randn(1, 3, 32, 32))
        fused.layer1[0].conv1.weight.mul_(2)
    save_model(fused, str(tmp_path / "model.safetensors"))
    load_model(stock, str(tmp_path / "model.safetensors"))
    nets.assert_equal(dict(stock.state_dict()), dict(fused.state_dict()))
    load_model(fused, str(tmp_path / "model.safetensors"))
    nets.assert_close_to_eager(fused, stock, torch.randn(1, 3, 32, 32))


def test_share_memory() -> None:
    """As for torch.multiprocessing: storages move, values stay."""
    stock, fused = twin()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        fused(x)
    fused.share_memory()
    nets.assert_close_to_eager(fused, stock, x)
