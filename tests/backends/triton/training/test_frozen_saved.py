"""What steps with frozen norms save, on real tensors, against the formulas of docs/tables/frozen-training.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from resnet_fast.benchmarks.tables import frozen_training as table
from resnet_fast.dispatch import record
from resnet_fast.spec import Spec
from tests.support import train_nets

pytestmark = pytest.mark.interpret

X = (2, 3, 17, 16)


def trunk(kind: str) -> Any:
    """Return a stem and two stages of a bottleneck each, with a projection, and frozen norms."""
    net = train_nets.freeze_norms(train_nets.imagenet(Bottleneck), kind)
    net.avgpool = net.fc = nn.Identity()
    return net


def saved(net: nn.Module, run: Callable[[Tensor], Tensor], autocast: torch.dtype | None = None) -> int:
    x = torch.randn(X).contiguous(memory_format=torch.channels_last)
    return table.saved(run, x, autocast, (*net.parameters(), *net.buffers()))[0]


@pytest.mark.parametrize(
    "kind,autocast",
    [("FrozenBatchNorm2d", torch.bfloat16), ("FrozenBatchNorm2d", None), ("eval mode", torch.float16)],
)
def test_a_real_step_saves_what_the_formulas_say(kind: str, autocast: torch.dtype | None) -> None:
    net = trunk(kind)
    with record.tape() as tape:
        fused = saved(net, train_nets.twin(net), autocast)
    every: list[Spec] = [event.spec for event in tape if isinstance(event, record.Ran)]  # type: ignore[misc]
    assert [spec.op for spec in every] == ["stem", "bottleneck", "bottleneck"]
    assert fused == table.saved_by_fused(every, autocast is not None)
    assert saved(net, net, autocast) == table.saved_by_stock(every, kind, autocast is not None)


def test_a_pool_that_keeps_indices_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the winners of a pool's windows in 64 bit, as PyTorch keeps them."""
    from resnet_fast.backends.triton.training import pool_winner

    net = trunk("eval mode")
    monkeypatch.setattr(pool_winner, "winner_dtype", lambda pool: torch.int64)
    net.layer1 = net.layer2 = nn.Sequential()
    with record.tape() as tape:
        fused = saved(net, train_nets.twin(net))
    (stem,) = [event.spec for event in tape if isinstance(event, record.Ran)]
    assert fused == table.saved_by_fused([stem], False) + 7 * table.pooled(stem)


@pytest.mark.parametrize("stages", [("conv1", "bn1"), ("conv1", "bn1", "layer1"), ("conv1", "bn1", "layer1", "layer2")])
def test_frozen_stages_keep_nothing(stages: tuple[str, ...]) -> None:
    """Stages without gradients at the beginning: what is kept is that of the others, and their input."""
    net = trunk("eval mode")
    for name in stages:
        getattr(net, name).requires_grad_(False)
    with record.tape() as tape:
        fused = saved(net, train_nets.twin(net))
    every: list[Spec] = [event.spec for event in tape if isinstance(event, record.Ran)]  # type: ignore[misc]
    frozen, trained = every[: len(stages) - 1], every[len(stages) - 1 :]
    assert not any(spec.grad for spec in frozen) and all(spec.grad for spec in trained)
    assert fused == table.saved_by_fused(trained, False) + (table.x_of(trained[0]) if trained else 0)


def test_the_table_is_what_the_code_says() -> None:
    """Counted and by formula agree in every row, the goal is met where it can be, and what moves is the least."""
    found = json.loads(table.JSON.read_text())
    rows = [table.SavedRow(**one) for one in found["saved"]]
    assert {(r.norm, r.how, r.batch) for r in rows} == {
        (norm, how, batch) for norm in table.NORMS for how in table.HOW for batch in table.BATCHES
    }
    for r in rows:
        every, autocast = table.parts(r.batch, table.HOW[r.how]), r.how.startswith("autocast")
        assert r.stock * 1e6 == pytest.approx(table.saved_by_stock(every, r.norm, autocast), abs=1), r
        assert r.fused * 1e6 == pytest.approx(table.saved_by_fused(every, autocast), abs=1), r
        keeps_activations_only = r.norm == "FrozenBatchNorm2d" and not autocast
        assert (r.fused <= 0.6 * r.stock) == (not keeps_activations_only), r
    counted, least = sum(found["counted"].values()), sum(map(table.activations_of_fused, table.parts(1, "float16")))
    assert counted == least
    assert table.PAGE.read_text() == table.page(found)
