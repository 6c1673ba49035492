"""``basic_block``: y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut), He et al. 2015, figure 5 left.

The arguments are those of :mod:`.bottleneck`, with two convolutions on the residual branch.
"""

from __future__ import annotations

from .bottleneck import BLOCK_SCHEMA, block_binder, block_flops
from .register import register

register("basic_block", BLOCK_SCHEMA, block_binder("basic_block", 2), block_flops(2))
