"""Find the checkout. Some programs here need more of it than the package that is installed: sources, tests, docs."""

from __future__ import annotations

from pathlib import Path

from resnet_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
"""The checkout; the folder of the package where the package was installed from a wheel."""


def require(what: str) -> None:
    """Raise UserError unless this is a checkout. ``what``: the program, or what it does."""
    if not (ROOT / "pyproject.toml").exists():
        raise UserError(
            f"a checkout of the repository for {what}", f"the installed package in {ROOT}", "run it in a clone"
        )
