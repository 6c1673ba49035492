"""PyTorch's own kernels, taken out of its library and walked."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import pytest

from resnet_fast import native
from resnet_fast.errors import UserError
from resnet_fast.simulation import Launch, MemoryRange, Walk, walk
from resnet_fast.simulation.library import kernels, read_library_kernel, torch_library

TENSOR = 1 << 40
"""Addresses of tensors are multiples of this. They have no content."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def library() -> Path:
    """Return PyTorch's library."""
    if not native.sass_status():
        pytest.skip(native.sass_status().reason)
    try:
        return torch_library()
    except UserError as error:
        pytest.skip(str(error))


def sectors(walked: Walk) -> Counter[str]:
    code, counts = walked.launch.kernel.code, Counter[str]()
    for block in walked.blocks:
        for warp in block.warps:
            path = walked.paths[warp.path]
            for event, place in zip(warp.events, path["instruction"][warp.events["step"]], strict=True):
                counts[code[place].name] += int(event["sectors"])
    return +counts


def tensors(*nbytes: int) -> tuple[MemoryRange, ...]:
    return tuple(MemoryRange(TENSOR * (n + 1), size, f"tensor {n}") for n, size in enumerate(nbytes))


def addresses(*places: int) -> bytes:
    return struct.pack(f"<{len(places)}Q", *(TENSOR * place for place in places))


def test_the_sum_of_two_tensors(library: Path) -> None:
    n = 100_000
    found = kernels(
        library, 90, "vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>", "false>"
    )
    kernel = read_library_kernel(library, 90, found[0])
    assert len(found) == 1 and [size for _, size in kernel.parameters] == [4, 4, 24]
    parameters = (struct.pack("<i", n), struct.pack("<f", 1), addresses(3, 1, 2))
    walked = walk(Launch(kernel, (-(-n // 1024), 1, 1), (128, 1, 1), 0, parameters, tensors(2 * n, 2 * n, 2 * n)))
    assert sectors(walked) == {"LDG": 2 * (2 * n // 32), "STG": 2 * n // 32}
    assert walked.opcodes["LDG.E.128"] == 2 * 4 * 97, "all blocks but the last load 16 bytes a thread"


def test_statistics_and_output_of_a_batch_norm(library: Path) -> None:
    channels, pixels = 256, 6272
    image, vector = 2 * channels * pixels, 4 * channels
    base = "batch_norm_transform_input_channels_last_kernel<c10::BFloat16, float, float, 4>"
    kernel = read_library_kernel(library, 90, kernels(library, 90, base)[0])
    parameters = (
        addresses(1), bytes(8), *(addresses(n) for n in (2, 3, 4, 5, 6)), struct.pack("<i", pixels),
        struct.pack("<i", channels), b"\0",
    )  # fmt: skip
    memory = tensors(image, *[vector] * 4, image)
    walked = walk(Launch(kernel, (8, 2, 1), (32, 16, 1), 0, parameters, memory))
    assert sectors(walked)["STG"] == image // 32
    base = "batch_norm_collect_statistics_channels_last_kernel<at::native::InvStd, c10::BFloat16"
    kernel = read_library_kernel(library, 90, kernels(library, 90, base)[0])
    numbers = (struct.pack("<i", pixels), struct.pack("<i", channels), struct.pack("<f", 1e-5))
    parameters = (*(addresses(n) for n in (1, 2, 3, 4, 5)), *numbers)
    walked = walk(Launch(kernel, (8, 1, 1), (32, 16, 1), 0, parameters, tensors(image, vector, vector, 1 << 20, 4096)))
    assert sectors(walked) == {"LDG": image // 32, "STG": 2 * vector // 32}
    assert list(walked.assumed.values()) == [24], "a root of an unknown variance is taken for an ordinary one"


def test_what_a_library_does_not_have_is_an_error(library: Path) -> None:
    with pytest.raises(UserError, match=r"a kernel of libtorch_cuda.so for sm_90.*'no_kernel'"):
        read_library_kernel(library, 90, "no_kernel")
    with pytest.raises(UserError, match="a library with CUDA kernels"):
        kernels(library.with_name("libtorch_cpu.so"), 90)
