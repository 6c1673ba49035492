"""Export a trained net to a file that runs without this package: torch.export's ``.pt2``, or ONNX.

The stock layers are exported, so that every runtime knows every operator. The file also holds
what the program was made from (net, class names, preprocessing): the JSON text of
:class:`resnet_fast.io.weight_facts.Facts`, in ONNX as the metadata entry ``resnet_fast``, in a ``.pt2`` as the extra
file ``resnet_fast.json``. A file gets its name only after it was loaded again and gave the net's own outputs.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError, missing_package
from ..io import safe_files, weight_facts
from ..io.weight_facts import Facts
from ..models.accelerate import restore

EXTRA = f"{weight_facts.KEY}.json"
SUFFIXES = (".pt2", ".onnx")
INPUT, OUTPUT = "input", "logits"
OLDEST_OPSET = 18
"""PyTorch's exporter writes opset 18 and later. Where it cannot convert to an earlier one, it silently keeps 18."""

LARGEST_ERROR = 1e-4
"""Largest norm of the difference over the norm of the outputs. Rounding in another order gives about 1e-6 in the
deepest net in float32; a wrong epsilon, stride or padding gives 1e-3 or more."""

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Checked:
    """How far the exported program's outputs are from the net's own.

    Attributes:
        runner: the runtime that ran the program; empty if none could.
        inputs: number of images compared.
        largest: the largest single difference.
        relative: the norm of the difference over the norm of the outputs.
    """

    runner: str
    inputs: int
    largest: float
    relative: float


def export(
    model: nn.Module,
    facts: Facts,
    out: Path,
    *,
    batch: int | None = None,
    opset: int | None = None,
    inputs: Tensor | None = None,
) -> Checked:
    """Write ``model`` to ``out`` and return how the exported program compares with it.

    Args:
        model: a net of this package, accelerated or not; left unchanged. Exported in eval mode, in float32.
        facts: stored in the file; ``facts.size`` is the side of its input, (N, 3, size, size), normalised.
        out: a file ending in ``.pt2`` or ``.onnx``.
        batch: N; by default any from 1.
        opset: ONNX opset; by default that of PyTorch's exporter.
        inputs: real inputs to compare on, (n, 3, size, size), in addition to random ones.

    Raises:
        UserError: ``out`` has another ending or is a file that is no export, the opset cannot be written, a package is
            missing, or the outputs differ.
    """
    check_target(out)
    if out.suffix == ".onnx":
        _require_onnx(opset)
    elif opset is not None:
        raise UserError("--opset with an .onnx file", out.name, "leave it out")
    net = restore(copy.deepcopy(model)).cpu().float().eval().to(memory_format=torch.contiguous_format)
    program = _program(net, facts.size, batch)
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.stem}.", suffix=out.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        if out.suffix == ".pt2":
            content = io.BytesIO()  # torch's own writer ends the process where the disk is full
            torch.export.save(program, content, extra_files={EXTRA: facts.to_json()})
            temporary.write_bytes(content.getbuffer())
            runner, run = _load_pt2(temporary)
        else:
            _save_onnx(program, temporary, facts, opset)
            runner, run = _load_onnx(temporary)
        checked = _compare(net, runner, run, _inputs(facts.size, batch, inputs))
        temporary.chmod(0o644)  # mkstemp's 0600 would hide the file from others
        safe_files.sync(temporary)
        os.replace(temporary, out)
        safe_files.sync(out.parent)
    except OSError as error:
        raise UserError(
            f"space and permission to write {out}", str(error.strerror), "free some space, or write elsewhere"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return checked


def check_target(out: Path) -> None:
    """Check that ``out`` may be written.

    Raises:
        UserError: the ending is not among :data:`SUFFIXES`, the folder does not exist, or ``out`` is a file that is no
            export.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"a file ending in {' or '.join(SUFFIXES)}", repr(out.name), "correct --out")

    def ours(content: bytes) -> bool:
        return facts_in(content, out.suffix) is not None

    safe_files.check_target(out, "an exported net", ours, todo="name another with --out", largest=2 << 30)


def facts_in(content: bytes, suffix: str) -> Facts | None:
    """Return the facts in an exported file's bytes; None if it is no export of this package."""
    try:
        if suffix == ".pt2":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                inside = [info for info in archive.infolist() if info.filename.endswith(f"/extra/{EXTRA}")]
                if len(inside) != 1 or inside[0].file_size > weight_facts.MAX_TEXT:
                    return None
                return weight_facts.parse(archive.read(inside[0]).decode(), "it")
        import onnx

        held = {entry.key: entry.value for entry in onnx.load_model_from_string(content).metadata_props}
        return weight_facts.parse(held[weight_facts.KEY], "it") if weight_facts.KEY in held else None
    except Exception:  # zipfile, protobuf and onnx raise anything for content of another kind
        return None


def _program(net: nn.Module, size: int, batch: int | None) -> torch.export.ExportedProgram:
    """Trace ``net`` on (batch, 3, size, size), for any batch if None, and drop stack traces with local paths."""
    example = torch.zeros(batch or 2, 3, size, size)  # a batch of 1 would be traced as a constant
    shapes = None if batch is not None else ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(net, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _load_pt2(path: Path) -> tuple[str, Runner | None]:
    return "torch.export", torch.export.load(str(path)).module()


def _require_onnx(opset: int | None) -> None:
    for package, purpose in (("onnx", "the format"), ("onnxscript", "which writes ONNX")):
        try:
            __import__(package)
        except ImportError as error:
            raise missing_package(package, purpose, error, "export", "export to a .pt2 file") from error
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"--opset in {OLDEST_OPSET} … {newest}", str(opset), "leave it out for the exporter's own")


def _save_onnx(program: torch.export.ExportedProgram, path: Path, facts: Facts, opset: int | None) -> None:
    dynamic = ({0: "batch"},) if program.range_constraints else None
    with _quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=dynamic,
            opset_version=opset,
            verbose=False,
        )
    assert written is not None
    got = written.model.opset_imports[""]
    if opset is not None and got != opset:
        raise UserError(f"a net that can be written in opset {opset}", f"opset {got}", "choose a later one")
    for node in written.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    written.model.metadata_props[weight_facts.KEY] = facts.to_json()
    written.save(str(path), external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks about packages and opset conversion; their results are checked."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _load_onnx(path: Path) -> tuple[str, Runner | None]:
    """Return the runtime's name and a function that runs the file; without onnxruntime the file is only checked."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    try:
        import onnxruntime
    except ImportError:
        return "", None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])

    return f"onnxruntime {onnxruntime.__version__}", run


def _inputs(size: int, batch: int | None, real: Tensor | None) -> list[Tensor]:
    """Return the batches to compare on: random ones of several sizes, and the real inputs."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 3) if batch is None else (batch,)
    out = [torch.randn(n, 3, size, size, generator=generator) for n in sizes]
    if real is not None and len(real):
        rows = len(real) if batch is None else batch
        out += [real[[i % len(real) for i in range(start, start + rows)]] for start in range(0, len(real), rows)]
    return out


def _compare(net: nn.Module, runner: str, run: Runner | None, batches: Sequence[Tensor]) -> Checked:
    """Compare ``run`` with ``net``; raise UserError if the outputs differ by more than rounding."""
    if run is None:
        return Checked("", 0, float("nan"), float("nan"))
    largest = relative = 0.0
    for x in batches:
        with torch.no_grad():
            expected, got = net(x), run(x)
        if got.shape != expected.shape or not bool(got.isfinite().all()):
            what = f"shape {tuple(got.shape)}" if got.shape != expected.shape else "NaN or infinity"
            raise UserError(
                f"finite outputs of shape {tuple(expected.shape)} from the export", what, "check the weights"
            )
        difference = (got.double() - expected.double()).abs()
        largest = max(largest, float(difference.max()))
        relative = max(relative, float(difference.norm() / expected.double().norm().clamp_min(1e-30)))
    if relative > LARGEST_ERROR:
        raise UserError(
            f"the export to agree with the net within {LARGEST_ERROR:g} (relative)",
            f"{relative:.2g} in {runner}",
            "nothing was written; report it with the net's name",
        )
    return Checked(runner, sum(len(x) for x in batches), largest, relative)
