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
    assert limits == {"h100": (90, 227), "h200": (90, 227), "a100": (80, 163), "b200": (100, 227), "rtx4090": (89, 99)}
    for g in map(_resources, KNOWN):
        assert g.shared_per_block < g.shared_per_sm and g.registers_per_sm == 65536
    assert [_resources(d).sms for d in KNOWN] == [132, 132, 108, 148, 128]
    assert [_resources(d).max_threads_per_sm for d in KNOWN] == [2048, 2048, 2048, 2048, 1536]
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
    ("name", "todo"), [("h10", "did you mean h100 or h200"), ("voodoo", "choose one of h100, h200")]
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
    ],
)
def test_detects_what_torch_calls_the_device(torch_name: str, key: str) -> None:
    assert detect(torch_name) is gpu(key)


@pytest.mark.parametrize(
    "torch_name",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
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


def test_unknown_gpu_is_an_h100_by_multiprocessors() -> None:
    half = unknown_gpu("Half", arch=86, sms=66, shared_per_sm=102400, shared_per_block=101376, l2_bytes=6 << 20)
    assert half.bandwidth.value == pytest.approx(1.51e12)
    assert half.rate("bfloat16").value == pytest.approx(396e12)
    assert {c.origin for c in _ceilings(half)} == {"modelled"} and "66 / 132" in half.bandwidth.source
    g = _resources(half)
    assert (g.arch, g.sms, g.shared_per_block, g.l2_bytes, g.max_threads_per_sm) == (86, 66, 101376, 6 << 20, 1536)
    assert "float8_e4m3fn" not in dict(half.rates)
    hash(half)
