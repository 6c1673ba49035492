"""The environment report is complete, and does not crash when everything it asks is broken."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from resnet_fast import env, flags, native
from tests.support.processes import run_python

BLOCK_TORCH = """
import runpy, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")

sys.meta_path.insert(0, Block())
sys.argv = ["env"]
runpy.run_module("resnet_fast.env", run_name="__main__")
"""


def boom() -> Any:
    raise RuntimeError("boom\nand more")


def test_report_has_every_section_and_survives_json() -> None:
    report = env.collect()
    assert list(report) == list(env.SECTIONS)
    back = json.loads(json.dumps(env.to_json(report)))
    assert back["versions"]["resnet_fast"] == env.__version__
    assert back["versions"]["torch"].split(".")[0].isdigit()
    assert back["cpu"]["cpus"] >= 1


def test_backends_each_come_with_a_reason() -> None:
    backends = env.to_json(env.collect()["backends"])
    assert {"reference", "onednn", "triton", "cuda"} <= set(backends)
    assert all((value["reason"] if isinstance(value, dict) else value) for value in backends.values())


@pytest.mark.parametrize("section", list(env.SECTIONS))
def test_failing_section_leaves_the_others_standing(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = env.collect()
    probes = env.SECTIONS[section]
    broken = dict.fromkeys(probes, boom) if isinstance(probes, dict) else boom
    monkeypatch.setitem(env.SECTIONS, section, broken)
    report = env.collect()
    failed = report[section].values() if isinstance(probes, dict) else [report[section]]
    assert {str(fact) for fact in failed} == {"not available: RuntimeError: boom and more"}
    assert {k: v for k, v in report.items() if k != section} == {k: v for k, v in whole.items() if k != section}
    assert "boom and more" in env.render(report)
    json.dumps(env.to_json(report))


def test_without_torch_says_so_and_exits_well() -> None:
    done = run_python(BLOCK_TORCH)
    assert done.returncode == 0, done.stderr
    assert "torch is blocked" in done.stdout
    for title in env.SECTIONS:
        assert title in done.stdout.splitlines()
    assert "Traceback" not in done.stdout + done.stderr


def test_driver_that_answers_and_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert env.collect()["versions"]["driver"] == "580.65.06"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "exit status 9" in str(env.collect()["versions"]["driver"])
    tool.write_text("#!/bin/sh\nexit 0\n")  # no line at all
    assert "IndexError" in str(env.collect()["versions"]["driver"])


@pytest.mark.parametrize(("number", "text"), [(91900, "9.19.0"), (92400, "9.24.0"), (8907, "8.9.7")])
def test_cudnn_version_is_decoded(number: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert env.collect()["versions"]["cudnn"] == text


def test_isa_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("DEFAULT", "AVX2", "AVX512"):
        pytest.skip(f"no x86-64 vector unit: {capability}")
    for host in (True, False):
        if not host:
            monkeypatch.setattr(native, "host_status", lambda: native.Verdict(False, "hidden by a test"))
        isa = env.collect()["cpu"]["isa"]
        assert isa["avx2"] or capability == "DEFAULT"
        assert isa["avx512f"] or capability != "AVX512"


def test_absent_distribution_is_named() -> None:
    with pytest.raises(LookupError, match="no-such-thing is not installed"):
        env._distribution("no-such-thing")()


def test_every_switch_with_value_default_and_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FAST_STRICT", "1")
    monkeypatch.setenv("RESNET_FAST_PROVE", "maybe")
    monkeypatch.setenv("RESNET_FAST_TF32", "1")
    monkeypatch.setenv("RESNET_FAST_STRCT", "1")
    switches = env.to_json(env.collect()["switches"])
    assert set(switches) == {flag.name for flag in flags.TABLE} | {"RESNET_FAST_STRCT", "RESNET_FAST_TF32"}
    strict = switches["RESNET_FAST_STRICT"]
    assert strict["value"] == "1" and strict["set"] and strict["default"] == "0" and "raises" in strict["meaning"]
    assert "expected RESNET_FAST_PROVE to be one of 0, 1, got 'maybe'" in switches["RESNET_FAST_PROVE"]["reason"]
    assert "torch.backends.cudnn.conv.fp32_precision decides" in switches["RESNET_FAST_TF32"]["reason"]
    assert switches["RESNET_FAST_STRCT"]["reason"] == "no such switch; did you mean RESNET_FAST_STRICT?"
    assert switches["RESNET_FAST_CACHE"]["value"] == str(flags.cache_folder())


def test_folded_report_loses_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    report = env.collect()
    folded = env.render(report, 80)
    assert folded.split() == env.render(report).split()
    words = max(len(word) for word in folded.split())
    assert max(map(len, folded.splitlines())) <= max(80, 31 + words)
