"""float32 convolutions on a GPU follow PyTorch's own switch; tensors are fake, so no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fast import float32
from resnet_fast.calls import Call, Conv, Norm
from resnet_fast.ops.specs import spec_of
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.routes import launch


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    for names in (("cuda", "all"), ("generic", "all")):
        torch._C._set_fp32_precision_setter(*names, "none")
    torch.backends.cudnn.allow_tf32 = True  # also of conv and rnn


def spec(device: str, dtype: torch.dtype = torch.float32) -> Any:
    with FakeTensorMode():

        def made(*shape: int) -> Tensor:
            return torch.empty(*shape, device=device, dtype=dtype)

        x = made(2, 32, 8, 8).to(memory_format=torch.channels_last)
        norm = Norm(made(32), made(32), made(32), made(32), False, 0.1, 1e-5)
        conv = Conv(made(32, 32, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
        return spec_of(Call("conv_bn_act", x, (conv,), (norm,)), grad=False)


def test_tf32_is_the_default_as_in_stock() -> None:
    assert float32.products_are_tf32() == torch.backends.cudnn.allow_tf32
    assert spec("cuda").tf32


def test_only_float32_on_a_gpu_has_tf32() -> None:
    assert not spec("cpu").tf32
    assert not spec("cuda", torch.float16).tf32


def test_the_switch_of_convolutions_decides_at_each_call() -> None:
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    for value, expected in (("ieee", False), ("tf32", True), ("ieee", False)):
        conv.fp32_precision = value
        assert spec("cuda").tf32 is expected
    torch.backends.cudnn.allow_tf32 = True
    assert spec("cuda").tf32
    torch.backends.cudnn.allow_tf32 = False
    assert not spec("cuda").tf32


def test_switches_above_it_decide_where_it_has_no_value() -> None:
    torch.backends.cudnn.conv.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.backends.cudnn.fp32_precision = "tf32"  # type: ignore[attr-defined]
    assert spec("cuda").tf32
    torch.backends.cudnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert not spec("cuda").tf32


def test_the_precision_of_matrix_products_is_another_switch() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for value in ("highest", "high"):
            torch.set_float32_matmul_precision(value)
            assert spec("cuda").tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_switch_reaches_the_kernel_and_the_key_of_tables() -> None:
    from resnet_fast.backends.triton.launch import product

    exact, rounded = (launch(spec("cuda").with_(tf32=tf32)) for tf32 in (False, True))
    assert str(exact) != str(rounded)
    config = Config(exact.kernel, 32, 32, 32)
    for one, precision in ((exact, "ieee"), (rounded, "tf32")):
        assert product(one.last, config, torch.float32)["PRECISION"] == precision


def test_the_removed_variable_is_no_silent_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FAST_TF32", "0")
    with pytest.warns(RuntimeWarning, match=r"RESNET_FAST_TF32 has no effect: .*conv\.fp32_precision decides"):
        float32.warn_of_removed()
