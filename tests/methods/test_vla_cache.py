"""VLA-Cache on policies: their own frames, what is reused of them, and what it costs."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from slow_cache import SlowStep, slow_choice, slow_pass, slow_similarity
from test_hf_vlm import IMAGE, inputs_for, llava, smolvlm
from tiny_openvla import make_oft, make_openvla, observation

import vla_pruner as vp
from toy_task import CAMERAS, ToyScene, rollout, tiny_policy
from vla_pruner.episodes.control import Control
from vla_pruner.methods import build
from vla_pruner.models import find_adapter
from vla_pruner.models.openvla.processing import colours, normalise_pixels, prepare_image
from vla_pruner.vla_cache.recall import Recall

CLOSE = dict(rtol=0, atol=2e-5)
SENTENCES = ["pick up the can", "lift the milk slowly now"]
OPTIONS = dict(keep=0.4, layers=(1, 2))


@pytest.fixture(scope="module", params=["openvla", "oft"])
def policy(request):
    made = make_openvla() if request.param == "openvla" else make_oft()
    with torch.no_grad():  # attention far from uniform
        for layer in made.language_model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    return made


def seen(model, episode: int, step: int) -> dict:
    """An observation in which a corner of each image changes from step to step."""
    found = observation(episode, model.config.num_images, SENTENCES[episode % 2])
    rng = np.random.default_rng([episode, step])
    for image in found["images"]:
        y, x = rng.integers(0, 28, 2)
        image[y : y + 20, x : x + 20] = rng.integers(0, 256, (20, 20, 3))
    return found


@contextmanager
def listening(decoder):
    """The inputs [B, n, D] of each pass of a decoder, and its outputs."""
    inputs, outputs = [], []

    def before(module, args, kwargs):
        embeds = kwargs.get("inputs_embeds")
        ids = kwargs.get("input_ids")
        inputs.append(module.get_input_embeddings()(ids) if embeds is None else embeds)

    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(lambda m, a, out: outputs.append(out.last_hidden_state)),
    ]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def slow_step(model, x, prompt, frame, past, **options):
    """One row of one step: `x` [n, D], of which the first `prompt` are the prefill."""
    config, decoder = model.config, model.language_model.model
    visual, oft = range(1, 1 + sum(config.views)), hasattr(config, "slots")
    text = range(visual.stop, prompt)
    if oft:
        text = range(visual.stop + 1, prompt - config.slots - 1)
    reused = [set() for _ in decoder.layers]
    if past is not None:
        similarity = slow_similarity(past.frame, frame, 8)
        reused = slow_choice(past, similarity, views=config.views, cuts=(1, 2), **options)
    step = slow_pass(
        decoder,
        x,
        prompt=prompt,
        visual=visual,
        text=text,
        text_layer=1,
        causal=not oft,
        reused=reused,
        past=past,
    )
    step.frame = frame
    return step, reused


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("limits", ["paper", "code"])
@pytest.mark.parametrize("episodes", [(0,), (0, 1)])
def test_episodes_of_a_policy_equal_the_slow_decoder(policy, mode, limits, episodes):
    """Prompts of two lengths in a batch: the shorter one is padded on the left."""
    config, decoder = policy.config, policy.language_model.model
    past: list[SlowStep | None] = [None] * len(episodes)
    most = 0
    with vp.prune(policy, "vla-cache", mode=mode, limits=limits, **OPTIONS) as session:
        for number in range(3):
            looks = [seen(policy, episode, number) for episode in episodes]
            mask = policy.prepare(looks).attention_mask
            pads = [0] * len(looks) if mask is None else (1 - mask).sum(dim=1).tolist()
            with listening(decoder) as (inputs, outputs):
                policy.predict_actions(looks)
            for row, look in enumerate(looks):
                crop = dict(center_crop=config.center_crop, crop_first=config.crop_first)
                images = [prepare_image(i, config.image_size, **crop) for i in look["images"]]
                frame = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
                x = torch.cat([part[row, pads[row] * (i == 0) :] for i, part in enumerate(inputs)])
                prompt = inputs[0].shape[1] - pads[row]
                step, reused = slow_step(
                    policy, x, prompt, frame, past[row], keep=0.4, limits=limits
                )
                past[row] = step
                found = torch.cat([part[row, -prompt:] for part in outputs])
                gone = {1 + token for token in reused[-1]}
                rows = [at for at in range(len(x)) if at not in gone]
                torch.testing.assert_close(found[rows], step.output[rows], **CLOSE)
                assert session.last.reused[row].tolist() == [len(tokens) for tokens in reused]
                most = max(most, len(reused[-1]))
    assert most > 1


def test_frames_are_the_images_that_enter_the_towers(policy):
    config = policy.config
    images = torch.randint(0, 256, (2, config.num_images, 32, 32, 3), dtype=torch.uint8)
    pixels = normalise_pixels(images, config)
    expected = images.permute(0, 1, 4, 2, 3).float()
    assert torch.equal(colours(pixels, config.towers[0]), expected)
    rounded = colours(pixels.bfloat16(), config.towers[0])
    assert (rounded - expected).abs().max() <= 2


def test_a_policy_is_undone_to_the_bit(policy):
    looks = [seen(policy, 0, 0)]
    hooks = [len(module._forward_pre_hooks) for module in policy.modules()]
    untouched = policy.predict_actions(looks)
    with vp.prune(policy, "vla-cache", **OPTIONS) as session:
        assert np.array_equal(policy.predict_actions(looks), untouched)  # The first step is full.
        policy.predict_actions(looks)
        assert session.last.reused[0, -1] > 0
    assert np.array_equal(policy.predict_actions(looks), untouched)
    assert [len(module._forward_pre_hooks) for module in policy.modules()] == hooks


def test_the_same_image_again_is_static_everywhere(policy):
    views, looks = policy.config.views, [seen(policy, 1, 0)]
    with vp.prune(policy, "vla-cache", tokens=1, layers=(1, 2, 3)) as session:
        policy.predict_actions(looks)
        policy.predict_actions(looks)
    # k = M - 1 and no limit of 1.5 k binds: all but the task's round(0.5 k) tokens can be reused.
    size = views[0]
    can = len(views) * (size - round(0.5 * (size - 1)))
    reused = session.last.reused[0].tolist()
    assert reused[0] == 0 < reused[1] <= reused[2] <= reused[3] <= can
    per_view = session.last.kept_mask.view(len(views), size).sum(dim=1)
    assert (per_view >= size - can // len(views)).all()


def test_an_image_that_changes_everywhere_is_computed_anew(policy):
    """Every patch gets an edge where the last frame had none."""
    number = policy.config.num_images
    dark, edges = (observation(0, number) for _ in range(2))
    stripes = np.zeros((48, 48, 3), dtype=np.uint8)
    stripes[:, ::8] = 255
    dark["images"] = [np.full((48, 48, 3), 90, dtype=np.uint8)] * number
    edges["images"] = [stripes] * number
    with vp.prune(policy, "vla-cache", **OPTIONS) as session:
        policy.predict_actions([dark])
        policy.predict_actions([edges])
        assert not session.last.reused.any() and not session.last.warm_up.any()
        assert session.last.tokens_per_layer == (session.last.tokens_full,) * 4


def test_flops_count_computed_tokens_that_see_every_key():
    """In each layer n tokens attend to all S keys."""
    policy, control = tiny_policy(), Control(CAMERAS, execute=2, reads_state=True)
    with vp.prune(policy, "vla-cache", threshold=-1.0, layers=(1, 2)) as session:
        episode = rollout(
            policy, ToyScene(), 102, 0, control=control, step_limit=6, session=session
        )
        report = session.last
    d, m, s = 32, 64, report.tokens_full
    expected = sum(
        4 * n * d**2 + 2 * n * s * d + 3 * n * d * m
        for n in (s - reused for reused in report.reused[0].tolist())
    )
    assert episode.calls[0].warm_up and episode.calls[0].prefill_macs == episode.calls[0].full_macs
    assert episode.calls[-1].prefill_macs == expected < episode.calls[-1].full_macs
    assert episode.calls[-1].visual_kept == report.visual_full - int(report.reused[0, -1])


def test_a_vlm_is_given_its_frames():
    model, ids, pixels = llava()
    model.eval()
    inputs = inputs_for(model, ids, pixels)
    with vp.prune(model, "vla-cache", keep=0.5, layers=(1, 3), threshold=-1.0) as session:
        with pytest.raises(ValueError, match=r"call `session\.frame\(images\)`"):
            model(**inputs)
        for _ in range(2):
            session.frame(torch.rand(1, 3, 56, 56))
            model(**inputs)
        (reused,) = session.last.reused.tolist()
    assert reused[0] == 0 < reused[1] <= reused[3] <= ids.count(IMAGE) / 2


def test_a_model_that_shows_tiles_is_refused():
    model, _, _ = smolvlm()
    with pytest.raises(ValueError, match=r"adapter=vp\.models\.Decoder\(.*`session\.frame\(images"):
        vp.prune(model, "vla-cache")
    assert not find_adapter(model).gives_frames


def recall(similarity, **changes) -> Recall:
    m = len(similarity)
    known = dict(
        similarity=torch.tensor([similarity]),
        relevance=torch.arange(m, 0, -1.0)[None],
        entropy=torch.tensor([[3.0, 2.0, 1.0, 1.0]]),
        views=(m,),
        cuts=(1, 3),
    )
    return Recall(**{**known, **changes})


def test_what_is_reused_by_hand():
    # k = 4: six static tokens (0.99 is none, 7 is seventh), two relevant ones: 0 and 1.
    similarity = [1.0, 0.999, 0.998, 0.99, 1.0, 0.998, 0.9995, 0.9965]
    reuse = build("vla-cache", keep=0.5).reuse(recall(similarity))
    assert reuse.order[0, :4].tolist() == [2, 4, 5, 6]
    assert reuse.counts.tolist() == [[1, 3]]  # r = 0.275 and 0.853 of 4
    reuse = build("vla-cache", keep=0.5, order="similarity").reuse(recall(similarity))
    assert reuse.order[0, :4].tolist() == [4, 6, 2, 5]
    # k = 2: three static ones, one relevant.
    reuse = build("vla-cache", keep=0.75, order="similarity").reuse(recall(similarity))
    assert reuse.order[0, :2].tolist() == [4, 6] and reuse.counts.max() <= 2


def test_cameras_have_their_own_budget():
    similarity = [1.0] * 4 + [0.0] * 4
    views = dict(views=(4, 4))
    each = build("vla-cache", keep=0.5, growth=1.0).reuse(recall(similarity, **views))
    assert int(each.counts[0, -1]) == 2  # 3 static ones without the most relevant
    both = build("vla-cache", keep=0.5, budget="global", growth=1.0)
    assert int(both.reuse(recall(similarity, **views)).counts[0, -1]) == 2
    valid = torch.tensor([[True] * 4 + [False] * 4])
    every = build("vla-cache", keep=0.25, threshold=-1.0, growth=1.0)
    assert int(every.reuse(recall(similarity, **views, valid=valid)).counts[0, -1]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(limits="release"), "`limits='release'` is unknown"),
        (dict(order="random"), "`order='random'` is unknown"),
        (dict(threshold=1.5), "must be a cosine"),
        (dict(growth=-0.1), r"must lie in \[0, 1\]"),
        (dict(layers=()), "must name layers, ascending"),
        (dict(layers=(4, 2)), "must name layers, ascending"),
        (dict(text_layer=-1), "at least 0"),
        (dict(layer=3), "no option .layer"),
        (dict(keep=0.0), "keep"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build("vla-cache", **options)


def test_cut_layers_scale_with_the_decoder():
    method = build("vla-cache")
    assert method.cuts(32) == (2, 6, 9, 11) and method.recalled_layer(32) == 15
    assert method.cuts(8) == (1, 2, 3, 4) and method.recalled_layer(8) == 3
    with pytest.raises(ValueError, match="too shallow"):
        method.cuts(4)
