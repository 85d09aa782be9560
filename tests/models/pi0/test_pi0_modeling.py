"""The port of pi0 and pi0.5: the two passes against one slow pass, padding, flow steps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pi0 import CHUNK, make, make_config, observation

from checks import near
from vla_pruner.models.pi0 import Pi0
from vla_pruner.models.pi0.gemma import AdaptiveRMSNorm, SharedKV, rotary
from vla_pruner.models.pi0.modeling import sinusoid

KINDS = pytest.mark.parametrize("kind", ["pi0", "pi05"])


def inputs_of(model, batch=2, cameras=2, missing=()):
    return model.prepare([observation(i, cameras, missing) for i in range(batch)])


def slow_velocity(model, inputs, noisy, time):
    """Prefix and suffix in one pass, with a mask over everything, head by head in plain algebra."""
    prefix, valid = model.embed_prefix(inputs)
    suffix, condition = model.embed_suffix(inputs.state, noisy, time)
    batch, p, s = len(prefix), prefix.shape[1], suffix.shape[1]
    block = torch.cat([torch.zeros(p), torch.zeros(s - CHUNK) + 1, torch.full((CHUNK,), 2.0)])
    present = torch.cat([valid, torch.ones(batch, s, dtype=torch.bool)], dim=1)
    sees = (block[None, :] <= block[:, None]) & present[:, None, :]  # [B, P + S, P + S]
    cos, sin = rotary((present.cumsum(1) - 1).clamp_min(0), 8, torch.float32)

    def turned(x):
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    def normed(norm, x):
        return norm(x, condition) if isinstance(norm, AdaptiveRMSNorm) else (norm(x), 1.0)

    streams = [prefix, suffix]
    for layers in zip(model.language_model.layers, model.expert.layers, strict=True):
        ready = [normed(layer.input_layernorm, x) for layer, x in zip(layers, streams, strict=True)]

        def joined(name, layers=layers, ready=ready):
            parts = [
                getattr(layer.self_attn, name)(x)
                for layer, (x, _) in zip(layers, ready, strict=True)
            ]
            return torch.cat(parts, dim=1).unflatten(-1, (-1, 8))

        query, key, value = joined("q_proj"), joined("k_proj"), joined("v_proj")
        heads = []
        for head in range(query.shape[2]):
            q, k = turned(query[:, :, head]), turned(key[:, :, head // 2])
            logits = (q @ k.transpose(1, 2)) / math.sqrt(8)
            weights = logits.masked_fill(~sees, float("-inf")).softmax(-1)
            heads.append(weights @ value[:, :, head // 2])
        mixed = torch.cat(heads, dim=-1).split([p, s], dim=1)
        streams = [
            x + layer.self_attn.o_proj(m) * gate
            for x, m, layer, (_, gate) in zip(streams, mixed, layers, ready, strict=True)
        ]
        ready = [
            normed(layer.post_attention_layernorm, x)
            for layer, x in zip(layers, streams, strict=True)
        ]
        streams = [
            x + layer.mlp(y) * gate
            for x, layer, (y, gate) in zip(streams, layers, ready, strict=True)
        ]
    return model.action_out_proj(normed(model.expert.norm, streams[1])[0][:, -CHUNK:])


@KINDS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("missing", [(), (1,)])
def test_two_passes_equal_one(kind, attention, missing):
    model = make(kind, attention)
    inputs = inputs_of(model, missing=missing)
    noisy, time = torch.randn(2, CHUNK, 8), torch.tensor([0.9, 0.3])
    fast = model.velocity(model.read_prefix(inputs), inputs.state, noisy, time)
    near(fast, slow_velocity(model, inputs, noisy, time))


@KINDS
def test_gradients_go_through_the_same_numbers(kind):
    model = make(kind)
    inputs, noisy, time = inputs_of(model), torch.randn(2, CHUNK, 8), torch.tensor([0.9, 0.3])
    without = model.velocity(model.read_prefix(inputs), inputs.state, noisy, time)
    with torch.enable_grad():
        prefix = model.read_prefix(inputs).repeat(2)
        twice = [x.repeat_interleave(2, dim=0) for x in (inputs.state, noisy, time)]
        with_ = model.velocity(prefix, *twice)
        with_.sum().backward()
    near(with_[::2], without)
    assert model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


@KINDS
def test_sampling_takes_euler_steps_from_noise(kind):
    model = make(kind)
    inputs, noise = inputs_of(model), torch.randn(2, CHUNK, 8)
    prefix, x = model.read_prefix(inputs), noise
    for time in (1.0, 2 / 3, 1 / 3):
        x = x - model.velocity(prefix, inputs.state, x, torch.full((2,), time)) / 3
    near(model.sample(inputs, noise), x)


def test_the_prefix_is_copied_once_per_call():
    shared = SharedKV()
    key = torch.randn(1, 2, 7, 4)
    assert shared.update(key, key, 0)[0] is key and shared.get_seq_length() == 7
    first = shared.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)[0]
    assert torch.equal(first, torch.cat([key, torch.ones(1, 2, 3, 4)], dim=2))
    second = shared.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)[0]
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, torch.cat([key, torch.zeros(1, 2, 3, 4)], dim=2))
    assert shared.get_seq_length() == 7 and shared.get_seq_length(1) == 0


@KINDS
def test_a_missing_camera_is_as_if_it_were_not_there(kind):
    with_it = make(kind, cameras=("a", "b", "c"))
    without = Pi0(replace(with_it.config, cameras=("a", "c"))).eval()
    without.load_state_dict(with_it.state_dict())
    without.tokenizer = with_it.tokenizer
    seen = observation(0, 3, missing=(1,))
    expected = without.predict_action(
        [seen["images"][0], seen["images"][2]], seen["instruction"], seen["proprio"]
    )
    found = with_it.predict_actions([seen])[0]
    near(found, expected)
    named = {"a": seen["images"][0], "c": seen["images"][2]}
    again = with_it.predict_action(named, seen["instruction"], seen["proprio"])
    assert (again == found).all()


@KINDS
def test_padding_and_the_rest_of_a_batch_change_nothing(kind):
    model = make(kind)
    observations = [observation(0), observation(1)]
    together = model.predict_actions(observations)
    for one, expected in zip(observations, together, strict=True):
        near(model.predict_actions([one])[0], expected, rel=2e-05)
    model.config = replace(model.config, max_tokens=90)
    near(model.predict_actions(observations), together, rel=2e-05)


def test_actions_have_the_robots_shape_and_units():
    model = make()
    seen = observation()
    chunk = model.predict_action(*seen.values())
    assert chunk.shape == (CHUNK, 5) and chunk.dtype == np.float32
    scaled = model.sample(model.prepare([seen]))[0, :, :5].numpy()
    statistics = model.config.norm_stats["action"]
    expected = scaled * np.array(statistics["std"]) + np.array(statistics["mean"])
    near(chunk, expected)


@KINDS
def test_every_input_matters(kind):
    model = make(kind)
    seen = observation()
    before = model.predict_actions([seen])
    for changed in (
        {"proprio": seen["proprio"] + 0.5},
        {"instruction": "lift the milk"},
        {"images": [seen["images"][1], seen["images"][1]]},
    ):
        assert np.abs(model.predict_actions([seen | changed]) - before).max() > 1e-4


def test_noise_is_given_seeded_or_fresh():
    model, seen = make(), observation()
    assert (model.predict_actions([seen]) == model.predict_actions([seen])).all()
    given = model.predict_action(*seen.values(), noise=model.make_noise(1)[0])
    assert (given == model.predict_actions([seen])).all()
    model.config = replace(model.config, noise_seed=None)
    assert (model.predict_actions([seen]) != model.predict_actions([seen])).any()


def test_sinusoids_by_hand():
    found = sinusoid(torch.tensor([0.25]), 4, 0.5, 2.0)[0]
    angles = [2 * math.pi * 0.25 / 0.5, 2 * math.pi * 0.25 / 2.0]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    near(found.numpy(), expected)


def test_the_adaptive_norm_by_hand():
    norm = AdaptiveRMSNorm(3, 2, 0.0)
    norm.dense.weight.zero_()
    norm.dense.bias.copy_(torch.tensor([1.0, 0, 0, 5, 5, 5, 2, 3, 4]))
    normed, gate = norm(torch.tensor([[[1.0, 1.0, 1.0]]]), torch.zeros(1, 2))
    assert normed.tolist() == [[[7.0, 6.0, 6.0]]] and gate.tolist() == [[[2.0, 3.0, 4.0]]]


def test_both_kinds_have_the_published_heads():
    names = {kind: {n.split(".")[0] for n, _ in make(kind).named_parameters()} for kind in
             ("pi0", "pi05")}  # fmt: skip
    assert names["pi0"] - names["pi05"] == {
        "state_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
    }
    assert names["pi05"] - names["pi0"] == {"time_mlp_in", "time_mlp_out"}


def test_half_precision_keeps_positions_exact():
    positions = torch.tensor([[1000]])
    rounded, exact = rotary(positions, 8, torch.bfloat16), rotary(positions, 8, torch.float32)
    torch.testing.assert_close(rounded[0].float(), exact[0], rtol=0, atol=0.004)
    model = make().to(torch.bfloat16)
    actions = model.sample(model.prepare([observation()]))
    assert actions.dtype == torch.float32 and actions.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "pi1"}, "pi0, pi05"),
        ({"cameras": ()}, "at least one camera"),
        ({"flow_steps": 0}, "at least 1"),
        ({"action_dim": 9}, "must not exceed"),
        ({"crop_area": 0.0}, "crop_area"),
        ({"expert": replace(make_config().expert, depth=3)}, "their depth differ: 4 and 3"),
    ],
)
def test_impossible_configurations_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        make_config(**changes)


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="sdpa, eager"):
        Pi0(make_config(), attn_implementation="flash_attention_2")
