"""Forecasts follow Eq. 6 and 7, and nothing leaks in from unused slots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_pruner.pruning.history import HistorySpec, decaying_window, ema_update, push, uncensor


@settings(max_examples=50, deadline=None)
@given(
    window=st.integers(1, 5),
    steps=st.integers(0, 8),
    gamma=st.floats(0.0, 1.0, exclude_min=True),
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


def test_without_decay_rate_the_newest_observation_decides():
    history = torch.rand(2, 3, 4)
    got = decaying_window(history, torch.tensor([3, 1]), gamma=0.0)
    assert torch.equal(got, history[:, 0])
    assert torch.equal(decaying_window(history, torch.tensor([0, 0]), gamma=0.0), torch.zeros(2, 4))


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


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["window", "ema"]),
    censored=st.sampled_from(["zero", "carry"]),
    steps=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_tokens_that_were_cut_are_remembered_as_the_rule_says(kind, censored, steps, seed):
    """One token at a time, with plain numbers; tokens that were seen are remembered as ever."""
    generator = torch.Generator().manual_seed(seed)
    spec = HistorySpec(kind=kind, window=3, gamma=0.7, alpha=0.4, censored=censored)
    history, count = torch.zeros(1, spec.slots, 5), torch.zeros(1, dtype=torch.int64)
    remembered = [[] for _ in range(5)]  # newest last: observations, or averages for "ema"
    for step in range(steps):
        kept = torch.rand(1, 5, generator=generator) < 0.6 if step else torch.ones(1, 5).bool()
        seen = torch.rand(1, 5, generator=generator) * kept
        history, count = spec.update(history, count, seen, kept=kept)
        visible = [m for m in range(5) if kept[0, m]]
        attention = sum(float(seen[0, m]) for m in visible)
        lasts = [values[-1] if values else 0.0 for values in remembered]
        known = sum(lasts[m] for m in visible)
        scale = 1.0
        if censored == "carry" and len(visible) < 5 and attention and known:
            scale = known / attention
        for m, last in enumerate(lasts):
            value = float(seen[0, m]) * scale
            straight = False
            if m not in visible and censored != "zero":
                value = last
                straight = True
            if kind == "ema" and remembered[m] and not straight:
                value = 0.6 * last + 0.4 * value
            remembered[m].append(value)
    if kind == "ema":
        expected = [values[-1] for values in remembered]
    else:
        expected = [
            sum(0.7 ** (i + 1) * v for i, v in enumerate(values[::-1][:3])) for values in remembered
        ]
    torch.testing.assert_close(spec.forecast(history, count), torch.tensor([expected]))


def test_what_a_cut_leaves_to_the_others_does_not_make_them_dearer():
    """Attention that is the same but for a cut token is remembered as if nothing had been cut."""
    exact = torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    visible = torch.tensor([[True, True, False, True]])
    without = torch.where(visible, exact, 0.0)
    seen = without / without.sum()
    assert float(seen[0, 3]) > 0.2
    torch.testing.assert_close(uncensor(seen, visible, exact), exact)


def test_without_a_cut_every_rule_is_the_papers():
    history, count = torch.rand(1, 3, 4), torch.tensor([2])
    seen = torch.rand(1, 4)
    plain, _ = HistorySpec().update(history, count, seen)
    spec = HistorySpec(censored="carry")
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(spec.update(history, count, seen)[0], plain)
    assert torch.equal(spec.update(history, count, seen, kept=everything)[0], plain)


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
        ({"censored": "forget"}, "'zero', 'carry'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HistorySpec(**options)
