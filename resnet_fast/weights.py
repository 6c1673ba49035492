"""Weights from a user's file, checked in full before a single tensor of the model changes.

A file is data: ``.safetensors`` holds nothing else, and a pickle is read with ``weights_only=True``, which refuses
anything that would run code. Without a file, :func:`calibrate` turns a randomly initialised net into one whose
activations look like a trained net's, so that error figures measured on it mean something.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel and EMA, torch.compile, and Lightning put before each name."""

OTHER_MODEL = "name the model that the file was made for (--model)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _load_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                "a complete safetensors file", f"{path} ({_first_line(error)})", "copy or download the file again"
            ) from error
    try:
        with warnings.catch_warnings():  # torch asks for a bug report about some foreign pickles
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises to load with weights_only=False, which is what must not be done.
        if zipfile.is_zipfile(path):  # a whole archive, so it was not cut
            raise UserError(
                "a file of tensors only",
                f"{path}, which holds other Python objects and could run code when read",
                "save model.state_dict() alone, best as .safetensors",
            ) from error
        raise UserError(
            "a PyTorch weights file",
            f"{path}, which is of another kind or holds other objects than tensors",
            "save model.state_dict() with torch.save, best as .safetensors",
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(
            "a complete PyTorch weights file", f"{path} ({_first_line(error)})", "copy or download the file again"
        ) from error
    except Exception as error:  # torch's unpickler meets arbitrary bytes with any exception of Python's
        raise UserError(
            "a PyTorch weights file",
            f"{path} ({type(error).__name__} while reading)",
            "copy or download the file again",
        ) from error


def _unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: out of its wrapper, without training prefixes."""
    if isinstance(found, Mapping):
        for key in WRAPPERS:
            if isinstance(found.get(key), Mapping):
                return _unwrap(found[key], path)
    if not isinstance(found, Mapping) or not found:
        raise UserError(
            "a state dict (name -> tensor)", f"{path} with a {type(found).__name__}", "save model.state_dict()"
        )
    foreign = [k for k, v in found.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if foreign:
        raise UserError(
            "a state dict (name -> tensor)", f"{path} with {_some(foreign)} not a tensor", "save model.state_dict()"
        )
    state = {name: tensor for name, tensor in found.items() if name != "n_averaged"}  # AveragedModel's step counter
    peeled = True
    while peeled:
        peeled = False
        for prefix in PREFIXES:
            if state and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
                peeled = True
    return state


def _some(names: list[Any]) -> str:
    shown = ", ".join(str(n) for n in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read(path: Path) -> dict[str, Tensor]:
    """State dict of ``path`` on the CPU, unwrapped from ``{"state_dict": …}``, ``{"model": …}`` and name prefixes.

    UserError if the file is absent, cut short, of another kind, or would have to be executed to be read.
    """
    if path.suffix not in (".safetensors", *PICKLES):
        raise UserError(
            f"a weights file ending in .safetensors or {' '.join(PICKLES)}", f"{path.name!r}", "convert or rename it"
        )
    if not path.is_file():
        raise UserError("a weights file", f"{path}, which is not a file", "check the path")
    return _unwrap(_load_file(path), path)


FACTS = "resnet_fast"
"""The entry of a safetensors file's metadata in which a training run says what its weights are of, as JSON."""


def facts(path: Path) -> dict[str, Any]:
    """What the training run that left ``path`` wrote of it: ``model`` and its variant, ``classes`` (their names), and
    ``size``, ``mean``, ``std`` and ``resize`` of its images, as :func:`resnet_fast.images.preprocess` takes them.

    Empty for other files. ``path`` is one that :func:`read` has read.
    """
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(FACTS)
    return {} if text is None else json.loads(text)


def num_classes(state: Mapping[str, Tensor]) -> int:
    """Number of classes: rows of ``fc.weight``. UserError if there is none."""
    weight = state.get("fc.weight")
    if weight is None or weight.ndim != 2:
        raise UserError(
            "a ResNet classifier with a 2-d fc.weight",
            f"weights named {_some(list(state))}",
            "use the weights of a torchvision-style ResNet with its classifier",
        )
    return int(weight.shape[0])


def check(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """UserError naming the first offenders unless ``state`` fits ``model``: names, shapes, kinds, finite values."""
    own = model.state_dict()
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]  # old files lack the counter
    unknown = [n for n in state if n not in own]
    if missing or unknown:
        problems = [f"no {_some(missing)}"] if missing else []
        problems += [f"unknown {_some(unknown)}"] if unknown else []
        raise UserError(
            "weights with this model's names",
            "; ".join(problems),
            "name the model that the file was made for (--model)",
        )
    shapes = [n for n in state if state[n].shape != own[n].shape]
    if shapes:
        first = shapes[0]
        raise UserError(
            f"{first} of shape {tuple(own[first].shape)}",
            f"{tuple(state[first].shape)}" + (f" (and {_some(shapes[1:])} differ too)" if shapes[1:] else ""),
            OTHER_MODEL,
        )
    kinds = [n for n in state if state[n].is_floating_point() != own[n].is_floating_point()]
    if kinds:
        raise UserError(
            f"{kinds[0]} of dtype {own[kinds[0]].dtype}", f"{state[kinds[0]].dtype}", "export floating-point weights"
        )
    bad = [n for n, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise UserError(
            "finite weights", f"NaN or infinity in {_some(bad)}", "use a checkpoint from before it diverged"
        )
    negative = [n for n, t in state.items() if n.endswith("running_var") and bool((t < 0).any())]
    if negative:
        raise UserError("variances >= 0", f"negative values in {_some(negative)}", "use an undamaged checkpoint")


def apply(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copy ``state`` into ``model`` after :func:`check` accepted all of it; the model is unchanged on an error."""
    check(model, state)
    model.load_state_dict(dict(state), strict=True)
    return model


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """``build()`` with the initialisation that ``seed`` gives; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def calibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """Give every BatchNorm of a random net the running statistics of ``x``, float (N, 3, H, W), in one pass.

    A fresh net normalises by mean 0 and variance 1, so its activations grow from block to block and a relative error
    says little. One forward pass without gradients with ``momentum=None`` (cumulative average) sets them; momentum and
    training flags come back as they were. Same model, same ``x``: same statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    flags = {m: m.training for m in model.modules()}
    momenta = [m.momentum for m in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, flag in flags.items():
            module.training = flag
    return model
