"""What a page says first: true of the numbers, whatever they are."""

from dataclasses import replace

import pytest

from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.measure.statistics import Interval
from vla_pruner.pages.demo_page import answers, headline
from vla_pruner.pages.findings import best_of, overview
from vla_pruner.reports.summary import Summary, summarise
from vla_pruner.reports.timings import Speed, Timing

CONDITIONS = [Condition.parse(name) for name in ("none", "fastv@0.5", "fastv@0.25")]


def summary(solved: dict[str, list[int]], speedups: dict[str, tuple[float, float]]) -> Summary:
    """Solved scenes, and the speed-up of all calls and of pruned ones, by condition."""
    episodes = [
        Episode(name, seed, 0, "pick", bool(won), 4, [Call(0, 10.0, False, 40, 20, kept, 50, 100)])
        for name, kept in (("none", 20), ("fastv@0.5", 10), ("fastv@0.25", 5))
        for seed, won in enumerate(solved.get(name, []))
    ]
    apart = {"none": Timing(speed(10.0, None), None, None, 5)}
    for name, (every, pruned) in speedups.items():
        apart[name] = Timing(speed(10.0 / every, every), None, speed(10.0 / pruned, pruned), 5)
    return summarise(
        episodes, CONDITIONS, planned=len(episodes), settings={}, environment={}, apart=apart
    )


def speed(ms: float, times: float | None) -> Speed:
    interval = None if times is None else Interval(times - 0.02, times + 0.02)
    return Speed(ms, ms, ms, 10, times, interval, None)


def test_a_policy_that_gains_says_how_much_in_calls_and_in_episodes():
    found = summary(
        {"none": [1] * 12, "fastv@0.5": [1] * 12, "fastv@0.25": [1] * 12},
        {"fastv@0.5": (1.2, 1.3), "fastv@0.25": (1.62, 2.04)},
    )
    assert headline(found) == (
        "With 25 % of its visual tokens the policy solves as many scenes, 12 of 12. A pruned call "
        "is 2.0 times as fast, a whole episode 1.6 times."
    )
    assert best_of(found).reason((128, 8)) == ""


def timed(
    condition: str, seed: int, won: int, warm_up: list[float], pruned: list[float]
) -> Episode:
    kept = 20 if condition == "none" else 5
    calls = [Call(0, ms, True, 40, 20, 20, 100, 100) for ms in warm_up]
    calls += [Call(0, ms, False, 40, 20, kept, 50, 100) for ms in pruned]
    return Episode(condition, seed, 0, "pick", bool(won), 4, calls)


def test_pruned_calls_the_median_call_and_whole_episodes_are_three_numbers():
    episodes = [
        timed("none", 0, 1, [], [100.0] * 8),
        timed("none", 1, 1, [], [100.0] * 6),
        timed("none", 2, 0, [], [100.0] * 50),
        timed("fastv@0.25", 0, 1, [100.0] * 3, [50.0] * 5),
        timed("fastv@0.25", 1, 1, [100.0] * 3, [50.0] * 5),
        timed("fastv@0.25", 2, 1, [100.0] * 3, [50.0] * 5),
    ]
    found = summarise(episodes, CONDITIONS, planned=6, settings={}, environment={})
    whole = best_of(found).whole
    assert whole.scenes == 2
    assert whole.speedup == pytest.approx((800 + 600) / (550 + 550))
    assert whole.interval.low <= whole.speedup <= whole.interval.high
    assert headline(found).endswith("is 2.0 times as fast, a whole episode 1.3 times.")
    (first, *numbers) = answers(best_of(found))
    assert first[0] == "3 of 3"
    assert [number for number, _ in numbers] == ["2.00x", "2.00x", "1.27x"]
    assert numbers[-1][1].endswith("warm-up calls included (2 scenes that both solve)")


def test_without_a_scene_that_both_solve_there_is_no_whole_episode():
    episodes = [timed("none", 0, 1, [], [100.0]), timed("fastv@0.25", 0, 0, [], [50.0])]
    found = summarise(episodes, CONDITIONS, planned=2, settings={}, environment={})
    assert best_of(found).whole is None
    assert len(answers(best_of(found))) == 3


def test_a_policy_that_gains_nothing_says_so_and_why():
    found = summary({"none": [1] * 12, "fastv@0.25": [1] * 12}, {"fastv@0.25": (0.94, 0.91)})
    assert "It is no faster here: 0.94 times as fast." in headline(found)
    reason = best_of(found).reason((128, 8))
    assert "compute 50 % of the language model's prefill and are 0.91 times as fast" in reason
    assert "decoder is small, 8 layers of width 128" in reason
    assert "small" not in best_of(found).reason((4096, 32))
    assert "width" not in best_of(found).reason(None)


def test_a_gain_inside_its_interval_is_none():
    found = summary({"none": [1] * 4, "fastv@0.25": [1] * 4}, {"fastv@0.25": (1.1, 1.2)})
    best = best_of(found)
    assert best.pays
    wide = replace(best, speed=replace(best.speed, interval=Interval(0.9, 1.3)))
    assert not wide.pays
    assert "no faster" in wide.sentence


def test_it_speaks_of_the_fastest_that_loses_nothing():
    found = summary(
        {"none": [1] * 12, "fastv@0.5": [1] * 12, "fastv@0.25": [0] * 9 + [1] * 3},
        {"fastv@0.5": (1.3, 1.4), "fastv@0.25": (2.0, 2.1)},
    )
    assert best_of(found).row.name == "fastv@0.5"
    first, rest = overview(found)
    assert first == "1 of 2 pruned conditions solves fewer scenes than all tokens"
    assert rest.endswith(
        "The fastest that loses none is fastv, 50 %: 12 of 12, 1.30 times as fast."
    )


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([0] * 12, "solves fewer scenes: 0 of 12, with all of them 12 of 12"),
        ([0] + [1] * 11, "solves 11 of 12 scenes instead of 12 of 12"),
    ],
)
def test_losses_are_said_as_losses(after, said):
    found = summary({"none": [1] * 12, "fastv@0.25": after}, {"fastv@0.25": (1.5, 1.6)})
    assert said in headline(found)


def test_without_a_baseline_nothing_is_compared():
    assert best_of(summary({"fastv@0.25": [1]}, {})) is None
    assert headline(summary({"fastv@0.25": [1]}, {})).startswith("fastv, 25 %: 1 of 1")
    assert headline(summary({}, {})) == "No episode has finished yet."
