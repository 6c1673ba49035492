"""The hardware rules one by one, and that they leave something for every launch of every net on every GPU."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from resnet_fast import devices
from resnet_fast.devices import Gpu
from resnet_fast.spec import ConvSpec, Epilogue, LaunchSpec
from resnet_fast.tuning import configs, shapes
from resnet_fast.tuning.configs import SHIPPED, Config
from resnet_fast.tuning.routes import launch, routes

RELU = Epilogue(relu=True)
ADD = Epilogue(relu=True, add=True)
POOLED = Epilogue(relu=True, pool=(3, 2, 1))
DTYPES = ("float32", "bfloat16", "float16")


def gpu(name: str) -> Gpu:
    found = devices.gpu(name).gpu
    assert found is not None
    return found


GPUS = {name: gpu(name) for name in ("a100", "rtx4090", "h100", "b200", "rtx5090")}
H100 = GPUS["h100"]


def conv(ci: int, co: int, k: int = 1, stride: int = 1, groups: int = 1, dtype: str = "bfloat16", **more) -> ConvSpec:
    """Return a convolution of a 28x28 image, batch 8, that keeps the image's size at stride 1."""
    more = {"n": 8, "h": 28, "w": 28, "epilogue": RELU} | more
    pairs = {"stride": (stride, stride), "padding": (k // 2, k // 2)}
    return ConvSpec(ci=ci, co=co, r=k, s=k, groups=groups, dtype=dtype, **pairs, **more)


def tail(ci: int, mid: int, co: int, dtype: str = "bfloat16", projection: ConvSpec | None = None) -> LaunchSpec:
    last = conv(mid, co, dtype=dtype, epilogue=ADD)
    return LaunchSpec("bottleneck", (conv(ci, mid, 3, dtype=dtype), last), projection)


@cache
def net_launches() -> tuple[LaunchSpec, ...]:
    """Return every launch of every route of every net once, for batches 1 and 256, in three dtypes."""
    specs: dict = {}
    for name in shapes.ARCHS:
        if name == "cifar_resnet1202":
            continue  # the launches of cifar_resnet110
        for dtype in DTYPES:
            for batch in (1, 256):
                found = (
                    *shapes.problems(name, batch, dtype=dtype).values(),
                    *shapes.blocks(name, batch, dtype=dtype).values(),
                )
                specs |= dict.fromkeys(found)
    return tuple(dict.fromkeys(one for spec in specs for route in routes(spec) for one in route.launches))


def reason(one: LaunchSpec, config: Config, on: Gpu = H100) -> str:
    """Return the reason of the refusal, empty if the config is allowed."""
    return configs.verdict(one, config, on).reason


ONE = launch(conv(512, 512))
THREE = launch(conv(256, 256, 3))
TILE = {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 3}


def test_shared_memory_is_counted_in_bytes_of_the_pipelined_tiles() -> None:
    config = Config("conv_bn_act_1x1", **TILE)
    assert configs.shared_bytes(ONE, config) == 3 * (128 + 128) * 64 * 2
    assert reason(ONE, config) == ""
    deep = Config("conv_bn_act_1x1", **TILE | {"num_stages": 8})
    assert reason(ONE, deep) == "expected at most 232448 bytes of shared memory, got 262144; use fewer stages"


def test_shared_memory_of_an_older_gpu_admits_less() -> None:
    config = Config("conv_bn_act_1x1", **TILE | {"num_stages": 4})
    assert reason(ONE, config, GPUS["a100"]) == ""
    assert "expected at most 101376 bytes of shared memory, got 131072" in reason(ONE, config, GPUS["rtx4090"])


def test_a_chain_holds_its_middle_tile_in_shared_memory_too() -> None:
    config = Config("bottleneck", 64, 64, 64, 4, 3)
    narrow, wide = (configs.shared_bytes(tail(256, mid, 256), config) for mid in (64, 256))
    assert wide > narrow > configs.shared_bytes(launch(conv(64, 256, epilogue=ADD)), config)


def test_too_many_sums_per_thread_are_refused() -> None:
    assert configs.accumulators(ONE, Config("conv_bn_act_1x1", **TILE)) == 64
    assert reason(ONE, Config("conv_bn_act_1x1", **TILE | {"block_n": 256})) == ""
    huge = Config("conv_bn_act_1x1", **TILE | {"block_n": 512, "block_k": 32})
    assert reason(ONE, huge) == "expected at most 128 sums per thread, got 256; use more warps or less tile"


@pytest.mark.parametrize("name", ["h100", "b200", "b300", "rtx5090", "l40s", "a100"])
def test_as_many_sums_as_a_warp_groups_instruction_leaves_room_for(name: str) -> None:
    """sm_120 spills: its products have operands in registers, as those of sm_80."""
    wide = Config("conv_bn_act_1x1", 128, 128, 32, 4, 2)
    admitted = gpu(name).arch in configs.WARP_GROUP_ARCHS
    assert (reason(ONE, wide, gpu(name)) == "") is admitted
    assert admitted or "expected at most 64 sums per thread, got 128" in reason(ONE, wide, gpu(name))


@pytest.mark.parametrize(
    ("one", "on"),
    [
        (launch(conv(512, 512, epilogue=ADD)), "h100"),  # the residual's tile wants registers as well
        (ONE, "a100"),
        (launch(conv(512, 512, dtype="float32")), "h100"),  # no tensor cores: the operands lie in registers
    ],
)
def test_sums_leave_room_for_what_else_lies_in_registers(one: LaunchSpec, on: str) -> None:
    config = Config("conv_bn_act_1x1", 128, 128, 32, 4, 2)
    assert reason(ONE, config) == ""
    assert "sums per thread, got 128" in reason(one, config, GPUS[on])


def test_a_stem_counts_a_sum_and_two_maxima() -> None:
    stem = LaunchSpec("stem", (conv(3, 64, 7, 2, epilogue=POOLED),))
    assert configs.accumulators(stem, Config("stem", 64, 64, 32, 4, 1)) == 3 * 64 * 64 // 128
    assert reason(stem, Config("stem", 64, 64, 32, 4, 1)) == ""
    assert "sums per thread, got 192" in reason(stem, Config("stem", 128, 64, 32, 4, 1))


def test_fp32_chains_run_only_on_tensor_cores() -> None:
    config = configs.for_dtype(Config("bottleneck", 32, 64, 32, 4, 3), "float32")
    exact = tail(64, 64, 256, "float32")
    rounded = LaunchSpec("bottleneck", tuple(c.with_(tf32=True) for c in exact.convs))
    assert not configs.on_tensor_cores(exact) and configs.on_tensor_cores(rounded)
    assert reason(rounded, config) == ""
    assert reason(exact, config).startswith("expected ")
    assert configs.candidates(exact, H100) == () != configs.candidates(rounded, H100)


def test_a_tile_more_than_half_masked_is_refused() -> None:
    narrow = launch(conv(64, 33, 3))
    config = Config("conv_bn_act_3x3", 64, 64, 32, 4, 3)
    assert reason(narrow, config) == ""
    assert (
        reason(launch(conv(64, 32, 3)), config)
        == "expected block_n below twice the 32 output channels, got 64; use a narrower tile"
    )


def test_groups_count_by_the_channels_of_one_merged_group() -> None:
    grouped = launch(conv(128, 128, 3, groups=32))  # 4 channels each, merged to 16
    assert "twice the 16 output channels" in reason(grouped, Config("conv_bn_act_3x3", 64, 64, 16, 4, 4))
    assert reason(grouped, Config("conv_bn_act_3x3", 64, 32, 16, 4, 4)) == ""


def test_a_step_more_than_half_masked_is_refused() -> None:
    config = Config("conv_bn_act_1x1", 64, 64, 64, 4, 4)
    assert reason(launch(conv(33, 64)), config) == ""
    assert (
        reason(launch(conv(32, 64)), config)
        == "expected block_k below twice the 32 products, got 64; use a shorter step"
    )


def test_the_general_kernel_steps_through_taps_and_channels_together() -> None:
    general = launch(conv(4, 64, 5))
    assert general.kernel == "conv_bn_act"
    assert reason(general, Config("conv_bn_act", 64, 64, 128, 4, 2)) == ""  # 100 products
    assert "twice the 100 products" in reason(general, Config("conv_bn_act", 64, 64, 256, 4, 1))


DESCRIBED = Config("conv_bn_act_1x1", **TILE | {"num_stages": 3}, descriptors=True)


@pytest.mark.parametrize(
    ("one", "on", "sentence"),
    [
        (ONE, "h100", ""),
        (ONE, "b200", ""),
        (ONE, "rtx4090", "expected sm_90 or later for tensor descriptors, got sm_89; use pointer loads"),
        (launch(conv(516, 512)), "h100", "channel runs of a multiple of 16 bytes, got 516 bfloat16"),
        (launch(conv(516, 512, dtype="float32")), "h100", ""),  # 16 bytes are 4 of its channels
        (launch(conv(512, 512, stride=2)), "h100", "stride 1 and no projection for tensor descriptors"),
        (LaunchSpec("conv_bn_act_1x1", (conv(512, 512),), conv(256, 512)), "h100", "no projection"),
    ],
)
def test_descriptors(one: LaunchSpec, on: str, sentence: str) -> None:
    config = Config("conv_bn_act_1x1", 64, 64, 32, 8, 2, descriptors=True) if one.dtype == "float32" else DESCRIBED
    found = reason(one, config, GPUS[on])
    assert sentence in found and bool(sentence) == bool(found)


def test_every_refusal_says_expected_got_and_what_to_do() -> None:
    said = {
        answer.reason
        for one in net_launches()
        for on in GPUS.values()
        for _, answer in configs.judged(one, on)
        if not answer
    }
    assert len(said) > 10
    assert not [text for text in said if not text.startswith("expected ") or ", got " not in text or "; " not in text]


def test_judged_lists_every_shipped_config_with_its_verdict() -> None:
    judged = configs.judged(THREE, H100)
    assert [config for config, _ in judged] == list(SHIPPED["conv_bn_act_3x3"])
    assert configs.candidates(THREE, H100) == tuple(config for config, answer in judged if answer)


@pytest.mark.parametrize("on", GPUS)
def test_every_single_convolution_of_every_net_has_a_candidate(on: str) -> None:
    """A stem in fp32 has none: the plain route (a convolution, then the pool) runs it."""
    scalar_stems = {one for one in net_launches() if one.kernel == "stem" and not configs.on_tensor_cores(one)}
    assert scalar_stems and not any(_unmeasured(one, GPUS[on]) for one in scalar_stems)
    alone = [one for one in net_launches() if len(one.convs) == 1 and one not in scalar_stems]
    assert len(alone) > 300
    assert not [str(one) for one in alone if not _unmeasured(one, GPUS[on])]


@pytest.mark.parametrize("on", GPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_chains_of_resnet50_up_to_128_channels_have_candidates_in_16_bit(on: str, dtype: str) -> None:
    chains = [
        route.launches[-1]
        for block in shapes.blocks("resnet50", 8, dtype=dtype).values()
        for route in routes(block)
        if route.fusion == "tail" and block.main[1].co <= 128
    ]
    assert len(chains) == 7
    assert all(_unmeasured(one, GPUS[on]) for one in chains)


@pytest.mark.parametrize("on", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_channel_count_has_a_candidate(on: str, dtype: str) -> None:
    missing = []
    for ci in range(1, 41):
        for co in (1, 2, 3, 8, 15, 16, 17, 31, 33, 40):
            for k in (1, 3, 5):
                one = launch(conv(ci, co, k, dtype=dtype))
                missing += [] if _unmeasured(one, GPUS[on]) else [str(one)]
    assert not missing


@pytest.mark.parametrize("on", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_groups_has_a_candidate(on: str, dtype: str) -> None:
    missing = []
    for groups in (1, 2, 3, 4, 5, 8, 16, 32, 40):
        for per_group in (1, 2, 4, 7, 16, 20):
            for k in (1, 3):
                one = launch(conv(groups * per_group, groups * per_group * 2, k, groups=groups, dtype=dtype))
                missing += [] if _unmeasured(one, GPUS[on]) else [str(one)]
    assert not missing


def _unmeasured(one: LaunchSpec, on: Gpu) -> list[Config]:
    """Return what the heuristic may take."""
    return [c for c in configs.candidates(one, on) if not configs.needs_proof(one, c)]


@pytest.mark.parametrize(
    ("one", "warps", "needed"),
    [(ONE, 8, False), (THREE, 4, False), (THREE, 8, True), (tail(256, 64, 256), 8, True)],
)
def test_eight_warps_beyond_1x1_need_proof(one: LaunchSpec, warps: int, needed: bool) -> None:
    assert configs.needs_proof(one, Config(one.kernel, 64, 64, 32, warps)) is needed


@pytest.mark.parametrize(
    ("one", "splits", "sentence"),
    [
        (launch(conv(512, 512, 3, n=1, h=7, w=7)), 8, ""),
        (
            launch(conv(512, 512, 3, n=64, h=7, w=7)),
            8,
            "expected fewer tiles than half of the 132 multiprocessors, got 784",
        ),
        (launch(conv(128, 512, n=1, h=7, w=7)), 2, "expected 2 K steps per split, got 1 in 2"),
        (launch(conv(512, 512, 3, n=1, h=7, w=7, dtype="float32")), 8, "expected 16-bit tensors or TF32"),
    ],
    ids=["taken", "tiles", "steps", "fp32"],
)
def test_k_steps_are_split_where_tiles_leave_the_gpu_empty(one: LaunchSpec, splits: int, sentence: str) -> None:
    name = one.kernel
    config = next(c for c in SHIPPED[name] if c.splits == splits)
    answer = configs.verdict(one, configs.for_dtype(config, one.dtype), H100)
    assert bool(answer) == (not sentence) and answer.reason.startswith(sentence)
    assert configs.needs_proof(one, config)


def test_fp32_steps_hold_as_many_bytes() -> None:
    config = Config("conv_bn_act_1x1", 64, 64, 64)
    assert configs.for_dtype(config, "float16") is configs.for_dtype(config, "bfloat16") is config
    assert configs.for_dtype(config, "float32").block_k == 32
    assert configs.for_dtype(Config("conv_bn_act_1x1", 64, 64, 16), "float32").block_k == 16  # tl.dot's least
    assert configs.for_dtype(Config("cudnn"), "float32") == Config("cudnn")


@pytest.mark.parametrize("kernel", SHIPPED)
def test_shipped_configs_are_distinct_in_themselves_and_in_print(kernel: str) -> None:
    """A table is keyed by what is printed."""
    for dtype in DTYPES:
        sized = {configs.for_dtype(config, dtype) for config in SHIPPED[kernel]}
        assert len({str(config) for config in sized}) == len(sized)
    assert [name for name, n in Counter(map(str, SHIPPED[kernel])).items() if n > 1] == []
    assert {config.kernel for config in SHIPPED[kernel]} == {kernel}


@pytest.mark.parametrize("kernel", SHIPPED)
def test_every_shipped_config_is_legal_somewhere(kernel: str) -> None:
    """A config that no launch may use would be compiled and tested for nothing."""
    mine = [one for one in net_launches() if one.kernel == kernel and one.dtype != "float32"]
    used = {config for one in mine for on in GPUS.values() for config in configs.candidates(one, on)}
    assert [str(config) for config in SHIPPED[kernel] if config not in used] == []


def test_stock_runs_one_convolution_not_a_chain() -> None:
    names = [config.kernel for config in configs.stock_candidates(ONE)]
    assert names == list(configs.STOCK)
    assert all(config.stock and str(config) == config.kernel for config in configs.stock_candidates(ONE))
    assert [c.kernel for c in configs.stock_candidates(launch(conv(8, 8, epilogue=Epilogue())))] == ["cudnn"]
    assert configs.stock_candidates(tail(64, 64, 256)) == ()
    assert configs.stock_candidates(LaunchSpec("conv_bn_act_1x1", (conv(64, 64),), conv(32, 64))) == ()
