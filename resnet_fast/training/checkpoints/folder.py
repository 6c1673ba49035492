"""The folder of a run's checkpoints: which there are, which to resume from, which to keep and which to remove."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError
from ...io import safe_files
from ..disk import no_room
from .meta import BEST, FOLDER, META, NAME, SHARDS, Damaged, read_meta, read_sealed, step_of

PARTS = {META, "model.safetensors", "ema.safetensors", "state.pt", SHARDS, "log.jsonl"}
"""Names in a checkpoint's folder, complete or not. A checkpoint that was set aside has the log too."""
UNFINISHED = re.compile(r"\.(step|best)-[0-9]{8,}")


class ResumePoint(NamedTuple):
    """The checkpoint to resume from, or None; its ``meta.json``; and why newer ones were passed over."""

    place: Path | None
    meta: dict[str, Any]
    complaints: list[str]


def resume_point(out: Path, resume: str) -> ResumePoint:
    """Find the checkpoint that a run in ``out`` resumes from.

    Args:
        out: The folder of the run.
        resume: ``auto`` takes the newest good checkpoint of ``out``, else its best one, else none. Anything else is a
            checkpoint's folder, or the folder of a run, of which the newest good checkpoint is taken.

    Raises:
        Damaged: There are checkpoints and none is good. Starting again would overwrite what is left of them.
    """
    if resume != "auto":
        place = Path(resume)
        if (place / META).exists() or not (found(place) or bests(place)):
            return ResumePoint(place, read_meta(place), [])
        out = place
    complaints: list[str] = []
    for place in (*found(out), *bests(out)):
        try:
            return ResumePoint(place, read_meta(place), complaints)
        except Damaged as error:
            complaints.append(str(error))
    if complaints:
        got = f"{len(complaints)} damaged ones, first {complaints[0]}"
        raise Damaged(f"a good checkpoint in {folder_of(out)}", got, "remove that folder to start again")
    return ResumePoint(None, {}, [])


def folder_of(out: Path) -> Path:
    """Return the folder of the checkpoints of the run in ``out``."""
    return out / FOLDER


def found(out: Path) -> list[Path]:
    """Return the complete checkpoints of ``out``, newest first."""
    return sorted(_named(out, NAME), key=step_of, reverse=True)


def bests(out: Path) -> list[Path]:
    """Return the best checkpoints of ``out``, newest first. A killed run may leave an earlier one as well."""
    return sorted(_named(out, BEST), key=step_of, reverse=True)


def best_of(out: Path, run: str) -> Path | None:
    """Return the best checkpoint of the run named ``run``, or None."""
    return next((place for place in bests(out) if run_of(place) == run), None)


def _named(out: Path, name: re.Pattern[str]) -> list[Path]:
    folder = folder_of(out)
    return [p for p in folder.iterdir() if name.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []


def run_of(place: Path) -> str | None:
    """Return the name of the run that wrote ``place``; None if its meta.json is absent or was changed."""
    try:
        return str(read_sealed(place).get("run", ""))
    except Damaged:
        return None


def surplus(out: Path, run: str, step: int, keep: int) -> list[Path]:
    """Return the checkpoints of ``run`` that saving at ``step`` removes: all but the newest ``keep``."""
    own = [p for p in found(out) if step_of(p) < step and not p.is_symlink() and run_of(p) == run]
    return own[max(keep - 1, 0) :]


def check_own(out: Path, place: Path, meta: Mapping[str, Any]) -> None:
    """Raise UserError if a run that resumes from ``place`` would overwrite another run's log and weights in ``out``."""
    if place.resolve().parent == folder_of(out).resolve():
        return
    others = [p for p in (*found(out), *bests(out)) if run_of(p) != meta.get("run", "")]
    if others:
        got = f"{out} with {others[0].name} of another run than {place}"
        raise UserError("an output folder of the run that goes on, or a new one", got, "name another with --out")


def keep_best(place: Path, out: Path) -> Path:
    """Keep the checkpoint ``place`` as ``best-…``, the best one of its run in ``out``, and remove the previous best.

    Its files are linked instead of copied where the file system has links.

    Raises:
        UserError: The checkpoint cannot be written.
    """
    meta = read_sealed(place)
    best = folder_of(out) / f"best-{meta['step']:08d}"
    hidden = best.with_name(f".{best.name}")
    if run_of(best) != meta.get("run", ""):
        failure = write_error(lambda: _link(place, hidden, best), best)
        if failure is not None:
            shutil.rmtree(hidden, ignore_errors=True)
            raise failure
    for old in bests(out):
        if old != best and not old.is_symlink() and run_of(old) == meta.get("run", ""):
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


def set_aside(place: Path) -> Path:
    """Rename ``place`` to ``step-…-set-aside``, a name that no run looks at, and return the new path.

    Raises:
        UserError: The folder cannot be renamed.
    """
    names = (f"{place.name}-set-aside{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    new = next(place.with_name(name) for name in names if not os.path.lexists(place.with_name(name)))
    try:
        os.rename(place, new)
    except OSError as error:
        raise no_room(new, error) from error
    return new


def remove_old(out: Path, run: str, step: int, keep: int) -> None:
    """Remove the surplus checkpoints of ``run``, and what an earlier process of it left unfinished."""
    for old in surplus(out, run, step, keep):
        _remove(old)
    for half in _named(out, UNFINISHED):
        if run_of(half) in (None, run) and _only_ours(half):
            shutil.rmtree(half, ignore_errors=True)


def make_empty(folder: Path) -> None:
    """Create the hidden ``folder`` to write a checkpoint into, empty."""
    _clear(folder)
    folder.mkdir(parents=True)


def _only_ours(half: Path) -> bool:
    """Return whether a hidden folder, which may have no ``meta.json`` yet, holds only files of a checkpoint."""
    try:
        return not half.is_symlink() and {p.name for p in half.iterdir()} <= PARTS
    except OSError:
        return False


def _clear(hidden: Path) -> None:
    """Make way for a checkpoint that is to be written: remove an unfinished one, rename anything else."""
    if os.path.lexists(hidden):
        if hidden.is_dir() and _only_ours(hidden):
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            set_aside(hidden)


def _remove(old: Path) -> None:
    """Remove a checkpoint under a hidden name: a process killed in between leaves no half of it under its own name."""
    hidden = old.with_name(f".{old.name}")
    with contextlib.suppress(OSError, UserError):  # then it stays, complete
        _clear(hidden)
        os.rename(old, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def write_error(work: Callable[[], None], place: Path) -> UserError | None:
    """Do ``work``, which writes the checkpoint ``place``; return the error to raise if that fails, else None."""
    try:
        work()
    except (OSError, RuntimeError) as error:  # torch's writers turn a full disk into RuntimeError
        kept = [p.name for p in found(place.parent.parent)]
        last = f"the last good one, {kept[0]}, is untouched" if kept else "there is no older one"
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        return UserError(
            f"space and permission to write {place}", reason, f"{last}; fix that and continue with --resume auto"
        )
    return None
