"""Pictures name the program that drew them, so that a later run replaces only its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from resnet_fast.errors import UserError
from resnet_fast.io import plots


@pytest.mark.parametrize("kind", list(plots.KINDS))
def test_an_own_picture_is_known_and_another_is_not(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure, ((axis,),) = plots.figure(1, 1, (2, 2))
    axis.plot([1, 2], [3, 4])
    path = tmp_path / f"picture{kind}"
    path.write_bytes(plots.encode(figure, kind))
    assert plots.is_ours(path.read_bytes())
    plots.check_target(path, "name another")
    figure.savefig(path)  # as anybody draws it
    before = path.read_bytes()
    with pytest.raises(UserError, match="there already, and not a picture file of this program"):
        plots.check_target(path, "name another")
    assert path.read_bytes() == before


def test_other_files_are_no_target(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("a text about resnet_fast")
    Image.new("RGB", (4, 4)).save(tmp_path / "y.png")
    for name in ("x.png", "y.png", "x.gif", "x"):
        with pytest.raises(UserError, match="picture file"):
            plots.check_target(tmp_path / name, "name another")
    plots.check_target(tmp_path / "new.PNG", "name another")


def test_limits_leave_room() -> None:
    low, high = plots.limits([3.0, 1.0, 2.0])
    assert low < 1 and high > 3
