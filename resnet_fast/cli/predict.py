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
from .options import DeviceOption, ModelOption, NamesOption, ThreadsOption, one_of
from .output import progress_bar, say


def predict(
    image: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    weights: Annotated[
        Path, typer.Option(help="Weights (.safetensors, .pth), or a folder: a checkpoint's or a run's.")
    ],
    model: ModelOption = None,
    top: Annotated[int, typer.Option(help="Classes to print per picture.")] = 5,
    names: NamesOption = None,
    recursive: Annotated[bool, typer.Option("--recursive/--no-recursive", help="Look into subfolders.")] = True,
    batch: Annotated[int, typer.Option(help="Pictures per batch; their answers are printed together.")] = 16,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    backend: Annotated[str, one_of(BACKENDS, "Backend that has to run it")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON array instead of tables.")] = False,
    csv: Annotated[
        str | None, typer.Option(help="Write a line per picture and class to this file instead of tables; - is stdout.")
    ] = None,
) -> None:
    """Print the most likely classes of each picture.

    A picture that cannot be read is named on stderr, the others are classified, and the exit code is 2.
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
