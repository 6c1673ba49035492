"""Captured training: equal to eager training bit for bit, and when a step is captured anew or dropped."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import resnet_fast
from resnet_fast.blocks import training_step
from tests.support.graph_cases import replays
from tests.support.nets import assert_equal
from tests.support.processes import in_threads
from tests.support.train_nets import cifar, fewest_programs, imagenet, images, twin, whole
from tests.support.training_graph_cases import TapeRecorder, batch, loss_of, pair, small, train


def frozen() -> nn.Module:
    """Freeze the stem and the first stage, whose norms use the statistics that they have."""
    model = small()
    for part in (model.conv1, model.bn1, model.layer1):
        part.eval().requires_grad_(False)
    return model


def with_unused_layer() -> nn.Module:
    model = small()
    model.layer3[0].extra = nn.Linear(2, 2)
    return model


def with_shared_parameter() -> nn.Module:
    model = small()
    model.layer1[0].bn2.weight = model.layer1[0].bn1.weight
    return model


NETS: dict[str, Callable[[], nn.Module]] = {
    "cifar": small,
    "dropout": lambda: small(dropout=0.3),
    "bottleneck": lambda: imagenet(Bottleneck),
    "frozen": frozen,
    "unused layer": with_unused_layer,
    "shared parameter": with_shared_parameter,
}


@pytest.mark.parametrize("kind", NETS)
def test_steps_equal_eager_steps(kind: str, tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(NETS[kind]())
    assert_equal(train(replayed), train(plain))
    assert replays() == 3 and len(tapes.captures) == 2


@pytest.mark.parametrize("how", [{"parts": 3}, {"amp": True}, {"input_grad": True}], ids=str)
def test_accumulation_autocast_and_input_gradients_equal_eager(how: Any, tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small(dropout=0.2))
    assert_equal(train(replayed, **how), train(plain, **how))
    assert replays() == 3 * how.get("parts", 1) and len(tapes.captures) == 2


def test_the_first_call_counts_one_batch_and_draws_once(tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small(dropout=0.5))
    states = []
    for model in (plain, replayed):
        torch.manual_seed(2)
        model(batch(4))
        states.append([*model.state_dict().values(), torch.get_rng_state()])
    assert_equal(*states)
    assert replayed.bn1.num_batches_tracked == 1 and replays() == 1


def test_parts_with_a_momentum_each_are_captured_once_each(tapes: type[TapeRecorder]) -> None:
    """The trainer sets another momentum for each part of a batch."""
    plain, replayed = pair(small())
    for _ in range(3):
        x = batch(4)
        for momentum in (0.1, 0.2, 0.3):
            for model in (plain, replayed):
                for m in model.modules():
                    if isinstance(m, nn.BatchNorm2d):
                        m.momentum = momentum
                loss_of(model(x)).backward()
    assert_equal(dict(replayed.state_dict()), dict(plain.state_dict()))
    assert len(tapes.captures) == 6 and replays() == 9


def test_gradients_are_handed_over(tapes: type[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd keeps a gradient in the parameter's layout as it is; otherwise it would copy all of them again."""
    _, model = pair(small().to(memory_format=torch.channels_last))
    made: list[int] = []
    backward = training_step.Step.backward

    def watched(self: Any, dy: Tensor) -> list[Tensor]:
        grads = backward(self, dy)
        made.extend(g.data_ptr() for g in grads)
        return grads

    monkeypatch.setattr(training_step.Step, "backward", watched)
    loss_of(model(batch(4))).backward()
    assert [p.grad.data_ptr() for p in model.parameters()] == made


def test_gradients_are_the_users_own(tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small())
    kept = []
    for model in (replayed, plain):
        torch.manual_seed(3)
        loss_of(model(batch(4))).backward()
        first = [p.grad for p in model.parameters()]
        before = [g.clone() for g in first]
        for p in model.parameters():
            p.grad = None
        loss_of(model(batch(4))).backward()
        assert_equal(first, before)  # the second step wrote elsewhere
        loss_of(model(batch(4))).backward()  # adds to .grad in place
        kept.append([p.grad for p in model.parameters()])
    assert_equal(*kept)
    storages = {p.grad.untyped_storage().data_ptr() for p in replayed.parameters()}
    assert len(storages) == len(list(replayed.parameters()))


def test_a_gradient_scaler_sees_the_gradients(tapes: type[TapeRecorder]) -> None:
    weights = []
    for model in pair(small()):
        torch.manual_seed(4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # the first step overflows
        for _ in range(3):
            scaler.scale(loss_of(model(batch(4)))).backward()
            scaler.step(optimizer)
            scaler.update(2.0**10)
            optimizer.zero_grad(set_to_none=False)
        weights.append(dict(model.state_dict()))
    assert_equal(*weights)
    assert replays() == 3


def test_hooks_of_parameters_and_of_the_net_run_once_per_call(tapes: type[TapeRecorder]) -> None:
    grads = []
    for model in pair(small()):
        calls: list[str] = []
        model.fc.weight.register_hook(lambda g, calls=calls: (calls.append("grad"), 2 * g)[1])
        model.conv1.weight.register_post_accumulate_grad_hook(lambda p, calls=calls: calls.append("accumulated"))
        model.register_forward_hook(lambda m, x, y, calls=calls: (calls.append("forward"), y + 1)[1])
        torch.manual_seed(5)
        for _ in range(2):
            loss_of(model(batch(4))).backward()
        assert sorted(calls) == ["accumulated", "accumulated", "forward", "forward", "grad", "grad"]
        grads.append([p.grad for p in model.parameters()])
    assert_equal(*grads)
    assert replays() == 2


def test_statistics_count_as_written(tapes: type[TapeRecorder]) -> None:
    """What inference derived from them is stale after a replay."""
    _, model = pair(small())
    loss_of(model(batch(4))).backward()
    counter = model.bn1.num_batches_tracked
    version = counter._version
    loss_of(model(batch(4))).backward()
    assert counter._version > version


def test_an_output_that_is_dropped_waits_no_longer(tapes: type[TapeRecorder]) -> None:
    _, model = pair(small())
    for _ in range(3):
        y = model(batch(4))
        del y
    assert replays() == 3


def test_shapes_share_memory(tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small())
    for n in (4, 2, 4, 3, 2):
        x = batch(n)
        for model in (plain, replayed):
            loss_of(model(x)).backward()
    assert_equal([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
    assert len(tapes.captures) == 6 and len(set(tapes.captures)) == 1 and replays() == 5


def move(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def load_assigned(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def replace_classifier(model: nn.Module) -> None:
    model.fc = nn.Linear(64, 10)


def dilate(model: nn.Module) -> None:
    model.layer1[0].conv2.dilation = model.layer1[0].conv2.padding = (2, 2)


def change_eps(model: nn.Module) -> None:
    model.bn1.eps = 0.1


def hold_statistics(model: nn.Module) -> None:
    model.layer2.eval()


def freeze(model: nn.Module) -> None:
    model.layer1.requires_grad_(False)


CAPTURED_ANEW = [move, load_assigned, replace_classifier, dilate, change_eps, hold_statistics, freeze]


@pytest.mark.parametrize("edit", CAPTURED_ANEW)
def test_a_changed_net_is_captured_anew(edit: Callable[[nn.Module], None], tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small())
    x = batch(4)
    for model in (plain, replayed):
        loss_of(model(x)).backward()
        torch.manual_seed(7)
        edit(model)
        model.zero_grad()
        loss_of(model(x)).backward()
    assert_equal([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
    assert len(tapes.captures) == 4 and replays() == 2


def step_of_sgd(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), 0.1).step()


def load(model: nn.Module) -> None:
    model.load_state_dict(small().state_dict())


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model.eval()(batch(4))
    model.train()


def recalibrate(model: nn.Module) -> None:
    with torch.no_grad():
        model(batch(4))


@pytest.mark.parametrize("edit", [step_of_sgd, load, evaluate, recalibrate])
def test_new_values_are_read_where_they_are(edit: Callable[[nn.Module], None], tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small())
    x = batch(4)
    captures = []
    for model in (plain, replayed):
        loss_of(model(x)).backward()
        torch.manual_seed(8)
        edit(model)
        captures.append(len(tapes.captures))
        model.zero_grad()
        loss_of(model(x)).backward()
    assert_equal([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
    assert captures[1] == len(tapes.captures)


def test_frozen_weights_that_were_packed_make_a_new_capture(tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(frozen())
    x = batch(4)
    for model in (plain, replayed):
        loss_of(model(x)).backward()
        with torch.no_grad():
            model.layer1[0].conv1.weight.mul_(0.5)
        model.zero_grad()
        loss_of(model(x)).backward()
    torch.testing.assert_close(replayed.fc.weight.grad, plain.fc.weight.grad)
    assert len(tapes.captures) == 4


def test_autocast_switches_and_backend_have_steps_of_their_own(
    tapes: type[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = pair(small())
    for _ in range(2):
        loss_of(model(batch(4))).backward()
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(model(batch(4))).backward()
        with resnet_fast.use_backend("reference"):
            loss_of(model(batch(4))).backward()
        with monkeypatch.context() as patched:
            patched.setattr(torch.backends.cudnn, "deterministic", True)
            loss_of(model(batch(4))).backward()
    assert len(tapes.captures) == 8 and replays() == 8


def test_thawing_comes_back_to_the_earlier_step(tapes: type[TapeRecorder]) -> None:
    """A discriminator is frozen in every other step."""
    _, model = pair(small())
    for _ in range(3):
        loss_of(model.requires_grad_(True)(batch(4))).backward()
        x = batch(4).requires_grad_()
        loss_of(model.requires_grad_(False)(x)).backward()
        assert x.grad is not None
    assert len(tapes.captures) == 4 and replays() == 6


def test_a_loss_may_wait_for_the_gpu(tapes: type[TapeRecorder]) -> None:
    _, model = pair(small())
    for _ in range(2):
        loss = loss_of(model(batch(4)))
        assert loss.item() > 0
        loss.backward()
    assert replays() == 2


def test_the_backward_pass_may_run_in_another_thread(tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small())
    x = batch(4)
    for model in (plain, replayed):
        for _ in range(2):
            loss = loss_of(model(x))
            in_threads(loss.backward)
    assert_equal([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
    assert replays() == 2


def test_threads_train_one_net(tapes: type[TapeRecorder]) -> None:
    """Whoever comes while a forward pass waits for its backward pass runs eagerly; no gradient is lost."""
    plain, replayed = pair(small())
    for m in (*plain.modules(), *replayed.modules()):
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    xs = [batch(4) for _ in range(8)]
    for x in xs:
        loss_of(plain(x)).backward()
    grads: list[list[Tensor]] = []

    def work(start: int) -> None:
        for x in xs[start::2]:
            grads.append(list(torch.autograd.grad(loss_of(replayed(x)), list(replayed.parameters()))))

    in_threads(lambda: work(0), lambda: work(1))
    for p, each in zip(plain.parameters(), zip(*grads, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(each).sum(0), p.grad, rtol=1e-4, atol=1e-5)


def test_steps_die_with_the_net(tapes: type[TapeRecorder]) -> None:
    gc.collect()
    tapes.drained = 0
    _, model = pair(small())
    loss_of(model(batch(4))).backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and tapes.drained == 1


@pytest.mark.parametrize("drop", [resnet_fast.clear_derived, None])
def test_dropped_steps_finish_their_backward_pass(drop: Any, tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small())
    gc.collect()
    tapes.drained = 0
    x = batch(4)
    loss_of(plain(x)).backward()
    loss = loss_of(replayed(x))
    if drop is None:
        resnet_fast.accelerate(replayed)
    else:
        drop()
    gc.collect()
    assert tapes.drained == 0
    loss.backward()
    assert_equal([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
    del loss
    gc.collect()
    assert tapes.drained == 1
    loss_of(replayed(x)).backward()
    assert len(tapes.captures) == (2 if drop is None else 4)


def test_an_evaluation_between_steps_keeps_them(tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small())
    for _ in range(3):
        x = batch(4)
        for model in (plain, replayed):
            loss_of(model.train()(x)).backward()
        with torch.no_grad():
            want, got = plain.eval()(x), replayed.eval()(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert_equal([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
    assert len(tapes.captures) == 2 + 3 and replays() == 6  # training changes what inference reads


def test_ddp_exchanges_the_gradients(tapes: type[TapeRecorder], tmp_path: Any) -> None:
    import torch.distributed as dist

    plain, replayed = pair(with_unused_layer())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for unused in (False, True):
            results = []
            for model in (plain, replayed):
                model.layer3[0].extra.requires_grad_(unused)
                spread = nn.parallel.DistributedDataParallel(
                    model, gradient_as_bucket_view=True, find_unused_parameters=unused
                )
                torch.manual_seed(11)
                with spread.no_sync():
                    loss_of(spread(batch(4))).backward()
                loss_of(spread(batch(4))).backward()
                results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
                model.zero_grad()
            assert_equal(*results)
    finally:
        dist.destroy_process_group()
    assert replays() == 4


@pytest.mark.interpret
@pytest.mark.slow
def test_our_training_kernels_are_captured(tapes: type[TapeRecorder]) -> None:
    model = cifar()
    with fewest_programs(whole):
        x, labels = images(n=4)
        plain, replayed = twin(model), resnet_fast.accelerate(copy.deepcopy(model), "triton", cuda_graph=True)
        for each in (plain, replayed):
            for _ in range(2):
                F.cross_entropy(each(x), labels).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(replayed.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-5)
    for name, b in plain.named_buffers():
        torch.testing.assert_close(replayed.get_buffer(name), b)
    assert replays() == 2 and resnet_fast.stats()["calls"]["basic_block/triton"] > 0
