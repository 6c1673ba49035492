"""``resnet-fast export``: write trained weights as a program that runs without this package."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError, printable
from .options import ModelOption, NamesOption, PicturesOption
from .output import progress_bar, say, show

if TYPE_CHECKING:
    from torch import Tensor

    from ..tools.trained import Trained


def export(
    source: Annotated[
        str,
        typer.Argument(help="Weights (.safetensors, .pth), the folder of a checkpoint or a run, or a net's name."),
    ],
    out: Annotated[Path, typer.Option(help="File to write: .pt2 (torch.export) or .onnx.")],
    model: ModelOption = None,
    names: NamesOption = None,
    size: Annotated[int | None, typer.Option(help="Side of the input in pixels; by default the weights' own.")] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Fix the number of images to --batch; by default any number.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Images per batch, with --static.")] = 1,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; by default PyTorch's choice.")] = None,
    images: PicturesOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")] = False,
) -> None:
    """Export a net to a file that runs without this package, and compare the file's outputs with the net's.

    The file gets its name only if they agree. It holds class names and preprocessing too: as the extra file
    resnet_fast.json of a .pt2, as the metadata resnet_fast of ONNX.
    """
    from .. import limits
    from ..io import safe_files
    from ..tools import exporting

    limits.check_input(batch, size, names=("--batch", "--size"))
    if batch != 1 and not static:
        raise UserError("--batch with --static", "--batch alone", "give --static, or leave --batch out")
    exporting.check_target(out)
    classifier = _classifier(source, model, names)
    facts = classifier.facts if size is None else replace(classifier.facts, size=size)
    for text in classifier.said:
        say(text)
    limits.check_input(batch, facts.size, names=("--batch", "--size"))
    real, kind = _real(images, replace(classifier, facts=facts))
    fixed = batch if static else None
    with progress_bar(silent=json) as progress:
        progress(0, 1, f"writing and comparing {out.name}")
        checked = exporting.export(classifier.net, facts, out, batch=fixed, opset=opset, inputs=real)
    if json:
        told = {"out": str(out), "bytes": out.stat().st_size, "size": facts.size, "batch": fixed}
        print(safe_files.json_text(told | asdict(checked), indent=2))
        return
    shape = f"({fixed or 'N'}, 3, {facts.size}, {facts.size})"
    result = "not run: onnxruntime is not installed, the file was only checked"
    if checked.runner:
        result = (
            f"agrees in {checked.runner} on {checked.inputs} inputs, {kind}: largest difference {checked.largest:.2g}, "
            f"relative {checked.relative:.2g}"
        )
    show(
        f"written: {printable(str(out))}, {out.stat().st_size / 1e6:.1f} MB, input {shape} float32, normalised", result
    )


def _classifier(source: str, model: str | None, names: Path | None) -> Trained:
    """Return the net that ``source`` names: a file or folder if there is one, else a net by name."""
    from ..models import registry
    from ..tools import trained
    from ..training import restored

    if Path(source).exists() or Path(source).suffix or source not in registry.names():
        if not Path(source).exists() and not Path(source).suffix:
            registry.image_size(source)  # says which names are close
        return restored.load_net(Path(source), model, names).trained
    if model is not None or names is not None:
        raise UserError("--model and --names with a file of weights", source, "leave them out")
    return trained.untrained(source)


def _real(paths: list[Path] | None, classifier: Trained) -> tuple[Tensor | None, str]:
    """Return real inputs to compare on, or None, and a description of them."""
    import torch

    from ..io import images

    try:
        photos = images.load(paths, limit=8)
    except UserError:
        if paths:
            raise
        return None, "random ones alone (scikit-image, which has photographs, is not installed)"
    return torch.stack([classifier.inputs(photo.pixels) for photo in photos]), f"{len(photos)} pictures among them"
