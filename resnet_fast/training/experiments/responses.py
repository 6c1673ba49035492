"""Measure the standard deviation of each 3x3 layer's output after BatchNorm, before ReLU and addition (Figure 7).

A large response means that a layer changes the signal a lot. The paper's argument: if the best function of a block is
near the identity, a residual block has little to add, so its responses are small, and smaller the more blocks there
are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import loader
from ..datasets.loading import load_data
from ..recipe import Recipe
from ..step import Normalise

IMAGES = 1000
"""Validation images that the deviations are computed over."""


@dataclass(frozen=True)
class Responses:
    """The name of each 3x3 convolution and the standard deviation of its response, in the order of the forward pass."""

    names: tuple[str, ...]
    std: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.std) / len(self.std)


def norms_after_3x3(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers that directly follow a 3x3 convolution, by torchvision's names, in their order."""
    modules = dict(model.named_modules())
    found = {}
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            head, _, last = name.rpartition(".")
            norm = f"{head}.{last.replace('conv', 'bn')}".lstrip(".")
            if isinstance(modules.get(norm), nn.BatchNorm2d):
                found[norm] = modules[norm]
    return found


@torch.no_grad()
def measure_responses(model: nn.Module, batches: list[Tensor]) -> Responses:
    """Return the responses of ``model`` in eval mode to ``batches``, each float32 (n, 3, H, W), over all elements.

    The deviations of the batches are pooled in float64 around each batch's mean, to avoid sums of large squares.
    """
    kept: dict[str, list[tuple[int, float, float]]] = {}

    def keep(name: str, out: Tensor) -> None:
        values = out.double()
        mean = values.mean()
        kept.setdefault(name, []).append((values.numel(), mean.item(), (values - mean).square().sum().item()))

    norms = norms_after_3x3(model)
    hooks = [norm.register_forward_hook(lambda m, i, o, name=name: keep(name, o)) for name, norm in norms.items()]
    model.eval()
    try:
        for x in batches:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return Responses(tuple(norms), tuple(_pooled(kept[name]) for name in norms))


def _pooled(parts: list[tuple[int, float, float]]) -> float:
    """Return the standard deviation of the union of parts, each (count, mean, sum of squares around its mean)."""
    count = sum(n for n, _, _ in parts)
    mean = sum(n * m for n, m, _ in parts) / count
    return (sum(s + n * (m - mean) ** 2 for n, m, s in parts) / count) ** 0.5


def responses_of_run(recipe: Recipe, weights: Path) -> Responses:
    """Return the responses of a trained net to the first validation images of its data.

    Args:
        recipe: The recipe of the run.
        weights: Its ``model.safetensors``.
    """
    from safetensors.torch import load_file

    from ...models import registry

    found = load_data(recipe)
    classes = recipe.classes or len(found.classes)
    extra: dict[str, Any] = {"shortcut": recipe.shortcut, "stride_in_1x1": recipe.stride_in_1x1}
    model = registry.build(recipe.model, num_classes=classes, **extra)
    model.load_state_dict(load_file(weights))
    normalise = Normalise(found.mean, found.std, torch.device("cpu"), recipe.channels_last)
    sampler = loader.ValidationSampler(min(IMAGES, found.val_size), 250, 0, 1)
    parts = loader.data_loader(found.val, sampler, 0, torch.device("cpu"))
    return measure_responses(model, [normalise(part.images) for part in parts])
