"""Pruning pi0 and pi0.5: the prefix is cut, the expert reads what is left, nothing else changes."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pi0 import CAMERAS, CHUNK, make, observation

import vla_pruner as vp
from checks import near
from vla_pruner.models.pi0 import Pi0Adapter
from vla_pruner.models.pi0.gemma import SharedKV

KINDS = pytest.mark.parametrize("kind", ["pi0", "pi05"])
# cameras, and which are missing in each row of the batch
SCENES = {
    "two cameras": (2, [(), ()]),
    "three cameras": (3, [(), ()]),
    "one missing in one row": (3, [(1,), ()]),
    "the first missing in all": (3, [(0,), (0,)]),
    "alone": (2, [()]),
}

FLOW = 2e-5  # Euler steps add up what each of them rounds


def run(model, session, missing, steps=2):
    """Scaled actions [B, chunk, D] of each step of an episode."""
    cameras = model.config.num_images
    session.reset()
    found = []
    for step in range(steps):
        rows = [observation(4 * step + i, cameras, gone) for i, gone in enumerate(missing)]
        found.append(model.sample(model.prepare(rows)))
    return found


@KINDS
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(
    ("attention", "budget"), [("sdpa", "global"), ("sdpa", "view"), ("eager", "global")]
)
def test_pruned_equals_masked(kind, attention, scene, budget, proves):
    cameras, missing = SCENES[scene]
    model = make(kind, attention, cameras=CAMERAS[:cameras])
    options = dict(method="vla-pruner", keep=0.34, layer=2, window=1, budget=budget)
    with vp.prune(model, **options) as session:
        dropped, report = run(model, session, missing), session.last
    with vp.prune(model, **options, mode="mask") as session:
        masked = run(model, session, missing)
        assert torch.equal(session.last.kept_mask, report.kept_mask)
        near(session.last.action, report.action)
    for one, other in zip(dropped, masked, strict=True):
        near(one, other, FLOW)
    expected = sum(report.views) // 3 if budget == "global" else cameras * 3
    assert report.visual_kept == expected < report.visual_full == 9 * cameras
    assert report.tokens_per_layer[2:] == (report.tokens_kept,) * 2
    untouched = run(model, session, missing)
    assert (untouched[1] - dropped[1]).abs().max() > 1e-3
    assert torch.equal(untouched[0], dropped[0]), "the first step is a warm-up"
    several = ("batch", "padding") if len(missing) > 1 else ()
    gone = ("missing",) if any(missing) else ()
    proves("pi0", type(model), "reference", "cameras", "dynamic", *several, *gone)


@KINDS
@pytest.mark.parametrize("method", ["random", "fastv", "divprune"])
def test_cuts_before_the_first_layer_and_one_score_methods(kind, method):
    model = make(kind)
    layer = {} if method == "divprune" else {"layer": 2 if method == "fastv" else 0}
    extra = {"positions": "keep"} if method == "divprune" else {}
    found = []
    for mode in ("drop", "mask"):
        with vp.prune(model, method, tokens=4, mode=mode, **layer, **extra) as session:
            found.append(run(model, session, [(), ()]))
            assert session.last.visual_kept == 4 or mode == "mask"
    for one, other in zip(*found, strict=True):
        near(one, other, FLOW)


@KINDS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_and_removing_are_exact(kind, attention, proves):
    model = make(kind, attention, cameras=CAMERAS)
    missing = [(1,), ()]
    names, hooks = set(vars(model.expert)), [len(m._forward_pre_hooks) for m in model.modules()]
    configs = [layer.self_attn.config for layer in model.expert.layers]
    with vp.prune(model, "vla-pruner", keep=1.0, layer=2, window=1) as session:
        everything = run(model, session, missing)
    assert set(vars(model.expert)) == names
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    kept = (layer.self_attn.config for layer in model.expert.layers)
    assert all(a is b for a, b in zip(kept, configs, strict=True))
    for one, other in zip(everything, run(model, session, missing), strict=True):
        assert torch.equal(one, other)
    proves("pi0", type(model), "keep=1.0", "undo")


def test_removed_after_an_error():
    model = make()
    before = model.predict_actions([observation()])
    with (
        pytest.raises(ZeroDivisionError),
        vp.prune(model, "vla-pruner", keep=0.3, layer=2, window=1),
    ):
        model.predict_actions([observation()])
        raise ZeroDivisionError
    assert (model.predict_actions([observation()]) == before).all()


@KINDS
def test_missing_cameras_are_no_candidates(kind):
    model = make(kind, cameras=CAMERAS)
    for method in ("vla-pruner", "fastv", "random"):
        with vp.prune(model, method, tokens=9, layer=2) as session:
            run(model, session, [(1,), (0,)], steps=4)
            kept = session.last.kept_mask.view(2, 3, 9).sum(dim=2)
        assert kept[0, 1] == kept[1, 0] == 0
        assert kept.sum(dim=1).tolist() == [9, 9]


def seen_attention(model, inputs):
    """Prefix attention per layer [B, H, P, P], expert attention per step and layer [B, H, Q, N]."""
    prefix, expert = [], []
    handles = [
        layer.self_attn.register_forward_hook(
            lambda module, args, output, into=into: into.append(output[1])
        )
        for stack, into in ((model.language_model, prefix), (model.expert, expert))
        for layer in stack.layers
    ]
    model.sample(inputs)
    for handle in handles:
        handle.remove()
    depth = len(model.expert.layers)
    return prefix, [expert[i : i + depth] for i in range(0, len(expert), depth)]


@KINDS
@pytest.mark.parametrize("flow_steps", ["latter-half", "all"])
@pytest.mark.parametrize("layers", ["latter-half", (0, 1, 2, 3)])
def test_scores_are_those_of_the_attention_weights(kind, flow_steps, layers):
    model = make(kind, "eager", cameras=CAMERAS)
    rows = [observation(0, 3, (1,)), observation(1, 3)]
    inputs = model.prepare(rows)
    prefix, expert = seen_attention(model, inputs)
    valid = torch.cat(
        [inputs.image_mask.repeat_interleave(9, dim=1), inputs.token_mask], dim=1
    ).float()
    received = (prefix[1].mean(1) * valid[:, :, None]).sum(1) / valid.sum(1, keepdim=True)
    steps = expert if flow_steps == "all" else expert[1:]
    watched = (2, 3) if layers == "latter-half" else layers
    action = torch.stack([step[i][:, :, -CHUNK:, :27] for step in steps for i in watched])
    with vp.prune(
        model,
        "vla-pruner",
        keep=0.3,
        layer=2,
        window=1,
        action_layers=layers,
        adapter=Pi0Adapter(model, flow_steps=flow_steps),
    ) as session:
        run_twice = [model.predict_actions(rows) for _ in range(2)]
        near(session.last.semantic, received[:, :27])
        near(session.last.forecast, 0.8 * action.mean((0, 2, 3)))
    assert len(run_twice) == 2


def test_unknown_flow_steps_are_refused():
    with pytest.raises(ValueError, match='"latter-half" or "all"'):
        Pi0Adapter(make(), flow_steps="first")


def test_the_expert_keeps_its_positions_and_reads_short_keys(monkeypatch):
    model = make()
    positions, lengths = [], []
    model.expert.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    update = SharedKV.update

    def watched(self, key, value, layer, *rest, **more):
        found = update(self, key, value, layer, *rest, **more)
        lengths.append((layer, found[0].shape[2]))
        return found

    monkeypatch.setattr(SharedKV, "update", watched)
    inputs = model.prepare([observation()])
    model.sample(inputs)
    full = positions[0]
    lengths.clear()
    with vp.prune(model, "fastv", tokens=4, layer=2) as session:
        model.sample(inputs)
        total, left = session.last.tokens_full, session.last.tokens_kept
    assert all(torch.equal(p, full) for p in positions)
    assert left == total - 14
    short = [n for layer, n in lengths[4:] if layer >= 2]
    assert {n for layer, n in lengths[4:] if layer < 2} == {total + CHUNK + 1}
    assert set(short) == {left + CHUNK + 1} and len(short) == 3 * 2


def test_episodes_of_a_batch_do_not_mix():
    model = make()
    rows = [[observation(10 * i + step) for step in range(4)] for i in range(2)]
    options = dict(method="vla-pruner", keep=0.3, layer=2, window=2)
    with vp.prune(model, **options) as session:
        together = []
        for pair in zip(*rows, strict=True):
            model.predict_actions(list(pair))
            together.append(session.last.kept_mask)
        for i, alone in enumerate(rows):
            session.reset()
            for step, one in enumerate(alone):
                model.predict_actions([one])
                assert torch.equal(session.last.kept_mask[0], together[step][i])


@KINDS
def test_layers_can_be_skipped_in_both_stacks(kind):
    """What is left is the policy without that layer."""
    from vla_pruner.methods import build
    from vla_pruner.methods.recipe import Recipe
    from vla_pruner.models import find_adapter
    from vla_pruner.models.recipes import stamp_model

    model = make(kind)
    recipe = Recipe(
        method="efficientvla",
        model=stamp_model(model, find_adapter(model)),
        values={"importance": [0.9, 0.8, 0.1, 0.7]},
    )
    method = build("efficientvla", parts="layers", skip=1, recipe=recipe)
    inputs = model.prepare([observation()])
    with vp.prune(model, method):
        skipped = model.sample(inputs)
    short = replace(model.config.prefix, depth=3), replace(model.config.expert, depth=3)
    other = make(kind, prefix=short[0], expert=short[1])
    state = {name: value for name, value in model.state_dict().items() if ".layers.2." not in name}
    state = {name.replace(".layers.3.", ".layers.2."): value for name, value in state.items()}
    other.load_state_dict(state)
    near(skipped, other.sample(inputs), FLOW)


def test_renumbering_is_refused():
    with pytest.raises(NotImplementedError, match='Use positions="keep"'):
        vp.prune(make(), "divprune", keep=0.3, positions="compact")


def test_a_changed_number_of_cameras_is_explained():
    model = make()
    with vp.prune(model, "vla-pruner", keep=0.3, layer=2) as session:
        model.predict_actions([observation()])
        model.config = replace(model.config, cameras=CAMERAS)
        with pytest.raises(ValueError, match=r"session\.reset"):
            model.predict_actions([observation(cameras=3)])
        session.reset()
        model.predict_actions([observation(cameras=3)])


def test_the_family_is_listed_and_described():
    family = vp.list_models()["pi0"]
    model = make()
    assert family.matches(model) and "GemmaStack, 4 layers" in family.make(model).describe()
    found = model.predict_action(*observation().values())
    assert np.isfinite(found).all()


@KINDS
def test_frames_are_the_images_that_enter_the_tower(kind):
    model, rows = make(kind), [observation(0), observation(1)]
    taken = []
    with ExitStack() as undo:
        Pi0Adapter(model).send_frames(taken.append, undo)
        inputs = model.prepare(rows)
        model.sample(inputs)
    expected = ((inputs.images.float() + 1) * 127.5).round()
    assert len(taken) == 1 and torch.equal(taken[0], expected)
    assert 0 <= taken[0].min() < 50 and 200 < taken[0].max() <= 255
    model.sample(inputs)
    assert len(taken) == 1


@KINDS
def test_vla_cache_reuses_what_an_unchanged_image_left(kind):
    """Of the same observation reused keys and values are those that a full prefix computes."""
    model = make(kind)
    inputs, other = model.prepare([observation(0)]), model.prepare([observation(5)])
    full, fresh = model.sample(inputs), model.sample(other)
    with vp.prune(model, "vla-cache", keep=0.4, layers=(1, 2)) as session:
        near(model.sample(inputs), full, FLOW)
        assert session.last.warm_up.all()
        near(model.sample(inputs), full, FLOW)
        assert session.last.reused[0, -1] > 0 and not session.last.warm_up.any()
        near(model.sample(other), fresh, FLOW)  # Noise: no patch is like the one before.
        assert not session.last.reused.any()
    assert torch.equal(model.sample(inputs), full)


@pytest.mark.parametrize("method", ["specprune-vla", "vla-iap"])
def test_methods_that_compare_images_run_on_pi0(method):
    model = make("pi0")
    inputs = model.prepare([observation(0)])
    full = model.sample(inputs)
    with vp.prune(model, method, keep=0.4) as session:
        for _ in range(3):
            pruned = model.sample(inputs)
    assert session.last.visual_kept < session.last.visual_full
    assert (pruned - full).abs().max() > 1e-4
    assert torch.equal(model.sample(inputs), full)
