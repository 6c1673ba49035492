"""The command table: lazy, tolerant, and its errors are one line with an exit code."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from resnet_fast._version import __version__
from resnet_fast.cli import main as cli
from resnet_fast.errors import BackendError, UserError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Registers a function as the command ``probe``."""

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
    """What takes seconds to import is imported when a command runs, not when it is described."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nonsense"], "nonsense"), (["--nonsense"], "--nonsense"), (["env", "--nonsense"], "resnet-fast env --help")],
)
def test_wrong_command_line_is_one_line_and_exit_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert said in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a name", "'x'", "use a name"), 2, "resnet-fast: expected a name, got 'x'; use a name\n"),
        (BackendError("no\nsuch backend"), 2, "resnet-fast: no such backend\n"),
        (TypeError("wrong"), 1, "TypeError: wrong"),
        (FileNotFoundError(2, "No such file", "a.png"), 1, "a.png"),
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
    import typer

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
