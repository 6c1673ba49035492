"""Derived tensors are kept while nothing changes, and computed again after every way to change a parameter."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from resnet_fast import clear_derived, parameter_cache
from tests.support.processes import LIMIT_S, in_threads


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    clear_derived()


class Net(nn.Module):
    def __init__(self, ci: int = 8, co: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(ci, co, 3, padding=1)
        self.bn = nn.BatchNorm2d(co)
        with torch.no_grad():
            self.bn.running_mean.normal_()
            self.bn.running_var.uniform_(0.5, 2)
        self.eval()

    def fused(self, x: Tensor) -> Tensor:
        c, b = self.conv, self.bn
        with torch.no_grad():
            return torch.ops.resnet_fast.conv_bn_act(
                x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups,
                b.weight, b.bias, b.running_mean, b.running_var, False, 0.1, b.eps, True, backend="onednn",
            )  # fmt: skip

    def stock(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.bn(self.conv(x)).relu()


def optimizer_step(net: Net) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    net.stock_loss = net.bn(net.conv(torch.randn(2, 8, 5, 5))).square().mean()
    net.stock_loss.backward()
    optimizer.step()


def running_statistics(net: Net) -> None:
    versions = [net.bn.running_mean._version, net.bn.running_var._version]
    net.train()
    with torch.no_grad():
        net.bn(net.conv(torch.randn(4, 8, 5, 5)) * 3 + 1)
    net.eval()
    assert versions == [net.bn.running_mean._version, net.bn.running_var._version], "the case this test is for"


def edit(name: str, change: Callable[[Tensor], object]) -> Callable[[Net], None]:
    def apply(net: Net) -> None:
        with torch.no_grad():
            change({**dict(net.named_parameters()), **dict(net.named_buffers())}[name])

    return apply


def new_data(net: Net) -> None:
    net.conv.weight.data = torch.randn_like(net.conv.weight)


def new_parameter(net: Net) -> None:
    net.conv.weight = nn.Parameter(torch.randn_like(net.conv.weight))


def fewer_outputs(net: Net) -> None:
    for owner, name in (
        (net.conv, "weight"),
        (net.conv, "bias"),
        (net.bn, "weight"),
        (net.bn, "bias"),
        (net.bn, "running_mean"),
        (net.bn, "running_var"),
    ):
        getattr(owner, name).data = getattr(owner, name).data[:4]


def transposed_filters(net: Net) -> None:
    address = net.conv.weight.data_ptr()
    net.conv.weight.data = net.conv.weight.data.transpose(2, 3)
    assert net.conv.weight.data_ptr() == address


def loaded(net: Net) -> None:
    net.load_state_dict(Net().state_dict())


def double_eps(net: Net) -> None:
    net.bn.eps = 0.5


def wider_stride(net: Net) -> None:
    net.conv.stride = (2, 2)


CHANGES: dict[str, Callable[[Net], None]] = {
    "optimizer": optimizer_step,
    "running_statistics": running_statistics,
    "in_place": edit("conv.weight", lambda t: t.mul_(2)),
    "in_place_bias": edit("conv.bias", lambda t: t.add_(1)),
    "in_place_gamma": edit("bn.weight", lambda t: t.mul_(2)),
    "data_all": edit("conv.weight", lambda t: t.data.mul_(2)),
    "data_first": edit("conv.weight", lambda t: t.data.view(-1)[:1].fill_(50)),
    "data_one_filter": edit("conv.weight", lambda t: t.data[1].fill_(50)),
    "data_one_input_channel": edit("conv.weight", lambda t: t.data[:, 5].mul_(2)),
    "data_all_but_one_filter": edit("conv.weight", lambda t: t.data[1:].mul_(2)),
    "data_two_filters_swapped": edit("conv.weight", lambda t: t.data.copy_(t.data[[1, 0, *range(2, 16)]])),
    "data_filters_flipped": edit("conv.weight", lambda t: t.data.copy_(t.data.flip(3))),
    "data_one_of_a_vector": edit("bn.bias", lambda t: t.data[7:8].fill_(50)),
    "data_of_the_variance": edit("bn.running_var", lambda t: t.data[3:4].fill_(50)),
    "numpy": edit("bn.running_mean", lambda t: t.numpy().__setitem__(5, 9.0)),
    "new_data": new_data,
    "new_parameter": new_parameter,
    "fewer_outputs": fewer_outputs,
    "transposed_filters": transposed_filters,
    "load_state_dict": loaded,
    "eps": double_eps,
    "stride": wider_stride,
    "no_bias": lambda net: net.conv.register_parameter("bias", None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    net, x = Net(), torch.randn(2, 8, 9, 7)
    before = net.fused(x)
    torch.testing.assert_close(before, net.stock(x), rtol=1e-4, atol=1e-5)
    CHANGES[name](net)
    after = net.fused(x)
    torch.testing.assert_close(after, net.stock(x), rtol=1e-4, atol=1e-5)
    assert after.shape != before.shape or not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_and_back(dtype: torch.dtype) -> None:
    net, x = Net(), torch.randn(2, 8, 9, 7)
    before = net.fused(x)
    net.to(dtype)
    torch.testing.assert_close(net.fused(x.to(dtype)).float(), before, rtol=0.05, atol=0.05)
    net.float()
    torch.testing.assert_close(net.fused(x), net.stock(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(512, 512, 3, 3), (512, 64, 1, 1), (64, 512, 1, 1), (64, 1, 3, 3), (130, 70)])
def test_a_write_to_any_one_filter_or_input_channel_is_seen_at_once(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    w = torch.randn(shape)
    w = w.contiguous(memory_format=layout) if w.dim() == 4 else w
    for dim in (0, 1):
        for i in {*range(0, shape[dim], 37), shape[dim] - 1}:
            counted((w,))
            w.data.select(dim, i).add_(1)
            assert counted((w,))[1], (dim, i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_write_to_any_one_element_is_seen_within_a_round(dtype: torch.dtype) -> None:
    tensors = (torch.randn(128, 96, 3, 3).to(dtype), torch.randn(7, 5, 3, 3).to(dtype), torch.randn(96).to(dtype))
    generator = torch.Generator().manual_seed(0)
    for t in tensors[:2]:
        for _ in range(8):
            counted(tensors)
            i = int(torch.randint(t.numel(), (), generator=generator))
            t.data.view(-1)[i] += 1
            seen = [counted(tensors)[1] for _ in range(parameter_cache.USES_PER_ROUND)]
            assert seen.count(True) == 1
            t.data.view(-1)[i], t.data.view(-1)[-1 - i] = t.data.view(-1)[-1 - i].clone(), t.data.view(-1)[i].clone()
            seen = [counted(tensors)[1] for _ in range(parameter_cache.USES_PER_ROUND)]
            assert seen.count(True) == 1, "two elements changed places"


def test_an_entry_dies_with_any_of_its_sources() -> None:
    w, b = torch.randn(4, 3, 3, 3), torch.randn(4)
    counted((w, b))
    del b
    gc.collect()
    assert not parameter_cache._cache


def counted(sources: tuple[Tensor | None, ...], key: object = 0, keep: int = 8) -> tuple[object, bool]:
    """Return the result of ``get``, and whether it was computed."""
    made: list[object] = []

    def make(kept: dict[object, object]) -> object:
        made.append(object())
        return made[-1]

    value = parameter_cache.get(sources, key, make, keep)
    return value, bool(made)


def entry_of(net: Net) -> parameter_cache.CacheEntry:
    (found,) = (e for e in parameter_cache._cache.values() if e.leads(net.conv.weight))
    return found


def test_a_hit_computes_nothing_and_returns_the_same_object() -> None:
    w, b = torch.randn(4, 3, 3, 3), torch.randn(4)
    first, made = counted((w, b, None))
    assert made and counted((w, b, None)) == (first, False)
    assert counted((w, None, b))[1]


def test_calls_that_begin_with_one_parameter_live_side_by_side() -> None:
    w, b, c = torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(4)
    first, second = counted((w, b))[0], counted((w, b, c))[0]
    assert counted((w, b)) == (first, False) and counted((w, b, c)) == (second, False)
    b.add_(1)
    assert counted((w, b))[1] and counted((w, b, c))[1]


def test_other_steps_of_a_net_do_not_miss() -> None:
    net, x = Net(), torch.randn(2, 8, 5, 5)
    net.fused(x)
    entry = entry_of(net)
    kept = dict(entry.values)
    net.stock(x)
    net.state_dict()
    net.train()
    net.eval()
    net.fused(x + 1)
    assert entry_of(net) is entry and all(entry.values[k] is v for k, v in kept.items())


@pytest.mark.parametrize("strided", ["gap", "expanded", "step"])
def test_a_view_with_gaps_is_compared_in_full(strided: str) -> None:
    base = torch.randn(8, 6, 3, 3)
    w = {"gap": base[:, 1:4], "expanded": base[:1].expand(4, 6, 3, 3), "step": base.view(-1)[::2]}[strided]
    first, _ = counted((w,))
    assert counted((w,)) == (first, False)
    base.data.mul_(2)
    assert counted((w,))[1]


def test_inference_tensors_are_compared_in_full() -> None:
    with torch.inference_mode():
        w = torch.randn(6, 5, 3, 3)
        first, _ = counted((w,))
        assert counted((w,)) == (first, False)
        w.copy_(w.flip(0))  # the same numbers in another order
        assert counted((w,))[1]
        w[3, 2, 1, 1] += 1
        assert counted((w,))[1]


def test_an_entry_made_in_inference_mode_serves_outside_it() -> None:
    net, x = Net(), torch.randn(2, 8, 5, 5)
    with torch.inference_mode():
        net.fused(x)
    entry = entry_of(net)
    kept = dict(entry.values)
    torch.testing.assert_close(net.fused(x), net.stock(x), rtol=1e-4, atol=1e-5)
    assert entry_of(net) is entry and all(entry.values[k] is v for k, v in kept.items())


def test_the_least_recently_used_key_goes_first() -> None:
    w = torch.randn(4)
    values = {k: counted((w,), k, keep=3)[0] for k in "abc"}
    assert counted((w,), "a", keep=3) == (values["a"], False)
    counted((w,), "d", keep=3)
    assert counted((w,), "b", keep=3)[1]  # b was the oldest; making it dropped c
    assert counted((w,), "a", keep=3) == (values["a"], False)
    assert counted((w,), "c", keep=3)[1]


def test_a_change_drops_every_key() -> None:
    w = torch.randn(4)
    counted((w,), "a")
    counted((w,), "b")
    w.add_(1)
    assert counted((w,), "a")[1] and counted((w,), "b")[1]


def test_an_entry_dies_with_its_parameter() -> None:
    net = Net()
    net.fused(torch.randn(1, 8, 4, 4))
    assert len(parameter_cache._cache) == 1
    del net
    gc.collect()
    assert len(parameter_cache._cache) == 0


def test_nothing_is_stored_on_the_module() -> None:
    net = Net()
    before = set(net.state_dict()), set(vars(net.conv)), set(vars(net.bn))
    net.fused(torch.randn(1, 8, 4, 4))
    assert before == (set(net.state_dict()), set(vars(net.conv)), set(vars(net.bn)))


def test_clear_forgets() -> None:
    w = torch.randn(4)
    counted((w,))
    clear_derived()
    assert counted((w,))[1]


def test_a_source_must_be_a_tensor() -> None:
    with pytest.raises(ValueError, match="expected a tensor among the sources, got none; "):
        parameter_cache.get((None, None), 0, lambda kept: 0)


def test_a_failed_computation_leaves_nothing_behind() -> None:
    w = torch.randn(4)

    def fail(kept: dict[object, object]) -> object:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        parameter_cache.get((w,), 0, fail)
    assert counted((w,))[1]


def test_threads_share_one_entry() -> None:
    net = Net()
    xs = [torch.randn(n, 8, 5, 5) for n in range(1, 13)]  # more sizes than are kept: every thread evicts
    expected = [net.stock(x) for x in xs]

    def work(offset: int) -> None:
        for i in range(60):
            j = (i + offset) % len(xs)
            torch.testing.assert_close(net.fused(xs[j]), expected[j], rtol=1e-4, atol=1e-5)

    in_threads(*(partial(work, 3 * k) for k in range(4)))


def test_two_entries_are_made_at_the_same_time() -> None:
    """One net's packing does not wait for another's."""
    meeting = threading.Barrier(2, timeout=LIMIT_S)
    sources = [(torch.randn(3),), (torch.randn(3),)]
    in_threads(*(partial(parameter_cache.get, s, 0, lambda kept: meeting.wait() + 1) for s in sources))
    assert not meeting.broken


def test_entries_that_share_sources_live_side_by_side() -> None:
    """Two nets with one backbone and as many parameters each."""
    shared, a, b = torch.randn(4), torch.randn(4), torch.randn(4)
    first, second = counted((shared, a))[0], counted((shared, b))[0]
    for _ in range(3):
        assert counted((shared, a)) == (first, False) and counted((shared, b)) == (second, False)
    b.add_(1)
    assert counted((shared, a)) == (first, False) and counted((shared, b))[1]


def test_a_followed_counter_makes_its_tensor_stale() -> None:
    """On a GPU only num_batches_tracked shows that BatchNorm updated its statistics."""
    mean, counter, made = torch.zeros(3), torch.tensor(0), []

    def value() -> int:
        parameter_cache.follow(mean, counter)
        return parameter_cache.get((mean,), "key", lambda kept: made.append(1) or len(made))

    assert [value(), value()] == [1, 1]
    counter.add_(1)
    assert [value(), value()] == [2, 2]
    parameter_cache.follow(mean, None)
    assert value() == 2


def test_values_of_a_source() -> None:
    t, other = torch.zeros(2), torch.ones(1)
    parameter_cache.get((t,), "a", lambda kept: "one")
    parameter_cache.get((t, other), "b", lambda kept: "two")
    assert parameter_cache.values_of(t) == ["one", "two"] and parameter_cache.values_of(torch.zeros(2)) == []
