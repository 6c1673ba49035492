"""Checkpoints that are whole or not there.

::

    out/checkpoints/step-00001200/      named only once everything in it is on the disk
        meta.json                       format, recipe, classes, step, sums, and size and SHA-256 of every other file
                                        and of itself
        model.safetensors               the net, torchvision's names          } layout "full"
        ema.safetensors                 averaged weights, where there are any  }
        state.pt                        optimizer, gradient scaler, random states
        shards/                         model, optimizer and averaged weights instead, layout "sharded"
                                        (torch.distributed.checkpoint, one file per process)

A checkpoint is written into a hidden folder beside, each file flushed to the disk, and takes its name by a rename: a
process killed at any instruction, or a disk that fills up, leaves the previous ones as they were. Reading checks every
file against its digest; a damaged checkpoint is named, and the newest good one before it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .. import facts as facts_of
from .. import files
from ..errors import UserError
from ..facts import Facts
from .augment import seed_of
from .distributed import World

FORMAT = "resnet_fast training checkpoint 1"
META = "meta.json"
SHARDS = "shards"


class Damaged(UserError):
    """A checkpoint that cannot be read as one."""


@dataclass
class State:
    """The objects that a checkpoint saves and restores in place. ``scaler`` without content where it is disabled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: nn.Module | None = None


def random_states() -> dict[str, Any]:
    """The states of torch's, CUDA's, NumPy's and Python's global generators, as tensors and plain values."""
    import numpy as np

    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of :func:`random_states`."""
    import numpy as np

    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))


def write_whole(path: Path, content: bytes) -> None:
    """:func:`resnet_fast.files.write_whole`. UserError where that fails (a full disk, say)."""
    try:
        files.write_whole(path, content)
    except OSError as error:
        raise no_room(path, error) from error


def no_room(path: Path, error: OSError) -> UserError:
    """What ``error`` while writing ``path`` means to the one whose disk it is."""
    return UserError(f"room and leave to write {path}", str(error.strerror), "mend that and go on with --resume auto")


def _safe(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """safetensors' bytes; memory formats are not in them."""
    from safetensors.torch import save

    values = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return save(values, metadata=dict(metadata) if metadata else None)


def export(model: nn.Module, path: Path, facts: Facts, world: World) -> None:
    """``model``'s weights under torchvision's names, as ``resnet-fast predict --weights`` reads them.

    ``facts`` go into the file's metadata as one JSON text: safetensors writes several entries in no fixed order, and
    equal runs shall leave equal files. Every process calls it: shards are gathered.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if world.first:
        write_whole(path, _safe(cast("dict[str, torch.Tensor]", tensors), {facts_of.KEY: facts.to_json()}))


def folder_of(out: Path) -> Path:
    return out / "checkpoints"


def found(out: Path) -> list[Path]:
    """Complete checkpoints of ``out``, the newest first."""
    return sorted(folder_of(out).glob("step-*"), reverse=True)


def save(out: Path, state: State, meta: Mapping[str, Any], world: World, sharded: bool, keep: int) -> Path:
    """Write the checkpoint of ``meta["step"]`` and remove all but the newest ``keep``. Returns its folder.

    Every process calls it. UserError where it could not be written (a full disk, say): the older ones are untouched.
    Those of later steps go: the run, which is at this one, did not go on from them. So do the unfinished ones of a run
    that was killed.
    """
    place = folder_of(out) / f"step-{meta['step']:08d}"
    temporary = place.with_name(f".{place.name}")
    failure: UserError | None = None
    if sharded:
        failure = _guarded(lambda: _fresh(temporary) if world.first else None, place)
        world.raise_first(failure)
        failure = _guarded(lambda: _save_shards(temporary, state), place)
        world.raise_first(failure)
    if world.first:
        failure = _guarded(lambda: _finish(place, temporary, state, meta, sharded), place)
        if failure is None:
            kept = [p for p in found(out) if p.name <= place.name][:keep]
            for old in (*found(out), *folder_of(out).glob(".step-*")):
                if old not in kept:
                    shutil.rmtree(old, ignore_errors=True)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
    world.raise_first(failure)
    return place


def _guarded(work: Callable[[], None], place: Path) -> UserError | None:
    try:
        work()
    except (OSError, RuntimeError) as error:  # torch's writers turn a full disk into RuntimeError
        kept = [p.name for p in found(place.parent.parent)]
        last = f"the last good one, {kept[0]}, is untouched" if kept else "there is no older one"
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        return UserError(f"room and leave to write {place}", reason, f"{last}; mend that and go on with --resume auto")
    return None


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(place: Path, temporary: Path, state: State, meta: Mapping[str, Any], sharded: bool) -> None:
    """The files that the first process writes, their digests, and the rename."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    buffer = io.BytesIO()
    rest: dict[str, Any] = {"scaler": state.scaler.state_dict(), "random": random_states()}
    if not sharded:
        _fresh(temporary)
        parts = _state_dicts(state, StateDictOptions(full_state_dict=True, cpu_offload=True))
        rest["optimizer"] = parts["optimizer"]
        for name in ("model", "ema"):
            if name in parts:
                (temporary / f"{name}.safetensors").write_bytes(_safe(parts[name]))
    torch.save(rest, buffer)
    (temporary / "state.pt").write_bytes(buffer.getvalue())
    written = sorted(p for p in temporary.rglob("*") if p.is_file())
    digests = {str(p.relative_to(temporary)): [p.stat().st_size, _digest(p)] for p in written}
    layout = "sharded" if sharded else "full"
    whole = {"format": FORMAT, "layout": layout, "files": digests} | dict(meta)
    (temporary / META).write_text(json.dumps(whole | {"sha256": _seal(whole)}, indent=1))
    for path in (*written, temporary / META, *{p.parent for p in written}, temporary):
        files.sync(path)
    if place.exists():  # the same step saved again after a resume: equal by construction
        shutil.rmtree(place)
    os.rename(temporary, place)
    files.sync(place.parent)


def _seal(meta: Mapping[str, Any]) -> str:
    """The digest of a meta.json's content, however it is laid out."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file: Any) -> str:
    """hashlib.file_digest, which Python 3.10 does not have."""
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def read_meta(place: Path) -> dict[str, Any]:
    """A checkpoint's ``meta.json``, after every file of it was checked. Raises :class:`Damaged`."""
    try:
        meta = json.loads((place / META).read_text())
    except (OSError, ValueError) as error:
        raise Damaged("a checkpoint folder with meta.json", f"{place} ({error})", "name another one") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise Damaged(f"a checkpoint of the format {FORMAT!r}", f"{place}", "it was written by something else")
    if meta.pop("sha256", None) != _seal(meta):
        raise Damaged("a whole checkpoint", f"{place / META} (other content)", "use an older checkpoint")
    for name, (size, digest) in meta["files"].items():
        path = place / name
        if not path.is_file() or path.stat().st_size != size or _digest(path) != digest:
            what = "missing" if not path.is_file() else f"{path.stat().st_size} bytes of {size}, or other content"
            raise Damaged("a whole checkpoint", f"{path} ({what})", "use an older checkpoint")
    return meta


def choose(out: Path, resume: str) -> tuple[Path | None, dict[str, Any], list[str]]:
    """(checkpoint to go on from, its meta, complaints about newer ones that are damaged).

    ``auto``: the newest good one of ``out``, None if there is none at all; else the folder ``resume`` itself. Raises
    :class:`Damaged` where there are some and none is good: a run from the start would overwrite what is left.
    """
    if resume != "auto":
        place = Path(resume)
        return place, read_meta(place), []
    complaints: list[str] = []
    for place in found(out):
        try:
            return place, read_meta(place), complaints
        except Damaged as error:
            complaints.append(str(error))
    if complaints:
        got = f"{len(complaints)} damaged ones, first {complaints[0]}"
        raise Damaged(f"a good checkpoint in {folder_of(out)}", got, "remove that folder to start again")
    return None, {}, []


def load(place: Path, meta: Mapping[str, Any], state: State, world: World) -> None:
    """Restore ``state`` and the random generators from ``place`` in place, whatever number of processes wrote it."""
    rest = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
    if meta["layout"] == "sharded":
        _load_shards(place, state)
    else:
        _load_full(place, rest["optimizer"], state)
    if rest["scaler"]:
        state.scaler.load_state_dict(rest["scaler"])
    if world.first:
        set_random_states(rest["random"])
    else:
        torch.manual_seed(seed_of(torch.initial_seed(), meta["step"], world.rank))


def _state_dicts(state: State, options: Any) -> dict[str, Any]:
    """Model, optimizer and averaged weights by parameter name, whole or as this process's shards of them."""
    from torch.distributed.checkpoint import state_dict

    model, optimizer = state_dict.get_state_dict(state.model, state.optimizer, options=options)
    parts = {"model": model, "optimizer": optimizer}
    if state.ema is not None:
        parts["ema"] = state_dict.get_model_state_dict(state.ema, options=options)
    return parts


def _set_state_dicts(state: State, parts: Mapping[str, Any], options: Any) -> None:
    from torch.distributed.checkpoint import state_dict

    state_dict.set_model_state_dict(state.model, parts["model"], options=options)
    held = [value for values in parts["optimizer"]["state"].values() for value in values.values()]
    if any(isinstance(value, torch.Tensor) for value in held):  # without momentum SGD holds nothing
        state_dict.set_optimizer_state_dict(state.model, state.optimizer, parts["optimizer"], options=options)
    if state.ema is not None:
        state_dict.set_model_state_dict(state.ema, parts["ema"], options=options)


def _save_shards(temporary: Path, state: State) -> None:
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(_state_dicts(state, None), checkpoint_id=str(temporary / SHARDS))
    except dcp.CheckpointException as error:  # not an Exception; the same in every process
        rank, (cause, _) = min(error.failures.items())
        reason = getattr(cause, "strerror", None) or cause
        raise OSError(f"{reason}, in process {rank}") from error


def _load_shards(place: Path, state: State) -> None:
    import torch.distributed.checkpoint as dcp

    parts = _state_dicts(state, None)
    alone = not torch.distributed.is_initialized()
    with warnings.catch_warnings():  # that it loads in a single process: so it shall
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(parts, checkpoint_id=str(place / SHARDS), no_dist=alone)
    _set_state_dicts(state, parts, None)


def _load_full(place: Path, optimizer: dict[str, Any], state: State) -> None:
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    parts = {"model": load_file(place / "model.safetensors"), "optimizer": optimizer}
    if state.ema is not None:
        parts["ema"] = load_file(place / "ema.safetensors")
    _set_state_dicts(state, parts, StateDictOptions(full_state_dict=True))
