"""`vla-pruner eval` and `sweep`: what they take, what they say while they run and at the end."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from toy_task import save_policy, tiny_policy, toy_task
from vla_pruner.cli import main
from vla_pruner.commands.runs import eval as eval_command
from vla_pruner.commands.shared.progress import Lines, RunProgress, progress_bar
from vla_pruner.episodes.condition import Condition
from vla_pruner.runs.job import Job, Planned, Setup
from vla_pruner.runs.store import Store

NONE = Condition()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def finished(out: Path) -> list[tuple[str, int]]:
    with Store(out) as store:
        setup = store.planned()[0].setup
        return sorted(store.finished(setup))


def test_eval_takes_a_method_or_conditions(policy, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(eval_command, "run_command", lambda args, cells: ran.append(cells) or 0)

    def run(*words: str) -> list[str]:
        assert main(["eval", "--out", str(tmp_path), *words]) == 0
        return [cell.condition.name for cell in ran[-1]]

    assert run() == ["none"]
    assert run("--method", "fastv", "--keep", "64") == ["fastv@64"]
    assert run("--conditions", "none,vla-pruner@0.25:window=1") == [
        "none",
        "vla-pruner@0.25:window=1",
    ]


def test_a_device_that_is_not_there_is_refused_before_anything(
    policy, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["eval", "--policy", policy, "--suite", "toy_task:toy_task", "--episodes", "1"]
    assert main([*words, "--out", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "sees no CUDA device here; use --device cpu" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "out"), "--device", "tpu7"]) == 2
    assert "--device tpu7: use cpu, cuda or cuda:N" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_terminal_a_line_tells_of_each_finished_cell(policy, tmp_path, capsys):
    words = ["eval", "--policy", policy, "--suite", "toy_task:toy_task", "--workers", "1"]
    words += ["--conditions", "none", "fastv@0.5", "--out", str(tmp_path / "out")]
    assert main([*words, "--episodes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 episodes in 2 cells"
    told = [line for line in lines if " solved (" in line]
    assert len(told) == 2 and "(2 of 2 cells, 4 of 4 episodes, " in told[1]
    for condition in ("none", "fastv@0.5"):
        start = f"{policy} in toy_task:toy_task, {condition}: 2 of 2 solved"
        assert any(line.startswith(start) for line in told)
    # The table, then how to go on.
    assert any("2 of 2" in line and "all tokens" in line for line in lines[3:])
    assert any(line.startswith("│ fastv ") and "2 of 2" in line for line in lines[3:])
    assert lines[-1] == f"Report: vla-pruner report {tmp_path / 'out'}"
    assert main([*words, "--episodes", "3"]) == 0
    assert capsys.readouterr().out.startswith("6 episodes in 2 cells, 4 of them there already\n")


def test_a_long_run_says_how_far_it_is():
    text = StringIO()
    setup = Setup.of("toy", tiny_policy(), toy_task())
    item = Planned(setup, NONE, {}, None, 0, 3)
    jobs = [Job(item, toy_task(), 100 + number) for number in range(3)]
    with RunProgress(Console(file=text), every_s=0.0) as progress:
        progress.planned([item], jobs)
        for job in jobs:
            progress.finished(job, None)
    lines = text.getvalue().splitlines()
    assert lines[1].startswith("1 of 3 episodes, about ") and lines[1].endswith(" left")
    assert lines[3] == "3 of 3 episodes, about 0 s left"


def test_other_commands_tell_in_lines_what_a_bar_would_show():
    text = StringIO()
    with progress_bar(Console(file=text)) as bar:
        assert isinstance(bar, Lines)
        line = bar.add_task("recording", total=None)
        bar.update(line, total=2)
        bar.advance(line)
        bar.advance(line)
    assert text.getvalue().splitlines() == ["recording: 0 of 2", "recording: 2 of 2"]
    assert not isinstance(progress_bar(Console(file=text, force_terminal=True)), Lines)


def test_a_condition_can_be_left_out_of_the_report_or_dropped(policy, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = ["eval", "--policy", policy, "--suite", "toy_task:toy_task", "--episodes", "1"]
    words += ["--workers", "1", "--out", out]
    assert main([*words, "--conditions", "none,fastv@0.5,random@8"]) == 0
    assert main(["report", out, "--without", "random@8"]) == 0
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "fastv, 50 %" in text and "random" not in text
    assert "Partial" not in text
    assert len(finished(tmp_path / "out")) == 3
    assert main([*words, "--conditions", "none,fastv@0.5", "--drop", "random@8"]) == 0
    assert finished(tmp_path / "out") == [("fastv@0.5", 100), ("none", 100)]
    capsys.readouterr()
    assert main([*words, "--conditions", "none", "--drop", "random@8"]) == 2
    assert "holds no condition random@8; there are fastv@0.5, none" in capsys.readouterr().err
    assert main([*words, "--conditions", "none", "--drop", "none"]) == 2
    assert main(["report", out, "--without", "random@8"]) == 2
