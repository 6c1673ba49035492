"""The native library's submission of launches: argument bytes, addresses, and failures (csrc/ops/submit.cpp)."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from resnet_fast import native

LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
"""Of the signature of cuLaunchKernelEx: config, function, parameters, extra."""

ROWS = (
    ("first", 11, (3, 2, 1), 128, 4096, ((0, 32), struct.pack("<i", 7), (2, 0), (1,))),
    ("empty", 12, (0, 1, 1), 128, 0, ()),
    ("second", 13, (1, 1, 1), 64, 0, ((1, 0),)),
)


@pytest.fixture
def library() -> Iterator[Any]:
    found = native.submitter()
    assert not isinstance(found, str), found
    yield found
    found.stand_in(0)
    found.sink(False)
    found.sunk()


def test_arguments_have_the_addresses_of_the_call(library: Any) -> None:
    library.sink(True)
    assert library.submit(library.program(ROWS), [0x1000, 0x2000, 0], [0.25, 0.1], 0, 0)
    first, _, second = library.sunk()
    assert first[:4] == ("first", (3, 2, 1), 128, 4096)
    assert first[4] == [struct.pack("<Q", 0x1020), struct.pack("<i", 7), bytes(8), struct.pack("<f", 0.1)]
    assert second[4] == [struct.pack("<Q", 0x2000)]


def test_numbers_are_those_of_each_call(library: Any) -> None:
    library.sink(True)
    program = library.program((("one", 11, (1, 1, 1), 32, 0, ((0,), bytes(1), (1,), (0, 0), (0,))),))
    for numbers in ([0.1, 0.9], [1, 1e-45], [float("nan"), 0.3, 7.0]):
        assert library.submit(program, [0x1000], numbers, 0, 0)
        ((*_, arguments),) = library.sunk()
        first, _, second, _, again = arguments
        assert (first, second, again) == tuple(struct.pack("<f", numbers[i]) for i in (0, 1, 0))


def test_an_unaligned_address_launches_nothing(library: Any) -> None:
    library.sink(True)
    assert not library.submit(library.program(ROWS), [0x1000, 0x2008, 0], [0, 0], 0, 0)
    assert library.sunk() == []


def test_launches_are_made_in_order_and_stop_at_a_failure(library: Any) -> None:
    made: list[tuple[int, int, int]] = []

    @LAUNCH
    def launch(config: int, function: int, parameters: int, extra: int) -> int:
        grid_x = ctypes.c_uint.from_address(config).value
        stream = ctypes.c_void_p.from_address(config + 32).value or 0
        made.append((function, grid_x, stream))
        return 1 if function == 13 else 0

    library.stand_in(ctypes.cast(launch, ctypes.c_void_p).value)
    with pytest.raises(RuntimeError, match="launching second: CUDA error 1"):
        library.submit(library.program((*ROWS, ROWS[0])), [0x1000, 0x2000, 0], [0, 0], 0, 99)
    assert made == [(11, 3, 99), (13, 1, 99)]  # a grid without programs is not launched


def test_wrong_arguments_raise(library: Any) -> None:
    program = library.program(ROWS)
    with pytest.raises(RuntimeError, match="expected the address of each buffer: 3, got 1"):
        library.submit(program, [0x1000], [0, 0], 0, 0)
    with pytest.raises(RuntimeError, match="expected the numbers of the call: 2, got 1"):
        library.submit(program, [0x1000, 0x2000, 0], [0.5], 0, 0)
    with pytest.raises(TypeError):
        library.submit(program, [0x1000, 0x2000, 0], [0.5, "a"], 0, 0)
    with pytest.raises((TypeError, ValueError)):
        library.submit(None, [], [], 0, 0)
    with pytest.raises((TypeError, SystemError)):
        library.program((("name", "function", (1, 1, 1), 32, 0, ()),))
    with pytest.raises((IndexError, TypeError)):
        library.program((("name",),))
