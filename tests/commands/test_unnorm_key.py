"""A policy with statistics of several datasets: every command that acts takes `--unnorm-key`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toy_task import tiny_policy, toy_task
from vla_pruner.cli import main
from vla_pruner.commands import calibrate
from vla_pruner.commands.runs import running
from vla_pruner.episodes.control import Control, statistics_of
from vla_pruner.episodes.observations import read_observations
from vla_pruner.models.loading import load
from vla_pruner.models.openvla import save_pretrained
from vla_pruner.runs.job import Setup
from vla_pruner.runs.runner import EpisodeRunner
from vla_pruner.runs.store import Store

SUITE = "toy_task:toy_task"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Actions of "wide" are twice those of "toy"."""
    made = tiny_policy()
    toy = made.config.norm_stats["toy"]
    wide = {
        "action": {**toy["action"], "q01": [-2.0] * 7, "q99": [2.0] * 7},
        "proprio": toy["proprio"],
    }
    folder = tmp_path_factory.mktemp("two")
    save_pretrained(tiny_policy(norm_stats={"toy": toy, "wide": wide}), folder)
    return str(folder)


class HereExecutor:
    """Episodes in this process."""

    workers, device = 1, "cpu"

    def run(self, jobs: Any) -> Any:
        runner = EpisodeRunner(load)
        for job in jobs:
            yield job, runner.run(job)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "open_executor", lambda args: HereExecutor())
    monkeypatch.setattr(calibrate, "pick_place", toy_task)


def eval_(policy: str, out: Path) -> list[str]:
    return ["eval", "--policy", policy, "--suite", SUITE, "--episodes", "1", "--out", str(out)]


def sweep(policy: str, out: Path) -> list[str]:
    file = out.with_suffix(".yaml")
    matrix = {"policies": [policy], "suites": [SUITE], "methods": ["none"], "episodes": 1}
    file.write_text(json.dumps(matrix))
    return ["sweep", str(file), "--out", str(out)]


def demo_(policy: str, out: Path) -> list[str]:
    words = ["demo", "--policy", policy, "--suite", SUITE, "--episodes", "1", "--out", str(out)]
    return [*words, "--keep", "0.5"]


def analyze_(policy: str, out: Path) -> list[str]:
    words = ["analyze", "--policy", policy, "--suite", SUITE, "--episodes", "1", "--layer", "1"]
    return [*words, "--methods", "fastv", "--out", str(out)]


def calibrate_(policy: str, out: Path) -> list[str]:
    words = ["calibrate", "efficientvla", "--policy", policy, "--episodes", "1"]
    return [*words, "--first-seed", "10", "--out", str(out / "recipe.json")]


ACTING = (eval_, sweep, demo_, analyze_, calibrate_)


@pytest.mark.parametrize("command", ACTING)
def test_without_a_key_the_choice_is_asked_for_before_anything_is_run(
    command: Callable[[str, Path], list[str]],
    policy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(command(policy, out)) == 2
    said = capsys.readouterr().err
    assert "choose one with --unnorm-key" in said and "toy, wide" in said
    assert not list(out.rglob("*.npz")) and not (out / "episodes.sqlite").exists()
    assert main([*command(policy, out), "--unnorm-key", "narrow"]) == 2
    assert "unknown unnorm_key 'narrow'; this model knows: toy, wide" in capsys.readouterr().err


@pytest.mark.parametrize("command", ACTING)
def test_with_a_key_the_command_acts(
    command: Callable[[str, Path], list[str]], policy: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main([*command(policy, out), "--unnorm-key", "wide"]) == 0
    if (out / "episodes.sqlite").exists():
        with Store(out) as store:
            assert {item.setup.control.unnorm_key for item in store.planned()} == {"wide"}
    for file in out.rglob("scene_*.npz"):
        assert read_observations(file.parent).items[0]["unnorm_key"] == "wide"


def test_a_run_does_not_go_on_with_other_statistics(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*eval_(policy, out), "--unnorm-key", "wide"]) == 0
    assert main([*eval_(policy, out), "--unnorm-key", "toy"]) == 2
    assert "holds episodes of policy" in capsys.readouterr().err
    assert main(["latency", str(out), "--rounds", "1", "--scenes", "1", "--calls", "2"]) == 0


def test_the_key_scales_the_actions(policy: str) -> None:
    suite = toy_task()
    found = load(policy)
    seen = {
        "images": [np.zeros((40, 40, 3), np.uint8)] * 2,
        "instruction": "pick up the cup",
        "proprio": np.zeros(8),
    }
    actions = {}
    for key in ("toy", "wide"):
        control = Setup.of(policy, found, suite, unnorm_key=key).control
        assert control.arguments == {"unnorm_key": key}
        actions[key] = found.predict_action(**seen, **control.arguments)
    np.testing.assert_allclose(actions["wide"], 2 * actions["toy"], rtol=1e-5)


def test_a_single_set_of_statistics_needs_no_key_and_keeps_old_runs_comparable() -> None:
    one = tiny_policy()
    assert statistics_of(one, None) is None
    assert statistics_of(one, "toy") is None
    assert Control.of(one, toy_task().cameras, unnorm_key="toy").unnorm_key is None
    with pytest.raises(ValueError, match="unknown unnorm_key 'wide'"):
        statistics_of(one, "wide")


def test_the_folder_may_name_the_key(policy: str, tmp_path: Path) -> None:
    values = {"control": {"unnorm_key": "wide"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = load(policy)
    assert statistics_of(found, None, folder=tmp_path) == "wide"
    assert statistics_of(found, "toy", folder=tmp_path) == "toy"
