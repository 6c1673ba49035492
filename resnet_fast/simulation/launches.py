"""The time of a launch: one multiprocessor with its blocks, and what the others do to it.

    found = simulate_launch(launch, constants("h100"), clock=1.755e9)
    found.seconds, found.bound, found.utilisation, found.waits, found.timeline

One multiprocessor is simulated, the first. Block ``i`` goes to multiprocessor ``i mod 132`` in round ``i // 132``, as
the hardware hands out a grid at the start. The others run the same code at the same time, so each gets an equal part of
the bandwidth of L2 and DRAM. What differs between them is which bytes they read: of each simulated round **all** blocks
are walked. A sector that several of them read comes from DRAM once, one that an earlier round read comes from L2.

Of a long launch only the first rounds are simulated, four times as many as a multiprocessor holds blocks at once. The
rest takes as long per round as the waves in the middle of those, and no less than a round holds any resource. In the
last round, if it is not full, fewer multiprocessors share the bandwidth.

This leaves out: multiprocessors that drift apart, blocks that have more work than those of the first multiprocessor, L2
slices that get more requests than others, and instruction fetches other than after a taken branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .. import native
from ..errors import UserError
from .constants import Constants
from .instruction import Instruction
from .opcodes import check, timing
from .walk import Launch, Walk, walk

HOPPER = 90
"""The architecture whose machine code is simulated."""

MOST_THREADS = 1024
"""Threads of a block, on every GPU."""

MOST_ROUNDS = 64
"""What csrc/sm keeps account of."""

WAVES = 4
"""Rounds that are simulated, in units of the blocks that a multiprocessor holds at once."""

BUSY = 0.7
"""A resource that is in use for this part of the time bounds a launch."""

TAIL = 0.25
"""A launch that leaves this part of the GPU empty (a last wave that is not full, or few blocks) is bound by that."""


class Code(Protocol):
    """What is needed of a kernel; :class:`.kernel.Kernel` has it."""

    @property
    def code(self) -> Sequence[Instruction]: ...

    @property
    def registers(self) -> int: ...


Walker = Callable[[Sequence[int], bool], Any]
"""Returns the walk of blocks by their index; if the second is true, only the sectors that they read and write."""


@dataclass(frozen=True)
class LaunchSize:
    """How large a launch is.

    Attributes:
        blocks, threads: of the grid, and of a block.
        shared: bytes of shared memory of a block, declared and dynamic.
    """

    blocks: int
    threads: int
    shared: int = 0


@dataclass(frozen=True)
class SimulatedLaunch:
    """How long a launch takes, as the cycle model has it, and why.

    Attributes:
        clock: cycles per second that were assumed.
        cycles: from the first block's start until the last store has arrived.
        resident: blocks that a multiprocessor holds at once.
        simulated: rounds that were simulated, of ``rounds``.
        rounds: blocks of the first multiprocessor.
        utilisation: resource -> part of the cycles in which it is in use: issue, tensor, shared, l2, dram, and pipes.
        waits: reason -> part of the warps' time; ``issue`` is the part in which they issued.
        bound: the resource that is in use most, if that is :data:`BUSY` or more of the time; else ``tail`` or
            ``latency``.
        executed: how often a warp issued each instruction, by place in the code.
        waits_by_instruction: cycles that warps waited before each instruction, by place and reason.
        timeline: parts of the watched block's time: start, end, warp, instruction, reason (a number of
            :func:`reasons`).
        bytes: what one multiprocessor moved: dram_read, dram_write, l2_read, l2_write, l1_hit.
        block_cycles: of each simulated block.
    """

    clock: float
    cycles: float
    resident: int
    simulated: int
    rounds: int
    utilisation: Mapping[str, float]
    waits: Mapping[str, float]
    bound: str
    executed: np.ndarray
    waits_by_instruction: np.ndarray
    timeline: np.ndarray
    bytes: Mapping[str, float]
    block_cycles: tuple[int, ...]

    @property
    def seconds(self) -> float:
        """The launch's time, without what lies between launches."""
        return self.cycles / self.clock


def reasons() -> list[str]:
    """Return why a warp does not issue, in the order of the numbers in a timeline."""
    return list(native.multiprocessor().reasons)


def resident_blocks(size: LaunchSize, registers: int, constants: Constants) -> int:
    """Return how many blocks a multiprocessor holds at once.

    Args:
        size: of the launch.
        registers: of a thread.

    Raises:
        UserError: not even one.
    """
    if not 1 <= size.threads <= MOST_THREADS:
        raise UserError(f"a block of 1 to {MOST_THREADS} threads", str(size.threads), "give the launch's own")
    warps = -(-size.threads // 32)
    unit = constants["register_unit"]
    per_warp = -(-registers * 32 // unit) * unit
    limits = {
        "warps": constants["warps_per_sm"] // warps,
        "registers": constants["registers_per_sm"] // (per_warp * warps),
        "shared memory": constants["shared_per_sm"] // (size.shared + constants["shared_reserved"]),
        "blocks": constants["blocks_per_sm"],
    }
    least = min(limits, key=limits.__getitem__)
    if limits[least] < 1:
        raise UserError(
            f"a block that fits into a multiprocessor of {constants.gpu}",
            f"{size.threads} threads of {registers} registers with {size.shared} bytes of shared memory",
            f"use less: {least}",
        )
    return int(limits[least])


def simulate(
    kernel: Code,
    size: LaunchSize,
    walker: Walker,
    constants: Constants,
    clock: float = 1.755e9,
    in_l2: Sequence[tuple[int, int]] = (),
) -> SimulatedLaunch:
    """Return how long a launch takes.

    Args:
        kernel: its code and registers.
        size: of the launch.
        walker: returns what blocks execute and access.
        constants: of the GPU.
        clock: cycles per second.
        in_l2: (address, bytes) of what L2 holds before the launch.

    Raises:
        UserError: it executes an opcode that is not modelled, a block does not fit, or the clock is not in Hz.
    """
    if not 1e8 <= clock <= 1e10:
        raise UserError("a clock of 1e8 to 1e10 Hz", repr(clock), "give cycles per second, such as 1.755e9")
    machine = native.multiprocessor()
    resident = resident_blocks(size, kernel.registers, constants)
    sms = int(constants["multiprocessors"])
    rounds = -(-size.blocks // sms)
    simulated = min(rounds, max(WAVES * resident, 4), MOST_ROUNDS)
    footprint = machine.Footprint()
    for address, count in in_l2:
        footprint.add_resident(address >> 5, (address + count + 31) >> 5)
    paths: list[np.ndarray] = []
    blocks: list[tuple[int, int, list[tuple[int, np.ndarray]]]] = []
    sectors: list[np.ndarray] = []
    for r in range(simulated):
        for block in walker(range(r * sms, min(size.blocks, (r + 1) * sms)), True).blocks:
            footprint.add(r, block.index, np.union1d(block.reads, block.writes).astype(np.uint64))
        walked = walker([r * sms], False)
        own = walked.blocks[0]
        base, offset = len(paths), sum(map(len, sectors))
        paths.extend(np.ascontiguousarray(path).astype(machine.STEP, copy=False) for path in walked.paths)
        kept, events = _own(own, walked.sectors, offset, machine)
        sectors.append(kept)
        blocks.append((r, own.index, [(base + w.path, e) for w, e in zip(own.warps, events, strict=True)]))
    check(kernel.code, _executed(paths, blocks))
    active = min(size.blocks, sms)
    last = size.blocks - (rounds - 1) * sms
    raw = machine.run(
        constants={name: float(constants[name]) for name in machine.constants},
        clock=clock,
        code=timing(kernel.code, constants),
        paths=paths,
        blocks=blocks,
        sectors=np.concatenate(sectors) if sectors else np.empty(0, np.uint64),
        footprint=footprint,
        shared_in_use=float(min(resident, rounds) * (size.shared + constants["shared_reserved"])),
        launch_bytes=32.0 * footprint.sectors * rounds / simulated,
        resident=resident,
        active=float(active),
        active_last=float(last),
        first_block=0.0,
        between_blocks=constants["block_dispatch"] * active,
        watched=min(resident, simulated - 1),
    )
    return _result(raw, clock, resident, simulated, rounds, _unused(size.blocks, rounds, sms, resident))


def simulate_launch(
    launch: Launch, constants: Constants, clock: float = 1.755e9, in_l2: Sequence[tuple[int, int]] = ()
) -> SimulatedLaunch:
    """Return how long a launch of machine code takes: :func:`simulate` with its walk.

    Args:
        launch: the launch.
        constants: of the GPU.
        clock: cycles per second.
        in_l2: (address, bytes) of what L2 holds before the launch.

    Raises:
        UserError: as of :func:`.walk.walk` and :func:`simulate`; or code that Hopper does not execute.
    """
    if launch.kernel.arch != HOPPER:
        todo = "compile for sm_90; code of other architectures is only walked"
        raise UserError(f"machine code of sm_{HOPPER} for the cycle model", f"sm_{launch.kernel.arch}", todo)
    kernel, (x, y, z) = launch.kernel, launch.threads
    declared = max(0, kernel.shared - int(constants["shared_reserved"]))  # the system's part is counted for every block
    size = LaunchSize(launch.blocks, x * y * z, declared + launch.shared)

    def walker(blocks: Sequence[int], only_global: bool) -> Walk:
        return walk(launch, blocks, only_global=only_global)

    return simulate(kernel, size, walker, constants, clock, in_l2)


def _own(block: Any, sectors: np.ndarray, offset: int, machine: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the sectors of a block alone, and its warps' events with places among them, from ``offset`` on."""
    parts: list[np.ndarray] = []
    events = []
    for warp in block.warps:
        out = np.zeros(len(warp.events), machine.EVENT)
        for name in ("address", "value", "step", "bytes", "sectors", "wavefronts"):
            out[name] = warp.events[name]
        for place, (first, count) in enumerate(zip(warp.events["first"], warp.events["sectors"], strict=True)):
            out[place]["first"] = offset
            if count:
                parts.append(sectors[first : first + count])
                offset += int(count)
        events.append(out)
    return (np.concatenate(parts) if parts else np.empty(0)).astype(np.uint64), events


def _executed(paths: Sequence[np.ndarray], blocks: Sequence[Any]) -> dict[int, int]:
    times: dict[int, int] = {}
    for _, _, warps in blocks:
        for path, _ in warps:
            places, counts = np.unique(paths[path]["instruction"], return_counts=True)
            for place, count in zip(places.tolist(), counts.tolist(), strict=True):
                times[place] = times.get(place, 0) + count
    return times


def _unused(blocks: int, rounds: int, sms: int, resident: int) -> float:
    """Return the part of the places for blocks, or in a single wave of the multiprocessors, that stays empty."""
    waves = blocks / (sms * resident)
    return 1 - waves / -(-waves // 1) if waves > 1 else 1 - blocks / (sms * rounds)


def _result(
    raw: dict[str, Any], clock: float, resident: int, simulated: int, rounds: int, unused: float
) -> SimulatedLaunch:
    drained = float(raw["drained"])
    cycles = drained
    if simulated < rounds:
        ends = sorted(raw["ends"])
        first = resident - 1
        last = first + resident * ((simulated - 1 - first) // resident - 1)
        seen = (ends[last] - ends[first]) / (last - first)
        # At the start DRAM has reads to serve and no writes yet. No round can take less than it holds a resource.
        held = max(raw[name] for name in ("dram", "port", "outward", "shared", "tensor")) / simulated
        cycles += (rounds - simulated) * max(seen, held, raw["issued"] / 4 / simulated)
    pipes = {name: held / 4 / drained for name, held in raw["pipes"].items() if held}
    fma, heavy = pipes.pop("fma", 0.0), pipes.pop("fma_heavy", 0.0)
    warps_products = pipes.pop("tensor", 0.0)
    use = {
        "issue": raw["issued"] / 4 / drained,
        "tensor": raw["tensor"] / drained or warps_products,
        "shared": raw["shared"] / drained,
        "l2": max(raw["port"], raw["outward"]) / drained,
        "dram": raw["dram"] / drained,
        "fma": max(heavy, (fma + heavy) / 2),  # of its two halves only one multiplies integers
        **pipes,
    }
    most = max(use, key=use.__getitem__)
    spent = sum(raw["waits"].values())
    return SimulatedLaunch(
        clock=clock,
        cycles=cycles,
        resident=resident,
        simulated=simulated,
        rounds=rounds,
        utilisation=use,
        waits={name: value / spent for name, value in raw["waits"].items() if value},
        bound=most if use[most] >= BUSY else "tail" if unused >= TAIL else "latency",
        executed=raw["executed"],
        waits_by_instruction=raw["by_instruction"],
        timeline=raw["timeline"],
        bytes={name: raw[name] for name in ("dram_read", "dram_write", "l2_read", "l2_write", "l1_hit")},
        block_cycles=tuple(e - s for s, e in zip(raw["starts"], raw["ends"], strict=True)),
    )


def sequence_seconds(launches: Sequence[SimulatedLaunch], constants: Constants, overlapped: bool = False) -> float:
    """Return the time of launches that depend on each other, as nodes of a CUDA graph.

    Args:
        launches: in order.
        constants: of the GPU.
        overlapped: whether each starts before the one before it has ended (programmatic dependent launch).
    """
    between = constants["graph_node_seconds"] - (constants["graph_overlap_seconds"] if overlapped else 0.0)
    return sum(one.seconds + between for one in launches)
