"""Forecasts follow Eq. 6 and 7, and nothing leaks in from unused slots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_pruner.methods.base import HistorySpec
from vla_pruner.pruning.history import decaying_window, ema_update, push


@settings(max_examples=50, deadline=None)
@given(
    window=st.integers(1, 5),
    steps=st.integers(0, 8),
    gamma=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_the_window_is_equation_7(window, steps, gamma, seed):
    observed = torch.rand(steps, 6, generator=torch.Generator().manual_seed(seed))
    history = torch.full((1, window, 6), float("nan"))
    for score in observed:
        history = push(history, score[None])
    got = decaying_window(history, torch.tensor([steps]), gamma=gamma)
    expected = torch.zeros(1, 6)
    for i in range(1, min(steps, window) + 1):
        expected += gamma**i * observed[steps - i]
    torch.testing.assert_close(got, expected)


def test_the_releases_weights_run_the_other_way():
    history = torch.eye(3)[None]  # Newest first: token i was looked at i + 1 steps ago.
    paper = decaying_window(history, torch.tensor([3]), gamma=0.8)
    release = decaying_window(history, torch.tensor([3]), gamma=0.8, newest_heaviest=False)
    torch.testing.assert_close(paper, torch.tensor([[0.8, 0.64, 0.512]]))
    torch.testing.assert_close(release, torch.tensor([[0.64, 0.8, 1.0]]))
    fewer = decaying_window(history, torch.tensor([2]), gamma=0.8, newest_heaviest=False)
    torch.testing.assert_close(fewer, torch.tensor([[0.8, 1.0, 0.0]]))


def test_rows_of_a_batch_are_separate_episodes():
    history = torch.rand(3, 4, 5)
    count = torch.tensor([0, 2, 9])
    together = decaying_window(history, count, gamma=0.7)
    for b in range(3):
        alone = decaying_window(history[b : b + 1], count[b : b + 1], gamma=0.7)
        assert torch.equal(together[b : b + 1], alone)
    assert together[0].eq(0).all()


def test_the_moving_average_is_equation_6():
    alpha, scores = 0.3, torch.rand(5, 2, 4)
    forecast = torch.full((2, 4), float("nan"))
    expected = scores[0]
    for step, observed in enumerate(scores):
        forecast = ema_update(forecast, observed, alpha, first=torch.tensor([step == 0] * 2))
        if step:
            expected = (1 - alpha) * expected + alpha * observed
    torch.testing.assert_close(forecast, expected)


def test_push_forgets_the_oldest():
    history = torch.arange(6.0).view(1, 3, 2)
    assert push(history, torch.tensor([[9.0, 9.0]])).tolist() == [[[9, 9], [0, 1], [2, 3]]]


@pytest.mark.parametrize("kind", ["window", "ema"])
def test_a_memory_can_be_kept_without_knowing_its_kind(kind):
    spec = HistorySpec(kind=kind, window=3, gamma=0.8, alpha=0.5)
    history, count = torch.zeros(2, spec.slots, 4), torch.zeros(2, dtype=torch.int64)
    assert spec.forecast(history, count).eq(0).all()
    scores = torch.rand(5, 2, 4)
    for observed in scores:
        history, count = spec.update(history, count, observed)
    assert count.tolist() == [5, 5]
    if kind == "window":
        expected = 0.8 * scores[4] + 0.64 * scores[3] + 0.512 * scores[2]
    else:
        expected = scores[0]
        for observed in scores[1:]:
            expected = 0.5 * expected + 0.5 * observed
    torch.testing.assert_close(spec.forecast(history, count), expected)


def test_layers_to_average_are_resolved_against_the_depth():
    assert HistorySpec().resolve_layers(8) == (4, 5, 6, 7)
    assert HistorySpec().resolve_layers(7) == (3, 4, 5, 6)
    assert HistorySpec(layers="middle").resolve_layers(32) == (15,)
    assert HistorySpec(layers="middle").resolve_layers(1) == (0,)
    assert HistorySpec(layers=(5, 2, 5)).resolve_layers(6) == (2, 5)
    with pytest.raises(ValueError, match=r"layer 15 does not exist.*0\.\.7"):
        HistorySpec(layers=(15,)).resolve_layers(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mean"}, "history='mean'.*'window', 'ema'"),
        ({"window": 0}, "window=0"),
        ({"window": 2.0}, "window=2.0"),
        ({"gamma": 1.1}, "gamma=1.1"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"layers": ()}, "at least one layer"),
        ({"layers": (-1,)}, "action_layers=-1"),
        ({"layers": "all"}, "latter-half"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HistorySpec(**options)
