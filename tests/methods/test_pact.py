"""PACT keeps the smallest budget that covers prompt and action attention."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vla_pruner as vp
from vla_pruner.methods import Evidence, build


def slow_pact(semantic, action, *, levels=(0.125, 0.25, 0.5, 0.75), base=0.4, slope=0.1):
    """One row, written from the formula: the tokens that stay."""
    n = len(semantic)

    def normalise(values):
        return [v / sum(values) for v in values]

    def best(score, tokens, count):
        return sorted(tokens, key=lambda i: (-score[i], i))[:count]

    p = normalise([s + 1e-8 for s in semantic])
    a = normalise(action) if action is not None and sum(action) else p
    middle = [(x + y) / 2 for x, y in zip(p, a, strict=True)]
    divergence = sum(
        x * math.log(x / m) / 2
        for score in (p, a)
        for x, m in zip(score, middle, strict=True)
        if x > 0
    )
    theta = min(max(base + slope * divergence / math.log(2), 0.15), 0.7)
    both = [max(x, y) for x, y in zip(p, a, strict=True)]
    for level in (*levels, 1.0):
        count = math.ceil(level * n)
        union = {*best(p, range(n), count), *best(a, range(n), count)}
        kept = best(both, union, count)
        if min(sum(p[i] for i in kept), sum(a[i] for i in kept)) >= theta:
            break
    return sorted(kept)


def evidence(seed, n, batch=1, power=1.0, **changes) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    semantic, forecast = (torch.rand(batch, n, generator=generator) ** power for _ in range(2))
    return Evidence(torch.zeros(batch, n, 2), semantic, forecast, (n,), 3, **changes)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 64),
    power=st.sampled_from([0.2, 1.0, 3.0, 9.0]),
    base=st.sampled_from([0.0, 0.4, 0.6, 2.0]),
    seed=st.integers(0, 999),
)
def test_it_keeps_what_the_formula_keeps(n, power, base, seed):
    given_evidence = evidence(seed, n, power=power)
    kept = build("pact", base=base).select(given_evidence)
    expected = slow_pact(
        given_evidence.semantic[0].tolist(), given_evidence.forecast[0].tolist(), base=base
    )
    assert kept[0].tolist() == expected


def test_without_history_the_prompt_decides():
    given_evidence = evidence(1, 40, power=5.0)
    blank = dataclasses.replace(given_evidence, forecast=torch.zeros(1, 40))
    kept = build("pact").select(blank)
    assert kept[0].tolist() == slow_pact(given_evidence.semantic[0].tolist(), None)
    assert build("pact").warmup == 0


def test_rows_share_the_largest_budget():
    """And keep a superset of what they would keep alone."""
    method, together = build("pact"), evidence(2, 64, batch=2)
    semantic, forecast = together.semantic.clone(), together.forecast.clone()
    semantic[0, :50] = forecast[0, :50] = 0  # Little covers much of row 0.
    together = dataclasses.replace(together, semantic=semantic, forecast=forecast)
    kept = method.select(together)
    alone = [
        method.select(
            dataclasses.replace(
                together,
                features=together.features[:1],
                semantic=semantic[row : row + 1],
                forecast=forecast[row : row + 1],
            )
        )
        for row in range(2)
    ]
    assert alone[0].shape[1] < alone[1].shape[1] == kept.shape[1]
    for row in range(2):
        assert set(alone[row][0].tolist()) <= set(kept[row].tolist())


def test_keep_is_the_most_that_may_stay():
    even = dataclasses.replace(
        evidence(0, 64), semantic=torch.ones(1, 64), forecast=torch.ones(1, 64)
    )
    assert build("pact").select(even).shape == (1, 32)
    assert build("pact", keep=20).select(even).shape == (1, 20)
    assert build("pact", keep=0.5, base=2.0).select(even).shape == (1, 32)
    assert build("pact", base=2.0).select(even).shape == (1, 48)  # theta is at most 0.7.
    assert build("pact", keep=0.3).schedule((64,), 8) == (19,)
    levels = build("pact", levels=(0.1,), base=0.0, bounds=(0.0, 0.7))
    assert levels.select(evidence(0, 10)).shape == (1, 1)


def test_tokens_of_a_missing_camera_hold_nothing():
    valid = torch.arange(40)[None] < 15
    given_evidence = evidence(3, 40, valid=valid)
    kept = build("pact", base=0.6).select(given_evidence)
    assert kept.shape == (1, 10) and kept.max() < 15


def test_every_step_of_the_history_weighs_the_same():
    """One step with ten times the attention does not drown the others."""
    spec = build("pact", window=2, gamma=0.5).history
    assert spec.resolve_layers(32) == (15,)
    history, count = torch.zeros(1, 2, 4), torch.zeros(1, dtype=torch.int64)
    old, new = torch.tensor([[4.0, 0, 0, 4.0]]), torch.tensor([[0.0, 0.1, 0.1, 0.2]])
    for observed in (old, new):
        history, count = spec.update(history, count, observed)
    expected = 0.5 * new / new.sum() + 0.25 * old / old.sum()
    torch.testing.assert_close(spec.forecast(history, count), expected)


def test_the_largest_of_both_stay():
    given_evidence = evidence(4, 20)
    p = given_evidence.semantic / given_evidence.semantic.sum()
    a = given_evidence.forecast / given_evidence.forecast.sum()
    kept = build("pact", keep=6, levels=()).select(given_evidence)
    assert set(kept[0].tolist()) == set(torch.maximum(p, a)[0].topk(6).indices.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "view"}, "for all cameras together"),
        ({"levels": (0.5, 0.25)}, "must ascend within"),
        ({"levels": (0.5, 1.0)}, "must ascend within"),
        ({"levels": (0.0, 0.5)}, "must ascend within"),
        ({"bounds": (0.7, 0.15)}, "ascend in"),
        ({"bounds": (0.7,)}, "ascend in"),
        ({"base": float("nan")}, "base=nan"),
        ({"slope": float("inf")}, "slope=inf"),
        ({"window": 0}, "window=0"),
        ({"gamma": 2.0}, "gamma=2.0"),
        ({"action_layers": "last"}, "'latter-half', 'middle'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("pact", **options)


def test_nan_is_refused():
    given_evidence = evidence(5, 20)
    given_evidence.semantic[0, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        build("pact").select(given_evidence)


def test_an_episode_looks_at_what_its_actions_looked_at(decoders, embeds, rollout):
    model = decoders()
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    with vp.prune(model, "pact", base=0.6, adapter=adapter) as session:
        reports = []
        for step in range(3):
            rollout(model, embeds(step))
            reports.append(session.last)
        with pytest.raises(NotImplementedError, match="as it sees fit"):
            session.compile()
    shares = [report.action[0] / report.action.sum() for report in reports]
    expected = 0.8 * shares[1] + 0.64 * shares[0]
    torch.testing.assert_close(reports[2].forecast[0], expected)
    for report in reports:
        kept = slow_pact(report.semantic[0].tolist(), report.forecast[0].tolist(), base=0.6)
        assert report.kept_indices[0].tolist() == kept
    assert not torch.equal(reports[0].kept_mask, reports[2].kept_mask)
