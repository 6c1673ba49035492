"""benchmarks/page: one page of result files, whole or cut; a broken file is refused by its name and line."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from resnet_fast.benchmarks import page, report
from resnet_fast.benchmarks.compare import BenchReport, InferenceRow
from resnet_fast.benchmarks.page import charts, markup, modelled, results, steps
from resnet_fast.benchmarks.train import TrainingRow
from resnet_fast.cli import report as cli_report
from resnet_fast.errors import UserError
from resnet_fast.roofline import prediction
from tests.support import ROOT, browser
from tests.support.cli import invoke

RESULTS = ROOT / "benchmarks" / "results"
H100 = RESULTS / "nvidia-h100-80gb-hbm3-2026-11-24"
HOST = ROOT / "docs" / "tables" / "host-instructions.json"


class Reader(HTMLParser):
    """The rows of all tables, and what does not fit together."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[tuple[str, list[str]]] = []
        self.ids: list[str] = []
        self.tags: Counter[str] = Counter()
        self.unnamed: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        self.ids += [given["id"] or ""] if "id" in given else []
        if given.get("role") == "img" and not given.get("aria-label"):
            self.unnamed.append(tag)
        if tag == "tr":
            self.rows.append((given.get("class") or "", []))
        elif tag in ("td", "th"):
            self.rows[-1][1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_data(self, data: str) -> None:
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][1][-1] += data


def entry(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Copy the H100's entry to ``folder``, and return its rows; ``changes`` go to each row."""
    shutil.copytree(H100, folder, dirs_exist_ok=True)
    rows = [json.loads(line) | changes for line in (H100 / "bench.jsonl").read_text().splitlines()]
    write(folder, rows)
    return rows


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "bench.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def test_the_page_of_the_committed_entry() -> None:
    text = page.build([RESULTS, HOST], date="a day", commit="abc")
    found = Reader(text)
    assert not re.search(r"""(?:src|href)=["'](?!#)|url\(|@import|<script""", text)  # it loads nothing
    assert len(set(found.ids)) == len(found.ids) and found.unnamed == []
    assert found.tags["h1"] == 1 and found.tags["figure"] == 2 and found.tags["caption"] >= 9
    rows = {tuple(cells[:1] + cells[2:6]) for _, cells in found.rows}
    assert ("cuDNN fused ops, CUDA graph", "9.961", "25,700", "1.00 (best stock)", "not recorded") in rows
    assert ("torch.compile, AMP bfloat16", "44.972", "5,692", "1.00 (best stock)", "not recorded") in rows
    assert ("eager NHWC, AMP bfloat16", "63.785", "4,013", "0.71", "not recorded") in rows
    assert ("train-amp", "21.6", "1.20") in {tuple(cells[:1] + cells[2:]) for _, cells in found.rows}
    for word in ("NVIDIA H100 80GB HBM3", "torch 2.11.0+cu130", "2026-11-24", "no commit recorded", "a day", "abc"):
        assert word in text


def test_no_ratio_mixes_measured_and_modelled() -> None:
    ours = [cells for kind, cells in Reader(page.build([RESULTS])).rows if kind == "ours modelled"]
    assert len(ours) == 8  # five batches of inference and three of training; nobody measured ours there
    assert all(cells[0] == "resnet_fast modelled" and cells[4] == "no ratio: not measured" for cells in ours)
    assert [float(cells[2]) for cells in ours[:5]] == pytest.approx([0.281, 0.443, 0.989, 3.260, 6.329], abs=0.02)


def test_the_entry_and_the_models_calibration_are_the_same_figures() -> None:
    """roofline/prediction.py holds these times to fit its model to them."""
    found = results.read([H100])
    times = {(c.kind, c.batch, t.peer): t.images_per_s for c in found.cells for t in c.times}
    paths = ("cuDNN fused ops, CUDA graph", "torch.compile reduce-overhead, frozen", "eager NHWC")
    paths += ("eager NHWC, AMP bfloat16", "torch.compile, AMP bfloat16")
    for path, known in zip(paths, prediction.MEASURED, strict=True):
        kind = "training" if known.plan.startswith("train") else "inference"
        assert {(batch, rate) for batch, rate in known.images_per_s} <= {
            (batch, rate) for (k, batch, peer), rate in times.items() if (k, peer) == (kind, path)
        }
    (profile,) = found.profiles
    parts = steps.parts_of(profile, None)
    seconds = prediction.PROFILE_S
    for name, kernels in (
        ("BatchNorm", [("bn_stats",), ("bn",), ("bn_reduce",), ("bn_grad",)]),
        ("residual adds", [("add", "add_grad")]),
        ("ReLU", [("relu",), ("relu_grad",)]),
        ("max-pool", [("maxpool",), ("maxpool_grad",)]),
    ):
        assert parts[name][0] / 1e3 == pytest.approx(sum(seconds[key] for key in kernels), rel=1e-6), name
    assert steps.OTHERS not in parts


def test_the_rest_of_a_step_is_named() -> None:
    (profile,) = results.read([H100]).profiles
    assert sum(ms for ms, _ in steps.parts_of(profile, 63.7852).values()) == pytest.approx(63.7852)
    assert steps.REST not in steps.parts_of(profile, 1.0)  # a step that is shorter than its kernels has no rest


@pytest.mark.parametrize(
    "line",
    [
        '{"key":"a',
        '{"key":"a",',
        '{"key":',
        '{"key":tr',
        '{"key":1.',
        '{"key":-',
        '{"key":{"a":[1,',
        '{"key":"\\u00',
        "{",
    ],
)
def test_a_cut_run_is_shown_as_far_as_it_got(line: str, tmp_path: Path) -> None:
    """A line that ends inside a row, at the end or, after the run was resumed, in the middle; and no env.json."""
    rows = entry(tmp_path / "run")[:3]
    (tmp_path / "run" / "env.json").unlink()
    texts = [json.dumps(rows[0]), line, *map(json.dumps, rows[1:]), line]
    (tmp_path / "run" / "bench.jsonl").write_text("\n".join(texts))
    text = page.build([tmp_path / "run"])
    Reader(text)
    assert "run/bench.jsonl: 2 unfinished lines left out" in text
    assert "25,700" in text and "20,746" not in text
    assert "NVIDIA H100 80GB HBM3" in text and "versions not recorded" in text


def test_a_folder_with_nothing_but_the_beginning_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "bench.jsonl").write_text('{"key": "inf')
    text = page.build([tmp_path])
    assert "No net was measured" in text and "1 unfinished line left out" in text and "device not recorded" in text


BROKEN = {
    "no JSON": ('"kind":"inference"', '"kind" "inference"', "line 3: Expecting ':'"),
    "no row": ("\n", '\n{"loss":1}\n', "line 2: no row with key, case and status"),
    "a missing field": ('"batch":256,', "", "line 3: expected a whole number as 'batch', got nothing"),
    "a time of zero": ('"ms":19.7139', '"ms":0', "peers, eager NHWC: expected a number above 0"),
    "a text for a time": ('"ms":19.7139', '"ms":"fast"', "expected a number as 'ms', got 'fast'"),
    "no objects": ('"skipped":{}', '"skipped":3', "expected an object as 'skipped', got 3"),
    "no kernels": ('"kernels":[[', '"kernels":[[],[', "expected [name, launches, microseconds] per kernel"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    old, new, said = BROKEN[name]
    entry(tmp_path)
    path = tmp_path / "bench.jsonl"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError) as raised:
        page.build([tmp_path])
    assert f"expected a whole result file, got {path}" in str(raised.value) and said in str(raised.value)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value inside JSON, inner ones too."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from leaves(inner, (*path, key))


def test_any_wrong_value_is_refused_or_shown(tmp_path: Path) -> None:
    """No value of a file, whatever it is, ends in an error of the program."""
    part = {"ms": 1.5, "images_per_s": 666.7, "quartiles_ms": [1.4, 1.6], "difference": 0.001, "peak_gib": 0.5}
    net = {
        "status": "measured",
        "net": "resnet18",
        "batch": 1,
        "image": 64,
        "kind": "inference",
        "precision": "float16",
    }
    net |= {"peers": {"eager NHWC": part}, "skipped": {}, "errors": {"a": "b"}, "at": "2026-01-01", "commit": "c"}
    profile = {
        "status": "measured",
        "kind": "profile",
        "of": "training",
        "net": "resnet18",
        "batch": 1,
        "peer": "eager",
    }
    rows = [
        {"case": "inference", **net},
        {"case": "profile", **profile, "kernels": [["gemm", 1, 2.5]]},
        {"case": "ceiling copy", "status": "measured", "value": 3e12, "unit": "B/s"},
        {
            "case": "conv",
            "status": "measured",
            "conv": "c",
            "batch": 1,
            "flops": 1,
            "nbytes": 1,
            "us": {"ours": [1, 2, 3]},
        },
        {"case": "net a", "status": "passed", "rel": 0.1, "ratio": 0.5},
    ]
    rows = [{"key": f"{row['case']} | NVIDIA H100", **row} for row in rows]
    write(tmp_path, rows)
    page.build([tmp_path])
    shown = refused = 0
    for number, row in enumerate(rows):
        for *above, last in list(leaves(row)):
            for wrong in (None, "x", -1, []):
                changed = copy.deepcopy(row)
                inner: Any = changed
                for key in above:
                    inner = inner[key]
                inner[last] = wrong
                write(tmp_path, [*rows[:number], changed, *rows[number + 1 :]])
                try:
                    page.build([tmp_path])
                    shown += 1
                except UserError as error:
                    assert str(tmp_path / "bench.jsonl") in str(error)
                    refused += 1
    assert shown > 50 and refused > 50


@pytest.mark.parametrize("content", [b"{", b"[1,", b"\xff", b'{"a": NaN}'])
@pytest.mark.parametrize("name", ["env.json", "bench.json"])
def test_json_that_is_none_is_refused(content: bytes, name: str, tmp_path: Path) -> None:
    entry(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        page.build([tmp_path])


def test_folders_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which does not exist"):
        page.build([tmp_path / "nothing"])
    (tmp_path / "log.jsonl").write_text('{"kind": "epoch"}\n')
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match="got no result in "):
        page.build([tmp_path])
    entry(tmp_path / "run")
    assert "left out: " in page.build([tmp_path]) and "/log.jsonl" in page.build([tmp_path])


def test_a_run_of_ours_has_ratios_and_errors_and_no_model(tmp_path: Path) -> None:
    rows = entry(tmp_path)
    cell = next(row for row in rows if row["case"] == "inference resnet50 batch 256")
    ours = {"ms": 4.9805, "images_per_s": 51_400.5, "quartiles_ms": [4.9, 5.1], "difference": 0.0021, "peak_gib": 0.5}
    cell["peers"] = {name: part | {"difference": 0.0} for name, part in cell["peers"].items()} | {"resnet_fast": ours}
    cell["skipped"] = {"torch.compile": "no <compiler>"}
    conv = {
        "status": "measured",
        "conv": "r50.layer1.0.conv2",
        "batch": 256,
        "times": 3,
        "flops": 59e9,
        "nbytes": 206e6,
    }
    conv |= {"us": {"ours": [70.0, 71.0, 73.0], "cudnn": [90.0, 91.0, 92.0]}}
    failed = {"status": "failed", "error": "ValueError: <wrong>"}
    net = {"status": "passed", "rel": 0.0031, "ratio": 0.9}
    for case, row in {"conv a batch 256": conv, "training x": failed, "net resnet50 bfloat16": net}.items():
        rows.append({"key": f"{case} | g", "case": case, **row})
    write(tmp_path, rows)
    text = page.build([tmp_path])
    found = [(kind, cells) for kind, cells in Reader(text).rows if len(cells) == 9]
    mine = [cells for kind, cells in found if kind == "ours"]
    assert [cells[2:8] for cells in mine] == [
        ["4.981 (4.900–5.100)", "51,400", "2.00", "–", "2.1e-03 from eager NHWC", "0.50"]
    ]
    assert {cells[0]: cells[5] for kind, cells in found if kind == ""}["eager NHWC"] == "3.96 x as fast"
    assert any(cells[0] == "torch.compile" and cells[8] == "no <compiler>" for _, cells in found)
    assert sum(kind == "ours modelled" for kind, _ in Reader(text).rows) == 7  # not where ours was measured
    assert "resnet_fast, one convolution" in text and "cuDNN, one convolution" in text
    assert "Failed: 1" in text and "ValueError: &lt;wrong&gt;" in text
    assert ["net resnet50 bfloat16", "passed", "3.1e-03", "0.90"] in [cells for _, cells in Reader(text).rows]


def test_what_bench_writes(tmp_path: Path) -> None:
    ran = {"median_ms": 2.0, "q1_ms": 1.5, "q3_ms": 2.5, "images_per_s": 500.0, "ratio": 1.0, "samples": 3}
    rows = [
        InferenceRow("resnet50", "eager-nhwc", "float32", 1, "cpu", True, "float32", error_l2=1e-5, **ran),  # type: ignore[arg-type]
        InferenceRow("resnet50", "resnet_fast", "float32", 1, "cpu", False, "float32", **(ran | {"median_ms": 1.6})),  # type: ignore[arg-type]
        InferenceRow("resnet50", "openvino", "float32", 1, "cpu", False, note="broke <here>"),
    ]
    origin = {"cpu": "A CPU", "threads": 2, "date": "2026-01-02T03:04:05+00:00", "image_size": 224, "torch": "2.14.1"}
    content = report.to_json(BenchReport(rows, {}, origin | {"command": "resnet-fast bench", "commit": "c" * 40}))
    (tmp_path / "bench.json").write_text(content)
    trained = [
        TrainingRow("resnet50", name, "bfloat16", 16, "cpu", name != "resnet_fast", "float32", loss_first=5.0,
                    loss_difference=away, peak_mib=512.0, **{k: v for k, v in ran.items() if k != "samples"})  # type: ignore[arg-type]
        for name, away in (("eager-nhwc", 0.0), ("resnet_fast", 3e-4))
    ]  # fmt: skip
    (tmp_path / "step.json").write_text(report.to_json(BenchReport(trained, {}, origin, TrainingRow)))  # type: ignore[arg-type]
    text = page.build([tmp_path])
    table = [cells for _, cells in Reader(text).rows]
    quartiles = "(1.500–2.500)"
    error = "1.0e-05 of fp64's norm"
    assert ["eager-nhwc", "", f"2.000 {quartiles}", "500", "1.00 (best stock)", "1.25 x as fast", error, ""] in table
    assert ["resnet_fast", "", f"1.600 {quartiles}", "500", "1.25", "–", "not recorded", ""] in table
    assert any(row[0] == "openvino" and row[-1] == "broke <here>" for row in table)
    assert any(row[0] == "resnet_fast" and row[6:8] == ["loss +3.0e-04 from stock's", "0.50"] for row in table)
    assert "A CPU, 2 threads" in text and "commit cccccccccc" in text and "computes in float32" in text


def test_history_begins_with_the_second_date(tmp_path: Path) -> None:
    entry(tmp_path / "first")
    assert "a line needs two" in page.build([tmp_path])
    rows = entry(tmp_path / "second", at="2026-12-24", commit="d" * 40)
    for row in rows:
        for part in row.get("peers", {}).values():
            part["images_per_s"] *= 1.5
    write(tmp_path / "second", rows)
    text = page.build([tmp_path])
    history = text.partition('id="history"')[2].partition("</section>")[0]
    assert history.count('class="chart wide"') == 9 and "38,550" in history and "25,700" in history
    assert "commit dddddddddd" in history and "a line needs two" not in history
    peers = text.partition('id="peers"')[2].partition("</section>")[0]
    assert peers.count("<h4>") == 9 and "38,550" in peers and "25,700" not in peers  # the latest
    # A case that was measured again in the same folder keeps its earlier row.
    again = [row | {"at": "2027-01-01"} for row in rows if row["case"] == "inference resnet50 batch 1"]
    write(tmp_path / "second", rows + again)
    found = results.read([tmp_path])
    assert len(found.earlier) == 1 and page.build([tmp_path]).count("2027-01-01") >= 1


def test_names_of_a_file_are_text_not_markup(tmp_path: Path) -> None:
    rows = entry(tmp_path)
    cell = next(row for row in rows if row.get("kind") == "inference")
    cell["peers"]["<script>alert(1)</script>"] = {"ms": 1.0, "images_per_s": 1.0}
    write(tmp_path, rows)
    text = page.build([tmp_path])
    assert "<script" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::BFloat16, float>", "max-pool"),
        ("_conv_wgrad_kernel", "convolutions"),
        ("block_end_fwd", "ends of blocks"),
        ("void at::native::batch_norm_transform_input_channels_last_kernel<c10::BFloat16>", "BatchNorm"),
        ("multi_tensor_apply_kernel", steps.OTHERS),
        ("Memset (Device)", "copies and fills"),
    ],
)
def test_what_a_kernel_does_is_read_from_its_name(kernel: str, kind: str) -> None:
    assert steps.category(kernel) == kind


def test_each_of_our_kernels_has_a_kind() -> None:
    folder = ROOT / "resnet_fast" / "backends" / "triton"
    names = {
        name for path in folder.rglob("*.py") for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
    }
    assert len(names) > 20 and [name for name in names if steps.category(name) == steps.OTHERS] == []


def test_paths_of_one_step_share_a_picture(tmp_path: Path) -> None:
    rows = entry(tmp_path)
    ours = next(row for row in rows if row.get("kind") == "profile") | {"peer": "resnet_fast, AMP bfloat16"}
    ours |= {
        "case": "profile of ours",
        "kernels": [["_conv_fwd_kernel", 53, 9000.0], ["_block_end_fwd_kernel", 16, 1000.0]],
    }
    write(tmp_path, [*rows, ours])
    part = page.build([tmp_path]).partition('id="steps"')[2].partition("</section>")[0]
    assert part.count('class="stack measured"') == 2 and "stack modelled" not in part  # ours is measured there
    cells = [row for _, row in Reader(part.replace("</section>", "")[part.index("<h3>") :]).rows]
    assert ["convolutions", "resnet_fast, AMP bfloat16 measured", "9.00", "90 %", "53"] in cells


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb``, as WCAG 2 defines it."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_and_marks_stand_out_in_light_and_dark() -> None:
    """WCAG's 4.5 for text; the colours of marks too, because names stand on them in the page's colour."""
    schemes = re.findall(r":root \{(.*?)\}", markup.style(), re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        found = dict(re.findall(r"--(\w+): (#\w{6});", scheme))
        for back in ("page", "panel"):
            for name in ("text", "soft", "link", *(f"c{i}" for i in range(charts.COLOURS))):
                dark, light = sorted((luminance(found[name]), luminance(found[back])))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, back)


def test_axes_have_round_values() -> None:
    assert charts.decades(8, 3000) == [10, 20, 50, 100, 200, 500, 1000, 2000]
    assert charts.decades(0.5, 2e6)[:3] == [1, 10, 100]
    assert charts.even(38550) == [0, 10000, 20000, 30000, 40000] and charts.even(0.7)[-1] >= 0.7
    assert [charts.number(v) for v in (0.5, 2000, 30_000, 2.5e6)] == ["0.5", "2,000", "30k", "2.5M"]


def test_a_device_without_ceilings_has_no_model(tmp_path: Path) -> None:
    entry(tmp_path)
    env = json.loads((tmp_path / "env.json").read_text()) | {"gpu": "A GPU of tomorrow"}
    (tmp_path / "env.json").write_text(json.dumps(env))
    (cell, *_) = results.read([tmp_path]).cells
    assert modelled.ours(cell) is None and modelled.launches(cell) == []
    assert "resnet_fast modelled" not in page.build([tmp_path])


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    for _ in range(2):  # it replaces its own
        assert invoke(cli_report.report, H100, "--out", out).output == f"written: {out}\n"
    assert out.read_text().startswith("<!DOCTYPE html>")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    refused = invoke(cli_report.report, H100, "--out", tmp_path / "mine.html").exception
    assert isinstance(refused, UserError) and "it would be lost" in str(refused)
    assert isinstance(invoke(cli_report.report, tmp_path / "nothing", "--out", out).exception, UserError)


@pytest.mark.slow
def test_charts_and_tables_fit_a_phone_and_a_desktop(tmp_path: Path) -> None:
    """With one entry, and with ours measured on several dates, which draws every picture."""
    for number, at in enumerate(("2026-12-24", "2027-01-01", "2027-02-01")):
        rows = entry(tmp_path / at, at=at)
        for row in rows:
            if row.get("kind") == "inference":
                row["peers"]["resnet_fast, CUDA graph"] = {"ms": 1.0 + number, "images_per_s": row["batch"] * 300.0}
        write(tmp_path / at, rows)
    (tmp_path / "html").mkdir()
    pages = [tmp_path / "html" / name for name in ("one.html", "all.html")]
    pages[0].write_text(page.build([RESULTS, HOST]))
    pages[1].write_text(page.build([tmp_path, HOST]))
    assert browser.faults(browser.layouts(pages, (320, 375, 768, 1440), tmp_path)) == []
