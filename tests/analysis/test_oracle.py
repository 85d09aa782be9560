"""The oracle is a greedy search through the real, pruned policy, only cheaper."""

import numpy as np
import pytest
import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

import vla_pruner as vp
from toy_task import ToyScene, rollout, tiny_policy, toy_task
from vla_pruner.analysis.oracle import Bench, Oracle, OracleSession
from vla_pruner.episodes.control import Control
from vla_pruner.models import find_adapter
from vla_pruner.models.openvla import OpenVLA, OpenVLAConfig

LAYER = 2


def sharpen(policy):
    """Attention far from uniform, so that tokens matter."""
    for layer in policy.language_model.model.layers:
        layer.self_attn.q_proj.weight.mul_(20)
        layer.self_attn.k_proj.weight.mul_(20)
    return policy


@pytest.fixture(scope="module")
def oft():
    with torch.no_grad():
        return sharpen(tiny_policy())


@pytest.fixture(scope="module")
def openvla():
    source = tiny_policy()
    torch.manual_seed(1)
    config = OpenVLAConfig(
        towers=source.config.towers,
        text=source.config.text,
        empty_token_id=4,
        pad_token_id=3,
        norm_stats=source.config.norm_stats,
    )
    policy = OpenVLA.build(config)
    policy.tokenizer = source.tokenizer
    with torch.no_grad():
        return sharpen(policy)


def look(policy, seed=0):
    rng = np.random.default_rng(seed)
    cameras = policy.config.num_images
    seen = {
        "images": [rng.integers(0, 256, (40, 40, 3)).astype(np.uint8) for _ in range(cameras)],
        "instruction": "pick up the cup",
    }
    if hasattr(policy.config, "proprio_dim"):
        seen["proprio"] = rng.uniform(-0.5, 0.5, 8)
    return seen


def slow_divergence(policy, observation):
    """Divergence of one set of tokens, from whole calls of the policy pruned to that set."""
    inputs = policy.prepare([observation])

    def actions():
        return torch.from_numpy(policy.infer(inputs))

    def logits():
        output = policy.language_model(inputs_embeds=sequence, use_cache=False)
        return output.logits[0, prompt - 1 :].double()

    if hasattr(policy, "action_head"):
        answer = actions
    else:
        tokens = policy.predict_tokens(inputs.input_ids, inputs.pixel_values)[:, :-1]
        embeds = policy.embed(inputs.input_ids, inputs.pixel_values)
        prompt = embeds.shape[1]
        words = policy.language_model.get_input_embeddings()(tokens)
        sequence = torch.cat([embeds, words], dim=1)
        answer = logits
    full = answer()

    def divergence(indices):
        with vp.prune(policy, "fixed", indices=sorted(indices), layer=LAYER):
            pruned = answer()
        if answer is actions:
            return float((full - pruned).abs().mean())
        p, log_p, log_q = full.softmax(-1), full.log_softmax(-1), pruned.log_softmax(-1)
        return float((p * (log_p - log_q)).sum(-1).mean())

    return divergence


@pytest.mark.parametrize("family", ["oft", "openvla"])
def test_divergence_is_that_of_the_pruned_policy(request, family):
    policy = request.getfixturevalue(family)
    observation = look(policy)
    slow = slow_divergence(policy, observation)
    sets = [[0, 3, 7], [2, 9, 15], [1, 14, 15]]
    with Bench(policy, observation, adapter=find_adapter(policy), layer=LAYER) as bench:
        assert bench.size == sum(policy.config.views)
        assert bench.measure == ("actions" if family == "oft" else "logits")
        found = bench.divergence(sets)
        everything = bench.divergence([list(range(bench.size))])
    assert everything == pytest.approx([0.0], abs=1e-6)
    assert found == pytest.approx([slow(one) for one in sets], rel=1e-3, abs=1e-6)
    assert len({round(value, 6) for value in found}) == 3 and min(found) > 1e-4


@pytest.mark.parametrize("family", ["oft", "openvla"])
def test_forward_search_is_greedy(request, family):
    policy = request.getfixturevalue(family)
    observation = look(policy, 1)
    slow, size = slow_divergence(policy, observation), sum(policy.config.views)
    chosen = []
    for _ in range(3):
        candidates = [i for i in range(size) if i not in chosen]
        chosen.append(min(candidates, key=lambda i: slow([*chosen, i])))
    found = Oracle(keep=3, layer=LAYER, batch=5).search(policy, observation)
    assert found.kept == tuple(sorted(chosen))
    assert found.divergence == pytest.approx(slow(chosen), rel=1e-3, abs=1e-6)
    assert found.evaluated == size + size - 1 + size - 2
    assert [count for count, _ in found.trace] == [1, 2, 3]


@pytest.mark.parametrize("family", ["llama", "paligemma"])
def test_action_tokens_are_fed_as_the_model_fed_them(decoders, embeds, family):
    """A decoder with a causal mask, and one that gets a 4-D mask with a bidirectional prefix."""
    if family == "llama":
        model, size = decoders(), 20
        adapter = vp.models.Decoder(visual=slice(1, 21))
        observation = {"inputs_embeds": embeds()}
    else:
        (model, observation), size, adapter = paligemma(), 16, None

    def call(seen):
        return model.generate(**seen, max_new_tokens=4, do_sample=False)[0, -4:]

    tokens = call(observation).tolist()
    adapter = adapter or find_adapter(model)
    with Bench(model, observation, adapter=adapter, layer=LAYER, call=call) as bench:
        assert bench.size == size and bench.measure == "logits"
        assert bench._full[0].argmax(dim=1).tolist() == tokens
        assert bench.divergence([list(range(size))]) == pytest.approx([0.0], abs=1e-6)
        assert bench.divergence([[0]])[0] > 1e-4


def paligemma():
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 56, "patch_size": 14, "projection_dim": 32}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 97}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **vision},
        text_config={"model_type": "gemma", **text},
        projection_dim=32,
        hidden_size=32,
        image_token_index=90,
    )
    torch.manual_seed(2)
    model = PaliGemmaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15)
    ids = torch.tensor([[90] * 16 + [2, 7, 8, 9]])
    image = torch.randn(1, 3, 56, 56)
    types = torch.zeros_like(ids)
    mask = torch.ones_like(ids)
    return model, {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "pixel_values": image,
    }


def test_backward_search_is_greedy(openvla):
    observation = look(openvla, 2)
    slow, chosen = slow_divergence(openvla, observation), list(range(16))
    for _ in range(3):
        chosen.remove(min(chosen, key=lambda i: slow([j for j in chosen if j != i])))
    found = Oracle(keep=13, layer=LAYER, direction="backward").search(openvla, observation)
    assert found.kept == tuple(chosen)
    assert found.evaluated == 16 + 15 + 14


@pytest.mark.parametrize(("direction", "keep"), [("forward", 5), ("backward", 11)])
def test_a_stride_takes_the_best_moves_of_a_round_at_once(openvla, direction, keep):
    observation = look(openvla, 3)
    slow = slow_divergence(openvla, observation)
    chosen = set() if direction == "forward" else set(range(16))
    for count in (4, 1):
        moves = [i for i in range(16) if (i in chosen) == (direction == "backward")]
        moves.sort(key=lambda i: slow(chosen ^ {i}))
        chosen ^= set(moves[:count])
    found = Oracle(keep=keep, layer=LAYER, direction=direction, stride=4).search(
        openvla, observation
    )
    assert found.kept == tuple(sorted(chosen))
    assert len(found.trace) == 2 and found.trace[-1][1] == found.divergence
    assert found.divergence == pytest.approx(slow(chosen), rel=1e-3, abs=1e-6)


def test_the_batch_changes_nothing(oft):
    observation = look(oft, 4)
    one, other = (
        Oracle(keep=2, layer=LAYER, batch=batch).search(oft, observation) for batch in (3, 64)
    )
    assert one.kept == other.kept


def test_keeping_everything_needs_no_search(oft):
    found = Oracle(keep=1.0, layer=LAYER).search(oft, look(oft))
    assert found.kept == tuple(range(32)) and found.evaluated == 0
    assert found.divergence == pytest.approx(0.0, abs=1e-6)


def test_the_policy_stays_what_it_was(oft):
    observation = look(oft)
    before = {
        name: (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in oft.named_modules()
    }
    plain = oft.predict_action(**observation)
    Oracle(keep=1, layer=LAYER).search(oft, observation)
    bench = Bench(oft, observation, adapter=find_adapter(oft), layer=LAYER)
    with pytest.raises(ValueError, match="token 99"), bench:
        bench.divergence([[99]])
    with OracleSession(oft, Oracle(keep=1, layer=LAYER)) as session:
        oft.predict_action(**observation)
        assert session.last.visual_kept == 1
    after = {
        name: (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in oft.named_modules()
    }
    assert after == before
    np.testing.assert_array_equal(oft.predict_action(**observation), plain)


def test_an_episode_with_the_oracle(oft):
    task = toy_task()
    control = Control(cameras=task.cameras, execute=4, reads_state=True)
    with OracleSession(oft, Oracle(keep=2, layer=LAYER)) as session:
        episode = rollout(
            oft, ToyScene(), 3, 1, control=control, step_limit=8, session=session, condition="o"
        )
    assert len(episode.calls) == len(session.found) == 2
    assert [call.visual_kept for call in episode.calls] == [2, 2]
    assert session.found[-1].kept == tuple(session.last.kept_indices[0].tolist())
    assert all(call.prefill_macs < call.full_macs for call in episode.calls)


def test_a_parallel_policy_of_another_kind_is_read_as_told(oft):
    def wide(rows):
        return rows[:, ::7].mean(dim=2)

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = oft

        def predict_action(self, **observation):
            return self.inner.predict_action(**observation)

    other, adapter = Other(), find_adapter(oft)
    with pytest.raises(TypeError, match="give `read`"):
        Oracle(keep=1, layer=LAYER).search(other, look(oft), adapter=adapter)
    found = Oracle(keep=1, layer=LAYER).search(other, look(oft), adapter=adapter, read=wide)
    assert found.measure == "actions" and found.divergence > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"layer": 0}, "layer=0"),
        ({"direction": "sideways"}, "'forward', 'backward'"),
        ({"stride": 0}, "stride=0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Oracle(**options)


def test_impossible_requests_are_refused(oft):
    with pytest.raises(ValueError, match=r"`layer=4` must lie in 1\.\.3"):
        Oracle(keep=1, layer=4).search(oft, look(oft))
    with pytest.raises(ValueError, match="keeping 33 tokens"):
        Oracle(keep=33, layer=LAYER).search(oft, look(oft))
    with pytest.raises(ValueError, match="no image reached"):
        Oracle(keep=1, layer=LAYER).search(oft, look(oft), call=lambda seen: None)
