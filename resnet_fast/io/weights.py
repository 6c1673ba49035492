"""Read a user's weights file, and check all of it before a single tensor of the model changes.

No code in a file is run: ``.safetensors`` holds tensors only, and a pickle is read with ``weights_only=True``.
Without a file, :func:`calibrate` gives a randomly initialised net activations like a trained net's, so that errors
measured on it are meaningful.
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
"""Entries of a checkpoint that hold a state dict. Averaged weights come first, because timm's and torchvision's scripts
validate with them and our own training runs export them."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that DistributedDataParallel and EMA, torch.compile, and Lightning add to each name."""

OTHER_MODEL = "name the model that the file was made for (--model)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@dataclass(frozen=True)
class WeightsFile:
    """A weights file as it was read.

    Attributes:
        state: the state dict.
        facts: the facts in the file; None if it has none.
        entry: the entry of a checkpoint that held the state dict; empty if the file is one itself.
        others: other entries that hold a state dict too.
    """

    state: dict[str, Tensor]
    facts: Facts | None = None
    entry: str = ""
    others: tuple[str, ...] = ()


def _load_safetensors(path: Path) -> WeightsFile:
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
    return WeightsFile(state_of(state, path), None if text is None else weight_facts.parse(text, str(path)))


def _load_pickle(path: Path) -> Any:
    whole = _is_archive(path)  # a cut archive has lost its table of contents
    try:
        if whole:
            check_archive(path)
        with warnings.catch_warnings():  # torch asks for a bug report about some foreign pickles
            warnings.simplefilter("ignore")
            # torchvision's and timm's checkpoints also contain the training program's options, a Namespace.
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
    """Check that an archive is not compressed: torch.save never compresses, but an archive bomb does.

    Raises:
        UserError: the archive unpacks to more than its own size, or is damaged.
    """
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


def _unwrap(found: Any, path: Path) -> WeightsFile:
    """Return the state dict inside a checkpoint, without wrappers and training prefixes."""
    entries: list[str] = []
    others: tuple[str, ...] = ()
    while isinstance(found, Mapping) and len(entries) < 4:  # a checkpoint may hold itself
        held = [key for key in WRAPPERS if isinstance(found.get(key), Mapping)]
        if not held:
            break
        entries.append(held[0])
        others = others or tuple(held[1:])
        found = found[held[0]]
    return WeightsFile(state_of(found, path), None, ".".join(entries), others)


def state_of(found: Any, path: Path) -> dict[str, Tensor]:
    """Return ``found`` as a state dict of plain tensors, without training prefixes.

    Raises:
        UserError: ``found`` is anything else; the message names ``path``.
    """
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
    """Return whether a tensor is dense, on the CPU, and no larger than its data.

    An expanded tensor of a few bytes could otherwise demand a net of any size.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _some(names: list[Any]) -> str:
    shown = ", ".join(str(n) for n in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_file(path: Path) -> WeightsFile:
    """Read a weights file to the CPU, without wrappers such as ``{"state_dict": …}`` and without name prefixes.

    Raises:
        UserError: the file is missing, incomplete, of another kind, has invalid facts, or could run code when read.
    """
    if path.suffix not in (".safetensors", *PICKLES):
        raise UserError(
            f"a weights file ending in .safetensors or {' '.join(PICKLES)}", f"{path.name!r}", "convert or rename it"
        )
    if not path.is_file():
        raise UserError("a weights file", f"{path}, which is not a file", "check the path")
    return _load_safetensors(path) if path.suffix == ".safetensors" else _unwrap(_load_pickle(path), path)


def read(path: Path) -> dict[str, Tensor]:
    """Return the state dict of :func:`open_file`."""
    return open_file(path).state


HEADS = ("fc.weight", "classifier.6.weight")
"""Names of the last layer's weight, which has one row per class: of ResNets and GoogLeNet, and of VGG nets."""


def num_classes(state: Mapping[str, Tensor]) -> int:
    """Return the number of classes: the rows of the last layer, see :data:`HEADS`.

    Raises:
        UserError: there is no such layer.
    """
    weight = next((state[name] for name in HEADS if name in state), None)
    if weight is None or weight.ndim != 2 or not len(weight):
        raise UserError(
            "a ResNet classifier with a 2-d fc.weight",
            f"weights named {_some(list(state))}",
            "use the weights of a torchvision-style ResNet with its classifier",
        )
    return int(weight.shape[0])


def check(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check that ``state`` fits ``model``: names, shapes, dtypes, finite values.

    Raises:
        UserError: it does not; the message names the first tensors that differ.
    """
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
    """Copy ``state`` into ``model`` and return it; on an error of :func:`check` the model is unchanged."""
    check(model, state)
    model.load_state_dict(dict(state), strict=True)
    return model


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return ``build()`` with the initialisation of ``seed``; the caller's random state is left unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def calibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """Give every BatchNorm of a random net the running statistics of ``x`` and return the net.

    A fresh net normalises by mean 0 and variance 1, so its activations grow from block to block and a relative error
    means little. One forward pass without gradients and with ``momentum=None`` (cumulative average) sets the
    statistics. Momentum and training flags are restored. The result depends on the model and ``x`` only.

    Args:
        model: changed in place.
        x: float (N, 3, H, W).
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
