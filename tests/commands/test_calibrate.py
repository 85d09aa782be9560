"""`vla-pruner calibrate`: records if asked to, searches, writes the recipe."""

from argparse import ArgumentParser
from io import StringIO

import pytest
import torch
from rich.console import Console

import vla_pruner as vp
from toy_task import record_toys, tiny_policy, toy_task
from vla_pruner.commands import calibrate as command
from vla_pruner.methods.recipe import Recipe


def run(*words, task=None):
    parser = ArgumentParser()
    command.add_arguments(parser)
    shown = StringIO()
    code = command.calibrate_command(
        parser.parse_args([*map(str, words), "--policy", "tiny"]),
        console=Console(file=shown, width=200),
        open_suite=task or toy_task,
        open_policy=lambda name: tiny_policy(),
    )
    return code, shown.getvalue()


def test_the_command_records_searches_and_writes(tmp_path):
    out = tmp_path / "fitprune-0.5.json"
    code, shown = run(
        "fitprune", "--episodes", 2, "--first-seed", 10, "--keep", 0.5, "--layer", 1, "--out", out
    )
    assert code == 0 and "fitprune on 8 observations: [32, " in shown and str(out) in shown
    recipe = Recipe.load(out)
    assert recipe.observations["seeds"] == [10, 11] and recipe.keep == 0.5
    folder = tmp_path / "fitprune-0.5-observations"
    code, shown = run("efficientvla", "--observations", folder, "--out", tmp_path / "e.json")
    assert code == 0 and "layers from least to most important: " in shown
    code, shown = run(
        "vtw", "--observations", folder, "--keep", 0.5, "--layer", 0, "--out", tmp_path / "v.json"
    )
    assert code == 0 and "visual tokens leave before layer 2 of 4; the actions then" in shown
    with vp.prune(tiny_policy(), "vtw", keep=0.5, recipe=tmp_path / "v.json") as session:
        assert session.method.cuts(4) == (2,)


def test_the_command_refuses_what_is_no_policy(tmp_path):
    record_toys(tmp_path / "seen", [7])
    words = ["vtw", "--observations", str(tmp_path / "seen"), "--out", str(tmp_path / "r.json")]
    parser = ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ValueError, match="has no `predict_action`"):
        command.calibrate_command(
            parser.parse_args(words), open_policy=lambda name: torch.nn.Linear(1, 1)
        )


def test_the_command_works_without_the_simulator_on_recorded_observations(tmp_path):
    def no_simulator():
        raise ImportError("no robosuite")

    record_toys(tmp_path / "seen", [7])
    words = ("efficientvla", "--observations", tmp_path / "seen", "--out", tmp_path / "e.json")
    assert run(*words, task=no_simulator)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to calibrate on"),
        (("--episodes", 0), "at least one episode"),
        (("--episodes", 2, "--first-seed", 99), "from 100 on are kept for evaluation"),
        (("--episodes", 2, "--first-seed", 200), "kept for evaluation"),
    ],
)
def test_the_command_refuses_impossible_arguments(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run("efficientvla", "--out", tmp_path / "recipe.json", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fitprune",), "give `keep`"),
        (("fitprune", "--keep", 1.5), r"share in \(0, 1\]"),
        (("vtw", "--keep", 0.5, "--layer", 9), "the decoder has 4"),
        (("vtw", "--keep", 0.5, "--eta", 1.0), "instead of `keep`"),
        (("efficientvla", "--keep", 0.5), "leave `keep` out"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_recorded(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(*words, "--episodes", 2, "--first-seed", 10, "--out", tmp_path / "recipe.json")
    assert not list(tmp_path.iterdir())
