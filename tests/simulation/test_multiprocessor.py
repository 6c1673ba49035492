"""The cycle model's multiprocessor: each expected time follows from the constants, by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from resnet_fast.errors import UserError
from resnet_fast.simulation.constants import constants
from resnet_fast.simulation.launches import reasons
from resnet_fast.simulation.opcodes import check
from tests.support.micro_traces import COUNT, Access, Micro, ffma, op, waits

pytest.importorskip("resnet_fast._sm", reason="built with RESNET_FAST_BUILD_HOST=1", exc_type=ImportError)

H100 = constants("h100")
CLOCK = 1.755e9
FREE = op("FFMA", "R0, R2, R3, 1")  # one register of each bank


# Issue


def test_a_dependent_chain_costs_its_stall_counts() -> None:
    assert Micro(ffma(stall=4)).run(H100).cycles == pytest.approx(4 * COUNT, abs=2)


@pytest.mark.parametrize("warps, issue_cycles", [(1, 1), (4, 1), (8, 2), (16, 4)])
def test_a_scheduler_issues_one_instruction_a_cycle(warps: int, issue_cycles: int) -> None:
    """Warps of other schedulers do not matter, those of the same one take turns."""
    assert Micro(ffma()).run(H100, warps=warps).cycles == pytest.approx(issue_cycles * COUNT, abs=4)


@pytest.mark.parametrize("warps, cycles", [(4, 4), (8, 4), (16, 4), (32, 8)])
def test_more_warps_hide_a_latency_until_the_issue_slots_are_full(warps: int, cycles: int) -> None:
    assert Micro(ffma(stall=4)).run(H100, warps=warps).cycles == pytest.approx(cycles * COUNT, rel=0.02)


def test_integers_use_one_half_of_the_multipliers_and_floats_both() -> None:
    heavy = Micro([op("IMAD", "R0, R2, R3, 1")] * COUNT).run(H100, warps=4)
    assert heavy.cycles == pytest.approx(H100["fma_interval"] * COUNT, abs=4)
    both = Micro([op("IMAD", "R0, R2, R3, 1"), FREE, FREE, FREE] * (COUNT // 4)).run(H100)
    assert both.cycles == pytest.approx(COUNT, rel=0.05)
    assert heavy.bound == "fma"


@pytest.mark.parametrize(
    "sources, cycles", [("R2, R3, 1", 1), ("R2, R4, 1", 2), ("R2, R4, R6", 3), ("R2, R4.reuse, R7", 1)]
)
def test_registers_of_one_bank_are_read_one_by_one(sources: str, cycles: int) -> None:
    assert Micro(ffma(sources=sources)).run(H100).cycles == pytest.approx(cycles * COUNT, abs=4)


def test_special_functions_and_uniform_instructions_run_at_their_rates() -> None:
    for opcode, interval in (("MUFU.EX2", "special_interval"), ("UIADD3", "uniform_interval")):
        found = Micro([op(opcode, "UR0, UR1, UR2, UR3" if opcode[0] == "U" else "R0, R1")] * COUNT).run(H100)
        assert found.cycles == pytest.approx(H100[interval] * COUNT, abs=H100[interval] + 4)


def test_a_taken_branch_costs_a_fetch() -> None:
    loop = [FREE, op("BRA", "0x0", stall=5)]
    straight = Micro(loop, path=[0, 1]).run(H100).cycles
    turns = Micro(loop, path=[0, 1] * 11).run(H100).cycles
    assert turns - straight == pytest.approx(10 * (1 + 5 + H100["taken_branch"]), abs=1)


def test_an_instruction_whose_guard_fails_issues_and_does_nothing() -> None:
    load = op("LDG.E", "R0, [R2.64]", write=0)
    use = op("IADD3", "R0, R0, R1, RZ", wait=[0])
    off = Micro([load, use])
    off.walker = lambda warps: _without_lanes(Micro([load, use]), warps)  # type: ignore[method-assign]
    assert off.run(H100).cycles < 10


def _without_lanes(micro: Micro, warps: int):  # type: ignore[no-untyped-def]
    inner = micro.walker(warps)

    def walk(blocks: Sequence[int], only_global: bool):  # type: ignore[no-untyped-def]
        out = inner(blocks, only_global)
        for path in out.paths:
            path["lanes"] = np.where(path["instruction"] == 0, 0, path["lanes"])
        return out

    return walk


# Shared memory


@pytest.mark.parametrize("conflicts", [1, 2, 8, 32])
def test_bank_conflicts_multiply_the_time_in_shared_memory(conflicts: int) -> None:
    loads = [op("LDS", "R0, [R2]")] * 64
    found = Micro(loads, lambda b, w, s: Access(wavefronts=conflicts) if s < 64 else None).run(H100, warps=4)
    accepted = H100["queue_interval_sm"]  # one instruction for the whole SM
    assert found.cycles == pytest.approx(4 * 64 * max(accepted, conflicts), rel=0.1, abs=H100["queue_depth"] * 40)
    assert conflicts < 8 or found.bound == "shared"


def test_the_queue_to_memory_takes_one_instruction_of_a_scheduler_at_a_time() -> None:
    loads = Micro([op("LDS", "R0, [R2]")] * 64, lambda b, w, s: Access(wavefronts=1) if s < 64 else None)
    for warps, interval in (
        (1, H100["queue_interval"]),
        (2, H100["queue_interval"]),
        (4, 4 * H100["queue_interval_sm"]),
    ):
        taken = (64 - H100["queue_depth"]) * interval  # the last few wait in the queue
        assert loads.run(H100, warps=warps).cycles == pytest.approx(taken, rel=0.06)


def test_a_load_from_shared_memory_costs_its_latency() -> None:
    code = [op("LDS", "R0, [R2]", write=0, stall=2), op("IADD3", "R0, R0, R1, RZ", wait=[0])]
    found = Micro(code, lambda b, w, s: Access(wavefronts=1) if s == 0 else None).run(H100)
    assert found.cycles == pytest.approx(H100["shared_latency"], abs=3)


def test_a_read_scoreboard_is_released_before_the_result() -> None:
    code = [op("STS", "[R2], R4", read=1, stall=2), op("IADD3", "R4, R0, R1, RZ", wait=[1])]
    found = Micro(code, lambda b, w, s: Access(wavefronts=1) if s == 0 else None).run(H100)
    assert found.cycles == pytest.approx(H100["shared_store_release"], abs=3)


# Tensor cores


def test_products_of_a_warp_run_at_the_rate_of_the_tensor_cores() -> None:
    code = [op("HMMA.16816.F32.BF16", "R0, R4, R8, R0", stall=1)] * COUNT
    for warps in (4, 8):
        cycles = H100["hmma_interval"] * COUNT * warps / 4
        assert Micro(code).run(H100, warps=warps).cycles == pytest.approx(cycles, rel=0.02)
    tf32 = [op("HMMA.1688.F32.TF32", "R0, R4, R8, R0")] * COUNT
    assert Micro(tf32).run(H100, warps=4).cycles == pytest.approx(H100["hmma_interval"] * COUNT, rel=0.02)


def products(n: int, count: int, registers: bool, groups: int = 1) -> list:
    a = "R24" if registers else "gdesc[UR4]"
    rest = "gdesc[UR6], R24" if registers else "R24"
    code = [op("WARPGROUP.ARRIVE", stall=6)]
    for i in range(count):
        commit = ", gsb0" if i % (count // groups) == count // groups - 1 else ""
        code.append(op(f"HGMMA.64x{n}x16.F32.BF16", f"R24, {a}, {rest}{commit}", stall=2))
    return [*code, op("WARPGROUP.DEPBAR.LE", "gsb0, 0x0", stall=2)]


@pytest.mark.parametrize("n", [8, 32, 64, 128, 256])
@pytest.mark.parametrize("registers", [False, True])
def test_products_of_a_warpgroup_take_half_their_columns_or_what_their_operands_take(n: int, registers: bool) -> None:
    """64xNx16: N/2 cycles, and of shared memory 32 bytes for each row of B, and of A unless registers hold it."""
    rows = n + (0 if registers else 64)
    each = max(n / 2, 32 * rows / H100["shared_wavefront_bytes"], H100["product_issue_interval"])
    short, long = (Micro(products(n, count, registers)).run(H100, warps=4).cycles for count in (32, 64))
    assert (long - short) / 32 == pytest.approx(each, rel=0.06)


@pytest.mark.parametrize("n, published", [(64, 97.8), (128, 129.8)])
def test_one_product_and_its_wait_take_what_was_published(n: int, published: float) -> None:
    arrive, leave = 6, 3  # cycles before the product's issue, and from the wait's end to the last
    found = Micro(products(n, 1, False)).run(H100, warps=4).cycles - arrive - leave
    assert found == pytest.approx(published, rel=0.03)


def test_two_warpgroups_share_the_tensor_cores() -> None:
    kernel = Micro(products(128, 32, False))
    one, two = kernel.run(H100, warps=4).cycles, kernel.run(H100, warps=8).cycles
    assert two - one == pytest.approx(32 * 64, rel=0.03)
    assert kernel.run(H100, warps=8).bound == "tensor"


def test_a_wait_for_all_but_one_group_leaves_the_last_running() -> None:
    early, late = products(128, 8, False, groups=2), products(128, 8, False, groups=2)
    early[-1] = op("WARPGROUP.DEPBAR.LE", "gsb0, 0x1", stall=2)
    difference = Micro(late).run(H100, warps=4).cycles - Micro(early).run(H100, warps=4).cycles
    assert difference == pytest.approx(4 * 64, abs=4)


def test_loads_from_shared_memory_and_the_operands_of_products_share_its_wavefronts() -> None:
    """Two warpgroups: one multiplies with both operands in shared memory, one loads with conflicts."""
    multiply, load = products(64, 64, False), [op("LDS", "R0, [R2]")] * 64
    code = [*multiply, *load]
    at = len(multiply)

    def path(warp: int) -> list[int]:
        return list(range(at)) if warp < 4 else list(range(at, len(code)))

    def access(block: int, warp: int, step: int) -> Access | None:
        return Access(wavefronts=16) if warp >= 4 and step < 64 else None

    both = Micro(code, access, path).run(H100, warps=8).cycles
    operands = 64 * 32 * (64 + 64) / H100["shared_wavefront_bytes"]
    assert both == pytest.approx(operands + 4 * 64 * 16, rel=0.06)


# Waiting for others


def test_a_barrier_waits_for_the_slowest() -> None:
    slow = [op("FFMA", "R0, R2, R3, 1", stall=10)] * 50
    code = [*slow, op("BAR.SYNC.DEFER_BLOCKING", "0x0", stall=6)]

    def path(warp: int) -> list[int]:
        return list(range(len(code))) if warp == 3 else [len(code) - 1]

    def access(block: int, warp: int, step: int) -> Access | None:
        return Access(value=0) if (step == 50 if warp == 3 else step == 0) else None

    found = Micro(code, access, path).run(H100, warps=8)
    assert found.cycles == pytest.approx(500 + H100["barrier_release"], abs=10)
    assert waits(found)["barrier"] == pytest.approx(7 * found.cycles, rel=0.05)


def test_a_named_barrier_counts_arrivals_that_do_not_wait() -> None:
    code = [op("BAR.ARV", "0x1, 0x40"), op("BAR.SYNC", "0x1, 0x40", stall=6)]

    def access(block: int, warp: int, step: int) -> Access | None:
        return Access(value=1 | 64 << 8) if step == 0 else None

    found = Micro(code, access, lambda warp: [0] if warp == 0 else [1]).run(H100, warps=2)
    assert found.cycles == pytest.approx(H100["barrier_release"], abs=10)


def test_warps_that_wait_for_each_other_forever_are_named() -> None:
    code = [op("BAR.SYNC", "0x1, 0x60", stall=6)]
    micro = Micro(code, lambda b, w, s: Access(value=1 | 96 << 8) if s == 0 else None)
    with pytest.raises(
        RuntimeError, match=r"wait for each other:\n  warp 0 of block 0 before instruction 1 waits for barrier"
    ):
        micro.run(H100, warps=2)


PHASE = 1024


def bulk(tile: int, arrive_first: bool = True) -> Micro:
    code = [
        op("SYNCS.EXCH.64", "URZ, [UR4], UR6", stall=2),
        op("SYNCS.ARRIVE.TRANS64", "RZ, [R2], R4", stall=2),
        op("UTMALDG.2D", "[UR8], [UR4]", stall=2),
        op("SYNCS.PHASECHK.TRANS64.TRYWAIT", "P0, [R2], R4", stall=2, write=0),
        op("BRA", "0x0", wait=[0], stall=5),
    ]

    def access(block: int, warp: int, step: int) -> Access | None:
        return [
            Access(address=PHASE, value=1),
            Access(address=PHASE, value=tile),
            Access(range(tile // 32), tile // 128, tile, PHASE),
            Access(address=PHASE, value=0),
            None,
            None,
        ][step]

    micro = Micro(code, access)
    walker = micro.walker

    def one_lane(warps: int):  # type: ignore[no-untyped-def]
        inner = walker(warps)

        def walk(blocks: Sequence[int], only_global: bool):  # type: ignore[no-untyped-def]
            out = inner(blocks, only_global)
            for path in out.paths:
                path["lanes"] = np.where(np.isin(path["instruction"], (0, 1, 2)), 1, path["lanes"])
            return out

        return walk

    micro.walker = one_lane  # type: ignore[method-assign]
    return micro


def test_a_wait_for_a_phase_ends_when_the_bulk_copy_has_come() -> None:
    tile = 16384
    found = bulk(tile).run(H100)
    latency = H100["l2_latency"] + H100["dram_extra_seconds"] * CLOCK + H100["bulk_extra_latency"]
    lines = tile / 128  # one a cycle
    assert found.cycles == pytest.approx(latency + H100["l2_far_extra"] + lines + H100["phase_release"], rel=0.15)
    assert waits(found)["phase"] > 0.9 * found.cycles
    larger = bulk(2 * tile).run(H100).cycles
    port = H100["l2_port_bytes"]
    assert larger - found.cycles == pytest.approx(tile / port, rel=0.3)


def pipelined(stages: int, turns: int) -> Micro:
    """A cp.async loop: copy ``stages - 1`` tiles ahead, wait for the oldest, compute for 150 cycles."""
    copy = [op("LDGSTS.E.BYPASS.128", "[R0], [R2.64]"), op("LDGDEPBAR", "")]
    wait = op("DEPBAR.LE", f"SB0, 0x{stages - 1:x}", stall=4)
    work = [op("FFMA", "R0, R2, R3, 1", stall=15)] * 10
    code = [*copy, wait, *work]
    path = [0, 1] * (stages - 1) + list(range(len(code))) * turns

    def access(block: int, warp: int, step: int) -> Access | None:
        if step >= len(path) or path[step] != 0:
            return None
        number = block * 1024 + 16 * step
        return Access(range(number, number + 16), 4, 512)

    return Micro(code, access, path)


def test_a_stage_less_makes_a_loop_of_copies_slower() -> None:
    turns = 40
    times = [pipelined(stages, turns).run(H100).cycles / turns for stages in (1, 2, 3, 6)]
    latency = H100["l2_latency"] + H100["dram_extra_seconds"] * CLOCK
    assert times[0] == pytest.approx(latency + H100["l2_far_extra"] / 2 + 150, rel=0.15)
    assert times[1] == pytest.approx((latency + H100["l2_far_extra"] / 2 + 150) / 2, rel=0.2)
    assert times[0] > 1.3 * times[1] > 1.3 * 1.2 * times[2] and times[2] > times[3]
    assert times[3] == pytest.approx(150 + 6, rel=0.15)


# What is refused


def test_an_opcode_without_costs_is_named_with_how_often_it_occurs() -> None:
    code = [op("UCGABAR_WAIT"), FREE, op("UCGABAR_WAIT"), op("FROB.X", "R0")]
    with pytest.raises(UserError, match=re.escape("UCGABAR_WAIT (2 times), FROB.X (1 times)")):
        check(code)
    with pytest.raises(UserError, match=re.escape("UCGABAR_WAIT (6 times)")):
        Micro(code, path=[0, 1, 0, 1, 0]).run(H100, warps=2)
    Micro(code, path=[1, 1]).run(H100)  # what is not executed may be anything


# What is printed of a launch


def test_time_and_timeline_add_up() -> None:
    found = pipelined(2, 10).run(H100, warps=2)
    for warp in (0, 1):
        parts = found.timeline[found.timeline["warp"] == warp]
        assert (parts["start"][1:] == parts["end"][:-1]).all() and len(parts) > 20
    assert sum(waits(found).values()) == (found.timeline["end"] - found.timeline["start"]).sum()
    assert reasons()[found.timeline["reason"][0]] in reasons()
    assert found.executed.sum() == sum(waits(found)[r] for r in ("issue",))
