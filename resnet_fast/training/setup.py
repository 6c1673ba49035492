"""Setting up a run: data, net, optimizer and step, as a recipe and its options ask for them, and where to start.

Everything that can be known to be wrong before the first step is an error here. Nothing is written.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import flags, limits
from ..errors import UserError
from . import checkpoints, distributed, finetune, loader, optim, preview, runlog
from .checkpoints import ResumePoint, TrainingState
from .datasets.loading import check_files, load_data
from .datasets.samples import Data
from .distributed import World
from .loader import BatchPlan
from .options import RunOptions
from .recipe import Recipe, from_dict
from .step import Normalise, TrainingStep

MAY_CHANGE = ("epochs", "steps", "data_path", "backend", "save", "cuda_graph", "accumulate", "weights")
"""Keys of the recipe that a resumed run may change: its length, and where and how the same result is computed."""


@dataclass
class Progress:
    """How far a run is: what a checkpoint keeps in addition to tensors.

    Attributes:
        start: Steps done before this process took over.
        seconds: Seconds spent before this process took over.
        run: The name by which checkpoints know that they are this run's.
        best: Step and validation error of the best checkpoint, or None.
        window: What :meth:`~resnet_fast.training.window.Window.to_dict` returned at ``start``, or None.
        unreadable: Names of the images that could not be read so far.
        step: Steps done.
    """

    start: int
    seconds: float
    run: str
    best: dict[str, Any] | None
    window: dict[str, Any] | None
    unreadable: set[str]
    step: int = field(init=False)

    def __post_init__(self) -> None:
        self.step = self.start

    @staticmethod
    def of(meta: dict[str, Any]) -> Progress:
        """Return the progress that the ``meta.json`` of a checkpoint holds; that of a new run if ``meta`` is empty."""
        return Progress(
            start=meta.get("step", 0),
            seconds=meta.get("seconds", 0.0),
            run=meta.get("run") or secrets.token_hex(8),
            best=meta.get("best"),
            window=meta.get("window"),
            unreadable=set(meta.get("unreadable", ())),
        )


@dataclass
class Setup:
    """Everything that a run has before its first step.

    Attributes:
        batches: Which image is in which batch.
        total: Steps of the whole run.
        workers: Processes that read images.
        classes: Outputs of the net.
        resumed: The checkpoint that the run resumes from.
        model: The net itself, without DDP around it.
        origin: What was done with the weights that the run begins with, or "".
        state: What checkpoints save and restore.
    """

    recipe: Recipe
    options: RunOptions
    world: World
    data: Data
    batches: BatchPlan
    total: int
    workers: int
    classes: int
    resumed: ResumePoint
    model: nn.Module
    origin: str
    step: TrainingStep
    state: TrainingState
    progress: Progress

    @property
    def sharded(self) -> bool:
        return self.options.parallel == "fsdp"


def set_up(recipe: Recipe, options: RunOptions, world: World) -> Setup:
    """Load the data, build net, optimizer and step, and restore the checkpoint to resume from, if there is one.

    Every process calls it.

    Raises:
        UserError: Recipe, data, folder or checkpoint cannot be used.
    """
    _configure_torch(options, world)
    _check_norms(recipe, world)
    if recipe.cuda_graph:
        _check_graphs(recipe, options, world)
    data = load_data(recipe)
    if options.strict_data and not data.in_memory:
        check_files(data)
    parts = world.size * recipe.accumulate
    batches = BatchPlan(data.train_size, recipe.batch, parts, recipe.seed)
    if world.device.type == "cpu":
        _check_memory(recipe, parts)
    workers = options.workers
    classes = recipe.classes or len(data.classes)
    resumed: ResumePoint = world.shared(lambda: _where_to_begin(recipe, options, classes))
    model, origin = _build_model(recipe, classes, world, options, fresh=resumed.place is None)
    step, state = _build_step(recipe, options, world, data, model, classes)
    _restore(resumed, state, step, recipe, world)
    return Setup(
        recipe=recipe,
        options=options,
        world=world,
        data=data,
        batches=batches,
        total=recipe.total_steps(batches.steps_per_epoch),
        workers=loader.workers_for(data, world.device, world.size) if workers is None else workers,
        classes=classes,
        resumed=resumed,
        model=model,
        origin=origin,
        step=step,
        state=state,
        progress=Progress.of(resumed.meta),
    )


def _configure_torch(options: RunOptions, world: World) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.deterministic:
        torch.backends.cudnn.deterministic = True
    elif world.device.type == "cuda":
        torch.backends.cudnn.benchmark = True


def _check_norms(recipe: Recipe, world: World) -> None:
    emulated = recipe.backend == "triton" or flags.BACKEND.read() == "triton"
    if recipe.sync_bn and world.device.type == "cpu" and not emulated:
        raise UserError(
            "a GPU for sync_bn (stock SyncBatchNorm does not train on the CPU)",
            "device cpu",
            "leave out sync_bn, or run the kernels interpreted with TRITON_INTERPRET=1 and backend triton",
        )


def _check_graphs(recipe: Recipe, options: RunOptions, world: World) -> None:
    """Raise UserError for what no training step is captured with. Everything else is known at the first step only."""
    from ..blocks.recorder import Recorder
    from ..models import registry

    if world.device.type != Recorder.device_type:
        raise UserError("a GPU for cuda_graph", f"device {world.device}", "leave it out, or give --no-cuda-graph")
    if recipe.model in registry.COMPARED:
        raise UserError("a ResNet for cuda_graph", recipe.model, "leave it out, or name another model")
    if options.parallel == "fsdp":
        got = "--parallel fsdp, which moves the weights at each step"
        raise UserError("--parallel ddp for cuda_graph", got, "leave out one of them")
    if recipe.sync_bn:
        got = "sync_bn, which exchanges statistics inside the forward pass"
        raise UserError("BatchNorm for cuda_graph", got, "leave out one of them")


def _check_memory(recipe: Recipe, parts: int) -> None:
    """Raise UserError if a step needs more memory than is free on the CPU."""
    images = -(-recipe.batch // parts)
    if recipe.freeze is None:
        preview.check_step_memory(recipe.model, images, recipe.size, recipe.amp)
    else:
        limits.check_input(images, recipe.size, names=("batch", "size"))


def _where_to_begin(recipe: Recipe, options: RunOptions, classes: int) -> ResumePoint:
    """Find the checkpoint to resume from. A new run must not start in a folder that has checkpoints."""
    out, resume = options.out, options.resume
    runlog.check_place(out)
    if not resume:
        there = (*checkpoints.found(out), *checkpoints.bests(out))
        if there:
            raise UserError(
                "an output folder without checkpoints for a new run",
                f"{out}, which has {there[0].name}",
                "go on with --resume auto, or name another with --out",
            )
        return ResumePoint(None, {}, [])
    found = checkpoints.resume_point(out, resume)
    if found.place is not None:
        check_resumable(recipe, classes, found.meta, found.place)
        checkpoints.check_own(out, found.place, found.meta)
    return found


def check_resumable(recipe: Recipe, classes: int, meta: dict[str, Any], place: Path) -> None:
    """Raise UserError if ``recipe`` is not a continuation of what the checkpoint at ``place`` was trained by."""
    if meta["classes"] != classes:
        got = f"{classes} in the data now"
        raise UserError(f"the {meta['classes']} classes of {place}", got, "use the data that the run began with")
    then, now = from_dict(meta["recipe"]).to_dict(), recipe.to_dict()
    changed = [f"{key}: {now[key]} (was {then[key]})" for key in now if now[key] != then[key] and key not in MAY_CHANGE]
    if changed:
        raise UserError(f"the recipe of {place}", "; ".join(changed), "change it back, or start in another folder")


def _build_model(recipe: Recipe, classes: int, world: World, options: RunOptions, fresh: bool) -> tuple[nn.Module, str]:
    """Return the net on its device, and what was done with the weights it begins with.

    A run that is not ``fresh`` takes its weights from a checkpoint.
    """
    model = optim.build_net(recipe, classes)
    origin = finetune.load_weights(model, recipe, classes) if recipe.weights and fresh else ""
    if recipe.freeze:
        finetune.freeze(model, recipe.freeze)
    model = model.to(world.device)
    if recipe.channels_last and options.parallel != "fsdp":  # FSDP2 takes only contiguous parameters
        model = model.to(memory_format=torch.channels_last)
    return model, origin


def _build_step(
    recipe: Recipe, options: RunOptions, world: World, data: Data, model: nn.Module, classes: int
) -> tuple[TrainingStep, TrainingState]:
    """Build averaged weights, optimizer and step, spread over the processes."""
    ema = optim.averaged(model, recipe)
    if ema is not None and options.parallel == "fsdp":
        distributed.shard(ema.module)  # type: ignore[arg-type]
    spread = distributed.spread(model, world, options.parallel, recipe.sync_bn)
    optimizer = optim.build_optimizer(model, recipe)
    normalise = Normalise(data.mean, data.std, world.device, recipe.channels_last)
    step = TrainingStep(recipe, spread, optimizer, normalise, world, classes, ema)
    return step, TrainingState(model, optimizer, step.scaler, ema)


def _restore(resumed: ResumePoint, state: TrainingState, step: TrainingStep, recipe: Recipe, world: World) -> None:
    """Restore the checkpoint; a new run seeds the random generator instead."""
    if resumed.place is None:
        torch.manual_seed(recipe.seed + world.rank)
        return
    checkpoints.restore_checkpoint(resumed.place, resumed.meta, state, world)
    if world.first:
        step.sums.values.copy_(torch.tensor(resumed.meta["sums"], dtype=torch.float64))
