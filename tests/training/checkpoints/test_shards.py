"""Sharded checkpoints: they come back whole, and nothing in them is run, or read from elsewhere."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata

from resnet_fast.errors import UserError
from resnet_fast.training import checkpoints
from resnet_fast.training.checkpoints import Damaged, shards
from resnet_fast.training.distributed import World
from tests.support.checkpoint_cases import META, content, make, reseal, touching

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def save(out: Path, step: int = 2) -> Path:
    return checkpoints.save_checkpoint(out, make(ema=True), META | {"step": step}, World(), sharded=True, keep=2)


def load(place: Path) -> Any:
    state = make(1, ema=True, steps=0)
    checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), state, World())
    return state


def change_metadata(place: Path, change: Callable[[Metadata], None]) -> None:
    path = place / "shards" / ".metadata"
    found = pickle.loads(path.read_bytes())
    change(found)
    path.write_bytes(pickle.dumps(found))
    reseal(place)


def test_everything_comes_back(tmp_path: Path, same: Callable[[Any, Any], None]) -> None:
    state = make(ema=True)
    place = checkpoints.save_checkpoint(tmp_path, state, META | {"step": 2}, World(), sharded=True, keep=2)
    same(content(load(place)), content(state))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_metadata_that_would_run_a_command_is_refused(protocol: int, tmp_path: Path) -> None:
    place, proof = save(tmp_path / "run"), tmp_path / "proof"
    (place / "shards" / ".metadata").write_bytes(pickle.dumps(touching(proof), protocol))
    reseal(place)
    with pytest.raises(Damaged, match=r"it names (posix|os)\.system, which no checkpoint does, and could run code"):
        load(place)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["builtins getattr", "torch load", "torch.distributed.checkpoint.metadata os.system"])
def test_metadata_may_name_nothing_but_its_classes(name: str, tmp_path: Path) -> None:
    module, _, what = name.partition(" ")
    text = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, what)) + b"\x93."
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(pickle.UnpicklingError, match=f"it names {module}.{what}"):
        shards.read_metadata(tmp_path, ())


def test_a_plain_value_that_would_run_a_command_is_refused(tmp_path: Path) -> None:
    """dcp reads a learning rate, say, with torch.load(weights_only=False)."""
    place, proof = save(tmp_path / "run"), tmp_path / "proof"
    buffer = io.BytesIO()
    torch.save(touching(proof), buffer)
    (place / "shards" / "planted").write_bytes(buffer.getvalue())

    def plant(found: Metadata) -> None:
        (index,) = [i for i in found.storage_data if i.fqn.startswith("optimizer") and i.fqn.endswith(".lr")]
        found.storage_data[index] = filesystem._StorageInfo("planted", 0, len(buffer.getvalue()))

    change_metadata(place, plant)
    with pytest.raises(Damaged, match=r"Unsupported global: GLOBAL (posix|os)\.system|Weights only load failed"):
        load(place)
    assert not proof.exists()


@pytest.mark.parametrize("path", ["../../../secret", "/etc/hostname", "__1_0.distcp"])
def test_an_entry_lies_in_a_file_of_the_checkpoint(path: str, tmp_path: Path) -> None:
    place = save(tmp_path)

    def move(found: Metadata) -> None:
        info = next(iter(found.storage_data.values()))
        info.relative_path = path

    change_metadata(place, move)
    with pytest.raises(Damaged, match=f"is stored in '{path}', which is no file of this checkpoint"):
        load(place)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: setattr(found, "storage_data", None),
        lambda found: setattr(found, "state_dict_metadata", {}),
        lambda found: found.storage_data.clear(),
        lambda found: found.storage_data.update({"model": 3}),
        lambda found: setattr(next(iter(found.storage_data.values())), "length", -1),
        lambda found: setattr(next(iter(found.storage_data.values())), "transform_descriptors", ("zstd",)),
    ],
)
def test_metadata_of_something_else_is_one_line(change: Callable[[Metadata], None], tmp_path: Path) -> None:
    place = save(tmp_path)
    change_metadata(place, change)
    with pytest.raises(Damaged, match="expected a checkpoint of this net") as error:
        load(place)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_net_is_one_line(tmp_path: Path) -> None:
    place = save(tmp_path)
    state = make(1, steps=0)
    state.model[3] = torch.nn.Linear(16, 7)  # type: ignore[operator]
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(Damaged, match="expected a checkpoint of this net") as error:
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), state, World())
    assert "\n" not in str(error.value)


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, os.strerror(28))

    good = save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*, step-00000001, is untouched"):
        save(tmp_path, 2)
    assert checkpoints.found(tmp_path) == [good]
