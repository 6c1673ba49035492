"""Validation: loss and error of a net on the validation set, over all processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .. import packing_budget
from ..blocks import graph
from . import distributed, loader
from .datasets.samples import Data
from .distributed import World
from .recipe import Recipe
from .step import Tally, TrainingStep
from .window import Figures


@dataclass
class Validation:
    """The validation set of a run, shared by its processes. ``unreadable`` collects the names of images left out."""

    recipe: Recipe
    data: Data
    workers: int
    world: World
    sharded: bool
    unreadable: set[str] = field(default_factory=set)

    @torch.no_grad()
    def measure(self, net: nn.Module, step: TrainingStep) -> Figures:
        """Return (mean loss, share of wrong answers, images) of ``net``, with images prepared as ``step`` does."""
        world, recipe, data = self.world, self.recipe, self.data
        batch = max(loader.LEAST_PART, min(recipe.batch // (world.size * recipe.accumulate), 512))
        sampler = loader.ValidationSampler(data.val_size, batch, world.rank, world.size)
        sums = Tally.empty(world.device)
        modes = [(module, module.training) for module in net.modules()]  # frozen norms must stay in eval mode
        net.eval()
        nothing = loader.collate([])
        steps = _padded(len(sampler), world) if self.sharded else len(sampler)
        parts = loader.Prefetcher(loader.data_loader(data.val, sampler, self.workers, world.device), world.device)
        for _ in range(steps):
            part = next(parts, nothing)
            self.unreadable.update(part.unreadable)
            images, labels = part.images, part.labels
            if not len(labels):
                if not self.sharded:
                    continue
                # The others gather shards, which needs every process: this one runs an image that does not count.
                images = torch.zeros(1, 3, recipe.size, recipe.size, dtype=torch.uint8, device=world.device)
            # Pack at once, so that a resumed run's figures equal those of a run that was not interrupted. A graph of
            # these weights would be captured for one validation.
            with step.autocast(), packing_budget.at_once(), graph.off():
                out = net(step.normalise(images)).float()
            if len(labels):
                sums.add(F.cross_entropy(out, labels), (out.argmax(1) != labels).sum(), len(labels))
        for module, mode in modes:
            module.training = mode
        if self.sharded:
            distributed.reshard(net)
        return sums.read(world)


def _padded(batches: int, world: World) -> int:
    """Return the most batches that any process validates on."""
    counts = torch.zeros(world.size)
    counts[world.rank] = batches
    return int(world.sum(counts).max())
