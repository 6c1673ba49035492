"""The record of what ran: stock modules are counted like ops, and compilers do not see it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fast import BackendError, reset_stats, stats, strict
from resnet_fast.dispatch import record
from tests.support.op_cases import make


def test_a_stock_module_is_counted_with_its_reason() -> None:
    reset_stats()
    module = nn.Identity()
    with record.tape() as tape:
        record.stock(module, "bottleneck", "expected no hook, got one; remove it")
    assert stats()["calls"] == {"bottleneck/stock": 1}
    assert stats()["fallbacks"] == {"bottleneck runs its stock layers: expected no hook, got one; remove it": 1}
    assert [(e.module, e.reason) for e in tape] == [(module, "expected no hook, got one; remove it")]


def test_strict_refuses_a_stock_module_and_counts_nothing() -> None:
    reset_stats()
    with strict(), pytest.raises(BackendError, match="strict mode: stem runs its stock layers: because"):
        record.stock(nn.Identity(), "stem", "because")
    assert stats() == {"calls": {}, "fallbacks": {}}


def test_strict_nests_and_ends() -> None:
    p = make("conv_bn_act", dtype=torch.float64)
    with strict():
        with strict():
            pass
        with pytest.raises(BackendError):
            p.run()
    p.run()


def test_tapes_nest() -> None:
    p = make("conv_bn_act")
    with record.tape() as outer:
        p.run()
        with record.tape() as inner:
            p.run()
        p.run()
    assert (len(outer), len(inner)) == (2, 1)


def test_stats_is_a_copy() -> None:
    reset_stats()
    make("conv_bn_act").run()
    taken = stats()
    make("conv_bn_act").run()
    assert taken["calls"] == {"conv_bn_act/onednn": 1} and stats()["calls"] == {"conv_bn_act/onednn": 2}
