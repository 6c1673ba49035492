"""Turn an error into one line for the user and an exit code."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError, UserError, missing_package

PROGRAM = "resnet-fast"

OURS = ("", "resnet_fast")
"""Modules that are part of the program: if one is missing, the program is broken. "" is a module without a name."""

USER, OWN, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141
"""Exit codes: a request that cannot be served; an error in the program; Ctrl-C; a closed pipe."""


@dataclass(frozen=True)
class CommandFailure:
    """The line for stderr and the exit code."""

    line: str
    code: int


_NO_MEMORY = re.compile(
    r"can't allocate memory|DefaultCPUAllocator|out of memory|bad_alloc|Cannot allocate memory|"
    r"Unable to allocate|(calculation|multiplication) overflow",
    re.IGNORECASE,
)
"""How torch, numpy, the system and C++ say that a tensor is too large. "overflow" means its size in bytes."""

_SMALLER = ("--batch", "--image", "--size", "--width", "--workers")
"""Options that decide how much memory a command needs."""

_ANY_FILE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE}
"""Errors of the system that are not errors of the program, even if they name no file: a full or read-only disk."""


def describe_failure(error: BaseException, command: str = PROGRAM, options: Sequence[str] = ()) -> CommandFailure:
    """Return what to print about ``error``, and the exit code.

    Args:
        error: What the command raised.
        command: The command that ran, such as ``resnet-fast bench``.
        options: The options of that command, as they are typed.
    """
    if isinstance(error, (UserError, BackendError)):
        return CommandFailure(str(error), USER)
    if hasattr(error, "format_message"):
        return CommandFailure(_usage(error, command, options), USER)
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) not in OURS:
        return CommandFailure(str(missing_package(package, f"which {command} needs", error)), USER)
    if is_memory(error):
        return CommandFailure(str(_memory(error, options)), USER)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _ANY_FILE):
        return CommandFailure(str(_system(error)), USER)
    hint = f"an error in {PROGRAM} itself, RESNET_FAST_DEBUG=1 shows where"
    return CommandFailure(f"{type(error).__name__}: {error}; {hint}", OWN)


def is_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that there was not enough memory, on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, ValueError, OverflowError)) and bool(_NO_MEMORY.search(str(error)))


def _memory(error: BaseException, options: Sequence[str]) -> UserError:
    there = [name for name in _SMALLER if name in options]
    todo = f"lower {' or '.join(there)}" if there else "use a smaller net, or a machine with more memory"
    text = " ".join(str(error).split())
    # torch puts "[enforce fail at alloc_cpu.cpp:124] err == 0. " before the sentence that tells something
    text = re.sub(r"^\[enforce fail.*?\]\s*(err == 0\.|.*?\)\.)?\s*", "", text)
    return UserError("enough memory", text[:200] or type(error).__name__, todo)


def _system(error: OSError) -> UserError:
    """Return the error for a file that cannot be read or written."""
    what = error.strerror or type(error).__name__
    where = f"{what}: {error.filename}" if error.filename is not None else what
    todo = (
        "free some space, or write to another disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "correct the path"
    )
    return UserError("files that can be read and written", where, todo)


def _usage(error: Any, command: str, options: Sequence[str]) -> str:
    """Return the line for a command line that cannot be parsed.

    typer imports or vendors click, depending on its version, so the class of these errors has no public name.
    """
    if type(error).__name__ != "NoSuchOption":
        return f"expected what '{command} --help' describes, got: {error.format_message()}"
    typed = error.option_name
    return f"expected an option that '{command} --help' lists, got {typed}{did_you_mean(typed, options)}"


def option_names(command: Any) -> list[str]:
    """Return the options of a command as they are typed, ``--no-x`` included."""
    every = [name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("--")]
    return list(dict.fromkeys([*every, "--help"]))


def did_you_mean(typed: str, known: Sequence[str]) -> str:
    """Return ``; did you mean a or b?`` with the close matches among ``known``, or "" if there are none."""
    close = difflib.get_close_matches(typed, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
