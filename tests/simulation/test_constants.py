"""The constants of the cycle model: each has its origin, and a file that lacks one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnet_fast.errors import UserError
from resnet_fast.simulation.constants import FOLDER, NAMES, OF_MACHINE, constants, known, read

pytest.importorskip("resnet_fast._sm", reason="built with RESNET_FAST_BUILD_HOST=1", exc_type=ImportError)


@pytest.mark.parametrize("gpu", known())
def test_every_constant_has_its_origin(gpu: str) -> None:
    found = constants(gpu)
    assert set(found) == NAMES
    from resnet_fast import _sm

    assert set(_sm.constants) == set(OF_MACHINE)


def test_the_file_of_a_gpu_with_a_missing_unknown_or_unsourced_constant_is_refused(tmp_path: Path) -> None:
    shared = json.loads((FOLDER / "hopper.json").read_text())
    own = json.loads((FOLDER / "h100.json").read_text())
    (tmp_path / "hopper.json").write_text(json.dumps(shared))

    def refused(change: dict, match: str, without: str = "") -> None:
        entries = {k: v for k, v in {**own["constants"], **change}.items() if k != without}
        path = tmp_path / "gpu.json"
        path.write_text(json.dumps({**own, "constants": entries}))
        with pytest.raises(UserError, match=match):
            read(path)

    refused({}, "none called l2_bytes", without="l2_bytes")
    refused({"l3_bytes": own["constants"]["l2_bytes"]}, "got l3_bytes")
    refused({"l2_bytes": {"value": 1, "unit": "bytes", "source": "", "surety": "vendor"}}, "mend the entry")
    refused({"l2_bytes": {"value": 1, "unit": "bytes", "source": "x", "surety": "fitted"}}, "fitted_on")
    refused({"warps_per_sm": shared["constants"]["warps_per_sm"]}, "each constant once")
    with pytest.raises(UserError, match="use one of h100, h200"):
        constants("hopper")
