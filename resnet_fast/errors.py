"""Define the errors for users. Each message says what was expected, what was given, and what to do."""

from __future__ import annotations

import re
from importlib import metadata


class UserError(ValueError):
    """Input that cannot be used. The message is ``expected …, got …; <what to do>``; the CLI prints it on one line."""

    def __init__(self, expected: str, got: str, todo: str):
        self.expected, self.got, self.todo = expected, got, todo
        super().__init__(f"expected {expected}, got {got}; {todo}")


class BackendError(RuntimeError):
    """A backend requested by name cannot serve this call, or a call fell back in strict mode."""


def install_command(package: str, extra: str | None = None) -> str:
    """Return the command that installs ``package`` and all else that the extra ``extra`` of this package lists.

    The command names the packages themselves: an extra can be installed by its name only from a checkout, and that
    would build this package again. The list is read from the installed metadata; where there is none (a checkout that
    was never installed) the command names ``package`` alone.
    """
    names = [package]
    try:
        required = metadata.requires("resnet_fast") or []
    except metadata.PackageNotFoundError:
        required = []
    for requirement in required:
        name, _, marker = requirement.partition(";")
        if extra is not None and re.search(rf"""extra\s*==\s*['"]{extra}['"]""", marker):
            names.append(re.split(r"[^\w.-]", name.strip())[0])
    return f"pip install {' '.join(dict.fromkeys(names))}"


def missing_package(
    package: str, purpose: str, error: ImportError, extra: str | None = None, instead: str = ""
) -> UserError:
    """Return the UserError for an optional package that cannot be imported.

    ``package`` is its name for pip, ``purpose`` a phrase such as ``"which reads recipes"``, ``extra`` the extra of this
    package that lists it, and ``instead`` a way to do without it.
    """
    todo = install_command(package, extra) + (f", or {instead}" if instead else "")
    got = "no such package" if isinstance(error, ModuleNotFoundError) else f"a package that fails to import: {error}"
    return UserError(f"{package}, {purpose}", got, todo)


def named(error: BaseException) -> str:
    """Return type and message of another library's error on one line, the message cut to 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def printable(text: str) -> str:
    """Escape characters that a terminal would interpret or an encoding would reject.

    Use it for names that come from files, such as class names and file names.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
