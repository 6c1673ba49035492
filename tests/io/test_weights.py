"""resnet_fast/io/weights.py: files that are read, files that are refused and why, and nothing is half applied."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pickle
import random
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from resnet_fast.errors import UserError
from resnet_fast.io import weights


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
        lambda s: {"model": {"fc.weight": torch.ones(9, 9)}, "model_ema": s, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"model": {"state_dict": {f"model.{k}": v for k, v in s.items()}}},
        lambda s: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
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


class _Namespace(argparse.Namespace):
    """An object that is allowed next to weights, with code in it."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return argparse.Namespace, (), {"lr": _Evil(self.target)}


def test_options_beside_the_weights_may_not_run_code_either(tmp_path: Path) -> None:
    state = _Net().state_dict()
    torch.save({"model": state, "args": _Namespace(target=tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="could run code"):
        weights.read(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_the_old_format_is_read(tmp_path: Path) -> None:
    state = _Net().state_dict()
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert _same(dict(state), weights.read(tmp_path / "w.pth"))


def test_which_entry_was_taken_is_known(tmp_path: Path) -> None:
    state = _Net().state_dict()
    torch.save({"model": state, "model_ema": {f"module.{k}": v + 1 for k, v in state.items()}}, tmp_path / "w.pth")
    file = weights.open_file(tmp_path / "w.pth")
    assert (file.entry, file.others) == ("model_ema", ("model",))
    assert torch.equal(file.state["fc.bias"], state["fc.bias"] + 1)


def _tar(path: Path) -> None:
    """Write PyTorch's format before 0.4: a tar archive of pickles."""
    with tarfile.open(path, "w:") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps({})
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _script(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))


def _compressed(path: Path) -> None:
    torch.save(_Net().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in held if name.endswith("data/0"))
    held[name] = bytes(1 << 24)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in held.items():
            archive.writestr(name, content)


def _expanded(path: Path) -> None:
    """Return a head of 2**50 classes stored in four bytes."""
    state = _Net().state_dict()
    state["fc.weight"] = torch.ones(1, 1).expand(2**50, 4)
    torch.save(state, path)


def _sparse(path: Path) -> None:
    torch.save(_Net().state_dict() | {"fc.weight": torch.eye(4).to_sparse()}, path)


def _meta(path: Path) -> None:
    torch.save(_Net().state_dict() | {"fc.weight": torch.empty(2**40, 4, device="meta")}, path)


def _nested(path: Path) -> None:
    checkpoint: dict[str, object] = {}
    checkpoint["model"] = checkpoint
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_tar, "before 0.4"),
        (_script, "TorchScript"),
        (_compressed, "not compressed"),
        (_expanded, "larger than its data"),
        (_sparse, "sparse"),
        (_meta, "without data"),
        (_nested, "not a tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_pytorch_file_of_another_kind(tmp_path: Path, write, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as caught:
        weights.read(tmp_path / "w.pth")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_an_archive_on_several_disks(tmp_path: Path) -> None:
    torch.save(_Net().state_dict(), tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    disks = content.rindex(b"PK\x06\x07") + 16  # in the locator of the table of contents
    content[disks : disks + 4] = struct.pack("<I", 2)
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"got .*w\.pth"):
        weights.read(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "old.pth"])
def test_damaged_bytes_are_an_error_of_the_file_or_other_weights(tmp_path: Path, name: str) -> None:
    path, state = tmp_path / name, _Net().state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"resnet_fast": json.dumps({"model": "resnet18"})})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name != "old.pth")
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 3, 20))):
            place = draw.randrange(len(content))
            change = draw.choice(("set", "cut", "add"))
            if change == "set":
                content[place] = draw.randrange(256)
            elif change == "cut":
                del content[place : place + draw.randrange(1, 30)]
            else:
                content[place:place] = draw.randbytes(draw.randrange(1, 9))
        path.write_bytes(content)
        try:
            weights.open_file(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 900


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",  # a header larger than any memory
        struct.pack("<Q", 2**31) + b"{}",
        struct.pack("<Q", 200_000) + b"[" * 200_000,  # deeper than a parser's stack
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4]}} ' + bytes(4),
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400000000]}}  ' + bytes(4),
        struct.pack("<Q", 64) + b'{"a":{"dtype":"X99","shape":[1],"data_offsets":[0,4]}}          ' + bytes(4),
    ],
)
def test_safetensors_that_lie_about_themselves(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"expected a complete safetensors file, got .*w\.safetensors") as caught:
        weights.read(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, json.dumps({"model": "resnet18"})])
def test_facts_that_are_none_are_an_error_of_the_file(tmp_path: Path, text: str) -> None:
    save_file(_Net().state_dict(), tmp_path / "w.safetensors", metadata={"resnet_fast": text})
    with pytest.raises(UserError, match=r"w\.safetensors says of its weights") as caught:
        weights.open_file(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


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
        (lambda s: s.update({"fc.bias": torch.full((5,), 1e300, dtype=torch.float64)}), r"infinity in fc\.bias"),
        (lambda s: s.update({"fc.bias": torch.full((5,), math.nan).to(torch.float8_e5m2)}), r"NaN .* in fc\.bias"),
        (lambda s: s.update({"fc.bias": torch.ones(5, dtype=torch.complex64)}), r"fc\.bias of dtype torch\.float32"),
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
