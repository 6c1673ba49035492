"""Options whose values are names out of a list: the help text shows them, a wrong one is said with the close match."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer

from ..errors import UserError
from .failures import did_you_mean


def one_of(names: Iterable[str], help: str, **kwargs: Any) -> Any:
    """A ``typer.Option`` that takes one of ``names``; ``kwargs`` go to it.

    Anything else is a UserError before the command imports anything. The names stand in the help text: beside the
    option's own name, a list would be cut in the middle of a word.
    """
    names = tuple(names)

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and value not in names:
            option = param.opts[0]
            close = did_you_mean(value, names).removeprefix("; ")
            raise UserError(f"{option} among {', '.join(names)}", repr(value), close or f"correct {option}")
        return value

    return typer.Option(help=f"{help}: {', '.join(names)}.", callback=check, **kwargs)
