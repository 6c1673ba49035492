"""Load a trained net from what a run wrote: its weights, one of its checkpoints, or its folder.

::

    out/                            a run: model.safetensors if it finished, else its newest good checkpoint
    out/checkpoints/step-00001200   a checkpoint
    model.safetensors, net.pth      weights, of a run or from anywhere else
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..errors import UserError
from ..io import safe_files, weight_facts, weights
from ..io.weight_facts import Facts
from ..tools import trained
from ..tools.trained import Trained
from . import checkpoints, recipe
from .checkpoints import shards
from .recipe import Recipe


@dataclass(frozen=True)
class Restored:
    """The net and, if a checkpoint has it, the recipe that it was trained by."""

    trained: Trained
    recipe: Recipe | None = None


def load_net(path: Path, model: str | None = None, names: Path | None = None) -> Restored:
    """Load the net in ``path``: a file of weights, or the folder of a checkpoint or of a run.

    Averaged weights are preferred, as in the run's own validation.

    Args:
        path: See above.
        model: The name of the net, in place of what the file says.
        names: A text file of class names, one per line.

    Raises:
        UserError: The checkpoint is damaged, or the folder is neither a run's nor a checkpoint's.
    """
    if not path.is_dir():
        return Restored(trained.load(path, model, names))
    if (path / checkpoints.META).is_file():
        return _checkpoint(path, checkpoints.read_meta(path), [], model, names)
    weights_file = path / "model.safetensors"
    places = checkpoints.found(path)
    if weights_file.is_file():
        kept = checkpoints.resume_point(path, "auto")[1] if places else {}
        how = recipe.from_dict(kept["recipe"]) if kept else None
        return Restored(trained.load(weights_file, model, names), how)
    if not places:
        raise UserError(
            "weights, a checkpoint, or the folder of a run",
            f"{path} without model.safetensors, {checkpoints.META} and {checkpoints.folder_of(path).name}",
            "name the file of the weights",
        )
    place, meta, complaints = checkpoints.resume_point(path, "auto")
    assert place is not None  # there are checkpoints, and resume_point raises if none is good
    said = [f"passed over: {text}" for text in complaints]
    return _checkpoint(place, meta, said, model, names)


def _checkpoint(place: Path, meta: dict[str, Any], said: list[str], model: str | None, names: Path | None) -> Restored:
    how = recipe.from_dict(meta["recipe"])
    state, what = _state(place, meta)
    said = [f"weights: {place}, step {meta['step']}{what}", *said]
    return Restored(trained.build(state, _facts(place, meta, how), str(place), said, model, names), how)


def _facts(place: Path, meta: dict[str, Any], how: Recipe) -> Facts:
    """Return the facts in the checkpoint. One of an earlier version has none; its data is loaded to get them."""
    if "facts" in meta:
        return weight_facts.parse(safe_files.json_text(meta["facts"]), str(place / checkpoints.META))
    from .datasets.loading import load_data

    return load_data(how).facts(how)


def _state(place: Path, meta: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Return the weights, and a suffix that says whether they are averaged."""
    if meta["layout"] == "sharded":
        return _shards(place, meta)
    averaged = place / "ema.safetensors"
    if averaged.is_file():
        return weights.read(averaged), ", averaged"
    return weights.read(place / "model.safetensors"), ""


def _shards(place: Path, meta: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Return the weights among the shards, gathered in this process."""
    inside = {Path(name).name for name in meta["files"] if Path(name).parent == Path(checkpoints.SHARDS)}
    try:
        held = shards.read_metadata(place / checkpoints.SHARDS, inside).state_dict_metadata
        tensors = {name: entry for name, entry in held.items() if isinstance(entry, TensorStorageMetadata)}
        claimed = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors.values())
        there = sum(size for size, _ in meta["files"].values())
        if claimed > there:
            raise ValueError(f"its tensors have {claimed:,} bytes, its files {there:,}")
        which = "ema." if any(name.startswith("ema.") for name in tensors) else "model."
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in tensors.items()
            if name.startswith(which)
        }
        shards.load_shards(place / checkpoints.SHARDS, inside, state)
    except Exception as error:  # torch and pickle raise anything for content of another kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise checkpoints.Damaged("a checkpoint of a net", f"{place} ({reason})", "use an older checkpoint") from error
    return weights.state_of({name.removeprefix(which): tensor for name, tensor in state.items()}, place), (
        ", averaged" if which == "ema." else ""
    )
