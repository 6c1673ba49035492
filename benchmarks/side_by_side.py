"""Compare the answers of two nets to the same pictures, picture by picture, and their errors with the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_fast import numerics

from .compare import fp64


@dataclass(frozen=True)
class AnswerPair:
    """Both nets' answers to one picture.

    ``difference``: largest ``|accelerated - stock|`` over the largest ``|fp64|``. Errors are ``‖out - fp64‖ / ‖fp64‖``;
    ``budget`` is the accelerated net's limit: twice the stock net's own error and a rounding floor.
    """

    image: str
    stock_top1: int
    accelerated_top1: int
    difference: float
    stock_error: float
    accelerated_error: float
    budget: float

    @property
    def agree(self) -> bool:
        """Whether both nets have the same first class."""
        return self.stock_top1 == self.accelerated_top1

    @property
    def within(self) -> bool:
        """Whether the accelerated net's error is within the budget."""
        return self.accelerated_error <= self.budget


def largest_gemm_k(model: nn.Module) -> int:
    """Return the most products that one output of ``model`` sums: those of the widest convolution or linear layer."""
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return max((m.weight[0].numel() for m in layers), default=1)


@torch.inference_mode()
def answers(stock: nn.Module, accelerated: nn.Module, x: Tensor, names: Sequence[str]) -> list[AnswerPair]:
    """Compare two nets in eval mode.

    Args:
        stock: runs in the layout of ``x``, and again in fp64 as the truth.
        accelerated: the net that is compared with it.
        x: pictures (N, 3, H, W) in the nets' dtype.
        names: one per picture.
    """
    plain, ours, truth = stock(x), accelerated(x), fp64(stock, x)
    gemm_k = largest_gemm_k(stock)
    out = []
    for i, name in enumerate(names):
        report = numerics.compare(ours[i], truth[i], plain[i])
        budget = numerics.budget(report, plain.dtype, gemm_k)
        out.append(
            AnswerPair(
                image=name,
                stock_top1=int(plain[i].argmax()),
                accelerated_top1=int(ours[i].argmax()),
                difference=float((ours[i] - plain[i]).abs().max().double() / truth[i].abs().max()),
                stock_error=float(report.eager_rel or 0.0),
                accelerated_error=report.rel,
                budget=budget.rel,
            )
        )
    return out
