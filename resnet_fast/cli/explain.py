"""``resnet-fast explain``: print which kernel runs each layer of a net here, why not another, and the floor time."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING, Annotated

import typer

from .. import limits
from ..errors import UserError, missing_package
from ..flags import BACKENDS
from .options import one_of
from .output import show, terminal_width

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from ..dispatch.explain import Explanation

DTYPES = ("float32", "bfloat16", "float16", "float64")


def explain(
    model: Annotated[str, typer.Argument(help="A net's name; with --timm, the name of one of timm's ResNets.")],
    image: Annotated[int | None, typer.Option(help="Side of the image in pixels; by default the net's own.")] = None,
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 1,
    dtype: Annotated[str, one_of(DTYPES, "Element type")] = "float32",
    backend: Annotated[str, one_of(BACKENDS, "Backend that has to run it")] = "auto",
    timm: Annotated[bool, typer.Option("--timm", help="Take the net from timm.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print for each layer of a net in eval mode the problem, the backend, why not the others, and the floor time."""
    limits.check_input(batch, image, planes=0)
    import torch

    from .. import accelerate
    from .. import explain as run

    if timm:
        net, side = _timm_net(model), image or 224
    else:
        from ..models import registry

        side = image or registry.image_size(model)
        net = registry.build(model)
    limits.check_input(batch, side)
    element = getattr(torch, dtype)
    net = net.eval().to(element).to(memory_format=torch.channels_last)
    accelerate(net, backend=backend)
    x = torch.randn(batch, 3, side, side).to(dtype=element, memory_format=torch.channels_last)
    explanation = run(net, x)
    if json:
        typer.echo(json_module.dumps(explanation.to_dict(), indent=2))
    elif terminal_width() is None:
        typer.echo(str(explanation))
    else:
        show(_table(explanation), *explanation.remarks())


def _table(explanation: Explanation) -> Table:
    from rich.table import Table

    from ..dispatch.explain import HEAD

    table = Table()
    for heading in HEAD:
        table.add_column(heading, justify="right" if heading in ("GFLOP", "MB", "floor ms") else "left")
    for line in explanation.cells():
        table.add_row(*line)
    return table


def _timm_net(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise missing_package("timm", "which has that net", error, instead="leave out --timm") from error
    if not timm.is_model(name):
        raise UserError("the name of a timm model", repr(name), "timm.list_models('*resnet*') lists them")
    return timm.create_model(name, pretrained=False)
