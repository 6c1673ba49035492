"""Build what a recipe asks for: net, optimizer with its parameter groups, averaged weights, mixup and cutmix."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..tuning.shapes import unknown_name
from .recipe import Recipe

SUPPORTS_ZERO_INIT = ("resnet", "resnext", "wide")


def build_net(recipe: Recipe, classes: int) -> nn.Module:
    """Build the net of ``recipe``, seeded and accelerated, on the CPU, with plain BatchNorm.

    Raises:
        UserError: The net does not have an option of the recipe.
    """
    from ..models import accelerate, registry

    extra: dict[str, Any] = {}
    if recipe.zero_init_residual:
        if not recipe.model.startswith(SUPPORTS_ZERO_INIT):
            got = f"zero_init_residual for {recipe.model}"
            raise UserError("a torchvision ResNet for zero_init_residual", got, "set it to false")
        extra["zero_init_residual"] = True
    torch.manual_seed(recipe.seed)
    model = registry.build(
        recipe.model,
        shortcut=recipe.shortcut,
        stride_in_1x1=recipe.stride_in_1x1,
        num_classes=classes,
        **extra,
    )
    if recipe.model not in registry.COMPARED:
        accelerate.accelerate(model, recipe.backend, recipe.cuda_graph, recipe.save)
    return model


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the groups of trained parameters: one, or two if norms and biases have their own weight decay."""
    everything = [p for p in model.parameters() if p.requires_grad]
    if recipe.norm_weight_decay is None:
        return [{"params": everything, "weight_decay": recipe.weight_decay}]
    decayed = [p for p in everything if p.ndim > 1]
    rest = [p for p in everything if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": recipe.norm_weight_decay},
    ]


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Return torch's optimizers that have a learning rate and weight decay, by their names in lower case."""
    found = {name.lower(): kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    return {
        name: kind
        for name, kind in found.items()
        if issubclass(kind, torch.optim.Optimizer) and {"lr", "weight_decay"} <= set(signature(kind).parameters)
    }


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the optimizer of ``recipe`` for the trained parameters of ``model``: SGD as in section 3.4, or another.

    ``momentum`` is the momentum of SGD and RMSprop, or the first of Adam's betas; ``beta2`` is the second.

    Raises:
        UserError: PyTorch has no such optimizer, or it does not take the recipe's values.
    """
    if recipe.optimizer not in optimizers():
        raise unknown_name("optimizer", recipe.optimizer, sorted(optimizers()))
    kind = optimizers()[recipe.optimizer]
    takes = signature(kind).parameters
    values: dict[str, Any] = {"lr": recipe.lr}
    if "momentum" in takes:
        values["momentum"] = recipe.momentum
    if "betas" in takes:
        values["betas"] = (recipe.momentum, recipe.beta2)
    if "nesterov" in takes or recipe.nesterov:
        values["nesterov"] = recipe.nesterov
    if "foreach" in takes:
        values["foreach"] = True
    try:
        return kind(parameter_groups(model, recipe), **values)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            "an optimizer that can train this net", f"{recipe.optimizer} ({reason})", "name another"
        ) from error


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def averaged(model: nn.Module, recipe: Recipe) -> nn.Module | None:
    """Return a moving average of the weights and buffers of ``model`` with decay ``ema`` per step, or None."""
    if not recipe.ema:
        return None
    from torch.distributed.tensor import DTensor
    from torch.optim.swa_utils import AveragedModel

    def local(tensors: Any) -> list[Tensor]:
        return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]

    @torch.no_grad()
    def follow(averages: Any, values: Any, updates: Any) -> None:
        """Do what torch's get_ema_multi_avg_fn does, also for lists in which some tensors are shards of FSDP2."""
        averages, values = local(averages), local(values)
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - recipe.ema)
        else:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    return AveragedModel(model, multi_avg_fn=follow, use_buffers=True)


def mixing(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Return mixup, cutmix, or one of both at random, as a function of a batch (n, C, H, W) and labels (n); or None."""
    from torchvision.transforms import v2

    ways: list[Any] = []
    if recipe.mixup:
        ways.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
    if recipe.cutmix:
        ways.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
    if not ways:
        return None
    return v2.RandomChoice(ways) if len(ways) > 1 else ways[0]
