"""Global memory, waves and graphs in the cycle model: each expected time follows from the constants, by hand."""

from __future__ import annotations

import pytest

from resnet_fast.errors import UserError
from resnet_fast.simulation.constants import constants
from resnet_fast.simulation.kernel import Kernel
from resnet_fast.simulation.launches import LaunchSize, resident_blocks, sequence_seconds, simulate_launch
from resnet_fast.simulation.walk import Launch
from tests.support.micro_traces import Access, Micro, ffma, op, waits

pytest.importorskip("resnet_fast._sm", reason="built with RESNET_FAST_BUILD_HOST=1", exc_type=ImportError)

H100 = constants("h100")
CLOCK = 1.755e9

LOAD = op("LDG.E", "R0, [R2.64]", stall=2, write=0)
USE = op("IADD3", "R0, R0, R1, RZ", wait=[0])


def near(sector: int) -> int:
    """Return a sector number at or after ``sector`` whose home is this half of L2, as csrc/sm/memory.cpp hashes it."""
    while (sector >> 7) * 0x9E3779B97F4A7C15 % 2**64 >> 63:
        sector += 128
    return sector


def line(number: int) -> list[int]:
    first = near(128 * number)
    return [first, first + 1, first + 2, first + 3]


def test_a_load_costs_the_latency_of_the_level_that_has_it() -> None:
    def at(step: int) -> Access | None:
        return Access(line(0), 1, 128) if step in (0, 2) else None

    chain = Micro([LOAD, USE], lambda b, w, s: at(s), path=[0, 1, 0, 1])
    once = Micro([LOAD, USE], lambda b, w, s: at(s))
    dram = H100["l2_latency"] + H100["dram_extra_seconds"] * CLOCK
    cold = once.run(H100).cycles
    assert cold == pytest.approx(dram, abs=12)
    assert chain.run(H100).cycles - cold == pytest.approx(H100["l1_latency"], abs=4)  # the second load hits L1
    warm = once.run(H100, in_l2=[(32 * line(0)[0], 128)])
    assert warm.cycles == pytest.approx(H100["l2_latency"], abs=12)
    assert waits(warm)["l2"] > 0.9 * warm.cycles and waits(warm)["dram"] == 0


def stream(in_flight: int, rounds: int) -> Micro:
    """Each warp loads 512 bytes into each of ``in_flight`` places, then waits for all of them."""
    loads = [op("LDG.E.128", "R0, [R2.64]", stall=2, write=n) for n in range(in_flight)]
    uses = [op("IADD3", "R0, R0, R1, RZ", wait=[n]) for n in range(in_flight)]
    path = list(range(2 * in_flight)) * rounds

    def access(block: int, warp: int, step: int) -> Access | None:
        if path[step : step + 1] and path[step] < in_flight:
            number = ((block * 64 + warp) * rounds + step // (2 * in_flight)) * in_flight + path[step]
            return Access(range(16 * number, 16 * number + 16), 4, 512)
        return None

    return Micro([*loads, *uses], access, path)


def test_loads_reach_the_bandwidth_of_dram_only_with_enough_bytes_on_their_way() -> None:
    """Little's law is written nowhere in the model: bytes on their way = latency x bandwidth."""
    per_sm = H100["dram_read_bandwidth"] / CLOCK / H100["multiprocessors"]
    latency = H100["l2_latency"] + H100["l2_far_extra"] / 2 + H100["dram_extra_seconds"] * CLOCK
    needed = per_sm * latency
    for warps, in_flight in ((2, 1), (4, 1), (32, 2)):
        flying = 512 * warps * in_flight
        found = stream(in_flight, 12).run(H100, warps=warps, blocks=132)
        rate = found.bytes["dram_read"] / found.cycles
        assert found.bytes["dram_read"] == 12 * flying
        if flying < needed:
            assert rate == pytest.approx(flying / latency, rel=0.2)
            assert found.bound == "latency"
        else:
            assert flying > 2 * needed
            assert rate == pytest.approx(per_sm, rel=0.08)
            assert found.bound == "dram"


def test_what_several_multiprocessors_read_comes_from_dram_once() -> None:
    def shared_line(block: int, warp: int, step: int) -> Access | None:
        return Access(line(3), 1, 128) if step == 0 else None

    found = Micro([LOAD, USE], shared_line).run(H100, blocks=132 * 2, warps=1)
    assert found.bytes["dram_read"] * 132 == pytest.approx(128)
    assert found.bytes["l1_hit"] == 128  # the second block of the same multiprocessor


def test_a_long_copy_takes_what_its_reads_and_writes_take_and_a_short_one_stays_in_l2() -> None:
    code = [op("LDG.E.128", "R0, [R2.64]", stall=2, write=0), op("STG.E.128", "[R4.64], R0", wait=[0])]

    def access(block: int, warp: int, step: int) -> Access | None:
        first = 16 * (32 * block + warp) + step * 2**32
        return Access(range(first, first + 16), 4, 512) if step < 2 else None

    copy, rounds = Micro(code, access), 40
    found = copy.run(H100, warps=32, blocks=132 * rounds)
    moved = 132 * rounds * 32 * 512
    assert moved > H100["l2_bytes"] and found.simulated < rounds and found.bound == "dram"
    expected = moved / H100["dram_read_bandwidth"] + moved / H100["dram_write_bandwidth"]
    assert found.seconds == pytest.approx(expected, rel=0.06)
    assert found.bytes["dram_write"] == found.bytes["dram_read"]
    assert copy.run(H100, warps=32, blocks=132).bytes["dram_write"] == 0


def test_half_the_blocks_at_once_take_a_latency_bound_launch_twice_as_long() -> None:
    kernel = stream(1, 8)
    full = kernel.run(H100, warps=1, blocks=132 * 32, shared=13 * 1024)
    half = kernel.run(H100, warps=1, blocks=132 * 32, shared=27 * 1024)
    assert (full.resident, half.resident) == (16, 8)
    assert 1.6 < half.cycles / full.cycles < 2.2


def test_the_last_wave_costs_as_much_as_a_full_one() -> None:
    kernel = Micro(ffma(stall=4))
    one, two, beyond = (kernel.run(H100, blocks=n, warps=32, shared=200 * 1024) for n in (132, 264, 265))
    assert two.cycles == pytest.approx(2 * one.cycles, rel=0.15)
    assert beyond.cycles == pytest.approx(3 * one.cycles, rel=0.15)
    assert beyond.rounds == 3


def test_a_long_launch_is_as_long_as_if_all_of_it_were_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stream(1, 4)
    short = kernel.run(H100, warps=4, blocks=132 * 20, shared=100 * 1024)
    monkeypatch.setattr("resnet_fast.simulation.launches.WAVES", 10)
    whole = kernel.run(H100, warps=4, blocks=132 * 20, shared=100 * 1024)
    assert (short.simulated, whole.simulated) == (8, 20)
    assert short.cycles == pytest.approx(whole.cycles, rel=0.03)


def test_a_trace_that_lacks_an_access_is_refused() -> None:
    with pytest.raises(RuntimeError, match="block 0, warp 0, instruction 0: expected the trace to say"):
        Micro([LOAD, USE]).run(H100)


def test_a_block_that_does_not_fit_is_refused() -> None:
    assert resident_blocks(LaunchSize(1, 128, 0), 255, H100) == 2
    assert resident_blocks(LaunchSize(1, 256, 113 * 1024), 32, H100) == 2
    with pytest.raises(UserError, match="use less: shared memory"):
        resident_blocks(LaunchSize(1, 128, 240 * 1024), 32, H100)
    with pytest.raises(UserError, match="a block of 1 to 1024 threads, got 1056"):
        resident_blocks(LaunchSize(1, 1056, 0), 32, H100)


@pytest.mark.parametrize("clock", [0, 1755, 1.755])
def test_a_clock_that_is_not_in_hz_is_refused(clock: float) -> None:
    with pytest.raises(UserError, match=f"a clock of 1e8 to 1e10 Hz, got {clock}; give cycles per second"):
        Micro(ffma()).run(H100, clock=clock)


def test_code_of_another_architecture_is_refused() -> None:
    ampere = Kernel("k", 80, (), 32, 0, 0, 0x160, ())
    launch = Launch(ampere, grid=(1, 1, 1), threads=(128, 1, 1), shared=0, parameters=(), memory=())
    with pytest.raises(UserError, match="machine code of sm_90 for the cycle model, got sm_80; compile for sm_90"):
        simulate_launch(launch, H100)


def test_a_faster_clock_leaves_dram_as_slow_as_it_is() -> None:
    kernel = stream(2, 3)
    slow, fast = (kernel.run(H100, warps=32, blocks=132, clock=clock).seconds for clock in (1.5e9, 1.98e9))
    assert slow == pytest.approx(fast, rel=0.05)
    compute = Micro(ffma(stall=4))
    assert compute.run(H100, clock=1.5e9).seconds / compute.run(H100, clock=1.98e9).seconds == pytest.approx(1.98 / 1.5)


def test_launches_of_a_graph_are_apart_and_overlap_shortens_that() -> None:
    one = Micro(ffma()).run(H100)
    apart = sequence_seconds([one, one], H100)
    assert apart == pytest.approx(2 * (one.seconds + H100["graph_node_seconds"]))
    assert apart - sequence_seconds([one, one], H100, overlapped=True) == pytest.approx(
        2 * H100["graph_overlap_seconds"]
    )
