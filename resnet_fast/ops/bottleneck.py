"""``bottleneck``: y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut), He et al. 2015, figure 5."""

from __future__ import annotations

from .block import block_op
from .register import register

register(block_op("bottleneck", 3))
