"""Helpers that tests share: problems, nets, the emulator's build. Import them as ``tests.support.NAME``."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository: ``cwd`` of a process that imports ``tests`` itself."""
