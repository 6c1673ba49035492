"""Launches on meta tensors: what is recorded, and which GPU answers for tensors that are on none."""

from __future__ import annotations

import pytest
import torch

from resnet_fast import devices
from resnet_fast.backends.triton import device, launch
from resnet_fast.backends.triton.device import Target
from resnet_fast.tuning import tables

META = torch.device("meta")


def kernel_of(made: list[tuple[object, ...]]) -> dict[tuple[int, ...], object]:
    """Return a stand-in for a kernel: ``kernel[grid](...)`` notes that it was launched."""

    class Launches(dict[tuple[int, ...], object]):
        def __missing__(self, grid: tuple[int, ...]) -> object:
            return lambda *arguments, **constants: made.append((grid, arguments, constants))

    return Launches()


def test_a_recording_keeps_launches_and_makes_none() -> None:
    made: list[tuple[object, ...]] = []
    kernel = kernel_of(made)
    x = torch.empty(4, device="meta")
    with launch.recording() as outer:
        launch.submit(kernel, (1,), x, 7, BLOCK=16)
        with launch.recording() as inner:
            launch.submit(kernel, (2,), x)
        launch.submit(kernel, (3, 1), x)
    assert [(one.grid, one.constants) for one in outer] == [((1,), {"BLOCK": 16}), ((3, 1), {})]
    assert outer[0].arguments[0] is x and outer[0].arguments[1] == 7
    assert [one.grid for one in inner] == [(2,)]
    assert not made
    launch.submit(kernel, (4,), x)
    assert [grid for grid, _, _ in made] == [(4,)]


def test_meta_tensors_belong_to_the_planned_gpu() -> None:
    table = tables.Table("some GPU")
    with device.planned_for(Target(devices.gpu("a100"), table)):
        assert device.device_of(META) == devices.gpu("a100")
        assert device.table_of(META) is table
        version = device.table_version(META)
        with device.planned_for(Target(devices.gpu("b200"), table)):
            assert device.device_of(META) == devices.gpu("b200")
            assert device.table_version(META) != version
        assert device.table_version(META) == version


@pytest.mark.parametrize("ask", [device.device_of, device.table_of, device.table_version])
def test_meta_tensors_belong_to_no_gpu_otherwise(ask: object) -> None:
    with pytest.raises(RuntimeError, match="planned_for"):
        ask(META)  # type: ignore[operator]
