"""A function replaced in a layer, its class or its library runs: only unchanged layers are fused."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as stock
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast
from resnet_fast.blocks import obstacles, pristine

timm = pytest.importorskip("timm")


def net(block: type[nn.Module] = stock.BasicBlock, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return stock.ResNet(block, [2, 1, 1, 1], num_classes=10, **kwargs).eval()  # type: ignore[arg-type]


def timm_net() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=10).eval()


PLACES: dict[str, tuple[Any, str, Callable[[], nn.Module]]] = {
    "ReLU.forward": (nn.ReLU, "forward", net),
    "Conv2d.forward": (nn.Conv2d, "forward", net),
    "Conv2d._conv_forward": (nn.Conv2d, "_conv_forward", net),
    "BatchNorm2d.forward": (nn.BatchNorm2d, "forward", net),
    "_BatchNorm.forward": (nn.modules.batchnorm._BatchNorm, "forward", net),
    "Module.__call__": (nn.Module, "__call__", net),
    "Conv2d.__call__": (nn.Conv2d, "__call__", net),
    "Sequential.forward": (nn.Sequential, "forward", net),
    "MaxPool2d.forward": (nn.MaxPool2d, "forward", net),
    "Linear.forward": (nn.Linear, "forward", net),
    "FrozenBatchNorm2d.forward": (FrozenBatchNorm2d, "forward", lambda: net(norm_layer=FrozenBatchNorm2d)),
    "BasicBlock.forward": (stock.BasicBlock, "forward", net),
    "Bottleneck.forward": (stock.Bottleneck, "forward", lambda: net(stock.Bottleneck)),
    "ResNet._forward_impl": (stock.ResNet, "_forward_impl", net),
    "ResNet.forward": (stock.ResNet, "forward", net),
    "timm BasicBlock.forward": (timm.models.resnet.BasicBlock, "forward", timm_net),
    "timm ResNet.forward": (timm.models.resnet.ResNet, "forward", timm_net),
    "timm ResNet.forward_features": (timm.models.resnet.ResNet, "forward_features", timm_net),
    "timm ResNet.forward_head": (timm.models.resnet.ResNet, "forward_head", timm_net),
    "F.relu": (F, "relu", net),
    "F.conv2d": (F, "conv2d", net),
    "F.batch_norm": (F, "batch_norm", net),
    "torch.batch_norm": (torch, "batch_norm", net),
    "torch.max_pool2d": (torch, "max_pool2d", net),
    "Tensor.__iadd__": (Tensor, "__iadd__", net),
    "Module.__getattr__": (nn.Module, "__getattr__", net),
    "Conv2d.__getattr__": (nn.Conv2d, "__getattr__", net),
    "BasicBlock.__getattr__": (stock.BasicBlock, "__getattr__", net),
}


@contextlib.contextmanager
def replaced(owner: Any, name: str) -> Iterator[None]:
    """Return the function of that name with slightly changed results; ``wraps`` makes it look like the original."""
    original = getattr(owner, name)
    own = name in vars(owner)

    @functools.wraps(original)
    def other(*args: Any, **kwargs: Any) -> Any:
        y = original(*args, **kwargs)
        return y * 1.25 + 0.125 if isinstance(y, Tensor) else y

    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, original)
        if not own:
            delattr(owner, name)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", PLACES)
def test_a_function_replaced_in_a_class_or_library_is_run(place: str, when: str) -> None:
    """It runs in inference (whole net, stage by stage) and in training; the layer fuses again once it is put back."""
    owner, name, make = PLACES[place]
    plain, x = make(), torch.randn(2, 3, 32, 32)
    if when == "after":
        model = resnet_fast.accelerate(copy.deepcopy(plain))
        with torch.no_grad():
            model(x)
    with replaced(owner, name):
        if when == "before":
            model = resnet_fast.accelerate(copy.deepcopy(plain))
        resnet_fast.reset_stats()
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
            told = str(resnet_fast.explain(model, x))
        counted = str(resnet_fast.stats()["fallbacks"])
        with resnet_fast.use_backend("reference"):
            torch.testing.assert_close(model.train()(x), plain.train()(x), rtol=1e-4, atol=1e-4)
    if name not in ("forward_head",) and place not in ("ResNet.forward", "Linear.forward"):  # which nothing passes by
        reason = f"{name}, got another; it runs unfused"
        assert reason in counted and reason in told
    with torch.no_grad(), resnet_fast.strict():
        model.eval()
        plain.eval()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_what_was_replaced_is_named_in_full() -> None:
    model = resnet_fast.accelerate(net())
    with replaced(nn.ReLU, "forward"):
        reason = model.layer1[0].unfusable()
    expected = "expected the library's own torch.nn.modules.activation.ReLU.forward, got another; it runs unfused"
    assert reason == expected
    assert model.layer1[0].unfusable() == ""


def test_another_class_of_the_library_lends_its_forward() -> None:
    model, x = resnet_fast.accelerate(net()), torch.randn(1, 3, 32, 32)
    original = nn.ReLU.forward
    try:
        nn.ReLU.forward = nn.GELU.forward  # type: ignore[method-assign,assignment]
        nn.ReLU.approximate = "none"  # type: ignore[attr-defined]
        with torch.no_grad():
            torch.testing.assert_close(model(x), resnet_fast.restore(copy.deepcopy(model))(x))
    finally:
        nn.ReLU.forward = original  # type: ignore[method-assign]
        del nn.ReLU.approximate


@pytest.mark.parametrize("owner, name", [(nn.BatchNorm2d, "forward"), (nn.Conv2d, "__call__"), (Tensor, "__iadd__")])
def test_an_inherited_function_may_be_put_back_by_assignment(owner: Any, name: str) -> None:
    model, x = resnet_fast.accelerate(net()), torch.randn(1, 3, 32, 32)
    original = getattr(owner, name)
    assert name not in vars(owner)
    try:
        setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs))
        assert model.layer1[0].unfusable() != ""
        setattr(owner, name, original)
        with torch.no_grad(), resnet_fast.strict():
            model(x)
    finally:
        delattr(owner, name)


def test_a_norm_that_borrows_another_forward_runs_it() -> None:
    original = nn.SyncBatchNorm.forward
    try:
        nn.SyncBatchNorm.forward = nn.BatchNorm2d.forward  # type: ignore[method-assign]
        assert resnet_fast.accelerate(net()).layer1[0].unfusable() != ""
    finally:
        nn.SyncBatchNorm.forward = original  # type: ignore[method-assign]


def test_nothing_is_replaced_in_a_fresh_process() -> None:
    assert pristine.Watched(stock.BasicBlock, ("forward",)).changed() == ""
    assert pristine.Watched(timm.models.resnet.ResNet, ("forward", "forward_features")).changed() == ""


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_compile_takes_a_replaced_class(used: bool, train: bool) -> None:
    """The class counts as it is at compile time; torch.compile does not follow later patches."""
    plain, x = net().train(train), torch.randn(2, 3, 32, 32)
    model = resnet_fast.accelerate(copy.deepcopy(plain))
    if used:
        with torch.no_grad():
            copy.deepcopy(model)(x)
    with torch.no_grad():
        torch._dynamo.reset()
        with replaced(nn.ReLU, "forward"):
            compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), copy.deepcopy(plain)(x), rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), copy.deepcopy(plain)(x), rtol=1e-4, atol=1e-4)


def conv_forward(m: nn.Module) -> None:
    original = m._conv_forward
    m._conv_forward = lambda x, w, b: original(x, w, b).sin()  # type: ignore[operator]


def own_forward(m: nn.Module) -> None:
    original = m.forward
    m.forward = lambda x: original(x).cos()  # type: ignore[method-assign]


def call_impl(m: nn.Module) -> None:
    original = m._call_impl
    m._call_impl = lambda *args, **kwargs: original(*args, **kwargs).cos()  # type: ignore[method-assign]


def compiled_by_the_user(m: nn.Module) -> None:
    own_forward(m)
    m.compile(backend="eager")


def hidden_weight(m: nn.Module) -> None:
    object.__setattr__(m, "weight", m.weight.detach().abs() * 2)


def plain_weight(m: nn.Module) -> None:
    weight = m.weight.detach().abs() * 2
    del m.weight
    m.weight = weight


def hidden_mean(m: nn.Module) -> None:
    object.__setattr__(m, "running_mean", m.running_mean + 1)


def buffer_as_attribute(m: nn.Module) -> None:
    mean = m.running_mean + 1
    del m.running_mean
    m.running_mean = mean


def bias_subclass(m: nn.Module) -> None:
    class Own(nn.Parameter):
        pass

    m.bias = Own(m.bias.detach() + 1)


EDITS: list[tuple[str, Callable[[nn.Module], None]]] = [
    *((where, edit) for where in ("layer1.0.conv1", "conv1") for edit in (conv_forward, hidden_weight, plain_weight)),
    *((where, edit) for where in ("layer1.0.bn2", "bn1") for edit in (hidden_mean, buffer_as_attribute)),
    ("layer1.1.bn1", bias_subclass),
    ("layer1.1.bn1", hidden_weight),
    ("layer2.0.downsample.0", conv_forward),
    ("layer2.0.downsample.1", hidden_mean),
    *(
        (where, edit)
        for where in ("layer1.0.relu", "layer3.0.conv2", "layer2", "layer1.0", "maxpool")
        for edit in (own_forward, call_impl, compiled_by_the_user)
    ),
]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("where", "edit"), EDITS, ids=[f"{w} {e.__name__}" for w, e in EDITS])
def test_an_edited_instance_is_run_as_it_is(where: str, edit: Callable[[nn.Module], None], train: bool) -> None:
    torch._dynamo.reset()
    plain = net().train(train)
    edited = copy.deepcopy(plain)
    model = resnet_fast.accelerate(copy.deepcopy(plain))
    x = torch.randn(2, 3, 32, 32)
    resnet_fast.reset_stats()
    with torch.no_grad():
        for m in (edited, model):
            edit(m.get_submodule(where))
        want = edited(x)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        assert train or not torch.allclose(want, plain(x), rtol=1e-2, atol=1e-2), "the edit must matter"


def replace(m: nn.Module, name: str, value: Any) -> None:
    """Set ``m.name`` to ``value``, a module or not."""
    delattr(m, name)
    setattr(m, name, value)


def square(x: Tensor) -> Tensor:
    return x * x


def half(x: Tensor, factor: float) -> Tensor:
    return x * factor


CHILDREN: dict[str, Callable[[nn.Module], None]] = {
    "downsample function": lambda m: replace(m.layer1[0], "downsample", square),
    "downsample partial": lambda m: replace(m.layer1[0], "downsample", functools.partial(half, factor=0.5)),
    "downsample shadowed": lambda m: object.__setattr__(
        m.layer2[0], "downsample", copy.deepcopy(m.layer2[0].downsample)
    ),
    "relu function": lambda m: replace(m.layer1[0], "relu", F.silu),
    "norm function": lambda m: replace(m.layer1[0], "bn1", square),
    "convolution function": lambda m: replace(m.layer1[0], "conv1", functools.partial(half, factor=2.0)),
    "stem norm": lambda m: replace(m, "bn1", square),
    "stem relu": lambda m: replace(m, "relu", F.silu),
    "stem pool": lambda m: replace(m, "maxpool", functools.partial(F.avg_pool2d, kernel_size=2)),
    "stage function": lambda m: replace(m, "layer4", lambda x: x.repeat(1, 2, 1, 1)),
    "stage list item": lambda m: m.layer1.append(nn.Identity()),
    "stage emptied": lambda m: replace(m, "layer1", nn.Sequential()),
    "stage identity": lambda m: replace(m, "layer1", nn.Identity()),
    "pool function": lambda m: replace(m, "avgpool", functools.partial(F.adaptive_max_pool2d, output_size=1)),
    "classifier function": lambda m: replace(m, "fc", square),
    "classifier identity": lambda m: replace(m, "fc", nn.Identity()),
    "hidden relu": lambda m: object.__setattr__(m.layer1[0], "relu", nn.SiLU()),
    "hidden convolution": lambda m: object.__setattr__(m.layer1[0], "conv1", nn.Conv2d(64, 64, 3, padding=1)),
    "hidden stage": lambda m: object.__setattr__(m, "layer1", nn.Identity()),
    "hidden pool": lambda m: object.__setattr__(m, "maxpool", nn.AvgPool2d(2)),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_that_is_no_module_is_run(name: str, train: bool) -> None:
    plain = net().train(train)
    model = resnet_fast.accelerate(copy.deepcopy(plain))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for m in (plain, model):
            torch.manual_seed(1)
            CHILDREN[name](m)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
        assert "\n" not in " ".join(resnet_fast.stats()["fallbacks"])


@pytest.mark.parametrize(
    ("layer", "tensor"), [("layer1.0.conv1", "weight"), ("layer1.0.bn1", "weight"), ("bn1", "running_var")]
)
def test_a_missing_tensor_is_the_stock_layers_error(layer: str, tensor: str) -> None:
    model = resnet_fast.accelerate(net())
    delattr(model.get_submodule(layer), tensor)
    with torch.no_grad(), pytest.raises(AttributeError, match=f"no attribute '{tensor}'"):
        model(torch.randn(1, 3, 32, 32))


def test_a_missing_child_is_the_stock_blocks_error() -> None:
    model = resnet_fast.accelerate(net())
    del model.layer1[0].relu
    with torch.no_grad(), pytest.raises(AttributeError, match="no attribute 'relu'"):
        model(torch.randn(1, 3, 32, 32))


def test_a_timm_nets_own_forward_features_is_run() -> None:
    model, x = resnet_fast.accelerate(timm_net()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model.forward_head(2 * model.forward_features(x))
        original = model.forward_features
        model.forward_features = lambda t: 2 * original(t)
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_a_timm_blocks_drop_path_of_another_kind_is_run_in_eval() -> None:
    model, x = timm_net(), torch.randn(1, 3, 64, 64)
    block = model.layer1[0]
    replace(block, "drop_path", square)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(resnet_fast.accelerate(model)(x), want, rtol=1e-5, atol=1e-5)
    assert block.unfusable().startswith("expected drop_path to be a module, got a function square")


def test_a_class_of_the_same_name_is_named_in_full() -> None:
    other = types.new_class("Conv2d", (nn.Conv2d,))
    other.__module__ = "library.layers"
    reason = obstacles.conv_obstacle("conv1", other(8, 8, 3))
    assert reason == "expected conv1 to be a plain Conv2d, got library.layers.Conv2d; it runs unfused"
    norm = types.new_class("BatchNorm2d", (nn.BatchNorm2d,))
    norm.__module__ = "library.norms"
    assert obstacles.norm_obstacle("bn1", norm(8)).endswith("got library.norms.BatchNorm2d; it runs unfused")
    assert obstacles.obstacle("relu to be a plain ReLU", None).endswith("got None; it runs unfused")


def test_a_class_of_code_that_no_loaded_module_holds() -> None:
    """runpy and exec leave such classes: their own functions are theirs, and another's is not."""
    names: dict[str, Any] = {"__name__": "not.loaded", "nn": nn}
    exec("class Own(nn.Module):\n    def forward(self, x):\n        return x", names)
    own = names["Own"]
    assert pristine.is_own(own, "forward", own.forward)
    other = types.FunctionType(own.forward.__code__, {"__name__": "elsewhere"}, "forward")
    other.__qualname__ = own.forward.__qualname__
    assert not pristine.is_own(own, "forward", other)


class Shifted(torch.overrides.TorchFunctionMode):
    """Changes what ReLU returns."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return y + 1 if func is F.relu else y


class Doubling(torch.Tensor):
    """Doubles what ReLU returns."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = super().__torch_function__(func, types, args, kwargs or {})
        return y * 2 if func is F.relu else y


@pytest.mark.parametrize("train", [False, True])
def test_function_modes_and_tensor_classes_see_each_operation(train: bool) -> None:
    plain = net().train(train)
    model = resnet_fast.accelerate(copy.deepcopy(plain))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), Shifted():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    resnet_fast.reset_stats()
    y = x.as_subclass(Doubling)
    with torch.no_grad():
        got, want = model(y), plain(y)
    assert type(got) is type(want) is Doubling
    torch.testing.assert_close(got.as_subclass(Tensor), want.as_subclass(Tensor), rtol=1e-4, atol=1e-4)
    assert f"got {__name__}.Doubling, which observes each operation" in str(resnet_fast.stats()["fallbacks"])


def test_a_default_device_is_no_obstacle() -> None:
    model = resnet_fast.accelerate(net())
    with torch.no_grad(), torch.device("cpu"), resnet_fast.strict():
        resnet_fast.reset_stats()
        model(torch.randn(1, 3, 32, 32))
    assert set(resnet_fast.stats()["calls"]) == {"basic_block/onednn", "stem/onednn"}


@pytest.mark.parametrize("where", ["layer1.0", "layer2", "", "timm", "timm features"])
def test_a_function_put_into_a_fused_class_is_run(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking an accelerated module for its class gives ours."""
    model = resnet_fast.accelerate(timm_net() if where.startswith("timm") else net())
    x = torch.randn(2, 3, 64, 64)
    cls = type(model.get_submodule("" if where.startswith("timm") else where))
    name = "forward_features" if where == "timm features" else "forward"
    original, seen = getattr(cls, name), []
    with torch.no_grad():
        want = model(x)
        monkeypatch.setattr(cls, name, lambda self, x: (seen.append(1), original(self, x).cos())[1])
        got = model(x)
    assert seen and not torch.allclose(got, want, atol=1e-3)


def test_a_class_derived_from_a_fused_one_runs_its_own_forward() -> None:
    model, x = resnet_fast.accelerate(net()), torch.randn(2, 3, 32, 32)

    class Derived(type(model.layer1[0])):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).cos()

    with torch.no_grad():
        want = model(x)
        model.layer1[0].__class__ = Derived
        assert not torch.allclose(model(x), want, atol=1e-3)
