"""``basic_block`` on oneDNN: the loop of :mod:`.bottleneck` over two convolutions."""

from __future__ import annotations

from .bottleneck import bottleneck as basic_block

__all__ = ["basic_block"]
