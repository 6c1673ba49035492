"""The command table: lazy, tolerant, and its errors are one line with an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer

from resnet_fast._version import __version__
from resnet_fast.cli import main as cli
from resnet_fast.errors import BackendError, UserError
from tests.support.processes import run_python


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Register a function as the command ``probe``."""

    def register(function: Callable[..., None]) -> None:
        module = types.ModuleType("resnet_fast_test_command")
        module.probe = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "probe", f"{module.__name__}:probe")

    return register


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"resnet-fast {name}" in out
    assert "Not available" not in out


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if name not in out] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"resnet-fast {__version__}\n"


HELP = """
import sys
from resnet_fast.cli.main import COMMANDS, main
heavy = {"torch", "torchvision", "matplotlib", "timm", "numpy", "PIL", "triton"}
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
    code = main(arguments)
    loaded = heavy & set(sys.modules)
    if code or loaded:
        sys.exit(f"{arguments}: code {code}, imported {loaded}")
"""


def test_no_help_text_imports_torch() -> None:
    """Slow imports happen when a command runs, not when its help is printed."""
    done = run_python(HELP)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "nonsense"),
        (["benhc"], "did you mean bench?"),
        (["--nonsense"], "--nonsense"),
        (["--verison"], "did you mean --version?"),
        (["env", "--nonsense"], "resnet-fast env --help"),
        (["bench", "--bacth", "1"], "got --bacth; did you mean --batch?"),
        (["explain", "resnet18", "--jsn"], "did you mean --json?"),
        (["tune", "resnet18", "--dtype", "bloat16"], "did you mean bfloat16"),
        (["bench", "--batch"], "'resnet-fast bench --help' describes"),
        (["train", "--out", "", "--steps", "1"], "expected something after --out, got an empty text; give a value"),
        (["train", "--out=", "--steps", "1"], "expected something after --out, got an empty text"),
        (["predict", "", "--weights", "w.pth"], "expected something after predict, got an empty text"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert said in one_line(capsys.readouterr().err)


def test_a_bad_value_of_the_debug_switch_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RESNET_FAST_DEBUG", "yes")
    assert cli.main(["models"]) == 2
    assert "RESNET_FAST_DEBUG to be one of 0, 1" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a name", "'x'", "use a name"), 2, "resnet-fast: expected a name, got 'x'; use a name\n"),
        (BackendError("no\nsuch backend"), 2, "resnet-fast: no such backend\n"),
        (TypeError("wrong"), 1, "TypeError: wrong"),
        (FileNotFoundError(2, "No such file", "a.png"), 2, "expected files that can be read and written, got No such"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "got No space left on device; free some space"),
        (PermissionError(errno.EROFS, "Read-only file system", "out/x"), 2, "got Read-only file system: out/x"),
        (ModuleNotFoundError("none", name="torch.nn"), 2, "expected torch, which resnet-fast probe needs, got no such"),
        (ModuleNotFoundError("none", name="resnet_fast.gone"), 1, "an error in resnet-fast itself"),
        (OSError("odd"), 1, "OSError: odd; an error in resnet-fast itself"),
        (MemoryError(), 2, "expected enough memory, got MemoryError; use a smaller net"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "got CUDA out of memory. Tried"),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), 2, "expected enough memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1, "shapes cannot be multiplied; an error in"),
    ],
)
def test_error_of_a_command(
    error: Exception, code: int, said: str, command: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    def probe() -> None:
        raise error

    command(probe)
    assert cli.main(["probe"]) == code
    assert said in one_line(capsys.readouterr().err)


def test_debug_switch_shows_the_traceback(
    command: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe() -> None:
        raise UserError("a", "b", "c")

    command(probe)
    monkeypatch.setenv("RESNET_FAST_DEBUG", "1")
    assert cli.main(["probe"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("RESNET_FAST_DEBUG", "perhaps")
    assert cli.main(["probe"]) == 2
    assert "RESNET_FAST_DEBUG" in capsys.readouterr().err


def test_interrupt_is_quiet(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    def probe() -> None:
        raise KeyboardInterrupt

    command(probe)
    assert cli.main(["probe"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_exit_code_of_a_command_is_kept(command: Callable) -> None:
    def probe() -> None:
        raise typer.Exit(3)

    command(probe)
    assert cli.main(["probe"]) == 3


def test_broken_command_leaves_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "broken", "resnet_fast.cli.no_such_file:broken")
    assert cli.main(["--help"]) == 0
    assert "Not available" in capsys.readouterr().out
    assert cli.main(["broken"]) == 2
    assert "no_such_file" in one_line(capsys.readouterr().err)
    assert cli.main(["env", "--help"]) == 0


def test_env_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["resnet_fast"] == __version__
    assert cli.main(["env"]) == 0
    assert "backends" in capsys.readouterr().out.splitlines()


def test_memory_names_the_options_that_the_command_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Makes a real allocation that fails on every machine, where the system does not report its memory."""
    monkeypatch.setattr("resnet_fast.limits.available_memory", lambda: None)
    assert cli.main(["explain", "resnet18", "--batch", "1000000", "--image", "16000"]) == 2
    assert one_line(capsys.readouterr().err).endswith("lower --batch or --image\n")


@contextlib.contextmanager
def terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.BytesIO]:
    """Return stdout and stderr as one stream of bytes in that encoding."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    yield written
    stream.flush()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_text_fits_every_encoding(encoding: str, command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        """Print a dash — and more."""
        print("a — b … 3×3 é │─┼ ≤ 名 \udc80")

    command(probe)
    with terminal(encoding, monkeypatch) as written:
        assert cli.main(["probe"]) == 0
        assert cli.main(["probe", "--help"]) == 0
    text = written.getvalue().decode(encoding)
    if encoding == "ascii":
        assert text.startswith("a - b ... 3x3 e |-+ <= \\u540d \\udc80\n") and "a dash - and more" in text
    if encoding == "utf-8":
        assert text.startswith("a — b … 3×3 é │─┼ ≤ 名 \\udc80\n")


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_in_ascii(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal("ascii", monkeypatch) as written:
        assert cli.main([name, "--help"]) == 0
    assert name in written.getvalue().decode("ascii")


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams_are_the_null_device(closed: tuple[int, ...], tmp_path: Path) -> None:
    """Nothing is printed into a file that reuses a closed stream's number, nor to stdout instead of stderr."""
    shell = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
    plot = tmp_path / "out.png"
    line = f'"{sys.executable}" -m resnet_fast.cli.main "$@" {shell}'
    for arguments, code in ((["roofline", "cifar_resnet20", "--plot", str(plot)], 0), (["nonsense"], 2)):
        done = subprocess.run(["sh", "-c", line, "sh", *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert 1 not in closed or not done.stdout
        assert 2 not in closed or (not done.stderr and "expected" not in done.stdout)
        assert "itself" not in done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from resnet_fast.cli.main import main; sys.exit(main(['summary']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_variables_that_are_no_switch_are_named(
    command: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(lambda: None)
    monkeypatch.setenv("RESNET_FAST_BACKND", "onednn")
    assert cli.main(["probe"]) == 0
    assert "RESNET_FAST_BACKND, which is no switch; did you mean RESNET_FAST_BACKEND?" in one_line(
        capsys.readouterr().err
    )
    monkeypatch.delenv("RESNET_FAST_BACKND")
    monkeypatch.setenv("RESNET_FAST_STRICT", "yes")
    assert cli.main(["probe"]) == 2
    assert "expected RESNET_FAST_STRICT to be one of 0, 1, got 'yes'" in one_line(capsys.readouterr().err)
    assert cli.main(["env"]) == 0
    assert "RESNET_FAST_STRICT to be one of 0, 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_option_tells_its_default(name: str) -> None:
    """Each option shows its default value or a sentence about its absence; a flag needs neither."""
    group = typer.main.get_command(cli.app)
    silent = []
    for option in group.get_command(None, name).params:  # type: ignore[attr-defined]
        shown = option.default not in (None, [], ()) or option.required
        text = f"{option.help} {getattr(option, 'rich_help_panel', '')}"
        told = any(word in text for word in ("default", "repeatable", "Write ", "Draw "))
        if not (shown or told or option.param_type_name == "argument"):
            silent.append(option.opts[0])
    assert not silent
