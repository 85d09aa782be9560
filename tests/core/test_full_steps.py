"""A method decides, from what is known of an episode, which steps run on all tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import vla_pruner as vp
from ladder import VISUAL, Ladder, M
from vla_pruner.methods import Choice, StepContext


@dataclass(frozen=True, kw_only=True)
class Scripted(Ladder):
    """Full where `script` says so, by number of the step; notes every context."""

    script: tuple[bool, ...] = (True, False, False, True, False)
    contexts: tuple[list[StepContext], ...] = ()
    asks: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return self.asks

    def full_step(self, context: StepContext) -> bool:
        for log in self.contexts:
            log.append(context)
        return self.script[context.step]


def prune(model, **options):
    adapter = vp.models.Decoder("model.layers", visual=VISUAL)
    return vp.prune(model, Scripted(watch=(3, 5), **options), adapter=adapter)


def test_context_of_each_step(decoders, embeds, rollout):
    model, log, reports = decoders(), [], []
    with prune(model, contexts=(log,)) as session:
        for step in range(5):
            rollout(model, embeds(step))
            reports.append(session.last)
            session.motion(0.5 * step)
    assert [c.step for c in log] == [0, 1, 2, 3, 4]
    assert [c.since_full for c in log] == [0, 0, 1, 2, 0]
    assert [c.motion for c in log][3] == (0.0, 0.5, 1.0)
    assert [bool(report.warm_up) for report in reports] == [True, False, False, True, False]
    assert [int(report.kept_mask.sum()) for report in reports] == [M, 5, 5, M, 5]
    assert reports[0].tokens_per_layer == (30,) * 6 and reports[0].stages == ()


def test_full_steps_equal_the_untouched_model(decoders, embeds, rollout):
    model = decoders()
    with prune(model) as session:
        runs = [rollout(model, embeds(step)) for step in range(5)]
        assert session.last.steps == (4,)
    for step, logits in enumerate(runs):
        plain = rollout(model, embeds(step))
        same = all(torch.equal(a, b) for a, b in zip(logits, plain, strict=True))
        assert same == (step in (0, 3))


def test_episodes_decide_for_themselves(decoders, embeds, rollout):
    """In one batch one row is full and the other is not; a reset forgets everything."""
    model, log = decoders(), []
    with prune(model, contexts=(log,)) as session:
        session.episodes(["a"])
        rollout(model, embeds(0))
        session.motion(1.0)
        session.episodes(["a", "b"])
        with pytest.raises(ValueError, match="2 episodes; say which one"):
            session.motion(2.0)
        session.motion(2.0, "b")
        rollout(model, embeds(1, batch=2))
        report = session.last
        assert report.warm_up.tolist() == [False, True]
        assert [c.motion for c in log[-2:]] == [(1.0,), (2.0,)]
        session.reset(["a"])
        rollout(model, embeds(2, batch=2))
    assert [(c.step, c.motion) for c in log[-2:]] == [(0, ()), (1, (2.0,))]
    assert session.last.warm_up.tolist() == [True, False]


def test_motion_before_the_first_step_counts(decoders, embeds):
    log = []
    with prune(decoders(), contexts=(log,)) as session:
        session.motion(3.0)
        decoders()(inputs_embeds=embeds())
    assert log[0].motion == (3.0,)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_motion_has_to_be_finite(decoders, value):
    with prune(decoders()) as session, pytest.raises(ValueError, match="finite"):
        session.motion(value)


def test_motion_that_is_never_reported_is_refused(decoders, embeds):
    model = decoders()
    with prune(model, asks=("motion",)) as session:
        model(inputs_embeds=embeds(0))
        with pytest.raises(ValueError, match=r"session\.motion\(distance\)"):
            model(inputs_embeds=embeds(1))
        session.motion(1.0)
        model(inputs_embeds=embeds(1))
        assert session.last.steps == (1,)


def test_needs_that_nobody_meets_are_refused(decoders):
    with pytest.raises(ValueError, match="'cls', which nothing can"):
        prune(decoders(), asks=("cls",))


def test_a_method_may_refuse_a_model(decoders):
    class Picky(Ladder):
        def check(self, config, num_layers):
            raise ValueError(f"made for 32 layers, not {num_layers} of {config.hidden_size}")

    adapter = vp.models.Decoder("model.layers", visual=VISUAL)
    with pytest.raises(ValueError, match="not 6 of 32"):
        vp.prune(decoders(), Picky(), adapter=adapter)


def test_adaptive_budgets_differ_from_step_to_step(decoders, embeds, rollout):
    class Adaptive(Ladder):
        adaptive = True

        def select(self, evidence):
            asked = 3 + int(evidence.features.sum().abs()) % 5
            if evidence.number:
                return torch.arange(evidence.keep_count)[None]
            return Choice(torch.arange(asked)[None])

    model = decoders()
    adapter = vp.models.Decoder("model.layers", visual=VISUAL)
    sizes = set()
    for mode in ("drop", "mask"):
        runs = []
        with vp.prune(model, Adaptive(left=(12, 4)), adapter=adapter, mode=mode) as session:
            for step in range(4):
                runs.append(torch.cat([x[:, -1] for x in rollout(model, embeds(step))]))
                expected = 3 + int(embeds(step)[:, VISUAL].sum().abs()) % 5
                assert int(session.last.stages[0].kept_mask.sum()) == expected
                assert session.last.visual_full == M
                assert int(session.last.kept_mask.sum()) == min(4, expected)
                sizes.add(expected)
        if mode == "drop":
            dropped = runs
    assert len(sizes) > 1
    for one, other in zip(dropped, runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("censored", ["zero", "carry"])
def test_what_is_remembered_of_tokens_that_were_cut(decoders, embeds, rollout, censored):
    """The memory after a pruned step, from the step's report, by hand."""
    from vla_pruner.methods import HistorySpec

    class Remembers(Scripted):
        @property
        def history(self):
            return HistorySpec(layers=(3, 5), window=1, gamma=1.0, censored=censored)

    model = decoders()
    adapter = vp.models.Decoder("model.layers", visual=VISUAL)
    with vp.prune(model, Remembers(), adapter=adapter) as session:
        rollout(model, embeds(0))
        full = session.last.action[0]
        rollout(model, embeds(1))
        pruned = session.last
        rollout(model, embeds(2))
        forecast = session.last.forecast[0]
    kept = pruned.stages[1].kept_mask[0]  # Layer 5 saw these, layer 3 saw more.
    assert kept.sum() == 5
    scale = 1.0
    if censored == "carry":
        scale = full[kept].sum() / pruned.action[0][kept].sum()
    for token in range(M):
        expected = scale * pruned.action[0, token]
        if not kept[token] and censored == "carry":
            expected = full[token]
        torch.testing.assert_close(forecast[token], expected)
