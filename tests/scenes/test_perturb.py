"""A perturbed scene: one thing looks different, the physics is that of the untouched one."""

import argparse
from importlib.util import find_spec

import numpy as np
import pytest

from vla_pruner.commands.runs.running import add_run_arguments, changes_of
from vla_pruner.scenes.clock import Clock
from vla_pruner.scenes.perturb import PERTURBATIONS, WORDINGS
from vla_pruner.scenes.pick_place_task import CAMERAS, INSTRUCTION_TEMPLATES
from vla_pruner.scenes.suites import open_suite

SEED = 1_000_003


@pytest.fixture(scope="module")
def untouched():
    if find_spec("robosuite") is None:  # Importing it here would choose how MuJoCo draws.
        pytest.skip("needs the extra sim")
    scene = open_suite("robosuite_pickplace").open_scene()
    found = scene.reset(SEED, 3)
    yield found, scene.observe(CAMERAS), scene.simulator_state(), scene.pose()
    scene.close()


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_one_thing_is_changed_and_comes_back_with_its_scene(name, untouched):
    found, images, state, (hand, joints) = untouched
    scene = open_suite(f"robosuite_pickplace+{name}").open_scene()
    first = scene.reset(SEED, 3)
    seen = scene.observe(CAMERAS)
    assert np.array_equal(scene.simulator_state(), state)
    assert np.array_equal(scene.pose()[0], hand) and np.array_equal(scene.pose()[1], joints)
    words, looks = first["instruction"] != found["instruction"], _difference(seen, images)
    assert (words, looks > 0.2) == ((True, False) if name == "wording" else (False, True))
    scene.reset(SEED + 1, 3)
    other = scene.observe(CAMERAS)
    again = scene.reset(SEED, 3)
    assert again["instruction"] == first["instruction"]
    assert _difference(scene.observe(CAMERAS), seen) == 0
    assert _difference(other, seen) > 0
    scene.close()


def _difference(one, other) -> float:
    """Mean difference of the scene camera's images, in levels of 255."""
    return float(np.abs(one["agentview"].astype(int) - other["agentview"]).mean())


def test_no_wording_was_a_training_sentence():
    assert not set(WORDINGS) & set(INSTRUCTION_TEMPLATES)
    assert all(text.count("{object}") == 1 for text in WORDINGS)


def test_names_of_changed_suites(untouched):
    suite = open_suite("robosuite_pickplace+light+live:200ms:ahead")
    assert suite.name == "robosuite_pickplace+light+live:200ms:ahead"
    assert suite.base == "robosuite_pickplace"
    assert isinstance(suite.clock, Clock) and suite.clock.hz == suite.hz
    for name, message in {
        "robosuite_pickplace+fog": "there are camera, light",
        "robosuite_pickplace+light+camera": "name one perturbation",
        "robosuite_pickplace+live+live": "set twice",
        "toy_task:toy_task+light": "only robosuite_pickplace",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_suite(name)


def changes(*words: str) -> list[str]:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    return changes_of(parser.parse_args(["--out", "runs/x", *words]))


def test_what_the_command_line_adds_to_a_suite():
    assert changes() == [""]
    assert changes("--live") == ["+live"]
    assert changes("--live", "20", "--latency", "0,200") == ["+live20:0ms", "+live20:200ms"]
    assert changes("--live", "--latency-of", "r.csv", "--pace", "ahead") == ["+live:r.csv:ahead"]
    assert changes("--perturb", "none,light", "--live", "5") == ["+live5", "+light+live5"]
    assert changes("--perturb", "all") == ["", *(f"+{name}" for name in PERTURBATIONS)]
    for latency in ("-5", "nan", "soon", "1e999"):
        with pytest.raises(ValueError, match=f"--latency {latency}: milliseconds of 0 or more"):
            changes("--live", f"--latency={latency}")
    for rate in ("0", "inf", "often"):
        with pytest.raises(SystemExit):
            changes("--live", rate)
    with pytest.raises(ValueError, match="add --live"):
        changes("--latency", "200")
    with pytest.raises(ValueError, match="give one of them"):
        changes("--live", "--latency", "200", "--latency-of", "r.csv")
