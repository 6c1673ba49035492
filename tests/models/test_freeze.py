"""``freeze``: what a frozen net skips, what ends the promise, and what it never skips."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import paper_nets, parameter_cache
from resnet_fast.blocks.frozen import is_frozen
from resnet_fast.blocks.snapshot import Layers
from resnet_fast.errors import UserError
from tests.support.graph_cases import CpuRecorder, eager, image, net, recorder, small

__all__ = ["net", "recorder"]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of checks of layers and of weights that have run."""
    found: list[str] = []
    for owner, name in ((Layers, "hold"), (Layers, "same_tensors"), (parameter_cache.Stamps, "hold")):
        check = getattr(owner, name)

        def spy(self: Any, *args: Any, check: Any = check, label: str = f"{owner.__name__}.{name}") -> Any:
            found.append(label)
            return check(self, *args)

        monkeypatch.setattr(owner, name, spy)
    return found


def plain() -> nn.Module:
    return resnet_fast.accelerate(small())


@torch.no_grad()
def test_a_frozen_net_is_not_checked(checks: list[str]) -> None:
    model, x = plain(), image()
    want = eager(model, x)
    resnet_fast.freeze(model)
    model(x)
    checks.clear()
    torch.testing.assert_close(model(x), want)
    model(x[:1])
    assert not checks
    resnet_fast.unfreeze(model)
    model(x)
    assert set(checks) == {"Layers.hold", "Layers.same_tensors", "Stamps.hold"}


def test_a_frozen_replay_checks_only_its_call(
    net: nn.Module, recorder: type[CpuRecorder], checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = image()
    captured: list[Tensor] = []

    def capture(self: CpuRecorder, fn: Callable[[Tensor], Tensor], static: Tensor) -> Any:
        captured.append(fn(static))
        return lambda: None, captured[-1]

    monkeypatch.setattr(recorder, "capture", capture)
    resnet_fast.freeze(net)
    with torch.inference_mode():
        net(x)
        checks.clear()
        assert torch.equal(net(x), captured[0])
        assert not checks
        with resnet_fast.use_backend("reference"):
            net(x)
        net(x[:1])
    assert len(captured) == 3
    assert net(x).requires_grad and len(captured) == 3


def calls_of_a_replay(net: nn.Module, recorder: type[CpuRecorder], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many functions, Python's and C's, a frozen replay calls."""
    monkeypatch.setattr(recorder, "capture", lambda self, fn, x: (lambda: None, fn(x)))
    x, events = image(), 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal events
        events += event in ("call", "c_call")

    with torch.inference_mode(), resnet_fast.freeze(net):
        for _ in range(2):
            net(x)
        sys.setprofile(count)
        try:
            net(x)
        finally:
            sys.setprofile(None)
    return events


def test_the_cost_of_a_frozen_replay_does_not_grow_with_the_net(
    recorder: type[CpuRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (
        calls_of_a_replay(resnet_fast.accelerate(model.eval(), cuda_graph=True), recorder, monkeypatch)
        for model in (small(), paper_nets.cifar_resnet56(shortcut="B"))
    )
    assert few == many < 200


@torch.no_grad()
def test_the_promise_is_taken_at_its_word() -> None:
    model, x = plain(), image()
    resnet_fast.freeze(model)
    before = model(x)
    model.layer2[0].conv1.weight.mul_(0.5)
    assert torch.equal(model(x), before)
    resnet_fast.unfreeze(model)
    torch.testing.assert_close(model(x), eager(model, x))
    assert not torch.allclose(model(x), before)


def write(model: nn.Module) -> None:
    model.layer2[0].conv1.weight.mul_(0.5)


def write_one_element(model: nn.Module) -> None:
    model.layer3[0].conv2.weight.data[3, 5, 1, 2] += 100


def edit_a_layer(model: nn.Module) -> None:
    model.bn1.eps = 0.5


def train_a_little(model: nn.Module) -> None:
    model.train()(3 + image())
    model.eval()


BEFORE = [write, write_one_element, edit_a_layer, train_a_little]


@torch.no_grad()
@pytest.mark.parametrize("edit", BEFORE)
def test_a_change_before_the_promise_is_seen(edit: Callable[[nn.Module], None]) -> None:
    model, x = plain(), image()
    model(x)
    edit(model)
    resnet_fast.freeze(model)
    torch.testing.assert_close(model(x), eager(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("edit", [write, edit_a_layer, train_a_little])
def test_a_change_before_the_promise_is_recorded(
    edit: Callable[[nn.Module], None], net: nn.Module, recorder: type[CpuRecorder]
) -> None:
    x = image()
    with torch.no_grad():
        net(x)
        edit(net)
        resnet_fast.freeze(net)
        torch.testing.assert_close(net(x), eager(net, x), rtol=1e-4, atol=1e-4)


ENDS: dict[str, Callable[[nn.Module], Any]] = {
    "train": lambda m: m.train(),
    "load_state_dict": lambda m: m.load_state_dict(small().state_dict()),
    "load_state_dict, assign": lambda m: m.load_state_dict(small().state_dict(), assign=True),
    "to": lambda m: m.to(torch.float64),
    "unfreeze": resnet_fast.unfreeze,
    "accelerate": resnet_fast.accelerate,
    "restore": resnet_fast.restore,
}


@torch.no_grad()
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("around", [False, True])
def test_what_ends_the_promise(end: str, around: bool) -> None:
    model = plain()
    outer = nn.Sequential(model).eval() if around else model
    state = small().state_dict()
    resnet_fast.freeze(outer)
    outer(image())
    assert is_frozen(model)
    if around and end.startswith("load_state_dict"):
        outer.load_state_dict({f"0.{name}": t for name, t in state.items()}, assign=end.endswith("assign"))
    else:
        ENDS[end](outer)
    assert not is_frozen(model)
    model.eval()
    x = image().to(model.conv1.weight.dtype)
    torch.testing.assert_close(model(x), resnet_fast.restore(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-4)


def test_eval_does_not_end_it() -> None:
    model = plain()
    resnet_fast.freeze(model)
    model.eval()
    assert is_frozen(model)


def test_a_with_statement_ends_it() -> None:
    model = plain()
    with resnet_fast.freeze(model) as same:
        assert same is model and is_frozen(model)
    assert not is_frozen(model)
    with pytest.raises(KeyError), resnet_fast.freeze(model):
        raise KeyError
    assert not is_frozen(model)


@torch.no_grad()
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_are_not_frozen(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, x = plain(), image()
    names = list(model.state_dict())
    resnet_fast.freeze(model)
    model(x)
    other = duplicate(model)
    assert is_frozen(model) and not is_frozen(other) and list(model.state_dict()) == names
    other.fc.weight.mul_(2)
    other.layer1[0].conv1.stride = (1, 1)
    torch.testing.assert_close(other(x), eager(other, x))


def test_a_module_without_a_net_is_refused() -> None:
    apart = nn.Sequential(*plain().children())
    for model, text in (
        (nn.Linear(1, 1), "accelerate"),
        (small(), "accelerate"),
        (apart, "blocks outside of one; call it without freeze"),
        (plain().train(), "eval"),
    ):
        with pytest.raises(UserError, match=text):
            resnet_fast.freeze(model)
    half = plain()
    half.layer2.train()
    with pytest.raises(UserError, match="layer2 in training mode"):
        resnet_fast.freeze(half)
    with pytest.raises(UserError, match=r"nn\.Module"):
        resnet_fast.freeze("resnet50")  # type: ignore[type-var]
    assert resnet_fast.unfreeze(half) is half


@torch.no_grad()
def test_forgotten_weights_are_derived_again() -> None:
    model, x = plain(), image()
    resnet_fast.freeze(model)
    model(x)
    write(model)
    resnet_fast.clear_derived()
    torch.testing.assert_close(model(x), eager(model, x))


def test_values_that_overflow_are_still_seen() -> None:
    model = plain()
    resnet_fast.freeze(model)
    x: Tensor = image()
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        assert model(x)[0].isnan().all()
