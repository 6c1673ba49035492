"""Compile a Triton kernel for sm_80, 90 or 100 without a GPU, and read from its machine code what it costs.

    job = CompileJob("toys:matmul_kernel", {"a_ptr": "*fp16", ..., "K": "i32"}, {"BLOCK_M": 128, ...}, arch=90)
    budget, = compile_many([job])        # in processes without TRITON_INTERPRET
    print(budget.registers, budget.loops[0].pressure)

Triton and its ptxas need no GPU. From the cubin: registers, spills, shared memory and what they allow to run at once;
which tensor-core instruction was chosen; how wide global memory is accessed; and for each main loop the model below.

Issue model. A multiprocessor has four schedulers, each issues one instruction per cycle for one of its warps. A loop of
``n`` instructions costs a block of ``w`` warps ``n * w / 4`` issue slots per scheduler and iteration; its products cost
the tensor cores ``multiply-adds / rate`` cycles. ``pressure`` is the first over the second: above 1 the kernel cannot
keep the tensor cores busy, however many blocks run. The slots are an upper bound: instructions that one warp of the
block executes alone (bulk copies, sm_100 products) count for all. A loop that the compiler unrolled whole is no loop
any more; the report names the tensor-core instructions outside of main loops.

This module imports triton only inside functions: the processes of :func:`compile_many` decide about the interpreter.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resnet_fast.simulation import listing

from .. import markdown
from . import sass


@dataclass(frozen=True)
class SmLimits:
    """Limits of one multiprocessor (CUDA programming guide, technical specifications per compute capability).

    ``rate``: dense multiply-adds per cycle at 16 bit, from the data sheets: A100 312 TFLOP/s = 108 SMs x 1.41 GHz x
    2,048; H100 SXM 989 = 132 x 1.83 GHz x 4,096; B200 2,250 = 148 x 1.85 GHz x 8,192. Two operations each.
    """

    rate: int
    shared_per_sm: int
    shared_per_block: int
    tensor: str  # what Triton uses for a large tile there
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    tensor_columns: int = 512  # of tensor memory, where there is one


ARCHS = {
    80: SmLimits(1024, 164 << 10, 163 << 10, "HMMA"),
    90: SmLimits(2048, 228 << 10, 227 << 10, "HGMMA"),
    100: SmLimits(4096, 228 << 10, 227 << 10, "UTCHMMA"),
}

SCHEDULERS = 4
RESERVED_SHARED = 1024
"""Bytes of shared memory that the driver takes per block, in addition to the kernel's."""


@dataclass(frozen=True)
class CompileJob:
    """One kernel, configuration and architecture to compile.

    ``kernel``: "module:function". ``signature``: type by argument name (``"*fp16"``, ``"i32"``,
    ``"tensordesc<fp16[128, 64]>"``); ``constexprs`` holds the rest, with the arguments that Triton would specialise on:
    ``None`` pointers and integers that are 1. ``attrs``: known divisibility of arguments, over the default, which is
    16 for every pointer (torch allocates so) and nothing for integers. Sizes and strides need it: a row stride or a
    mask's bound of unknown divisibility turns 16-byte accesses into single elements.
    """

    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    arch: int
    num_warps: int = 4
    num_stages: int = 3
    attrs: Mapping[str, int] = field(default_factory=dict)
    config: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MainLoop:
    """One main loop, per iteration: for most kernels one K step."""

    instructions: int
    issue_slots: float
    tensor_cycles: float
    tensor: dict[str, int]
    accesses: dict[str, int]

    @property
    def pressure(self) -> float:
        """Issue slots per scheduler for each cycle of the tensor cores."""
        return self.issue_slots / self.tensor_cycles


@dataclass(frozen=True)
class KernelBudget:
    """Figures read from one cubin. ``tensor`` and ``accesses`` count instructions of the whole kernel."""

    kernel: str
    config: str
    arch: int
    compiler: str
    num_warps: int
    registers: int
    local_bytes: int
    local_accesses: int
    shared: int
    blocks_per_sm: int
    warps_per_sm: int
    tensor: dict[str, int]
    accesses: dict[str, int]
    loops: tuple[MainLoop, ...]

    @property
    def key(self) -> tuple[str, str, int]:
        """Kernel, config and architecture."""
        return self.kernel, self.config, self.arch

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"loops": [asdict(loop) for loop in self.loops]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KernelBudget:
        """Return the budget of :meth:`to_dict`."""
        return cls(**{**values, "loops": tuple(MainLoop(**loop) for loop in values["loops"])})

    def row(self) -> tuple[str, ...]:
        """Return the cells of the report's table, in the order of :data:`HEAD`."""
        outside = {k: n - sum(x.tensor.get(k, 0) for x in self.loops) for k, n in self.tensor.items()}
        loops = [
            f"{x.instructions} instr, {x.issue_slots:.0f} / {x.tensor_cycles:.0f} = {x.pressure:.2f}"
            for x in self.loops
        ]
        return (
            self.kernel.partition(":")[2] or self.kernel,
            self.config,
            f"sm_{self.arch}",
            f"{self.registers}" + (f", spills {self.local_bytes} B" if self.local_bytes else ""),
            f"{self.shared / 1024:.1f}",
            f"{self.blocks_per_sm} ({self.warps_per_sm} warps)",
            _listed(self.tensor),
            _listed(self.accesses),
            "; ".join(_listed(x.accesses) for x in self.loops) or "no loop",
            ("; ".join(loops) or "no loop") + "".join(f"; outside {k} × {n}" for k, n in outside.items() if n > 0),
        )


HEAD = (
    "kernel", "config", "arch", "registers", "shared KB", "blocks per SM", "tensor-core instructions",
    "global accesses", "of them in the main loop", "main loop: issue slots / tensor cycles",
)  # fmt: skip


def _listed(counts: Mapping[str, int]) -> str:
    """``LDGSTS 16 B x 48, UTMALDG x 2``"""
    named = ((re.sub(r"^(LDG|LDGSTS|STG|REDG?|ATOMG?)\.(\d+)$", r"\1 \2 B", k), n) for k, n in counts.items())
    return ", ".join(f"{name} × {n}" for name, n in named) or "none"


def occupancy(arch: int, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """Return how many blocks fit on a multiprocessor at once; 0 where not even one does."""
    limits = ARCHS[arch]
    if shared > limits.shared_per_block:
        return 0
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out in units of 256, to warps in groups of four
    by_registers = limits.registers // per_warp // 4 * 4 // warps
    by_shared = limits.shared_per_sm // (-(-(shared + RESERVED_SHARED) // 128) * 128)
    found = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return min(found, limits.tensor_columns // tensor_columns) if tensor_columns else found


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    attrs: Mapping[str, int] | None = None,
    *,
    name: str = "",
    config: str = "",
    options: Mapping[str, Any] | None = None,
) -> KernelBudget:
    """Compile a ``@triton.jit`` function in this process, which must not interpret. See :class:`CompileJob`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    while not isinstance(fn, triton.runtime.jit.JITFunction):  # heuristics, autotuner
        if not hasattr(fn, "fn") or "Interpreted" in type(fn).__name__:
            raise TypeError(
                f"expected a compilable @triton.jit function, got {type(fn).__name__}: is TRITON_INTERPRET set?"
            )
        fn = fn.fn
    given, names = set(signature) | set(constexprs), set(fn.arg_names)
    if given != names:
        raise ValueError(
            f"{fn.__name__}: arguments without a type or value: {sorted(names - given)}, "
            f"names that it does not have: {sorted(given - names)}"
        )
    types = {n: "constexpr" if n in constexprs else signature[n] for n in fn.arg_names}
    divisible = {n: 16 for n, t in types.items() if t.startswith("*")} | dict(attrs or {})
    hints = {(fn.arg_names.index(n),): [["tt.divisibility", d]] for n, d in divisible.items() if d > 1}
    source = ASTSource(fn=fn, signature=types, constexprs=dict(constexprs), attrs=hints)
    choice = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=choice)
    label = name or f"{fn.__module__}:{fn.__name__}"
    return read_cubin(compiled, label, config, arch, triton.__version__)


def read_cubin(compiled: Any, kernel: str, config: str, arch: int, version: str) -> KernelBudget:
    """Return the budget of what ``triton.compile`` returned."""
    meta = compiled.metadata
    # warp specialisation adds warps to num_warps; the PTX states what is launched
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", compiled.asm["ptx"])
    warps = int(threads[1]) // 32 if threads else meta.num_warps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        shared, columns = meta.shared, getattr(meta, "tmem_size", 0) or 0
        return Cubin(path).budget(meta.name, kernel, config, arch, f"Triton {version}", warps, shared, columns)


class Cubin:
    """The machine code in a cubin."""

    def __init__(self, path: Path) -> None:
        self.listing = listing.cuobjdump("-sass", path)
        usage = listing.cuobjdump("--dump-resource-usage", path)
        parts = re.findall(r"Function (\S+):\n(.*)", usage)
        self.usage = {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in parts}

    def budget(
        self,
        function: str,
        kernel: str,
        config: str,
        arch: int,
        compiler: str,
        warps: int,
        shared: int,
        tensor_columns: int = 0,
    ) -> KernelBudget:
        """Return the budget of one function, launched with ``warps`` and ``shared`` bytes a block."""
        counts, code = self.usage[function], listing.parse(self.listing, function)
        loops = []
        for part in sass.main_loops(code):
            _, weighted = sass.tensor_work(code, part, warps)
            slots, cycles = len(part) * warps / SCHEDULERS, weighted / ARCHS[arch].rate
            loops.append(MainLoop(len(part), slots, cycles, sass.tensor_ops(part), sass.accesses(part)))
        blocks = occupancy(arch, warps, counts["REG"], shared, tensor_columns)
        return KernelBudget(
            kernel=kernel,
            config=config,
            arch=arch,
            compiler=compiler,
            num_warps=warps,
            registers=counts["REG"],
            local_bytes=max(counts["STACK"], counts["LOCAL"]),
            local_accesses=sass.local_accesses(code),
            shared=shared,
            blocks_per_sm=blocks,
            warps_per_sm=blocks * warps,
            tensor=sass.tensor_ops(code),
            accesses=sass.accesses(code),
            loops=tuple(loops),
        )


def _without_interpreter() -> None:
    """Switch the interpreter off in a worker before it imports triton."""
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(job: CompileJob) -> KernelBudget:
    module, _, name = job.kernel.partition(":")
    fn = getattr(importlib.import_module(module), name)
    return compile_kernel(
        fn, job.signature, job.constexprs, job.arch, job.num_warps, job.num_stages, job.attrs,
        name=job.kernel, config=job.config, options=job.options,
    )  # fmt: skip


def compile_many(jobs: Iterable[CompileJob], workers: int = 2) -> list[KernelBudget]:
    """Compile jobs in processes of their own, in order; works in a process that interprets, too.

    A script that calls this needs ``if __name__ == "__main__":``, as with every spawned process pool.
    """
    jobs = list(jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _without_interpreter) as pool:
        futures = [pool.submit(_compile, job) for job in jobs]
        budgets = []
        for job, future in zip(jobs, futures, strict=True):
            try:
                budgets.append(future.result())
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(f"{job.kernel} {job.config} for sm_{job.arch}: {error}") from error
    return budgets


def worse(rows: Iterable[KernelBudget], table: Mapping[tuple[str, str, int], KernelBudget], command: str) -> list[str]:
    """Return what got worse than the table that ``command`` writes, a line per finding."""
    found = []
    for now in rows:
        if now.key not in table:
            found.append(f"{now.key}: not in the table; run {command}")
            continue
        found += [f"{now.kernel} {now.config} sm_{now.arch}: {text}" for text in compare(now, table[now.key])]
    return found


def write_table(path_json: Path, path_md: Path, rows: Sequence[KernelBudget], title: str) -> None:
    """Write the table that tests compare with, a row per line, and a page to read.

    Raises:
        ValueError: for two rows of one kernel, config and architecture.
    """
    ordered = sorted(rows, key=lambda b: b.key)
    if len({b.key for b in ordered}) != len(ordered):
        raise ValueError("two rows of one kernel, config and architecture")
    path_json.write_text("[\n" + ",\n".join(json.dumps(b.to_dict()) for b in ordered) + "\n]\n")
    versions = ", ".join(sorted({b.compiler for b in ordered}))
    rates = ", ".join(f"{a.rate:,} on sm_{n}" for n, a in ARCHS.items())
    page = [
        f"# {title}",
        f"Read from machine code compiled by {versions}; nothing here was measured. Registers are per thread, "
        "shared memory per block, accesses are instructions by bytes per lane (bulk copies by name alone).",
        "Main loop: issue slots per scheduler (instructions × warps / 4) over the tensor cores' cycles for the same "
        f"products (multiply-adds per multiprocessor and cycle at 16 bit: {rates}; TF32 half of it), per iteration. "
        "Above 1 the loop is bound by issuing instructions.",
        markdown.table(HEAD, [b.row() for b in ordered]),
    ]
    path_md.write_text("\n\n".join(page) + "\n")


def read_table(path_json: str | Path) -> dict[tuple[str, str, int], KernelBudget]:
    """Return rows by kernel, config and architecture."""
    budgets = [KernelBudget.from_dict(row) for row in json.loads(Path(path_json).read_text())]
    return {b.key: b for b in budgets}


def compare(now: KernelBudget, table: KernelBudget) -> list[str]:
    """Return one sentence for each value that got worse than the table's.

    The rules that any compiler must meet come first. Exact values are compared where both were compiled by the same
    compiler. What got better gives no sentence.
    """
    worse = _broken(now, table)
    if now.compiler != table.compiler:
        return worse
    for what, new, old in (
        ("registers", now.registers, table.registers),
        ("bytes of shared memory", now.shared, table.shared),
        ("narrow global accesses", _narrow(now.accesses), _narrow(table.accesses)),
    ):
        if new > old:
            worse.append(f"{new:,} {what}, the table has {old:,}")
    if now.blocks_per_sm < table.blocks_per_sm:
        worse.append(f"{now.blocks_per_sm} blocks per multiprocessor, the table has {table.blocks_per_sm}")
    if len(now.loops) != len(table.loops):
        worse.append(f"{len(now.loops)} main loops, the table has {len(table.loops)}")
        return worse
    for n, (new_loop, old_loop) in enumerate(zip(now.loops, table.loops, strict=True)):
        if new_loop.pressure > old_loop.pressure + 1e-9:
            worse.append(
                f"main loop {n}: {new_loop.issue_slots:.0f} issue slots for {new_loop.tensor_cycles:.0f} tensor "
                f"cycles, the table has {old_loop.issue_slots:.0f} for {old_loop.tensor_cycles:.0f}"
            )
    return worse


def _narrow(accesses: Mapping[str, int]) -> int:
    return sum(n for access, n in accesses.items() if sass.is_narrow(access))


def _broken(now: KernelBudget, table: KernelBudget) -> list[str]:
    """Rules for every compiler: nothing spills, it fits, tensor cores and wide accesses where the table has them."""
    broken = []
    if now.local_bytes or now.local_accesses:
        broken.append(f"{now.local_bytes} bytes of local memory and {now.local_accesses} accesses to it, must be none")
    if now.shared > ARCHS[now.arch].shared_per_block:
        limit = ARCHS[now.arch].shared_per_block
        broken.append(f"{now.shared:,} bytes of shared memory, sm_{now.arch} has {limit:,} per block")
    kinds = [{opcode.split(".")[0] for opcode in b.tensor} for b in (now, table)]
    if lost := kinds[1] - kinds[0]:
        broken.append(
            f"no {', '.join(sorted(lost))} any more, but {', '.join(sorted(kinds[0])) or 'nothing'} in its place"
        )
    narrow = [sum(_narrow(loop.accesses) for loop in b.loops) for b in (now, table)]
    if narrow[0] and not narrow[1]:
        broken.append(f"{narrow[0]} global accesses under 16 bytes in the main loops, the table has none")
    return broken
