"""Predict the time of a launch by a model of tiles, bytes and tensor-core cycles.

For a launch of inference of ``tiles`` programs::

    compute   = ceil(tiles / multiprocessors) * block_m * block_n * gemm_k / (multiply-adds per second of one * fill)
    L2        = tiles * (block_m + block_n) * gemm_k * itemsize / L2 bandwidth        (every program reads its operands)
    DRAM      = min_bytes / copy bandwidth
    waits     = ceil(tiles / resident) * K steps * load latency / steps in flight
    join      = arrival of all splits + splits * block_m * block_n * 4 bytes / rate of one multiprocessor
    time      = launch cost + ramp + max(compute, L2 / busy, DRAM / busy, waits) + join

- Programs on one multiprocessor share its rate, so the fullest multiprocessor decides. They wait side by side, as many
  as are ``resident`` by registers, shared memory and threads.
- ``busy`` is the part of the multiprocessors that have a program at all.
- ``fill`` is the part of the tensor cores' rate that a tile shape reaches. A 64-row instruction per warp group needs
  block_n of 128 to be fed from shared memory at full rate; a narrower tile spends its cycles on operands.
- ``ramp`` is the latency of the first loads and of the last store, about 2 us.
- ``waits`` is what a batch of one pays: few programs, each a long chain of steps, of which only the pipeline's are in
  flight.
- ``splits`` programs share the steps of a tile: there are as many times more programs, each with as many times fewer
  steps. ``join`` is what the last of them adds; 0 without splits.

The model ranks candidates; its absolute times are no measurements. Torch-free.
"""

from __future__ import annotations

from ..devices import Device, Gpu
from ..spec import ITEMSIZE, LaunchSpec
from . import configs
from .configs import Config
from .routes import merged_groups, stem_step
from .training_configs import gemm, is_training, min_bytes

RAMP_S = 2e-6
SCALAR_RATE = 1 / 8  # of fp32 products outside the tensor cores against TF32: 19.5 of 156 TFLOP/s on an A100
LATENCY_S = 0.5e-6  # of a load from L2 or memory, shared by the steps that are in flight
ARRIVAL_S = 1.0e-6  # of a hand-written barrier over up to 64 programs: store, fence, atomic add; measured on an H200
ONE_SM_RATE = 66.7e9  # bytes/s that one multiprocessor copies by itself; measured on an H100


def tiles(launch: LaunchSpec, config: Config) -> int:
    """Return the number of programs of the launch."""
    conv = launch.last
    if launch.kernel == "stem":
        hp, wp = conv.out_hw()
        return -(-conv.n * wp // config.block_m) * -(-hp // config.rows) * -(-conv.co // config.block_n)
    across = -(-conv.gemm_m // config.block_m)
    if len(launch.convs) > 1:
        return across
    return configs.tiles(launch, config) * config.splits


REGISTERS_BESIDES_SUMS = 56
"""Addresses, masks and operands of a thread, as counted in docs/tables/static-budgets.md."""


def resident(launch: LaunchSpec, config: Config, gpu: Gpu) -> int:
    """Return the number of programs that fit on a multiprocessor at a time."""
    threads = 32 * config.num_warps
    registers = threads * min(255, configs.accumulators(launch, config) + REGISTERS_BESIDES_SUMS)
    shared = configs.shared_bytes(launch, config) + 1024  # what the driver takes per block
    fits = gpu.registers_per_sm // registers, gpu.shared_per_sm // shared, gpu.max_threads_per_sm // threads
    return max(1, min(fits))


def _macs_per_tile(launch: LaunchSpec, config: Config) -> float:
    """Return the multiply-adds of one program, including masked ones."""
    total = 0.0
    last = launch.last
    groups = merged_groups(last)
    k = last.ci // groups * last.r * last.s
    if launch.kernel == "stem":
        rows = (2 * config.rows + 1) * 3  # conv rows of the strip, each column of a window by itself
        return config.block_m * config.block_n * last.r * stem_step(last) * rows
    if len(launch.convs) > 1:
        width, first = configs.chain_width(launch), launch.first
        total += config.block_m * width * first.r * first.s * _padded(first.ci, config.block_k)
        across = _padded(last.co, config.block_n)
        total += config.block_m * across * width
    else:
        across = config.block_n
        taps = last.r * last.s if launch.kernel == "conv_bn_act_3x3" else 1
        total += config.block_m * across * taps * _padded(k // taps, config.block_k)
    if launch.projection is not None:
        total += config.block_m * across * _padded(launch.projection.ci, config.block_k)
    return total


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _steps(launch: LaunchSpec, config: Config) -> int:
    """Return the K steps that one program runs one after another."""
    last = launch.last
    if launch.kernel == "stem":
        return (2 * config.rows + 1) * 3 * last.r
    if len(launch.convs) > 1:
        first = launch.first
        steps = first.r * first.s * -(-first.ci // config.block_k)
        passes = -(-last.co // config.block_n)
    else:
        taps = last.r * last.s if launch.kernel == "conv_bn_act_3x3" else 1
        steps = taps * -(-(last.ci // merged_groups(last) * last.r * last.s // taps) // config.block_k)
        steps = -(-steps // config.splits)
        passes = 1
    per_pass = 0 if len(launch.convs) == 1 else 1
    if launch.projection is not None:
        per_pass += -(-launch.projection.ci // config.block_k)
    return steps + passes * per_pass


def bytes_in_flight(launch: LaunchSpec, config: Config) -> int:
    """Return the operand bytes that a program's pipeline loads at a time; a short program has fewer steps."""
    steps = min(config.num_stages, _steps(launch, config))
    return steps * (config.block_m + config.block_n) * config.block_k * ITEMSIZE[launch.dtype]


def _operand_bytes_per_tile(launch: LaunchSpec, config: Config) -> float:
    """Return the bytes that one program loads, from L2 or memory."""
    size, last = ITEMSIZE[launch.dtype], launch.last
    k = last.ci // merged_groups(last) * last.r * last.s
    if launch.kernel == "stem":
        return (2 * config.rows + 1) * 3 * (config.block_m * 12 + config.block_n * k) * size / 2
    width = configs.chain_width(launch)
    total = 0.0
    if width:
        first = launch.first
        total += (config.block_m + width) * first.r * first.s * first.ci + last.co * width
        passes = -(-last.co // config.block_n)
    else:
        total += (config.block_m + config.block_n) * k
        passes = 1
    if launch.projection is not None:
        total += (config.block_m + config.block_n) * launch.projection.ci * passes
    return total * size


def fill(launch: LaunchSpec, config: Config) -> float:
    """Return the part of the tensor cores' rate that the tile's shape can reach."""
    narrow = min(1.0, config.block_n / 128) if not configs.chain_width(launch) else 1.0
    short = min(1.0, config.block_m / (64 * max(1, config.num_warps // 4)))
    return (0.35 + 0.65 * narrow) * short * _issue_rate(launch)


def _issue_rate(launch: LaunchSpec) -> float:
    """Return the part of the tensor cores' rate that remains where issuing instructions bounds the main loop.

    Counted in machine code (docs/tables/static-budgets.md): lanes load 2 bytes each, or find their tap by division.
    """
    conv = launch.last
    if launch.kernel == "stem":
        return 0.4
    if launch.kernel != "conv_bn_act":
        return 1.0
    return 0.5 if conv.ci // merged_groups(conv) * ITEMSIZE[conv.dtype] % 16 == 0 else 0.2


def predict_seconds(launch: LaunchSpec, config: Config, device: Device) -> float:
    """Return the predicted seconds of a launch, of inference or of a training step, with one of our configs.

    Args:
        launch: the launch to predict.
        config: a config of the launch's kernel; not one of PyTorch's own.
        device: a GPU with known ceilings.
    """
    predict = _training_seconds if is_training(launch) else _inference_seconds
    return predict(launch, config, device)


def _inference_seconds(launch: LaunchSpec, config: Config, device: Device) -> float:
    gpu = device.gpu
    assert gpu is not None
    count = tiles(launch, config)
    rate = device.rate(launch.dtype).value / 2 / gpu.sms  # multiply-adds per second of one multiprocessor
    if not configs.on_tensor_cores(launch):
        rate *= SCALAR_RATE
    compute = -(-count // gpu.sms) * _macs_per_tile(launch, config) / config.splits / (rate * fill(launch, config))
    operands = count * _operand_bytes_per_tile(launch, config) / config.splits / gpu.l2_bandwidth.value
    # a few programs cannot draw the whole bandwidth: each multiprocessor has a share
    busy = min(1.0, count / gpu.sms)
    memory = launch.min_bytes() / device.bandwidth.value / max(busy, 0.05)
    copies = 0.95 if config.descriptors else 1.0  # the copy engine spares address arithmetic in the main loop
    waves = -(-count // (gpu.sms * resident(launch, config, gpu)))
    waits = waves * _steps(launch, config) * LATENCY_S / max(1, config.num_stages - 1)
    work = max(compute * copies, operands / max(busy, 0.05), memory, waits)
    return gpu.launch_s.value + RAMP_S + work + _join_seconds(config)


def _join_seconds(config: Config) -> float:
    """Return the seconds from the last split's sum to the finished tile; 0 without splits."""
    if config.splits == 1:
        return 0.0
    return ARRIVAL_S + config.splits * config.block_m * config.block_n * 4 / ONE_SM_RATE


def _training_seconds(launch: LaunchSpec, config: Config, device: Device) -> float:
    """Predict without the terms for latency and launch cost: a training batch fills the GPU."""
    gpu = device.gpu
    assert gpu is not None
    rows, columns, products, count = gemm(launch)
    tiles = -(-rows // config.block_m) * -(-columns // config.block_n) * count
    steps = -(-products // config.block_k)
    work = tiles * steps  # a wgrad splits its steps over programs
    programs = tiles if launch.kernel != "conv_wgrad" else min(work, 2 * gpu.sms)
    rate = device.rate(launch.dtype).value / 2 / gpu.sms
    if not configs.on_tensor_cores(launch):
        rate *= SCALAR_RATE
    fill = (0.35 + 0.65 * min(1.0, config.block_n / 128)) * min(1.0, config.block_m / (16 * config.num_warps))
    waves = -(-programs // gpu.sms) * gpu.sms / programs
    compute = waves * work * config.block_m * config.block_n * config.block_k / gpu.sms / (rate * fill)
    operands = work * (config.block_m + config.block_n) * config.block_k * ITEMSIZE[launch.dtype]
    return max(compute, operands / gpu.l2_bandwidth.value, min_bytes(launch) / device.bandwidth.value)
