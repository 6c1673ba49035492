"""Floors and byte models: hand-worked cases, and the traffic of ResNet-50 per image."""

from __future__ import annotations

import csv
import io
import time

import pytest

from resnet_fast.errors import UserError
from resnet_fast.roofline import (
    H100,
    ORIGINS,
    PLANS,
    Ceiling,
    Device,
    bytes_moved,
    calibrate_cpu,
    floor_seconds,
    net_floor,
)
from resnet_fast.spec import BlockSpec, ConvSpec, Epilogue, PointwiseSpec
from resnet_fast.tuning import shapes

TOY = Device("toy", Ceiling(100.0, "measured"), (("float32", Ceiling(1000.0, "published")),))


def test_memory_bound_floor_is_bytes_over_bandwidth() -> None:
    spec = PointwiseSpec(1, 4, 4, 8, epilogue=Epilogue(relu=True))
    f = floor_seconds(spec, TOY)
    assert f.seconds == f.memory_s == (2 * 4 * 4 * 8 * 4 + 2 * 8 * 4) / 100
    assert (f.bound, f.origin, f.nbytes) == ("memory", "measured", spec.min_bytes())


def test_compute_bound_floor_is_operations_over_rate() -> None:
    spec = ConvSpec(1, 8, 8, 64, 64, 3, 3, padding=(1, 1))
    f = floor_seconds(spec, TOY)
    assert f.seconds == f.compute_s == 2 * 8 * 8 * 64 * 64 * 9 / 1000
    assert (f.bound, f.origin) == ("compute", "published")
    assert f.intensity == f.flops / f.nbytes


def test_floor_of_an_empty_batch_reads_the_weights_only() -> None:
    f = floor_seconds(ConvSpec(0, 8, 8, 4, 6, 3, 3), TOY)
    assert (f.flops, f.nbytes) == (0, (6 * 4 * 9 + 2 * 6) * 4)


def test_plans_of_one_convolution() -> None:
    spec = ConvSpec(1, 4, 4, 8, 8, 1, 1, epilogue=Epilogue(relu=True, add=True))
    y, weights = 4 * 4 * 8 * 4, 8 * 8 * 4
    assert bytes_moved(spec, "conv") == bytes_moved(spec, "block") == 3 * y + weights + 2 * 8 * 4
    # conv 2, norm 2, add 3, ReLU 2 passes over tensors of this size
    assert bytes_moved(spec, "separate") == 9 * y + weights


def test_separate_stem_pools_in_its_own_kernel() -> None:
    spec = ConvSpec(1, 8, 8, 8, 8, 1, 1, epilogue=Epilogue(norm=False, pool=(2, 2, 0)))
    conv = spec.with_(epilogue=Epilogue(norm=False)).min_bytes()
    assert bytes_moved(spec, "separate") == conv + 8 * 8 * 8 * 4 + 4 * 4 * 8 * 4


def test_plans_of_a_block_fuse_more_and_move_less() -> None:
    for block in shapes.blocks("resnet50", batch=8).values():
        assert bytes_moved(block, "block") < bytes_moved(block, "conv") < bytes_moved(block, "separate")
        assert bytes_moved(block, "conv") == sum(c.min_bytes() for c in block.convs)


def _megabytes_per_image(plan: str, stem_fused: bool = True) -> float:
    batch = 4096  # so many that the weights vanish
    stem = shapes.problems("resnet50", batch, dtype="bfloat16")["r50.conv1"]
    blocks = list(shapes.blocks("resnet50", batch, dtype="bfloat16").values())
    total = net_floor([stem, *blocks], H100, plan).nbytes
    if not stem_fused:
        total += bytes_moved(stem, "separate") - bytes_moved(stem.with_(epilogue=Epilogue()), "separate")
        total -= 2 * 2 * stem.n * stem.ho * stem.wo * stem.co  # the ReLU stays fused, only the pooling is apart
        total += bytes_moved(stem.with_(epilogue=Epilogue(relu=True))) - bytes_moved(stem)
    return total / batch / 1e6


@pytest.mark.parametrize(("plan", "megabytes"), [("separate", 162), ("block", 23.0)])
def test_traffic_of_resnet50_per_image(plan: str, megabytes: float) -> None:
    """Worked out by hand for 16-bit activations: every op apart, and every block and the stem one kernel."""
    assert _megabytes_per_image(plan) == pytest.approx(megabytes, rel=0.02)


def test_traffic_of_one_kernel_per_convolution() -> None:
    """By hand 56.8 MB with the pooling apart and projections that read skipped pixels too, 2.1 MB more than needed."""
    assert _megabytes_per_image("conv", stem_fused=False) == pytest.approx(56.8 - 2.1, rel=0.02)


def test_net_floor_sums_and_names_the_larger_part() -> None:
    memory = PointwiseSpec(1, 4, 4, 8)
    compute = ConvSpec(1, 8, 8, 64, 64, 3, 3, padding=(1, 1))
    f = net_floor([memory, compute], TOY)
    parts = [floor_seconds(s, TOY) for s in (memory, compute)]
    assert f.seconds == parts[0].seconds + parts[1].seconds > max(f.memory_s, f.compute_s)
    assert (f.bound, f.origin) == ("compute", "mixed")
    assert (f.flops, f.nbytes) == (memory.flops() + compute.flops(), memory.min_bytes() + compute.min_bytes())
    assert net_floor([memory], TOY).origin == "measured"


def test_floor_is_one_flat_csv_row() -> None:
    row = floor_seconds(PointwiseSpec(1, 4, 4, 8), TOY).to_dict()
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(row))
    writer.writeheader()
    writer.writerow(row)
    back = next(csv.DictReader(io.StringIO(out.getvalue())))
    assert float(back["seconds"]) == row["seconds"] and back["bound"] == "memory"


def test_h100_figures_are_labelled() -> None:
    assert (H100.bandwidth.value, H100.bandwidth.origin) == (3.02e12, "measured")
    assert H100.rate("bfloat16") == Ceiling(792e12, "measured")
    assert {c.origin for _, c in H100.rates} == set(ORIGINS)


def test_resnet50_on_h100_is_memory_bound_layer_by_layer() -> None:
    convs = shapes.problems("resnet50", 256, dtype="bfloat16").values()
    per_second = 256 / net_floor(convs, H100, "conv").seconds
    assert net_floor(convs, H100, "conv").bound == "memory"
    assert 45_000 < per_second < 58_000  # the hand count gives 52.8 thousand images a second


def test_cpu_is_measured_once_and_soon() -> None:
    calibrate_cpu.cache_clear()
    start = time.perf_counter()
    device = calibrate_cpu()
    assert time.perf_counter() - start < 5  # generous: a busy machine
    assert calibrate_cpu() is device
    assert device.bandwidth.origin == device.rate("float32").origin == "measured"
    assert 1e8 < device.bandwidth.value < 1e13
    assert 1e8 < device.rate("float32").value < 1e15
    assert device.rate("bfloat16").value >= device.rate("float32").value
    assert floor_seconds(ConvSpec(1, 8, 8, 4, 6, 3, 3, dtype="float64"), device).seconds > 0


@pytest.mark.parametrize("device", [TOY, H100])
def test_dtype_without_a_rate(device: Device) -> None:
    with pytest.raises(UserError, match="known rate for, got complex64; use one of"):
        device.rate("complex64")


def test_unknown_plan_and_empty_net() -> None:
    spec = ConvSpec(1, 8, 8, 4, 6, 3, 3)
    with pytest.raises(UserError, match=f"{', '.join(PLANS)}, got 'magic'"):
        bytes_moved(spec, "magic")
    with pytest.raises(UserError, match="at least one problem"):
        net_floor([], TOY)


def test_given_shortcut_is_read_besides() -> None:
    convs = tuple(shapes.blocks("cifar_resnet20")["c20.layer2.0"].convs)
    given, identity = BlockSpec("basic_block", convs, "given"), BlockSpec("basic_block", convs, "identity")
    assert bytes_moved(given) - bytes_moved(identity) == 16 * 16 * 32 * 4
