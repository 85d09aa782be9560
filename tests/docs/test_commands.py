"""Every command that the documentation prints is run in a short form: up to the first episode.

Policies are loaded, methods attached, recipes found, suites checked against policies, files read.
What then takes long is left out. A simulator that is not installed is stood in for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vla_pruner import cli
from vla_pruner.commands import analyze, bench, calibrate, demo, doctor, realtime, serve, tune
from vla_pruner.commands.runs import latency, report, running, watch
from vla_pruner.runs import execute
from vla_pruner.scenes.suites import PICK_PLACE, SUITES, open_suite, pick_place

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "experiments").rglob("*.md"),
        *(ROOT / "examples").glob("*.md"),
        *(ROOT / "clients").rglob("*.md"),
        *(ROOT / "packages").rglob("*.md"),
        *(ROOT / "src" / "vla_pruner" / "reference").rglob("*.md"),
    ]
)
WORD = re.compile(r"(?:VLA_\w+=\S+ )?vla-pruner ([a-z]+)\b(.*)", re.DOTALL)


def printed(page: Path) -> Iterator[str]:
    """Commands of a page: the lines of its shell blocks, and what stands in backticks."""
    text = page.read_text("utf-8")
    for block in re.findall(r"^ *```(?:bash|sh)?\n(.*?)^ *```$", text, flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.strip().partition("   #")[0].rstrip("& ").removeprefix("$ ")
    spans = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", spans))


def is_whole(command: str) -> bool:
    """Whether it is a command to type, not the name of one or a part of one."""
    found = WORD.fullmatch(command)
    parts = "..." in command or "|" in command  # alternatives, to choose from
    return found is not None and bool(found[2].strip()) and not parts


COMMANDS = sorted(
    {
        (str(page.relative_to(ROOT)), command)
        for page in PAGES
        for command in printed(page)
        if is_whole(command)
    }
)


class Reached(Exception):
    """The command would now do what takes long."""


def reach(*_: Any, **__: Any) -> Any:
    raise Reached


class NoEpisodes:
    """Runs nothing."""

    workers, device = 1, "cpu"

    def run(self, jobs: Any) -> Iterator[Any]:
        return iter(())


def stand_in(name: str) -> Any:
    """A suite, or one of its shape where its simulator is not installed."""
    if name.partition("+")[0] == PICK_PLACE:
        return open_suite(name)
    if name not in SUITES:
        raise ValueError(f"the documentation names a suite {name!r}, which there is not")
    suite = pick_place()
    return dataclasses.replace(suite, name=name, seeds=range(500), tasks=("task",) * 10)


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Runs a command in a folder of its own; returns how far it came."""
    if importlib.util.find_spec("robosuite") is None:
        pytest.skip("needs the extra sim")
    for name in ("experiments", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "clients" / "python" / "src"))
    monkeypatch.setattr(execute, "open_suite", stand_in)
    monkeypatch.setattr(demo, "open_suite", stand_in)
    monkeypatch.setattr(analyze, "open_suite", stand_in)
    monkeypatch.setattr(running, "open_executor", lambda args: NoEpisodes())
    monkeypatch.setattr(bench, "build_workload", reach)
    monkeypatch.setattr(demo.EpisodeRunner, "run", reach)
    monkeypatch.setattr(analyze, "trace", reach)
    monkeypatch.setattr(calibrate, "_record", reach)
    monkeypatch.setattr(calibrate, "read_observations", reach)
    # What these read was written by commands that were not really run.
    monkeypatch.setattr(latency, "Store", reach)
    monkeypatch.setattr(report, "read_runs", reach)
    monkeypatch.setattr(watch, "read_runs", reach)
    monkeypatch.setattr(doctor, "load_receipt", reach)
    monkeypatch.setattr(tune, "record_source", reach)
    monkeypatch.setattr(tune, "open_source", reach)
    monkeypatch.setattr(report.identical, "compare_runs", reach)
    monkeypatch.setattr(serve, "check_free", lambda doors: None)  # others may listen there
    monkeypatch.setattr(serve, "opened", reach)
    monkeypatch.setattr(realtime, "_trials", reach)
    monkeypatch.syspath_prepend(ROOT / "clients" / "python" / "src")

    def run(command: str) -> str:
        words = shlex.split(command.partition("vla-pruner ")[2])
        parser = cli.build_parser(words[0])
        args = parser.parse_args(words)
        try:
            return f"done: {args.run(args)}"
        except Reached:
            return "reached"

    return run


def test_the_pages_print_commands() -> None:
    assert len(COMMANDS) > 40
    words = {WORD.fullmatch(command)[1] for _, command in COMMANDS}  # type: ignore[index]
    assert words >= {"eval", "sweep", "report", "latency", "bench", "calibrate", "serve", "analyze"}
    assert ("docs/results.md", "vla-pruner bench --repeats 7") in COMMANDS


def test_words_that_the_pages_name_exist() -> None:
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        for command in printed(page):
            if (found := WORD.fullmatch(command)) is not None:
                assert found[1] in cli.COMMANDS, f"{page.name}: {command}"


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_printed_command_runs(page: str, command: str, follow: Callable[[str], str]) -> None:
    word = WORD.fullmatch(command)[1]  # type: ignore[index]
    if "--help" in command:
        with pytest.raises(SystemExit) as end:
            follow(command)
        assert end.value.code == 0
        return
    if word == "doctor" or re.search(r"--policy (\S+/|POLICY|FOLDER)", command):
        cli.build_parser(word).parse_args(shlex.split(command)[1:])  # a model of the reader's
        return
    if page == "docs/evaluating.md" and "sweep.yaml" in command:
        text = (ROOT / page).read_text("utf-8")
        (matrix,) = re.findall(r"^```yaml\n# sweep\.yaml\n(.*?)^```", text, flags=re.M | re.S)
        Path("sweep.yaml").write_text(matrix.replace("[mini-oft]", "[mini-oft, mini-openvla]", 1))
    command = command.replace("--device cuda", "--device cpu")  # whatever is here
    if "prompt-top" in command:
        pytest.skip("a method of that page, which test_pages.py installs")
    command = command.replace("CONDITION", "fastv@0.5")
    if folder := re.search(r"--observations (OBSERVATIONS|DATASET)", command):
        Path(folder[1]).mkdir()  # of the reader's; here it is never opened
        Path(folder[1], "episode.npz").touch()
    assert follow(command) in ("reached", "done: 0")


PYTHON = re.compile(
    r"(?:\w+=\S+ )*(?:\S*/)?python3? (?:-m (vla_pruner[\w.]*)|(\w+/[\w/]+\.py))(.*)"
)


def test_scripts_that_the_pages_name_know_what_they_are_told() -> None:
    """Files are there, and so is every option and word of the command line of the reference."""
    found = 0
    for page in PAGES:
        if page.name in ("CHANGELOG.md", "log.md"):  # What was run then.
            continue
        for command in printed(page):
            if (match := PYTHON.match(command)) is None:
                continue
            found += 1
            module, script, rest = match.groups()
            file = ROOT / script if script else ROOT / "src" / module.replace(".", "/")
            file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
            assert file.is_file(), f"{page.name}: {command}"
            source = file.read_text("utf-8")
            for option in re.findall(r"(?<=\s)--[a-z][\w-]*", rest):
                assert f'"{option}"' in source, f"{page.name}: {command}: {option}"
            if module == "vla_pruner.reference" and rest.split() and "|" not in rest:
                assert f'add_parser("{rest.split()[0]}"' in source, f"{page.name}: {command}"
    assert found > 20


def test_targets_that_the_pages_name_are_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M)
    named = {
        (page.name, target)
        for page in PAGES
        for command in printed(page)
        for target in re.findall(r"^make ([a-z-]+)", command)
    }
    assert len(named) > 15
    assert [one for one in named if one[1] not in targets] == []


def test_a_folder_with_a_space_is_printed_as_a_shell_reads_it() -> None:
    for command in ("watch", "latency", "running", "report"):
        file = ROOT / "src" / "vla_pruner" / "commands" / "runs" / f"{command}.py"
        source = file.read_text("utf-8")
        assert re.findall(r"vla-pruner (?:report|watch) \{(?!shlex\.quote)", source) == []
        assert "shlex.quote" in source
