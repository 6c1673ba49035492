"""Read what a person wrote in a recipe's YAML file or after ``--set``, as plain values.

A recipe is a short list of ``key: value`` lines. A file that is too long, nested too deeply, or that refers to itself
(aliases can expand to billions of values) is refused before it is built. So is a key that is given twice, of which YAML
would silently take the last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_package

MOST_BYTES = 2**20
MOST_DEPTH = 8


_OLD_NUMBER = re.compile(r"[-+]?(0[0-9_]*[0-7][0-9_]*|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Numbers that PyYAML does not read as a person means them: ``010`` is 8 to it, and ``1:30`` is 90."""


class _Refused(Exception):
    """A text that is refused; the message says why."""


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Read ``["lr=0.1", "milestones=[30, 60]"]`` as a dict, each value as YAML.

    Raises:
        UserError: An equals sign is missing, a key is given twice, or YAML cannot read a value.
    """
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise UserError("key=value", repr(text), "for instance --set lr=0.05")
        if key in values:
            raise UserError(f"{key} once", f"--set {texts[key]} and --set {text}", "leave one of them out")
        texts[key] = text
        try:
            values[key] = _value(value.encode())
        except _Refused as error:
            raise UserError(
                "a value that YAML can read", f"{shown(value)} ({error})", f"correct --set {key}="
            ) from error
    return values


def read_yaml(path: Path) -> dict[Any, Any]:
    """Return the mapping in the YAML file ``path``.

    Raises:
        UserError: The file cannot be read, or holds anything other than a mapping.
    """
    try:
        if not os.path.isfile(path):
            raise _Refused("no such file" if not os.path.lexists(path) else "no plain file")
        with open(path, "rb") as file:
            values = _value(file.read(MOST_BYTES + 1))
    except (OSError, ValueError, _Refused) as error:
        raise UserError("a recipe in YAML", f"{path} ({error})", "correct the file or its path") from error
    if not isinstance(values, dict):
        got = f"{path} with {'nothing' if values is None else type(values).__name__}"
        raise UserError("a recipe of key: value lines", got, "correct the file")
    return values


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return ``values`` as YAML that :func:`read_yaml` reads, a key per line."""
    return _yaml().safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10**6)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise missing_package("pyyaml", "which reads recipes", error, "train") from error
    return yaml


def shown(value: Any) -> str:
    """Return ``repr(value)``, at most a line of it."""
    try:
        text = repr(value)
    except Exception:  # numbers of thousands of digits, lists a thousand deep
        return f"a value too long to print ({type(value).__name__})"
    return text if len(text) <= 80 else f"{text[:80]}…"


def _value(content: bytes) -> Any:
    """Return the value of YAML ``content``. Raises :class:`_Refused`."""
    yaml = _yaml()
    if len(content) > MOST_BYTES:
        raise _Refused(f"more than {MOST_BYTES:,} bytes")
    try:
        _check_shape(yaml.parse(content, yaml.SafeLoader), yaml)
        node = yaml.compose(content, yaml.SafeLoader)
        if node is not None:
            _check_keys(node, yaml)
        return yaml.safe_load(content)
    except _Refused:
        raise
    except Exception as error:  # also ValueError and IndexError, for malformed dates and numbers
        reason = " ".join(str(error).split())[:200]
        raise _Refused(reason or type(error).__name__) from error


def _check_shape(events: Iterable[Any], yaml: Any) -> None:
    """Refuse what would be large or deep once it is built. Reading events builds nothing."""
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(f"line {event.start_mark.line + 1}: an alias, *{event.anchor}; write the value itself")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _OLD_NUMBER.fullmatch(event.value):
            line = event.start_mark.line + 1
            raise _Refused(
                f"line {line}: {event.value[:40]}, which YAML 1.1 reads in base 8 or 60; write it in decimals"
            )
        if depth > MOST_DEPTH:
            raise _Refused(f"line {event.start_mark.line + 1}: values more than {MOST_DEPTH} levels deep")


def _check_keys(node: Any, yaml: Any) -> None:
    """Refuse a key that is given twice in a mapping, and name both lines."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.tag == "tag:yaml.org,2002:merge":
                    raise _Refused(f"line {line}: a merge key; write the values themselves")
                if key.value in lines:
                    raise _Refused(f"{shown(key.value)} twice, in lines {lines[key.value]} and {line}")
                lines[key.value] = line
            _check_keys(value, yaml)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, yaml)
