"""The pages are right: code runs, commands parse, links and files exist."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import resnet_fast
from resnet_fast import flags
from resnet_fast.cli import main as cli
from tests.support import ROOT, doc_examples

GUIDES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [*GUIDES, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(?:\$ )?(?:torchrun\b.* -m resnet_fast\.cli\.main|resnet-fast)(?= |$)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def quoted(page: Path) -> list[str]:
    """Return the text between backticks outside code blocks."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> Iterator[str]:
    """Return the arguments of every command line of the program, in code blocks and in text."""
    lines = [line for body in blocks(page, "") for line in re.sub(r"\\\n\s*", " ", body).splitlines()]
    for line in [*lines, *quoted(page)]:
        if (found := PROGRAM.match(line)) and not re.search(r"resnet-fast: ", line):
            yield line[found.end() :]


def unknown_command(arguments: str) -> str:
    """Return the error of the command line for these arguments, empty if they are valid. Nothing is run."""
    given = [word for word in shlex.split(arguments, comments=True) if word not in ("…", "NET")]
    if not given or given[0].startswith("-"):
        given = given or ["--help"]
    group = typer.main.get_command(cli.app)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            context = group.make_context("resnet-fast", list(given))
            words = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
            if words:
                command = group.get_command(context, words[0])  # type: ignore[attr-defined]
                if command is None:
                    return f"no command {words[0]}"
                command.make_context(words[0], list(words[1:]), parent=context)
    except Exception as error:
        if type(error).__name__ in ("Exit", "NoArgsIsHelpError"):
            return ""
        if "Missing" in str(error) and len(given) == 1:  # the command's name in a text
            return ""
        return f"{type(error).__name__}: {error}"
    return ""


def exists(path: str, page: Path) -> bool:
    """Return whether the path exists, from the page, the root, the package, or one of the kernels' folders."""
    places = [
        page.parent,
        ROOT,
        ROOT / "resnet_fast",
        ROOT / "csrc" / "kernels" / "include" / "resnet_fast",
        ROOT / "docs",
    ]
    return any((place / path).exists() for place in places)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.slow
def test_readme_code_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(ROOT / "README.md", "python")
    assert code and "import torch, torchvision, resnet_fast" in code[0]
    shown: dict[str, object] = {}
    for body in code:
        exec(compile(body, "README.md", "exec"), shown)
    assert tuple(shown["logits"].shape) == (4, 1000)  # type: ignore[attr-defined]
    assert "layer1.0" in capsys.readouterr().out


@pages
def test_code_compiles_and_names_what_the_package_has(page: Path) -> None:
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "resnet_fast":
                assert hasattr(resnet_fast, node.attr), node.attr


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "README.md" and blocks(page, "python")], ids=name
)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every block, apart from those that say what they need and what is not here."""
    monkeypatch.chdir(tmp_path)
    code = blocks(page, "python")
    lacking = {need for body in code if (need := doc_examples.needs(body)) if not doc_examples.is_here(need)}
    code = [body for body in code if doc_examples.needs(body) not in lacking]
    if code:
        doc_examples.run(name(page), code)
    if lacking:
        pytest.skip(f"{len(code)} blocks ran, the others need {', '.join(sorted(lacking))}")


def test_what_a_block_may_need() -> None:
    """A reason not to run a block is one of few: no page leaves the test by a comment of its own."""
    said = {doc_examples.needs(body) for page in PAGES for body in blocks(page, "python")} - {""}
    assert said <= {doc_examples.GPU, doc_examples.GPU_AND_NETWORK}
    assert set(doc_examples.GIVEN) <= {name(page) for page in PAGES if blocks(page, "python")}


def test_every_public_name_is_described() -> None:
    described = set(re.findall(r"\w+", " ".join(quoted(ROOT / "docs" / "api.md"))))
    assert set(resnet_fast.__all__) - described == set()


@pages
def test_public_names_in_text_exist(page: Path) -> None:
    for text in quoted(page):
        for attribute in re.findall(r"\bresnet_fast\.(\w+)\(", text):
            assert hasattr(resnet_fast, attribute), text


@pages
def test_command_lines_parse(page: Path) -> None:
    wrong = {line: said for line in commands(page) if (said := unknown_command(line))}
    assert wrong == {}


def test_command_line_check_can_fail() -> None:
    assert unknown_command(" bench --nonsense") and unknown_command(" nonsense")
    assert unknown_command(" bench --batch") and unknown_command(" explain resnet18 resnet34")
    assert not unknown_command(" bench --batch 1,16 --dtype float32,bfloat16")
    assert len(list(commands(ROOT / "docs" / "cli.md"))) > 10 and len(list(commands(ROOT / "README.md"))) > 4


def test_every_command_is_described() -> None:
    described = {shlex.split(line, comments=True)[0] for line in commands(ROOT / "docs" / "cli.md") if line.strip()}
    assert set(cli.COMMANDS) <= described


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them: the second of a name ends in -1."""
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-")
        seen[slug] += 1
    return {slug if at == 0 else f"{slug}-{at}" for slug, count in seen.items() for at in range(count)}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """Follows links and pictures, to files and to anchors."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("link", ["nothing.md", "#twice-2", "#shell", "nothing.png"])
def test_check_of_links_can_fail(link: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Twice\n## `Twice`\n[a](#twice) [b](page.md#twice-1)\n```\n# shell\n```\n")
    test_links_lead_somewhere(page)
    page.write_text(page.read_text() + f"[c]({link})\n")
    with pytest.raises(AssertionError, match=re.escape(link)):
        test_links_lead_somewhere(page)


@pages
def test_files_named_in_text_exist(page: Path) -> None:
    """Checks every backticked path that starts with a folder or file of the repository or the package."""
    tops = {path.name for path in (*ROOT.iterdir(), *(ROOT / "resnet_fast").iterdir())} - {"build", "dist", "out"}
    for text in quoted(page):
        path = text.partition(":")[0]
        if re.fullmatch(r"[\w.-]+(/[\w.-]*)+", path) and path.partition("/")[0] in tops and "NAME" not in path:
            assert exists(path, page), text


def test_check_of_files_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`blocks/stem.py: segments`, `tests/models/`, `train/CLASS/x`\n```\n`tests/nothing.py`\n```\n")
    test_files_named_in_text_exist(page)
    page.write_text("`tests/nothing.py`\n")
    with pytest.raises(AssertionError, match=r"tests/nothing\.py"):
        test_files_named_in_text_exist(page)


@pages
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+)(?= .*:|:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    targets |= set(phony.split()[1:])
    lines = [line for body in blocks(page, "") for line in body.splitlines()]
    for line in [*lines, *quoted(page)]:
        if found := re.match(r"make ([\w-]+)", line):
            assert found[1] in targets, line


@pages
def test_switches_exist(page: Path) -> None:
    known = {flag.name for flag in flags.ALL} | {flags.CACHE, flags.LIBRARY}
    known |= set(re.findall(r"RESNET_FAST_\w+", (ROOT / "setup.py").read_text()))
    for switch in re.findall(r"RESNET_FAST_[A-Z_0-9]+\b", page.read_text(encoding="utf-8")):
        assert switch in known or switch == "RESNET_FAST_BUILD_", switch


def test_every_switch_is_described() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [flag.name for flag in flags.ALL if f"`{flag.name}`" not in text] == []


def test_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)]+)\)", prose(index))}
    own = [path for path in (ROOT / "docs").rglob("*.md") if path != index and path.parent.name != "experiments"]
    assert [name(path) for path in own if path.resolve() not in linked] == []


def test_install_page_names_the_build_tools() -> None:
    makefile = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("BUILD_TOOLS"))
    tools = set(shlex.split(makefile.partition(":=")[2]))
    for page in (ROOT / "README.md", ROOT / "docs" / "install.md"):
        lines = [line for body in blocks(page, "") for line in body.splitlines() if "scikit-build-core" in line]
        assert [set(shlex.split(line)[2:]) for line in lines] == [tools]


def test_figures_of_the_readme_are_labelled() -> None:
    table = prose(ROOT / "README.md").partition("| ResNet-50, 224x224 |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 5
    assert [
        row for row in table if not re.search(r"measured|counted|modelled", row.rstrip("| ").rpartition("|")[2])
    ] == []


def test_pages_that_code_names_exist() -> None:
    named = re.compile(r"\bdocs/[\w/.-]+\.(?:md|json|png)")
    kinds = {".py", ".cu", ".h", ".cpp", ".txt", ".yaml", ".toml"}
    folders = [ROOT / folder for folder in ("resnet_fast", "benchmarks", "csrc", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds] + [ROOT / "setup.py"]
    wanted = {page for path in files for page in named.findall(path.read_text(encoding="utf-8"))}
    assert len(wanted) > 5 and [page for page in wanted if not (ROOT / page).exists()] == []
