"""Planned passes in the interpreter: a program run launch by launch gives the launchers' bits, in no more memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.train_cases import case, fused, step

pytestmark = pytest.mark.interpret


def forget_plans() -> None:
    from resnet_fast.backends.triton.training import chain, frozen_chain

    chain._plans.clear()
    frozen_chain._plans.clear()


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Run every pass as a program, launch by launch; the list holds each program, or the reason against it."""
    from resnet_fast.backends.triton import program, submission

    made: list[Any] = []

    def planned(launchers: Any, leaves: Any, fixed: Any = (), numbers: int = 0) -> Any:
        found = program.plan(launchers, leaves, numbers)
        made.append(found)
        return found if isinstance(found, str) else found.replay

    forget_plans()
    monkeypatch.setattr(submission, "planned", planned)
    yield made
    forget_plans()


def directly(run: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return a step's results with the launchers run one by one."""
    from resnet_fast.backends.triton import submission

    with monkeypatch.context() as patched:
        run_all = lambda self, key, launchers, leaves, numbers=(): launchers([*leaves, *numbers])  # noqa: E731
        patched.setattr(submission.Passes, "run", run_all)
        forget_plans()
        return run()


CASES: dict[str, dict[str, Any]] = {
    "bottleneck": {"op": "bottleneck"},
    "projection": {"op": "bottleneck", "co": 16, "stride": 2, "h": 7, "projection": True},
    "given shortcut": {"op": "bottleneck", "co": 16, "stride": 2, "residual": True},
    "basic block": {"op": "basic_block", "co": 24, "projection": True, "stride": 2, "h": 7},
    "frozen norms": {"op": "bottleneck", "co": 8, "projection": True, "frozen": (1,), "bias": True},
    "no affine": {"op": "bottleneck", "affine": False},
    "nchw": {"op": "bottleneck", "layout": "nchw"},
    "conv_bn_act": {"op": "conv_bn_act"},
    "residual": {"op": "conv_bn_act", "residual": True},
    "stem": {"op": "stem", "ci": 3, "co": 8, "k": 7, "stride": 2, "h": 9, "w": 8},
    "frozen": {"op": "basic_block", "co": 24, "stride": 2, "h": 7, "batch_stats": False},
    "frozen stem": {"op": "stem", "ci": 3, "co": 8, "k": 7, "stride": 2, "h": 9, "w": 8, "batch_stats": False},
}


QUICK = ("projection", "residual", "frozen")


@pytest.mark.parametrize(
    "name,dtype",
    [pytest.param(name, torch.float16, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
    + [pytest.param("projection", torch.float32, marks=pytest.mark.slow)],
)
def test_a_program_gives_the_bits_of_its_launchers(
    name: str, dtype: torch.dtype, programs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = case(dtype=dtype, **CASES[name])
    direct = directly(lambda: step(p, fused), monkeypatch)
    assert not programs
    for _ in range(2):
        for key, value in step(p, fused).items():
            torch.testing.assert_close(value, direct[key], rtol=0, atol=0, equal_nan=True, msg=key)
    assert len(programs) == 2


def test_a_step_that_copies_between_kernels_is_launched_one_by_one(
    programs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is the caller's own tensor is copied by PyTorch."""
    step(case(op="conv_bn_act", dtype=torch.float16, residual=True, relu=False, k=1), fused)
    assert not isinstance(programs[0], str)
    assert programs[1] == "clone runs between the kernels"


class Allocated(TorchDispatchMode):
    """Count the bytes that live at the same time, at most, as a caching allocator without waste would have to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            memory = found.untyped_storage()
            self.held[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
            self.peak = max(self.peak, sum(size for ref, size in self.held.values() if not ref.expired()))
        return found


class Nowhere:
    """A recording that keeps no launch, and so no tensor alive."""

    tile = None

    def add(self, *launch: Any) -> None:
        pass


def bottleneck(ci: int, width: int, stride: int, size: int) -> Any:
    """Return the call of a bottleneck of ResNet-50 at batch 256 in bfloat16, without memory."""
    from resnet_fast.calls import Call, Conv, Norm

    def dense(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)

    def conv(co: int, k: int, ci: int, stride: int = 1) -> Conv:
        return Conv(dense(co, ci, k, k), None, (stride, stride), (k // 2, k // 2), (1, 1), 1)

    convs = [conv(width, 1, ci), conv(width, 3, width, stride), conv(4 * width, 1, width)]
    if projection := stride > 1 or ci != 4 * width:
        convs.append(conv(4 * width, 1, ci, stride))
    channels = [len(c.weight) for c in convs]
    norms = [Norm(*(torch.empty(c, device="meta") for _ in range(4)), True, 0.1, 1e-5) for c in channels]
    x = dense(256, ci, size, size, dtype=torch.bfloat16)
    return Call("bottleneck", x, tuple(convs), tuple(norms), projection=projection)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], list[tuple[Any, int]]]]:
    """Return a function from a call to (program, most bytes of its launchers) of its forward and backward pass."""
    from resnet_fast import devices
    from resnet_fast.backends.triton import launch, program, submission
    from resnet_fast.backends.triton.device import Target, planned_for
    from resnet_fast.backends.triton.training import chain
    from resnet_fast.ops.specs import check
    from resnet_fast.tuning.tables import Table

    found: list[tuple[Any, int]] = []

    def planned(launchers: Any, leaves: Any, fixed: Any, numbers: int) -> str:
        made = program.plan(launchers, leaves, numbers)
        launch._recording.set(Nowhere())  # type: ignore[arg-type]
        given = [*program.meta(leaves), *[0.1] * numbers]
        with Allocated() as counted:
            launchers(given)
        assert not isinstance(made, str), made
        found.append((made, counted.peak))
        return ""

    def run(call: Any) -> list[tuple[Any, int]]:
        needs = [True, False, *[t is not None for t in call.leaves()[2:]]]
        with planned_for(Target(devices.gpu("h100"), Table("none"))):
            spec = check(call, True)
            z, saved, _ = chain.forward(call, spec, "raw", True)
            chain.backward(call, spec, saved, z, torch.empty_like(z), needs)
        assert len(found) == 2
        return found

    monkeypatch.setattr(submission, "planned", planned)
    before = launch._recording.get()
    yield run
    launch._recording.set(before)


LAUNCHES = {(256, 64, 1, 56): (7, 7), (256, 128, 2, 56): (8, 9)}
"""Of the forward and the backward pass of a bottleneck."""


@pytest.mark.parametrize("ci,width,stride,size", LAUNCHES)
def test_launches_of_a_bottleneck(ci: int, width: int, stride: int, size: int, passes: Any) -> None:
    made = [len(program.steps) for program, _ in passes(bottleneck(ci, width, stride, size))]
    assert tuple(made) == LAUNCHES[ci, width, stride, size]


@pytest.mark.parametrize("ci,width,stride,size", [(64, 64, 1, 56), (256, 128, 2, 56), (1024, 256, 1, 14)])
def test_a_program_holds_no_more_memory_than_its_launchers(
    ci: int, width: int, stride: int, size: int, passes: Any
) -> None:
    for made, peak in passes(bottleneck(ci, width, stride, size)):
        assert made.nbytes <= peak
