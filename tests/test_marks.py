"""make finds the files of a part by the text of its mark."""

from __future__ import annotations

import re

from tests.support import ROOT


def test_marks_of_parts_stand_in_the_files_of_the_tests_that_have_them() -> None:
    """A test that got one from a shared file would run in no part."""
    others = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_")]
    assert len(others) > 20
    assert not [path.name for path in others if re.search(r"\bmark\.(slow|alone|interpret)\b", path.read_text())]
