"""A second opinion on compiled kernels: sentryward proves the absence of races over all schedules, where it answers.

docs/notes/sentryward.md says for which kernels it does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast import native
from resnet_fast.tools.ptx_machine import PtxFault, PtxLaunch, ptx_machine
from tests.support import op_cases
from tests.support.toy_kernels import copy_kernel

sentryward = pytest.importorskip("sentryward", reason="a second opinion: pip install sentryward")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason),
]


def verdict(folder: Path, text: str, launch: PtxLaunch) -> str:
    """Return sentryward's verdict of a launch whose pointers are to memory of their own each."""
    declared = re.findall(r"^\s*\.param \.(\w+) (?!\.ptr).*_param_(\d+)", text, re.M)
    given: list[dict[str, Any]] = [
        {"parameter": int(i), "type": "u32", "value": int.from_bytes(launch.parameters[int(i)], "little")}
        for kind, i in declared
        if kind == "u32"
    ]
    sizes = {"grid_dim": launch.grid, "block_dim": [launch.threads, 1, 1], "cluster_dim": [1, 1, 1]}
    sizes["dynamic_shared_bytes"] = launch.shared  # type: ignore[assignment]
    about = {"schema": "spverify.kernel-input/v1", "launch": sizes, "arguments": given}
    (folder / "kernel.ptx").write_text(text)
    (folder / "input.json").write_text(json.dumps(about))
    return str(sentryward.verify(folder / "kernel.ptx", input=folder / "input.json", timeout_seconds=120)["result"])


def test_it_agrees_on_a_kernel_and_on_a_removed_barrier(tmp_path: Path) -> None:
    texts: list[str] = []

    def keep(name: str, text: str) -> str:
        texts.append(text)
        return text

    def without_barrier(name: str, text: str) -> str:
        """Leave out the loop's barrier, between a wait for copies and the reads."""
        return re.sub(
            r"(\$L__BB0_\d+:(?:(?!bar\.sync).)*cp\.async\.wait_group\s+\d+;.*?)bar\.sync\s+0;",
            r"\1",
            text,
            count=1,
            flags=re.S,
        )

    p = op_cases.make("conv_bn_act", n=2, h=5, w=3, ci=16, co=8)
    p = p.map(lambda name, t: op_cases.lay_out(t, "nhwc") if name in ("x", "residual") else t).to(torch.bfloat16)
    with ptx_machine(80, rewrite=keep) as machine:
        copy_kernel[(2,)](torch.randn(1500), torch.empty(1500), 1500, BLOCK=1024)
        p.run("triton")
    assert verdict(tmp_path, texts[0], machine.launches[0]) == "race_free"
    changed = without_barrier("", texts[1])
    assert changed.count("bar.sync") == texts[1].count("bar.sync") - 1
    assert verdict(tmp_path, changed, machine.launches[1]) == "potential_race"
    with ptx_machine(80, rewrite=without_barrier), pytest.raises(PtxFault):
        p.run("triton")
