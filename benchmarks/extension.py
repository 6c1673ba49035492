"""Build a C++ file of this folder against PyTorch, once per content of the file and version of torch."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch


def built(source: Path) -> Path:
    """Return the shared library of a C++ file, built where PyTorch keeps extensions unless it is there.

    Its name there follows the source and torch's version, since torch's own cache tells neither apart: another
    version's library lacks symbols. Nothing is locked, and the file appears whole: a build that is killed leaves the
    next ones nothing to wait for.

    Raises:
        RuntimeError: the library cannot be built, for want of a C++ compiler, ninja or a header.
    """
    from torch.utils import cpp_extension

    name = f"resnet_fast_{source.stem}"
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    kept = folder / f"{name}_{key}.so"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = cpp_extension.load(
                name, [str(source)], extra_cflags=["-O2", "-w"], build_directory=place, with_cuda=False,
                is_python_module=False,
            )  # fmt: skip
            os.replace(library, kept)
    return kept
