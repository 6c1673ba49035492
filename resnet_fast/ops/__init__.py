"""The ops ``torch.ops.resnet_fast.{conv_bn_act, bn_act, bottleneck, basic_block, stem}``, defined by this import."""

from . import basic_block, bn_act, bottleneck, conv_bn_act, stem
from .run import run

__all__ = ["basic_block", "bn_act", "bottleneck", "conv_bn_act", "run", "stem"]
