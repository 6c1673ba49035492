"""One name for one thing: class names are unique in the package, and the glossary lists every record."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

from tests.support import ROOT

PACKAGE = ROOT / "resnet_fast"

DROP_INS = {"BasicBlock", "Bottleneck", "ResNet", "CifarResNet", "PlainBlock", "Sequential"}
"""Fused classes keep the name of the stock class that they replace, so that a printed net reads the same."""

RECORD = re.compile(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)


@cache
def classes() -> dict[str, dict[Path, ast.ClassDef]]:
    """Return every class of the package by name and file."""
    found: dict[str, dict[Path, ast.ClassDef]] = defaultdict(dict)
    for path in PACKAGE.rglob("*.py"):
        if "benchmarks" not in path.parts:  # a link to the folder at the top
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found[node.name][path] = node
    return found


def is_record(node: ast.ClassDef) -> bool:
    bases, decorators = ([ast.unparse(part) for part in parts] for parts in (node.bases, node.decorator_list))
    return "NamedTuple" in bases or any(text.startswith("dataclass") for text in decorators)


def test_a_class_name_is_defined_once() -> None:
    twice = {
        name: sorted(str(path.relative_to(PACKAGE)) for path in files)
        for name, files in classes().items()
        if len(files) > 1 and name not in DROP_INS
    }
    assert not twice


def test_every_exempt_name_is_still_a_drop_in() -> None:
    assert classes().keys() >= DROP_INS


def test_the_glossary_lists_every_record_and_no_other() -> None:
    """Each row says what the record is, who makes it and who reads it; test_docs.py checks that the files exist."""
    page = (ROOT / "docs" / "glossary.md").read_text().partition("## Records")[2]
    listed = [name for name, *_ in RECORD.findall(page)]
    records = {
        name for name, files in classes().items() if not name.startswith("_") and any(map(is_record, files.values()))
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == records
