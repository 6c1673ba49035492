"""Every function of a backend runs with the device of its call current, without a GPU and on one with a second device.

The interpreter runs whole training steps so: tests/backends/triton/test_kernel_device.py.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import resnet_fast
from resnet_fast import accelerate
from resnet_fast.current_device import numbered, on_device, on_device_of_call
from resnet_fast.dispatch import catalog
from resnet_fast.impl import Impl
from tests.support.two_devices import TwoDevices

OPS = ("conv_bn_act", "stem", "bottleneck", "basic_block", "net")


class OneTensor(NamedTuple):
    """As much of a call as the guard looks at."""

    x: Tensor


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> TwoDevices:
    return TwoDevices(monkeypatch)


def tensor_on(index: int) -> Tensor:
    x = torch.zeros(1)
    x.get_device = lambda: index  # type: ignore[method-assign]
    return x


@pytest.mark.parametrize(("of_tensor", "during", "changes"), [(-1, 0, 0), (0, 0, 0), (1, 1, 2)])
def test_the_device_is_entered_and_left(cuda: TwoDevices, of_tensor: int, during: int, changes: int) -> None:
    call = OneTensor(tensor_on(of_tensor))
    found = on_device_of_call(lambda given, *rest: (given is call, rest, cuda.current))(call, 2, 3)
    assert found == (True, (2, 3), during)
    assert (cuda.current, cuda.changes) == (0, changes)


def test_the_device_is_left_after_an_exception(cuda: TwoDevices) -> None:
    seen = []

    def fails(call: OneTensor) -> None:
        seen.append(cuda.current)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        on_device_of_call(fails)(OneTensor(tensor_on(1)))
    assert seen == [1] and cuda.current == 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_every_entry_of_every_backend_for_gpus(
    cuda: TwoDevices, op: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace the functions of each backend's module and call them as dispatch does."""
    seen: list[str] = []

    def replaced(name: str) -> Any:
        def function(call: OneTensor, *rest: Any) -> None:
            seen.append(f"{name} on {cuda.current}")
            if fails:
                raise ZeroDivisionError

        return function

    def module(impl: Impl, names: tuple[str, ...]) -> ModuleType:
        made = ModuleType(impl.module)
        for name in names:
            setattr(made, name, replaced(name))
        return made

    for impl in [i for i in catalog.impls(op) if "cuda" in i.devices]:
        copy = Impl(**{name: getattr(impl, name) for name in impl.__dataclass_fields__})
        modules = {impl.module: module(impl, ("run", "prepare")), impl.training: module(impl, ("forward", "backward"))}
        monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
        entries = [copy.run, copy.prepare]
        if impl.training:
            entries += [copy.trainer.forward, copy.trainer.backward]
        monkeypatch.undo()
        TwoDevices.__init__(cuda, monkeypatch)
        for entry in entries:
            try:
                entry(OneTensor(tensor_on(1)), None, None)
            except ZeroDivisionError:
                assert fails
            assert cuda.current == 0
    trains = op != "net"
    every = ["run", "prepare", *(["forward", "backward"] if trains else []), "run", "prepare"]
    assert seen == [f"{name} on 1" for name in every]


def test_a_backend_of_torch_operators_is_not_wrapped() -> None:
    """PyTorch's operators enter the device of their tensors, and tracers must see them alone."""
    for op in OPS:
        for impl in catalog.impls(op):
            assert hasattr(impl.run, "__wrapped__") == (impl.backend in ("triton", "cuda"))


def test_a_device_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert numbered(torch.device("cuda")) == torch.device("cuda", 1)
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        assert numbered(device) == device
    with on_device(torch.device("cpu")):
        pass


@pytest.fixture
def second() -> torch.device:
    """The second GPU, while the first one stays current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.cuda.set_device(0)
    return torch.device("cuda", 1)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_inference_on_a_second_gpu(second: torch.device, backend: str, graph: bool) -> None:
    if not catalog.availability()[backend]:
        pytest.skip(catalog.availability()[backend].reason)
    net = resnet_fast.resnet50().eval().to(second, torch.float16)
    x = torch.randn(2, 3, 224, 224, device=second, dtype=torch.float16)
    with torch.inference_mode():
        with resnet_fast.use_backend("reference"):
            expected = net(x)
        y = accelerate(net, backend=backend, cuda_graph=graph)(x)
        again = net(x)
    assert y.device == second and torch.cuda.current_device() == 0
    assert torch.equal(y, again)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_a_training_step_on_a_second_gpu(second: torch.device) -> None:
    net = accelerate(resnet_fast.resnet18().train().to(second), backend="triton")
    with torch.autocast("cuda", torch.bfloat16):
        loss = net(torch.randn(4, 3, 64, 64, device=second)).float().square().mean()
    loss.backward()
    torch.cuda.synchronize(second)
    assert torch.cuda.current_device() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.gpu
def test_tensors_on_two_gpus_are_refused(second: torch.device) -> None:
    net = accelerate(resnet_fast.resnet18().eval().cuda(0), backend="triton")
    with torch.inference_mode(), pytest.raises(resnet_fast.UserError, match=r"on cuda:1, .*call model\.to\('cuda:1'\)"):
        net(torch.randn(1, 3, 64, 64, device=second))
