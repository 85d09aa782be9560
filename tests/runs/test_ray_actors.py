"""A policy for several simulators: each episode as if it were alone."""

import itertools

import pytest

from toy_task import ToyScene, rollout, save_policy, tiny_policy, toy_task
from vla_pruner.episodes.condition import Condition
from vla_pruner.models.loading import load
from vla_pruner.models.port import share
from vla_pruner.runs import ray_actors
from vla_pruner.runs.job import Setup
from vla_pruner.runs.ray_actors import PolicyActor

NONE, HALF, RANDOM = map(Condition.parse, ["none", "vla-pruner@0.5", "random@0.5"])


def test_a_shared_policy_has_its_own_hooks_over_the_same_weights():
    policy = tiny_policy()
    other = share(policy)
    for one, same in zip(policy.parameters(), other.parameters(), strict=True):
        assert one is same
    session = HALF.attach(other)
    assert len(policy.language_model.model._forward_pre_hooks) == 0
    assert len(other.language_model.model._forward_pre_hooks) > 0
    session.remove()


@pytest.fixture
def actor(monkeypatch):
    monkeypatch.setattr(ray_actors, "one_thread", lambda: None)
    return PolicyActor("cpu")


def steps(actor: PolicyActor, setup: Setup, condition: Condition, seed: int, key: str):
    """An episode of scene `seed` on all its observations; gives its calls one by one."""
    scene = ToyScene()
    instruction = scene.reset(seed, seed % 2)["instruction"]
    actor.open(key, setup, condition)
    actor.begin(key, seed)
    for _ in range(5):
        images = [*scene.observe(setup.control.cameras).values()]
        answer = actor.act(key, images, instruction, scene.proprio(), False)
        for action in answer.actions[:2]:
            scene.step(action)
        yield answer.call
    actor.end(key)
    actor.end(key)  # Once more is no error.


def test_episodes_that_take_turns_are_those_that_run_alone(actor, tmp_path):
    name = save_policy(tmp_path / "policy")
    policy = load(name)
    setup = Setup.of(name, policy, toy_task())
    wanted = [(NONE, 100), (HALF, 100), (HALF, 101), (RANDOM, 100), (RANDOM, 102)]
    running = [steps(actor, setup, *one, key=str(n)) for n, one in enumerate(wanted)]
    found = [*zip(*itertools.zip_longest(*running), strict=True)]
    for (condition, seed), calls in zip(wanted, found, strict=True):
        session = condition.attach(policy)
        alone = rollout(
            policy,
            ToyScene(),
            seed,
            seed % 2,
            control=setup.control,
            step_limit=10,
            session=session,
        ).calls
        if session is not None:
            session.remove()
        some = min(len(alone), len(calls))
        assert some >= 4
        assert [(c.saw, c.did, c.visual_kept, c.prefill_macs) for c in calls[:some]] == [
            (c.saw, c.did, c.visual_kept, c.prefill_macs) for c in alone[:some]
        ]
    assert len({call.did for call in found[3] + found[4]}) == 10
    assert not actor._runners


def test_another_policy_takes_the_place_of_the_one_before(actor, tmp_path):
    for folder in ("a", "b"):
        name = save_policy(tmp_path / folder)
        setup = Setup.of(name, load(name), toy_task())
        (*_, last) = steps(actor, setup, HALF, 100, key="x")
        assert last.visual_kept == 16
    assert [*actor._shared] == [HALF.name]
