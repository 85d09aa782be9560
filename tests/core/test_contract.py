"""What a decoder hands its layers is checked: exact, or refused with a sentence."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch import nn
from transformers import DynamicCache, StaticCache

import vla_pruner as vp
from checks import randomise
from hidden_columns import hidden_behind, same
from hidden_in_softmax import hidden_in_softmax
from vla_pruner.core.cut import alike

VISUAL, M = slice(1, 25), 24
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
)


def embeds(batch=1, length=36):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(3))


def at(layers="model.layers"):
    return vp.models.Decoder(layers, visual=VISUAL)


def gpt2():
    return T.GPT2LMHeadModel(T.GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4))


def gpt_neox():
    return T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SIZES))


def gpt_neox_japanese():
    config = T.GPTNeoXJapaneseConfig(**{k: v for k, v in SIZES.items() if "inter" not in k})
    return T.GPTNeoXJapaneseForCausalLM(config)


def openai_gpt():
    sizes = dict(vocab_size=97, n_embd=32, n_layer=4, n_head=4)
    return T.OpenAIGPTLMHeadModel(T.OpenAIGPTConfig(**sizes))


def mpt():
    return T.MptForCausalLM(T.MptConfig(vocab_size=97, d_model=32, n_layers=4, n_heads=4))


def bloom():
    return T.BloomForCausalLM(T.BloomConfig(vocab_size=97, hidden_size=32, n_layer=4, n_head=4))


def gpt_neo():
    kinds = [[["global", "local"], 2]]
    sizes = dict(vocab_size=97, hidden_size=32, num_layers=4, num_heads=4, window_size=8)
    return T.GPTNeoForCausalLM(T.GPTNeoConfig(**sizes, attention_types=kinds))


def falcon():
    config = T.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, alibi=False
    )
    config._attn_implementation = "sdpa"
    return T.FalconForCausalLM(config)


def gemma3(kinds, window=8):
    config = T.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": len(kinds)},
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=window,
        layer_types=kinds,
    )
    return T.Gemma3ForCausalLM(config)


def gpt_oss():
    config = T.GptOssConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 4,
    )
    config._attn_implementation = "eager"
    model = T.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            parameter.normal_(std=1.0)
    return model


def mistral(window):
    config = T.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window)
    return T.MistralForCausalLM(config)


def gemma2(window):
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": window}
    return T.Gemma2ForCausalLM(T.Gemma2Config(**sizes))


def talk(model, cache=None, mask=None):
    """Logits of the last row of a prefill and of two decoded tokens."""
    rows = 1 if mask is None else len(mask)
    options = {} if mask is None else {"attention_mask": mask}
    output = model(inputs_embeds=embeds(rows), past_key_values=cache, use_cache=True, **options)
    found = [output.logits[:, -1]]
    for token in (5, 6):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            options = {"attention_mask": mask}
        step = {"input_ids": torch.full((rows, 1), token), "use_cache": True}
        cache = output.past_key_values
        output = model(**step, past_key_values=cache, **options)
        found.append(output.logits[:, -1])
    return torch.stack(found)


def cache_of(kind, model):
    if kind == "dynamic":
        return DynamicCache()
    return StaticCache(config=model.config, max_cache_len=44)


# ---------------------------------------------------------------------- exact
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize(
    ("make", "layers"), [(gpt2, "transformer.h"), (gpt_neox, "gpt_neox.layers")]
)
def test_masks_by_position_and_caches_by_another_name(make, layers, kind, cut):
    """GPT-2 hands its mask by position; GPT-NeoX calls its cache `layer_past`."""
    model = randomise(make())
    options = dict(tokens=6, layer=cut, positions="keep")
    with vp.prune(model, "divprune", mode="mask", adapter=at(layers), **options) as session:
        expected = talk(model, DynamicCache())
        hidden = session.last.kept_mask
    with vp.prune(model, "divprune", adapter=at(layers), **options) as session:
        got = talk(model, cache_of(kind, model))
        assert torch.equal(session.last.kept_mask, hidden) and hidden.sum() == 6
    same(got, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["fastv", "vla-pruner", "holov"])
@pytest.mark.parametrize(
    ("make", "layers"), [(gpt2, "transformer.h"), (gpt_neox, "gpt_neox.layers")]
)
def test_attentions_that_are_not_called_self_attn(make, layers, method, attention):
    model = randomise(make())
    model.set_attn_implementation(attention)
    options = {"window": 1} if method == "vla-pruner" else {}
    options |= dict(positions="keep", crops=3) if method == "holov" else {}
    with vp.prune(model, method, tokens=6, layer=2, adapter=at(layers), **options) as session:
        for _ in range(2):
            got = talk(model)
        semantic, kept = session.last.semantic, session.last.kept_mask
    with hidden_in_softmax(model.get_submodule(layers), 2, [1 + (~kept[0]).nonzero()[:, 0]]):
        same(got, talk(model))
    if method == "fastv":
        model.set_attn_implementation("eager")
        seen = model(inputs_embeds=embeds(), output_attentions=True).attentions[1].mean(1)
        same(semantic, seen[:, -1, VISUAL])


def test_layers_that_return_lists():
    model = randomise(openai_gpt())
    adapter = at("transformer.h")
    with vp.prune(model, "random", tokens=6, layer=2, adapter=adapter) as session:
        got, kept = model(inputs_embeds=embeds()).logits[:, -1], session.last.kept_mask
    with hidden_in_softmax(model.transformer.h, 2, [1 + (~kept[0]).nonzero()[:, 0]]):
        same(got, model(inputs_embeds=embeds()).logits[:, -1])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_layers_that_scale_by_positions(kind, mode):
    """Queries of Ministral 3 grow with their positions, which the layers are told beside rotary."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
    rope["original_max_position_embeddings"] = 8
    config = T.Ministral3Config(**SIZES, num_key_value_heads=2, head_dim=8, rope_parameters=rope)
    model = randomise(T.Ministral3ForCausalLM(config))
    with vp.prune(model, "fastv", tokens=6, layer=2, adapter=at(), mode=mode) as session:
        got = talk(model, cache_of(kind, model))
        gone = [1 + (~row).nonzero()[:, 0] for row in session.last.kept_mask]
    with hidden_behind(model.model, 2, gone):
        same(got, talk(model, DynamicCache()))


def test_a_mask_by_position_may_hold_padding():
    model, mask = randomise(gpt2()), torch.ones(2, 36, dtype=torch.long)
    mask[1, :3] = 0
    found = []
    for mode in ("drop", "mask"):
        adapter = vp.models.Decoder("transformer.h", visual=slice(4, 25))
        options = dict(tokens=6, layer=2, positions="keep", mode=mode)
        with vp.prune(model, "divprune", adapter=adapter, **options):
            found.append(talk(model, DynamicCache(), mask))
    same(*found)


def test_attention_sinks_enter_the_softmax():
    model, x = randomise(gpt_oss()), embeds(4)
    attention = model(inputs_embeds=x, output_attentions=True).attentions[1].mean(1)
    expected = {"fastv": attention[:, -1, VISUAL], "vla-pruner": attention.mean(1)[:, VISUAL]}
    for method, wanted in expected.items():
        options = {"window": 1} if method == "vla-pruner" else {}
        with vp.prune(model, method, tokens=6, layer=2, adapter=at(), **options) as session:
            for _ in range(2):
                model(inputs_embeds=x)
            same(session.last.semantic, wanted)
            assert torch.equal(
                session.last.semantic.topk(6).indices.sort(1).values,
                wanted.topk(6).indices.sort(1).values,
            )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("make", [mistral, gemma2])
@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_windows_that_no_row_reaches(make, kind, method):
    model = randomise(make(64))
    options = dict(tokens=6, layer=2) | ({"positions": "keep"} if method == "divprune" else {})
    cache = cache_of(kind, model)
    with vp.prune(model, method, adapter=at(), **options) as session:
        got = talk(model, cache)
        kept = session.last.kept_mask[0]
    with hidden_behind(model.model, 2, [1 + (~kept).nonzero()[:, 0]]):
        same(got, talk(model, DynamicCache(config=model.config)))


def test_layers_of_two_kinds_where_both_begin_before_the_cut():
    kinds = ["sliding_attention", "full_attention"] * 2
    model = randomise(gemma3(kinds))
    with (
        vp.prune(model, "fastv", tokens=6, layer=2, adapter=at()),
        pytest.raises(NotImplementedError, match=r"reaches 36 tokens.*window of 8"),
    ):
        model(inputs_embeds=embeds())
    late = ["sliding_attention"] * 2 + ["full_attention"] * 4
    model = randomise(gemma3(late))
    with vp.prune(model, "fastv", tokens=6, layer=3, adapter=at()) as session:
        got = talk(model, DynamicCache(config=model.config))
        kept = session.last.kept_mask[0]
    with hidden_behind(model.model, 3, [1 + (~kept).nonzero()[:, 0]]):
        same(got, talk(model, DynamicCache(config=model.config)))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("method", ["fastv", "vla-cache"])
def test_kinds_of_layers_have_rotary_tables_of_their_own(kind, mode, method):
    """Gemma 3 turns keys by another base where a window slides, here one that no row reaches."""
    model = randomise(gemma3(["sliding_attention", "full_attention"] * 3, window=64))
    if method == "vla-cache":
        found, options = [], dict(keep=0.4, layers=(2,), threshold=-1.0)
        for other in ("drop", "mask"):  # No reference in which keys are those of the last step.
            with vp.prune(model, method, adapter=at(), mode=other, **options) as session:
                for _ in range(2):
                    session.frame(torch.zeros(1, 3, 4, 96))
                    found.append(talk(model, cache_of(kind, model)))
                assert session.last.reused.max() > 0
        same(found[1], found[3])
        same(found[1], found[0])  # Nothing changed between the steps.
        return
    with vp.prune(model, method, tokens=6, layer=2, adapter=at(), mode=mode) as session:
        got = talk(model, cache_of(kind, model))
        gone = [1 + (~session.last.kept_mask[0]).nonzero()[:, 0]]
    for reference in (
        hidden_behind(model.model, 2, gone),
        hidden_in_softmax(model.model.layers, 2, gone),
    ):
        with reference:
            same(got, talk(model, DynamicCache(config=model.config)))


# ---------------------------------------------------------------------- refused
def test_the_first_layer_of_a_kind_behind_the_cut():
    """Its mask would be sized by a layer that holds fewer tokens."""
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 4
    model = randomise(gemma3(kinds))
    with vp.prune(model, "fastv", tokens=6, layer=2, adapter=at()) as session:
        with pytest.raises(NotImplementedError, match="before layer 2; with a cache"):
            model(inputs_embeds=embeds(), use_cache=True, past_key_values=DynamicCache())
        got = model(inputs_embeds=embeds(), use_cache=False).logits[:, -1]
        kept = session.last.kept_mask[0]
    with hidden_behind(model.model, 2, [1 + (~kept).nonzero()[:, 0]]):
        same(got, model(inputs_embeds=embeds(), use_cache=False).logits[:, -1])


@pytest.mark.parametrize("method", ["divprune", "fastv", "random"])
def test_local_attention_under_another_name(method):
    options = {"positions": "keep"} if method == "divprune" else {}
    with pytest.raises(NotImplementedError, match="layer 3 is of kind 'local'"):
        vp.prune(gpt_neo(), method, tokens=6, layer=2, adapter=at("transformer.h"), **options)


@pytest.mark.parametrize("method", ["random", "divprune"])
def test_layers_that_carry_a_state(method):
    config = T.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=4)
    with pytest.raises(NotImplementedError, match="layer 2 is of kind 'RwkvBlock', in which"):
        vp.prune(T.RwkvForCausalLM(config), method, tokens=6, layer=2, adapter=at("rwkv.blocks"))


def test_layers_whose_rows_are_the_batch():
    config = T.XLNetConfig(vocab_size=97, d_model=32, n_layer=4, n_head=4, d_inner=48)
    model = T.XLNetLMHeadModel(config).eval()
    with (
        vp.prune(model, "random", tokens=6, layer=2, adapter=at("transformer.layer")),
        pytest.raises(NotImplementedError, match=r"XLNetLayer .* with \(36, 2, 32\) where"),
    ):
        model(input_ids=torch.arange(72).view(2, 36))


@pytest.mark.parametrize("make", [mpt, bloom])
@pytest.mark.parametrize("cut", [0, 2])
def test_biases_by_distance_however_long_they_are(make, cut):
    """As long as the model can see (MPT), or as the cache (BLOOM), not as the prompt."""
    model = randomise(make())
    layers = "transformer.blocks" if make is mpt else "transformer.h"
    caches = [StaticCache(config=model.config, max_cache_len=44), DynamicCache()]
    with vp.prune(model, "random", tokens=6, layer=cut, adapter=at(layers)):
        for cache in caches:
            with pytest.raises(NotImplementedError, match=r"get `(position_bias|alibi)` \("):
                talk(model, cache)


@pytest.mark.parametrize(("make", "layers"), [(mpt, "blocks"), (openai_gpt, "h")])
def test_masks_whose_true_may_mean_anything(make, layers):
    """MPT hides where a mask is True, and GPT adds what it is given."""
    model = randomise(make())
    adapter = at(f"transformer.{layers}")
    with (
        vp.prune(model, "random", tokens=6, layer=2, adapter=adapter, mode="mask"),
        pytest.raises(NotImplementedError, match="hiding tokens"),
    ):
        model(inputs_embeds=embeds())


@pytest.mark.parametrize(
    ("make", "layers", "message"),
    [
        (gpt_neox_japanese, "gpt_neox_japanese.layers", "GPTNeoXJapaneseAttention has no `config"),
        (bloom, "transformer.h", "BloomAttention has no `config._attn_implementation`"),
    ],
)
def test_attentions_that_are_not_chosen_by_name(make, layers, message):
    with pytest.raises(TypeError, match=message + r".*without scores \(divprune, random\)"):
        vp.prune(make(), "fastv", tokens=6, layer=2, adapter=at(layers))


def test_layers_that_are_no_attention():
    class Config:
        layer_types = ("full_attention", "full_attention", "conv", "full_attention")

    model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES))
    model.model.config = Config()
    with pytest.raises(NotImplementedError, match="layer 2 is of kind 'conv'"):
        vp.prune(model, "random", tokens=6, layer=1, adapter=at())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fastv", {}, r"attention of layer 1 \(Falcon.*without showing"),
        ("vla-pruner", {"window": 1}, r"watched.*without showing it"),
        ("vla-pruner", {"window": 1, "levels": "action"}, r"watched.*without showing it"),
    ],
)
def test_an_attention_that_never_shows_itself(method, options, message):
    model = randomise(falcon())
    adapter = at("transformer.h")
    with (
        vp.prune(model, method, tokens=6, layer=2, adapter=adapter, **options),
        pytest.raises(NotImplementedError, match=message),
    ):
        model(inputs_embeds=embeds())


@pytest.mark.parametrize(
    ("method", "options"), [("vla-cache", {"layers": (2,)}), ("specprune-vla", {})]
)
def test_an_attention_that_never_shows_itself_to_a_memory(method, options):
    model = randomise(falcon())
    with vp.prune(model, method, keep=0.5, adapter=at("transformer.h"), **options) as session:
        for _ in range(2):
            session.frame(torch.zeros(1, 3, 4, 96))
            with pytest.raises(
                NotImplementedError, match=r"\(FalconAttention\) ran without showing"
            ):
                model(inputs_embeds=embeds())


@pytest.mark.parametrize("method", ["divprune", "random", "fastv"])
def test_flex_attention(method):
    model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(NotImplementedError, match='"sdpa" or "eager"'):
        vp.prune(model, method, tokens=6, layer=2, adapter=at())


class Layer(nn.Module):
    """A layer of somebody's own."""

    def __init__(self, first="hidden_states"):
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, hidden_states, bias=None, attention_mask=None, extra=None, *rest):
        return hidden_states + self.mix(hidden_states)


class Stack(nn.Module):
    """A decoder of somebody's own; `hand` says what its layers get."""

    def __init__(self, hand):
        super().__init__()
        self.layers, self.hand = nn.ModuleList(Layer() for _ in range(4)), hand

    def forward(self, inputs_embeds):
        for layer in self.layers:
            args, kwargs = self.hand(inputs_embeds)
            inputs_embeds = layer(*args, **kwargs)
        return inputs_embeds


@pytest.mark.parametrize(
    ("hand", "message"),
    [
        (lambda x: ((x, x[..., :1]), {}), r"get `bias` \(1, 36, 1\)"),
        (lambda x: ((x,), {"extra": {"places": (x[0, :, 0],)}}), r"get `extra` \(36,\)"),
        (lambda x: ((x,), {"extra": [x[:, None]]}), r"get `extra` \(1, 1, 36, 32\)"),
        (lambda x: ((x, None, None, None, 7), {}), "5 positional arguments"),
        (lambda x: ((x[0],), {}), r"not called with hidden states \[B, S, D\] first"),
    ],
)
def test_arguments_that_nobody_shortens_are_named(hand, message):
    model = nn.Sequential()
    model.add_module("model", Stack(hand))
    with (
        vp.prune(model, "random", tokens=6, layer=2, adapter=at()),
        pytest.raises(NotImplementedError, match=message),
    ):
        model.model(inputs_embeds=embeds())


def test_a_layer_that_was_replaced_since(decoders):
    model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES)).eval()
    with vp.prune(model, "divprune", tokens=6, layer=2, positions="keep", adapter=at()):
        other = T.LlamaForCausalLM(T.LlamaConfig(**SIZES)).eval()
        model.model.layers[2] = other.model.layers[2]
        with pytest.raises(RuntimeError, match=r"layer 2 did not run.*Attach vla-pruner last"):
            model(inputs_embeds=embeds())


def test_a_kernel_that_others_replace_is_looked_up_anew(monkeypatch):
    """Another tool patches and restores a kernel between two sessions."""
    from transformers.models.llama import modeling_llama

    config = T.LlamaConfig(**SIZES)
    model = T.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    original, calls = modeling_llama.eager_attention_forward, []

    def patched(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", patched)
        with vp.prune(model, "fastv", tokens=6, layer=2, adapter=at()):
            model(inputs_embeds=embeds())
    assert calls
    calls.clear()
    with vp.prune(model, "fastv", tokens=6, layer=2, adapter=at()) as session:
        model(inputs_embeds=embeds())
        assert session.last.visual_kept == 6
    assert not calls


def test_an_unknown_tensor_of_the_attention_is_refused():
    from vla_pruner.core.scores import see

    attention, x = nn.Identity(), torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="`position_bias`"):
        see(None, (attention, x, x, None, {"position_bias": x}), None)


def test_layers_that_are_given_other_tables_are_not_alike():
    one, other, mask = torch.ones(2), torch.ones(2), torch.ones(3)
    given = {"position_embeddings": (one, other), "attention_mask": mask}
    assert alike(given, {"attention_mask": mask, "position_embeddings": (one, other)})
    for tables in ((one, one), (one,), (one, other, one), one, None):
        assert not alike(given, {**given, "position_embeddings": tables})
        assert not alike({**given, "position_embeddings": tables}, given)
    assert not alike(given, {"attention_mask": mask}) and not alike({"attention_mask": mask}, given)
