"""A training run: every step from the first, or from where a checkpoint left off, to the last.

The result of a run is a function of its recipe and, because BatchNorm sees them, of the number of parts of a batch.
This file decides when to look, log, validate and save, and what happens to a run that is told to stop. It computes
nothing itself.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from . import checkpoints, curves, diagnosis, distributed, finetune, loader, preview, runlog
from .disk import no_room
from .distributed import World
from .options import RunOptions, RunResult, Tick, Watch
from .recipe import Recipe
from .setup import Setup, set_up
from .step import Tally
from .stopping import StopRequests
from .validation import Validation
from .window import Figures, Window

SAVE_SHARE = 100
"""A checkpoint is due once the run has continued for this many times what the last one took: 1 % of the time."""


def train(recipe: Recipe, options: RunOptions, watch: Watch | None = None) -> RunResult:
    """Run ``recipe`` to its end, or until Ctrl-C, SIGTERM or SIGHUP, after which it is saved.

    Writes ``log.jsonl``, ``curves.png``, ``checkpoints/``, ``best.safetensors`` (the weights of the best validation so
    far) and finally ``model.safetensors`` into ``options.out``.

    Args:
        recipe: What to compute.
        options: How to run it.
        watch: Called with progress, epochs and notes, in the first process.

    Returns:
        How the run ended, and the log lines of its epochs.

    Raises:
        UserError: Recipe, data, folder or checkpoint cannot be used. It is raised before the first step wherever it
            can be known by then.
        resnet_fast.training.diagnosis.NotFinite: The loss or a weight is no longer a number. The message names the
            layer in which that began.
    """
    options.check()
    curves.require_matplotlib()
    with distributed.world(options.device, options.parallel) as world:
        watch = watch if watch is not None and world.first else Watch()
        lock = _first_process(world, lambda: runlog.FolderLock(options.out))
        try:
            return _Run(set_up(recipe, options, world), watch).go()
        finally:
            if lock is not None:
                lock.release()


def describe_run(recipe: Recipe, options: RunOptions) -> list[str]:
    """Return what :func:`train` would do, in lines. Builds and reads everything; makes no step and writes no file."""
    options.check()
    with distributed.world(options.device, options.parallel) as world:
        setup = set_up(recipe, options, world)
        found = preview.preview_lines(
            recipe,
            setup.data,
            setup.batches,
            setup.model,
            setup.step.optimizer,
            total=setup.total,
            start=setup.progress.start,
            where=options.out,
        )
        going = f", going on from {setup.resumed.place}" if setup.resumed.place is not None else ""
        return [*found[:-1], found[-1] + going, *([f"head: {setup.origin}"] if setup.origin else [])]


def _first_process(world: World, make: Callable[[], Any]) -> Any:
    """Return what ``make`` returns in the first process, None in the others. A UserError there ends all of them."""
    made, failure = None, None
    if world.first:
        try:
            made = make()
        except UserError as error:
            failure = error
    world.raise_first(failure)
    return made


class _Run:
    """One call of :func:`train`, in phases: resume, begin, steps, and between steps validate and save; then finish."""

    def __init__(self, setup: Setup, watch: Watch):
        self.setup, self.watch = setup, watch
        self.recipe, self.options, self.world = setup.recipe, setup.options, setup.world
        self.progress, self.step = setup.progress, setup.step
        self.validation = Validation(setup.recipe, setup.data, setup.workers, setup.world, setup.sharded)
        self.log: runlog.RunLog | None = None
        self.failure: UserError | None = None
        """The first failure to write the log, an event or a picture. The run ends once it is saved."""

    def go(self) -> RunResult:
        """Run all phases."""
        try:
            self._resume()
            with StopRequests().heard() as stop:
                self._begin()
                stopped_by = self._train_steps(stop)
                return self._finish(stopped_by)
        finally:
            if self.log is not None:
                self.log.close()

    # Resume: rename what is in the way, open the log, say from where the run continues.

    def _resume(self) -> None:
        setup, progress, place = self.setup, self.progress, self.setup.resumed.place
        set_aside = self.world.shared(self._set_aside_later) if place is not None else []
        self.log = _first_process(
            self.world, lambda: runlog.RunLog(self.options.out, progress.start, self.options.tensorboard)
        )
        self.saved_at, self.save_cost = time.perf_counter(), 0.0
        for text in setup.resumed.complaints:
            self._note(f"a damaged checkpoint was passed over: {text}")
        if setup.origin:
            self._note(setup.origin)
        if place is not None:
            self._note(f"going on after step {progress.start} of {setup.total}, from {place}")
        if set_aside:
            names = ", ".join(set_aside)
            self._note(f"later checkpoints are kept under other names, at which no --resume auto looks: {names}")
        if progress.best is not None:
            if progress.best["step"] == progress.start:
                self._keep_best()
            elif not self.world.shared(self._has_best):
                progress.best = None  # it is in another folder, or of steps that this run does not continue from

    def _set_aside_later(self) -> list[str]:
        """Rename the checkpoints of later steps than the run resumes from; the newest gets the log of those steps.

        They may be damaged or unwanted, but what was computed is not thrown away, and a later ``--resume auto`` must
        find the newest checkpoint of the run as it continues now.
        """
        out = self.options.out
        places = (*checkpoints.found(out), *checkpoints.bests(out))
        later = [p for p in places if checkpoints.step_of(p) > self.progress.start]
        new = [checkpoints.set_aside(place) for place in later]
        log = self.options.out / runlog.NAME
        if new and log.exists():
            try:
                shutil.copy2(log, new[0] / runlog.NAME)
            except OSError as error:
                raise no_room(new[0] / runlog.NAME, error) from error
        return [place.name for place in new]

    # Begin: what the log says first, and what the steps need.

    def _begin(self) -> None:
        setup, data, batches = self.setup, self.setup.data, self.setup.batches
        facts = {
            "recipe": self.recipe.to_dict(),
            "device": str(self.world.device),
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            "workers": setup.workers,
            "torch": torch.__version__,
            "train_images": data.train_size,
            "val_images": data.val_size,
            "left_out_per_epoch": batches.left_over,
            "parameters": sum(p.numel() for p in setup.model.parameters()),
        }
        if setup.origin:
            facts["weights_sha256"] = checkpoints.digest_of(Path(self.recipe.weights or ""))
        if self.options.probe and self.world.first and self.progress.start < setup.total:
            rate = loader.throughput(data.train, batches, setup.workers)
            facts["input_images_per_s"] = round(rate)
            self._note(f"the input pipeline alone: {rate:,.0f} img/s with {setup.workers} worker processes")
        self._log("run", self.progress.start, **facts)
        self.watch.note(data.summary())
        if data.note:
            self.watch.note(f"{data.name}: {data.note}")
        if batches.left_over:
            self.watch.note(f"{batches.left_over} images of each epoch are left out: a batch too small for its parts")

    # Steps.

    def _train_steps(self, stop: StopRequests) -> str:
        """Train to the last step, or until the run is told to stop; return by what, or ""."""
        setup, progress = self.setup, self.progress
        start, per_epoch = progress.start, setup.batches.steps_per_epoch
        sampler = loader.PartSampler(setup.batches, self.world.rank, self.recipe.accumulate, start, setup.total)
        source = loader.data_loader(setup.data.train, sampler, setup.workers, self.world.device)
        parts = loader.Prefetcher(source, self.world.device) if start < setup.total else None
        setup.model.train()
        finetune.hold(setup.model, self.recipe.freeze)
        self.began = time.perf_counter()
        self.window = Window.at(start, self.step.sums.read(self.world), progress.window)
        self.tick = Tick(start, setup.total, start / per_epoch, float("nan"), float("nan"), 0.0, 0.0)
        while progress.step < setup.total:
            assert parts is not None
            at_epochs_end = self._train_step(parts)
            stopped_by = self._between_steps(at_epochs_end, stop)
            if stopped_by:
                return stopped_by
        return ""

    def _train_step(self, parts: loader.Prefetcher) -> Figures | None:
        """Make one step, and log it if a line is due; return the figures of the epoch that it ends, else None."""
        progress, per_epoch = self.progress, self.setup.batches.steps_per_epoch
        batch = self.setup.batches.batch_size(progress.step % per_epoch)
        rate = self.recipe.lr * self.recipe.factor(progress.step, per_epoch)
        unreadable = self.step(parts, batch, rate)
        progress.step += 1
        self._count_unreadable(unreadable)
        ends_epoch = progress.step % per_epoch == 0 or progress.step == self.setup.total
        seen = None
        if progress.step % self.options.log_every == 0 or ends_epoch:
            seen = self.step.sums.read(self.world)
            self.tick = self._log_step(rate, seen, parts)
        self.watch.step(replace(self.tick, step=progress.step, epoch=progress.step / per_epoch))
        return seen if ends_epoch else None

    def _log_step(self, rate: float, seen: Figures, parts: loader.Prefetcher) -> Tick:
        """Log what happened since the last line."""
        number, waited = self.progress.step, parts.waited_s
        epoch = number / self.setup.batches.steps_per_epoch
        line = self.window.line(number, seen, waited, self.step.clock.spent)
        self._log("train", number, epoch=round(epoch, 4), rate=rate, **line)
        self.step.clock.spent.clear()
        parts.waited_s = 0.0
        share = line["data_ms"] / line["step_ms"] if line["step_ms"] else 0.0
        return Tick(number, self.setup.total, epoch, line["loss"], line["error"], line["images_per_s"], share)

    # Between steps: agree on what to do, validate, save.

    def _between_steps(self, seen: Figures | None, stop: StopRequests) -> str:
        """Validate at the end of an epoch (``seen`` in it), save where due; return what stops the run here, or ""."""
        progress, stop_after = self.progress, self.options.stop_after
        full = stop_after is not None and progress.step - progress.start >= stop_after
        lost = self.failure is not None
        wanted, asked = self._agree(self._save_due(), bool(stop.name) or full or lost)
        if seen is not None or asked or wanted:
            self._validate_and_save(seen)
        if asked and progress.step < self.setup.total:
            return stop.name or ("a request in another process" if not full else "--stop-after")
        return ""

    def _agree(self, *flags: bool) -> tuple[bool, ...]:
        """Return each flag, set if it is set in any process: all save or stop after the same step."""
        if self.world.size == 1:
            return flags
        return tuple(bool(v) for v in self.world.sum(torch.tensor([float(f) for f in flags])).tolist())

    def _save_due(self) -> bool:
        if self.options.save_steps:
            return self.progress.step % self.options.save_steps == 0
        return self.world.first and time.perf_counter() - self.saved_at > SAVE_SHARE * self.save_cost

    def _validate_and_save(self, seen: Figures | None) -> None:
        """Check the weights, validate where an epoch ends (``seen`` in it), and save.

        Raises:
            UserError: The log, an event or a picture could not be written; the run is saved now. Or it cannot be saved.
        """
        since, progress = time.perf_counter(), self.progress
        self._average()
        self._check_weights()
        better = False
        if seen is not None:
            error = self._end_epoch(seen, self._seconds())
            better = progress.best is None or error < progress.best["val_error"]
            if better:
                progress.best = {"step": progress.step, "val_error": error}
        try:
            self._save(self._seconds())
            if better:
                self._keep_best()
        except UserError as failure:
            if self.failure is None:
                raise
            got = f"{self.failure.got}; step {progress.step} could not be saved either: {failure.got}"
            raise UserError(self.failure.expected, got, failure.todo) from failure
        lost = self.failure
        if lost is not None:
            lost = UserError(lost.expected, f"{lost.got}; the run is saved after step {progress.step}", lost.todo)
        self.world.raise_first(lost)
        self.window.paused += time.perf_counter() - since

    def _average(self) -> None:
        """Average running statistics, those of averaged weights too, over all processes."""
        for net in (self.setup.model, self.step.ema):
            if net is not None:
                distributed.average_buffers(net, self.world)

    def _check_weights(self) -> None:
        """Raise NotFinite after an update that overflowed: the loss of the next step may never show it."""
        broken = diagnosis.not_finite(self.setup.model, self.step.ema, self.step.optimizer)
        if broken:
            broken = f"after the update of step {self.progress.step} {broken}"
        self.world.raise_first(diagnosis.NotFinite(broken, "weights that are numbers") if broken else None)

    def _end_epoch(self, seen: Figures, seconds: float) -> float:
        """Validate, log, draw, and reset the sums. Return the share of wrong answers on the validation set."""
        number = self.progress.step
        net = self.setup.model if self.step.ema is None else self.step.ema
        loss, error, images = self.validation.measure(net, self.step)
        self._gather_unreadable()
        line = {
            "epoch": round(number / self.setup.batches.steps_per_epoch, 4),
            "train_loss": seen[0],
            "train_error": seen[1],
            "val_loss": loss,
            "val_error": error,
            "val_images": images,
            "unreadable": len(self.progress.unreadable),
            "seconds": round(seconds, 2),
        }
        self._log("epoch", number, **line)
        if self.log is not None:
            title = f"{self.recipe.model} on {self.setup.data.name}"
            self._write(lambda: curves.write_curves(self.options.out, title))
        self.watch.epoch(line)
        if number == self.setup.total and images and not math.isfinite(loss):  # no further step would show it
            raise diagnosis.NotFinite(f"{loss} after the last step, {number}", "a validation loss that is a number")
        self.step.sums = Tally.empty(self.world.device)
        self.window.new_epoch()
        return error

    def _save(self, seconds: float) -> None:
        """Write the checkpoint of this step, and remove those that are not kept."""
        since, setup, progress = time.perf_counter(), self.setup, self.progress
        self._gather_unreadable()
        sums = self.world.sum(self.step.sums.values.cpu().clone())
        meta = {
            "run": progress.run,
            "step": progress.step,
            "classes": setup.classes,
            "facts": setup.data.facts(self.recipe).to_dict(),
            "recipe": self.recipe.to_dict(),
            "sums": sums.tolist(),
            "window": self.window.to_dict(),
            "best": progress.best,
            "seconds": round(seconds, 3),
            "processes": self.world.size,
            "unreadable": sorted(progress.unreadable),
        }
        out, keep = self.options.out, self.options.keep
        if self.log is not None:
            going = checkpoints.surplus(out, progress.run, progress.step, keep)
            if len(going) > 1:  # more than the one that each new checkpoint replaces: fewer are kept than before
                self._note(f"removing all but the newest {keep} (--keep): {', '.join(p.name for p in going)}")
        checkpoints.save_checkpoint(out, setup.state, meta, self.world, setup.sharded, keep, self._note)
        self.saved_at = time.perf_counter()
        self.save_cost = self.saved_at - since

    def _has_best(self) -> bool:
        best, place = self.progress.best, checkpoints.best_of(self.options.out, self.progress.run)
        return best is not None and place is not None and checkpoints.step_of(place) == best["step"]

    def _keep_best(self) -> None:
        """Keep the checkpoint of this step, which was just saved, as the best one, and its weights as a file."""
        assert self.progress.best is not None
        out, resumed = self.options.out, self.setup.resumed.place
        place = checkpoints.folder_of(out) / f"step-{self.progress.best['step']:08d}"
        source = place if place.exists() or resumed is None else resumed  # the run may resume from another folder
        self.world.shared(lambda: checkpoints.keep_best(source, out))
        self._export("best.safetensors")

    # Finish.

    def _finish(self, stopped_by: str) -> RunResult:
        """Write the final weights if the run is complete, and return how it ended."""
        number, out = self.progress.step, self.options.out
        finished = number >= self.setup.total
        if finished:
            self._export("model.safetensors")
        epochs = runlog.of_kind(out, "epoch") if self.world.first else []
        return RunResult(out, number, finished, stopped_by, self._seconds(), epochs)

    def _export(self, name: str) -> None:
        """Write the weights as they are now; the averaged ones if the run has them."""
        net = self.setup.model if self.step.ema is None else self.step.ema.module
        facts = self.setup.data.facts(self.recipe)
        checkpoints.export_weights(net, self.options.out / name, facts, self.world)

    # What all phases use.

    def _seconds(self) -> float:
        """Return the seconds of this run so far, those before it was resumed included."""
        return self.progress.seconds + time.perf_counter() - self.began

    def _note(self, text: str) -> None:
        self.watch.note(text)
        self._log("note", self.progress.start, text=text)

    def _log(self, kind: str, step: int, **values: Any) -> None:
        log = self.log
        if log is not None:
            self._write(lambda: log.write(kind, step, **values))

    def _write(self, work: Callable[[], object]) -> None:
        """Do ``work``, which writes something. If that fails, the run is saved after this step, and then ends."""
        try:
            work()
        except UserError as error:
            self.failure = self.failure or error

    def _count_unreadable(self, names: list[str]) -> None:
        unreadable = self.progress.unreadable
        for name in [name for name in names if name not in unreadable]:
            unreadable.add(name)
            self.watch.note(f"skipped, {len(unreadable)} so far: {name}")
            self._log("note", self.progress.step, text=f"skipped: {name}")

    def _gather_unreadable(self) -> None:
        """Count and tell the names of images that other processes could not read."""
        if not self.setup.data.in_memory:
            self._count_unreadable(sorted(self.world.union(self.progress.unreadable | self.validation.unreadable)))
