"""Pack a launch's parameters, and find the function that launches its kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...calls import Conv
from ...spec import LaunchSpec
from ...tuning.configs import Config
from ...tuning.routes import stem_step
from . import bottleneck, conv_bn_act, conv_bn_act_1x1, conv_bn_act_3x3, stem, stock
from .launch import FoldedWeights

Launcher = Callable[..., Tensor]
"""``launcher(launch, config, packed, x, res, xp)``; one with ``config.splits`` also takes ``arrivals``."""

LAUNCHERS: dict[str, Launcher] = {
    "conv_bn_act_1x1": conv_bn_act_1x1.conv_bn_act_1x1,
    "conv_bn_act_3x3": conv_bn_act_3x3.conv_bn_act_3x3,
    "conv_bn_act": conv_bn_act.conv_bn_act,
    "stem": stem.stem,
    "bottleneck": bottleneck.bottleneck,
    "cudnn": stock.stock,
    "cudnn_fused": stock.stock,
}


def parameters(
    launch: LaunchSpec, config: Config, members: list[tuple[Tensor, Tensor]], projection: tuple[Tensor, Tensor] | None
) -> FoldedWeights:
    """Return a launch's parameters from the packed (weight, bias) of its convolutions and of its projection."""
    weight, bias = members[-1]
    if config.stock:
        return FoldedWeights(weight, bias.to(weight.dtype))
    if launch.kernel == "stem":
        weight = _padded_rows(weight, stem_step(launch.last))
    inner, inner_bias = members[0] if len(members) > 1 else (None, None)
    if projection is None:
        return FoldedWeights(weight, bias, inner, inner_bias)
    return FoldedWeights(weight, bias + projection[1], inner, inner_bias, projection[0])


def pack(conv: Conv, weight: Tensor, bias: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weight (Co, R, S, Ci/groups), dense in ``dtype``, and the fp32 bias.

    ``groups``: number of groups after merging; the weights between members of a merged group are zero.
    """
    merge = conv.groups // groups
    if merge > 1:
        co, cig, r, s = weight.shape
        wide = weight.new_zeros(groups, merge, co // conv.groups, merge, cig, r, s)
        parts = weight.reshape(groups, merge, co // conv.groups, cig, r, s)
        for member in range(merge):
            wide[:, member, :, member] = parts[:, member]
        weight = wide.reshape(co, merge * cig, r, s)
    return weight.permute(0, 2, 3, 1).to(dtype).contiguous(), bias.contiguous()


def _padded_rows(weight: Tensor, step: int) -> Tensor:
    """Pad filter rows with zeros: (Co, R, S, Ci) -> (Co, R, step)."""
    rows = weight.flatten(2)
    return F.pad(rows, (0, step - rows.shape[2])).contiguous()
