"""Store measured times by GPU: the table that ships with the package, and the user's own in the cache folder.

    resnet_fast/tuning/tables/<gpu>.json          written by ``make gpu-tune``, read-only for a user
    ~/.cache/resnet_fast/tuning/<gpu>.json        written by ``tune()``; RESNET_FAST_CACHE or XDG_CACHE_HOME move it

Several tuning runs may share a file: each adds its measurements to the file (:func:`add`).

A file has one entry per launch (the whole spec, as printed) with the time of every candidate in microseconds, so that a
diff reads like a report. A file for another GPU or another config space, or one that cannot be read, is ignored with a
warning and replaced by the next measurement. Torch-free.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import flags
from ..devices import file_stem
from ..io import safe_files
from ..spec import LaunchSpec
from .configs import SPACE, Config
from .proofs import Proofs

SHIPPED = Path(__file__).with_name("tables")


def user_file(gpu_name: str) -> Path:
    """Return the file of this user's measurements of ``gpu_name``."""
    folder = flags.cache_folder() / "tuning"
    return folder / f"{file_stem(gpu_name)}.json"


@dataclass
class Table:
    """What is known of one GPU: measured times, and which configs were proved there.

    Attributes:
        gpu: the GPU's name.
        entries: launch, as printed -> candidate, as printed -> microseconds (None: refused).
        versions: of the software that measured them, by name.
        proofs: verdicts on configs that need a proof. They have a file of their own, see proofs.py.
        reasons: why this process refused a candidate, by launch and candidate; never written to a file.
    """

    gpu: str
    entries: dict[str, dict[str, float | None]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    proofs: Proofs = field(default_factory=Proofs)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)

    def times(self, launch: LaunchSpec) -> dict[str, float | None]:
        """Return microseconds by candidate for ``launch``; empty if nothing was measured."""
        return self.entries.get(str(launch), {})

    def refusals(self, launch: LaunchSpec) -> tuple[str, ...]:
        """Return what this process refused for ``launch``, each with the reason."""
        return tuple(f"{config}: {reason}" for config, reason in self.reasons.get(str(launch), {}).items())

    def merged(self, other: Table) -> Table:
        """Return this table with the entries of ``other``, which replace this table's for the same launch."""
        return replace(self, entries=self.entries | other.entries, versions=self.versions | other.versions)

    def with_times(self, other: Table) -> Table:
        """Return this table with the times of ``other`` added: for a common launch, the candidates of both."""
        entries = {name: self.entries.get(name, {}) | times for name, times in other.entries.items()}
        return replace(self, entries=self.entries | entries, versions=self.versions | other.versions)

    def save(self, path: Path) -> None:
        """Write the table atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "space": SPACE,
            "gpu": self.gpu,
            "unit": "microseconds",
            "versions": self.versions,
            "launches": {name: dict(sorted(times.items(), key=_refused_last)) for name, times in self.entries.items()},
        }
        safe_files.write_whole(path, (safe_files.json_text(content, indent=1) + "\n").encode())


def _refused_last(item: tuple[str, float | None]) -> float:
    return math.inf if item[1] is None else item[1]


def read(path: Path, gpu_name: str) -> Table:
    """Return the table in ``path``; an empty one if the file is missing, or with a warning if it cannot be used."""
    try:
        content = json.loads(safe_files.read_plain(path).decode())
        problem = _problem(content, gpu_name)
    except FileNotFoundError:
        return Table(gpu_name)
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(f"{path} is ignored ({problem}); the next tuning run replaces it", RuntimeWarning, stacklevel=2)
        return Table(gpu_name)
    return Table(gpu_name, content["launches"], content.get("versions", {}))


def add(path: Path, new: Table) -> Table:
    """Add the times of ``new`` to the table in ``path`` and return the sum; additions by other processes are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with safe_files.locked(path):
        both = read(path, new.gpu).with_times(new)
        both.save(path)
    return both


def is_table(content: bytes) -> bool:
    """Return whether a file's bytes are a tuning table, of any GPU and version."""
    try:
        return _is_table(safe_files.json_value(content))
    except ValueError:
        return False


def _is_table(content: Any) -> bool:
    return isinstance(content, dict) and {"space", "gpu", "launches"} <= content.keys()


def check_target(path: Path, gpu_name: str) -> None:
    """Check that ``path`` may be written.

    Raises:
        UserError: ``path`` exists and is not a tuning table of this GPU, or cannot be written.
    """

    def ours(content: bytes) -> bool:
        return is_table(content) and safe_files.json_value(content)["gpu"] == gpu_name

    todo = "name another file with --table, or leave it out"
    safe_files.check_target(path, f"a tuning table of {gpu_name}", ours, todo=todo, make_folder=True)


def _problem(content: Any, gpu_name: str) -> str:
    if not _is_table(content):
        return "not a tuning table"
    if content["space"] != SPACE:
        return f"expected config space {SPACE}, got {content['space']!r}"
    if content["gpu"] != gpu_name:
        return f"expected measurements of {gpu_name}, got {content['gpu']!r}"
    launches = content["launches"]
    sound = isinstance(launches, dict) and all(
        isinstance(times, dict) and all(t is None or _is_time(t) for t in times.values()) for times in launches.values()
    )
    if not sound:
        return "launches are not candidate -> microseconds"
    return "" if isinstance(content.get("versions", {}), dict) else "versions are not name -> version"


def _is_time(t: Any) -> bool:
    return isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t < math.inf


def load(gpu_name: str) -> Table:
    """Return the table of a GPU: the shipped one, with the user's own measurements in place of its entries.

    What this process refused (:func:`refuse`) is refused in it.
    """
    table = read(SHIPPED / f"{file_stem(gpu_name)}.json", gpu_name).merged(read(user_file(gpu_name), gpu_name))
    reasons = _refused.get(gpu_name, {})
    refused: dict[str, dict[str, float | None]]
    refused = {launch: dict.fromkeys(configs) for launch, configs in reasons.items()}
    found = table.with_times(Table(gpu_name, refused))
    found.reasons = reasons
    return found


_refused: dict[str, dict[str, dict[str, str]]] = {}  # GPU -> launch -> config -> reason


def refuse(gpu_name: str, launch: LaunchSpec, config: Config, reason: str) -> None:
    """Refuse a config in this process, because its kernel could not be compiled.

    It goes to no file: another version of the compiler may manage, and finding out again costs one attempt.
    """
    _refused.setdefault(gpu_name, {}).setdefault(str(launch), {})[str(config)] = reason
