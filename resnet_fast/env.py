"""Print the environment report: ``python -m resnet_fast.env`` and ``resnet-fast env``.

Every fact has its own probe. A probe that fails becomes a line with its reason and does not affect the others, so the
report works on a broken machine: without torch, with a driver that does not answer, with a native library that does not
load. It is plain text to paste into a bug report.
"""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from . import flags, limits, native
from ._version import __version__
from .devices import cpu_model
from .errors import BackendError, UserError

ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx_ne_convert")
"""Instruction sets that decide which CPU kernels can run, by their names in Linux and :mod:`resnet_fast.native`."""


@dataclass(frozen=True)
class FailedProbe:
    """A probe that failed, with its reason."""

    reason: str

    def __str__(self) -> str:
        return f"not available: {self.reason}"


Probe = Callable[[], Any]


def _distribution(name: str) -> Probe:
    """Return a probe of an installed distribution's version that reads metadata only and imports nothing."""

    def probe() -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            raise LookupError(f"{name} is not installed") from None

    return probe


def _torch() -> str:
    import torch

    return str(torch.__version__)


def _cuda_runtime() -> str:
    import torch

    return torch.version.cuda or "none: this torch is built without CUDA"


def _cudnn() -> str:
    import torch

    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    number = torch.backends.cudnn.version()
    if number is None:
        raise LookupError("libcudnn cannot be loaded")
    # 91900 -> 9.19.0; before version 9 the major had a factor of 1000.
    major, rest = divmod(number, 10000) if number >= 90000 else divmod(number, 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except FileNotFoundError:
        raise LookupError("nvidia-smi is not on PATH: no NVIDIA driver") from None
    return done.stdout.split()[0]


def _isa() -> dict[str, bool]:
    if native.host_status():
        found = native.host_isa()
        return {name: found[name] for name in ISA if name in found}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            flags = line.split()
            # Some kernels do not list avx_ne_convert, so its absence here says nothing about the CPU.
            return {name: name in flags for name in ISA if name != "avx_ne_convert"}
    raise LookupError("/proc/cpuinfo lists no flags and there is no host module")


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _torch_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _onednn() -> str:
    import torch

    if not torch.backends.mkldnn.is_available():
        raise LookupError("this torch is built without oneDNN")
    lines = (line.strip(" -") for line in torch.__config__.show().splitlines())
    return next((line for line in lines if "MKL-DNN" in line or "oneDNN" in line), "present, version unknown")


def _native_library() -> dict[str, str]:
    return native.build_info()


def _host_module() -> dict[str, str]:
    return native.host_build_info()


def _devices() -> dict[str, Any]:
    """Return every device that torch can use. An accelerator is queried, never initialised for work."""
    import torch

    found: dict[str, Any] = {"cpu": cpu_model()}
    if torch.version.cuda is not None and not torch.cuda.is_available():
        found["cuda"] = FailedProbe("torch is built with CUDA and finds no usable GPU")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
            f"{p.total_memory / 2**30:.1f} GiB"
        )
    return found


def _backends() -> dict[str, Any]:
    """Return backend -> why it can run here, or a :class:`FailedProbe` that says why it cannot."""
    from .dispatch.catalog import availability

    return {
        name: (verdict.reason or "available") if verdict else FailedProbe(verdict.reason)
        for name, verdict in availability().items()
    }


@dataclass(frozen=True)
class Switch:
    """An environment variable: its current value, its choices and its meaning."""

    value: str
    set: bool
    default: str
    choices: tuple[str, ...]
    meaning: str

    def __str__(self) -> str:
        choices = f"choices {', '.join(self.choices)}; " if self.choices else ""
        return f"{self.value or 'not set'} ({choices}default {self.default or 'none'}). {self.meaning}"


def _switches() -> dict[str, Any]:
    """Return every switch, and variables with our prefix that are no switch."""

    def switch(flag: flags.Flag) -> Switch:
        value, default = flag.read(), flag.default
        if flag is flags.CACHE_FOLDER:
            value, default = str(flags.cache_folder()), str(flags.default_cache_folder())
        return Switch(value, bool(os.environ.get(flag.name)), default, flag.choices, flag.meaning)

    found: dict[str, Any] = {flag.name: _ask(partial(switch, flag)) for flag in flags.TABLE}
    return found | {name: FailedProbe(f"no such switch; {todo}") for name, todo in flags.unknown().items()}


SECTIONS: dict[str, dict[str, Probe] | Probe] = {
    "versions": {
        "resnet_fast": lambda: __version__,
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform,
        "torch": _torch,
        "torchvision": _distribution("torchvision"),
        "triton": _distribution("triton"),
        "numpy": _distribution("numpy"),
        "cuda runtime": _cuda_runtime,
        "cudnn": _cudnn,
        "driver": _driver,
    },
    "cpu": {
        "model": cpu_model,
        "isa": _isa,
        "cpus": limits.cores,
        "torch threads": _torch_threads,
        "torch capability": _torch_capability,
        "onednn": _onednn,
    },
    "devices": _devices,
    "native library": _native_library,
    "host module": _host_module,
    "backends": _backends,
    "switches": _switches,
}
"""Section -> its probes by name, or one probe that gives all lines of the section."""


def _ask(probe: Probe) -> Any:
    try:
        return probe()
    except Exception as error:
        text = " ".join(str(error).split())
        if type(error) in (LookupError, BackendError, UserError):  # ours, with a complete sentence
            return FailedProbe(text)
        return FailedProbe(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def collect() -> dict[str, Any]:
    """Return the report: section -> fact -> value. A :class:`FailedProbe` replaces what is missing."""
    return {
        title: {name: _ask(probe) for name, probe in probes.items()} if isinstance(probes, dict) else _ask(probes)
        for title, probes in SECTIONS.items()
    }


def to_json(value: Any) -> Any:
    """Return the report as JSON values; a failed probe becomes ``{"available": false, "reason": ...}``."""
    if isinstance(value, FailedProbe):
        return {"available": False, "reason": value.reason}
    if isinstance(value, Switch):
        return asdict(value)
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def render(report: dict[str, Any], width: int | None = None) -> str:
    """Return the report as text: a block per section, a line per fact, folded to ``width`` characters if given."""
    blocks = []
    for title, facts in report.items():
        if not isinstance(facts, dict):
            blocks.append("\n".join([title, *_lines("  ", str(facts), width)]))
            continue
        longest = max((len(name) for name in facts), default=0)
        lines = [line for name, fact in facts.items() for line in _lines(f"  {name:<{longest}}  ", _text(fact), width)]
        blocks.append("\n".join([title, *lines]))
    return "\n\n".join(blocks)


def _lines(label: str, text: str, width: int | None) -> list[str]:
    """Return ``text`` after its label, folded between words, never inside a word."""
    indent = " " * min(len(label), 30)
    if width is None:
        return [label + text]
    # whole words, so that a name or a path can be searched for
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
    return wrapper.wrap(label + text)


def _text(fact: Any) -> str:
    if isinstance(fact, dict):
        return " ".join(f"{name}={_text(value)}" for name, value in fact.items())
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return str(fact)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # a device's name may have letters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    print(render(collect()))
