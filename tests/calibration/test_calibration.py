"""A recipe is made on a policy, found, used and refused; the policy stays what it was."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import vla_pruner as vp
from checks import near
from vla_pruner.calibration import efficientvla, fitprune, vtw
from vla_pruner.calibration.search import calibrate
from vla_pruner.episodes.observations import (
    Observations,
)
from vla_pruner.methods.recipe import Recipe
from vla_pruner.models import find_adapter, recipes

FAMILIES = pytest.mark.parametrize("family", ["oft", "openvla"])


def state_of(model):
    return {
        name: (set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def decoder_passes(policy, observation):
    """Arguments of every decoder pass of one call."""
    found = []
    decoder = policy.language_model.model
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs), with_kwargs=True
    )
    policy.predict_action(**observation)
    handle.remove()
    return found


# ---------------------------------------------------------------------- measurements
@FAMILIES
def test_received_attention_is_the_eager_models(policies, look, family):
    policy = policies(family)
    seen = [look(policy, seed) for seed in range(2)]
    before = state_of(policy)
    ticks = []
    cross, own = fitprune.received_attention(
        policy, find_adapter(policy), seen, tick=lambda: ticks.append(1)
    )
    assert state_of(policy) == before and len(ticks) == 2
    size = sum(policy.config.views)
    assert cross.shape == own.shape == (2, 3, size)
    policy.language_model.set_attn_implementation("eager")
    for row, observation in enumerate(seen):
        kwargs = decoder_passes(policy, observation)[0]
        kwargs = {
            name: kwargs[name] for name in ("inputs_embeds", "attention_mask") if name in kwargs
        }
        kwargs |= {"use_cache": False, "output_attentions": True}
        attentions = policy.language_model.model(**kwargs).attentions
        length = kwargs["inputs_embeds"].shape[1]
        if family == "oft":  # BOS, images, state, text, slots, stop
            text = range(1 + size + 1, length - policy.config.slots - 1)
        else:
            text = range(1 + size, length)
        assert len(text) > 2
        for layer in range(3):
            strongest = attentions[layer][0].amax(dim=0)[:, 1 : 1 + size]
            expected = strongest[list(text)].mean(dim=0), strongest[1 : 1 + size].mean(dim=0)
            for found, right in zip((cross, own), expected, strict=True):
                near(found[row, layer].float(), right)


@FAMILIES
def test_layer_importance_is_that_of_the_hidden_states(policies, look, family):
    policy = policies(family)
    seen = [look(policy, seed) for seed in range(2)]
    before = state_of(policy)
    found = efficientvla.layer_importance(policy, find_adapter(policy), seen)
    assert state_of(policy) == before
    decoder, expected = policy.language_model.model, []
    for observation in seen:
        kwargs = {**decoder_passes(policy, observation)[0], "use_cache": False}
        kwargs.pop("past_key_values", None)
        states = []
        keep = states.append
        hooks = [decoder.layers[0].register_forward_pre_hook(lambda m, a, keep=keep: keep(a[0]))]
        for layer in decoder.layers:
            hooks.append(layer.register_forward_hook(lambda m, a, out, keep=keep: keep(out)))
        decoder(**kwargs)
        for hook in hooks:
            hook.remove()
        states = [s[0] if isinstance(s, tuple) else s for s in states]
        expected.append(
            [
                1
                - np.mean(
                    [float(torch.cosine_similarity(x, y, dim=0)) for x, y in zip(a, b, strict=True)]
                )
                for a, b in zip(
                    [s[0] for s in states[:-1]], [s[0] for s in states[1:]], strict=True
                )
            ]
        )
    assert found == pytest.approx(np.mean(expected, axis=0).tolist(), abs=1e-5)


def test_withdrawal_is_measured_on_the_actions_of_a_parallel_policy(policies, look):
    policy = policies("oft")
    seen = [look(policy, seed) for seed in range(3)]
    before = state_of(policy)
    result = vtw.withdrawal_divergences(policy, find_adapter(policy), seen)
    assert state_of(policy) == before
    found = result.divergences
    assert (result.measure, result.visual, sorted(found)) == ("actions", 32, [1, 2, 3])
    full = np.stack([policy.predict_action(**o) for o in seen]).astype(np.float64)
    for layer in (1, 3):
        with vp.prune(policy, "vtw", layer=layer) as session:
            pruned = np.stack([policy.predict_action(**o) for o in seen])
            assert session.last.visual_kept == 0
        spread = full.reshape(-1, 7).std(axis=0)
        assert found[layer] == pytest.approx((abs(full - pruned) / spread).mean(), rel=1e-5)
        assert found[layer] > 0


def test_withdrawal_is_measured_on_the_logits_of_an_autoregressive_policy(policies, look):
    policy = policies("openvla")
    seen = [look(policy, seed) for seed in range(2)]
    result = vtw.withdrawal_divergences(policy, find_adapter(policy), seen)
    found = result.divergences
    assert (result.measure, result.visual, sorted(found)) == ("logits", 16, [1, 2, 3])

    def last(observation):
        inputs = policy.prepare([observation])
        return policy(inputs.input_ids, inputs.pixel_values).logits[0, -1].double()

    full = [last(o) for o in seen]
    with vp.prune(policy, "vtw", layer=2):
        pruned = [last(o) for o in seen]
    expected = []
    for a, b in zip(full, pruned, strict=True):
        p, q = a.softmax(dim=0).tolist(), b.softmax(dim=0).tolist()
        expected.append(sum(y * np.log(y / x) for x, y in zip(p, q, strict=True)))
    assert found[2] == pytest.approx(np.mean(expected), rel=1e-3)


def test_an_empty_list_of_observations_is_refused(policies):
    policy = policies("oft")
    for search in (
        fitprune.received_attention,
        efficientvla.layer_importance,
        vtw.withdrawal_divergences,
    ):
        with pytest.raises(ValueError, match="no observations"):
            search(policy, find_adapter(policy), [])


# ---------------------------------------------------------------------- recipes
@FAMILIES
@pytest.mark.parametrize(
    ("method", "keep", "options"),
    [
        ("fitprune", 0.5, {}),
        ("vtw", 0.5, {}),
        ("efficientvla", None, {"parts": "layers"}),
        ("efficientvla", None, {"parts": "both", "skip": 1}),
    ],
)
def test_a_recipe_prunes_the_model_it_was_made_for(
    policies, look, tmp_path, family, method, keep, options
):
    policy = policies(family)
    seen = Observations(tuple(look(policy, seed) for seed in range(3)), "random", (4, 5, 6))
    total, ticks = [], []
    recipe = calibrate(
        method,
        policy,
        seen,
        keep=keep,
        layer=0,
        on_start=total.append,
        tick=lambda: ticks.append(1),
    )
    assert total == [len(ticks)]
    recipe.save(tmp_path / "recipe.json")
    stored = json.loads((tmp_path / "recipe.json").read_text())
    assert stored["observations"] == {"count": 3, "source": "random", "seeds": [4, 5, 6]}
    assert stored["model"]["policy"] == type(policy).__name__ and stored["environment"]["torch"]
    plain = policy.predict_action(**look(policy))
    asked = {"keep": keep, "recipe": tmp_path / "recipe.json", **options}
    with vp.prune(policy, method, **asked) as session:
        policy.predict_action(**look(policy))
        report = session.last
    length, size = report.tokens_full, sum(policy.config.views)
    if method == "fitprune":
        left = recipe.values["left"]
        assert left[-1] < size
        expected = tuple(length - size + n for n in left)
    elif method == "vtw":
        expected = (length, length, length - size, length - size)
    else:
        (least,) = (
            [min((1, 2, 3), key=recipe.values["importance"].__getitem__)]
            if options["parts"] == "layers"
            else [min((2, 3), key=recipe.values["importance"].__getitem__)]
        )
        short = length - size + size // 4 if options["parts"] == "both" else length
        expected = tuple(
            0 if layer == least else (short if layer >= 2 else length) for layer in range(4)
        )
    assert report.tokens_per_layer == expected
    np.testing.assert_array_equal(policy.predict_action(**look(policy)), plain)

    other = policies("openvla" if family == "oft" else "oft")
    with pytest.raises(ValueError, match="another model"):
        vp.prune(other, method, **asked)
    policy.language_model.model.layers[2].mlp.up_proj.weight += 1
    with pytest.raises(ValueError, match="other_weights=True"):
        vp.prune(policy, method, **asked)
    vp.prune(policy, method, other_weights=True, **asked).remove()


@FAMILIES
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fitprune", {}),
        ("vtw", {"layer": 2}),
        ("efficientvla", {"tokens": 5}),
        ("fixed", {"indices": [1, 5, 8]}),
    ],
)
def test_dropping_equals_hiding(policies, look, family, method, options):
    policy = policies(family)
    size = sum(policy.config.views)
    if method == "fitprune":
        stamp = recipes.stamp_model(policy, find_adapter(policy))
        values = {"left": [size, 9, 9, 4]}
        options = {"recipe": Recipe(method="fitprune", model=stamp, values=values)}
    rows = getattr(policy.config, "action_rows", slice(-1, None))
    runs, kept = [], []
    for mode in ("drop", "mask"):
        found = []
        hook = policy.language_model.model.register_forward_hook(
            lambda module, args, output, found=found: found.append(output[0][:, rows])
        )
        with vp.prune(policy, method, mode=mode, **options) as session:
            policy.predict_action(**look(policy))
            kept.append(session.last.kept_mask)
        hook.remove()
        runs.append(found)
    assert torch.equal(*kept)
    assert int(kept[0].sum()) == {"fitprune": 4, "vtw": 0, "efficientvla": 5, "fixed": 3}[method]
    assert len(runs[0]) == len(runs[1]) == (1 if family == "oft" else 7)
    for dropped, hidden in zip(*runs, strict=True):
        near(dropped, hidden)


def test_skipped_layers_are_as_good_as_gone(policies, look):
    policy, shorter = policies("oft"), policies("oft")
    seen = look(policy)
    stamp = recipes.stamp_model(policy, find_adapter(policy))
    values = {"importance": [0.4, 0.1, 0.3, 0.2]}
    recipe = Recipe(method="efficientvla", model=stamp, values=values)
    del shorter.language_model.model.layers[3], shorter.language_model.model.layers[1]
    shorter.language_model.config.num_hidden_layers = 2
    expected = shorter.predict_action(**seen)
    with vp.prune(policy, "efficientvla", parts="layers", skip=2, recipe=recipe):
        near(policy.predict_action(**seen), expected)
    assert abs(policy.predict_action(**seen) - expected).max() > 1e-3


def test_fitprune_on_a_model_drops_the_smallest_products(policies, look):
    """Every cut of a whole pass, against scores of a pass in which nothing was dropped before."""
    policy = policies("oft")
    observation = look(policy)
    cross, own = fitprune.received_attention(policy, find_adapter(policy), [observation])
    size = sum(policy.config.views)
    stamp = recipes.stamp_model(policy, find_adapter(policy))
    recipe = Recipe(method="fitprune", model=stamp, values={"left": [size, size, 10, 10]})
    with vp.prune(policy, "fitprune", recipe=recipe) as session:
        policy.predict_action(**observation)
        kept = session.last.kept_indices[0].tolist()
    product = (cross[0, 1] * own[0, 1]).tolist()
    assert kept == sorted(sorted(range(size), key=lambda i: -product[i])[:10])


def test_a_recipe_beside_the_weights_is_found(policies, look, tmp_path, monkeypatch):
    policy = policies("oft")
    monkeypatch.setattr(recipes, "shipped", lambda: {"a": tmp_path / "a", "b": tmp_path / "b"})
    with pytest.raises(ValueError, match="vla-pruner calibrate fitprune"):
        vp.prune(policy, "fitprune", keep=0.5)
    seen = Observations((look(policy),), "random")
    recipe = calibrate("fitprune", policy, seen, keep=0.5, layer=1)
    other = replace(recipe, model=replace(recipe.model, weights="000000000000"))
    other.save(tmp_path / "a" / "recipes" / "fitprune-0.5.json")
    recipe.save(tmp_path / "b" / "recipes" / "fitprune-0.5.json")
    with vp.prune(policy, "fitprune", keep=0.5) as session:
        assert session.method.recipe == recipe
    with pytest.raises(ValueError, match="vla-pruner calibrate fitprune"):
        vp.prune(policy, "fitprune", keep=0.25)
    importance = calibrate("efficientvla", policy, seen)
    importance.save(tmp_path / "b" / "recipes" / "efficientvla.json")
    for keep in (0.5, 0.25):
        with vp.prune(policy, "efficientvla", keep=keep, parts="both") as session:
            assert session.method.recipe == importance


def test_the_sample_of_the_weights_knows_models_apart_and_dtypes_not(policies):
    policy = policies("oft")
    digits = recipes.weights_digest(policy)
    assert digits == recipes.weights_digest(policies("oft")) and len(digits) == 12
    rounded = recipes.weights_digest(policy.to(torch.bfloat16))
    assert rounded == digits == recipes.weights_digest(policy.to(torch.float32))
    policy.action_head.model.fc1.bias[0] += 1
    assert recipes.weights_digest(policy) != digits


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fastv", {}, "'fastv' has no calibration; choose from fitprune, vtw, efficientvla"),
        ("fitprune", {}, "give `keep`"),
        ("fitprune", {"keep": 0.5, "eta": 0.1}, "vtw alone"),
        ("vtw", {"keep": 0.5, "eta": 0.1}, "instead of `keep`"),
        ("vtw", {"keep": 0.1, "layer": 0}, r"0\.250 of it; keep more"),
        ("vtw", {"keep": 0.5, "layer": 4}, "layer=4"),
        ("fitprune", {"keep": 1.5}, r"keep=1\.5"),
        ("vtw", {"eta": 0.0}, "no layer can do without"),
        ("efficientvla", {"keep": 0.5}, "leave `keep` out"),
    ],
)
def test_impossible_requests_are_refused(policies, look, method, options, message):
    policy = policies("oft")
    with pytest.raises(ValueError, match=message):
        calibrate(method, policy, Observations((look(policy),), "random"), **options)


def test_a_budget_is_met_as_one_cut_would_meet_it(policies, look):
    policy = policies("oft")
    seen = Observations((look(policy), look(policy, 1)), "random")
    with vp.prune(policy, "fastv", keep=0.25, layer=2) as session:
        policy.predict_action(**look(policy))
        one_cut = session.last.tokens_per_layer
    others = one_cut[0] - 32
    for method in ("fitprune", "vtw"):
        recipe = calibrate(method, policy, seen, keep=0.25, layer=2)
        with vp.prune(policy, method, keep=0.25, recipe=recipe) as session:
            policy.predict_action(**look(policy))
            visual = [n - others for n in session.last.tokens_per_layer]
        assert sum(visual) <= sum(n - others for n in one_cut) + 1
        assert recipe.settings["share"] <= recipe.settings["budget"]
        assert recipe.settings["layer"] == 2
    assert recipe.values["layer"] == 2


def test_vtw_without_a_budget_takes_the_first_layer_within_eta(policies, look):
    policy = policies("oft")
    seen = Observations((look(policy), look(policy, 1)), "random")
    loose = calibrate("vtw", policy, seen, eta=1e9)
    assert loose.values["layer"] == 1 and loose.keep is None
    divergence = loose.values["divergence"]
    eta = divergence["3"]
    expected = min(int(k) for k, value in divergence.items() if value <= eta)
    assert calibrate("vtw", policy, seen, eta=eta).values["layer"] == expected
