"""Options that several commands have, and options whose values are names from a list."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .failures import did_you_mean

ModelOption = Annotated[
    str | None, typer.Option(help="The net of the weights; by default what the file says, else resnet50.")
]
NamesOption = Annotated[
    Path | None,
    typer.Option(
        help="Text file of class names, one per line; by default what the file says. Without both, ImageNet's for "
        "a net of 1000 classes, else numbers."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu or a CUDA device.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; by default PyTorch's choice.")]
PicturesOption = Annotated[
    list[Path] | None,
    typer.Option(help="A picture or a folder of pictures; repeatable. By default three photographs."),
]


def one_of(names: Iterable[str], help: str, **kwargs: Any) -> Any:
    """Return a ``typer.Option`` that takes one of ``names``.

    Any other value is a UserError, with close matches, before the command imports anything.

    Args:
        names: The values that the option takes. They are listed in the help text, because typer would cut a list next
            to the option's name in the middle of a word.
        help: The help text before the names.
        kwargs: Further arguments of ``typer.Option``.
    """
    names = tuple(names)

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and value not in names:
            option = param.opts[0]
            close = did_you_mean(value, names).removeprefix("; ")
            raise UserError(f"{option} among {', '.join(names)}", repr(value), close or f"correct {option}")
        return value

    return typer.Option(help=f"{help}: {', '.join(names)}.", callback=check, **kwargs)
