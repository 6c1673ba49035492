"""Pack the arguments of a launch as the parameters of its compiled kernel.

Triton's signature gives each argument a type; arguments that were compiled in have the type ``constexpr`` and are no
parameters. A tensor descriptor becomes a tensor map with shape and strides where the kernel was compiled for maps, and
otherwise a pointer with shape, strides, flags, shape and strides. Two scratch pointers come last. Count and sizes are
compared with what the PTX declares: a difference would be read as other arguments.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.triton.submission import FORMATS, HOST_TYPES
from ...errors import UserError
from .memory import Memory

_FORMATS = FORMATS | {"fp16": "e", "fp8e4nv": "B", "fp8e5": "B"}

MAP_TYPES = {
    0: "u8", 1: "u16", 2: "u32", 3: "s32", 4: "u64", 5: "s64", 6: "f16", 7: "f32", 8: "f64", 9: "bf16", 10: "f32_ftz",
    11: "tf32", 12: "tf32_ftz",
}  # fmt: skip
"""CUtensorMapDataType -> the machine's name of the element type."""

SWIZZLES = (0, 32, 64, 128)
"""CUtensorMapSwizzle -> bytes of the swizzled row."""


class PtxParameter(NamedTuple):
    """One parameter of a launch: its name, its bytes, and the argument in words, if it is one."""

    name: str
    packed: bytes
    text: str = ""


def parameters(
    names: Sequence[str], kinds: Sequence[Any], maps: Any, values: Sequence[Any], memory: Memory, engine: Any
) -> list[PtxParameter]:
    """Return the parameters of a launch, without the scratch pointers.

    Args:
        names, kinds: the kernel's arguments and Triton's type of each.
        maps: Triton's description of the tensor map of each descriptor; None where the kernel was compiled without.
        values: the arguments.
        memory: where the tensors among them are registered; it gives their addresses.
        engine: the module ``_ptx``, which encodes tensor maps.

    Raises:
        UserError: a tensor without memory of the CPU, or an argument of a type that no parameter has.
    """
    left, given = iter(maps or ()), zip(names, kinds, values, strict=True)
    return [p for one in given for p in _flat(*one, left if maps else None, memory, engine)]


def _flat(
    name: str, kind: Any, value: Any, maps: Iterator[Any] | None, memory: Memory, engine: Any
) -> Iterator[PtxParameter]:
    if kind == "constexpr":
        return
    if isinstance(kind, tuple):
        for i, (part, inner) in enumerate(zip(kind, value, strict=True)):
            yield from _flat(f"{name}[{i}]", part, inner, maps, memory, engine)
    elif kind.startswith("tensordesc"):
        yield from _descriptor(name, value, None if maps is None else next(maps), memory, engine)
    elif kind.startswith("*"):
        yield pointer(name, value, memory)
    else:
        yield PtxParameter(name, _number(name, kind, value), text=f"{name}={value}")


def names(name: str, kind: Any, maps: Any) -> list[tuple[str, bool]]:
    """Return the parameters that an argument of this type becomes: the name of each, and whether it is a pointer."""
    if kind == "constexpr":
        return []
    if isinstance(kind, tuple):
        return [n for i, inner in enumerate(kind) for n in names(f"{name}[{i}]", inner, maps)]
    if kind.startswith("tensordesc") and maps:
        sizes = 2 * (kind.partition("[")[2].partition("]")[0].count(",") + 1)
        return [(name, False), *[(f"{name}.size", False)] * sizes]
    return [(name, kind.startswith("*"))]


def pointer(name: str, value: Any, memory: Memory) -> PtxParameter:
    """Return a pointer parameter: to a tensor, which is registered in ``memory``, an address as a number, or None."""
    if value is None or isinstance(value, int):
        return PtxParameter(name, struct.pack("<Q", memory.device(value or 0)), f"{name}={value}")
    tensor = _tensor_of(name, value)
    memory.add(tensor, name)
    where = "" if tensor.is_contiguous() else f" strides {tuple(tensor.stride())}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    text = f"{name}={dtype}{tuple(tensor.shape)}{where}"
    return PtxParameter(name, struct.pack("<Q", memory.device(tensor.data_ptr())), text)


def _tensor_of(name: str, value: Any) -> Tensor:
    tensor = getattr(value, "base", value) if not isinstance(value, Tensor) else value
    if not isinstance(tensor, Tensor):
        raise UserError(f"a tensor for {name}", repr(value), "pass tensors, numbers and None to a kernel")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        got = f"one on {tensor.device.type}" if tensor.layout == torch.strided else f"a {tensor.layout} one"
        raise UserError(f"a strided CPU tensor for {name} in the PTX machine", got, "move it with .cpu()")
    return tensor


def _number(name: str, kind: str, value: Any) -> bytes:
    if kind == "bf16":
        return struct.pack("<f", float(value))[2:]
    if kind not in _FORMATS:
        raise UserError(f"an argument of a known type for {name}", repr(kind), "the PTX machine does not pack it")
    return struct.pack("<" + _FORMATS[kind], value)


def _descriptor(
    name: str, value: Any, about: dict[str, Any] | None, memory: Memory, engine: Any
) -> Iterator[PtxParameter]:
    shape, strides = list(value.shape), list(value.strides)
    if about is None:
        yield pointer(f"{name}.base", value.base, memory)
        yield from _sizes(name, "q", shape + strides)
        yield PtxParameter(f"{name}.padding", struct.pack("<b", value.padding == "nan"))
        if hasattr(value, "round_f32_to_tf32"):
            yield PtxParameter(f"{name}.round", struct.pack("<b", value.round_f32_to_tf32))
    else:
        yield _mapped(name, value, about, memory, engine)
    yield from _sizes(name, "i", shape)
    yield from _sizes(name, "q", strides)


def _sizes(name: str, code: str, sizes: Sequence[int]) -> Iterator[PtxParameter]:
    return (PtxParameter(f"{name}.size", struct.pack("<" + code, n)) for n in sizes)


def _mapped(name: str, value: Any, about: dict[str, Any], memory: Memory, engine: Any) -> PtxParameter:
    if about["fp4_padded"] or about.get("is_im2col"):
        raise UserError(f"a tiled tensor map for {name}", "an im2col or fp4 one", "the PTX machine has no such maps")
    kind, size, tensor = about["elem_type"], about["elem_size"], _tensor_of(name, value)
    kind = 11 if getattr(value, "round_f32_to_tf32", False) else HOST_TYPES.get(kind, kind)
    memory.add(tensor, name)
    strides = [size * s for s in value.strides[:-1]]
    packed = tensor_map(
        engine, memory.device(tensor.data_ptr()), kind, list(value.shape)[::-1], strides[::-1],
        list(about["block_size"])[::-1], about["swizzle"], value.padding == "nan",
    )  # fmt: skip
    dtype = str(tensor.dtype).removeprefix("torch.")
    text = f"{name}=map of {dtype}{tuple(value.shape)} by {tuple(about['block_size'])}"
    return PtxParameter(name, packed, text)


def tensor_map(
    engine: Any, address: int, kind: int, shape: list[int], strides: list[int], box: list[int], swizzle: int, nan: bool
) -> bytes:
    """Return the 128 bytes of a tensor map of the machine. Sizes are innermost first, as the driver takes them.

    Args:
        engine: the module ``_ptx``.
        address: of the first element.
        kind: CUtensorMapDataType.
        shape, strides, box: elements, bytes (of all dimensions but the innermost), elements.
        swizzle: CUtensorMapSwizzle.
        nan: whether elements outside are NaN, and not zero.
    """
    packed: bytes = engine.tensor_map(
        address, MAP_TYPES[kind], shape, strides, box, swizzle=SWIZZLES[swizzle], fill="nan" if nan else "zero"
    )
    return packed


def scratch_bytes(size: int, grid: tuple[int, int, int], clusters: int) -> int:
    """Return the bytes of scratch memory that a launch needs, ``size`` per block."""
    return size * math.prod(grid) * clusters


def check(kernel: str, declared: Sequence[Any], packed: Sequence[bytes]) -> None:
    """Compare packed parameters with those that the PTX declares.

    Raises:
        UserError: their number or a size differs.
    """
    want, got = [bytes for _, _, bytes, _ in declared], [len(p) for p in packed]
    if want != got:
        raise UserError(
            f"parameters of {want} bytes, as the PTX of {kernel} declares them",
            f"{got}",
            "the launch belongs to another signature",
        )
