"""From episodes to rows: every number from episodes that can be counted by hand."""

import csv
import io
import json

import pytest

from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.reports.summary import (
    Summary,
    cells,
    episodes_csv,
    percent,
    rows_csv,
    summarise,
)

NONE, HALF = Condition.parse("none"), Condition.parse("vla-pruner@0.5")


def episode(condition: Condition, seed: int, success: bool, *latencies: float) -> Episode:
    """Pruned episodes warm up for one call; latencies in ms."""
    calls = []
    for number, latency in enumerate(latencies):
        cut = condition == HALF and number > 0
        warm_up = condition == HALF and not cut
        calls.append(
            Call(number, latency, warm_up, 40, 20, 10 if cut else 20, 60 + 40 * (not cut), 100)
        )
    return Episode(condition.name, seed, 0, "lift, please", success, len(calls), calls)


def four_scenes() -> list[Episode]:
    return [
        episode(NONE, 1, True, 10, 10),
        episode(NONE, 2, True, 10, 12),
        episode(NONE, 3, False, 14, 10),
        episode(HALF, 1, True, 10, 5, 5),
        episode(HALF, 2, False, 10, 5, 4),
        episode(HALF, 3, True, 9, 6, 5),
        episode(HALF, 4, True, 9, 5),
    ]


def made(episodes: list[Episode], planned: int = 8) -> Summary:
    return summarise(
        episodes,
        [NONE, HALF],
        planned=planned,
        settings={"policy": "toy", "seeds": [1, 4]},
        environment={"torch": "2"},
    )


def test_rates_count_every_finished_episode_and_differences_the_common_ones():
    none, half = made(four_scenes()).rows
    assert (none.successes, none.episodes, none.difference) == (2, 3, None)
    assert (half.successes, half.episodes) == (3, 4)
    assert (half.gained, half.lost, half.pairs, half.difference) == (1, 1, 3, 0.0)
    assert half.p_value == 1.0
    assert half.difference_interval.low == pytest.approx(-half.difference_interval.high)


def test_latency_is_given_for_all_calls_and_for_pruned_ones():
    none, half = made(four_scenes()).rows
    assert (none.all_calls.median_ms, none.pruned_calls) == (10.0, None)
    assert half.all_calls.calls == 11
    assert half.all_calls.median_ms == 5.0
    assert half.pruned_calls.calls == 7
    assert half.pruned_calls.speedup == pytest.approx(10 / 5)
    assert half.pruned_calls.interval.low <= 2.0 <= half.pruned_calls.interval.high
    assert none.all_calls.speedup is None


def test_flops_are_a_mean_over_calls():
    _, half = made(four_scenes()).rows
    assert half.prefill_macs == pytest.approx((4 * 100 + 7 * 60) / 11)
    assert half.prefill_ratio == pytest.approx((4 * 100 + 7 * 60) / 1100)
    assert half.pruned_prefill_ratio == pytest.approx(0.6)
    assert (half.visual_kept, half.visual, half.warm_up_calls) == (10, 20, pytest.approx(4 / 11))


def test_an_episode_that_ended_during_warm_up_has_no_pruned_call_to_compare():
    half = made([episode(NONE, 1, True, 10), episode(HALF, 1, True, 8)]).rows[1]
    assert half.pruned_calls is None
    assert half.all_calls.speedup == pytest.approx(10 / 8)


def test_an_interrupted_run_has_rows_for_what_has_finished():
    summary = made([episode(NONE, 1, True, 10)])
    assert not summary.complete
    assert [row.name for row in summary.rows] == ["none"]
    assert made([], planned=8).rows == []
    assert rows_csv(made([])) == "\n"


def test_tables_say_what_the_rows_say():
    summary = made(four_scenes())
    assert cells(summary.rows[1])[:2] == ("vla-pruner, 50 %", "3 of 4")
    rows = list(csv.DictReader(io.StringIO(rows_csv(summary))))
    assert [row["name"] for row in rows] == ["none", "vla-pruner@0.5"]
    assert float(rows[1]["pruned_calls.speedup"]) == pytest.approx(2.0)
    assert rows[0]["pruned_calls.speedup"] == rows[0]["difference"] == ""
    episodes = list(csv.DictReader(io.StringIO(episodes_csv(summary))))
    assert [row["success"] for row in episodes] == [str(e.success) for e in summary.episodes]
    assert episodes[3]["instruction"] == "lift, please"


def test_json_holds_rows_and_episodes_without_nan():
    values = json.loads(json.dumps(made(four_scenes()).as_dict(), allow_nan=False))
    assert values["rows"][1]["all_calls"]["median_ms"] == 5.0
    assert [Episode.from_dict(e) for e in values["episodes"]] == four_scenes()


def test_percent_keeps_a_digit_where_it_matters():
    assert [percent(x) for x in (0, 0.004, 0.3049, 1)] == ["0 %", "0.4 %", "30 %", "100 %"]


def test_one_scene_has_no_interval_of_its_speedup():
    """Not even one of no width: nothing was repeated."""
    one = made([episode(NONE, 1, True, 10, 10), episode(HALF, 1, True, 10, 5, 5)])
    half = one.rows[1]
    assert half.pruned_calls.speedup == pytest.approx(2.0)
    assert half.pruned_calls.interval is None and half.all_calls.interval is None
    assert cells(half)[-1] == "2.00x"
    (_, row) = csv.DictReader(io.StringIO(rows_csv(one)))
    assert float(row["pruned_calls.speedup"]) == pytest.approx(2.0)
    assert row["pruned_calls.interval"] == ""
    assert json.loads(json.dumps(one.as_dict()))["rows"][1]["pruned_calls"]["interval"] is None
