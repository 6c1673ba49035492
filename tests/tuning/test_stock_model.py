"""PyTorch's own kernels compete without a measurement, by what whole nets reached on an H100."""

from __future__ import annotations

import pytest

from resnet_fast import devices
from resnet_fast.roofline import prediction
from resnet_fast.spec import ConvSpec, LaunchSpec
from resnet_fast.tuning import heuristic, launch_plan, shapes, stock_model
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.proofs import Proofs
from resnet_fast.tuning.routes import launch
from resnet_fast.tuning.tables import Table

H100 = devices.gpu("h100")
FUSED = Config("cudnn_fused")


def conv(name: str, batch: int, dtype: str = "bfloat16") -> ConvSpec:
    return shapes.problems("resnet50", batch, dtype=dtype)[f"r50.{name}"]


def table(proved: LaunchSpec | None = None) -> Table:
    known = Proofs()
    if proved is not None:
        known.record(proved, FUSED, "")
    return Table(H100.name, proofs=known)


def test_the_constants_are_the_fit_of_the_measured_nets() -> None:
    fit = prediction.calibration()
    assert pytest.approx(fit.fused, rel=0.01) == stock_model.REACHED
    assert pytest.approx(fit.launch_s, rel=0.01) == stock_model.LAUNCH_S


def test_the_launches_of_the_measured_net_add_up_to_its_time() -> None:
    """The stem, the projections, the pooling and the final layer are not among them: 10 to 30 % of the net."""
    for batch, rate in prediction.MEASURED[0].images_per_s:
        found = shapes.problems("resnet50", batch, dtype="bfloat16").values()
        picks = [stock_model.fastest(launch(c), H100) for c in found]
        fused = sum(pick[1] for pick in picks if pick)
        assert 0.7 * batch / rate < fused < batch / rate


def test_only_what_has_a_relu_has_a_fused_kernel() -> None:
    assert stock_model.fastest(launch(conv("layer1.1.conv3", 256)), H100)
    assert stock_model.fastest(launch(conv("layer1.0.downsample.0", 256)), H100) is None


@pytest.mark.parametrize("change", [{"groups": 32}, {"ci": 3, "r": 7, "s": 7}, {"dtype": "float32"}])
def test_nothing_is_known_of_other_kinds_of_launches(change: dict) -> None:
    """Groups, a stem, and float32 without TF32 were not in the measured net."""
    one = launch(conv("layer3.1.conv2", 32).with_(**change))
    assert stock_model.fastest(one, H100) is None


def test_pytorchs_kernel_runs_where_the_model_sees_it_clearly_faster_and_it_is_proved() -> None:
    spec = conv("layer1.1.conv2", 256)  # ours reads each tap from L2: modelled at twice PyTorch's time
    one = launch(spec)
    ours, stock = heuristic.rank(one, H100)[0], stock_model.fastest(one, H100)
    assert stock and ours[1] > stock[1] * stock_model.MARGIN
    assert not launch_plan.plan_launches(spec, H100, table()).configs[0].stock  # not proved
    assert launch_plan.plan_launches(spec, H100, table(), hopeful=True).configs == (FUSED,)
    proved = launch_plan.plan_launches(spec, H100, table(one))
    assert proved.configs == (FUSED,) and proved.seconds == stock[1] and not proved.measured


def test_a_small_advantage_is_none() -> None:
    """Within the margin ours runs: neither time was measured."""
    taken, close = 0, 0
    for spec in dict.fromkeys(shapes.problems("resnet50", 256, dtype="bfloat16").values()):
        one = launch(spec)
        stock, ours = stock_model.fastest(one, H100), heuristic.select(one, H100)
        if stock is None or ours is None:
            continue
        chosen = launch_plan.fastest_modelled(one, H100, table(one))
        wins = stock[1] * stock_model.MARGIN < ours[1]
        assert chosen == (stock if wins else ours)
        taken += wins
        close += not wins and stock[1] < ours[1]
    assert taken and close


def test_where_all_of_ours_are_refused_pytorchs_runs() -> None:
    spec = conv("layer3.1.conv2", 32)
    one = launch(spec)
    known = table(one)
    known.entries[str(one)] = {str(c): None for c, _ in heuristic.rank(one, H100)}
    assert launch_plan.plan_launches(spec, H100, known).configs == (FUSED,)
