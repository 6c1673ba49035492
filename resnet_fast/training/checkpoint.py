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
file against its digest; a damaged checkpoint is named, and the newest good one before it is used. Reading runs nothing
that a file says, and reads no file outside the folder.

Only what a run wrote itself does it remove: folders of exactly these names whose sealed ``meta.json`` has the run's own
name. A checkpoint that stands in the way is renamed, and the run says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import UserError
from ..io import safe_files, weight_facts, weights
from ..io.weight_facts import Facts
from . import shards
from .augment import seed_of
from .diagnosis import not_finite
from .distributed import World
from .fields import FIELDS, LAYOUTS, OPTIONAL, SHARDS, number
from .recipe import from_dict

FORMAT = "resnet_fast training checkpoint 1"
META = "meta.json"
PARTS = {META, "model.safetensors", "ema.safetensors", "state.pt", SHARDS, "log.jsonl"}
"""Names in a checkpoint's folder, whole or not; the last where it was set aside."""
FOLDER = "checkpoints"
NAME = re.compile(r"step-[0-9]{8,}")
BEST = re.compile(r"best-[0-9]{8,}")
UNFINISHED = re.compile(r"\.(step|best)-[0-9]{8,}")


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
    """:func:`resnet_fast.io.safe_files.write_whole`. UserError where that fails (a full disk, say)."""
    try:
        safe_files.write_whole(path, content)
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
    failure = None
    if world.first:
        try:
            write_whole(path, _safe(cast("dict[str, torch.Tensor]", tensors), {weight_facts.KEY: facts.to_json()}))
        except UserError as error:
            failure = error
    world.raise_first(failure)


def folder_of(out: Path) -> Path:
    return out / FOLDER


def found(out: Path) -> list[Path]:
    """Complete checkpoints of ``out``, the newest first."""
    return sorted(_named(out, NAME), key=step_of, reverse=True)


def step_of(place: Path) -> int:
    """The step in a checkpoint's name."""
    return int(place.name.rpartition("-")[2])


def bests(out: Path) -> list[Path]:
    """The best checkpoints of ``out``, the newest first; a killed run may leave the one before, too."""
    return sorted(_named(out, BEST), key=step_of, reverse=True)


def best_of(out: Path, run: str) -> Path | None:
    """The best checkpoint of ``run``."""
    return next((place for place in bests(out) if _run_of(place) == run), None)


def keep_best(place: Path, out: Path) -> Path:
    """Keep the checkpoint ``place`` as the best one of its run in ``out``, ``best-…``, and remove the one before.

    Its files are linked, not copied, where the file system can. UserError where it cannot be written.
    """
    meta = _sealed(place)
    best = folder_of(out) / f"best-{meta['step']:08d}"
    hidden = best.with_name(f".{best.name}")
    if _run_of(best) != meta.get("run", ""):
        failure = _guarded(lambda: _link(place, hidden, best), best)
        if failure is not None:
            shutil.rmtree(hidden, ignore_errors=True)
            raise failure
    for old in bests(out):
        if old != best and not old.is_symlink() and _run_of(old) == meta.get("run", ""):
            _remove(old)
    return best


def _link(place: Path, hidden: Path, best: Path) -> None:
    _clear(hidden)
    shutil.copytree(place, hidden, copy_function=_link_or_copy)
    safe_files.sync(hidden)
    if os.path.lexists(best):
        set_aside(best)
    os.rename(hidden, best)
    safe_files.sync(best.parent)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
        safe_files.sync(Path(target))


def _named(out: Path, name: re.Pattern[str]) -> list[Path]:
    folder = folder_of(out)
    return [p for p in folder.iterdir() if name.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []


def _run_of(place: Path) -> str | None:
    """The name of the run that wrote ``place``; None where its meta.json is not there, or not as it was written."""
    try:
        return str(_sealed(place).get("run", ""))
    except Damaged:
        return None


def surplus(out: Path, run: str, step: int, keep: int) -> list[Path]:
    """The checkpoints that :func:`save` removes at ``step``: all but the newest ``keep`` of those of ``run``."""
    own = [p for p in found(out) if step_of(p) < step and not p.is_symlink() and _run_of(p) == run]
    return own[max(keep - 1, 0) :]


def check_own(out: Path, place: Path, meta: Mapping[str, Any]) -> None:
    """UserError where a run that goes on from ``place`` would write over another run's log and weights in ``out``."""
    if place.resolve().parent == folder_of(out).resolve():
        return
    others = [p for p in (*found(out), *bests(out)) if _run_of(p) != meta.get("run", "")]
    if others:
        got = f"{out} with {others[0].name} of another run than {place}"
        raise UserError("an output folder of the run that goes on, or a new one", got, "name another with --out")


def set_aside(place: Path) -> Path:
    """Rename ``place`` to a name that no run looks at, ``step-…-set-aside``; returns it. UserError where it cannot."""
    names = (f"{place.name}-set-aside{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    new = next(place.with_name(name) for name in names if not os.path.lexists(place.with_name(name)))
    try:
        os.rename(place, new)
    except OSError as error:
        raise no_room(new, error) from error
    return new


def save(
    out: Path,
    state: State,
    meta: Mapping[str, Any],
    world: World,
    sharded: bool,
    keep: int,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the checkpoint of ``meta["step"]`` and remove all but the newest ``keep`` of ``meta["run"]``.

    Every process calls it. Returns its folder. UserError where it could not be written (a full disk, say): the older
    ones are untouched. What an earlier process of the run left unfinished goes too. ``note`` hears of a folder that
    stood in the way.
    """
    place = folder_of(out) / f"step-{meta['step']:08d}"
    temporary = place.with_name(f".{place.name}")
    failure: UserError | None = None
    if sharded:
        failure = _guarded(lambda: _fresh(temporary) if world.first else None, place)
        world.raise_first(failure)
        failure = _guarded(lambda: shards.save(temporary / SHARDS, _state_dicts(state, None)), place)
        world.raise_first(failure)
    if world.first:
        failure = _guarded(lambda: _finish(place, temporary, state, meta, sharded, note), place)
        if failure is None:
            _tidy(out, str(meta.get("run", "")), meta["step"], keep)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
    world.raise_first(failure)
    return place


def _tidy(out: Path, run: str, step: int, keep: int) -> None:
    """Remove what is surplus, and what an earlier process left unfinished."""
    for old in surplus(out, run, step, keep):
        _remove(old)
    for half in _named(out, UNFINISHED):
        if _run_of(half) in (None, run) and _only_ours(half):
            shutil.rmtree(half, ignore_errors=True)


def _only_ours(half: Path) -> bool:
    """Whether a hidden folder, which no ``meta.json`` need be in yet, holds nothing but a checkpoint's files."""
    try:
        return not half.is_symlink() and {p.name for p in half.iterdir()} <= PARTS
    except OSError:
        return False


def _clear(hidden: Path) -> None:
    """Make way for a checkpoint that is to be written: remove a half of one, rename anything else."""
    if os.path.lexists(hidden):
        if hidden.is_dir() and _only_ours(hidden):
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            set_aside(hidden)


def _remove(old: Path) -> None:
    """Remove a checkpoint, under a name that no reader takes for one: a death in between leaves no half of it."""
    hidden = old.with_name(f".{old.name}")
    with contextlib.suppress(OSError, UserError):  # then it stays, as a whole one
        _clear(hidden)
        os.rename(old, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


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
    _clear(folder)
    folder.mkdir(parents=True)


def _finish(
    place: Path,
    temporary: Path,
    state: State,
    meta: Mapping[str, Any],
    sharded: bool,
    note: Callable[[str], None],
) -> None:
    """Write the files that the first process writes, their digests, and the rename."""
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
    digests = {str(p.relative_to(temporary)): [p.stat().st_size, digest_of(p)] for p in written}
    layout = "sharded" if sharded else "full"
    whole = {"format": FORMAT, "layout": layout, "files": digests} | dict(meta)
    (temporary / META).write_text(safe_files.json_text(whole | {"sha256": _seal(whole)}, indent=1))
    for path in (*written, temporary / META, *{p.parent for p in written}, temporary):
        safe_files.sync(path)
    if os.path.lexists(place):
        if not place.is_symlink() and _run_of(place) == meta.get("run", ""):
            shutil.rmtree(place)  # the same step saved again: equal by construction
        else:
            note(f"{place} is not this run's: renamed to {set_aside(place).name}")
    os.rename(temporary, place)
    safe_files.sync(place.parent)


def _seal(meta: Mapping[str, Any]) -> str:
    """The digest of a meta.json's content, however it is laid out."""
    return hashlib.sha256(safe_files.json_text(meta, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file: Any) -> str:
    """hashlib.file_digest, which Python 3.10 does not have."""
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def _sealed(place: Path) -> dict[str, Any]:
    """The content of ``meta.json`` as it was written. Raises :class:`Damaged`."""
    try:
        if (place / META).is_symlink():
            raise Damaged(f"files inside {place}", f"a link {META}", "use a checkpoint that you trust")
        meta = safe_files.json_value(safe_files.read_plain(place / META))
    except (OSError, ValueError) as error:
        raise Damaged("a checkpoint folder with meta.json", f"{place} ({error})", "name another one") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise Damaged(f"a checkpoint of the format {FORMAT!r}", f"{place}", "it was written by something else")
    if meta.pop("sha256", None) != _seal(meta):
        raise Damaged("a whole checkpoint", f"{place / META} (other content)", "use an older checkpoint")
    return meta


def read_meta(place: Path) -> dict[str, Any]:
    """A checkpoint's ``meta.json``, after every field and every file of it was checked. Raises :class:`Damaged`."""
    meta = _sealed(place)
    wrong = [name for name, right in FIELDS.items() if not right(meta[name] if name in meta else OPTIONAL.get(name))]
    if wrong:
        got = f"{place / META} with {wrong[0]} = {str(meta.get(wrong[0]))[:80]!r}"
        raise Damaged(f"{wrong[0]} as a training run writes it", got, "use an older checkpoint")
    if (NAME.fullmatch(place.name) or BEST.fullmatch(place.name)) and meta["step"] != step_of(place):
        raise Damaged(f"a checkpoint of step {step_of(place)}", f"{place} of step {meta['step']}", "rename the folder")
    try:
        from_dict(meta["recipe"])
    except UserError as error:
        raise Damaged(error.expected, f"{error.got} in {place / META}", "use an older checkpoint") from error
    absent = [name for name in LAYOUTS[meta["layout"]] if name not in meta["files"]]
    if absent:
        raise Damaged(f"{absent[0]} among its files", f"{place / META} without", "use an older checkpoint")
    root = place.resolve()
    for name, (size, digest) in meta["files"].items():
        path = place / name
        try:
            if not path.resolve().is_relative_to(root):
                raise Damaged(f"files inside {place}", f"{name!r} in its {META}", "use a checkpoint that you trust")
            if not path.is_file():
                what = "missing"
            elif path.stat().st_size != size or digest_of(path) != digest:
                what = f"{path.stat().st_size} bytes of {size}, or other content"
            else:
                continue
        except (OSError, RuntimeError) as error:  # not readable; a ring of links, a name too long
            what = " ".join(str(error).split())
        raise Damaged("a whole checkpoint", f"{path} ({what})", "use an older checkpoint")
    return meta


def choose(out: Path, resume: str) -> tuple[Path | None, dict[str, Any], list[str]]:
    """(checkpoint to go on from, its meta, complaints about newer ones that are damaged).

    ``auto``: the newest good one of ``out``, else the best one, None if there is none at all. Other than ``auto``: the
    folder ``resume`` itself, or the newest good one of the run in it. Raises :class:`Damaged` where there are some and
    none is good: a run from the start would overwrite what is left.
    """
    if resume != "auto":
        place = Path(resume)
        if (place / META).exists() or not (found(place) or bests(place)):
            return place, read_meta(place), []
        out = place
    complaints: list[str] = []
    for place in (*found(out), *bests(out)):
        try:
            return place, read_meta(place), complaints
        except Damaged as error:
            complaints.append(str(error))
    if complaints:
        got = f"{len(complaints)} damaged ones, first {complaints[0]}"
        raise Damaged(f"a good checkpoint in {folder_of(out)}", got, "remove that folder to start again")
    return None, {}, []


def load(place: Path, meta: Mapping[str, Any], state: State, world: World) -> None:
    """Restore ``state`` and the random generators from ``place`` in place, whatever number of processes wrote it.

    The optimizer's hyperparameters stay: they are the recipe's. Raises :class:`Damaged` where the files, whole as they
    are, hold something else than this net's state.
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
            _load_shards(place, meta, state)
        else:
            _load_full(place, rest["optimizer"], state)
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
    if not all(number(value) for value in content.values()) or content.get("scale", 1) <= 0:
        raise ValueError(f"a gradient scaler of {dict(content)}")


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


def _load_shards(place: Path, meta: Mapping[str, Any], state: State) -> None:
    parts = _state_dicts(state, None)
    inside = {name.removeprefix(f"{SHARDS}/") for name in meta["files"] if name.startswith(f"{SHARDS}/")}
    shards.load(place / SHARDS, inside, parts)
    _set_state_dicts(state, parts, None)


def _load_full(place: Path, optimizer: dict[str, Any], state: State) -> None:
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
    """ValueError unless ``given`` has the names, shapes and dtypes of ``own``."""
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
