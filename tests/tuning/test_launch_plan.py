"""Measured times decide where they exist; the model decides the rest, and never takes what tuning refused."""

from __future__ import annotations

import pytest

from resnet_fast import devices
from resnet_fast.errors import BackendError
from resnet_fast.spec import BlockSpec, ConvSpec, LaunchSpec
from resnet_fast.tuning import configs, heuristic, launch_plan, launches, proofs, shapes, training_configs
from resnet_fast.tuning import routes as routes_module
from resnet_fast.tuning.launch_plan import FoldedConfigs
from resnet_fast.tuning.routes import LaunchRoute, folded_routes, launch, routes
from resnet_fast.tuning.tables import Table
from resnet_fast.tuning.training_configs import admitted, training_launches

H100 = devices.gpu("h100")
PROBLEMS = shapes.problems("resnet50", 32, dtype="bfloat16")
BLOCKS = shapes.blocks("resnet50", 32, dtype="bfloat16")
CONV = PROBLEMS["r50.layer3.1.conv2"]
BLOCK = BLOCKS["r50.layer2.0"]  # a projection: routes conv, proj and tail
ROUTES = {route.fusion: route for route in routes(BLOCK)}


def names(one: LaunchSpec) -> list[str]:
    assert H100.gpu is not None
    return [str(c) for c in (*configs.candidates(one, H100.gpu), *configs.stock_candidates(one))]


def table(*entries: tuple[LaunchSpec, dict[str, float | None]]) -> Table:
    """Return a table as a tuning run leaves it: what has a time was proved too."""
    found = Table(H100.name, {str(one): times for one, times in entries})
    for one, times in entries:
        found.proofs.verdicts[str(proofs.small(one))] = {name: "" for name, us in times.items() if us is not None}
    return found


def throughout(route: LaunchRoute, us: float) -> list[tuple[LaunchSpec, dict[str, float | None]]]:
    """Return a measured time for every launch of ``route`` on one candidate of ours."""
    return [(one, {names(one)[0]: us}) for one in route.launches]


def choose(spec: ConvSpec | BlockSpec, *entries: tuple[LaunchSpec, dict[str, float | None]]) -> launch_plan.LaunchPlan:
    return launch_plan.plan_launches(spec, H100, table(*entries))


def test_without_measurements_the_model_decides() -> None:
    chosen = choose(CONV)
    assert not chosen.measured
    assert (chosen.configs[0], chosen.seconds) == heuristic.select(launch(CONV), H100)


def test_a_measured_time_beats_a_modelled_one() -> None:
    """A measured time counts however slow it is."""
    one = launch(CONV)
    picked = str(choose(CONV).configs[0])
    slow, slower = (name for name in names(one)[:3] if name != picked)
    chosen = choose(CONV, (one, {slower: 9e5, slow: 8e5}))
    assert chosen.measured and chosen.seconds == pytest.approx(0.8)
    assert str(chosen.configs[0]) == slow


@pytest.mark.parametrize("stock", configs.STOCK)
def test_stock_wins_where_the_table_says_so(stock: str) -> None:
    one = launch(CONV)
    chosen = choose(CONV, (one, {names(one)[0]: 50.0, stock: 49.0}))
    assert chosen.configs[0].kernel == stock and chosen.configs[0].stock
    assert choose(CONV, (one, {names(one)[0]: 48.0, stock: 49.0})).configs[0].kernel == one.kernel


def test_stock_is_never_chosen_unmeasured() -> None:
    for spec in (*PROBLEMS.values(), *BLOCKS.values()):
        assert not [c for c in choose(spec).configs if c.stock]


def test_routes_are_compared_by_the_sum_of_their_launches() -> None:
    assert set(ROUTES) == {"conv", "proj", "tail"}
    conv, proj, tail = (ROUTES[plan] for plan in ("conv", "proj", "tail"))
    assert (len(conv.launches), len(proj.launches), len(tail.launches)) == (4, 3, 2)
    # conv1 is a launch of all three; the last entry of a launch wins, so give it one time throughout
    shared = conv.launches[1]
    assert shared == proj.launches[0] == tail.launches[0]

    def best(conv_us: float, proj_us: float, tail_us: float) -> launch_plan.LaunchPlan:
        entries = [
            *throughout(conv, conv_us),
            (proj.launches[-1], {names(proj.launches[-1])[0]: proj_us}),
            (tail.launches[-1], {names(tail.launches[-1])[0]: tail_us}),
        ]
        return choose(BLOCK, *entries)

    assert best(10, 100, 100).route.fusion == "conv"
    assert best(10, 19, 31).route.fusion == "proj"  # 10 + 10 + 19 < 4 * 10
    assert best(10, 21, 29).route.fusion == "tail"  # 10 + 29 < 10 + 10 + 21
    chosen = best(10, 21, 29)
    assert chosen.seconds == pytest.approx(39e-6) and len(chosen.configs) == 2 and chosen.measured


def test_an_unmeasured_launch_excludes_its_route_where_another_is_measured_throughout() -> None:
    slow = throughout(ROUTES["conv"], 1e5)
    chosen = choose(BLOCK, *slow)
    assert chosen.route.fusion == "conv" and chosen.measured
    chosen = choose(BLOCK, *slow, *throughout(ROUTES["proj"], 1e4))
    assert chosen.route.fusion == "proj"


def test_with_no_route_measured_throughout_known_and_modelled_times_add_up() -> None:
    one = ROUTES["conv"].launches[1]  # in all three
    chosen = choose(BLOCK, (one, {names(one)[0]: 123.0}))
    assert not chosen.measured
    rest = [heuristic.select(other, H100) for other in chosen.route.launches if other != one]
    assert chosen.seconds == pytest.approx(123e-6 + sum(pick[1] for pick in rest if pick))
    assert names(one)[0] in map(str, chosen.configs)


def test_a_refused_candidate_is_not_chosen_by_the_model() -> None:
    one = launch(CONV)
    ranked = heuristic.rank(one, H100)
    free = [pick for pick in ranked if not configs.needs_proof(one, pick[0])]
    chosen = choose(CONV, (one, {str(free[0][0]): None}))
    assert (chosen.configs[0], chosen.seconds) == free[1] and not chosen.measured


def test_a_launch_with_nothing_left_excludes_its_route() -> None:
    assert choose(BLOCK).route.fusion != "conv"
    refused = [
        (route.launches[-1], dict.fromkeys(names(route.launches[-1]))) for route in (ROUTES["proj"], ROUTES["tail"])
    ]
    assert choose(BLOCK, *refused).route.fusion == "conv"


def test_nothing_left_at_all_is_an_error_that_says_what_to_do() -> None:
    one = launch(CONV)
    with pytest.raises(
        BackendError,
        match=r"no kernel for N32 14x14 .* passed its check on NVIDIA H100 SXM; .* delete .*nvidia-h100-sxm.json",
    ) as caught:
        choose(CONV, (one, dict.fromkeys(names(one))))
    assert "\n" not in str(caught.value)


def test_names_that_are_no_candidates_are_ignored() -> None:
    """A config that is no longer shipped has such a name."""
    chosen = choose(CONV, (launch(CONV), {"1x1x1 w1 s1": 0.001}))
    assert not chosen.measured and chosen == choose(CONV)


def test_the_key_is_the_whole_launch() -> None:
    one = launch(CONV)
    entry = (one, {names(one)[0]: 1.0})
    assert choose(CONV, entry).measured
    for change in ({"n": 31}, {"dtype": "float16"}, {"layout": "nchw"}, {"h": 15}, {"dilation": (2, 2)}):
        assert not choose(CONV.with_(**change), entry).measured, change


def test_an_unpooled_stem_pays_for_its_pooling() -> None:
    stem = PROBLEMS["r50.conv1"]
    apart, fused = routes(stem)
    assert (apart.fusion, fused.fusion) == ("conv", "stem")
    same = [*throughout(apart, 100.0), *throughout(fused, 100.0)]
    assert choose(stem, *same).route.fusion == "stem"
    only = choose(stem, *throughout(apart, 100.0))
    elements = 32 * 64 * (112 * 112 + 56 * 56)
    assert only.seconds == pytest.approx(100e-6 + 2 * elements / H100.bandwidth.value, rel=0.1)


def test_stock_time_of_a_block_is_the_sum_of_its_convolutions() -> None:
    entries = [(one, {"cudnn": 20.0, "cudnn_fused": 10.0, names(one)[0]: 1.0}) for one in ROUTES["conv"].launches]
    assert launch_plan.stock_seconds(BLOCK, H100, table(*entries)) == pytest.approx(40e-6)
    assert launch_plan.stock_seconds(BLOCK, H100, table(*entries[1:])) is None
    assert launch_plan.stock_seconds(BLOCK, H100, table(*throughout(ROUTES["conv"], 1.0))) is None


def test_stock_time_of_a_stem_has_the_pooling_in_it() -> None:
    stem = PROBLEMS["r50.conv1"]
    apart, fused = routes(stem)
    assert launch_plan.stock_seconds(stem, H100, table((fused.launches[0], {"cudnn": 70.0}))) == pytest.approx(70e-6)
    without = launch_plan.stock_seconds(stem, H100, table((apart.launches[0], {"cudnn": 70.0})))
    assert without is not None and without > 71e-6


def test_str_lists_the_kernels() -> None:
    text = str(choose(BLOCK, *throughout(ROUTES["tail"], 10.0)))
    kernels = [f"{one.kernel} {names(one)[0]}" for one in ROUTES["tail"].launches]
    assert text == f"tail: {kernels[0]} | {kernels[1]} (20.0 us measured)"
    assert str(choose(CONV)).endswith(" us modelled)") and "\n" not in str(choose(CONV))


def test_an_invariant_problem_has_one_plan_for_every_batch() -> None:
    """Its configs split no K steps and are none of PyTorch's, and only its launches follow the batch."""
    for problem in [PROBLEMS["r50.conv1"], *BLOCKS.values()]:
        plans = [
            launch_plan.plan_launches(problem.with_(n=n, invariant=True), H100, Table(H100.name), hopeful=True)
            for n in (1, 2, 33, 512)
        ]
        assert len({(plan.route.fusion, plan.configs) for plan in plans}) == 1
        assert not any(c.splits > 1 or c.stock for c in plans[0].configs)
        assert [one.n for plan in plans for one in plan.route.launches[:1]] == [1, 2, 33, 512]
        images = routes_module.planned(problem.with_(invariant=True)).n
        assert plans[0].seconds == plans[-1].seconds and f"at batch {images}, configs of any batch" in str(plans[0])
    plain = [choose(BLOCK.with_(n=n)).configs for n in (1, 512)]
    assert plain[0] != plain[1]  # what the mode changes


def test_an_invariant_problem_uses_what_was_measured_and_proved_for_any_batch() -> None:
    problem = CONV.with_(n=1, invariant=True)
    (one,) = {proofs.small(launch(problem.with_(n=n))) for n in (1, 2, 64)}
    assert one.n == proofs.BATCH
    (measured,) = launches.launches_of(problem, H100)
    assert measured.n == routes_module.planned(problem).n == 48
    name = names(measured)[-1]
    entry = measured, {name: 3.0}
    for n in (1, 64):
        plan = choose(problem.with_(n=n), entry)
        assert plan.measured and str(plan.configs[0]) == name
    assert not choose(CONV, entry).measured  # without the mode other configs compete


FROZEN = BLOCK.with_(grad=True)
FORWARD, BACKWARD = folded_routes(FROZEN)[0].launches, training_launches(FROZEN)


def folded(*entries: tuple[LaunchSpec, dict[str, float | None]]) -> FoldedConfigs:
    return launch_plan.plan_folded(FROZEN, H100, table(*entries), hopeful=True)


def test_a_frozen_step_takes_pytorchs_kernel_where_it_was_measured_faster() -> None:
    """Per launch, forward and backward, and the plan says which and why."""
    entries = []
    for i, one in enumerate((*FORWARD, *BACKWARD)):
        ours = str(launches.candidates(one, H100)[0])
        entries.append((one, {ours: 20.0, "cudnn": 10.0 + 20.0 * (i % 2), "cudnn_fused": 30.0}))
    plan = folded(*entries)
    assert plan.route.fusion == "conv"
    for i, (one, config) in enumerate(plan.chosen(FROZEN)):
        assert config.stock == (i % 2 == 0)
        assert (f"cudnn runs {one}: 10.0 us measured, ours 20.0" in str(plan)) == config.stock
    assert len(plan.stock) == len(entries) // 2


def test_a_frozen_step_without_measurements_is_ours() -> None:
    """Also where the model of PyTorch's kernels would say otherwise: they break the native submission of a pass."""
    few = FROZEN.with_(n=8)
    inference = launch_plan.plan_launches(few.with_(grad=False), H100, Table(H100.name), hopeful=True)
    assert any(c.stock for c in inference.configs)
    plan = launch_plan.plan_folded(few, H100, Table(H100.name), hopeful=True)
    assert not any(config.stock for _, config in plan.chosen(few)) and not plan.stock


def test_a_frozen_step_with_nothing_of_ours_left_runs_on_pytorchs_kernels() -> None:
    assert H100.gpu is not None
    joined = folded_routes(FROZEN)[-1].launches[-1]
    refused = [(one, {str(c): None for c in configs.candidates(one, H100.gpu)}) for one in (*FORWARD, joined)]
    refused += [(one, {str(c): None for c in admitted(one, H100.gpu, packed=False)}) for one in BACKWARD]
    plan = folded(*refused)
    assert all(config == training_configs.CUDNN for _, config in plan.chosen(FROZEN))
    assert "no config of ours is left" in str(plan)


def test_tuning_measures_pytorchs_kernels_for_a_frozen_step() -> None:
    for one in launches.launches_of(FROZEN, H100):
        stock = [c for c in launches.candidates(one, H100) if c.stock]
        assert bool(stock) == (one.projection is None), one


def test_an_invariant_problem_is_planned_for_a_batch_that_follows_its_images() -> None:
    """Large images for few, small ones for many, whatever the batch."""
    names = "r50.layer1.1", "r50.layer2.1", "r50.layer3.1", "r50.layer4.1"
    for n in (1, 512):
        found = [routes_module.planned(BLOCKS[name].with_(n=n, invariant=True)).n for name in names]
        assert found == [8, 21, 48, 48]
        assert routes_module.planned(BLOCKS["r50.layer1.1"].with_(n=n)).n == n
