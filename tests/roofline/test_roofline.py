"""Floors and byte models: hand-worked cases, and the traffic of ResNet-50 per image."""

from __future__ import annotations

import csv
import io
import time

import pytest

from resnet_fast.devices import H100, Ceiling, Device
from resnet_fast.errors import UserError
from resnet_fast.roofline.byte_model import INFERENCE, PLANS, TRAINING, bytes_moved, net_work, work
from resnet_fast.roofline.cpu_ceilings import calibrate_cpu
from resnet_fast.roofline.floors import floor, floor_seconds, net_floor
from resnet_fast.roofline.prediction import MEASURED, PROFILE_S, calibration, predict_time
from resnet_fast.spec import BlockSpec, ConvSpec, Epilogue, NetSpec
from resnet_fast.tuning import shapes
from resnet_fast.tuning.routes import routes

TOY = Device("toy", Ceiling(100.0, "measured"), (("float32", Ceiling(1000.0, "published")),))


def test_memory_bound_floor_is_bytes_over_bandwidth() -> None:
    f = floor_seconds(ConvSpec(1, 4, 4, 8, 8, 1, 1, epilogue=Epilogue(relu=True)), TOY)
    nbytes = (2 * 4 * 4 * 8 + 8 * 8 + 8) * 4  # input and output, weights, bias
    assert f.seconds == f.memory_s == nbytes / 100
    assert (f.bound, f.origin, f.nbytes) == ("memory", "measured", nbytes)


def test_compute_bound_floor_is_operations_over_rate() -> None:
    spec = ConvSpec(1, 8, 8, 64, 64, 3, 3, padding=(1, 1))
    f = floor_seconds(spec, TOY)
    assert f.seconds == f.compute_s == 2 * 8 * 8 * 64 * 64 * 9 / 1000
    assert (f.bound, f.origin) == ("compute", "published")
    assert f.intensity == f.flops / f.nbytes


def test_floor_of_an_empty_batch_reads_the_weights_only() -> None:
    f = floor_seconds(ConvSpec(0, 8, 8, 4, 6, 3, 3), TOY)
    assert (f.flops, f.nbytes) == (0, (6 * 4 * 9 + 6) * 4)  # and one folded bias per channel


def test_plans_of_one_convolution() -> None:
    spec = ConvSpec(1, 4, 4, 8, 8, 1, 1, epilogue=Epilogue(relu=True, add=True))
    y, weights, bias = 4 * 4 * 8 * 4, 8 * 8 * 4, 8 * 4
    assert {bytes_moved(spec, plan) for plan in INFERENCE if plan != "separate"} == {3 * y + weights + bias}
    # conv 2, norm 2, add 3, ReLU 2 passes over tensors of this size
    assert bytes_moved(spec, "separate") == 9 * y + weights
    # forward: conv 2, BN 3, add 3, ReLU 2; backward: ReLU 3, BN 5, dgrad 2, wgrad 2
    assert bytes_moved(spec, "train-eager") == (2 + 3 + 3 + 2 + 3 + 5 + 2 + 2) * y + 3 * weights


@pytest.mark.parametrize("plan", ["separate", "conv", "proj"])
def test_stem_pools_in_its_own_kernel_unless_the_plan_fuses_it(plan: str) -> None:
    spec = shapes.problems("resnet50", 2, dtype="bfloat16")["r50.conv1"]
    y = 2 * 112 * 112 * 64
    assert [item.kernel for item in work(spec, plan)][-1] == "maxpool"
    assert work(spec, plan)[-1].nbytes == (y + y // 4) * 2
    assert [item.kernel for item in work(spec, "tail")] == ["stem"]
    assert bytes_moved(spec, "tail") < bytes_moved(spec, plan)


def test_a_pooling_that_no_kernel_takes_in_runs_apart_in_every_plan() -> None:
    spec = ConvSpec(1, 8, 8, 8, 8, 1, 1, epilogue=Epilogue(norm=False, pool=(2, 2, 0)))
    for plan in INFERENCE:
        assert [item.kernel for item in work(spec, plan)][-1] == "maxpool"


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "cifar_resnet20"])
def test_plans_that_fuse_more_move_less(name: str) -> None:
    for block in shapes.blocks(name, batch=8).values():
        fused = [bytes_moved(block, plan) for plan in ("separate", "conv", "proj", "tail", "block")]
        assert fused == sorted(fused, reverse=True) and fused[-1] < fused[1] < fused[0]
        assert bytes_moved(block, "conv") == sum(c.min_bytes() - 4 * c.co for c in block.convs)  # one bias, BN folded
        training = [bytes_moved(block, plan) for plan in TRAINING]
        assert training == sorted(training, reverse=True)


def test_every_plan_does_the_whole_arithmetic_once() -> None:
    for plan in INFERENCE:
        items = net_work("resnet50", plan, 3)
        assert sum(item.flops for item in items) == 3 * 2 * 4_089_184_256
    step = sum(item.flops for item in net_work("resnet50", "train-eager", 1))
    stem = shapes.problems("resnet50")["r50.conv1"].flops()
    assert step == 3 * 2 * 4_089_184_256 - stem  # an image needs no gradient


HAND_COUNTS = {
    "separate": 162,
    "conv": 56.8,
    "stage12": 35.1,
    "block": 23.0,
    "train-eager": 477,
    "train-bn-two-pass": 370,
    "train-bn-single-pass": 303,
    "train-conv-bn": 247,
}
"""MB per image of ResNet-50 at 224 in 16 bit, as the plans were first worked out: activations only."""


@pytest.mark.parametrize(("plan", "megabytes"), HAND_COUNTS.items())
def test_activations_of_resnet50_agree_with_the_hand_counts(plan: str, megabytes: float) -> None:
    items = net_work("resnet50", plan, 1, 224, "bfloat16")
    assert sum(item.activations for item in items) / 1e6 == pytest.approx(megabytes, rel=0.03)


@pytest.mark.parametrize(("plan", "megabytes"), [("conv", 52.5), ("proj", 46.4), ("tail", 40.0)])
def test_least_bytes_of_resnet50_in_the_routes(plan: str, megabytes: float) -> None:
    """Counts the convolutions' kernels, without PyTorch's pools and the fully connected layer."""
    batch = 4096  # so many that the weights vanish
    items = [i for i in net_work("resnet50", plan, batch) if i.part != "head" and i.kernel != "maxpool"]
    assert sum(i.nbytes for i in items) / batch / 1e6 == pytest.approx(megabytes, rel=0.003)


def test_least_bytes_are_the_activations_touched_and_the_weights() -> None:
    strided = ConvSpec(1, 8, 8, 16, 16, 1, 1, (2, 2), dtype="bfloat16")
    (item,) = work(strided, "conv")
    assert item.activations == (8 * 8 * 16 + 4 * 4 * 16) * 2
    assert item.nbytes == (4 * 4 * 16 + 4 * 4 * 16 + 16 * 16) * 2 + 4 * 16


def test_names_say_what_a_launch_holds() -> None:
    items = {(i.part, i.name): i.kernel for i in net_work("resnet50", "tail")}
    assert items["r50.layer1.0", "conv2+conv3+downsample"] == "bottleneck"
    assert items["r50.layer4.0", "conv3+downsample"] == "conv_bn_act_1x1"  # too wide for a tail
    assert items["r50.conv1", "conv"] == "stem" and items["head", "fc"] == "fc"
    whole = [i for i in net_work("resnet50", "stage12") if i.name == "block"]
    assert {i.part.rsplit(".", 1)[0] for i in whole} == {"r50.layer1", "r50.layer2"}


@pytest.mark.parametrize("name", ["resnet34", "plain34", "cifar_resnet20", "resnext101_64x4d"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_net_has_every_plan(name: str, plan: str) -> None:
    items = net_work(name, plan, 4)
    p = predict_time(items, H100, plan)
    assert p.launches == len(items) and p.seconds > p.floor.seconds > 0
    assert floor(items, H100, plan) == p.floor


def test_a_launch_spec_is_one_piece_of_work() -> None:
    block = shapes.blocks("resnet50", 2, dtype="bfloat16")["r50.layer1.0"]
    tail = next(r for r in routes(block) if r.fusion == "tail").launches[-1]
    (item,) = work(tail)
    assert (item.nbytes, item.flops, item.kernel) == (tail.min_bytes(), tail.flops(), "bottleneck")


def test_a_net_as_one_problem_is_its_parts() -> None:
    parts = (shapes.problems("resnet50", 2)["r50.conv1"], *shapes.blocks("resnet50", 2).values())
    for plan in PLANS:
        without_head = [i for i in net_work("resnet50", plan, 2, dtype="float32") if i.part != "head"]
        assert bytes_moved(NetSpec(parts), plan) == sum(i.nbytes for i in without_head)


def test_batch_one_is_bound_by_launches_and_fewer_of_them_win() -> None:
    seconds = {
        plan: predict_time(net_work("resnet50", plan, 1), H100, plan) for plan in ("separate", "conv", "tail", "block")
    }
    assert {p.bound for p in seconds.values()} == {"launch"}
    times = [p.seconds for p in seconds.values()]
    assert times == sorted(times, reverse=True)
    assert predict_time(net_work("resnet50", "conv", 256), H100, "conv").bound == "memory"
    assert predict_time(net_work("resnet50", "block", 256), H100, "block").bound == "compute"


def test_calibration_agrees_with_what_was_measured() -> None:
    """The model was fitted to inference (5 cells, 2 numbers) and predicts the eager cells from the profile."""
    fit = calibration()
    assert 0.4 < fit.fused < 0.8 and 3e-6 < fit.launch_s < 10e-6 and fit.error < 0.03
    assert all(0 < reached <= 1 for _, reached in fit.by_kernel)
    for m in MEASURED:
        if "compile" not in m.what:  # it fuses what no plan here does
            for batch, rate in m.images_per_s:
                seconds = predict_time(net_work("resnet50", m.plan, batch), H100, m.plan).seconds
                assert batch / seconds == pytest.approx(rate, rel=0.03), (m.what, batch)


def test_profile_of_native_elementwise_kernels_confirms_the_byte_model() -> None:
    """They run at the bandwidth of a copy, so measured times give bytes: within 5 % of the model."""
    items = net_work("resnet50", "train-eager", 256)
    for kernels in (("relu",), ("add", "add_grad"), ("relu_grad",)):
        least = floor((i for i in items if i.kernel in kernels), H100, "train-eager").seconds
        assert least == pytest.approx(PROFILE_S[kernels], rel=0.05)


def test_prediction_needs_a_gpu_and_is_one_flat_row() -> None:
    items = net_work("resnet18", "conv", 8)
    with pytest.raises(UserError, match="GPU to predict for, got toy"):
        predict_time(net_work("resnet18", "conv", 8, dtype="float32"), TOY, "conv")
    row = predict_time(items, H100, "conv").to_dict()
    assert row["predicted_s"] > row["floor_s"] and row["launches"] == len(items)
    assert not [v for v in row.values() if isinstance(v, (dict, list, tuple))]


def test_net_floor_sums_and_names_the_larger_part() -> None:
    memory = ConvSpec(1, 4, 4, 8, 8, 1, 1)
    compute = ConvSpec(1, 8, 8, 64, 64, 3, 3, padding=(1, 1))
    f = net_floor([memory, compute], TOY)
    parts = [floor_seconds(s, TOY) for s in (memory, compute)]
    assert f.seconds == parts[0].seconds + parts[1].seconds > max(f.memory_s, f.compute_s)
    assert (f.bound, f.origin) == ("compute", "mixed")
    assert f.flops == memory.flops() + compute.flops()
    assert f.nbytes == memory.min_bytes() + compute.min_bytes() - (8 + 64) * 4  # norms are folded: a bias is left
    assert net_floor([memory], TOY).origin == "measured"


def test_floor_is_one_flat_csv_row() -> None:
    row = floor_seconds(ConvSpec(1, 4, 4, 8, 8, 1, 1), TOY).to_dict()
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(row))
    writer.writeheader()
    writer.writerow(row)
    back = next(csv.DictReader(io.StringIO(out.getvalue())))
    assert float(back["seconds"]) == row["seconds"] and back["bound"] == "memory"


def test_resnet50_on_h100_is_memory_bound_layer_by_layer() -> None:
    convs = shapes.problems("resnet50", 256, dtype="bfloat16").values()
    per_second = 256 / net_floor(convs, H100, "conv").seconds
    assert net_floor(convs, H100, "conv").bound == "memory"
    assert 45_000 < per_second < 58_000  # the hand count gives 52.8 thousand images a second


@pytest.mark.alone
def test_cpu_is_measured_once_and_soon() -> None:
    calibrate_cpu.cache_clear()
    start = time.process_time()
    device = calibrate_cpu()
    assert time.process_time() - start < 5  # of one core, whatever else the machine does
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
