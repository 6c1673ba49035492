"""Callgrind's files are read into counts by object file and function, and steps are summed from them."""

from __future__ import annotations

from collections import Counter

import pytest

from resnet_fast.benchmarks import callgrind, host_instructions
from resnet_fast.benchmarks.callgrind import CountedPart
from resnet_fast.errors import UserError

FILE = """# callgrind format
desc: Trigger: Client Request: train|ours|forward
positions: line
events: Ir
summary: 99

ob=(3) /usr/lib/libpython3.11.so.1.0
fl=(1) ceval.c
fn=(7) eval
0 40
+3 2
cob=(4) /site-packages/torch/lib/libtorch_cpu.so
cfi=(2) ???
cfn=(9) at::add
calls=2 30
0 1000
* 8

ob=(4)
fl=(2)
fn=(9)
-4 600
cob=(3)
cfn=(7)
calls=1 0
0 50
0 400

ob=(5) ???
fn=(11) 0x00000000f2408000
0 5
"""


def test_a_file_is_read_without_what_called_functions_cost() -> None:
    part = callgrind.parse(FILE.splitlines())
    assert part.name == "train|ours|forward"
    assert part.functions == {
        ("/usr/lib/libpython3.11.so.1.0", "eval"): 50,
        ("/site-packages/torch/lib/libtorch_cpu.so", "at::add"): 1000,
        ("???", "0x00000000f2408000"): 5,
    }


def _part(name: str, python: int, torch: int) -> CountedPart:
    return CountedPart(name, Counter({("/bin/python3.11", "eval"): python, ("/lib/libtorch_cpu.so", "add"): torch}))


def test_a_step_is_the_median_of_its_rounds_without_the_request_and_the_first_round() -> None:
    forward = [_part("train|ours|forward", n, 1000) for n in (9000, 110, 120, 160)]
    backward = [_part("train|ours|backward", 30, 500) for _ in range(4)]
    request = [_part("train|ours|", 10, 0) for _ in range(4)]
    parts = [part for parts in zip(request, forward, backward, strict=True) for part in parts]
    step = host_instructions._read(parts)["train"]["ours"]
    assert step.phases == {"forward": 1110, "backward": 520}
    assert step.libraries == {"torch": 1500, "python": 130}
    assert step.spread == pytest.approx(50 / 1110)


def test_on_the_cpu_only_python_counts() -> None:
    case = host_instructions.ON_CPU
    request, step = _part(f"{case}|ours|", 70, 900), _part(f"{case}|ours|inference", 100, 5000)
    found = host_instructions._read([request, step, request, step])[case]["ours"]
    assert found.libraries == {"python": 30} and found.total == 30


def test_a_machine_without_valgrind_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "apt-get install valgrind" in callgrind.obstacle()
    with pytest.raises(UserError, match=r"expected valgrind with its headers.*got no valgrind in PATH; install it"):
        callgrind.run("pass")


def test_the_environment_fixes_the_code_that_runs() -> None:
    own = {"RESNET_FAST_BACKEND": "reference", "TRITON_INTERPRET": "1", "PYTHONPATH": "here", "PYTHONHASHSEED": "7"}
    found = callgrind._environment(own | {"HOME": "/home"})
    assert found["PYTHONHASHSEED"] == "0" and found["PYTHONPATH"] == "here" and found["HOME"] == "/home"
    assert found["ATEN_CPU_CAPABILITY"] == "avx2"
    assert not any(name.startswith(("RESNET_FAST_", "TRITON_")) for name in found)
