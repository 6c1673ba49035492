"""Run the suite ``train``: compare optimizer steps of the accelerated net and of stock PyTorch, in time, memory, loss.

What is timed is the step of ``resnet-fast train`` (:class:`resnet_fast.training.step.TrainingStep`: normalise, forward,
loss, backward, the check that the loss is a number, SGD with momentum), on batches that are on the device already. All
competitors begin with the same weights and see the same batches: crops and flips of the photographs. The label is the
photograph's number, so that there is something to learn.

In a cell they first train side by side, step by step, for the losses; then one step of each is watched for its memory;
then steps are timed in interleaved rounds, and go on training while they are.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import resnet_fast
from resnet_fast import devices
from resnet_fast.errors import UserError
from resnet_fast.io import images
from resnet_fast.models import registry
from resnet_fast.training import optim, preview
from resnet_fast.training.augment import Augment
from resnet_fast.training.datasets.samples import Sample
from resnet_fast.training.distributed import World
from resnet_fast.training.loader import LEAST_PART, Part, collate
from resnet_fast.training.recipe import Recipe
from resnet_fast.training.step import DTYPES as AUTOCAST
from resnet_fast.training.step import Normalise, Tally, TrainingStep

from . import compare, harness, memory, providers, suites
from .providers import OURS

RATE = 0.01
"""Learning rate, constant: small enough for the first steps of every net here, with or without BatchNorm."""

PEAK = (
    "'peak MiB': parameters, buffers and momentum, and the most that a warm step holds in addition (activations, "
    "gradients, workspaces)."
)
MIB = 1024**2


NAMES = tuple(t.name for t in providers.TRAINING)

OWN_LAYERS = dict.fromkeys(("reference", "stock"), " (PyTorch's own layers)")
"""What a note adds to the two that fuse nothing."""

REFERENCE = ("eager-nhwc", "eager-nchw", "compile")
"""Whose last loss the others are compared with: the first of these that ran. It has the layout of ours."""


def default_providers(device: str) -> tuple[str, ...]:
    """Return all names; on a CPU without ``compile``, which takes minutes there before its first step."""
    devices.check_device(device)
    return tuple(n for n in NAMES if n != "compile" or torch.device(device).type == "cuda")


@dataclass(frozen=True)
class TrainBenchOptions(compare.BenchOptions):
    """What to train. ``steps``: after how many the last loss is read; fewer where ``budget`` ends before, and the rows
    say so."""

    suite: str = suites.TRAIN
    batches: tuple[int, ...] = (16,)
    providers: tuple[str, ...] = ("eager-nchw", "eager-nhwc", OURS)
    steps: int = 10

    def check(self) -> None:
        """Check all options before anything is measured.

        Raises:
            UserError: for the first option that cannot be used.
        """
        super().check()
        if min(self.batches) < LEAST_PART:
            got = ", ".join(map(str, self.batches))
            raise UserError(f"training batches >= {LEAST_PART}", got, "correct --batch, for instance --batch 16")
        if self.steps < 1:
            raise UserError("--steps >= 1", str(self.steps), "correct --steps")
        if "float16" in self.dtypes and torch.device(self.device).type == "cpu":
            got = "float16 on the CPU"
            raise UserError("training in float32 or bfloat16 there", got, "use --dtype bfloat16, or --device cuda")
        if torch.device(self.device).type == "cpu":
            side = registry.image_size(self.model) if self.size is None else self.size
            widest = "none" if "float32" in self.dtypes else "bfloat16"
            preview.check_step_memory(self.model, max(self.batches), side, widest, ("--batch", "--size"))

    def _check_competitors(self) -> None:
        known = f"providers among {', '.join(NAMES)} for --suite {suites.TRAIN}"
        unknown = [n for n in self.providers if n not in NAMES]
        if unknown or not self.providers:
            raise UserError(known, ", ".join(map(repr, unknown)) or "none", "correct --providers")

    def recipe(self, batch: int, dtype: str, size: int) -> Recipe:
        """Return the training run that a cell takes its steps from."""
        amp = dtype if dtype in AUTOCAST else "none"
        how = {"augment": "imagenet", "flip": True, "schedule": "constant", "epochs": None, "steps": self.steps}
        return Recipe(model=self.model, size=size, batch=batch, lr=RATE, amp=amp, seed=self.seed, **how)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainingRow(compare.BenchRow):
    """One line of the table. ``loss_difference``: ``loss_last`` less that of the stock path named in ``REFERENCE``.

    ``steps`` were taken up to ``loss_last``; ``peak_mib`` is explained in ``PEAK``.
    """

    peak_mib: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    loss_difference: float | None = None
    steps: int = 0
    samples: int = 0
    note: str = ""


def run(
    options: TrainBenchOptions,
    progress: compare.Progress = lambda done, total, what: None,
    report: compare.BenchReport | None = None,
) -> compare.BenchReport:
    """Measure every cell of ``options``.

    Args:
        options: what to train.
        progress: called at every step.
        report: an empty one with rows of type :class:`TrainingRow` to fill; after an error or an interrupt it holds the
            cells that were measured until then.

    Raises:
        UserError: for options that cannot be used, before anything is measured.
    """
    report = compare.BenchReport(row_type=TrainingRow) if report is None else report
    options.check()
    competitors = tuple(t for t in providers.TRAINING if t.name in options.providers)
    size = options.size or registry.image_size(options.model)
    photos = images.load(options.images, limit=max(options.batches))
    with compare.thread_count(options.threads), _device(options.device) as device:
        model = compare.network(options.model, photos, options.weights, size, options.seed)
        report.provenance.update(compare.origin(options, photos, size))
        report.provenance.update(memory=memory.method(options.device), steps=options.steps, learning_rate=RATE)
        cells = list(itertools.product(options.dtypes, options.batches))
        per_cell = len(competitors) * (options.steps + 1 + options.rounds)
        steps = compare.StepCounter(progress, len(cells), per_cell)
        start = time.monotonic()
        for number, (dtype, batch) in enumerate(cells):
            recipe = options.recipe(batch, dtype, size)
            parts = [part.to(device) for part in batches(photos, recipe, classes(model))]
            begin, end = time.monotonic(), start + options.budget * (number + 1) / len(cells)
            cell = _TrainingCell(options.model, dtype, batch, options, competitors, end, steps, report)
            # Half of the cell's time for the losses, the rest for timing.
            cell.run(model, recipe, parts, device, begin + max(0.0, end - begin) / 2)
            steps.finish_cell(number)
            gc.collect()
    return report


@contextlib.contextmanager
def _device(name: str) -> Iterator[torch.device]:
    """Make the device the current one, with the cuDNN setting of ``resnet-fast train``."""
    device = torch.device(name)
    if device.type == "cpu":
        yield device
        return
    before = torch.backends.cudnn.benchmark
    with torch.cuda.device(device):
        torch.backends.cudnn.benchmark = True
        try:
            yield torch.device("cuda", torch.cuda.current_device())
        finally:
            torch.backends.cudnn.benchmark = before


def classes(model: nn.Module) -> int:
    """Return the number of classes: the outputs of the last linear layer."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features


def batches(photos: list[images.Photo], recipe: Recipe, n_classes: int) -> list[Part]:
    """Make ``recipe.steps`` batches on the CPU, uint8 (batch, 3, size, size): crops and flips, a function of its seed.

    The photographs take turns; the label is the photograph's number, modulo the number of classes.
    """
    augment = Augment.training(recipe)
    found = []
    for step in range(recipe.total_steps(1)):
        places = [step * recipe.batch + i for i in range(recipe.batch)]
        chosen = [(place, place % len(photos)) for place in places]
        found.append(
            collate([Sample(augment(photos[k].pixels, (0, i)), k % n_classes, photos[k].name) for i, k in chosen])
        )
    return found


@dataclass
class _Contender:
    """A competitor in a cell, ready to train."""

    step: TrainingStep
    parts: Iterator[Part]
    batch: int
    losses: list[float] = field(default_factory=list)
    ran_on: str = ""
    peak: int = 0

    @classmethod
    def prepared(
        cls, trainer: providers.Trainer, model: nn.Module, recipe: Recipe, parts: list[Part], device: torch.device
    ) -> _Contender:
        """Prepare a copy of the stock ``model``, in eval mode, and batches on ``device``."""
        net = copy.deepcopy(model).train().to(device)
        if trainer.channels_last:
            net = net.to(memory_format=torch.channels_last)
        optimizer = optim.build_optimizer(net, recipe)
        normalise = Normalise(images.MEAN, images.STD, device, trainer.channels_last)
        step = TrainingStep(recipe, trainer.wrap(net), optimizer, normalise, World(device=device), classes(net))
        return cls(step, itertools.cycle(parts), recipe.batch)

    def __call__(self) -> None:
        self.step(self.parts, self.batch, RATE)

    def learn(self, seed: int) -> None:
        """Take one step and keep its loss. ``seed`` makes dropout the same in every competitor."""
        device = self.step.world.device
        self.step.sums = Tally.empty(device)
        before = resnet_fast.stats()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self()
        self.losses.append(self.step.sums.read(self.step.world)[0])
        self.ran_on = ran_on(before, resnet_fast.stats())

    def measure_peak(self) -> None:
        """Take one more step and measure its memory; see ``PEAK``."""
        device = self.step.world.device
        kept = [*self.step.inner.parameters(), *self.step.inner.buffers()]
        states = self.step.optimizer.state.values()
        kept += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        self.peak = memory.size(kept) + memory.peak(self, str(device))


def ran_on(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> str:
    """Return which backends ran between two :func:`resnet_fast.stats`, and why no faster one; "" for no call."""
    calls: dict[str, int] = {}
    for name, n in after["calls"].items():
        more = n - before["calls"].get(name, 0)
        if more:
            backend = name.rpartition("/")[2]
            calls[backend] = calls.get(backend, 0) + more
    new = [text for text, n in after["fallbacks"].items() if n > before["fallbacks"].get(text, 0)]
    reasons = dict.fromkeys(text.partition(": ")[2] for text in new)  # without the op, which is many times the same
    ordered = sorted(calls.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{backend}{OWN_LAYERS.get(backend, '')} x {n}" for backend, n in ordered)
    return "; ".join((shown, *reasons))


@dataclass
class _TrainingCell(compare.BenchCell):
    ready: dict[str, _Contender] = field(default_factory=dict)

    def run(self, model: nn.Module, recipe: Recipe, parts: list[Part], device: torch.device, until: float) -> None:
        """Train, watch and time all competitors; the losses until a ``time.monotonic()`` value at the latest."""
        verdict = providers.torch_verdict(model, compare.DTYPES[self.dtype], self.batch, device.type)
        for trainer in providers.TRAINING:
            if trainer.name in self.options.providers:
                self.notes[trainer.name] = [verdict.reason]
                with self._kept(trainer.name):
                    self.ready[trainer.name] = _Contender.prepared(trainer, model, recipe, parts, device)
        taken = self._train(recipe.total_steps(1), until)
        for name, contender in list(self.ready.items()):
            self.step(f"memory of {name}")
            with self._kept(name):
                contender.measure_peak()
        timed = self.measure(self.ready, str(device), warmup=0)
        for name, samples in timed.items():
            self.notes[name] += [samples.error, self.ready[name].ran_on]
            if taken < recipe.total_steps(1):
                self.notes[name].append(f"the budget ended the losses after {taken} of {recipe.total_steps(1)} steps")
        self.add_rows(timed, self._figures(taken))

    def _train(self, steps: int, until: float) -> int:
        """Train for the losses; return the steps that each competitor took: all, or what time allows, at least one."""
        for number in range(steps):
            if number and time.monotonic() >= until:
                return number
            for name, contender in list(self.ready.items()):
                self.step(f"step {number + 1}, {name}")
                with self._kept(name):
                    contender.learn(self.options.seed + number)
        return steps

    def _figures(self, taken: int) -> dict[str, dict[str, Any]]:
        losses = {name: contender.losses for name, contender in self.ready.items()}
        reference = next((losses[name][-1] for name in REFERENCE if name in losses), None)
        return {
            name: {
                "precision": self.dtype,
                "peak_mib": self.ready[name].peak / MIB,
                "loss_first": first,
                "loss_last": last,
                "loss_difference": None if reference is None else last - reference,
                "steps": taken,
            }
            for name, (first, last) in ((name, (found[0], found[-1])) for name, found in losses.items())
        }

    @contextlib.contextmanager
    def _kept(self, name: str) -> Iterator[None]:
        """Take a competitor that fails inside out of the cell; it keeps its row, with the reason."""
        try:
            yield
        except Exception as error:  # a failure of any kind is a row, not the end of the run
            self.notes[name].append(harness.first_line(error))
            self.ready.pop(name, None)
