"""``resnet-fast export``: trained weights as a program that runs without this package."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError, printable
from .output import progress_bar, say, show

if TYPE_CHECKING:
    from torch import Tensor

    from ..tools.trained import Trained


def export(
    source: Annotated[
        str,
        typer.Argument(help="Weights (.safetensors, .pth), a checkpoint's or a run's folder, or the name of a net."),
    ],
    out: Annotated[Path, typer.Option(help="File to write: .pt2 (torch.export) or .onnx.")],
    model: Annotated[
        str | None, typer.Option(help="The net of the weights; by default what the file says, else resnet50.")
    ] = None,
    names: Annotated[
        Path | None, typer.Option(help="Text file of class names, one per line; by default what the file says.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the input in pixels; by default the weights' own.")] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Fix the number of images at --batch; by default any from 1 on.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Images at a time, for --static.")] = 1,
    opset: Annotated[int | None, typer.Option(help="Of ONNX; by default PyTorch's choice.")] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Pictures to compare on, or a folder of them; repeatable. By default three photographs."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")] = False,
) -> None:
    """Write a net's stock layers to a file, load that again, and compare it with the net; then the file gets its name.

    Class names and preprocessing go with it: extra file resnet_fast.json of a .pt2, metadata resnet_fast of ONNX.
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
    """The net that ``source`` stands for: a file or folder if there is one of that name, else a net's name."""
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
    """(real inputs to compare on, what the comparison runs on in words)."""
    import torch

    from ..io import images

    try:
        photos = images.load(paths, limit=8)
    except UserError:
        if paths:
            raise
        return None, "random ones alone (scikit-image, which has photographs, is not installed)"
    return torch.stack([classifier.inputs(photo.pixels) for photo in photos]), f"{len(photos)} pictures among them"
