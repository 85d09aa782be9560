"""VLA-Pruner's remedies for a history that only sees what was kept, and its ablations."""

import pytest
import torch

import vla_pruner as vp
from ladder import VISUAL, M
from vla_pruner.episodes.policy_runner import describe_call
from vla_pruner.methods import Evidence, StepContext, build
from vla_pruner.pruning.flops import layered_prefill_flops


def best(scores, k):
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def run(decoders, embeds, rollout, steps, **options):
    """Kept tokens and whether the step was full, by step, and the reports and costs."""
    model, reports, calls = decoders(), [], []
    adapter = vp.models.Decoder("model.layers", visual=VISUAL)
    settings = dict(tokens=15, gamma=0.1, layer=2, window=2, **options)
    with vp.prune(model, "vla-pruner", adapter=adapter, **settings) as session:
        for step in range(steps):
            rollout(model, embeds(step), steps=1)
            reports.append(session.last)
            calls.append(describe_call(step, 0.0, session.last, session))
    return reports, calls


def returned(reports, window=2):
    """Tokens that the last `window` steps had all cut, and that are kept again."""
    kept = [set(report.kept_mask[0].nonzero()[:, 0].tolist()) for report in reports]
    back = set()
    for step in range(2 * window, len(kept)):
        pruned = [kept[i] for i in range(step) if not bool(reports[i].warm_up)]
        if not bool(reports[step].warm_up):
            back |= kept[step] - set().union(*pruned[-window:])
    return back


REMEDIES = [{"censored": "carry"}, {"refresh": 3}]


def test_the_papers_action_channel_never_elects_a_cut_token_again(decoders, embeds, rollout):
    reports, _ = run(decoders, embeds, rollout, 16, levels="action")
    assert [bool(report.warm_up) for report in reports] == [True] * 2 + [False] * 14
    assert returned(reports) == set()


@pytest.mark.parametrize("options", REMEDIES, ids=str)
def test_with_each_remedy_it_can(decoders, embeds, rollout, options):
    reports, _ = run(decoders, embeds, rollout, 16, levels="action", **options)
    assert returned(reports)
    assert any(not bool(report.warm_up) for report in reports[2:])


def test_full_steps_are_counted_as_what_they_cost(decoders, embeds, rollout):
    reports, calls = run(decoders, embeds, rollout, 9, refresh=3)
    full = [step < 2 or (step - 1) % 3 == 0 for step in range(9)]
    assert [bool(report.warm_up) for report in reports] == full
    sizes = {"hidden": 32, "ffn": 48}
    dear = layered_prefill_flops((30,) * 6, **sizes)
    cheap = layered_prefill_flops((30,) * 2 + (25,) * 4, **sizes)
    assert [call.prefill_macs for call in calls] == [dear if f else cheap for f in full]


@pytest.mark.parametrize("options", [{"levels": "prefill"}, {"levels": "action"}, {"fusion": 0.3}])
def test_ablations_keep_the_best_by_their_score(options):
    semantic, forecast = torch.rand(1, M), 7 * torch.rand(1, M)
    method = build("vla-pruner", keep=6, **options)
    assert method.full_step(StepContext(step=2)) and not method.full_step(StepContext(step=3))
    assert (method.semantic_rows is None) == (options.get("levels") == "action")
    assert (method.history is None) == (options.get("levels") == "prefill")
    kept = method.select(Evidence(torch.randn(1, M, 4), semantic, forecast, (M,), 3))
    s, f = semantic[0].tolist(), forecast[0].tolist()
    w = {"prefill": 1.0, "action": 0.0}.get(options.get("levels"), 0.3)
    mixed = [w * a / sum(s) + (1 - w) * b / sum(f) for a, b in zip(s, f, strict=True)]
    assert kept[0].tolist() == sorted(best(mixed, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"censored": "forget"}, "'zero', 'carry'"),
        ({"refresh": 1}, "refresh=1"),
        ({"levels": "none"}, "'both', 'prefill', 'action'"),
        ({"fusion": 1.5}, "fusion=1.5"),
        ({"fusion": 0.5, "levels": "action"}, "leave one of them out"),
        ({"censored": "carry", "levels": "prefill"}, "about action scores"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("vla-pruner", **options)
