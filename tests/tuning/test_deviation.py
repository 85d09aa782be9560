"""Deviations are those that a slow loop computes, in the units that their names say."""

import numpy as np
import pytest

from vla_pruner.tuning.deviation import Scale, compare, interval, summarise


def actions(seed, calls=5, chunk=4, dim=3, size=1.0):
    return np.random.default_rng(seed).normal(0, size, (calls, chunk, dim)).astype(np.float32)


FULL = [actions(0), actions(1, calls=3)]
PRUNED = [full + actions(9 + n, len(full), size=0.6) for n, full in enumerate(FULL)]


def slowly(full, pruned, spread, execute, gripper, threshold):
    """Mean, worst, flips and robot units of every call, number by number."""
    found = []
    for before, after in zip(full, pruned, strict=True):
        total, worst, flipped, units = 0.0, 0.0, False, [0.0] * len(spread)
        for step in range(execute):
            for dim, width in enumerate(spread):
                error = abs(float(after[step][dim]) - float(before[step][dim]))
                total += error / width / (execute * len(spread))
                worst = max(worst, error / width)
                units[dim] += error / execute
            sides = (before[step][gripper] > threshold, after[step][gripper] > threshold)
            flipped = flipped or sides[0] != sides[1]
        found.append((total, worst, flipped, units))
    return found


@pytest.mark.parametrize("execute", [1, 2, 4])
def test_calls_are_what_a_slow_loop_finds(execute):
    scale = Scale.of(FULL, execute=execute)
    rows = [row for episode in FULL for call in episode for row in call]
    spread = [np.std([float(row[dim]) for row in rows]) for dim in range(3)]
    assert scale.spread == pytest.approx(spread, rel=1e-5)
    for full, pruned in zip(FULL, PRUNED, strict=True):
        found = compare(full, pruned, scale)
        slow = slowly(full, pruned, spread, execute, gripper=2, threshold=0.0)
        assert found.moved == pytest.approx([one[0] for one in slow], rel=1e-5)
        assert found.worst == pytest.approx([one[1] for one in slow], rel=1e-5)
        assert found.flips.tolist() == [one[2] for one in slow]
        assert found.units == pytest.approx(np.array([one[3] for one in slow]), rel=1e-5)
    assert any(compare(*pair, scale).flips.any() for pair in zip(FULL, PRUNED, strict=True))


def test_only_carried_out_actions_count():
    scale = Scale.of(FULL, execute=2)
    later = FULL[0].copy()
    later[:, 2:] += 5
    found = compare(FULL[0], later, scale)
    assert found.moved.max() == 0 and found.worst.max() == 0 and not found.flips.any()
    assert found.chunk.min() > 1


def test_a_condition_is_the_sum_of_its_calls():
    scale = Scale.of(FULL, execute=2)
    calls = [compare(*pair, scale) for pair in zip(FULL, PRUNED, strict=True)]
    warm = [np.array([True, False, False, False, False]), np.array([True, False, False])]
    found = summarise([40, 70], calls, warm, scale)
    moved = [*calls[0].moved, *calls[1].moved]
    assert found.mean == pytest.approx(sum(moved) / 8)
    assert found.pruned == pytest.approx((sum(moved) - moved[0] - moved[5]) / 6)
    assert found.p90 == pytest.approx(np.quantile(moved, 0.9))
    assert (found.episodes, found.calls, found.warm_up) == (2, 8, 0.25)
    worst = [*calls[0].worst, *calls[1].worst]
    place = [(40, n) for n in range(5)] + [(70, n) for n in range(3)]
    assert (found.worst_episode, found.worst_call) == place[int(np.argmax(worst))]
    assert found.worst == pytest.approx(max(worst))
    ratio = np.array(found.by_dimension_units) / scale.spread
    assert found.by_dimension == pytest.approx(ratio)
    assert found.mean == pytest.approx(np.mean(found.by_dimension))
    assert found.low <= found.mean <= found.high


def test_a_dimension_that_never_moves_is_left_out_of_the_mean_and_kept_in_robot_units():
    still = [np.concatenate([one, np.full((*one.shape[:2], 1), 7.0)], axis=-1) for one in FULL]
    moved = [np.concatenate([one, np.full((*one.shape[:2], 1), 7.5)], axis=-1) for one in PRUNED]
    scale = Scale.of(still, execute=2, gripper=())
    assert scale.moving.tolist() == [True, True, True, False]
    calls = [compare(*pair, scale) for pair in zip(still, moved, strict=True)]
    without = [
        compare(*pair, Scale.of(FULL, execute=2)).moved for pair in zip(FULL, PRUNED, strict=True)
    ]
    for one, other in zip(calls, without, strict=True):
        assert one.moved == pytest.approx(other)
    found = summarise([0, 1], calls, [np.zeros(5, bool), np.zeros(3, bool)], scale)
    assert found.by_dimension[3] == 0 and found.by_dimension_units[3] == pytest.approx(0.5)
    assert found.flips == 0


def test_the_interval_draws_episodes_and_one_episode_has_none():
    assert interval([np.ones(4)]) == (None, None)
    low, high = interval([np.zeros(5), np.ones(5), np.ones(5)])
    assert low == 0 and high == 1
    assert interval([np.ones(3), np.ones(9)]) == (1, 1)


@pytest.mark.parametrize(
    ("full", "pruned", "words"),
    [
        (FULL[0], FULL[1], "do not belong to the same observations"),
        (FULL[0][0], FULL[0][0], "expected \\[calls, chunk, dim\\] twice"),
        (FULL[0], np.full_like(FULL[0], np.nan), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(full, pruned, words):
    with pytest.raises(ValueError, match=words):
        compare(full, pruned, Scale.of(FULL, execute=2))


def test_a_scale_needs_a_gripper_that_is_there_and_something_that_moves():
    with pytest.raises(ValueError, match="gripper dimension 3: actions have 3 numbers"):
        Scale.of(FULL, execute=1, gripper=[3])
    with pytest.raises(ValueError, match="the same action"):
        Scale.of([np.ones((4, 2, 3))], execute=1)
