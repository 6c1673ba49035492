"""Conversions of 8-bit numbers: all values of both formats, and float32 beside each place where a result changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resnet_fast import _ptx
from tests.support.ptx import evaluate, kernel, launch

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def floats(name: str) -> np.ndarray:
    """Return numbers of both signs at, just below and just above the values of the format, and halfway between two."""
    known = torch.arange(256, dtype=torch.uint8).view(DTYPES[name]).double()
    known = known[known.isfinite() & (known >= 0)].sort().values
    places = torch.cat([known, (known[1:] + known[:-1]) / 2]).float().numpy()
    places = np.concatenate(
        [places, np.nextafter(places, np.float32(np.inf)), np.nextafter(places, np.float32(-np.inf))]
    )
    return np.concatenate([places, -places])


def expected(values: np.ndarray, name: str, relu: bool = False) -> np.ndarray:
    """Return PyTorch's bits, with what is too large saturated, as .satfinite says."""
    most = torch.finfo(DTYPES[name]).max
    given = torch.from_numpy(values).clamp(-most, most)
    bits = given.to(DTYPES[name]).view(torch.uint8).numpy().copy()
    bits[np.isnan(values)] = 0x7F
    if relu:
        bits[(values <= 0) | (np.signbit(values) & ~np.isnan(values))] = 0
    return bits


SPECIAL = np.array([np.inf, -np.inf, np.nan, 448, 464, 465, -480, 57344, 61440, 61441, 1e30, -0.0], np.float32)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
def test_to_eight_bits(name: str, relu: bool) -> None:
    a = np.concatenate([floats(name), SPECIAL])
    b = a[::-1].copy()
    opcode = f"cvt.rn.satfinite{'.relu' * relu}.{name}x2"
    pair = evaluate(f"{opcode}.f32 d, a, b;", {"d": np.uint16}, {"a": a.view(np.uint32), "b": b.view(np.uint32)})["d"]
    assert (pair >> 8 == expected(a, name, relu)).all()
    assert (pair & 0xFF == expected(b, name, relu)).all()
    halves = np.arange(1 << 16, dtype=np.uint16)
    both = halves.astype(np.uint32) << 16 | halves[::-1]
    pair = evaluate(f"{opcode}.f16x2 d, a;", {"d": np.uint16}, {"a": both})["d"]
    want = expected(halves.view(np.float16).astype(np.float32), name, relu)
    assert (pair >> 8 == want).all()
    assert (pair & 0xFF == want[::-1]).all()


@pytest.mark.parametrize("name", DTYPES)
def test_from_eight_bits(name: str) -> None:
    pairs = np.arange(1 << 16, dtype=np.uint16)
    want = torch.arange(256, dtype=torch.uint8).view(DTYPES[name]).half().view(torch.uint16).numpy().copy()
    want[np.isnan(want.view(np.float16))] = 0x7FFF
    for relu in ("", ".relu"):
        got = evaluate(f"cvt.rn{relu}.f16x2.{name}x2 d, a;", {"d": np.uint32}, {"a": pairs})["d"]
        assert (got & 0xFFFF == want[pairs & 0xFF]).all()
        assert (got >> 16 == want[pairs >> 8]).all()
        want[want.view(np.float16) <= 0] = 0


def test_what_is_defined() -> None:
    """Half of a pair may be undefined: a store of the other half is none."""
    body = "cvt.rn.satfinite.e4m3x2.f32 %h0, %f1, 0f3F800000; {} st.global.u8 [%p0], %h0;"
    registers = ".reg .f32 %f<2>; .reg .b16 %h<2>;"
    out = np.zeros(1, np.uint8)
    launch(kernel(body.format(""), 1, registers=registers), [out])
    assert out == expected(np.ones(1, np.float32), "e4m3")
    with pytest.raises(_ptx.Fault, match="stores a value"):
        launch(kernel(body.format("shr.u16 %h0, %h0, 8;"), 1, registers=registers), [out])


def test_what_no_gpu_has() -> None:
    for opcode in (
        "cvt.rn.e4m3x2.f32",
        "cvt.satfinite.e5m2x2.f32",
        "cvt.rn.satfinite.f16x2.e4m3x2",
        "cvt.rn.f32.e4m3x2",
    ):
        assert not _ptx.understands(opcode)
