"""``resnet-fast predict``: classify pictures with the user's weights."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..flags import BACKENDS
from .answers import Writer, csv_lines, json_array, tables
from .options import one_of
from .output import progress_bar, say


def predict(
    image: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    weights: Annotated[Path, typer.Option(help="Weights (.safetensors, .pth), a checkpoint's folder, or a run's.")],
    model: Annotated[
        str | None, typer.Option(help="The net of the weights; by default what the file says, else resnet50.")
    ] = None,
    top: Annotated[int, typer.Option(help="Classes to print per picture.")] = 5,
    names: Annotated[
        Path | None,
        typer.Option(
            help="Text file of class names, one per line; by default what the file says. Without both, ImageNet's for "
            "a net of 1000 classes, else numbers."
        ),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive/--no-recursive", help="Look into folders inside folders.")
    ] = True,
    batch: Annotated[int, typer.Option(help="Pictures at a time; their answers are printed together.")] = 16,
    device: Annotated[str, typer.Option(help="cpu or a CUDA device.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads of the net; by default PyTorch's choice.")] = None,
    backend: Annotated[str, one_of(BACKENDS, "Backend that has to run it")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON array in place of tables.")] = False,
    csv: Annotated[
        str | None, typer.Option(help="Write a line per picture and class to this file, in place of tables; - prints.")
    ] = None,
) -> None:
    """The most likely classes of each picture, printed as they come.

    A picture that cannot be read is named on stderr and the others go on; the exit code is 2 then.
    """
    from .. import devices, limits
    from ..io import images
    from ..tools import classify
    from ..training import restored

    limits.check_count("--top", top, 1, sys.maxsize)
    limits.check_input(batch, None)
    limits.check_threads(threads)
    if json and csv == "-":
        raise UserError("one format on stdout", "--json and --csv -", "name a file with --csv")
    devices.check_device(device)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    files = images.find(image, recursive)
    classifier = restored.load_net(weights, model, names).trained
    for text in classifier.said:
        say(text)
    limits.check_input(min(batch, len(files)), classifier.facts.size, names=("--batch", "size"))
    answers = classify.stream(classifier, files, top=top, batch=batch, device=device, backend=backend)
    done = bad = 0
    with ExitStack() as stack:
        writers: list[Writer] = []
        if csv is not None:
            writers.append(stack.enter_context(csv_lines(csv)))
        if json:
            writers.append(stack.enter_context(json_array()))
        progress = stack.enter_context(progress_bar(silent=len(files) == 1, eta=True))
        for group in answers:
            for write in writers or [tables]:
                write(group)
            for answer in group:
                if answer.top is None:
                    bad += 1
                    say(f"not classified: {answer.refused}")
            done += len(group)
            progress(done, len(files), f"{done:,} of {len(files):,} pictures")
    if bad:
        raise UserError(
            f"{len(files)} picture{'s' * (len(files) > 1)} that can be classified",
            f"{bad} that cannot, named above",
            "save them again as JPEG or PNG, or leave them out; the other answers stand",
        )
    if len(files) > 1:
        say(f"{done:,} pictures classified")
