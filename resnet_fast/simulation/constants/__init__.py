"""What the cycle model knows about a GPU: one file per GPU, each number with unit, source and surety.

    found = constants("h100")
    found["shared_latency"]             # 29.0
    found.origin["shared_latency"]      # Constant(29, "cycles", "PS 28.6 (H100 SXM); ...", "measured", None)

``hopper.json`` has what GPUs of one multiprocessor share, ``h100.json`` and ``h200.json`` their memory. A file that
lacks a name, or has one that nothing reads, is refused, so that no figure comes from a default. To refit a number on a
GPU, change it in its file and write what it was fitted on in ``fitted_on``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError

FOLDER = Path(__file__).parent

SURETIES = {
    "measured": "on such hardware, by the source",
    "vendor": "the maker's specification or tables",
    "fitted": "inside a model, to what hardware did; `fitted_on` says what",
    "config": "a simulator's setting, without evidence shown",
    "inferred": "from other facts",
}

OF_LAUNCH = (
    "multiprocessors", "warps_per_sm", "blocks_per_sm", "registers_per_sm", "register_unit", "shared_per_sm",
    "shared_reserved", "block_dispatch", "graph_node_seconds", "graph_overlap_seconds",
)  # fmt: skip
"""Read by launches.py."""

OF_MACHINE = (
    "queue_interval", "queue_interval_sm", "queue_depth", "l2_port_bytes", "l2_bytes_per_cycle", "l2_bytes",
    "l1_latency", "l2_latency", "l2_far_extra", "dram_extra_seconds", "dram_read_bandwidth", "dram_write_bandwidth",
    "l1_and_shared_bytes", "bulk_issue_interval", "bulk_extra_latency", "bulk_lines_in_flight", "taken_branch",
    "yield_cycles", "overlong_stall", "barrier_release", "phase_arrive", "phase_pass", "phase_release", "product_tail",
    "product_queue", "product_queue_registers", "operand_window", "atomic_extra", "bulk_read_release",
    "block_replacement",
)  # fmt: skip
"""Read by csrc/sm."""

OF_OPCODES = (
    "alu_interval", "fma_interval", "half_interval", "half_compare_interval", "special_interval", "special_latency",
    "convert_interval", "double_interval", "double_latency", "uniform_interval", "uniform_latency", "branch_interval",
    "shuffle_latency", "constant_latency", "register_special_latency", "shared_latency", "shared_load_release",
    "shared_store_release", "global_release", "copy_release", "load_back_64", "load_back_128", "fence_latency",
    "membar_gpu_latency", "hmma_interval", "hmma_latency", "product_issue_interval", "shared_wavefront_bytes",
)  # fmt: skip
"""Read by opcodes.py."""

NAMES = frozenset((*OF_LAUNCH, *OF_MACHINE, *OF_OPCODES))


@dataclass(frozen=True)
class Constant:
    """One number of the cycle model.

    Attributes:
        value: the number.
        unit: in words.
        source: where it comes from, and what contradicts it.
        surety: one of :data:`SURETIES`.
        fitted_on: what it was fitted on, of one that was fitted; None otherwise.
    """

    value: float
    unit: str
    source: str
    surety: str
    fitted_on: str | None = None


class Constants(Mapping[str, float]):
    """The numbers of one GPU by name.

    Attributes:
        gpu: its name, for people.
        origin: each number with unit, source and surety.
    """

    def __init__(self, gpu: str, origin: Mapping[str, Constant]):
        self.gpu, self.origin = gpu, dict(origin)

    def __getitem__(self, name: str) -> float:
        return self.origin[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.origin)

    def __len__(self) -> int:
        return len(self.origin)

    def changed(self, **values: float) -> Constants:
        """Return these constants with other values, for a question such as "what if L2 took 300 cycles?".

        Raises:
            UserError: a name that there is none of.
        """
        _refuse_unknown(values, "a constant's name")
        origin = dict(self.origin)
        for name, value in values.items():
            old = origin[name]
            origin[name] = Constant(value, old.unit, f"set by the caller, instead of {old.value:g}", "inferred")
        return Constants(self.gpu, origin)


def known() -> list[str]:
    """Return the names that :func:`constants` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.json") if "with" in json.loads(path.read_text()))


def constants(gpu: str) -> Constants:
    """Return the constants of a GPU.

    Args:
        gpu: its name on the command line, ``h100`` or ``h200``.

    Raises:
        UserError: there is no file for it, or the file is not one of constants.
    """
    if gpu not in known():
        raise UserError("a GPU that the cycle model has constants for", repr(gpu), f"use one of {', '.join(known())}")
    return read(FOLDER / f"{gpu}.json")


def read(path: Path) -> Constants:
    """Return the constants in a file and in the one that its ``with`` names.

    Raises:
        UserError: a name is missing, unknown or given twice, or an entry is not a number with its origin.
    """
    content = json.loads(path.read_text())
    entries = [(path, content)]
    if "with" in content:
        beside = path.parent / f"{content['with']}.json"
        entries.append((beside, json.loads(beside.read_text())))
    origin: dict[str, Constant] = {}
    for file, part in entries:
        for name, entry in part["constants"].items():
            if name in origin:
                raise UserError("each constant once", f"{name} in {path.name} and in {file.name}", "delete one")
            origin[name] = _constant(name, entry, file)
    _refuse_unknown(origin, f"only constants that something reads in {path.name}")
    if missing := NAMES - origin.keys():
        raise UserError(
            f"all constants in {path.name}", f"none called {', '.join(sorted(missing))}", "add it with its source"
        )
    return Constants(content["gpu"], origin)


def _refuse_unknown(given: Mapping[str, Any], expected: str) -> None:
    if unknown := given.keys() - NAMES:
        raise UserError(expected, ", ".join(sorted(unknown)), "see NAMES in resnet_fast/simulation/constants")


def _constant(name: str, entry: Any, file: Path) -> Constant:
    try:
        found = Constant(**entry)
        if not float(found.value) >= 0 or found.surety not in SURETIES or not found.unit or not found.source:
            raise ValueError(found)
        if (found.surety == "fitted") != bool(found.fitted_on):
            raise ValueError(found)
    except (TypeError, ValueError):
        raise UserError(
            f"value, unit, source and surety ({', '.join(SURETIES)}; `fitted_on` of a fitted one, of no other)",
            f"{name}: {entry} in {file.name}", "mend the entry",
        ) from None  # fmt: skip
    return found
