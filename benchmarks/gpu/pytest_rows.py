"""Write each test's result at once, as a pytest plugin: ``-p resnet_fast.benchmarks.gpu.pytest_rows --rows FILE``.

A JUnit file is written at the end, which a process that is cut or crashes does not reach.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

_written: Path | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, help="file that gets one line of JSON per test")


def pytest_configure(config: pytest.Config) -> None:
    global _written
    _written = config.getoption("--rows")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Write the start: a test that crashes the process leaves only this line."""
    _write({"test": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the result of the call; setup and teardown count where they fail or skip."""
    if report.when != "call" and report.passed:
        return
    row: dict[str, Any] = {"test": report.nodeid, "seconds": round(report.duration, 3)}
    if report.passed:
        row["status"] = "passed"
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        row |= {"status": "skipped", "reason": reason.removeprefix("Skipped: ")}
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = str(crash.message if crash else report.longrepr).strip().splitlines()
        row |= {"status": "failed", "error": f"{report.when}: {lines[0] if lines else ''}"[:240]}
    _write(row)


def _write(row: dict[str, Any]) -> None:
    if _written is None:
        return
    with _written.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
