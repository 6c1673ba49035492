"""Keep which configs were proved on a GPU: their output was compared with stock PyTorch's and matched.

    configs.needs_proof(launch, config)      the rule: what may not run without a proof
    Proofs                                   the verdicts on one GPU with one toolchain
    ~/.cache/resnet_fast/proofs/<gpu>.json   where they are kept; RESNET_FAST_CACHE or XDG_CACHE_HOME move it

The planner (launch_plan.py) leaves out what needs a proof and has none. The Triton backend proves a config when a plan
first wants it, the tuner proves what it measures, and ``make gpu-check`` proves all. A verdict holds for one GPU model,
one version of the compiler and driver, and one version of the kernels' source; with any other it is ignored and the
config is proved again. Torch-free.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import flags
from ..devices import file_stem
from ..io import safe_files
from ..spec import LaunchSpec
from . import configs
from .configs import Config

_log = logging.getLogger("resnet_fast")

BATCH = 2
"""Batch size of a proof. Tile edges do not depend on the batch, and fp64 is slow on a large one."""


SIDE = 64
"""Largest height and width of the image in a proof of one convolution: larger ones cost memory and show no more."""


def small(launch: LaunchSpec) -> LaunchSpec:
    """Return the launch with at most :data:`BATCH` images of at most :data:`SIDE` pixels: the problem of a proof.

    A chain keeps its height and width, which its convolutions and its projection share. The verdict on an ``invariant``
    launch holds for any batch.
    """
    launch = launch.with_batch(BATCH if launch.last.invariant else min(launch.n, BATCH))
    if len(launch.convs) > 1 or launch.projection is not None:
        return launch
    conv = launch.last
    cropped = conv.with_(h=min(conv.h, SIDE), w=min(conv.w, SIDE))
    return replace(launch, convs=(cropped,)) if min(cropped.out_shape()) > 0 else launch


def at_first_use(launch: LaunchSpec) -> bool:
    """Return whether a config may be proved at the first use of a launch; the tuner and ``make gpu-check`` prove all.

    The first dgrad of a chain adds the gradient of the shortcut, if there is one. A launch does not know it, so that a
    proof has to compile every variant.
    """
    return launch.kernel != "conv_dgrad" or launch.prologue


@dataclass
class Proofs:
    """The verdicts on one GPU with one toolchain.

    Attributes:
        gpu: the GPU's name.
        versions: what the compiled code depends on, by name.
        verdicts: small launch, as printed -> config, as printed -> why it is refused; empty if it is proved.
    """

    gpu: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, dict[str, str]] = field(default_factory=dict)

    def verdict(self, launch: LaunchSpec, config: Config) -> str | None:
        """Return why a config is refused; an empty text if it is proved or needs no proof, None if it was not tried."""
        if not configs.needs_proof(launch, config):
            return ""
        return self.verdicts.get(str(small(launch)), {}).get(str(config))

    def record(self, launch: LaunchSpec, config: Config, refusal: str) -> None:
        """Keep a verdict: why the config is refused, or an empty text for a proof."""
        self.verdicts.setdefault(str(small(launch)), {})[str(config)] = refusal

    def of_subject(self, subject: str) -> str | None:
        """Return why ``subject``, which is no config, is refused; an empty text if it is proved, None if not tried."""
        return self.verdicts.get(subject, {}).get("")

    def refusals(self, launch: LaunchSpec) -> dict[str, str]:
        """Return the refused configs of a launch, as printed, with the reasons."""
        return {name: why for name, why in self.verdicts.get(str(small(launch)), {}).items() if why}


def user_file(gpu_name: str) -> Path:
    """Return the file of this user's verdicts on ``gpu_name``."""
    return flags.cache_folder() / "proofs" / f"{file_stem(gpu_name)}.json"


def read(path: Path, gpu_name: str, versions: Mapping[str, str]) -> Proofs:
    """Return the verdicts in ``path``; none if the file is missing, cannot be read, or is of other versions."""
    empty = Proofs(gpu_name, dict(versions))
    try:
        content = safe_files.json_value(safe_files.read_plain(path))
    except FileNotFoundError:
        return empty
    except (OSError, ValueError) as error:
        _log.warning("%s is ignored (%s: %s); the configs are proved again", path, type(error).__name__, error)
        return empty
    if not _is_sound(content):
        _log.warning("%s is ignored (no verdicts on configs); the configs are proved again", path)
        return empty
    if content["gpu"] != gpu_name or content["versions"] != empty.versions:
        _log.info("%s is of %s with %s; the configs are proved again", path, content["gpu"], content["versions"])
        return empty
    return Proofs(gpu_name, dict(versions), content["configs"])


def add(path: Path, new: Proofs) -> None:
    """Add the verdicts of ``new`` to those in ``path``; additions by other processes are kept.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with safe_files.locked(path):
        verdicts = read(path, new.gpu, new.versions).verdicts
        for launch, found in new.verdicts.items():
            verdicts[launch] = verdicts.get(launch, {}) | found
        content = {"gpu": new.gpu, "versions": new.versions, "configs": verdicts}
        safe_files.write_whole(path, (safe_files.json_text(content, indent=1) + "\n").encode())


def _is_sound(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and {"gpu", "versions", "configs"} <= content.keys()
        and isinstance(content["configs"], dict)
        and all(
            isinstance(found, dict) and all(isinstance(why, str) for why in found.values())
            for found in content["configs"].values()
        )
    )
