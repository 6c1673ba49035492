"""The choice without measurement is legal, sensible for every batch, and as close to the roofline as claimed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from resnet_fast import devices
from resnet_fast.devices import Device
from resnet_fast.roofline import floors
from resnet_fast.spec import LaunchSpec
from resnet_fast.tuning import configs, heuristic, launch_plan, shapes, time_model
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.routes import launch, routes
from resnet_fast.tuning.tables import Table

GPUS = ("a100", "rtx4090", "h100", "b200", "rtx5090")
H100 = devices.gpu("h100")
NETS = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "plain18", "cifar_resnet20")


def net(name: str, batch: int, dtype: str = "bfloat16") -> dict[str, LaunchSpec]:
    """Return one launch per convolution, without the stem's max-pool."""
    found = shapes.problems(name, batch, dtype=dtype)
    return {key: launch(c.with_(epilogue=replace(c.epilogue, pool=None))) for key, c in found.items()}


def everything(name: str, batch: int, dtype: str) -> list[LaunchSpec]:
    """Return every launch of every route."""
    specs = (
        *shapes.problems(name, batch, dtype=dtype).values(),
        *shapes.blocks(name, batch, dtype=dtype).values(),
    )
    return list(dict.fromkeys(one for spec in specs for route in routes(spec) for one in route.launches))


def unmeasured(one: LaunchSpec, device: Device) -> list[Config]:
    assert device.gpu is not None
    return [c for c in configs.candidates(one, device.gpu) if not configs.needs_proof(one, c)]


def test_tiles_cover_the_output() -> None:
    one = net("resnet50", 3)["r50.layer3.1.conv2"]  # 3 x 14 x 14 pixels, 256 channels
    assert time_model.tiles(one, Config(one.kernel, 128, 64, 64)) == 5 * 4
    assert time_model.tiles(one, Config(one.kernel, 588, 256, 64)) == 1
    grouped = net("resnext50_32x4d", 3)["x50_32x4d.layer3.1.conv2"]  # 32 groups of 16 channels
    assert time_model.tiles(grouped, Config(grouped.kernel, 128, 16, 16)) == 5 * 32
    stem = launch(shapes.problems("resnet50", 3)["r50.conv1"])  # 3 x 56 x 56 pooled pixels, 64 channels
    assert time_model.tiles(stem, Config("stem", 64, 32, 32, rows=14)) == 3 * (56 // 14) * 2
    tail = routes(shapes.blocks("resnet50", 3)["r50.layer1.1"])[-1].launches[-1]
    assert time_model.tiles(tail, Config("bottleneck", 64, 64, 64)) == 3 * 56 * 56 // 64


@pytest.mark.parametrize("name", GPUS)
def test_what_is_chosen_is_legal_and_needs_no_proof(name: str) -> None:
    device = devices.gpu(name)
    assert device.gpu is not None
    for key, batch, dtype in itertools.product(NETS, (1, 8, 256), ("bfloat16", "float32")):
        for one in everything(key, batch, dtype):
            picked = heuristic.select(one, device)
            if picked is None:
                assert (len(one.convs) > 1 or one.kernel == "stem") and not unmeasured(one, device)
                continue
            config, seconds = picked
            assert configs.verdict(one, config, device.gpu)
            assert not configs.needs_proof(one, config)
            assert 0 < seconds < 1


def test_ranked_is_every_candidate_fastest_first() -> None:
    one = net("resnet50", 32)["r50.layer2.1.conv2"]
    ranked = heuristic.rank(one, H100)
    assert H100.gpu is not None and {c for c, _ in ranked} == set(configs.candidates(one, H100.gpu))
    times = [float(f"{s:.3g}") for _, s in ranked]
    unproved = [pick for pick in ranked if pick[0] in unmeasured(one, H100)]
    assert times == sorted(times) and unproved[0] == heuristic.select(one, H100)
    assert all(s == time_model.predict_seconds(one, c, H100) for c, s in ranked)


@pytest.mark.parametrize("key", ["resnet50", "resnet18", "wide_resnet50_2"])
def test_large_batches_get_large_tiles(key: str) -> None:
    """Where products are the limit; a launch that memory bounds takes what keeps most loads in flight."""
    for name, one in net(key, 256).items():
        config, seconds = heuristic.select(one, H100) or (None, 0)
        memory = one.min_bytes() / H100.bandwidth.value
        large = any(c.block_m >= 128 and c.block_n >= 128 for c in unmeasured(one, H100))
        if large and seconds > 1.05 * memory + 4e-6:
            assert config and config.block_m * config.block_n >= 128 * 128, f"{name}: {config}"


def test_equal_times_go_to_the_copy_engine_then_to_programs_side_by_side() -> None:
    """Layer 1's projection is bound by memory with 11 of its 13 configs."""
    assert H100.gpu is not None
    one = net("resnet50", 256)["r50.layer1.0.downsample.0"]
    ranked = heuristic.rank(one, H100)
    tied = [c for c, s in ranked if s < ranked[0][1] * 1.001]
    assert len(tied) >= 10
    best = tied[0]
    side_by_side = {c: time_model.resident(one, c, H100.gpu) for c in tied if c.descriptors}
    assert best.descriptors and side_by_side[best] == max(side_by_side.values()) >= 2
    pointers = [c for c in tied if not c.descriptors]
    keys = [(n := time_model.resident(one, c, H100.gpu), n * time_model.bytes_in_flight(one, c)) for c in pointers]
    assert keys == sorted(keys, reverse=True)


def test_one_image_gets_smaller_tiles_than_a_large_batch() -> None:
    """With few pixels and many channels, a large batch's tiles would leave most multiprocessors idle."""
    many = net("resnet50", 256)
    for name, one in net("resnet50", 1).items():
        if ".layer3." in name or ".layer4." in name:
            large, small = heuristic.select(many[name], H100), heuristic.select(one, H100)
            assert large and small
            assert time_model.tiles(one, small[0]) >= 2 * time_model.tiles(one, large[0]), name


def test_one_image_is_not_cut_into_long_chains_of_short_steps() -> None:
    """Each K step waits for its load, and 16 products a step would take 288 steps in stage 4's 3x3."""
    picked = heuristic.select(net("resnet50", 1)["r50.layer4.1.conv2"], H100)
    assert picked and picked[0].block_k >= 64


def test_split_k_brings_one_image_of_resnet50_below_300_us() -> None:
    """Modelled, over the fastest route of every block and the stem, if split-K configs are proved on the GPU."""
    seconds = {True: 0.0, False: 0.0}
    stem = shapes.problems("resnet50", 1, dtype="bfloat16")["r50.conv1"]
    for block in (stem, *shapes.blocks("resnet50", 1, dtype="bfloat16").values()):
        for splits in seconds:
            found = [
                sum(
                    min(
                        time_model.predict_seconds(one, c, H100)
                        for c in configs.candidates(one, H100.gpu)
                        if (splits and c.splits > 1) or not configs.needs_proof(one, c)
                    )
                    for one in route.launches
                )
                for route in routes(block)
                if all(configs.candidates(one, H100.gpu) for one in route.launches)
            ]
            seconds[splits] += min(found)
    assert seconds[True] < 0.30e-3 < 0.38e-3 < seconds[False]


@pytest.mark.parametrize("name", GPUS)
def test_more_images_take_longer(name: str) -> None:
    device = devices.gpu(name)
    for key in ("r50.layer1.0.conv2", "r50.layer3.1.conv1", "r50.layer4.2.conv3"):
        times = [
            (heuristic.select(net("resnet50", batch)[key], device) or (None, 0))[1] for batch in (1, 32, 256, 1024)
        ]
        assert times == sorted(times) and times[-1] > 3 * times[1]


def test_fp32_takes_longer_than_bf16() -> None:
    for key in ("r50.layer1.0.conv2", "r50.layer4.2.conv2"):
        half, full = (heuristic.select(net("resnet50", 256, dtype)[key], H100) for dtype in ("bfloat16", "float32"))
        assert half and full and full[1] > 1.5 * half[1]


def test_a_gpu_without_known_figures_gets_a_choice() -> None:
    device = devices.unknown_gpu("NVIDIA L4", 89, 58, 100 << 10, 99 << 10, 48 << 20)
    chosen = [
        launch_plan.plan_launches(b, device, Table(device.name))
        for b in shapes.blocks("resnet50", 8, dtype="float16").values()
    ]
    assert len(chosen) == 16 and not any(c.measured for c in chosen)


def test_no_launch_beats_its_own_roofline() -> None:
    rate = H100.rate("bfloat16").value
    for batch in (1, 32, 256):
        for one in everything("resnet50", batch, "bfloat16"):
            picked = heuristic.select(one, H100)
            floor = max(one.min_bytes() / H100.bandwidth.value, 0.95 * one.flops() / rate)
            assert picked is None or picked[1] > floor, str(one)


def test_resnet50_at_batch_256_is_within_twice_the_roofline() -> None:
    """Checks one kernel per convolution, and the chosen launches."""
    problems = shapes.problems("resnet50", 256, dtype="bfloat16")
    specs = [problems["r50.conv1"], *shapes.blocks("resnet50", 256, dtype="bfloat16").values()]
    chosen = [launch_plan.plan_launches(spec, H100, Table(H100.name)) for spec in specs]
    predicted = sum(c.seconds for c in chosen)
    own = sum(floors.floor_seconds(one, H100).seconds for c in chosen for one in c.route.launches)
    assert own < predicted < 2 * own
    floor = floors.net_floor(specs, H100, "conv").seconds
    assert floor < predicted < 2 * floor
