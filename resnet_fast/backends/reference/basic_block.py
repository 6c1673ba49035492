"""``basic_block`` in eager PyTorch: the loop of :mod:`.bottleneck` over two convolutions."""

from __future__ import annotations

from .bottleneck import run as run
