"""The ops ``torch.ops.resnet_fast.{conv_bn_act, bottleneck, basic_block, stem}``, defined by this import."""

from . import basic_block, bottleneck, conv_bn_act, stem
from .infer import Known, infer_alike, infer_tiles
from .run import is_plain_inference, run
from .warm import ready_to_train

__all__ = [
    "Known",
    "basic_block",
    "bottleneck",
    "conv_bn_act",
    "infer_alike",
    "infer_tiles",
    "is_plain_inference",
    "ready_to_train",
    "run",
    "stem",
]
