"""The pages are right: code runs, commands parse, links and files exist."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
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


def fences(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield every fenced block as CommonMark has it: what stands before the fence, the fence, the text behind it."""
    opened: tuple[str, str, str] | None = None
    for line in text.splitlines():
        found = re.match(r"([ \t>*+-]*)(`{3,}|~{3,})(.*)$", line)
        if found and opened is None:
            opened = (found[1], found[2], found[3].strip())
            yield opened
        elif found and opened and found[2].startswith(opened[1]) and not found[3].strip():
            opened = None
    assert opened is None, "a block without an end"


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def quoted(page: Path) -> list[str]:
    """Return the text between backticks outside code blocks."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


def shell_lines(page: Path) -> list[str]:
    """Return the lines of the page's commands, a continued one joined, without comments."""
    joined = (re.sub(r"\\\n\s*", " ", body) for body in blocks(page, "bash"))
    return [line for body in joined for line in (re.sub(r"(^|\s+)#.*", "", raw) for raw in body.splitlines()) if line]


def commands(page: Path) -> Iterator[str]:
    """Return the arguments of every command line of the program, in code blocks and in text."""
    for line in [*shell_lines(page), *quoted(page)]:
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


@pages
def test_no_block_escapes(page: Path) -> None:
    """Each block is one that the tests see: Python, which runs; commands, which run or have a reason; or plain text."""
    content = page.read_text(encoding="utf-8")
    assert {fence for fence in fences(content)} <= {("", "```", kind) for kind in ("python", "bash", "text")}
    assert [kind for _, _, kind in fences(content)] == [kind for kind, _ in FENCE.findall(content)]


@pytest.mark.parametrize(
    "block",
    [
        "```\na\n```", "```py\na\n```", "~~~python\na\n~~~", "- ```python\n  a\n  ```", "> ```bash\n> a\n> ```",
        "```sh\na\n```", "````python\na\n````", "```python x=1\na\n```", "```{code-block} python\na\n```",
        "```python\na\n````\n```text\nb\n```",
    ],
)  # fmt: skip
def test_check_of_blocks_can_fail(block: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"# A\n\n{block}\n")
    with pytest.raises(AssertionError):
        test_no_block_escapes(tmp_path / "page.md")


@pages
def test_a_command_runs_or_has_a_reason(page: Path) -> None:
    """A command without a reason is one of the program, which test_commands_of_a_page_run runs."""
    for line in shell_lines(page):
        assert len(doc_examples.reasons(line)) == (0 if runs(line) else 1), line
        for module in re.findall(r"-m (resnet_fast[\w.]*)", line):
            assert importlib.util.find_spec(module), line
        assert [word for word in re.findall(r"\btests/[\w/.]+", line) if not (ROOT / word).exists()] == []


def runs(line: str) -> bool:
    return line.startswith("resnet-fast ") and not doc_examples.reasons(line)


def test_every_reason_has_a_command() -> None:
    lines = [line for page in PAGES for line in shell_lines(page)]
    assert [p for p in doc_examples.NOT_RUN if not any(re.fullmatch(p, line) for line in lines)] == []
    assert set(doc_examples.FILES) <= {name(page) for page in PAGES if any(map(runs, shell_lines(page)))}


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs each command of each page once, in an empty folder, or in one with the files that the page speaks of."""
    monkeypatch.setenv(flags.CACHE, str(tmp_path / "cache"))
    seen: set[str] = set()
    for page in PAGES:
        lines = [line for line in dict.fromkeys(shell_lines(page)) if runs(line) and line not in seen]
        seen.update(lines)
        folder = tmp_path / name(page).replace("/", "-")
        folder.mkdir()
        monkeypatch.chdir(folder)
        if lines and name(page) in doc_examples.FILES:
            doc_examples.FILES[name(page)]()
        for line in lines:
            capsys.readouterr()
            code = cli.main(shlex.split(line)[1:])
            said = capsys.readouterr()
            assert code == 0 and (said.out + said.err).strip(), f"{line}: {said.err}"
    assert len(seen) >= 8


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


LINK = re.compile(r"\]\(([^)\s]+)\)")
EXTERNAL = re.compile(
    r"https://(?!localhost)[a-z0-9-]+(\.[a-z0-9-]+)+(:\d+)?(/[\w./~%+@=-]*)?(\?[\w=&%.+-]+)?(#[\w/.=-]+)?"
)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """Follows links and pictures to files and anchors; of an address elsewhere only the form is checked.

    Other ways to write a link, which would not be followed, are refused.
    """
    text = prose(page)
    plain = re.sub(r"`[^`]*`", "", text)
    assert text.count("](") == len(LINK.findall(text)), "a link with a title or a blank"
    assert not re.search(r"^\s*\[[^\]]+\]:\s|\]\[|<a\b|<img\b|<https?:", plain, re.MULTILINE), (
        "another way to write a link"
    )
    for link in LINK.findall(text):
        if ":" in link:
            assert EXTERNAL.fullmatch(link), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(
    "link",
    ["nothing.md", "#twice-2", "#shell", "nothing.png", "http://a.org", "https://a", "https://a.org/b,", "ftp://a.org"],
)
def test_check_of_links_can_fail(link: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Twice\n## `Twice`\n[a](#twice) [b](page.md#twice-1)\n```\n# shell\n```\n")
    test_links_lead_somewhere(page)
    page.write_text(page.read_text() + f"[c]({link})\n")
    with pytest.raises(AssertionError, match=re.escape(link)):
        test_links_lead_somewhere(page)


@pytest.mark.parametrize("text", ['[a](page.md "x")', "[a][b]", "[b]: page.md", '<a href="x">a</a>', "<https://a.org>"])
def test_a_link_that_nobody_follows_is_refused(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A\n{text}\n")
    with pytest.raises(AssertionError, match=r"a link with|another way"):
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
    for line in [*shell_lines(page), *quoted(page)]:
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
        lines = [line for line in shell_lines(page) if "scikit-build-core" in line]
        assert [set(shlex.split(line)[2:]) for line in lines] == [tools | {"torch"}]


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
