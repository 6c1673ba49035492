"""The end of a block and its gradient, against fp64 and stock PyTorch in the same dtype."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import numerics
from resnet_fast.backends.triton.training import block_end as kernel
from resnet_fast.backends.triton.training.block_end import block_end, block_end_backward
from resnet_fast.benchmarks.tables.counting import count
from resnet_fast.calls import Norm
from tests.support import batch_norm_cases as cases
from tests.support.grids import covering

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_outputs")]

SHAPES = [(1, 1, 1, 1), (3, 20, 7, 5), (1, 64, 9, 11), (3, 136, 5, 3), (2, 5, 17, 19)]
SHORTCUTS = ["none", "tensor", "raw"]


def stock(y: Tensor, norm: Norm) -> Tensor:
    """Run the norm as autocast does: in the dtype of y, with fp32 parameters."""
    z = F.batch_norm(y.float(), norm.mean, norm.var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return z.to(y.dtype)


@pytest.mark.parametrize(
    "shape,dtype,shortcut,relu", covering(product(SHAPES, cases.DTYPES, SHORTCUTS, (True, False))), ids=str
)
def test_forward(shape: tuple[int, int, int, int], dtype: torch.dtype, shortcut: str, relu: bool) -> None:
    y = cases.raw(*shape, dtype)
    rows, norm = cases.vectors(y)
    pre, eager = cases.mapped(y, rows, torch.float64), stock(y, norm)
    given = given_rows = None
    if shortcut != "none":
        given = cases.raw(*shape, dtype)
        if shortcut == "raw":
            given_rows, given_norm = cases.vectors(given)
            pre, eager = pre + cases.mapped(given, given_rows, torch.float64), eager + stock(given, given_norm)
        else:
            pre, eager = pre + given.double(), eager + given
    z = block_end(y, rows, given, given_rows, relu)
    assert z.is_contiguous(memory_format=torch.channels_last)
    want, eager = (pre.relu(), eager.relu()) if relu else (pre, eager)
    numerics.assert_close(z, want, eager, 2, pre if relu else None)
    assert torch.equal(z, block_end(y, rows, given, given_rows, relu))


@pytest.mark.parametrize(
    "shape,dtype,projection,masked", covering(product(SHAPES, cases.DTYPES, (False, True), (False, True))), ids=str
)
def test_backward(
    shape: tuple[int, int, int, int], dtype: torch.dtype, projection: bool, masked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernel, "walk", cases.walks_of(1 + SHAPES.index(shape) % 3))
    y, dz = cases.raw(*shape, dtype), cases.raw(*shape, dtype)
    rows, _ = cases.vectors(y)
    yd = cases.raw(*shape, dtype) if projection else None
    rows_d = None if yd is None else cases.vectors(yd)[0]
    z = cases.raw(*shape, dtype).relu() if masked else None
    g, partials, partials_d = block_end_backward(dz, z, y, rows, yd, rows_d)
    if z is None:
        assert g is dz
    else:
        assert torch.equal(g, torch.ops.aten.threshold_backward(dz, z, 0)) and g.dtype == dtype
        assert g.is_contiguous(memory_format=torch.channels_last)
    cases.assert_sums(partials, g, y, rows)
    assert (partials_d is None) == (yd is None)
    if yd is not None and rows_d is not None and partials_d is not None:
        cases.assert_sums(partials_d, g, yd, rows_d)
    again = block_end_backward(dz, z, y, rows, yd, rows_d)
    assert all(torch.equal(a, b) for a, b in zip((g, partials), again[:2], strict=True))


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_what_is_broken_shows(dtype: torch.dtype) -> None:
    """NaN and infinity pass as in stock PyTorch: values in forward, and in backward the gradient where z is NaN."""
    y = cases.raw(2, 20, 3, 5, dtype)
    rows, _ = cases.vectors(y)
    y[0, 4, 1, 2], y[1, 5, 0, 0], y[1, 6, 2, 4] = float("nan"), float("inf"), float("-inf")
    z = block_end(y, rows, None, None, True)
    want = cases.mapped(y, rows, torch.float32).relu()
    assert torch.equal(z.isnan(), want.isnan()) and torch.equal(z.isinf(), want.isinf())
    dz = cases.gradient(y)
    g, partials, _ = block_end_backward(dz, z, y, rows, None, None)
    assert torch.equal(g, torch.ops.aten.threshold_backward(dz, z, 0)) and g[0, 4, 1, 2] == dz[0, 4, 1, 2]
    broken = torch.zeros(20, dtype=torch.bool)
    broken[[4, 5, 6]] = True
    assert not partials[0].isnan().any() and not partials[1][:, ~broken].isnan().any()
    assert partials[1][:, 4].isnan().any()


@pytest.mark.parametrize("dtype", cases.DTYPES[:2])
def test_every_byte_once(dtype: torch.dtype) -> None:
    y = cases.raw(2, 64, 9, 11, dtype)
    rows, _ = cases.vectors(y)
    size, vector = y.numel() * y.element_size(), 4 * 64
    with count() as counts:
        z = block_end(y, rows, y.clone(memory_format=torch.preserve_format), rows.clone(), True)
        block_end_backward(cases.gradient(y), z, y, rows, None, None)
    forward, backward = counts.launches
    for name in ("y_ptr", "shortcut_ptr"):
        assert forward[name].read == forward[name].read_unique == size
    assert forward["z_ptr"].written == forward["z_ptr"].written_unique == size
    assert forward["vectors_ptr"].read_unique == forward["shortcut_vectors_ptr"].read_unique == 2 * vector
    for name in ("dz_ptr", "z_ptr", "y_ptr"):
        assert backward[name].read == backward[name].read_unique == size
    assert backward["g_ptr"].written == backward["g_ptr"].written_unique == size
    assert backward["vectors_ptr"].read_unique == vector
