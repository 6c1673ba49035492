"""The interpreter computes the same once it skips what nobody reads."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from resnet_fast.backends.triton.interpreter import _check_no_overflow_in_vain, quicken
from resnet_fast.backends.triton.launch import INTERPRETED

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="about the interpreter, which runs no compiled kernel"),
]


@triton.jit
def _sums_kernel(a_ptr, b_ptr, sum_ptr, product_ptr):
    at = tl.arange(0, 4)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(sum_ptr + at, a + b)
    tl.store(product_ptr + at, a * b - 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.float16, torch.float32])
def test_sums_are_those_of_torch_beyond_the_range_of_integers_too(dtype: torch.dtype) -> None:
    quicken()
    most = 3 if dtype.is_floating_point else torch.iinfo(dtype).max
    a, b = torch.tensor([0, 1, most, -most]).to(dtype), torch.tensor([5, -3, 2, -2]).to(dtype)
    found = torch.empty(2, 4, dtype=dtype)
    _sums_kernel[(1,)](a, b, found[0], found[1])
    assert torch.equal(found, torch.stack([a + b, a * b - 1]))


def test_quickened_twice_is_quickened_once() -> None:
    def patched() -> tuple[Any, ...]:
        return interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype

    quicken()
    once = patched()
    quicken()
    assert patched() == once and not interpreter.interpreter_builder.options.sanitize_overflow


@pytest.mark.parametrize("debug", [False, True])
def test_the_check_for_overflow_stays_where_somebody_reads_it(debug: bool) -> None:
    builder = SimpleNamespace(options=dataclasses.replace(interpreter.InterpreterOptions(), debug=debug))
    _check_no_overflow_in_vain(builder)
    assert builder.options.sanitize_overflow == debug and builder.options.debug == debug
