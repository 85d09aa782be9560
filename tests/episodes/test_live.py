"""An episode in which time does not wait: what is carried out at which step."""

import numpy as np
import pytest
from torch import nn

from toy_task import CAMERAS, STEP_LIMIT, ToyScene, rollout, tiny_policy, toy_task
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Running
from vla_pruner.scenes.clock import EVERY, Clock, Latency
from vla_pruner.scenes.scene import hold_delta

CONTROL = Control(CAMERAS, execute=2, reads_state=True)
UNSOLVED = 102


class Holding(ToyScene):
    """Commands are differences here."""

    def hold(self, last):
        return hold_delta(last)


def clock(ms: float, pace: str = "wait") -> Clock:
    return Clock(5, (Latency(EVERY, ms, ms),), pace)


@pytest.fixture(scope="module")
def policy() -> nn.Module:
    return tiny_policy()


def run(policy, scene, clock=None, **options):
    settings = {"control": CONTROL, "step_limit": STEP_LIMIT, "clock": clock, **options}
    return rollout(policy, scene, UNSOLVED, 1, **settings)


def test_without_latency_nothing_changes(policy):
    for pace in ("wait", "ahead"):
        plain, live = ToyScene(), Holding()
        before, after = run(policy, plain), run(policy, live, clock(0, pace))
        assert np.array_equal(np.stack(plain.actions), np.stack(live.actions))
        assert [call.did for call in before.calls] == [call.did for call in after.calls]
        assert (before.held, after.held) == (None, 0)


def test_the_robot_holds_still_until_the_actions_are_there(policy):
    scene = Holding()
    episode = run(policy, scene, clock(350))
    assert [call.step for call in episode.calls] == [0, 4, 8]
    assert {call.delay for call in episode.calls} == {2}
    assert episode.held == 6
    for start in (0, 4, 8):
        last = -1.0 if start == 0 else scene.actions[start - 1][-1]
        for held in scene.actions[start : start + 2]:
            assert np.array_equal(held[:-1], np.zeros(6)) and held[-1] == last


def test_latencies_that_are_given_give_the_same_episode_twice(policy):
    first, second = Holding(), Holding()
    one, other = run(policy, first, clock(350, "ahead")), run(policy, second, clock(350, "ahead"))
    assert np.array_equal(np.stack(first.actions), np.stack(second.actions))
    assert [call.saw for call in one.calls] == [call.saw for call in other.calls]


def chunks(length: int = 6):
    for number in range(9):
        yield 100 * number + np.arange(float(length))[:, None]


def carried_out(delays, pace="ahead", execute=2, length=6):
    running = Running(execute, clock(0, pace))
    plans = (running.next(c, d) for c, d in zip(chunks(length), delays, strict=False))
    return [[None if a is None else int(a[0]) for a in plan] for plan in plans]


def test_ahead_carries_the_old_chunk_on_and_leaves_out_actions_of_the_past():
    assert carried_out([0, 0]) == [[0, 1], [100, 101]]
    assert carried_out([1, 1, 1]) == [[None, 0, 1], [2, 101], [102, 201]]
    assert carried_out([3, 3, 3]) == [[None, None, None, 0, 1], [2, 3, 4], [103, 104, 105]]
    # Chunks of four: the first has two actions left, the second one.
    assert carried_out([3, 3, 3], length=4)[1:] == [[2, 3, None], [103, None, None]]


def test_every_action_of_the_new_chunk_is_of_its_own_step():
    for delay in range(5):
        plans = carried_out([delay] * 6, length=12)[1:]
        for number, plan in enumerate(plans, start=1):
            for step, action in enumerate(plan):
                if action // 100 == number:
                    assert action % 100 == step


def test_wait_carries_out_every_chunk_from_its_beginning():
    assert carried_out([2, 1], "wait") == [[None, None, 0, 1], [None, 100, 101]]


def test_a_scene_that_does_not_say_how_it_holds_still_is_refused(policy):
    with pytest.raises(ValueError, match="ToyScene does not say how the robot holds still"):
        run(policy, ToyScene(), clock(350))


def test_holding_keeps_the_gripper():
    assert hold_delta(None).tolist() == [0] * 6 + [-1]
    assert hold_delta(np.array([0.3, 0.2, 1.0])).tolist() == [0, 0, 1.0]


def test_a_clock_belongs_to_what_makes_episodes_comparable():
    from dataclasses import replace

    from vla_pruner.runs.job import Setup

    suite = replace(toy_task(), name="toy+live5:350ms:ahead", clock=clock(350, "ahead"))
    setup = Setup("toy+live5:350ms:ahead", "p", "w", CONTROL, 12, ("a",), clock=suite.clock)
    assert Setup.from_dict(setup.as_dict()) == setup
    assert suite.base == "toy"


def test_what_is_left_of_a_chunk_guides_the_next_one():
    made = chunks()
    for pace, jacobian in (("rtc", "identity"), ("rtc-full", "full")):
        running = Running(2, clock(0, pace))
        assert running.guide() is None  # Nothing is under way.
        running.next(next(made), 3)
        guide = running.guide()
        assert (guide.delay, guide.jacobian) == (3, jacobian)
        assert (guide.left[:, 0] % 100).tolist() == [2, 3, 4, 5]
        running.next(next(made), 3)
        assert (running.guide().left[:, 0] % 100).tolist() == [3, 4, 5]
    running = Running(2, clock(0, "ahead"))
    running.next(next(made), 3)
    assert running.guide() is None


def test_a_policy_that_cannot_continue_a_chunk_is_refused_before_the_first_episode():
    from dataclasses import replace

    from vla_pruner.runs.matrix import Cell
    from vla_pruner.runs.plan import plan

    def refused(clock: Clock, condition: str = "none") -> str:
        suite = replace(toy_task(), clock=clock)
        cell = Cell("toy", suite.name, Condition.parse(condition), 1)
        with pytest.raises(ValueError) as error:
            plan([cell], {suite.name: suite}, lambda name: tiny_policy())
        return str(error.value)

    assert "OpenVLAOFT cannot continue a chunk" in refused(clock(200, "rtc"))
    only = Clock(5, (Latency("none", 1, 1),))
    assert "say nothing of fastv@0.5, only of none" in refused(only, "fastv@0.5")
