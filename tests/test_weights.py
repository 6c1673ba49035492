"""resnet_fast/weights.py: what is read, what is refused and why, and that nothing is half applied."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from resnet_fast import weights
from resnet_fast.errors import UserError


class _Net(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    source, target = _Net(), _Net()
    path = tmp_path / name
    save_file(source.state_dict(), path) if path.suffix == ".safetensors" else torch.save(source.state_dict(), path)
    weights.apply(target, weights.read(path))
    assert _same(source.state_dict(), target.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_wrappers_and_prefixes(tmp_path: Path, wrap) -> None:  # type: ignore[no-untyped-def]
    state = _Net().state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    assert _same(dict(state), weights.read(tmp_path / "w.pth"))


def test_old_file_without_batch_counters_loads() -> None:
    net = _Net()
    state = {k: v.clone() + 1 for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    weights.apply(net, state)
    assert torch.equal(net.fc.bias, state["fc.bias"])


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("keep", [0, 10, 0.6])
def test_truncated_file(tmp_path: Path, name: str, keep: float) -> None:
    path, state = tmp_path / name, _Net().state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=rf"expected .*file, got .*{name}") as caught:
        weights.read(path)
    assert "\n" not in str(caught.value)


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, (self.target,)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": _Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="could run code"):
        weights.read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_bare_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(_Evil(tmp_path / "ran")))
    with pytest.raises(UserError, match="other objects than tensors") as caught:
        weights.read(tmp_path / "evil.pth")
    assert "weights_only" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"<html>404</html>", b"hello world", b"\x80\x02.", bytes(range(256))])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_bytes_of_another_kind(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"expected .*file, got .*{name}") as caught:
        weights.read(tmp_path / name)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [([1, 2], "with a list"), ({}, "with a dict"), ({"a": 1, "b": torch.ones(1)}, "a not a")]
)
def test_something_else_than_a_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        weights.read(tmp_path / "w.pth")


def test_unknown_suffix_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.safetensors or .*got 'w\.onnx'"):
        weights.read(tmp_path / "w.onnx")
    with pytest.raises(UserError, match="not a file"):
        weights.read(tmp_path / "none.pth")


def _broken(change) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    state = {k: v.clone() for k, v in _Net().state_dict().items()}
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bn1.bias"), r"no bn1\.bias"),
        (lambda s: s.update(extra=torch.ones(1)), "unknown extra"),
        (lambda s: s.update({"fc.weight": torch.ones(7, 4)}), r"fc\.weight of shape \(5, 4\), got \(7, 4\)"),
        (lambda s: s["conv1.weight"].view(-1)[3:4].fill_(float("nan")), r"NaN or infinity in conv1\.weight"),
        (lambda s: s["bn1.running_mean"][0:1].fill_(float("inf")), r"NaN or infinity in bn1\.running_mean"),
        (lambda s: s["bn1.running_var"][0:1].fill_(-1), r"negative values in bn1\.running_var"),
        (lambda s: s.update({"fc.bias": torch.ones(5, dtype=torch.int64)}), r"fc\.bias of dtype torch\.float32"),
    ],
)
def test_unfit_weights_are_refused_and_leave_the_model_alone(change, message: str) -> None:  # type: ignore[no-untyped-def]
    net = _Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=message):
        weights.apply(net, _broken(change))
    assert _same(before, dict(net.state_dict()))


def test_num_classes() -> None:
    assert weights.num_classes(_Net(17).state_dict()) == 17
    with pytest.raises(UserError, match=r"2-d fc\.weight"):
        weights.num_classes({"head.weight": torch.ones(2, 2)})


def test_seeded_is_repeatable_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    assert _same(weights.seeded(_Net, 3).state_dict(), weights.seeded(_Net, 3).state_dict())
    assert not torch.equal(weights.seeded(_Net, 3).fc.weight, weights.seeded(_Net, 4).fc.weight)  # type: ignore[union-attr]
    assert torch.equal(before, torch.random.get_rng_state())


def test_calibrate_sets_the_batch_statistics_and_restores_the_flags() -> None:
    net = _Net().train()
    net.fc.eval()
    x = torch.randn(4, 3, 9, 9) * 3 + 1
    weights.calibrate(net, x)
    y = net.conv1(x)
    torch.testing.assert_close(net.bn1.running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(net.bn1.running_var, y.var((0, 2, 3)))
    assert net.training and net.bn1.training and not net.fc.training and net.bn1.momentum == 0.1
    again = {k: v.clone() for k, v in net.state_dict().items()}
    assert _same(again, dict(weights.calibrate(net, x).state_dict()))
