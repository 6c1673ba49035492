"""The run itself: every step from the first, or from where a checkpoint left off, to the last.

What a run computes is a function of its recipe (and, where BatchNorm sees them, of how many parts a batch is in). This
file decides when to look, log, validate and save, and what happens to a run that is told to stop. It computes nothing.
"""

from __future__ import annotations

import math
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import limits
from ..errors import UserError
from . import checkpoint, curves, diagnosis, distributed, finetune, loader, optim, runlog
from . import plan as plans
from .data import Data, check_files
from .data import load as load_data
from .distributed import World
from .options import Options, Result, Tick, Watch
from .recipe import Recipe, from_dict
from .step import Normalise, Step, Sums
from .stopping import StopRequests
from .validation import Validation
from .window import Figures, Window

SAVE_SHARE = 100
"""A checkpoint is due when the run has gone on for this many times what the last one took: 1 % of the time."""


def train(recipe: Recipe, options: Options, watch: Watch | None = None) -> Result:
    """Run ``recipe`` to its end, or until Ctrl-C, SIGTERM or SIGHUP (then saved), and return how it went.

    Writes ``log.jsonl``, ``curves.png``, ``checkpoints/``, ``best.safetensors`` (the weights of the best validation so
    far) and at last ``model.safetensors`` into ``options.out``.

    Raises:
        UserError: something about recipe, data, folder or checkpoint that cannot be used, before the first step
            wherever it can be known then.
        resnet_fast.training.diagnosis.NotFinite: the loss is no longer a number, or a weight; says which layer it
            began in.
    """
    options.check()
    curves.require_matplotlib()
    with distributed.world(options.device, options.parallel) as world:
        watch = watch if watch is not None and world.first else Watch()
        lock, failure = None, None
        if world.first:
            try:
                lock = runlog.Lock(options.out)
            except UserError as error:
                failure = error
        world.raise_first(failure)
        try:
            return _Run(recipe, options, watch, world).go()
        finally:
            if lock is not None:
                lock.release()


def plan(recipe: Recipe, options: Options) -> list[str]:
    """What :func:`train` would do, in lines, with everything built and read, no step made and no file written."""
    options.check()
    with distributed.world(options.device, options.parallel) as world:
        return _Run(recipe, options, Watch(), world).plan_lines()


MAY_CHANGE = ("epochs", "steps", "data_path", "backend", "save", "accumulate", "weights")
"""What a resumed run may have otherwise than its checkpoint: its length, and where and how the same is computed."""


def check_resumable(recipe: Recipe, classes: int, meta: dict[str, Any], place: Path) -> None:
    """UserError unless ``recipe`` goes on with what the checkpoint at ``place`` was trained by."""
    if meta["classes"] != classes:
        got = f"{classes} in the data now"
        raise UserError(f"the {meta['classes']} classes of {place}", got, "use the data that the run began with")
    then, now = from_dict(meta["recipe"]).to_dict(), recipe.to_dict()
    changed = [f"{key}: {now[key]} (was {then[key]})" for key in now if now[key] != then[key] and key not in MAY_CHANGE]
    if changed:
        raise UserError(f"the recipe of {place}", "; ".join(changed), "change it back, or start in another folder")


class _Run:
    """One call of :func:`train`."""

    def __init__(self, recipe: Recipe, options: Options, watch: Watch, world: World):
        self.recipe, self.options, self.watch, self.world = recipe, options, watch, world
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.deterministic:
            torch.backends.cudnn.deterministic = True
        elif world.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self._check_norms()
        self.data: Data = load_data(recipe)
        if options.strict_data and not self.data.in_memory:
            check_files(self.data)
        parts = world.size * recipe.accumulate
        self.plan = loader.Plan(self.data.train_size, recipe.batch, parts, recipe.seed)
        if world.device.type == "cpu":
            images = -(-recipe.batch // parts)
            if recipe.freeze is None:
                plans.check_room(recipe.model, images, recipe.size, recipe.amp)
            else:
                limits.check_input(images, recipe.size, names=("batch", "size"))
        self.total = recipe.total_steps(self.plan.steps_per_epoch)
        workers = options.workers
        self.workers = loader.workers_for(self.data, world.device, world.size) if workers is None else workers
        self.classes = recipe.classes or len(self.data.classes)
        place, meta, complaints = world.shared(self._where_to_begin)
        self.place, self.complaints = place, complaints
        self._build()
        self.start = 0
        self.seconds = 0.0
        self.saved_window: dict[str, Any] | None = meta.get("window")
        self.failure: UserError | None = None
        """The first failure to write what a run can do without until it is saved."""
        if place is not None:
            checkpoint.load(place, meta, self.state, world)
            self.start, self.seconds = meta["step"], meta["seconds"]
            if world.first:
                self.step.sums.values.copy_(torch.tensor(meta["sums"], dtype=torch.float64))
        else:
            torch.manual_seed(recipe.seed + world.rank)
        self.best: dict[str, Any] | None = meta.get("best")
        """Step and validation error of the best checkpoint."""
        self.unreadable: set[str] = set(meta.get("unreadable", ()))
        self.validation = Validation(recipe, self.data, self.workers, world, options.parallel == "fsdp")
        self.name: str = meta.get("run") or secrets.token_hex(8)
        """By which its checkpoints know that they are this run's."""
        self.log: runlog.RunLog | None = None

    def plan_lines(self) -> list[str]:
        """See :func:`plan`."""
        out = self.options.out
        going = f", going on from {self.place}" if self.place is not None else ""
        built = (self.recipe, self.data, self.plan, self.model, self.step.optimizer)
        found = plans.lines(*built, total=self.total, start=self.start, where=out)
        return [*found[:-1], found[-1] + going, *([f"head: {self.origin}"] if self.origin else [])]

    def _enter(self) -> None:
        """Begin to write: rename what is in the way, open the log, say from where the run goes on."""
        place = self.place
        set_aside = self.world.shared(self._set_aside_later) if place is not None else []
        self.log = self._open_log()
        self.saved_at, self.save_cost = time.perf_counter(), 0.0
        for text in self.complaints:
            self._note(f"a damaged checkpoint was passed over: {text}")
        if self.origin:
            self._note(self.origin)
        if place is not None:
            self._note(f"going on after step {self.start} of {self.total}, from {place}")
        if set_aside:
            names = ", ".join(set_aside)
            self._note(f"later checkpoints are kept under other names, at which no --resume auto looks: {names}")
        if self.best is not None:
            if self.best["step"] == self.start:
                self._keep_best()
            elif not self.world.shared(self._has_best):
                self.best = None  # it is elsewhere, or was of steps that this run does not go on from

    def _open_log(self) -> runlog.RunLog | None:
        """The log, in the first process; all end where it cannot be written."""
        log, failure = None, None
        if self.world.first:
            try:
                log = runlog.RunLog(self.options.out, self.start, self.options.tensorboard)
            except UserError as error:
                failure = error
        self.world.raise_first(failure)
        return log

    def _write(self, work: Callable[[], object]) -> None:
        """Do ``work``, which writes something. Where that fails, the run is saved after this step, and then ends."""
        try:
            work()
        except UserError as error:
            self.failure = self.failure or error

    def _log(self, kind: str, step: int, **values: Any) -> None:
        log = self.log
        if log is not None:
            self._write(lambda: log.write(kind, step, **values))

    def _check_norms(self) -> None:
        from .. import flags

        emulated = self.recipe.backend == "triton" or flags.BACKEND.read() == "triton"
        if self.recipe.sync_bn and self.world.device.type == "cpu" and not emulated:
            raise UserError(
                "a GPU for sync_bn (stock SyncBatchNorm does not train on the CPU)",
                "device cpu",
                "leave out sync_bn, or run the kernels interpreted with TRITON_INTERPRET=1 and backend triton",
            )

    def _where_to_begin(self) -> tuple[Path | None, dict[str, Any], list[str]]:
        out, resume = self.options.out, self.options.resume
        runlog.check_place(out)
        if not resume:
            there = (*checkpoint.found(out), *checkpoint.bests(out))
            if there:
                raise UserError(
                    "an output folder without checkpoints for a new run",
                    f"{out}, which has {there[0].name}",
                    "go on with --resume auto, or name another with --out",
                )
            return None, {}, []
        place, meta, complaints = checkpoint.choose(out, resume)
        if place is not None:
            check_resumable(self.recipe, self.classes, meta, place)
            checkpoint.check_own(out, place, meta)
        return place, meta, complaints

    def _set_aside_later(self) -> list[str]:
        """Rename the checkpoints of later steps, which this run does not go on from; the newest gets the log of them.

        They may be damaged, or not wanted; but what was computed is not thrown away, and a later ``--resume auto``
        finds the newest checkpoint of the run as it goes on now.
        """
        out = self.options.out
        places = (*checkpoint.found(out), *checkpoint.bests(out))
        later = [p for p in places if checkpoint.step_of(p) > self.start]
        new = [checkpoint.set_aside(place) for place in later]
        log = self.options.out / runlog.NAME
        if new and log.exists():
            try:
                shutil.copy2(log, new[0] / runlog.NAME)
            except OSError as error:
                raise checkpoint.no_room(new[0] / runlog.NAME, error) from error
        return [place.name for place in new]

    def _build(self) -> None:
        """Net, optimizer, averaged weights and step, spread over the processes."""
        recipe, world, options = self.recipe, self.world, self.options
        sharded = options.parallel == "fsdp"
        model = optim.build(recipe, self.classes)
        self.origin = ""
        """What became of the weights that the run begins with."""
        if recipe.weights and self.place is None:  # a checkpoint has them as they are by now
            self.origin = finetune.load(model, recipe, self.classes)
        if recipe.freeze:
            finetune.freeze(model, recipe.freeze)
        model = model.to(world.device)
        if recipe.channels_last and not sharded:  # FSDP2 takes contiguous parameters alone
            model = model.to(memory_format=torch.channels_last)
        ema = optim.averaged(model, recipe)
        if ema is not None and sharded:
            distributed.shard(ema.module)  # type: ignore[arg-type]
        self.model = model
        spread = distributed.spread(model, world, options.parallel, recipe.sync_bn)
        optimizer = optim.optimizer(model, recipe)
        normalise = Normalise(self.data.mean, self.data.std, world.device, recipe.channels_last)
        self.step = Step(recipe, spread, optimizer, normalise, world, self.classes, ema)
        self.state = checkpoint.State(model, optimizer, self.step.scaler, ema)

    def _note(self, text: str) -> None:
        self.watch.note(text)
        self._log("note", self.start, text=text)

    def go(self) -> Result:
        try:
            self._enter()
            with StopRequests().heard() as stop:
                return self._steps(stop)
        finally:
            if self.log is not None:
                self.log.close()

    def _begin(self) -> None:
        options, plan = self.options, self.plan
        facts = {
            "recipe": self.recipe.to_dict(),
            "device": str(self.world.device),
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            "workers": self.workers,
            "torch": torch.__version__,
            "train_images": self.data.train_size,
            "val_images": self.data.val_size,
            "left_out_per_epoch": plan.left_over,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        if self.origin:
            facts["weights_sha256"] = checkpoint.digest_of(Path(self.recipe.weights or ""))
        if options.probe and self.world.first and self.start < self.total:
            rate = loader.throughput(self.data.train, plan, self.workers)
            facts["input_images_per_s"] = round(rate)
            self._note(f"the input pipeline alone: {rate:,.0f} img/s with {self.workers} worker processes")
        self._log("run", self.start, **facts)
        self.watch.note(self.data.summary())
        if self.data.note:
            self.watch.note(f"{self.data.name}: {self.data.note}")
        if plan.left_over:
            self.watch.note(f"{plan.left_over} images of each epoch are left out: a batch too small for its parts")

    def _steps(self, stop: StopRequests) -> Result:
        options, world, plan = self.options, self.world, self.plan
        self._begin()
        sampler = loader.PartSampler(plan, world.rank, self.recipe.accumulate, self.start, self.total)
        source = loader.loader(self.data.train, sampler, self.workers, world.device)
        parts = loader.Prefetcher(source, world.device) if self.start < self.total else None
        per_epoch = plan.steps_per_epoch
        self.model.train()
        finetune.hold(self.model, self.recipe.freeze)
        self.began = time.perf_counter()
        self.window = Window.at(self.start, self.step.sums.read(world), self.saved_window)
        tick = Tick(self.start, self.total, self.start / per_epoch, float("nan"), float("nan"), 0.0, 0.0)
        number, stopped_by = self.start, ""
        while number < self.total:
            assert parts is not None
            batch = plan.batch_size(number % per_epoch)
            rate = self.recipe.lr * self.recipe.factor(number, per_epoch)
            unreadable = self.step(parts, batch, rate)
            number += 1
            self._count_unreadable(unreadable, number)
            ends_epoch = number % per_epoch == 0 or number == self.total
            seen = None
            if number % options.log_every == 0 or ends_epoch:
                seen = self.step.sums.read(world)
                tick = self._log_train(number, rate, seen, parts)
            self.watch.step(replace(tick, step=number, epoch=number / per_epoch))
            full = options.stop_after is not None and number - self.start >= options.stop_after
            lost = self.failure is not None
            wanted, asked = self._agree(self._save_due(number), bool(stop.name) or full or lost)
            if ends_epoch or asked or wanted:
                self._pause(number, seen if ends_epoch else None)
            if asked and number < self.total:
                stopped_by = stop.name or ("a request in another process" if not full else "--stop-after")
                break
        if number >= self.total:
            self._export()
        epochs = runlog.of_kind(options.out, "epoch") if world.first else []
        return Result(options.out, number, number >= self.total, stopped_by, self._seconds(), epochs)

    def _seconds(self) -> float:
        """Of this run so far, those before it was resumed included."""
        return self.seconds + time.perf_counter() - self.began

    def _pause(self, number: int, seen: Figures | None) -> None:
        """What happens between steps: check the weights, validate where an epoch ends (``seen`` in it), save.

        Raises the first failure to write the log or a picture, now that the run is saved.
        """
        since = time.perf_counter()
        self._average()
        self._check_weights(number)
        better = False
        if seen is not None:
            error = self._end_epoch(number, seen, self._seconds())
            better = self.best is None or error < self.best["val_error"]
            if better:
                self.best = {"step": number, "val_error": error}
        try:
            self._save(number, self._seconds())
            if better:
                self._keep_best()
        except UserError as failure:
            if self.failure is None:
                raise
            got = f"{self.failure.got}; step {number} could not be saved either: {failure.got}"
            raise UserError(self.failure.expected, got, failure.todo) from failure
        lost = self.failure
        if lost is not None:
            lost = UserError(lost.expected, f"{lost.got}; the run is saved after step {number}", lost.todo)
        self.world.raise_first(lost)
        self.window.paused += time.perf_counter() - since

    def _check_weights(self, number: int) -> None:
        """An update that overflowed is not saved: the loss of the next step, which would show it, may never come."""
        broken = diagnosis.not_finite(self.model, self.step.ema, self.step.optimizer)
        if broken:
            broken = f"after the update of step {number} {broken}"
        self.world.raise_first(diagnosis.NotFinite(broken, "weights that are numbers") if broken else None)

    def _agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, set if it is in any process: all save or stop after the same step."""
        if self.world.size == 1:
            return flags
        return tuple(bool(v) for v in self.world.sum(torch.tensor([float(f) for f in flags])).tolist())

    def _save_due(self, number: int) -> bool:
        if self.options.save_steps:
            return number % self.options.save_steps == 0
        return self.world.first and time.perf_counter() - self.saved_at > SAVE_SHARE * self.save_cost

    def _count_unreadable(self, names: list[str], number: int) -> None:
        new = [name for name in names if name not in self.unreadable]
        for name in new:
            self.unreadable.add(name)
            self.watch.note(f"skipped, {len(self.unreadable)} so far: {name}")
            self._log("note", number, text=f"skipped: {name}")

    def _log_train(self, number: int, rate: float, seen: Figures, parts: loader.Prefetcher) -> Tick:
        """Log what happened since the last line."""
        epoch, waited = number / self.plan.steps_per_epoch, parts.waited_s
        line = self.window.line(number, seen, waited, self.step.clock.spent)
        self._log("train", number, epoch=round(epoch, 4), rate=rate, **line)
        self.step.clock.spent.clear()
        parts.waited_s = 0.0
        share = line["data_ms"] / line["step_ms"] if line["step_ms"] else 0.0
        return Tick(number, self.total, epoch, line["loss"], line["error"], line["images_per_s"], share)

    def _end_epoch(self, number: int, seen: Figures, seconds: float) -> float:
        """Validate, log, draw, and begin to count anew. Returns the share of wrong answers in the validation set."""
        net = self.model if self.step.ema is None else self.step.ema
        loss, error, images = self.validation.measure(net, self.step)
        self._gather_unreadable(number)
        line = {
            "epoch": round(number / self.plan.steps_per_epoch, 4),
            "train_loss": seen[0],
            "train_error": seen[1],
            "val_loss": loss,
            "val_error": error,
            "val_images": images,
            "unreadable": len(self.unreadable),
            "seconds": round(seconds, 2),
        }
        self._log("epoch", number, **line)
        if self.log is not None:
            self._write(lambda: curves.write(self.options.out, f"{self.recipe.model} on {self.data.name}"))
        self.watch.epoch(line)
        if number == self.total and images and not math.isfinite(loss):  # no further step would show it
            raise diagnosis.NotFinite(f"{loss} after the last step, {number}", "a validation loss that is a number")
        self.step.sums = Sums.empty(self.world.device)
        self.window.new_epoch()
        return error

    def _average(self) -> None:
        """Running statistics, averaged weights' too, as all processes see them."""
        for net in (self.model, self.step.ema):
            if net is not None:
                distributed.average_buffers(net, self.world)

    def _gather_unreadable(self, number: int) -> None:
        """Names that other processes met with, told and counted here as well."""
        if not self.data.in_memory:
            self._count_unreadable(sorted(self.world.union(self.unreadable | self.validation.unreadable)), number)

    def _save(self, number: int, seconds: float) -> None:
        since = time.perf_counter()
        self._gather_unreadable(number)
        sums = self.world.sum(self.step.sums.values.cpu().clone())
        meta = {
            "run": self.name,
            "step": number,
            "classes": self.classes,
            "facts": self.data.facts(self.recipe).to_dict(),
            "recipe": self.recipe.to_dict(),
            "sums": sums.tolist(),
            "window": self.window.to_dict(),
            "best": self.best,
            "seconds": round(seconds, 3),
            "processes": self.world.size,
            "unreadable": sorted(self.unreadable),
        }
        sharded = self.options.parallel == "fsdp"
        out, keep = self.options.out, self.options.keep
        if self.log is not None:
            going = checkpoint.surplus(out, self.name, number, keep)
            if len(going) > 1:  # more than the one that each new checkpoint replaces: fewer are kept than before
                self._note(f"removing all but the newest {keep} (--keep): {', '.join(p.name for p in going)}")
        checkpoint.save(out, self.state, meta, self.world, sharded, keep, self._note)
        self.saved_at = time.perf_counter()
        self.save_cost = self.saved_at - since

    def _has_best(self) -> bool:
        place = checkpoint.best_of(self.options.out, self.name)
        return self.best is not None and place is not None and checkpoint.step_of(place) == self.best["step"]

    def _keep_best(self) -> None:
        """Keep the checkpoint of this step, which was saved just now, as the best one, and its weights as a file."""
        assert self.best is not None
        out = self.options.out
        place = checkpoint.folder_of(out) / f"step-{self.best['step']:08d}"
        source = place if place.exists() or self.place is None else self.place  # the latter where it lies elsewhere
        self.world.shared(lambda: checkpoint.keep_best(source, out))
        self._export("best.safetensors")

    def _export(self, name: str = "model.safetensors") -> None:
        """The weights as they are, averaged ones where the run has them."""
        net = self.model if self.step.ema is None else self.step.ema.module
        checkpoint.export(net, self.options.out / name, self.data.facts(self.recipe), self.world)
