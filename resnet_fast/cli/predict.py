"""``resnet-fast predict``: classify pictures with the user's weights."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .output import show

if TYPE_CHECKING:
    from torch import Tensor


def class_names(classes: int, path: Path | None) -> list[str]:
    """One name per class: from a text file, from ImageNet's list for a net of 1000 classes, or the class numbers."""
    if path is not None:
        try:
            names = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("a text file of class names", f"{path} ({error})", "correct --names") from error
        if len(names) != classes:
            raise UserError(
                f"{classes} class names, one per line", f"{len(names)} in {path}", "give one line per row of fc.weight"
            )
        return names
    if classes == 1000:
        from torchvision.models import ResNet50_Weights

        return list(ResNet50_Weights.DEFAULT.meta["categories"])
    return [f"class {i}" for i in range(classes)]


def top_classes(logits: Tensor, names: list[str], top: int) -> list[dict[str, Any]]:
    """The ``top`` most likely classes of one picture, from its logits (classes,)."""
    best = logits.double().softmax(0).topk(min(top, len(names)))
    return [
        {"class": int(i), "name": names[int(i)], "probability": float(p)}
        for p, i in zip(best.values, best.indices, strict=True)
    ]


def predict(
    image: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    weights: Annotated[Path, typer.Option(help="Weights of the net, .safetensors or .pth.")],
    model: Annotated[
        str | None, typer.Option(help="The net of the weights; by default what the file says, else resnet50.")
    ] = None,
    top: Annotated[int, typer.Option(help="Classes to print per picture.")] = 5,
    backend: Annotated[str, typer.Option(help="auto, or the one backend that has to run it.")] = "auto",
    names: Annotated[Path | None, typer.Option(help="Text file of class names, one per line.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """The most likely classes of each picture."""
    import torch

    from .. import accelerate, images
    from .. import weights as weight_files
    from ..models import registry

    if top < 1:
        raise UserError("--top >= 1", str(top), "correct --top")
    net_name = model or "resnet50"
    registry.image_size(net_name)  # an unknown net is said before files are read
    files = images.find(image)
    state = weight_files.read(weights)
    classes = weight_files.num_classes(state)
    trained = weight_files.facts(weights)
    if trained and model in (None, trained["model"]):
        variant = {key: trained[key] for key in ("shortcut", "stride_in_1x1")}
        stock = registry.build(trained["model"], num_classes=classes, **variant)
        look = {key: trained[key] for key in ("size", "mean", "std", "resize")}
        own_names = names is None and len(trained["classes"]) == classes
        labels = trained["classes"] if own_names else class_names(classes, names)
    else:
        stock, look = registry.build(net_name, num_classes=classes), {"size": registry.image_size(net_name)}
        labels = class_names(classes, names)
    net = weight_files.apply(stock, state).eval()
    net = accelerate(net.to(memory_format=torch.channels_last), backend=backend)
    results: list[dict[str, Any]] = []
    for file in files:  # one by one: a folder may hold more pictures than memory does
        x = images.preprocess(images.read(file).pixels, **look)[None].contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            logits = net(x)[0]
        if not bool(torch.isfinite(logits).all()):
            raise UserError("finite outputs", f"NaN or infinity for {file}", "check the weights")
        results.append({"image": str(file), "top": top_classes(logits, labels, top)})
    if json:
        typer.echo(json_module.dumps(results, indent=2))
        return
    from rich.table import Table
    from rich.text import Text

    for result in results:
        table = Table("class", "name", "probability", title=Text(result["image"]), title_justify="left")
        for entry in result["top"]:
            table.add_row(str(entry["class"]), Text(entry["name"]), f"{entry['probability']:.4f}")
        show(table)
