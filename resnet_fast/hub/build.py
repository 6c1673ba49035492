"""Build a package for Hugging Face's ``kernels`` library: ``python -m resnet_fast.hub.build OUT``.

    OUT/README.md
    OUT/build/torch-cuda/__init__.py          layers, stats, strict, use_backend
                         metadata.json        name, id, version, licence, digest of every file
                         hub/ blocks/ ops/ …  modules of resnet_fast, byte for byte
                         resnet_fast/         the same package, for old releases of kernels
    OUT/build/torch-cpu/                      the same modules, for a torch without CUDA

Only what the layers need is copied: the backends, and everything that :mod:`resnet_fast.hub.layers` and they import.
Kernels are Triton's, so one variant serves every torch, CUDA and Python; there is no native library in it, so launches
are submitted by Triton one after another. The id, under which kernels loads the package, ends in a digest of the files.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import _version
from ..errors import UserError
from ..io import safe_files

PACKAGE = Path(__file__).resolve().parents[1]

NAME = "resnet-fast"

VARIANTS: dict[str, dict[str, Any]] = {
    "torch-cuda": {"type": "cuda", "archs": ["8.0+PTX"]},  # 8.0 and newer: what Triton's kernels here are made for
    "torch-cpu": {"type": "cpu"},
}
"""Folder in ``build`` -> the backend in its metadata."""

FOREIGN = {
    "torch": "",
    "triton": "comes with a CUDA torch; without it, its backend is not available",
    "numpy": "compares samples of the weights with what was folded",
    "torchvision": "only its FrozenBatchNorm2d, where it is installed",
    "filelock": "only to write a table of measured kernels or a proof",
}
"""What the modules may import beside the standard library and each other, and what for."""

ROOTS = ("hub/layers.py", "backends")
"""What is copied with everything that it imports. A backend's modules are imported by names that are put together."""

INIT = '''"""resnet_fast {version} for Hugging Face's kernels library, built by resnet_fast.hub.build."""

from .dispatch.record import stats, strict
from .dispatch.select import use_backend
from .hub import layers

__all__ = ["layers", "stats", "strict", "use_backend"]
'''

OLD_RELEASES = '''"""The package one folder up, for releases of kernels that look for it in a folder of its name."""

import importlib.util
import sys
from pathlib import Path

_name = "{id}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).resolve().parents[1] / "__init__.py")
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_name] = _module
    _spec.loader.exec_module(_module)
__all__ = sys.modules[_name].__all__
globals().update({{name: getattr(sys.modules[_name], name) for name in __all__}})
'''

CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
---

# resnet_fast

Fused conv-BN-ReLU-add layers for ResNets: Triton kernels on a GPU, oneDNN on a CPU, in inference and training. Version
{version}. Layers for torchvision's `BasicBlock` and `Bottleneck`, and for transformers' `ResNetBasicLayer`,
`ResNetBottleNeckLayer` and `ResNetEmbeddings`.

```python
from kernels import LayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from torchvision.models import resnet

replace_kernel_forward_from_hub(resnet.Bottleneck, "Bottleneck")
fused = LayerRepository("OWNER/resnet-fast", layer_name="Bottleneck", version={major})
with use_kernel_mapping({{"Bottleneck": {{"cuda": fused}}}}):
    model = kernelize(resnet.resnet50().cuda().eval(), mode=Mode.INFERENCE)
```
"""


def build(out: Path) -> list[Path]:
    """Write the package into ``out``, in place of one that was built there before.

    Returns:
        The folder of each variant.

    Raises:
        UserError: ``out/build`` holds something else, or a module imports what is not in :data:`FOREIGN`.
        OSError: ``out`` cannot be written.
    """
    files = collect()
    stamp = hashlib.sha256(b"".join(path.as_posix().encode() + b"\0" + text for path, text in sorted(files.items())))
    variants = []
    out.mkdir(parents=True, exist_ok=True)
    for variant, backend in VARIANTS.items():
        target = out / "build" / variant
        _check_ours(target)
        metadata = {
            "id": f"_{NAME.replace('-', '_')}_{backend['type']}_{stamp.hexdigest()[:7]}",
            "name": NAME,
            "version": int(_version.__version__.partition(".")[0]),
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": backend,
        }
        old = OLD_RELEASES.format(id=metadata["id"]).encode()
        whole = files | {Path(NAME.replace("-", "_"), "__init__.py"): old}
        with tempfile.TemporaryDirectory(dir=out) as folder:
            place = Path(folder, variant)
            for path, text in whole.items():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                (place / path).write_bytes(text)
            metadata["digest"] = {
                "algorithm": "sha256",
                "files": {
                    path.as_posix(): base64.b64encode(hashlib.sha256(text).digest()).decode()
                    for path, text in sorted(whole.items())
                },
            }
            (place / "metadata.json").write_text(safe_files.json_text(metadata, indent=2) + "\n", encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            target.parent.mkdir(exist_ok=True)
            place.rename(target)
        variants.append(target)
    version = _version.__version__
    card = CARD.format(version=version, major=int(version.partition(".")[0]))
    (out / "README.md").write_text(card, encoding="utf-8")
    return variants


def _check_ours(target: Path) -> None:
    """Raise UserError if a folder that is about to be replaced was not built by this module."""
    if not target.exists():
        return
    try:
        name = safe_files.json_value((target / "metadata.json").read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if name != NAME:
        raise UserError(f"{target} to be absent or built before", "something else", "name another folder")


def collect() -> dict[Path, bytes]:
    """Return the files of a variant but its metadata, by path.

    Raises:
        UserError: a module imports something that is neither in the standard library nor in :data:`FOREIGN`.
    """
    waiting = [PACKAGE / ROOTS[0], *sorted((PACKAGE / ROOTS[1]).rglob("*.py"))]
    files = {Path("__init__.py"): INIT.format(version=_version.__version__).encode()}
    while waiting:
        path = waiting.pop()
        place = path.relative_to(PACKAGE)
        if place in files:
            continue
        files[place] = text = path.read_bytes()
        for module in _imports(path, text.decode()):
            waiting.append(module)
        waiting += [folder / "__init__.py" for folder in path.parents if PACKAGE in folder.parents]
    for table in sorted((PACKAGE / "tuning" / "tables").glob("*.json")):
        files[table.relative_to(PACKAGE)] = table.read_bytes()
    return files


def _imports(path: Path, text: str) -> Iterator[Path]:
    """Return the modules of this package that a module of it imports, at its top or in a function."""
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        foreign = []
        if isinstance(node, ast.Import):
            foreign = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found = [_module(base / alias.name) for alias in node.names]
            if own := None if base == PACKAGE else _module(base):
                yield own
            elif None in found:
                raise UserError(f"{path.name} to import modules by name", ast.unparse(node), "name the module")
            yield from (module for module in found if module is not None)
        for name in foreign:
            if (top := name.partition(".")[0]) not in FOREIGN and top not in sys.stdlib_module_names:
                raise UserError(
                    f"{path.name} to import the standard library, this package by relative names, or "
                    + ", ".join(FOREIGN),
                    f"an import of {name}",
                    "kernels installs nothing else",
                )


def _module(path: Path) -> Path | None:
    """Return the file of a module, given without its suffix; None if there is none."""
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser("python -m resnet_fast.hub.build", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    try:
        for folder in build(parser.parse_args(arguments).out):
            count = sum(1 for path in folder.rglob("*") if path.is_file())
            print(f"{folder}: {count} files")
    except (UserError, OSError) as error:
        print(f"resnet_fast.hub.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
