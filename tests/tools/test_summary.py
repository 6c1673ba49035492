"""Counting nets: against the papers' figures, torch's own counter, torchvision's metadata and the shape tables."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_fast.errors import UserError
from resnet_fast.models import registry
from resnet_fast.spec import Epilogue
from resnet_fast.tools.summary import PUBLISHED, Summary, build_meta, compare, stages, summarize, trace
from resnet_fast.tuning import shapes

G = 10**9


@pytest.mark.parametrize(
    ("name", "shortcut", "v1", "printed"),
    [
        ("plain18", None, False, "1.8"),
        ("plain34", None, False, "3.6"),
        ("resnet18", "A", True, "1.8"),
        ("resnet34", "A", True, "3.6"),
        ("resnet101", "B", True, "7.6"),
        ("resnet152", "B", True, "11.3"),
        ("vgg19", None, False, "19.6"),  # with its fully connected layers; 19.5 without
        ("googlenet", None, False, "1.5"),
    ],
)
def test_multiply_adds_read_as_the_paper_prints_them(name: str, shortcut: str | None, v1: bool, printed: str) -> None:
    (row,) = compare([name], shortcut=shortcut, stride_in_1x1=v1)
    assert f"{row.macs / G:.1f}" == printed == PUBLISHED[name].gmacs
    remark = "torchvision's net has BatchNorm and 3x3 filters where the published one has 5x5"
    assert row.note == (remark if name == "googlenet" else "")


def test_resnet50_is_printed_cut_off_not_rounded() -> None:
    (row,) = compare(["resnet50"], stride_in_1x1=True)
    assert row.macs == 3_857_973_248
    assert row.published == "3.8 G"
    assert "3.858 G is counted here; the published 3.8 is that cut off" in row.note


def test_vgg16_is_printed_without_its_fully_connected_layers() -> None:
    (row,) = compare(["vgg16"])
    assert f"{row.conv_macs / G:.1f}" == "15.3" == PUBLISHED["vgg16"].gmacs
    assert f"{row.macs / G:.1f}" == "15.5"
    assert "convolutions alone (15.347 G)" in row.note


@pytest.mark.parametrize(("name", "text"), [(n, p.mparams) for n, p in PUBLISHED.items() if p.mparams])
def test_cifar_parameters_read_as_table_6_prints_them(name: str, text: str) -> None:
    params = sum(p.numel() for p in build_meta(name).parameters())
    assert f"{params / 1e6:.{len(text.partition('.')[2])}f}" == text


def test_torchvisions_variant_says_that_the_paper_counts_another() -> None:
    (row,) = compare(["resnet50"])
    assert f"{row.macs / G:.3f}" == "4.089"
    assert "another variant (shortcut B, stride in 1x1 (v1))" in row.note
    (b,) = compare(["resnet34"])
    assert "another variant (shortcut A)" in b.note and f"{b.macs / G:.3f}" == "3.664"


def test_no_figure_is_claimed_for_another_image() -> None:
    (row,) = compare(["resnet50"], image=160, stride_in_1x1=True)
    assert (row.published, row.note) == (None, "")


def test_without_names_every_published_net_is_counted_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PUBLISHED, "cifar_resnet1202")  # seconds to trace
    rows = compare()
    assert [r.name for r in rows] == list(PUBLISHED)
    assert not any("another variant" in r.note for r in rows)
    assert {r.name for r in rows if r.note} == {"resnet50", "vgg16", "googlenet"}


WEIGHTS = {name: torchvision.models.get_model_weights(name).DEFAULT.meta for name in ("vgg16", "googlenet")} | {
    n: torchvision.models.get_model_weights(n).DEFAULT.meta for n in shapes.ARCHS if n.startswith(("res", "wi"))
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_totals_are_torchvisions_published_ones(name: str) -> None:
    (row,) = compare([name])
    assert row.params == WEIGHTS[name]["num_params"]
    assert round(row.macs / G, 3) == pytest.approx(WEIGHTS[name]["_ops"], abs=0.0011)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "plain18", "cifar_resnet20", "googlenet", "vgg16"])
def test_multiply_adds_are_torchs_own_count(name: str) -> None:
    model, side = build_meta(name).eval(), registry.image_size(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(3, 3, side, side, device="meta"))
    assert 2 * sum(layer.spec.macs() for layer in trace(model, 3, side)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet50", {"shortcut": "A", "stride_in_1x1": True}),
        ("resnet50", {"shortcut": "C"}),
        ("resnext50_32x4d", {}),
        ("plain34", {}),
        ("cifar_resnet20", {}),
        ("cifar_resnet20", {"shortcut": "B"}),
        ("cifar_plain32", {}),
    ],
)
def test_traced_specs_are_the_tables_with_epilogues(name: str, options: dict[str, object]) -> None:
    layers = trace(build_meta(name, **options), 2, 65, "bfloat16")
    got = {f"{shapes.ARCHS[name].key}.{layer.name}": layer.spec for layer in layers if not layer.linear}
    assert got == shapes.problems(name, 2, 65, "bfloat16", **options)


def test_trace_fuses_what_follows_each_convolution_in_any_net() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, ceil_mode=True)
            self.b, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.c = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.pool(torch.relu(self.a(x)))  # 5x5 in ceil mode: the last window hangs over, so no epilogue
            x = x + self.norm(self.b(x))  # the shortcut first: the branch is the operand without a ReLU
            return self.c(x).mean((2, 3))

    with torch.device("meta"):
        layers = trace(Net(), 1, 7)
    assert [layer.spec.epilogue for layer in layers] == [
        Epilogue(relu=True, norm=False),
        Epilogue(add=True, norm=True),
        Epilogue(norm=False),
    ]
    assert [layer.params for layer in layers] == [3 * 4 * 9 + 4, 16 + 4 + 8, 16 + 4]


def test_trace_leaves_the_model_as_it_was() -> None:
    model = build_meta("resnet18").train()
    trace(model, 1, 32)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch": 0}, "batch 0"),
        ({"image": 0}, "image 0"),
        ({"dtype": "half"}, "name of a dtype, got 'half'"),
    ],
)
def test_trace_refuses_sizes_that_do_not_exist(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trace(build_meta("resnet18"), **kwargs)


def test_image_too_small_for_the_net() -> None:
    with pytest.raises(UserError, match=r"got 8x8 \(.*use a larger image"):
        summarize("vgg16", image=8)


def test_only_two_dimensional_convolutions_are_counted() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.ConvTranspose2d(3, 4, 3))
    with pytest.raises(UserError, match="a transposed convolution of a 4-d tensor in 0"):
        trace(net, 1, 8)


def _stage(summary: Summary, name: str) -> tuple[tuple[int, int], str]:
    (row,) = [s for s in summary.stages if s.name == name]
    return row.output, row.formula


def test_stages_read_as_table_1() -> None:
    s = summarize("resnet50", stride_in_1x1=True)
    assert [row.name for row in s.stages] == ["conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x", "fc"]
    assert _stage(s, "conv1") == ((112, 112), "7x7, 64, stride 2")
    assert _stage(s, "conv2_x") == ((56, 56), "3x3 max pool, stride 2; [1x1, 64; 3x3, 64; 1x1, 256] x 3")
    assert _stage(s, "conv3_x") == ((28, 28), "[1x1, 128; 3x3, 128; 1x1, 512] x 4")
    assert _stage(s, "conv4_x") == ((14, 14), "[1x1, 256; 3x3, 256; 1x1, 1024] x 6")
    assert _stage(s, "conv5_x") == ((7, 7), "[1x1, 512; 3x3, 512; 1x1, 2048] x 3")
    assert _stage(s, "fc") == ((1, 1), "global average pool; 1000-d fc")
    assert _stage(summarize("plain34", image=64), "conv3_x") == ((8, 8), "[3x3, 128; 3x3, 128] x 4")
    assert _stage(summarize("cifar_resnet20"), "conv4_x") == ((8, 8), "[3x3, 64; 3x3, 64] x 3")
    assert _stage(summarize("resnext50_32x4d", image=64), "conv2_x")[1].endswith(
        "[1x1, 128; 3x3, 128, C=32; 1x1, 256] x 3"
    )


def test_stages_show_dilation_and_flat_containers() -> None:
    with torch.device("meta"):
        dilated = registry.build("resnet50", replace_stride_with_dilation=(False, False, True))
    rows = stages(trace(dilated, 1, 64), paper_names=True)
    assert rows[4].formula == "[1x1, 512; 3x3, 512; 1x1, 2048]; [1x1, 512; 3x3, 512, d=2; 1x1, 2048] x 2"
    vgg = summarize("vgg16")
    assert vgg.stages[1].formula == "2x2 max pool, stride 2; 3x3, 128; 3x3, 128"
    assert vgg.stages[1].output == (112, 112)


@pytest.mark.parametrize("name", ["resnet50", "vgg16", "googlenet", "cifar_plain20"])
def test_stages_add_up_to_the_totals(name: str) -> None:
    s = summarize(name, batch=2)
    assert sum(row.params for row in s.stages) == s.params == sum(p.numel() for p in build_meta(name).parameters())
    assert sum(row.macs for row in s.stages) == s.macs
    assert sum(row.min_bytes for row in s.stages) == s.min_bytes
    assert s.macs == 2 * summarize(name).macs


def test_minimal_bytes_are_the_specs_with_the_fc() -> None:
    s = summarize("resnet18", batch=4, dtype="bfloat16")
    convs = sum(c.min_bytes() for c in shapes.problems("resnet18", 4, dtype="bfloat16").values())
    assert s.min_bytes - convs == 2 * (4 * 512 + 512 * 1000 + 4 * 1000)


def test_summary_is_json_with_the_footnote() -> None:
    data = json.loads(json.dumps(summarize("resnet50", stride_in_1x1=True).to_dict()))
    assert data["stages"][1]["output"] == [56, 56]
    assert data["variant"] == "shortcut B, stride in 1x1 (v1)"
    assert any("cut off, not rounded" in note for note in data["notes"])


def test_variant_without_names() -> None:
    with pytest.raises(UserError, match="name them"):
        compare(shortcut="A")


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"did you mean .*resnet50"):
        summarize("resnet55")
