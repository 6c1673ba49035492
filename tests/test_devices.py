"""The table of GPUs: every figure with origin and source, its aliases, and unknown GPUs."""

from __future__ import annotations

import pytest

from resnet_fast import devices
from resnet_fast.devices import H100, ORIGINS, Ceiling, Device, Gpu, detect, gpu, gpus, unknown_gpu
from resnet_fast.errors import UserError

KNOWN = list(gpus().values())


def _resources(device: Device) -> Gpu:
    assert device.gpu is not None
    return device.gpu


def _ceilings(device: Device) -> list[Ceiling]:
    g = _resources(device)
    return [device.bandwidth, *(c for _, c in device.rates), g.l2_bandwidth, g.launch_s]


@pytest.mark.parametrize("device", KNOWN, ids=lambda d: d.name)
def test_every_figure_says_where_it_comes_from(device: Device) -> None:
    for ceiling in _ceilings(device):
        assert ceiling.origin in ORIGINS and ceiling.value > 0
        assert len(ceiling.source) > 20 and "http" not in ceiling.source
        assert ceiling.published is None or ceiling.published > ceiling.value
    assert all(c.published for c in (device.bandwidth, *(c for _, c in device.rates)))


@pytest.mark.parametrize("device", KNOWN, ids=lambda d: d.name)
def test_unmeasured_peaks_are_scaled_as_the_h100_was(device: Device) -> None:
    """Devices and dtypes then compare fairly: none gets a peak that no kernel reaches."""
    for ceiling, reached in ((device.bandwidth, 3.02 / 3.35), *((c, 792 / 989.4) for _, c in device.rates)):
        assert ceiling.published is not None
        assert ceiling.value == pytest.approx(ceiling.published * reached)


def test_only_the_h100s_copy_and_bfloat16_product_are_measured() -> None:
    assert (H100.bandwidth.value, H100.bandwidth.origin) == (3.02e12, "measured")
    assert (H100.rate("bfloat16").value, H100.rate("bfloat16").origin) == (792e12, "measured")
    measured = [c for d in KNOWN for c in _ceilings(d) if c.origin == "measured"]
    assert measured == [H100.bandwidth, H100.rate("bfloat16")]


def test_limits_are_those_of_the_architectures() -> None:
    limits = {name: (_resources(d).arch, _resources(d).shared_per_block // 1024) for name, d in gpus().items()}
    hopper = dict.fromkeys(("h100", "h200", "h100pcie", "gh200", "h20"), (90, 227))
    ada = dict.fromkeys(("rtx4090", "l40s"), (89, 99))
    others = {"a100": (80, 163), "b200": (100, 227), "rtx5090": (120, 99), "b300": (103, 227)}
    assert limits == hopper | ada | others
    for g in map(_resources, KNOWN):
        assert g.shared_per_block < g.shared_per_sm and g.registers_per_sm == 65536
    assert [_resources(d).sms for d in KNOWN] == [132, 132, 108, 148, 128, 114, 132, 78, 142, 170, 148]
    threads = {name: _resources(d).max_threads_per_sm for name, d in gpus().items()}
    assert {name for name, n in threads.items() if n == 1536} == {"rtx4090", "l40s", "rtx5090"}
    assert set(threads.values()) == {1536, 2048}
    assert all(_resources(d).l2_bandwidth.value > d.bandwidth.value for d in KNOWN)


def test_a100_multiplies_no_float8() -> None:
    with pytest.raises(UserError, match="A100 SXM 80 GB has a known rate for, got float8_e4m3fn"):
        gpu("a100").rate("float8_e4m3fn")


def test_devices_are_values() -> None:
    assert {d: d.name for d in KNOWN}[gpu("H100")] == "NVIDIA H100 SXM"  # caches are keyed by them


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "rtx-4090", "RTX_4090"])
def test_names_are_read_as_people_write_them(name: str) -> None:
    assert gpu(name) is devices.RTX_4090


@pytest.mark.parametrize(
    ("name", "todo"), [("h10", "did you mean h100 or h20 or h200 or a100"), ("voodoo", "choose one of h100, h200")]
)
def test_unknown_name_says_which_are_known(name: str, todo: str) -> None:
    with pytest.raises(UserError, match=f"name of a GPU, got '{name}'; {todo}"):
        gpu(name)


@pytest.mark.parametrize(
    ("torch_name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", "h100pcie"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA B300 SXM6 AC", "b300"),
    ],
)
def test_detects_what_torch_calls_the_device(torch_name: str, key: str) -> None:
    assert detect(torch_name) is gpu(key)


@pytest.mark.parametrize(
    "torch_name",
    [
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H100 PCIe MIG 1g.10gb",
        "NVIDIA GH200 144G HBM3e",
        "NVIDIA H20-3e",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA GB300",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GB200",
        "Tesla T4",
        "",
    ],
)
def test_other_models_are_not_mistaken_for_those_in_the_table(torch_name: str) -> None:
    assert detect(torch_name) is None


@pytest.mark.parametrize(
    ("key", "name", "memory_mhz", "bus", "clock_mhz"),
    [
        ("l40s", "NVIDIA L40S", 9001, 384, 2520),
        ("rtx5090", "NVIDIA GeForce RTX 5090", 14001, 512, 2407),
        ("rtx4090", "NVIDIA GeForce RTX 4090", 10501, 384, 2520),
        ("a100", "NVIDIA A100-SXM4-80GB", 1593, 5120, 1410),
        ("h100", "NVIDIA H100 80GB HBM3", 2619, 5120, 1830),
    ],
)
def test_what_the_driver_reports_describes_a_gpu_as_its_data_sheet_does(
    key: str, name: str, memory_mhz: int, bus: int, clock_mhz: int
) -> None:
    """The clocks are those that the drivers of these GPUs report, the H100's that of its white paper."""
    known = gpu(key)
    g = _resources(known)
    found = unknown_gpu(
        name, g.arch, g.sms, g.shared_per_sm, g.shared_per_block, g.l2_bytes, clock_mhz * 1e6, memory_mhz * 1e6, bus
    )
    assert found.bandwidth.value == pytest.approx(known.bandwidth.value, rel=0.01)
    for dtype in ("bfloat16", "float16", "float32"):
        assert found.rate(dtype).value == pytest.approx(known.rate(dtype).value, rel=0.02)
    assert found.bandwidth.origin == "modelled" and f"{memory_mhz} MHz" in found.bandwidth.source
    assert _resources(found).l2_bandwidth.value == pytest.approx(g.l2_bandwidth.value, rel=0.25)
    assert _resources(found).max_threads_per_sm == g.max_threads_per_sm
    assert _resources(found).clock_hz.value == clock_mhz * 1e6


def test_what_a_driver_does_not_report_is_an_h100s_by_multiprocessors() -> None:
    half = unknown_gpu("Half", arch=86, sms=66, shared_per_sm=102400, shared_per_block=101376, l2_bytes=6 << 20)
    assert half.bandwidth.value == pytest.approx(1.51e12)
    assert half.rate("bfloat16").value == pytest.approx(396e12)
    assert {c.origin for c in _ceilings(half)} == {"modelled"} and "66 / 132" in half.bandwidth.source
    g = _resources(half)
    assert (g.arch, g.sms, g.shared_per_block, g.l2_bytes, g.max_threads_per_sm) == (86, 66, 101376, 6 << 20, 1536)
    assert "float8_e4m3fn" not in dict(half.rates)
    hash(half)
