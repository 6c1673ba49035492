"""The ops ``torch.ops.resnet_fast.{conv_bn_act, bottleneck, basic_block, stem}``, defined by this import."""

from .. import parameter_cache
from ..dispatch import select
from . import basic_block, bottleneck, conv_bn_act, specs, stem, train
from .infer import Known, infer_alike, infer_tiles
from .run import is_plain_inference, run
from .warm import ready_to_train

__all__ = [
    "Known",
    "basic_block",
    "bottleneck",
    "conv_bn_act",
    "forget_decisions",
    "infer_alike",
    "infer_tiles",
    "is_plain_inference",
    "ready_to_train",
    "run",
    "stem",
]


def forget_decisions() -> None:
    """Choose backends and pack parameters anew, because what CPU tensors can run on has changed."""
    specs.forget()
    select.forget()
    train.forget()
    parameter_cache.clear()
