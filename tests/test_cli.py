"""The command line: quick help, sentences instead of tracebacks, exit codes."""

import errno
import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import vla_pruner
from vla_pruner import cli
from vla_pruner.commands.methods import explain


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `vla-pruner try ...` with a body of the test's choosing."""

    def run(body: Callable[[Namespace], int | None], *argv: str) -> int:
        def add_arguments(parser: ArgumentParser) -> None:
            parser.add_argument("--count", type=int, default=1, help="how often")

        entry = cli.Command("a trial", "A trial.", lambda: (add_arguments, body))
        monkeypatch.setitem(cli.COMMANDS, "try", entry)
        return cli.main(argv or ["try"])

    return run


def raising(error: BaseException) -> Callable[[Namespace], int]:
    def body(args: Namespace) -> int:
        raise error

    return body


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)


def test_version_and_help_answer_without_loading_torch() -> None:
    for option in ("--version", "--help"):
        code = (
            "import sys\n"
            "from vla_pruner.cli import main\n"
            f"try: main(['{option}'])\n"
            "except SystemExit as end: print('exit', end.code)\n"
            "print('torch' in sys.modules, 'transformers' in sys.modules)"
        )
        result = python("-c", code)
        assert result.stdout.endswith("exit 0\nFalse False\n"), result.stderr


def test_python_dash_m_is_the_same_command() -> None:
    result = python("-m", "vla_pruner", "--version")
    assert result.stdout == f"vla-pruner {vla_pruner.__version__}\n"
    assert result.returncode == 0


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for name, command in cli.COMMANDS.items():
        assert f"{name} {command.summary}" in shown


@pytest.mark.parametrize(
    "name", ["methods", "models", "bench", "calibrate", "doctor", "demo", "analyze"]
)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert cli.COMMANDS[name].description.split()[0] in capsys.readouterr().out


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands" in capsys.readouterr().err


def test_unknown_commands_and_options_exit_with_2(command: Callable[..., int]) -> None:
    for argv in (["dance"], ["try", "--count", "many"], ["try", "--colour", "red"]):
        with pytest.raises(SystemExit) as end:
            command(lambda args: 0, *argv)
        assert end.value.code == 2


def test_a_command_gets_its_arguments_and_decides_the_exit_code(
    command: Callable[..., int],
) -> None:
    assert command(lambda args: args.count, "try", "--count", "3") == 3
    assert command(lambda args: None) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("keep=300 asks for too much"), 2),
        (FileNotFoundError("no folder here"), 2),
        (RuntimeError("the GPU went away"), 1),
        (OSError("disk full"), 1),
        (ZeroDivisionError("division by zero"), 1),
    ],
)
def test_errors_are_one_sentence_without_a_traceback(
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
) -> None:
    assert command(raising(error)) == code
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert str(error) in shown
    assert "Traceback" not in shown


def test_what_the_system_says_of_a_file_becomes_a_sentence(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    attempts: dict[str, Callable[[], Any]] = {
        "is in the way; name a folder": lambda: (tmp_path / "file").mkdir(),
        "leads through a file": lambda: (tmp_path / "file" / "x").mkdir(),
        "is a folder; name a file": lambda: tmp_path.read_text(),
        "does not exist": lambda: (tmp_path / "missing").read_text(),
    }
    for said, attempt in attempts.items():
        assert command(lambda args, attempt=attempt: attempt()) == 2
        shown = capsys.readouterr().err
        assert said in shown and str(tmp_path) in shown and "Errno" not in shown
    full = OSError(errno.ENOSPC, "No space left on device", "rows.sqlite")
    assert command(raising(full)) == 1
    assert capsys.readouterr().err == "error: rows.sqlite: No space left on device\n"


@pytest.mark.parametrize("argv", [["--debug", "try"], ["try", "--debug"]])
def test_debug_shows_the_traceback_before_or_after_the_command(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert command(raising(ValueError("bad")), *argv) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: bad\n")


def test_ctrl_c_exits_with_130(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_missing_package_names_the_extra_that_brings_it(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ModuleNotFoundError("No module named 'mujoco'", name="mujoco.egl")
    assert command(raising(missing)) == 1
    assert "pip install 'vla-pruner[sim]'" in capsys.readouterr().err


BARE = """
import contextlib, io, json, sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
from vla_pruner.cli import main
for words in {commands!r}:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    print(json.dumps([code, said.getvalue()]))
"""
SWEEP = "policies: [mini-oft]\nsuites: [robosuite_pickplace]\nmethods: [none]\n"
NEEDS = {
    ("demo",): r"vla-pruner\[sim\]",
    ("analyze",): r"vla-pruner\[sim\]",
    ("eval", "--out", "run"): r"vla-pruner\[sim\]",
    ("sweep", "sweep.yaml", "--out", "run"): r"vla-pruner\[sim\]",
    ("calibrate", "vtw", "--episodes", "1"): r"vla-pruner\[sim\]",
    ("eval", "--out", "run", "--video", "1"): r"vla-pruner\[sim\]",
    ("serve", "--policy", "mini-oft"): r"vla-pruner\[serve\]",
    ("serve", "--protocol", "openpi:0"): r"vla-pruner\[doors\]",
    ("serve", "--protocol", "act:0"): r"vla-pruner\[doors\]",
    ("serve", "--protocol", "gr00t:0"): r"vla-pruner\[doors\]",
    ("tune", "--out", "tuned"): r"vla-pruner\[sim\]",
    ("analyze", "--episodes", "1"): r"vla-pruner\[sim\]",
    ("eval", "--out", "run", "--suite", "libero_goal"): r"make libero",
    ("methods",): None,
    ("models",): None,
    ("doctor", "mini-oft"): None,
}
"""Commands, and what the sentence names that ends them; None: they work."""


def test_an_install_without_extras_works_or_names_the_extra(tmp_path: Path) -> None:
    """What the wheel alone brings: the packages of all extras cannot be imported."""
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    commands = [list(words) for words in NEEDS]
    extra = set(cli.EXTRA_OF) - {"h11"}  # which newer clients of the hub bring along
    script = BARE.format(packages=extra, commands=commands)
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    for (words, named), (code, said) in zip(NEEDS.items(), answers, strict=True):
        assert (code == 0) == (named is None), (words, said)
        assert named is None or re.search(f"^error: .*{named}", said, re.M), (words, said)
    assert not (tmp_path / "run").exists()


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert {"none", "random", "fastv", "vla-pruner", "vla-pruner-release"} <= set(shown.split())


def test_methods_shows_the_options_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "vla-pruner"]) == 0
    shown = capsys.readouterr().out
    for option, default in {"keep": "0.25", "gamma": "0.8", "window": "3"}.items():
        assert option in shown
        assert default in shown


@pytest.mark.parametrize("name", list(vla_pruner.list_methods()))
def test_every_option_of_a_method_is_explained(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = vla_pruner.list_methods()[name]
    explained = explain(method)
    options = [field.name for field in fields(method) if field.init]
    assert {
        option: explained.get(option, "") for option in options if not explained.get(option)
    } == {}
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["methods", name]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in options:
        assert explained[option][:30] in shown, option


def test_an_unknown_method_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "vla-prune"]) == 2
    assert "fastv" in capsys.readouterr().err


def test_models_lists_the_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    assert "openvla" in capsys.readouterr().out
