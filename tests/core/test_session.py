"""A session remembers each episode on its own, and leaves nothing behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import vla_pruner as vp
from checks import near
from vla_pruner.core.session import Session

M, KEEP, CUT = 20, 6, 2


def decoder(**options):
    return vp.models.Decoder("model.layers", **{"visual": slice(1, 21), **options})


def prune(model, method="vla-pruner", **options):
    if method == "vla-pruner":
        options = {"window": 2, **options}
    budget = {} if "keep" in options else {"tokens": KEEP}
    options = {**budget, "layer": CUT, "adapter": decoder(), **options}
    return vp.prune(model, method, **options)


def same_report(one, other, row=0, other_row=0):
    assert torch.equal(one.kept_mask[row], other.kept_mask[other_row])
    for name in ("semantic", "forecast", "action"):
        a, b = getattr(one, name)[row], getattr(other, name)[other_row]
        near(a, b)


def episode(model, embeds, rollout, seeds, **options):
    """Last logits and reports of one episode alone."""
    logits, reports = [], []
    with prune(model, **options) as session:
        for seed in seeds:
            logits.append(torch.cat([x[:, -1] for x in rollout(model, embeds(seed))]))
            reports.append(session.last)
    return logits, reports


# ---------------------------------------------------------------------- memory of an episode
def test_first_steps_run_on_all_tokens(decoders, embeds, rollout):
    model = decoders()
    logits, reports = episode(model, embeds, rollout, range(4))
    for step, report in enumerate(reports):
        assert report.steps == (step,) and report.warm_up.tolist() == [step < 2]
        assert int(report.kept_mask.sum()) == (M if step < 2 else KEEP)
        plain = torch.cat([x[:, -1] for x in rollout(model, embeds(step))])
        assert torch.equal(plain, logits[step]) == (step < 2)


def test_forecast_is_the_decaying_window(decoders, embeds, rollout):
    """Eq. 7: the newest step weighs most."""
    _, reports = episode(decoders(), embeds, rollout, range(4), gamma=0.5)
    seen = [report.action[0] for report in reports]
    torch.testing.assert_close(reports[2].forecast[0], 0.5 * seen[1] + 0.25 * seen[0])
    torch.testing.assert_close(reports[3].forecast[0], 0.5 * seen[2] + 0.25 * seen[1])


def test_moving_average(decoders, embeds, rollout):
    _, reports = episode(decoders(), embeds, rollout, range(3), smoothing="ema", alpha=0.3)
    seen = [report.action[0] for report in reports]
    torch.testing.assert_close(reports[2].forecast[0], 0.3 * seen[1] + 0.7 * seen[0])


def test_reset_starts_a_new_episode(decoders, embeds, rollout):
    model = decoders()
    _, alone = episode(model, embeds, rollout, range(3))
    with prune(model) as session:
        for seed in (7, 8, 9):
            rollout(model, embeds(seed))
        session.reset()
        for seed in range(3):
            rollout(model, embeds(seed))
        same_report(session.last, alone[-1])
        assert session.last.steps == (2,)


def test_reset_of_one_episode(decoders, embeds, rollout):
    model = decoders()
    with prune(model) as session:
        session.episodes(["a", "b"])
        rollout(model, embeds(0, 2))
        session.reset(["b"])
        rollout(model, embeds(1, 2))
        assert session.last.episodes == ("a", "b") and session.last.steps == (1, 0)


def test_a_step_counts_once_it_is_over(decoders, embeds, rollout):
    """Reading the report in between changes nothing."""
    model = decoders()
    _, alone = episode(model, embeds, rollout, range(4))
    with prune(model) as session:
        for seed in range(4):
            output = model(inputs_embeds=embeds(seed), use_cache=True)
            first = session.last.action.clone()
            for token in (5, 6, 7):
                model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values)
            assert not torch.equal(first, session.last.action)
        same_report(session.last, alone[-1])


# ---------------------------------------------------------------------- several episodes
def test_interleaved_episodes_do_not_leak(decoders, embeds, rollout):
    model = decoders()
    expected = {name: episode(model, embeds, rollout, seeds) for name, seeds in SEEDS.items()}
    with prune(model) as session:
        for step in range(4):
            for name, seeds in SEEDS.items():
                session.episodes([name])
                logits = rollout(model, embeds(seeds[step]))
                same_report(session.last, expected[name][1][step])
                assert torch.equal(torch.cat([x[:, -1] for x in logits]), expected[name][0][step])


SEEDS = {"left": (0, 1, 2, 3), "right": (10, 11, 12, 13)}


def test_decoding_may_interleave_too(decoders, embeds, rollout):
    """The cache, not the order of calls, says which prompt a decoded token continues."""
    model = decoders()
    expected = {name: episode(model, embeds, rollout, seeds) for name, seeds in SEEDS.items()}
    with prune(model) as session:
        for step in range(4):
            outputs = {}
            for name, seeds in SEEDS.items():
                session.episodes([name])
                outputs[name] = model(inputs_embeds=embeds(seeds[step]), use_cache=True)
            logits = {name: [output.logits[:, -1]] for name, output in outputs.items()}
            for token in (5, 6, 7):
                for name, output in outputs.items():
                    output = model(
                        input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values
                    )
                    logits[name].append(output.logits[:, -1])
            for name in SEEDS:
                assert torch.equal(torch.cat(logits[name]), expected[name][0][step])
        same_report(session.last, expected["right"][1][-1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batch_of_episodes_at_different_steps(decoders, embeds, rollout, attention):
    """Rows that warm up and rows that prune share a batch; each gets what it gets alone."""
    model = decoders("llama", attention)
    expected = {name: episode(model, embeds, rollout, seeds) for name, seeds in SEEDS.items()}
    with prune(model) as session:
        session.episodes(["left"])
        rollout(model, embeds(0))
        session.episodes(["left", "right"])
        for left, right in ((1, 0), (2, 1), (3, 2)):
            both = torch.cat([embeds(SEEDS["left"][left]), embeds(SEEDS["right"][right])])
            logits = rollout(model, both)
            report = session.last
            assert report.steps == (left, right)
            assert report.warm_up.tolist() == [left < 2, right < 2]
            for row, (name, step) in enumerate((("left", left), ("right", right))):
                same_report(report, expected[name][1][step], row)
                mine = torch.stack([x[row, -1] for x in logits])
                near(mine, expected[name][0][step])
            if left == 2:
                assert [len(rows[0]) for rows in report.kept] == [KEEP, M]
                with pytest.raises(ValueError, match="warming up"):
                    _ = report.kept_indices


def test_random_choice_depends_on_its_episode_alone(decoders, embeds):
    model = decoders()
    with prune(model, "random") as session:
        session.episodes(["a", "b"])
        model(inputs_embeds=embeds(0, 2))
        both = session.last.kept_mask
        session.reset()
        session.episodes(["b"])
        model(inputs_embeds=embeds(3))
        alone = session.last.kept_mask
        model(inputs_embeds=embeds(3))
        later = session.last.kept_mask
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(both[0], both[1]) and not torch.equal(alone, later)


def test_rows_of_one_episode_are_one(decoders, embeds, rollout):
    """They share a memory (the mean of what they saw) and keep what the first of them keeps."""
    model = decoders()
    with prune(model, window=1) as session:
        session.episodes(["a", "b", "a"])
        rollout(model, embeds(0, 3))
        seen = session.last.action
        rollout(model, embeds(1, 3))
    report = session.last
    assert report.steps == (1, 1, 1)
    expected = 0.8 * torch.stack([(seen[0] + seen[2]) / 2, seen[1], (seen[0] + seen[2]) / 2])
    torch.testing.assert_close(report.forecast, expected)
    assert not torch.equal(report.semantic[0], report.semantic[2])
    assert torch.equal(report.kept_mask[0], report.kept_mask[2])
    assert not torch.equal(report.kept_mask[0], report.kept_mask[1])


def test_number_of_rows_is_checked(decoders, embeds):
    with prune(decoders()) as session:
        session.episodes(["a", "b"])
        with pytest.raises(ValueError, match="named 2 rows, but this batch has 1"):
            decoders()(inputs_embeds=embeds())
        session.episodes(None)
        decoders()(inputs_embeds=embeds())
        assert session.last.episodes == (0,)


def test_a_changed_camera_needs_a_reset(decoders, embeds):
    model = decoders()

    class Growing(vp.models.Decoder):
        def layout(self, inputs, kwargs):
            visual = torch.arange(1, inputs.shape[1] - 5)[None]
            return vp.models.Layout(visual, (visual.shape[1],))

    with prune(model, adapter=Growing(visual=slice(1, 21))) as session:
        model(inputs_embeds=embeds())
        model(inputs_embeds=embeds())
        with pytest.raises(ValueError, match=r"session\.reset"):
            model(inputs_embeds=embeds(length=33))
        session.reset()
        model(inputs_embeds=embeds(length=33))
        assert session.last.visual_full == 27


def test_prefills_of_one_step(decoders, embeds):
    """What a policy runs several times per action keeps one set of tokens and counts once."""
    model = decoders()
    adapter = decoder(action_rows=slice(-5, None))
    with prune(model, adapter=adapter, window=1) as session:
        for seed in (0, 5):
            with session.step():
                model(inputs_embeds=embeds(seed), use_cache=False)
                first = session.last
                x = torch.cat([embeds(seed)[:, :21], embeds(seed + 1)[:, 21:]], dim=1)
                model(inputs_embeds=x, use_cache=False)
                second = session.last
        assert first.steps == second.steps == (1,)
        assert torch.equal(first.kept_mask, second.kept_mask)
        assert torch.equal(first.semantic, second.semantic), "the score that decided"
        model(inputs_embeds=embeds(6), use_cache=False)
        assert session.last.steps == (2,)
        again = session.last
    assert not torch.equal(first.action, second.action)
    assert not torch.equal(again.kept_mask, first.kept_mask)


# ---------------------------------------------------------------------- the report
def test_report(decoders, embeds, rollout):
    model = decoders()
    with prune(model, adapter=decoder(views=(8, 12)), budget="view", keep=0.25) as session:
        assert session.last is None
        for seed in range(3):
            rollout(model, embeds(seed, 2))
    report = session.last
    assert report.views == (8, 12) and report.per_view
    assert [[len(view) for view in row] for row in report.kept] == [[2, 3], [2, 3]]
    for row in range(2):
        joined = torch.cat([report.kept[row][0], report.kept[row][1] + 8])
        assert torch.equal(joined, report.kept_indices[row])
        best = {
            name: {
                *score[row, :8].topk(2).indices.tolist(),
                *(8 + score[row, 8:].topk(3).indices).tolist(),
            }
            for name, score in (("semantic", report.semantic), ("action", report.forecast))
        }
        for index, reason in zip(joined.tolist(), report.reasons()[row], strict=True):
            hits = [name for name, chosen in best.items() if index in chosen]
            assert reason == ("both" if len(hits) == 2 else hits[0])


@pytest.mark.parametrize(
    ("method", "reason"), [("none", "other"), ("random", "other"), ("fastv", "semantic")]
)
def test_reasons_of_other_methods(decoders, embeds, method, reason):
    with prune(decoders(), method) as session:
        decoders()(inputs_embeds=embeds())
    report = session.last
    assert report.forecast is None and report.action is None
    assert (report.semantic is None) == (method != "fastv")
    assert set(report.reasons()[0]) == {reason}
    assert len(report.reasons()[0]) == (M if method == "none" else KEEP)


def test_reason_while_warming_up(decoders, embeds):
    with prune(decoders()) as session:
        decoders()(inputs_embeds=embeds())
    assert session.last.reasons() == [["warm-up"] * M]


def test_missing_cameras_are_candidates_of_nothing(decoders, embeds):
    class OneCameraMissing(vp.models.Decoder):
        def layout(self, inputs, kwargs):
            there = torch.arange(M)[None] < 8
            return vp.models.Layout(torch.arange(1, 21)[None], (8, 12), visual_valid=there)

    with prune(decoders(), "fastv", adapter=OneCameraMissing(visual=slice(1, 21))) as session:
        decoders()(inputs_embeds=embeds())
    assert len(session.last.kept[0][0]) == KEEP and len(session.last.kept[0][1]) == 0
    assert session.last.reasons() == [["semantic"] * KEEP]


# ---------------------------------------------------------------------- passes without an image
def test_text_alone_is_left_alone(decoders, embeds):
    model = decoders()

    class ImageOrText(vp.models.Decoder):
        def layout(self, inputs, kwargs):
            return super().layout(inputs, kwargs) if inputs.shape[1] == 30 else None

    plain = model(inputs_embeds=embeds(4, length=12), use_cache=True)
    token = torch.tensor([[5]])
    plain_next = model(input_ids=token, past_key_values=plain.past_key_values).logits
    with prune(model, "fastv", adapter=ImageOrText(visual=slice(1, 21))) as session:
        image = model(inputs_embeds=embeds(), use_cache=True)
        text = model(inputs_embeds=embeds(4, length=12), use_cache=True)
        text_next = model(input_ids=token, past_key_values=text.past_key_values).logits
        assert session.last.tokens_full == 30
        model(input_ids=token, past_key_values=image.past_key_values)
    assert torch.equal(plain.logits, text.logits) and torch.equal(plain_next, text_next)


def test_unpruned_cache_of_an_earlier_call(decoders, embeds):
    """A cache that was filled before the session began is continued as it is."""
    model, token = decoders("llama", "eager"), torch.tensor([[5]])
    plain = model(inputs_embeds=embeds(), use_cache=True).past_key_values
    with prune(model, "fastv"):
        model(inputs_embeds=embeds(1), use_cache=True)
        inside = model(input_ids=token, past_key_values=plain).logits
    again = model(inputs_embeds=embeds(), use_cache=True).past_key_values
    assert torch.equal(inside, model(input_ids=token, past_key_values=again).logits)


# ---------------------------------------------------------------------- attach and remove
def state_of(model):
    """Everything that attaching could leave behind."""
    return {
        name: (
            {key: value for key, value in vars(module).items() if not key.endswith("hooks")},
            {key: list(value) for key, value in vars(module).items() if key.endswith("hooks")},
            id(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    } | {"config": model.config.to_dict()}


def same_state(one, other):
    assert one.keys() == other.keys()
    for name in one.keys() - {"config"}:
        assert one[name][0].keys() == other[name][0].keys()
        for key, value in one[name][0].items():
            assert value is other[name][0][key] or value == other[name][0][key], (name, key)
        assert one[name][1:] == other[name][1:]
    assert one["config"] == other["config"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_is_left_behind(decoders, embeds, rollout, attention):
    model = decoders("gemma", attention)
    rollout(model, embeds())
    before, logits = state_of(model), rollout(model, embeds())
    for _ in range(2):
        with prune(model, window=1) as session:
            assert "attached" in repr(session)
            rollout(model, embeds(1))
            rollout(model, embeds(2))
        same_state(before, state_of(model))
        session.remove()
        assert "removed" in repr(session) and session.last is not None
    assert all(torch.equal(a, b) for a, b in zip(logits, rollout(model, embeds()), strict=True))


def test_attaching_twice_gives_the_same(decoders, embeds, rollout):
    runs = [episode(decoders(), embeds, rollout, range(4))[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nothing_is_left_behind_after_an_exception(decoders, embeds, rollout):
    model = decoders()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="robot"), prune(model) as session:
        rollout(model, embeds())
        session.compile()
        raise RuntimeError("the robot fell over")
    same_state(before, state_of(model))


@pytest.mark.parametrize("broken", ["adapter", "layer"])
def test_nothing_is_left_behind_when_attaching_fails(decoders, monkeypatch, broken):
    model = decoders()
    before = state_of(model)

    class Broken(vp.models.Decoder):
        def attach(self, undo):
            super().attach(undo)
            if broken == "adapter":
                raise RuntimeError("no luck")

    if broken == "layer":
        last = model.model.layers[-1]
        monkeypatch.setattr(last, "register_forward_hook", lambda hook, **options: 1 / 0)
        before = state_of(model)
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        prune(model, adapter=Broken(visual=slice(1, 21)))
    same_state(before, state_of(model))
    monkeypatch.undo()
    prune(model).remove()


def test_instance_attributes_of_the_model_survive(make, embeds):
    model = make()
    forward, generate = model.model.forward, model.generate
    model.model.forward, model.generate = forward, generate
    with prune(model) as session:
        session.compile(backend="eager")
        assert model.model.forward is not forward and model.generate is not generate
    assert model.model.forward is forward and model.generate is generate


def test_second_session_on_one_model_is_refused(decoders, embeds):
    model = decoders()
    with prune(model), pytest.raises(RuntimeError, match="already has a pruning session"):
        prune(model, "fastv")
    prune(model, "fastv").remove()


def test_two_models_at_once(decoders, embeds, rollout):
    one, other = decoders("llama"), decoders("qwen3")
    alone = [episode(model, embeds, rollout, range(3))[0] for model in (one, other)]
    with prune(one) as a, prune(other) as b:
        for seed in range(3):
            for model, expected in zip((one, other), alone, strict=True):
                logits = torch.cat([x[:, -1] for x in rollout(model, embeds(seed))])
                assert torch.equal(logits, expected[seed])
        assert a.last.steps == b.last.steps == (2,)


def test_an_interrupted_pass_is_forgotten(decoders, embeds, rollout):
    model = decoders()
    _, alone = episode(model, embeds, rollout, range(3))

    def fail(*_):
        raise KeyboardInterrupt

    with prune(model) as session:
        rollout(model, embeds(0))
        rollout(model, embeds(1))
        hook = model.model.layers[4].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(inputs_embeds=embeds(9))
        hook.remove()
        model(inputs_embeds=embeds(2))
        assert torch.equal(session.last.forecast, alone[2].forecast)


def test_caches_are_not_kept_alive(decoders, embeds):
    model = decoders()
    with prune(model):
        cache = weakref.ref(model(inputs_embeds=embeds(), use_cache=True).past_key_values)
        gc.collect()
        assert cache() is None


# ---------------------------------------------------------------------- requests
def test_prune_checks_what_it_gets(decoders):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        vp.prune("openvla/openvla-7b")
    with pytest.raises(TypeError, match=r"no model family knows LlamaForCausalLM"):
        vp.prune(decoders())
    with pytest.raises(ValueError, match="vla-pruner"):
        prune(decoders(), "vla-prunner")
    with pytest.raises(ValueError, match="window"):
        prune(decoders(), "vla-pruner", windows=3)


def test_frames_that_are_none_are_refused(decoders):
    good = torch.rand(1, 3, 8, 8) * 255
    with prune(decoders()) as session:
        for images, error, says in (
            ([good[0].numpy()], TypeError, r"must be a tensor .* got a list"),
            (good.permute(0, 2, 3, 1).numpy(), TypeError, "got a ndarray.*permute"),
            (good.permute(0, 2, 3, 1), ValueError, r"got \(1, 1, 8, 8, 3\)"),
            (good - 100, ValueError, "negative"),
            (good * torch.nan, ValueError, "NaN"),
        ):
            with pytest.raises(error, match=says):
                session.frame(images)
        session.frame(good.byte())


def test_compile_after_removal_is_refused(decoders):
    session = prune(decoders())
    session.remove()
    with pytest.raises(RuntimeError, match="removed"):
        session.compile()


def test_public_names():
    assert "vla-pruner" in vp.list_methods() and "hf-vlm" in vp.list_models()
    with pytest.warns(DeprecationWarning, match="list_methods"):
        assert vp.methods() == vp.list_methods()
    with pytest.warns(DeprecationWarning, match="list_models"):
        assert vp.models().keys() == vp.list_models().keys()
    assert isinstance(vp.__version__, str) and vp.Session is Session
    assert callable(vp.prune) and vp.models.Decoder and vp.methods.Method
