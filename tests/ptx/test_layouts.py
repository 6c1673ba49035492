"""Operands of wgmma as CuTe lays them out and describes them, and the formulas of tests/support/fragments.py."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.test_wgmma import B_AT, Product, kernel
from tests.support import fragments
from tests.support.cute import printed

pytestmark = pytest.mark.slow  # CuTe's headers take a compiler some seconds


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    return printed("operands.cpp", tmp_path_factory.mktemp("cute"))


OPERANDS = [f"{pitch}-k-{bits}-64-{256 // bits}" for bits in (16, 32) for pitch in (16, 32, 64, 128)]
OPERANDS += [f"{pitch}-mn-16-{rows}-16" for rows in (64, 128) for pitch in (16, 32, 64, 128)]


@pytest.mark.parametrize("operand", OPERANDS)
def test_operands_as_cute_describes_them(operand: str, cute: dict[str, list[int]]) -> None:
    """Operand b lies where CuTe's layout says, and so does a if it has its 64 rows; the descriptors are CuTe's."""
    _, major, bits, rows, depth = operand.split("-")
    columns, dtype, across = int(rows), "tf32" if bits == "32" else "bf16", int(major == "mn")
    described, *positions = cute[operand]
    p = Product(columns, dtype)
    size = int(bits) // 8
    at = size * np.array(positions).reshape(columns, int(depth), 1) + np.arange(size)
    memory = p.memory.copy()
    bits_of = {2: np.uint16, 4: np.uint32}[size]

    def place(raw: np.ndarray, start: int) -> int:
        memory[start + at] = np.ascontiguousarray(raw, bits_of).view(np.uint8).reshape(at.shape)
        return described + (start >> 4)

    b = place(p.raw_b, B_AT)
    a = place(p.raw_a, 0) if columns == 64 else p.descriptors[0]
    p.memory = memory
    transposed = (across if columns == 64 else 0, across)
    p.check(p.launch(kernel(columns, dtype, False, transposed), descriptors=(a, b)))


@pytest.mark.parametrize(
    ("name", "places", "rows"),
    [
        ("mma-a-8-16", fragments.mma_a(8, 16), 16),
        ("mma-b-8-16", fragments.mma_b(8, 16)[::-1], 8),
        ("mma-a-8-32", fragments.mma_a(8, 32), 16),
        ("mma-b-8-32", fragments.mma_b(8, 32)[::-1], 8),
        ("mma-d", fragments.mma_d(), 16),
        ("wgmma-a-32", fragments.wgmma_a(32), 64),
    ],
)
def test_fragments(name: str, places: tuple[np.ndarray, np.ndarray], rows: int, cute: dict[str, list[int]]) -> None:
    """CuTe counts the values of an operand column by column; b's rows are the product's columns."""
    assert (places[0] + rows * places[1]).reshape(-1).tolist() == cute[name]
