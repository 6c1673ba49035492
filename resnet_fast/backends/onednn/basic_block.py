"""``basic_block`` on oneDNN: the loop of :mod:`.bottleneck` over two convolutions."""

from __future__ import annotations

from .bottleneck import prepare as prepare
from .bottleneck import run as run
