"""The same cell run twice: one for one the same episodes, or where they part."""

import dataclasses
import sqlite3

import pytest
import torch

from toy_task import CAMERAS, ToyScene, rollout, save_policy, tiny_policy, toy_task
from vla_pruner.cli import main
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.reports.identical import parting
from vla_pruner.runs.job import Job, Planned, Setup
from vla_pruner.runs.runner import EpisodeRunner

HALF = Condition.parse("vla-pruner@0.5")


def episode(scene: ToyScene, seed: int = 102, target: int = 0) -> Episode:
    suite = toy_task(scene)
    setup = Setup.of("toy", tiny_policy(), suite)
    return EpisodeRunner(lambda name: tiny_policy()).run(
        Job(Planned(setup, HALF, {}, None, 0, 9), suite, seed)
    )


class OtherLight(ToyScene):
    """From the third step on, one pixel of one camera is one shade brighter."""

    def observe(self, cameras):
        images = super().observe(cameras)
        if len(self.actions) >= 3:
            images[cameras[-1]][0, 0, 0] ^= 1
        return images


def test_the_same_episode_twice_is_identical_and_latency_does_not_count():
    first, second = episode(ToyScene()), episode(ToyScene())
    assert first.calls[0].latency_ms != second.calls[0].latency_ms
    assert parting(first, second) is None


def test_a_policy_that_draws_noise_draws_the_same_again():
    policy = tiny_policy()
    predict = policy.predict_action

    def noisy(*args, **kwargs):
        actions = predict(*args, **kwargs)
        return actions + torch.randn(actions.shape).numpy()

    policy.predict_action = noisy
    control = Control.of(policy, CAMERAS)

    def run(condition: Condition) -> Episode:
        torch.rand(3)  # Whatever else draws.
        session = condition.attach(policy)
        done = rollout(policy, ToyScene(), 102, 0, control=control, step_limit=12, session=session)
        if session is not None:
            session.remove()
        return done

    first = run(HALF)
    assert parting(first, run(HALF)) is None
    assert len({call.did for call in first.calls}) == len(first.calls)
    with_all_kept = run(Condition.parse("vla-pruner@1.0"))
    assert [call.did for call in run(Condition()).calls] == [c.did for c in with_all_kept.calls]


def test_a_single_pixel_is_found_at_the_call_that_saw_it():
    found = parting(episode(ToyScene()), episode(OtherLight()))
    assert found == "from call 3 on the policy saw something else"


def test_the_policy_is_told_from_the_scene():
    first = episode(ToyScene())
    calls = [*first.calls]
    calls[1] = dataclasses.replace(calls[1], did="0" * 12)
    other = dataclasses.replace(first, calls=calls)
    assert parting(first, other) == "in call 2 the policy saw the same and did something else"
    calls[1] = dataclasses.replace(first.calls[1], visual_kept=1)
    assert parting(first, other) == "in call 2 visual_kept differs"
    shorter = dataclasses.replace(first, calls=first.calls[:-1])
    assert parting(first, shorter) == "the same calls, another end"
    assert parting(first, dataclasses.replace(first, instruction="sit")) == "another task"


def test_digests_follow_images_state_and_actions():
    calls = episode(ToyScene()).calls
    assert len({call.saw for call in calls}) == len({call.did for call in calls}) == len(calls)
    assert all(len(call.saw) == len(call.did) == 12 for call in calls)


def test_episodes_without_digests_prove_nothing():
    old = [Call(0, 1.0, False, 9, 4, 4, 1, 1)]
    first = Episode("none", 1, 0, "go", True, 1, old)
    with pytest.raises(ValueError, match="kept no digests"):
        parting(first, first)
    values = first.as_dict()
    del values["calls"]["saw"], values["calls"]["did"]
    assert Episode.from_dict(values) == first


def test_two_runs_are_compared_by_the_command(tmp_path, capsys):
    policy = save_policy(tmp_path / "policy")

    def evaluate(out: str, conditions: str, episodes: str) -> str:
        words = ["eval", "--policy", policy, "--suite", "toy_task:toy_task", "--episodes", episodes]
        folder = str(tmp_path / out)
        assert main([*words, "--conditions", conditions, "--workers", "1", "--out", folder]) == 0
        return folder

    first = evaluate("a", "none,vla-pruner@0.5", "2")
    second = evaluate("b", "vla-pruner@0.5,none", "3")
    capsys.readouterr()
    assert main(["report", first, second, "--identical"]) == 0
    said = capsys.readouterr().out
    assert "| vla-pruner, 50 % | 2 | 2 |" in said and "| all tokens | 2 | 2 |" in said

    with sqlite3.connect(tmp_path / "b" / "episodes.sqlite") as base:
        base.execute("UPDATE episodes SET steps = steps + 1 WHERE seed = 101 AND keep IS NULL")
    assert main(["report", first, second, "--identical"]) == 1
    said = capsys.readouterr().out
    assert "| all tokens | 2 | 1 |" in said
    assert "all tokens, scene 101: the same calls, another end" in said
    assert main(["report", first, "--identical"]) == 2
    assert "name two runs" in capsys.readouterr().err
    with sqlite3.connect(tmp_path / "b" / "episodes.sqlite") as base:
        base.execute("UPDATE setups SET setup = replace(setup, '\"execute\": 2', '\"execute\": 1')")
    assert main(["report", first, second, "--identical"]) == 2
    assert "differ in control" in capsys.readouterr().err
