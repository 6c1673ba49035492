"""Fine-tune trained weights: a new head if the classes differ, and frozen first stages."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError, printable
from ..io import weights
from ..io.weight_facts import Facts
from .recipe import Recipe

STEM = ("stem", "conv1")
"""Names that ``freeze`` accepts for everything before ``layer1``."""


def load_weights(model: nn.Module, recipe: Recipe, classes: int) -> str:
    """Copy the weights of ``recipe.weights`` into ``model``.

    The file is torchvision's, a run's ``model.safetensors``, or another state dict. If it has another number of
    classes, ``model`` keeps its own last layer, freshly initialised.

    Args:
        model: The net, changed in place.
        recipe: Its ``weights`` names the file.
        classes: Outputs of the net.

    Returns:
        A sentence that says whether the head was copied.

    Raises:
        UserError: The weights are of another net. ``model`` is unchanged then.
    """
    path = Path(recipe.weights or "")
    file = weights.open_file(path)
    _check_net(file.facts, recipe, path)
    state, given = dict(file.state), weights.num_classes(file.state)
    if given == classes:
        said = f"its head of {given:,} classes included{_other_names(file.facts, classes)}"
    else:
        own = model.state_dict()
        (head,) = [n.removesuffix(".weight") for n in weights.HEADS if n in own]
        state |= {name: value for name, value in own.items() if name.startswith(f"{head}.")}
        said = f"but for its head: {given:,} classes there, a new layer for {classes:,} here"
    weights.apply(model, state)
    return f"weights of {path}, {said}"


def _check_net(facts: Facts | None, recipe: Recipe, path: Path) -> None:
    """Raise UserError for weights of a variant of the net whose tensors would fit but mean something else."""
    if facts is None:
        return
    theirs = (facts.model, facts.shortcut, facts.stride_in_1x1)
    if theirs != (recipe.model, recipe.shortcut, recipe.stride_in_1x1):
        names = ("", "shortcut ", "stride_in_1x1 ")
        got = ", ".join(f"{name}{printable(str(value))}" for name, value in zip(names, theirs, strict=True))
        raise UserError(
            f"weights of {recipe.model} as the recipe has it", f"{path} ({got})", "correct --model or --set"
        )


def _other_names(facts: Facts | None, classes: int) -> str:
    return "" if facts is None or len(facts.classes) != classes else f" ({printable(', '.join(facts.classes[:3]))}, …)"


def freeze(model: nn.Module, upto: str) -> None:
    """Freeze every parameter up to and including the stage ``upto``, and put its norms into eval mode.

    ``model.train()`` puts the norms back into training mode. Call :func:`hold` after it.

    Raises:
        UserError: The net has no such stage.
    """
    for child in _frozen(model, upto):
        child.requires_grad_(False)
    hold(model, upto)


def hold(model: nn.Module, upto: str | None) -> None:
    """Put the norms of frozen stages into eval mode, so that they use the statistics that came with the weights."""
    for child in _frozen(model, upto) if upto else ():
        for module in child.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _frozen(model: nn.Module, upto: str) -> list[nn.Module]:
    """Return the children of ``model`` from the first to the stage ``upto``."""
    children = dict(model.named_children())
    stages = [name for name in children if name.startswith("layer")]
    if not stages or upto not in (*STEM, *stages):
        known = ", ".join((STEM[0], *stages)) if stages else "none in this net"
        raise UserError(f"freeze among {known}", repr(upto), "correct --freeze")
    names = list(children)
    end = names.index(stages[0]) if upto in STEM else names.index(upto) + 1
    return [children[name] for name in names[:end]]
