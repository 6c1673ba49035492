"""The layouts of fragments.h and the emulator's ldmatrix against CuTe's traits, an independent source.

CuTe's headers come from the PyPI package nvidia-cutlass and compile on the host, in a few seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_fast.benchmarks import emulation
from tests.support.cute import printed

LANES = {"wgmma.a": 128, "wgmma.d": 128, "swizzle": 8, "descriptor": 1, "corners": 1}
"""Where they are not a warp's: a warpgroup's threads, and rows."""


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """Return by name, for each lane, the indices of its values."""
    out = {}
    for name, indices in printed("layouts.cpp", tmp_path_factory.mktemp("cute")).items():
        lanes = LANES.get(name, 32)
        each = len(indices) // lanes
        out[name] = [indices[each * lane : each * (lane + 1)] for lane in range(lanes)]
    return out


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
@pytest.mark.parametrize(("operand", "rows"), [("a", 16), ("b", 8), ("d", 16)])
def test_mma_fragments(dtype: str, operand: str, rows: int, cute, emulator: Path) -> None:
    ours = emulation.load(emulator).fragments()[operand]
    theirs = cute[f"{dtype}.{operand}"]
    assert [[row + rows * column for row, column in lane] for lane in ours] == theirs


@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(matrices: int, cute, emulator: Path) -> None:
    """Lane l reads from word 4 l of shared memory, where word i holds i."""
    got = emulation.load(emulator).probe_ldmatrix(matrices)
    theirs = [[bit // 32 for bit in lane[::32]] for lane in cute[f"ldmatrix_x{matrices}"]]
    assert got == theirs


@pytest.mark.parametrize("what", ["wgmma.a", "wgmma.d", "swizzle"])
def test_hopper(what: str, cute, emulator: Path) -> None:
    assert emulation.load(emulator).hopper_layouts()[what] == cute[what]


def test_matrix_descriptor(cute, emulator: Path) -> None:
    """Equals the descriptor that cute/layouts.cpp fills in, field by field."""
    assert [[emulation.load(emulator).wgmma_descriptor(0x2C00 + 32, 2048)]] == cute["descriptor"]


def test_corners_of_im2col(cute, emulator: Path) -> None:
    """Compares the windows of cute/layouts.cpp by side (padding, filter, dilation), W before H."""
    module = emulation.load(emulator)
    found = []
    for sides in ([(1, 3, 1), (1, 3, 1)], [(3, 7, 1), (2, 5, 1)], [(4, 3, 4), (0, 1, 1)]):
        found += [module.im2col_lower(side[0]) for side in sides]
        found += [module.im2col_upper(*side) for side in sides]
    assert [found] == cute["corners"]
