"""Motion, delay and robustness in reports: from episodes that can be counted by hand."""

from dataclasses import replace

import pytest

from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.motion import Motion
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.reports.compare import Group, across_delays, robustness
from vla_pruner.reports.document import to_markdown
from vla_pruner.reports.latex import to_latex
from vla_pruner.reports.report import blocks_of, episode_rows_of, rows_of
from vla_pruner.runs.job import Setup
from vla_pruner.scenes.clock import EVERY, Clock, Latency

NONE, HALF, OTHER = (Condition.parse(name) for name in ("none", "vla-pruner@0.5", "fastv@0.5"))
SETUP = Setup("pickplace", "toy", "w", Control(("front",), 2, False), 60, ("cup",))


def episode(condition, seed, success, *, jerk=2.0, delay=0, held=None, steps=10):
    calls = [Call(s, 10.0, False, 40, 20, 10, 60, 100, delay=delay) for s in (0, 5)]
    motion = Motion(steps / 5, 1.0, None, jerk, None, 0.5, 2).as_dict()
    return Episode(condition.name, seed, 0, "lift", success, steps, calls, held=held, motion=motion)


def group(suite, solved, *, clock=None, **options) -> Group:
    """`solved` says which of the scenes 0, 1, 2, ... each condition solved."""
    setup = replace(SETUP, suite=suite, clock=clock)
    episodes = [
        episode(condition, seed, success, **options)
        for condition, results in solved.items()
        for seed, success in enumerate(results)
    ]
    return Group(setup, list(solved), episodes, len(episodes), [])


def text_of(*groups: Group) -> str:
    blocks = blocks_of(groups)
    assert to_latex(groups, blocks).isascii()
    return to_markdown(blocks)


def test_motion_is_compared_where_both_solved():
    found = group("pickplace", {NONE: [1, 1, 0, 1], HALF: [1, 1, 1, 0]})
    for one in found.episodes:
        if one.condition == HALF.name:
            one.motion["hand_jerk"] = 3.0 + one.seed
    none, half = found.summary().rows
    assert (none.motion.scenes, half.motion.scenes) == (3, 2)
    jerk = half.motion.changes["hand_jerk"]
    assert (jerk.before, jerk.mean, jerk.ratio) == (2.0, 3.5, 1.75)
    assert "joint_path" not in half.motion.changes
    text = text_of(found)
    assert "### Motion, on scenes that both solved" in text
    assert "| vla-pruner, 50 % | 2 | 2 (1.00x, 1.00 to 1.00) |" in text
    assert "3.5 (1.75x, 1.50 to 2.00)" in text
    row = rows_of([found])[1]
    assert row["motion.changes.hand_jerk.ratio"] == 1.75
    assert episode_rows_of([found])[0]["hand_path"] == 1.0


def test_runs_from_before_there_was_motion_have_no_such_table():
    found = group("pickplace", {NONE: [1, 1], HALF: [1, 0]})
    for one in found.episodes:
        one.motion = None
    assert "Motion, on" not in text_of(found)


def test_ticks_held_and_the_rate_that_is_left():
    clock = Clock(5, (Latency(EVERY, 400, 400),))
    found = group("pickplace+live5:400ms", {NONE: [1, 1]}, clock=clock, delay=2, held=4)
    (row,) = found.summary().rows
    assert (row.live.delay, row.live.delay_max, row.live.held) == (2.0, 2, 4.0)
    assert row.live.held_share == pytest.approx(0.4)
    assert "| all tokens | 2.00 | 2 | 4.0 | 40 % | 3.00 of 5 Hz |" in text_of(found)


def test_short_pruned_calls_against_long_full_ones():
    def at(ms, full, pruned):
        clock = Clock(5, (Latency(EVERY, ms, ms),))
        cells = {NONE: full, HALF: pruned}
        return group(f"pickplace+live5:{ms}ms", cells, clock=clock, held=0)

    groups = [at(200, [1, 1, 1, 1], [1, 1, 1, 0]), at(400, [1, 0, 0, 0], [0, 0, 0, 0])]
    pairs = across_delays(groups, HALF.name)
    assert set(pairs) == {(200, 200), (400, 200), (400, 400)}
    assert (pairs[400, 200].gained, pairs[400, 200].lost) == (2, 0)
    text = text_of(*groups)
    assert "## Success against delay" in text
    assert "| all tokens | 200 ms pruned | 400 ms pruned |" in text
    assert "| 200 ms | -25 points" in text and "| 400 ms | +50 points" in text


def test_what_pruning_costs_beyond_the_untouched_suite():
    base = group("pickplace", {NONE: [1] * 8, HALF: [1] * 7 + [0]})
    light = group("pickplace+light", {NONE: [1] * 8, HALF: [1] * 4 + [0] * 4, OTHER: [1] * 8})
    (found,) = robustness([base, light])
    assert (found.suite, found.scenes) == ("pickplace+light", 8)
    assert (found.full, found.pruned) == ((8, 8), (7, 4))
    assert found.difference == pytest.approx(-3 / 8)
    assert found.interval.low < -3 / 8 < found.interval.high
    assert "| 8 to 8 | 7 to 4 | -38 points (" in text_of(base, light)
    assert robustness([light]) == []


def test_p_values_of_a_table_are_corrected():
    found = group("pickplace", {NONE: [1] * 8, HALF: [0] * 8, OTHER: [0] * 7 + [1]})
    _, half, other = found.summary().rows
    assert (half.p_value, half.p_holm) == (2 / 256, 4 / 256)
    assert (other.p_value, other.p_holm) == (2 / 128, 2 / 128)
    text = text_of(found)
    assert "p = 0.0078 (Holm 0.016)" in text and "p = 0.016 |" in text
