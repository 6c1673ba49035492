"""The suite ``train``: one optimizer step of the accelerated net beside stock PyTorch, its memory, and where it leads.

What is timed is the step of ``resnet-fast train`` (:class:`resnet_fast.training.step.Step`: normalise, forward, loss,
backward, the check that the loss is a number, SGD with momentum), on batches that lie ready on the device. All
competitors begin with the same weights and see the same batches: crops and flips of the photographs, labelled by which
photograph it is, so that there is something to learn.

In a cell they first train side by side, step by step, for the losses; then one step of each is watched for its memory;
then steps are timed in interleaved rounds, and go on training while they are.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

import resnet_fast
from resnet_fast import devices
from resnet_fast.errors import UserError
from resnet_fast.io import images
from resnet_fast.models import registry
from resnet_fast.training import optim, plan
from resnet_fast.training.augment import Augment
from resnet_fast.training.data import Sample
from resnet_fast.training.distributed import World
from resnet_fast.training.loader import LEAST_PART, Part, collate
from resnet_fast.training.recipe import Recipe
from resnet_fast.training.step import DTYPES as AUTOCAST
from resnet_fast.training.step import Normalise, Step, Sums

from . import compare, harness, memory, providers, suites
from .providers import OURS

RATE = 0.01
"""Learning rate, constant: small enough for the first steps of every net here, with or without BatchNorm."""

PEAK = (
    "'peak MiB': parameters, buffers and momentum, and the most that a warm step holds beside them (activations, "
    "gradients, workspaces)."
)
MIB = 1024**2


@dataclass(frozen=True)
class Trainer:
    """One competitor. ``wrap`` takes the stock net, in training mode, on its device and in its layout."""

    name: str
    stock: bool
    channels_last: bool
    wrap: Callable[[nn.Module], nn.Module]


def accelerated(model: nn.Module) -> nn.Module:
    """The net with fused blocks, in place; dispatch chooses the backend."""
    return resnet_fast.accelerate(model)


def compiled(model: nn.Module) -> Any:
    """Inductor, forward and backward."""
    import torch._dynamo

    torch._dynamo.reset()  # cells compile the same code object again and again; the recompile limit is per object
    return torch.compile(model, dynamic=False)


TRAINERS = (
    Trainer("eager-nchw", True, False, lambda model: model),
    Trainer("eager-nhwc", True, True, lambda model: model),
    Trainer("compile", True, True, compiled),
    Trainer(OURS, False, True, accelerated),
)
NAMES = tuple(t.name for t in TRAINERS)
"""Called as the providers of the inference suites that run in the same way."""

OWN_LAYERS = dict.fromkeys(("reference", "stock"), " (PyTorch's own layers)")
"""What to say of the two that fuse nothing."""

REFERENCE = ("eager-nhwc", "eager-nchw", "compile")
"""Whose last loss the others are compared with: the first of these that ran. It has the layout of ours."""


def default_providers(device: str) -> tuple[str, ...]:
    """All; on a CPU without ``compile``, which takes minutes there before its first step."""
    devices.check_device(device)
    return tuple(n for n in NAMES if n != "compile" or torch.device(device).type == "cuda")


@dataclass(frozen=True)
class Options(compare.Options):
    """What to train. ``steps``: after how many the last loss is read; fewer where ``budget`` ends before, and the rows
    say so."""

    suite: str = suites.TRAIN
    batches: tuple[int, ...] = (16,)
    providers: tuple[str, ...] = ("eager-nchw", "eager-nhwc", OURS)
    steps: int = 10

    def check(self) -> None:
        """UserError for the first option that cannot be used."""
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
            plan.check_room(self.model, max(self.batches), side, widest, ("--batch", "--size"))

    def _check_competitors(self) -> None:
        known = f"providers among {', '.join(NAMES)} for --suite {suites.TRAIN}"
        unknown = [n for n in self.providers if n not in NAMES]
        if unknown or not self.providers:
            raise UserError(known, ", ".join(map(repr, unknown)) or "none", "correct --providers")

    def recipe(self, batch: int, dtype: str, size: int) -> Recipe:
        """The training run that a cell takes its steps from."""
        amp = dtype if dtype in AUTOCAST else "none"
        how = {"augment": "imagenet", "flip": True, "schedule": "constant", "epochs": None, "steps": self.steps}
        return Recipe(model=self.model, size=size, batch=batch, lr=RATE, amp=amp, seed=self.seed, **how)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Row(compare.Timed):
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


@dataclass
class Report(compare.Report):
    """Rows of type :class:`Row`."""

    row_type: ClassVar[type[compare.Timed]] = Row


def run(
    options: Options, progress: compare.Progress = lambda done, total, what: None, report: Report | None = None
) -> Report:
    """Measure every cell of ``options``. UserError for options that cannot be used, before anything is measured.

    ``report``: an empty one to fill; after an error or an interrupt it holds the cells that were measured until then.
    """
    report = Report() if report is None else report
    options.check()
    competitors = tuple(t for t in TRAINERS if t.name in options.providers)
    size = options.size or registry.image_size(options.model)
    photos = images.load(options.images, limit=max(options.batches))
    with compare.thread_count(options.threads), _device(options.device) as device:
        model = compare.network(options.model, photos, options.weights, size, options.seed)
        report.provenance.update(compare.origin(options, photos, size))
        report.provenance.update(memory=memory.method(options.device), steps=options.steps, learning_rate=RATE)
        cells = list(itertools.product(options.dtypes, options.batches))
        per_cell = len(competitors) * (options.steps + 1 + options.rounds)
        steps = compare.Steps(progress, len(cells), per_cell)
        start = time.monotonic()
        for number, (dtype, batch) in enumerate(cells):
            recipe = options.recipe(batch, dtype, size)
            begin, end = time.monotonic(), start + options.budget * (number + 1) / len(cells)
            # Half of the cell's time for the losses, the rest for timing.
            cell = _Cell(options, recipe, dtype, device, steps, begin + max(0.0, end - begin) / 2, end)
            cell.run(model, [part.to(device) for part in batches(photos, recipe, classes(model))], competitors, report)
            steps.finish_cell(number)
            gc.collect()
    return report


@contextlib.contextmanager
def _device(name: str) -> Iterator[torch.device]:
    """The device as the current one, with the cuDNN setting of ``resnet-fast train``."""
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
    """Number of classes: what the last linear layer puts out."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features


def batches(photos: list[images.Photo], recipe: Recipe, n_classes: int) -> list[Part]:
    """``recipe.steps`` batches on the CPU, uint8 (batch, 3, size, size): crops and flips, a function of its seed.

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

    step: Step
    parts: Iterator[Part]
    batch: int
    losses: list[float] = field(default_factory=list)
    ran_on: str = ""
    peak: int = 0

    @classmethod
    def prepared(
        cls, trainer: Trainer, model: nn.Module, recipe: Recipe, parts: list[Part], device: torch.device
    ) -> _Contender:
        """From a copy of the stock ``model`` in eval mode and batches on ``device``."""
        net = copy.deepcopy(model).train().to(device)
        if trainer.channels_last:
            net = net.to(memory_format=torch.channels_last)
        optimizer = optim.optimizer(net, recipe)
        normalise = Normalise(images.MEAN, images.STD, device, trainer.channels_last)
        step = Step(recipe, trainer.wrap(net), optimizer, normalise, World(device=device), classes(net))
        return cls(step, itertools.cycle(parts), recipe.batch)

    def __call__(self) -> None:
        self.step(self.parts, self.batch, RATE)

    def learn(self, seed: int) -> None:
        """One step, with its loss. ``seed`` makes dropout the same in every competitor."""
        device = self.step.world.device
        self.step.sums = Sums.empty(device)
        before = resnet_fast.stats()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self()
        self.losses.append(self.step.sums.read(self.step.world)[0])
        self.ran_on = ran_on(before, resnet_fast.stats())

    def measure_peak(self) -> None:
        """One more step, watched; see ``PEAK``."""
        device = self.step.world.device
        kept = [*self.step.inner.parameters(), *self.step.inner.buffers()]
        states = self.step.optimizer.state.values()
        kept += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        self.peak = memory.size(kept) + memory.peak(self, str(device))


def ran_on(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> str:
    """Which backends served the calls between two :func:`resnet_fast.stats`, and why no faster one; "" for no call."""
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
class _Cell:
    options: Options
    recipe: Recipe
    dtype: str
    device: torch.device
    steps: compare.Steps
    losses_until: float
    deadline: float
    ready: dict[str, _Contender] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.recipe.model} {self.dtype} batch {self.recipe.batch}"

    def run(
        self, model: nn.Module, parts: list[Part], competitors: tuple[Trainer, ...], report: compare.Report
    ) -> None:
        """Train, watch and time all competitors, and append their rows and samples to ``report``."""
        case, batch = self.recipe.model, self.recipe.batch
        verdict = providers.torch_verdict(model, compare.DTYPES[self.dtype], batch, self.device.type)
        for trainer in competitors:
            self.notes[trainer.name] = [verdict.reason]
            with self._kept(trainer.name):
                self.ready[trainer.name] = _Contender.prepared(trainer, model, self.recipe, parts, self.device)
        taken = self._train()
        for name, contender in list(self.ready.items()):
            self.steps.step(f"{self.label}: memory of {name}")
            with self._kept(name):
                contender.measure_peak()
        timed = harness.measure(
            self.ready,
            harness.Plan(rounds=self.options.rounds, warmup=0, seed=self.options.seed),
            str(self.device),
            self.deadline,
            lambda name, number: self.steps.step(f"{self.label}: round {number + 1}, {name}"),
        )
        measured = compare.speeds(timed, {t.name for t in competitors if t.stock}, batch)
        reference = next((self.ready[n].losses[-1] for n in REFERENCE if n in self.ready), None)
        for trainer in competitors:
            name, row = trainer.name, measured.get(trainer.name, {})
            if name in self.ready:
                row |= self._figures(self.ready[name], reference) | {"steps": taken}
                self.notes[name] += [timed[name].error, self.ready[name].ran_on]
                if taken < self.options.steps:
                    self.notes[name].append(f"the budget ended the losses after {taken} of {self.options.steps} steps")
            if name in measured:
                report.samples[f"{self.label.replace(' batch ', ' ')} {name}"] = timed[name].ns
            note = "; ".join(filter(None, self.notes[name]))
            report.rows.append(
                Row(case, name, self.dtype, batch, self.options.device, trainer.stock, note=note, **row)  # type: ignore[arg-type]
            )

    def _train(self) -> int:
        """Train for the losses; returns the steps that each competitor took: all, or what time allows, at least one."""
        for number in range(self.options.steps):
            if number and time.monotonic() >= self.losses_until:
                return number
            for name, contender in list(self.ready.items()):
                self.steps.step(f"{self.label}: step {number + 1}, {name}")
                with self._kept(name):
                    contender.learn(self.options.seed + number)
        return self.options.steps

    def _figures(self, contender: _Contender, reference: float | None) -> dict[str, Any]:
        first, last = contender.losses[0], contender.losses[-1]
        return {
            "precision": self.dtype,
            "peak_mib": contender.peak / MIB,
            "loss_first": first,
            "loss_last": last,
            "loss_difference": None if reference is None else last - reference,
        }

    @contextlib.contextmanager
    def _kept(self, name: str) -> Iterator[None]:
        """A competitor that fails inside leaves the cell and keeps its row, with the reason."""
        try:
            yield
        except Exception as error:  # a failure of any kind is a row, not the end of the run
            self.notes[name].append(harness.first_line(error))
            self.ready.pop(name, None)
