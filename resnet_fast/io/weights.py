"""Weights from a user's file, checked in full before a single tensor of the model changes.

A file is data: ``.safetensors`` holds nothing else, and a pickle is read with ``weights_only=True``, which refuses
anything that would run code. Without a file, :func:`calibrate` turns a randomly initialised net into one whose
activations look like a trained net's, so that error figures measured on it mean something.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from . import weight_facts
from .weight_facts import Facts

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict")
WRAPPERS = (*AVERAGED, "state_dict", "model_state_dict", "model")
"""Entries of a checkpoint that hold a state dict. Averaged weights come first, as timm and torchvision's references
validate by them and as our own training runs export them."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel and EMA, torch.compile, and Lightning put before each name."""

OTHER_MODEL = "name the model that the file was made for (--model)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@dataclass(frozen=True)
class File:
    """A weights file as it was read: its state dict, the facts in it (None where it has none), and ``entry``, which
    of a checkpoint's entries the state dict was, with ``others`` beside it that would have served as well."""

    state: dict[str, Tensor]
    facts: Facts | None = None
    entry: str = ""
    others: tuple[str, ...] = ()


def _load_safetensors(path: Path) -> File:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(weight_facts.KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            "a complete safetensors file", f"{path} ({_first_line(error)})", "copy or download the file again"
        ) from error
    except Exception as error:  # torch, for a dtype that it does not have
        raise UserError(
            "a safetensors file of PyTorch's dtypes",
            f"{path} ({type(error).__name__}: {_first_line(error)})",
            "save it as float32",
        ) from error
    return File(state_of(state, path), None if text is None else weight_facts.parse(text, str(path)))


def _load_pickle(path: Path) -> Any:
    whole = _is_archive(path)  # a cut archive has lost its table of contents
    try:
        if whole:
            check_archive(path)
        with warnings.catch_warnings():  # torch asks for a bug report about some foreign pickles
            warnings.simplefilter("ignore")
            # The options of the program that trained, beside torchvision's and timm's weights: a bag of attributes.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own text advises to load with weights_only=False, which is what must not be done.
        if whole:
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
        if "weights_only" in str(error):  # tar archives of PyTorch before 0.4, and TorchScript: read by running them
            raise UserError(
                "a file of tensors only",
                f"{path}, a TorchScript program or an archive of PyTorch before 0.4, which could run code when read",
                "load it where it was made and save model.state_dict() alone, best as .safetensors",
            ) from error
        raise UserError(
            "a complete PyTorch weights file", f"{path} ({_first_line(error)})", "copy or download the file again"
        ) from error
    except Exception as error:  # torch's unpickler meets arbitrary bytes with any exception of Python's
        raise UserError(
            "a PyTorch weights file",
            f"{path} ({type(error).__name__} while reading)",
            "copy or download the file again",
        ) from error


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # a table of contents that claims several disks
        return False


def check_archive(path: Path) -> None:
    """UserError for an archive that is larger unpacked than it is: torch.save compresses nothing, a bomb does."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            "a complete PyTorch weights file", f"{path} ({_first_line(error)})", "copy or download the file again"
        ) from error
    if unpacked > path.stat().st_size:
        raise UserError(
            "an archive as torch.save writes it, not compressed",
            f"{path}, which unpacks to {unpacked:,} bytes",
            "save model.state_dict() with torch.save, best as .safetensors",
        )


def _unwrap(found: Any, path: Path) -> File:
    """The state dict inside a checkpoint: out of its wrappers, without training prefixes."""
    entries: list[str] = []
    others: tuple[str, ...] = ()
    while isinstance(found, Mapping) and len(entries) < 4:  # a checkpoint may hold itself
        held = [key for key in WRAPPERS if isinstance(found.get(key), Mapping)]
        if not held:
            break
        entries.append(held[0])
        others = others or tuple(held[1:])
        found = found[held[0]]
    return File(state_of(found, path), None, ".".join(entries), others)


def state_of(found: Any, path: Path) -> dict[str, Tensor]:
    """``found`` as a state dict of plain tensors, without training prefixes. UserError, which names ``path``, for
    everything else."""
    if not isinstance(found, Mapping) or not found:
        raise UserError(
            "a state dict (name -> tensor)", f"{path} with a {type(found).__name__}", "save model.state_dict()"
        )
    foreign = [k for k, v in found.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if foreign:
        raise UserError(
            "a state dict (name -> tensor)", f"{path} with {_some(foreign)} not a tensor", "save model.state_dict()"
        )
    odd = [name for name, tensor in found.items() if not _plain(tensor)]
    if odd:
        raise UserError(
            "plain tensors, each with memory of its own",
            f"{path} with {_some(odd)} sparse, quantized, without data, or larger than its data",
            "save model.state_dict() of a dense model",
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


def _plain(tensor: Tensor) -> bool:
    """Is this dense, here, and no larger than what the file holds of it? An expanded tensor of a few bytes would decide
    how large a net is built."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _some(names: list[Any]) -> str:
    shown = ", ".join(str(n) for n in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_file(path: Path) -> File:
    """Read ``path`` to the CPU, unwrapped from ``{"state_dict": …}``, ``{"model_ema": …}`` and name prefixes.

    UserError if the file is absent, cut short, of another kind, says nonsense of itself, or would have to be executed
    to be read.
    """
    if path.suffix not in (".safetensors", *PICKLES):
        raise UserError(
            f"a weights file ending in .safetensors or {' '.join(PICKLES)}", f"{path.name!r}", "convert or rename it"
        )
    if not path.is_file():
        raise UserError("a weights file", f"{path}, which is not a file", "check the path")
    return _load_safetensors(path) if path.suffix == ".safetensors" else _unwrap(_load_pickle(path), path)


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of :func:`open_file`."""
    return open_file(path).state


HEADS = ("fc.weight", "classifier.6.weight")
"""Where a ResNet (or GoogLeNet) and a VGG net have one row per class."""


def num_classes(state: Mapping[str, Tensor]) -> int:
    """Number of classes: rows of the last layer, see :data:`HEADS`. UserError if there is none."""
    weight = next((state[name] for name in HEADS if name in state), None)
    if weight is None or weight.ndim != 2 or not len(weight):
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
    kinds = [n for n in state if _kind(state[n]) != _kind(own[n])]
    if kinds:
        raise UserError(
            f"{kinds[0]} of dtype {own[kinds[0]].dtype}", f"{state[kinds[0]].dtype}", "export floating-point weights"
        )
    # In the model's dtype: 1e300 is finite until it becomes float32, and float8 has no isfinite.
    bad = [n for n, t in state.items() if t.is_floating_point() and not bool(t.to(own[n].dtype).isfinite().all())]
    if bad:
        raise UserError(
            "finite weights", f"NaN or infinity in {_some(bad)}", "use a checkpoint from before it diverged"
        )
    negative = [n for n, t in state.items() if n.endswith("running_var") and bool((t.to(own[n].dtype) < 0).any())]
    if negative:
        raise UserError("variances >= 0", f"negative values in {_some(negative)}", "use an undamaged checkpoint")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


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
