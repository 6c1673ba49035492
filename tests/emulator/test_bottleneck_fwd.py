"""A whole bottleneck against fp64, in every variant of its two kernels; traffic, bank conflicts, shared memory.

With 64 channels between, an H100 runs bottleneck_fwd_sm90a.cu, a B200 bottleneck_fwd.cu with weights that stay, an A100
the same with weights that are streamed.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resnet_fast import numerics
from resnet_fast.benchmarks.emulation import A100, B200, H100, Emulator, conflicts
from tests.support.bottleneck_cases import Block, block, native
from tests.support.grids import covering

CHANNELS = [(256, 64, 256), (64, 64, 256), (512, 128, 512), (256, 128, 256), (128, 128, 512)]
DEVICES = {"h100": H100, "a100": A100, "b200": B200}
VARIANTS = [(c, name) for c in CHANNELS for name in DEVICES if c[1] == 64 or name != "b200"]  # else as on an H100


def check(b: Block, y: Tensor) -> None:
    cmid = b.weights[0].shape[0]
    numerics.assert_close(y, b.eager(torch.float64), b.eager(b.x.dtype), 9 * cmid, b.eager(torch.float64, relu=False))


def test_which_kernel_runs_where(emulator: Path) -> None:
    ran = {}
    for channels, device in VARIANTS:
        with Emulator(emulator, **DEVICES[device] | {"sms": 1}) as run:
            block(1, 1, 1, *channels, torch.float16).run()
            ran[channels, device] = run.launches()[0]["kernel"].partition("<")[0]
    hopper = {key for key, kernel in ran.items() if kernel == "bottleneck_fwd_sm90a_kernel"}
    assert hopper == {((256, 64, 256), "h100"), ((64, 64, 256), "h100")}
    assert set(ran.values()) == {"bottleneck_fwd_kernel", "bottleneck_fwd_sm90a_kernel"}


# Each kernel on each image and in each dtype.
@pytest.mark.parametrize(
    ("variant", "image", "dtype"),
    covering(product(VARIANTS, [(1, 8, 8), (3, 7, 15)], [torch.bfloat16, torch.float16])),
    ids=str,
)
def test_error_is_within_eagers(variant, image, dtype, emulator: Path) -> None:
    channels, device = variant
    b = block(*image, *channels, dtype)
    with Emulator(emulator, **DEVICES[device] | {"sms": 2}):
        y = b.run()
    check(b, y)


def test_a_kept_tensor_map_is_only_for_its_own_shape(emulator: Path) -> None:
    """The same memory as another image, as the allocator gives it to the next tensor: the address alone is no key."""
    b = block(1, 8, 8, 256, 64, 256, torch.float16)
    other = replace(b, x=b.x.permute(0, 2, 3, 1).reshape(1, 4, 16, 256).permute(0, 3, 1, 2))
    assert other.x.data_ptr() == b.x.data_ptr()
    with Emulator(emulator, **H100 | {"sms": 1}):
        for each in (b, other, b, other):
            check(each, each.run())


@pytest.mark.parametrize("image", [(3, 1, 1), (1, 1, 28), (1, 7, 8), (1, 14, 14), (1, 28, 15), (1, 15, 1)], ids=str)
@pytest.mark.parametrize("device", ["h100", "b200"])
def test_any_size_of_image(device: str, image, emulator: Path) -> None:
    b = block(*image, 256, 64, 256, torch.float16)
    with Emulator(emulator, **DEVICES[device] | {"sms": 3}):
        y = b.run()
    assert y.is_contiguous(memory_format=torch.channels_last)
    check(b, y)


@pytest.mark.parametrize(("channels", "device"), VARIANTS, ids=str)
def test_order_of_threads_and_number_of_sms_change_no_bit(channels, device: str, emulator: Path) -> None:
    b, results = block(2, 9, 17, *channels, torch.bfloat16), []
    for seed, sms in ((0, 1), (1, 5), (2, 132)):
        with Emulator(emulator, seed=seed, **DEVICES[device] | {"sms": sms}):
            results.append(b.run())
    assert all(torch.equal(y, results[0]) for y in results)


def test_resident_and_streamed_weights_give_the_same_bits(emulator: Path) -> None:
    """The two variants of bottleneck_fwd.cu for 64 channels sum in the same order."""
    b, results, shared = block(1, 9, 9, 256, 64, 256, torch.float16), [], []
    for device in (B200, A100):
        with Emulator(emulator, **device) as run:
            results.append(b.run())
            shared.append(run.launches()[0]["shared"])
    assert torch.equal(*results)
    assert shared == [224 << 10, 120 << 10]


def test_an_empty_batch_launches_nothing(emulator: Path) -> None:
    with Emulator(emulator) as run:
        y = block(0, 8, 8, 256, 64, 256, torch.float16).run()
        assert y.shape == (0, 256, 8, 8) and not run.launches()


@pytest.mark.parametrize("device", ["h100", "b200"])
def test_nan_and_infinity_reach_their_neighbours_alone(device: str, emulator: Path) -> None:
    b = block(1, 12, 12, 256, 64, 256, torch.float16)
    b.x[0, 5, 4, 4] = float("nan")
    with Emulator(emulator, **DEVICES[device]):
        y = b.run()
    far = torch.ones(12, 12, dtype=torch.bool)
    far[3:6, 3:6] = False
    assert y[0, :, 3:6, 3:6].isnan().all() and not y[0, :, far].isnan().any()


@pytest.mark.parametrize(("channels", "device"), VARIANTS, ids=str)
def test_no_bank_conflict_and_wide_accesses(channels, device: str, emulator: Path) -> None:
    with Emulator(emulator, **DEVICES[device] | {"sms": 2}) as run:
        block(1, 16, 17, *channels, torch.bfloat16).run()
        launch = run.launches()[0]
    assert conflicts(launch) == {}
    assert launch["shared"] <= DEVICES[device]["shared"]
    wide = [s for s in launch["sites"] if s["kind"].startswith("global") and s["units"] > 500]  # biases are few
    assert wide and all(s["narrowest"] == 16 for s in wide)
    # as many sectors as the bytes that lanes ask for need: nothing is moved to be thrown away
    assert all(s["units"] == s["least"] for s in wide)


@pytest.mark.parametrize("device", ["h100", "b200"])
@pytest.mark.parametrize("channels", [(256, 64, 256), (64, 64, 256)], ids=str)
def test_traffic_of_resident_weights(channels, device: str, emulator: Path) -> None:
    """One image of ResNet-50's stage 1: every tensor from DRAM once, weights once per block, the halo from L2."""
    sms = 7
    with Emulator(emulator, **DEVICES[device] | {"sms": sms}) as run:
        b = block(1, 56, 56, *channels, torch.bfloat16)
        b.run()
        buffers = run.launches()[0]["buffers"]
    sizes = {name: counts["size"] for name, counts in buffers.items()}
    unique = sum(c["unique_sectors_read"] + c["unique_sectors_written"] for c in buffers.values()) * 32
    assert unique == sum(sizes.values())
    assert buffers["y"]["sectors_written"] * 32 == sizes["y"]
    assert buffers["weights"]["sectors_read"] * 32 == sms * sizes["weights"]
    halo = buffers["x"]["sectors_read"] * 32 - sizes["x"]
    # 10 x 10 pixels for 8 x 8, less what lies outside of the image
    assert halo / sizes["x"] == pytest.approx((10 * 7 - 2) ** 2 / 56**2 - 1)
    moved = sum((c["sectors_read"] + c["sectors_written"]) * 32 for c in buffers.values()) - halo
    assert moved <= 1.15 * (sizes["x"] + sizes["y"] + sms * sizes["weights"])


def test_predicted_time_of_a_large_batch(emulator: Path) -> None:
    """The identity block of stage 1 at batch 256 on an H100: within 1.5 of its floor."""
    from resnet_fast.benchmarks.tables import cuda_budgets

    row = next(r for r in cuda_budgets.predictions(("r50.layer1.1",)))
    assert 1.0 <= row.ratio <= 1.5


GOOD = {"ci": 256, "cmid": 64, "co": 256, "projection": False}


def operands(ci: int, cmid: int, co: int, projection: bool) -> list[Tensor | bool]:
    b = block(1, 8, 8, ci, cmid, co, torch.float16)
    return [b.x, b.packed(), *b.biases, projection]


def nchw(t: Tensor) -> Tensor:
    return t.contiguous()


def unaligned(t: Tensor) -> Tensor:
    field = torch.empty(t.numel() + 1, dtype=t.dtype)
    n, c, h, w = t.shape
    return field[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


@pytest.mark.parametrize(
    ("at", "change", "sentence"),
    [
        (0, lambda t: t.float(), "expected float16 or bfloat16, got float32"),
        (0, nchw, "expected x dense in NHWC, got strides"),
        (0, lambda t: t[0], r"expected x of shape \(N, C, H, W\), got \(256, 8, 8\) float16"),
        (0, unaligned, "expected x on a 16-byte boundary"),
        (
            0,
            lambda t: t[:, :192].contiguous(memory_format=torch.channels_last),
            "expected as many input as output channels",
        ),
        (1, lambda t: t[:-1], r"expected contiguous weights \(17, 64, 64\) float16, got \(16, 64, 64\) float16"),
        (1, lambda t: t.to(torch.bfloat16), "expected contiguous weights .* float16, got .* bfloat16"),
        (2, lambda t: t.half(), "expected contiguous bias1"),
        (2, lambda t: t[:63], "expected 64 inner and 256 output channels"),
        (4, lambda t: t[::2], "expected 64 inner and 256 output channels"),
        (5, lambda _: True, r"expected contiguous weights \(33, 64, 64\)"),
    ],
)
def test_bad_tensors_are_refused_before_a_launch(at: int, change, sentence: str, emulator: Path) -> None:
    arguments = operands(**GOOD)
    arguments[at] = change(arguments[at])
    with Emulator(emulator) as run:
        with pytest.raises(RuntimeError, match=f"bottleneck_fwd: {sentence}"):
            native.bottleneck_fwd(*arguments)
        assert not run.launches()


def test_cpu_tensors_without_an_emulator_are_refused(emulator: Path) -> None:
    with Emulator(emulator):
        pass
    with pytest.raises(RuntimeError, match="expected a tensor on a GPU, got one on the CPU; move it, or set"):
        native.bottleneck_fwd(*operands(**GOOD))


def test_a_failed_launch_is_an_exception_with_the_problem(emulator: Path) -> None:
    with (
        Emulator(emulator, shared=64 << 10),
        pytest.raises(RuntimeError, match=r"bottleneck_fwd failed on \(1, 256, 8, 8\) float16: .* cannot be launched"),
    ):
        native.bottleneck_fwd(*operands(**GOOD))
