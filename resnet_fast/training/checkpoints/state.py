"""Saving and restoring a training state: weights, optimizer, gradient scaler, averaged weights, random generators."""

from __future__ import annotations

import io
import os
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ...errors import UserError
from ...io import safe_files, weight_facts, weights
from ...io.weight_facts import Facts
from ..augment import seed_of
from ..diagnosis import not_finite
from ..disk import write_file
from ..distributed import World
from . import shards
from .folder import folder_of, make_empty, remove_old, run_of, set_aside, write_error
from .meta import FORMAT, META, SHARDS, Damaged, digest_of, is_number, seal


@dataclass
class TrainingState:
    """The objects that a checkpoint saves and restores in place. The state of a disabled ``scaler`` is empty."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: nn.Module | None = None


def random_states() -> dict[str, Any]:
    """Return the states of the global generators of torch, CUDA, NumPy and Python, as tensors and plain values."""
    import numpy as np

    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the global generators to what :func:`random_states` returned."""
    import numpy as np

    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))


def _to_safetensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a safetensors file, which does not hold memory formats."""
    from safetensors.torch import save

    values = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return save(values, metadata=dict(metadata) if metadata else None)


def export_weights(model: nn.Module, path: Path, facts: Facts, world: World) -> None:
    """Write the weights of ``model`` under torchvision's names, as ``resnet-fast predict --weights`` reads them.

    Every process calls it, because shards are gathered; the first one writes.

    Args:
        model: The net, plain or sharded.
        path: The safetensors file.
        facts: Stored in the file's metadata as one JSON text. safetensors writes several entries in no fixed order,
            and equal runs must leave equal files.
        world: The processes of the run.

    Raises:
        UserError: The file cannot be written.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    failure = None
    if world.first:
        try:
            write_file(
                path, _to_safetensors(cast("dict[str, torch.Tensor]", tensors), {weight_facts.KEY: facts.to_json()})
            )
        except UserError as error:
            failure = error
    world.raise_first(failure)


def save_checkpoint(
    out: Path,
    state: TrainingState,
    meta: Mapping[str, Any],
    world: World,
    sharded: bool,
    keep: int,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the checkpoint of ``meta["step"]``, then remove the older ones of the run that are not kept.

    Every process calls it. What an earlier process of the run left unfinished is removed as well.

    Args:
        out: The folder of the run.
        state: What is saved.
        meta: The fields of ``meta.json`` other than format, layout, files and digest.
        world: The processes of the run.
        sharded: Whether each process writes its shards, or the first one everything.
        keep: The number of checkpoints of ``meta["run"]`` that stay.
        note: Called with a sentence if a folder was in the way and was renamed.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: The checkpoint cannot be written, for example because the disk is full. The older ones are
            untouched.
    """
    place = folder_of(out) / f"step-{meta['step']:08d}"
    temporary = place.with_name(f".{place.name}")
    failure: UserError | None = None
    if sharded:
        failure = write_error(lambda: make_empty(temporary) if world.first else None, place)
        world.raise_first(failure)
        failure = write_error(lambda: shards.save_shards(temporary / SHARDS, _state_dicts(state, None)), place)
        world.raise_first(failure)
    if world.first:
        failure = write_error(lambda: _write_files(place, temporary, state, meta, sharded, note), place)
        if failure is None:
            remove_old(out, str(meta.get("run", "")), meta["step"], keep)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
    world.raise_first(failure)
    return place


def _write_files(
    place: Path,
    temporary: Path,
    state: TrainingState,
    meta: Mapping[str, Any],
    sharded: bool,
    note: Callable[[str], None],
) -> None:
    """Write the files of the first process and the digests of all files, then rename the folder."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    buffer = io.BytesIO()
    rest: dict[str, Any] = {"scaler": state.scaler.state_dict(), "random": random_states()}
    if not sharded:
        make_empty(temporary)
        parts = _state_dicts(state, StateDictOptions(full_state_dict=True, cpu_offload=True))
        rest["optimizer"] = parts["optimizer"]
        for name in ("model", "ema"):
            if name in parts:
                (temporary / f"{name}.safetensors").write_bytes(_to_safetensors(parts[name]))
    torch.save(rest, buffer)
    (temporary / "state.pt").write_bytes(buffer.getvalue())
    written = sorted(p for p in temporary.rglob("*") if p.is_file())
    digests = {str(p.relative_to(temporary)): [p.stat().st_size, digest_of(p)] for p in written}
    layout = "sharded" if sharded else "full"
    whole = {"format": FORMAT, "layout": layout, "files": digests} | dict(meta)
    (temporary / META).write_text(safe_files.json_text(whole | {"sha256": seal(whole)}, indent=1))
    for path in (*written, temporary / META, *{p.parent for p in written}, temporary):
        safe_files.sync(path)
    if os.path.lexists(place):
        if not place.is_symlink() and run_of(place) == meta.get("run", ""):
            shutil.rmtree(place)  # the same step saved again: equal by construction
        else:
            note(f"{place} is not this run's: renamed to {set_aside(place).name}")
    os.rename(temporary, place)
    safe_files.sync(place.parent)


def restore_checkpoint(place: Path, meta: Mapping[str, Any], state: TrainingState, world: World) -> None:
    """Restore ``state`` in place, and the random generators, from a checkpoint of any number of processes.

    The optimizer keeps its hyperparameters, because the recipe decides them.

    Args:
        place: The folder of the checkpoint.
        meta: What :func:`~resnet_fast.training.checkpoints.meta.read_meta` returned for it.
        state: What is restored.
        world: The processes of the run.

    Raises:
        Damaged: The files are complete but do not hold the state of this net.
    """
    hyper = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
    try:
        if zipfile.is_zipfile(place / "state.pt"):
            weights.check_archive(place / "state.pt")
        with warnings.catch_warnings():  # torch asks for a bug report about some foreign pickles
            warnings.simplefilter("ignore")
            rest = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
        _check_scaler(rest["scaler"])
        if meta["layout"] == "sharded":
            _restore_shards(place, meta, state)
        else:
            _restore_full(place, rest["optimizer"], state)
        if rest["scaler"]:
            state.scaler.load_state_dict(rest["scaler"])
        if world.first:
            set_random_states(rest["random"])
    except Exception as error:  # torch, safetensors and pickle raise anything for content of another kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Damaged("a checkpoint of this net", f"{place} ({reason})", "use an older checkpoint") from error
    for group, values in zip(state.optimizer.param_groups, hyper, strict=True):
        group.update(values)
    broken = not_finite(state.model, state.ema, state.optimizer)
    if broken:
        raise Damaged("finite weights", f"{place} with {broken}", "use an older checkpoint")
    if not world.first:
        torch.manual_seed(seed_of(torch.initial_seed(), meta["step"], world.rank))


def _check_scaler(content: Mapping[str, Any]) -> None:
    if not all(is_number(value) for value in content.values()) or content.get("scale", 1) <= 0:
        raise ValueError(f"a gradient scaler of {dict(content)}")


def _state_dicts(state: TrainingState, options: Any) -> dict[str, Any]:
    """Return model, optimizer and averaged weights by parameter name: whole, or this process's shards."""
    from torch.distributed.checkpoint import state_dict

    model, optimizer = state_dict.get_state_dict(state.model, state.optimizer, options=options)
    parts = {"model": model, "optimizer": optimizer}
    if state.ema is not None:
        parts["ema"] = state_dict.get_model_state_dict(state.ema, options=options)
    return parts


def _set_state_dicts(state: TrainingState, parts: Mapping[str, Any], options: Any) -> None:
    from torch.distributed.checkpoint import state_dict

    state_dict.set_model_state_dict(state.model, parts["model"], options=options)
    held = [value for values in parts["optimizer"]["state"].values() for value in values.values()]
    if any(isinstance(value, torch.Tensor) for value in held):  # without momentum SGD holds nothing
        state_dict.set_optimizer_state_dict(state.model, state.optimizer, parts["optimizer"], options=options)
    if state.ema is not None:
        state_dict.set_model_state_dict(state.ema, parts["ema"], options=options)


def _restore_shards(place: Path, meta: Mapping[str, Any], state: TrainingState) -> None:
    parts = _state_dicts(state, None)
    inside = {name.removeprefix(f"{SHARDS}/") for name in meta["files"] if name.startswith(f"{SHARDS}/")}
    shards.load_shards(place / SHARDS, inside, parts)
    _set_state_dicts(state, parts, None)


def _restore_full(place: Path, optimizer: dict[str, Any], state: TrainingState) -> None:
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    own = _state_dicts(state, None)["optimizer"]  # sharded ones have the whole's shape
    _check_like(own["state"], optimizer["state"], "optimizer")
    whole = {"state": optimizer["state"], "param_groups": own["param_groups"]}
    parts: dict[str, Any] = {"model": load_file(place / "model.safetensors"), "optimizer": whole}
    if state.ema is not None:
        parts["ema"] = load_file(place / "ema.safetensors")
    _set_state_dicts(state, parts, StateDictOptions(full_state_dict=True))


def _check_like(own: Any, given: Any, where: str) -> None:
    """Raise ValueError unless ``given`` has the names, shapes and dtypes of ``own``."""
    if isinstance(own, torch.Tensor):
        if not isinstance(given, torch.Tensor) or (given.shape, given.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{where} is not {own.dtype} {tuple(own.shape)}")
    elif isinstance(own, Mapping):
        if not isinstance(given, Mapping) or own.keys() != given.keys():
            raise ValueError(f"{where} has other entries")
        for name, value in own.items():
            _check_like(value, given[name], f"{where}/{name}")
    elif type(own) is not type(given):
        raise ValueError(f"{where} is not {type(own).__name__}")
