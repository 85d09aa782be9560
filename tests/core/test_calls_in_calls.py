"""What happens inside a call of a pruned model: other calls, removal, tracing, hidden states."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from test_calls import CUT, SAMPLED, logits, prune
from test_hf_vlm import IMAGE, KEEP, M, inputs_for, llava, paligemma
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor

import vla_pruner as vp
from checks import randomise
from hidden_columns import dropped, hidden_behind, same


@pytest.fixture(name="model")
def _model():
    return randomise(llava()[0])


@pytest.fixture(name="inputs")
def _inputs(model):
    _, ids, pixels = llava()
    return inputs_for(model, ids, pixels)


class Looks(LogitsProcessor):
    """Asks the model about another image before each word, as contrastive decoding does."""

    def __init__(self, model, other):
        self.model, self.other, self.seen = model, other, []

    def __call__(self, ids, scores):
        self.seen.append(self.model(**self.other).logits[:, -1])
        return scores


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_another_image_inside_of_generate_is_chosen_from_anew(model, inputs, options):
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    with prune(model) as session:
        plain = model.generate(**inputs, **SAMPLED, **options)
        report = session.last
        expected = model(**other).logits[:, -1]
        assert not torch.equal(session.last.kept_mask[:1], report.kept_mask[:1])
        looks = Looks(model, other)
        got = model.generate(**inputs, **SAMPLED, **options, logits_processor=[looks])
    assert len(looks.seen) >= 4
    for seen in looks.seen:
        same(seen, expected)
    same(logits(got), logits(plain))
    gone = dropped(report, (inputs["input_ids"] == IMAGE).expand(len(report.kept_mask), -1))
    with hidden_behind(model.model.language_model, CUT, gone):
        same(logits(got), logits(model.generate(**inputs, **SAMPLED, **options)))


def test_a_configuration_may_say_one_beam_where_the_model_says_three(model, inputs):
    """Rows that are no beams are episodes of their own, and keep what is theirs."""
    model.generation_config.num_beams = 3
    call = {name: torch.cat([value] * 3) for name, value in inputs.items()}
    call["pixel_values"] = torch.randn(call["pixel_values"].shape)
    config = GenerationConfig(num_beams=1, max_new_tokens=2, do_sample=False)
    with prune(model) as session:
        model.generate(**call, generation_config=config)
        assert session.last.episodes == (0, 1, 2)
        kept = session.last.kept_mask
        model(**call, logits_to_keep=1)
        assert torch.equal(session.last.kept_mask, kept) and not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_hidden_states_of_every_layer_stand_in_their_rows(model, inputs, mode):
    with prune(model, mode=mode) as session:
        got = model(**inputs, output_hidden_states=True).hidden_states
        report = session.last
    visual = inputs["input_ids"] == IMAGE
    with hidden_behind(model.model.language_model, CUT, dropped(report, visual)):
        expected = model(**inputs, output_hidden_states=True).hidden_states
    text = ~visual[0]
    assert len(got) == len(expected) == 6
    for number, (mine, plain) in enumerate(zip(got, expected, strict=True)):
        rows = torch.ones_like(text) if number <= CUT else text
        same(mine[:, rows], plain[:, rows])


@pytest.mark.parametrize("behind", [[], [7, 8, 9]], ids=["image last", "text last"])
def test_the_image_token_as_a_word_that_the_model_writes(model, inputs, behind):
    ids = torch.tensor([[1, 5, *[IMAGE] * M, *behind]])
    call = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def talk():
        cache = model(**call, use_cache=True).past_key_values
        words = []
        for number, word in enumerate((IMAGE, 9)):
            mask = torch.ones(1, ids.shape[1] + number + 1, dtype=torch.long)
            token = torch.tensor([[word]])
            words.append(model(input_ids=token, past_key_values=cache, attention_mask=mask).logits)
        return torch.cat(words, dim=1)

    with prune(model) as session:
        got = talk()
        assert session.last.visual_kept == KEEP
        chunk = torch.tensor([[4, IMAGE, 6]])
        cache = model(**call, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="1 of 1 image tokens hold no image features"):
            model(input_ids=chunk, past_key_values=cache)
    with hidden_behind(model.model.language_model, CUT, dropped(session.last, ids == IMAGE)):
        same(got, talk())


@pytest.mark.parametrize("options", [{"use_mtp": True}, {"speculation_type": "dflash"}], ids=str)
def test_newer_ways_of_guessing_tokens_are_refused(model, inputs, options):
    with prune(model):
        with pytest.raises(NotImplementedError, match="guessing tokens ahead"):
            model.generate(**inputs, **options)
        with pytest.raises(NotImplementedError, match="guessing tokens ahead"):
            model.generate(**inputs, generation_config=GenerationConfig(**options))
        model.generate(**inputs, max_new_tokens=1, use_mtp=False)


def test_prompts_that_are_packed_into_one_row_are_refused(model, inputs):
    with prune(model), pytest.raises(NotImplementedError, match="`generate_batch` packs"):
        model.generate_batch([inputs["input_ids"][0].tolist()])
    assert "generate_batch" not in vars(model)


# ---------------------------------------------------------------------- places that are given
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 1}], ids=str)
def test_places_serve_every_beam(model, inputs, options):
    seen = {}
    decoder = model.model.language_model
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    merged = {"inputs_embeds": seen["embeds"], "attention_mask": inputs["attention_mask"]}
    visual = inputs["input_ids"] == IMAGE
    with prune(model) as session:
        session.visual_places(visual)
        got = model.generate(**merged, **SAMPLED, **options)
        report = session.last
        session.visual_places(visual[:, 1:])
        with pytest.raises(
            ValueError, match=r"given a mask \(1, 20\), and this pass has \(\d, 21\)"
        ):
            model.generate(**merged, **SAMPLED, **options)
    assert report.kept_mask.sum(1).tolist() == [KEEP] * options["num_beams"]
    gone = dropped(report, visual.expand(len(report.kept_mask), -1))
    with hidden_behind(decoder, CUT, gone):
        same(logits(got), logits(model.generate(**merged, **SAMPLED, **options)))


def test_an_image_token_that_is_no_word():
    """PaliGemma may name a token behind its vocabulary, which no embedding belongs to."""
    model, ids, pixels = paligemma()
    model = randomise(model)
    for config in (model.config, model.model.config):
        config.image_token_id = 97
    call = inputs_for(model, [97 if token == IMAGE else token for token in ids], pixels)
    with prune(model) as session:
        got = model(**call, logits_to_keep=3).logits
        gone = dropped(session.last, call["input_ids"] == 97)
    with hidden_behind(model.model.language_model, CUT, gone):
        same(got, model(**call, logits_to_keep=3).logits)


def test_a_mask_that_numbers_packed_sequences(make, embeds):
    """Padding is what is 0; other numbers mean the same."""
    model, padded = make(), torch.ones(2, 30, dtype=torch.long)
    padded[1, :3] = 0
    where = vp.models.Decoder(visual=slice(1, 21))
    runs = []
    with vp.prune(model, "fastv", tokens=6, layer=CUT, adapter=where) as session:
        for mask in (padded, padded * (1 + torch.arange(30) // 26), 255 * padded.to(torch.uint8)):
            runs.append(model(inputs_embeds=embeds(batch=2), attention_mask=mask).logits[:, -1])
            runs.append(session.last.kept_mask.float())
    assert torch.equal(runs[1], runs[3]) and torch.equal(runs[1], runs[5])
    same(runs[2], runs[0])
    same(runs[4], runs[0])


# ---------------------------------------------------------------------- removal
class Removes:
    """A streamer that takes the session off while words are written."""

    def __init__(self, session):
        self.session, self.errors = session, []

    def put(self, words):
        try:
            self.session.remove()
        except RuntimeError as error:
            self.errors.append(str(error))

    def end(self):
        pass


def test_a_session_is_not_removed_from_under_a_call(model, inputs):
    with prune(model) as session:
        expected = logits(model.generate(**inputs, **SAMPLED))
        streamer = Removes(session)
        same(logits(model.generate(**inputs, **SAMPLED, streamer=streamer)), expected)
        assert len(streamer.errors) > 1 and "'MainThread' is inside a call" in streamer.errors[0]
        layer = model.model.language_model.layers[3]
        handle = layer.register_forward_pre_hook(lambda *_: vp.remove(model))
        with pytest.raises(RuntimeError, match="remove the session when the call has come back"):
            model(**inputs)
        handle.remove()
        same(logits(model.generate(**inputs, **SAMPLED)), expected)
    assert not session.attached


def test_a_call_of_another_thread_holds_a_session_and_an_interrupted_one_does_not(
    model,
    inputs,
):
    session, inside, go_on = prune(model), threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(60)

    def stop(*_):
        raise KeyboardInterrupt

    layer = model.model.language_model.layers[3]
    handle = layer.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: model(**inputs), name="worker")
    thread.start()
    assert inside.wait(60)
    with pytest.raises(RuntimeError, match="'worker' is inside a call"):
        session.remove()
    go_on.set()
    thread.join()
    handle.remove()
    handle = layer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    handle.remove()
    session.remove()
    assert not session.attached


# ---------------------------------------------------------------------- a model that changes
@pytest.mark.parametrize("method", ["fastv", "random"])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 5])
def test_a_layer_that_is_replaced_under_a_session(make, embeds, method, number):
    model, where = make(), vp.models.Decoder(visual=slice(1, 21))
    layers = model.model.layers
    with vp.prune(model, method, tokens=6, layer=2, adapter=where) as session:
        expected = model(inputs_embeds=embeds()).logits
        old = layers[number]
        layers[number] = copy.deepcopy(make().model.layers[number])
        with pytest.raises(RuntimeError, match=rf"layer {number} did not run.*Attach .* last"):
            model(inputs_embeds=embeds())
        layers[number] = torch.nn.Sequential(old)
        layers[number].forward = old.__call__
        session.reset()
        if method == "fastv":
            same(model(inputs_embeds=embeds()).logits, expected)


def test_layers_that_are_fewer_or_in_another_order(make, embeds):
    model, where = make(), vp.models.Decoder(visual=slice(1, 21))
    layers = model.model.layers
    with vp.prune(model, "fastv", tokens=6, layer=2, adapter=where):
        model.model.layers = layers[:4]
        with pytest.raises(RuntimeError, match="had 6 layers when the session began and has 4"):
            model(inputs_embeds=embeds())
        model.model.layers = torch.nn.ModuleList([layers[i] for i in (0, 1, 3, 2, 4, 5)])
        with pytest.raises(RuntimeError, match="layer 2 did not run"):
            model(inputs_embeds=embeds())


def test_a_layer_that_runs_twice_in_one_pass(make, embeds):
    model, where = make(), vp.models.Decoder(visual=slice(1, 21))
    layers = model.model.layers
    with vp.prune(model, "random", tokens=6, layer=2, adapter=where):
        layers[3].register_forward_pre_hook(
            lambda _, args, kwargs: ((layers[2](*args, **kwargs),), kwargs), with_kwargs=True
        )
        with pytest.raises(NotImplementedError, match="layer 2 of LlamaModel ran more than once"):
            model(inputs_embeds=embeds(), use_cache=False)


@pytest.mark.parametrize(("began", "then"), [("eager", "sdpa"), ("sdpa", "eager")])
@pytest.mark.parametrize("method", ["fastv", "vla-pruner"])
def test_a_kernel_that_is_changed_under_a_session(make, embeds, method, began, then):
    """Eager attention without a mask would look ahead; the other way round every mask is there."""
    model, where = make(attention=began), vp.models.Decoder(visual=slice(1, 21))
    options = {"window": 1} if method == "vla-pruner" else {}
    with vp.prune(model, method, tokens=6, layer=2, adapter=where, **options) as session:
        model(inputs_embeds=embeds())
        model.set_attn_implementation(then)
        if began == "eager":
            with pytest.raises(RuntimeError, match=r"was 'eager' when .* and is 'sdpa'"):
                model(inputs_embeds=embeds(1))
            return
        got = model(inputs_embeds=embeds(1)).logits[:, 21:]
        gone = [1 + (~session.last.kept_mask[0]).nonzero()[:, 0]]
    with hidden_behind(model.model, 2, gone):
        same(got, model(inputs_embeds=embeds(1)).logits[:, 21:])


# ---------------------------------------------------------------------- graphs and transforms
class Plain(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embeds):
        return self.model(inputs_embeds=embeds, use_cache=False).logits[:, -1]


@pytest.mark.filterwarnings("ignore")
def test_graphs_that_would_keep_the_tokens_of_one_image_are_refused(make, embeds):
    plain = Plain(make(num_hidden_layers=3))
    where = vp.models.Decoder(visual=slice(1, 21))
    with vp.prune(plain.model, "fastv", tokens=6, layer=1, adapter=where):
        with pytest.raises(NotImplementedError, match="keep the same tokens of every image"):
            torch.jit.trace(plain, embeds(), check_trace=False)
        with pytest.raises(NotImplementedError, match="keep the same tokens of every image"):
            torch.export.export(plain, (embeds(),), strict=False)
        with pytest.raises(NotImplementedError, match="give the rows as a batch"):
            torch.vmap(plain)(embeds(batch=3)[:, None])


def test_models_without_values_are_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, hidden_size=32, vocab_size=97))
    where = vp.models.Decoder(visual=slice(1, 21))
    with (
        vp.prune(model, "fastv", tokens=6, layer=1, adapter=where),
        pytest.raises(NotImplementedError, match="on the meta device nobody can look at values"),
    ):
        model(input_ids=torch.ones(1, 30, dtype=torch.long, device="meta"))
    with pytest.raises(ValueError, match="on the meta device and have no values"):
        vp.prune(model, "vtw", adapter=where)


# ---------------------------------------------------------------------- past the hooks
@pytest.mark.parametrize("method", ["fastv", "vla-cache"])
def test_a_forward_that_is_called_by_itself(make, embeds, method):
    """No hook would run, or only some of them; afterwards everything is as it was."""
    model, where = make(), vp.models.Decoder("model.layers", visual=slice(1, 21))
    asked = dict(inputs_embeds=embeds(), labels=torch.zeros(1, 30, dtype=torch.long))
    options = dict(layers=(1, 2)) if method == "vla-cache" else dict(layer=2)
    with vp.prune(model, method, tokens=6, adapter=where, **options) as session:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="of this LlamaForCausalLM was called by itself"):
                model.forward(**asked)
            with pytest.raises(RuntimeError, match="of this LlamaModel was called by itself"):
                model.model.forward(inputs_embeds=embeds())
        with session.step(), pytest.raises(RuntimeError, match="LlamaForCausalLM was called by"):
            model.forward(**asked)
        session.frame(torch.zeros(1, 3, 8, 40))
        model(inputs_embeds=embeds())
        assert session.last.steps == (0,)


@pytest.mark.parametrize("method", ["fastv", "vla-pruner"])
def test_a_functional_gradient_is_that_of_the_survivors(make, embeds, method):
    plain = Plain(make(num_hidden_layers=3))
    where = vp.models.Decoder(visual=slice(1, 21))
    options = {"window": 1} if method == "vla-pruner" else {}
    with vp.prune(plain.model, method, tokens=6, layer=1, adapter=where, **options) as session:
        plain(embeds())
        with torch.enable_grad():
            got = torch.func.grad(lambda x: plain(x).sum())(embeds(1))
        gone = [1 + (~session.last.kept_mask[0]).nonzero()[:, 0]]
    with torch.enable_grad(), hidden_behind(plain.model.model, 1, gone):
        expected = torch.func.grad(lambda x: plain(x).sum())(embeds(1))
    same(got, expected)
