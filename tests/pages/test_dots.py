"""The dot plot: every condition has a row, at the right place, under the right budget."""

import pytest

from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.measure.statistics import Interval, wilson
from vla_pruner.pages.dots import Axis, chart, points
from vla_pruner.reports.summary import summarise

NAMES = ["none", "fastv@64", "fastv@0.25", "vla-pruner@0.5:window=1", "fastv@0.5"]
KEPT = {"none": 256, "fastv@64": 64, "fastv@0.25": 64}
CONDITIONS = [Condition.parse(name) for name in NAMES]


@pytest.fixture(scope="module")
def made():
    def episode(name: str, seed: int) -> Episode:
        won = not (name == "fastv@0.25" and seed < 18)
        ms = 10.0 if name == "none" else 5.0
        calls = [Call(0, ms, False, 300, 256, KEPT.get(name, 128), 60, 100)]
        return Episode(name, seed, 0, "lift", won, 3, calls)

    episodes = [episode(name, seed) for name in NAMES for seed in range(20)]
    summary = summarise(episodes, CONDITIONS, planned=100, settings={}, environment={})
    return chart("c", summary, CONDITIONS)


def test_rows_are_grouped_by_budget_the_larger_first(made):
    assert [budget.key for budget in made.budgets] == ["all", "50 %", "25 %", "64 tokens"]
    assert [budget.title for budget in made.budgets] == [
        "",
        "50 % of 256 visual tokens",
        "25 % of 256 visual tokens",
        "64 tokens of 256",
    ]
    assert [row.title for row in made.budgets[1].rows] == ["vla-pruner, window 1", "fastv"]


def test_a_row_says_what_its_dots_show(made):
    (row,) = made.budgets[2].rows
    interval = wilson(2, 20)
    assert (row.solved, row.gap) == ("2 of 20", "−90 points")  # noqa: RUF001
    assert (row.rate.at, row.rate.low) == (10.0, round(100 * interval.low, 2))
    assert row.times == "2.00x" and row.ms == "5.0"
    assert row.speed.at == made.speed.place(2.0)
    assert row.pruned_times == "", "every call was pruned: it would say the same"


def test_only_what_lies_beyond_its_interval_is_marked_as_worse(made):
    standing = {row.name: row.standing for budget in made.budgets for row in budget.rows}
    assert standing == {
        "none": "all",
        "fastv@64": "",
        "fastv@0.25": "worse",
        "vla-pruner@0.5:window=1": "",
        "fastv@0.5": "",
    }
    assert made.worse


def test_the_axis_of_speed_holds_everything_and_one(made):
    assert made.speed.low <= 1 < 2 <= made.speed.high
    assert made.speed.reference == made.speed.place(1.0)
    assert made.success.reference == 100.0
    assert "1" in [tick.text for tick in made.speed.ticks]


def test_what_lies_outside_an_axis_stands_at_its_end():
    axis = Axis("a", 0.5, 1.5, ())
    assert [axis.place(value) for value in (0.0, 0.5, 1.0, 1.5, 9.0)] == [0, 0, 50, 100, 100]
    mark = axis.mark(1.0, Interval(0.75, 1.25))
    assert (mark.low, mark.at, mark.high) == (25, 50, 75)
    assert axis.mark(1.0).low is None


def test_differences_have_a_sign():
    assert [points(share) for share in (0.12, 0.0, -0.005, -0.5)] == [
        "+12",
        "±0",
        "±0",
        "−50",  # noqa: RUF001
    ]
