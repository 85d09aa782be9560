"""A decoder with tokens removed computes what it computes when nobody sees those tokens."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

import vla_pruner as vp
from checks import near

VISUAL = slice(1, 21)
M, KEEP, CUT = 20, 6, 2
BOTH = [*product(("llama", "gemma", "qwen2", "qwen3"), ("sdpa", "eager"))]


def decoder(**options):
    return vp.models.Decoder("model.layers", **{"visual": VISUAL, **options})


def prune(model, method="fastv", **options):
    budget = {} if "keep" in options else {"tokens": KEEP}
    options = {**budget, "layer": CUT, "adapter": decoder(), **options}
    return vp.prune(model, method, **options)


def close(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        near(a, b)


def surviving(session):
    """Positions [B, n] that layers behind the cut computed."""
    report = session.last
    stays = torch.ones(len(report.kept_mask), report.tokens_full, dtype=torch.bool)
    stays[:, VISUAL] = report.kept_mask
    return stays.nonzero()[:, 1].view(len(stays), -1)


def rows(logits, session):
    """Prefill logits of surviving rows, then those of the decode steps."""
    index = surviving(session)[..., None].expand(-1, -1, logits[0].shape[-1])
    return [logits[0].gather(1, index), *logits[1:]]


@pytest.mark.parametrize(("family", "attention"), BOTH)
def test_removed_equals_hidden(decoders, embeds, rollout, family, attention, proves):
    model, runs, reports = decoders(family, attention), [], []
    for mode in ("drop", "mask"):
        with prune(model, "vla-pruner", window=1, mode=mode) as session:
            for step in range(3):
                logits = rollout(model, embeds(step))
            runs.append(rows(logits, session))
            reports.append(session.last)
    close(*runs)
    assert torch.equal(reports[0].kept_mask, reports[1].kept_mask)
    assert reports[0].kept_mask.sum() == KEEP and not reports[0].warm_up.any()
    near(reports[0].semantic, reports[1].semantic)
    near(reports[0].action, reports[1].action)
    proves("decoder", type(model), "reference", "dynamic")


@pytest.mark.parametrize(("family", "attention"), BOTH)
def test_exact_when_nothing_is_removed(decoders, embeds, rollout, family, attention, proves):
    model = decoders(family, attention)
    untouched = rollout(model, embeds())
    with prune(model, keep=1.0):
        everything_kept = rollout(model, embeds())
    after = rollout(model, embeds())
    for a, b, c in zip(untouched, everything_kept, after, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    proves("decoder", type(model), "keep=1.0", "undo")


def test_something_is_removed(decoders, embeds, rollout):
    model = decoders()
    with prune(model):
        pruned = rollout(model, embeds())
    assert (pruned[0][:, -1] - rollout(model, embeds())[0][:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_early_layers_keep_every_key(decoders, embeds, rollout, attention):
    model, cache = decoders("llama", attention), DynamicCache()
    with prune(model) as session:
        rollout(model, embeds(), cache=cache, steps=2)
    lengths = [cache.get_seq_length(layer) for layer in range(6)]
    assert lengths == [32] * CUT + [32 - M + KEEP] * (6 - CUT)
    assert cache.get_seq_length() == 32
    report = session.last
    assert (report.tokens_full, report.tokens_kept) == (30, 30 - M + KEEP)
    assert (report.visual_full, report.visual_kept) == (M, KEEP)


def test_survivors_keep_their_positions(decoders, embeds, rollout):
    model, seen = decoders(), []
    full, late = (model.model.layers[i] for i in (0, CUT))

    def remember(layer, args, kwargs):
        seen.append((kwargs["position_embeddings"][0], kwargs["position_ids"]))

    with prune(model) as session:
        hooks = [
            layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in (full, late)
        ]
        rollout(model, embeds(), steps=1)
        for hook in hooks:
            hook.remove()
    (before, _), (behind, ids), (next_full, _), (next_late, _) = seen
    assert torch.equal(behind, before[:, surviving(session)[0]])
    assert torch.equal(
        ids[0], surviving(session)[0]
    )  # None for flash, which would see packed rows.
    assert torch.equal(next_full, next_late)
    expected = model.model.rotary_emb(embeds(), torch.tensor([[30]]))[0]
    assert torch.equal(next_late, expected)


def test_rows_come_back_in_place(decoders, embeds):
    model = decoders()
    with prune(model) as session:
        hidden = model.model(inputs_embeds=embeds()).last_hidden_state
    assert hidden.shape == embeds().shape
    gone = torch.ones(30, dtype=torch.bool).scatter(0, surviving(session)[0], False)
    assert (hidden[0, gone] == 0).all() and (hidden[0, ~gone].abs().sum(-1) > 0).all()


# ---------------------------------------------------------------------- batches
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batch_equals_single_runs(decoders, embeds, rollout, attention):
    model, pads = decoders("llama", attention), (0, 3, 7)
    mask = torch.ones(3, 37, dtype=torch.long)
    batch = embeds(9, batch=3, length=37)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    tokens = torch.arange(9).view(3, 3)
    together, alone = {}, {}
    with prune(model, "vla-pruner", window=1) as session:
        for step in range(2):
            logits = rollout(model, batch + step, mask=mask, tokens=tokens)
        together = session.last
    for row, pad in enumerate(pads):
        with prune(model, "vla-pruner", window=1) as session:
            for step in range(2):
                single = rollout(
                    model, batch[row : row + 1, pad:] + step, tokens=tokens[row : row + 1]
                )
            alone = session.last
        assert torch.equal(together.kept_mask[row], alone.kept_mask[0])
        near(together.semantic[row], alone.semantic[0])
        near(together.action[row], alone.action[0])
        close([x[row, -1] for x in logits], [x[0, -1] for x in single])
    assert not torch.equal(together.kept_mask[0], together.kept_mask[1])


def test_last_row_skips_padding_on_the_right(decoders, embeds):
    model, mask = decoders(), torch.ones(1, 34, dtype=torch.long)
    mask[:, 30:] = 0
    with prune(model) as session:
        model(inputs_embeds=embeds(length=34), attention_mask=mask)
        padded = session.last
        model(inputs_embeds=embeds(length=34)[:, :30])
        plain = session.last
    near(padded.semantic, plain.semantic)


# ---------------------------------------------------------------------- caches
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_static_cache_equals_dynamic(decoders, embeds, rollout, attention, padded, proves):
    model, runs = decoders("qwen2", attention), []
    mask = None
    if padded:
        mask = torch.ones(2, 30, dtype=torch.long)
        mask[1, :4] = 0
    for mode, static in (("drop", False), ("drop", True), ("mask", True)):
        cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache()
        with prune(model, mode=mode) as session:
            for step in range(2):
                cache.reset() if static else None
                cache = cache if static else DynamicCache()
                logits = rollout(model, embeds(step, 2), cache=cache, mask=mask)
            runs.append([x[:, -1] for x in logits])
            assert session.last.kept_mask.sum() == 2 * KEEP
    close(runs[0], runs[1])
    close(runs[0], runs[2])
    proves("decoder", type(model), "static", "dynamic", "batch", *(("padding",) if padded else ()))


def test_copied_cache_continues_the_same_prompt(decoders, embeds):
    model = decoders("llama", "eager")  # which always gets a mask, to be shortened in late layers
    with prune(model):
        cache = model(inputs_embeds=embeds(), use_cache=True).past_key_values
        copied, by_hand = copy.deepcopy(cache), DynamicCache()
        for layer in range(6):
            by_hand.update(cache.layers[layer].keys, cache.layers[layer].values, layer)
        mask, token = torch.ones(1, 31, dtype=torch.long), torch.tensor([[5]])
        model(inputs_embeds=embeds(1), use_cache=True)
        one = model(input_ids=token, past_key_values=cache, attention_mask=mask).logits
        other = model(input_ids=token, past_key_values=copied, attention_mask=mask).logits
        with pytest.raises(RuntimeError, match="copy, made by hand"):
            model(input_ids=token, past_key_values=by_hand, attention_mask=mask)
    assert torch.equal(one, other)


def test_several_tokens_after_the_prefill(decoders, embeds):
    """A continuation of several tokens at once equals one token at a time."""
    model, tokens = decoders(), torch.tensor([[5, 6, 7]])
    with prune(model) as session:
        cache = model(inputs_embeds=embeds(), use_cache=True).past_key_values
        at_once = model(input_ids=tokens, past_key_values=cache).logits
        cache = model(inputs_embeds=embeds(), use_cache=True).past_key_values
        single = [model(input_ids=tokens[:, [i]], past_key_values=cache).logits for i in range(3)]
        assert session.last.steps == (1,)
    close([at_once], [torch.cat(single, dim=1)])


# ---------------------------------------------------------------------- generate
def inputs_for(model):
    return dict(
        input_ids=torch.arange(10, 40)[None],
        attention_mask=torch.ones(1, 30, dtype=torch.long),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_equals_manual_decoding(decoders, rollout, attention):
    model = decoders("llama", attention)
    with prune(model) as session:
        made = model.generate(**inputs_for(model))
        kept = session.last.kept_mask
        tokens = made.sequences[:, 30:]
        table = model.get_input_embeddings()
        by_hand = rollout(model, table(inputs_for(model)["input_ids"]), tokens=tokens, steps=4)
        assert torch.equal(kept, session.last.kept_mask)
    close(made.logits, [x[:, -1] for x in by_hand])


def test_generate_without_cache_equals_generate_with_it(decoders):
    model = decoders()
    with prune(model, "vla-pruner", window=1) as session:
        reports = []
        for use_cache in (True, False):
            session.reset()
            for _ in range(2):
                made = model.generate(**inputs_for(model), use_cache=use_cache)
            reports.append((session.last, made))
    (cached, one), (uncached, other) = reports
    assert cached.steps == uncached.steps == (1,)
    assert torch.equal(cached.kept_mask, uncached.kept_mask)
    near(cached.action, uncached.action)
    close(one.logits, other.logits)


def test_guessing_ahead_is_refused(decoders):
    with prune(decoders()), pytest.raises(NotImplementedError, match="prompt_lookup_num_tokens"):
        decoders().generate(**inputs_for(decoders()), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beam_search(decoders, cache):
    """All beams of an episode keep the same tokens, so reordering them is harmless."""
    model, found = decoders(), []
    for mode in ("drop", "mask"):
        with prune(model, "vla-pruner", window=1, mode=mode) as session:
            for _ in range(2):
                made = model.generate(**inputs_for(model), num_beams=3, cache_implementation=cache)
            assert session.last.episodes == (0, 0, 0)
            assert (session.last.kept_mask == session.last.kept_mask[0]).all()
        found.append(made)
    assert torch.equal(found[0].sequences, found[1].sequences)
    close(found[0].logits, found[1].logits)
    assert "generate" not in vars(model)


# ---------------------------------------------------------------------- bidirectional attention
@pytest.mark.parametrize(
    ("attention", "how"), [("sdpa", "argument"), ("sdpa", "4-D mask"), ("eager", "4-D mask")]
)
def test_bidirectional(decoders, embeds, attention, how):
    model, runs, reports = decoders("llama", attention), [], []
    if how == "argument":
        if transformers.__version__ < "5":
            pytest.skip("these decoders take `is_causal` as an argument since transformers 5")
        options = dict(is_causal=False)
    else:
        seen = torch.ones(1, 1, 30, 30, dtype=torch.bool)
        options = dict(attention_mask=seen if attention == "sdpa" else torch.zeros(1, 1, 30, 30))
    for mode in ("drop", "mask"):
        adapter = decoder(action_rows=slice(24, 29) if attention == "eager" else slice(-6, -1))
        with prune(model, "vla-pruner", window=1, mode=mode, adapter=adapter) as session:
            for step in range(2):
                output = model.model(inputs_embeds=embeds(step), use_cache=False, **options)
            runs.append(rows([output.last_hidden_state], session))
            reports.append(session.last)
    close(*runs)
    near(reports[0].action, reports[1].action)
    causal = model.model(inputs_embeds=embeds(1), use_cache=False).last_hidden_state
    full = model.model(inputs_embeds=embeds(1), use_cache=False, **options).last_hidden_state
    assert (causal - full).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_may_be_one_row_shown_for_all(decoders, embeds, attention):
    model, found = decoders("llama", attention), []
    mask = torch.zeros(2, 1, 30, 30)
    mask[1, ..., 3] = mask[:, ..., 22] = torch.finfo(mask.dtype).min
    adapter = decoder(action_rows=slice(-6, -1))
    for given in (mask, mask[:, :, :1].expand_as(mask)):
        with prune(model, "vla-pruner", window=1, adapter=adapter) as session:
            for step in range(2):
                inputs = dict(inputs_embeds=embeds(step, 2), attention_mask=given)
                hidden = model.model(**inputs, use_cache=False).last_hidden_state
            found.append((hidden, session.last))
    (hidden, report), (again, same) = found
    assert report.kept_mask.sum() == 2 * KEEP and torch.equal(report.kept_mask, same.kept_mask)
    close([hidden, report.semantic, report.action], [again, same.semantic, same.action])
    assert report.semantic[1, 2] == 0 and report.semantic[0, 2] > 0


# ---------------------------------------------------------------------- scores
def attentions(model, embeds, mask=None):
    """Attention [L][B, H, S, S] of an eager copy."""
    config = copy.deepcopy(model.config)
    twin = type(model)._from_config(config, attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    return twin(inputs_embeds=embeds, attention_mask=mask, output_attentions=True).attentions


@pytest.mark.parametrize(("family", "attention"), BOTH)
@pytest.mark.parametrize("semantic", ["all", "last"])
def test_semantic_score(decoders, embeds, family, attention, semantic):
    model = decoders(family, attention)
    with prune(model, "vla-pruner" if semantic == "all" else "fastv") as session:
        model(inputs_embeds=embeds(batch=2))
    voted = attentions(model, embeds(batch=2))[CUT - 1].mean(1)[..., VISUAL]
    expected = voted.mean(1) if semantic == "all" else voted[:, -1]
    near(session.last.semantic, expected)


@pytest.mark.parametrize(("family", "attention"), BOTH)
def test_action_score_of_decoded_tokens(decoders, embeds, rollout, family, attention):
    """Queries: the last prefill row and every decoded token; layers: the latter half."""
    model = decoders(family, attention)
    with prune(model, "vla-pruner") as session:
        rollout(model, embeds(), steps=3)
        assert session.last.warm_up.all()
    whole = torch.cat([embeds(), model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))], dim=1)
    seen = torch.stack(attentions(model, whole)[3:]).mean((0, 2))[:, 29:, VISUAL].mean(1)
    near(session.last.action, seen)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_action_score_of_prefill_rows(decoders, embeds, attention):
    model = decoders("qwen3", attention)
    with prune(model, "vla-pruner", adapter=decoder(action_rows=slice(22, 28))) as session:
        model(inputs_embeds=embeds())
    seen = torch.stack(attentions(model, embeds())[3:]).mean((0, 2))[:, 22:28, VISUAL].mean(1)
    near(session.last.action, seen)


def test_padding_does_not_vote(decoders, embeds):
    model, mask = decoders(), torch.ones(1, 34, dtype=torch.long)
    mask[:, :4] = 0
    padded = embeds(length=34)
    ids = (mask.cumsum(1) - 1).clamp_min(0)
    with prune(model, "vla-pruner") as session:
        model(inputs_embeds=padded, attention_mask=mask, position_ids=ids)
        with_padding = session.last.semantic
        padded[:, :4] += 3
        model(inputs_embeds=padded, attention_mask=mask, position_ids=ids)
    assert torch.equal(session.last.semantic, with_padding)


def test_dropped_tokens_get_no_action_score(decoders, embeds, rollout):
    model = decoders()
    with prune(model, "vla-pruner", window=1) as session:
        for step in range(2):
            rollout(model, embeds(step))
    report = session.last
    assert (report.action[~report.kept_mask] == 0).all()
    assert (report.action[report.kept_mask] > 0).all()


def test_no_attention_is_asked_for(decoders, embeds, rollout):
    """The kernel stays the same, and no layer returns or keeps attention weights."""
    model, asked = decoders(), []
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output: asked.append(
                (kwargs.get("output_attentions"), output[1])
            ),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    with prune(model, "vla-pruner", window=1):
        rollout(model, embeds())
        rollout(model, embeds())
    for hook in hooks:
        hook.remove()
    assert len(asked) == 6 * 8 and all(not flag and weights is None for flag, weights in asked)


# ---------------------------------------------------------------------- dtypes, depth, refusals
def test_bfloat16(make, embeds, rollout):
    model, runs = make().to(torch.bfloat16), []
    for mode in ("drop", "mask"):
        with prune(model, "vla-pruner", window=1, mode=mode) as session:
            for step in range(2):
                logits = rollout(model, embeds(step).bfloat16())
        assert session.last.semantic.dtype == session.last.action.dtype == torch.float32
        runs.append([x[:, -1].float() for x in logits])
    for a, b in zip(*runs, strict=True):
        assert (a - b).abs().max() < 0.02 * a.abs().max()


@pytest.mark.parametrize("cut", [1, 5])
def test_first_and_last_possible_cut(decoders, embeds, rollout, cut):
    model, runs = decoders(), []
    for mode in ("drop", "mask"):
        with prune(model, "vla-pruner", window=1, mode=mode, layer=cut) as session:
            for step in range(2):
                logits = rollout(model, embeds(step))
            runs.append(rows(logits, session))
    close(*runs)


def test_gradients_flow_through_survivors(make, embeds):
    model, x = make(), embeds().requires_grad_()
    with torch.enable_grad(), prune(model) as session:
        model(inputs_embeds=x).logits[:, -1].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all(), "dropped tokens still count in the layers they saw"
    assert session.last.kept_mask.sum() == KEEP


def test_gradient_checkpointing_is_refused(make, embeds):
    model = make()
    model.gradient_checkpointing_enable()
    model.train()
    with prune(model), pytest.raises(NotImplementedError, match="gradient_checkpointing_disable"):
        model(inputs_embeds=embeds())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layer=6), "6 layers"),
        (dict(tokens=21), "21 tokens"),
        (dict(keep=0.0), "keep"),
        (dict(mode="erase"), "mode"),
    ],
)
def test_impossible_requests(decoders, embeds, options, message):
    model = decoders()
    with pytest.raises(ValueError, match=message), prune(model, **options):
        model(inputs_embeds=embeds())


def test_prefill_shorter_than_the_image(decoders, embeds):
    model = decoders()
    with prune(model), pytest.raises(ValueError, match="position 20"):
        model(inputs_embeds=embeds()[:, :15])


def test_sliding_windows_are_refused_once_they_are_reached(embeds):
    config = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=31,
    )
    model = MistralForCausalLM(config).eval()
    with prune(model):
        cache = model(inputs_embeds=embeds(), use_cache=True).past_key_values
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(NotImplementedError, match="sliding window of 31"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(NotImplementedError, match="reaches 32 tokens"):
            model(inputs_embeds=embeds(length=32))


def test_unknown_token_arguments_are_refused(decoders, embeds):
    model = decoders()
    with prune(model), pytest.raises(NotImplementedError, match="token_kinds"):
        model.model(inputs_embeds=embeds(), token_kinds=torch.zeros(1, 30))


def test_a_batch_cannot_shrink_while_decoding(decoders, embeds):
    model = decoders()
    with prune(model):
        cache = model(inputs_embeds=embeds(batch=2), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="2 rows"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_layers_without_named_attention_are_refused():
    class Layer(nn.Module):
        def forward(self, hidden):
            return hidden

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

        def forward(self, inputs_embeds):
            for layer in self.layers:
                inputs_embeds = layer(inputs_embeds)
            return inputs_embeds

    model = nn.Sequential()
    model.add_module("model", Stack())
    with pytest.raises(TypeError, match="scores cannot be read there"):
        prune(model)
    with prune(model, "random") as session:
        output = model.model(inputs_embeds=torch.ones(1, 30, 4))
    assert session.last.kept_mask.sum() == KEEP
    assert int((output[0] == 0).all(-1).sum()) == M - KEEP
