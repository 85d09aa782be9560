"""However a model is called: as its own later layers compute without seeing what was dropped."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from test_hf_vlm import IMAGE, KEEP, M, inputs_for, llava, qwen
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)

import vla_pruner as vp
from checks import fingerprint, randomise
from hidden_columns import dropped, hidden_behind, same

CUT = 2
SAMPLED = dict(
    max_new_tokens=4,
    min_new_tokens=4,
    do_sample=False,
    output_logits=True,
    return_dict_in_generate=True,
)


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    return randomise(llava()[0])


@pytest.fixture
def inputs(model):
    _, ids, pixels = llava()
    return inputs_for(model, ids, pixels)


def prune(model, method="fastv", **options):
    return vp.prune(model, method, **{"tokens": KEEP, "layer": CUT, **options})


def logits(output) -> torch.Tensor:
    return torch.stack(output.logits)


def reference(model, inputs, report, **options):
    gone = dropped(report, inputs["input_ids"] == IMAGE)
    with hidden_behind(model.model.language_model, CUT, gone):
        return model.generate(**inputs, **SAMPLED, **options)


# ---------------------------------------------------------------------- rows that are read
@pytest.mark.parametrize("method", ["fastv", "vla-pruner", "random", "sparsevlm-release", "vtw"])
@pytest.mark.parametrize("behind", [[], [7, 8, 9]], ids=["image last", "text last"])
def test_the_row_that_is_read_is_computed(model, inputs, method, behind):
    ids = torch.tensor([[1, 5, 7, 8, 9, *[IMAGE] * M, *behind]])
    inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"window": 1} if method == "vla-pruner" else {}
    budget = {} if method == "vtw" else {"tokens": KEEP}
    if method == "sparsevlm-release" and not behind:
        return  # It asks for an instruction behind the image, and there is none.
    with vp.prune(model, method, layer=CUT, **budget, **options) as session:
        for _ in range(2):
            got = model.generate(**inputs, **SAMPLED)
        report = session.last
    expected = {"vtw": 0}.get(method, KEEP)
    assert report.visual_kept == (expected if behind else max(expected, 1))
    assert bool(report.kept_mask[0, -1]) or behind
    same(logits(got), logits(reference(model, inputs, report)))


def test_labels_behind_an_image_are_worth_what_they_are(model, inputs):
    """The log-likelihood of the word behind the image is that of a model, not of a row of zeros."""
    ids = inputs["input_ids"]
    labels = torch.where(ids == IMAGE, -100, ids)
    for asked in ({"labels": labels}, {}):
        with prune(model) as session:
            output, report = model(**inputs, **asked), session.last
        assert bool(report.kept_mask[0, -1]) and report.visual_kept == KEEP
        with hidden_behind(model.model.language_model, CUT, dropped(report, ids == IMAGE)):
            plain = model(**inputs, **asked)
        same(output.logits[:, 1 + M :], plain.logits[:, 1 + M :])
        if asked:
            same(output.loss[None], plain.loss[None])
    last = F.cross_entropy(output.logits[0, 1 + M][None], ids[0, 2 + M][None])
    assert abs(float(last) - float(torch.tensor(97.0).log())) > 1e-3


def test_several_rows_before_labels_take_their_places_of_the_budget(make):
    model = make()
    ids = torch.arange(10, 40)[None]
    labels = torch.full_like(ids, -100)
    labels[:, [9, 15, 28]] = ids[:, [9, 15, 28]]
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    with vp.prune(model, "fastv", tokens=4, layer=CUT, adapter=adapter) as session:
        got = model(input_ids=ids, labels=labels)
        kept = session.last.kept_indices[0]
    assert len(kept) == 4 and {7, 13} <= set(kept.tolist())
    gone = [torch.tensor([1 + i for i in range(20) if i not in kept])]
    with hidden_behind(model.model, CUT, gone):
        same(got.loss[None], model(input_ids=ids, labels=labels).loss[None])


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("method", ["fastv", "vla-pruner"])
def test_what_trainers_hand_a_model(model, inputs, make, method, shifted):
    """Shifted labels stand at the row that is read; the number of items is for the loss alone."""
    ids = torch.arange(10, 40)[None]
    places = [8, 14, 27] if shifted else [9, 15, 28]
    decoder, where = make(), vp.models.Decoder("model.layers", visual=slice(1, 21))
    for whole, call, adapter in ((decoder, {"input_ids": ids}, where), (model, inputs, None)):
        length = call["input_ids"].shape[1]
        labels = torch.full((1, length), -100)
        labels[:, [place for place in places if place < length]] = 5
        asked = {"labels": labels, "num_items_in_batch": torch.tensor(3)}
        asked |= {"shift_labels": labels} if shifted else {}
        options = {"window": 1} if method == "vla-pruner" else {}
        with prune(whole, method, adapter=adapter, **options) as session:
            for _ in range(2):
                got = whole(**call, **asked)
            report = session.last
        stack = decoder.model if adapter else model.model.language_model
        is_visual = call["input_ids"] == IMAGE
        if adapter:
            is_visual = (torch.arange(length) > 0) & (torch.arange(length) < 21)[None]
        with hidden_behind(stack, CUT, dropped(report, is_visual)):
            same(got.loss[None], whole(**call, **asked).loss[None])


@pytest.mark.parametrize("method", ["fastv", "vla-adp"])
def test_read_tokens_of_several_views_under_a_budget_per_view(model, inputs, method):
    ids = torch.tensor([[1, *[IMAGE] * M, 5, *[IMAGE] * M]])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    call["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"] + 1])
    options = {"gate": "none", "positions": "keep"} if method == "vla-adp" else {}
    with vp.prune(model, method, keep=0.5, budget="view", layer=CUT, **options) as session:
        got, report = model(**call).logits, session.last
    assert report.views == (M, M) and report.visual_kept == M
    assert bool(report.kept_mask[0, M - 1]) and bool(report.kept_mask[0, -1])
    if method == "fastv":
        assert [len(view) for view in report.kept[0]] == [M // 2, M // 2]
    with hidden_behind(model.model.language_model, CUT, dropped(report, ids == IMAGE)):
        plain = model(**call).logits
    for row in (M, M + 1, -1):
        same(got[:, row], plain[:, row])


# ---------------------------------------------------------------------- generate
@pytest.mark.parametrize("how", ["keyword", "config", "position", "model"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("prompt_lookup_num_tokens", 3, "guessing tokens"), ("prefill_chunk_size", 12, "split over")],
)
def test_options_of_generate_are_read_however_they_are_given(
    model, inputs, how, name, value, message
):
    config = GenerationConfig(**{name: value})
    with prune(model), pytest.raises(NotImplementedError, match=message):
        if how == "keyword":
            model.generate(**inputs, **{name: value})
        elif how == "config":
            model.generate(**inputs, generation_config=config)
        elif how == "position":
            model.generate(None, config, **inputs)
        else:
            setattr(model.generation_config, name, value)
            model.generate(**inputs)


@pytest.mark.parametrize("how", ["keyword", "config", "model"])
def test_beams_are_one_episode_however_they_are_asked_for(model, inputs, how):
    options = dict(max_new_tokens=3, do_sample=False)
    with prune(model, "vla-pruner", window=1) as session:
        for _ in range(2):
            if how == "keyword":
                model.generate(**inputs, num_beams=3, **options)
            elif how == "config":
                model.generate(**inputs, generation_config=GenerationConfig(num_beams=3, **options))
            else:
                model.generation_config.num_beams = 3
                model.generate(**inputs, **options)
        assert session.last.episodes == (0, 0, 0) and session.last.steps == (1, 1, 1)


# ---------------------------------------------------------------------- caches
def test_a_prefix_in_a_static_cache(model, inputs):
    head, ids = inputs["input_ids"][:, :2], inputs["input_ids"]
    rest = {"input_ids": ids[:, 2:], "pixel_values": inputs["pixel_values"]}
    runs = []
    for static in (True, False):
        config = model.config.get_text_config()
        cache = StaticCache(config=config, max_cache_len=40) if static else DynamicCache()
        with prune(model) as session:
            model(input_ids=head, past_key_values=cache, use_cache=True)
            mask = torch.ones_like(ids)
            first = model(**rest, attention_mask=mask, past_key_values=cache, use_cache=True)
            mask = torch.cat([mask, mask[:, :1]], dim=1)
            token = {"input_ids": torch.tensor([[21]]), "attention_mask": mask}
            then = model(**token, past_key_values=cache, use_cache=True)
            assert session.last.visual_kept == KEEP
        runs.append(torch.cat([first.logits[:, -1], then.logits[:, -1]]))
    same(*runs)


@pytest.mark.parametrize("method", ["fastv", "vla-pruner", "divprune"])
def test_an_image_may_continue_a_copied_prefix(model, inputs, method):
    """The recipe of transformers: a system prompt is cached once, and copies of it continued."""
    head = inputs["input_ids"][:, :2]
    options = {"window": 1} if method == "vla-pruner" else {}
    options |= {"positions": "keep", "layer": 0} if method == "divprune" else {}
    runs = []
    with prune(model, method, **options) as session:
        prefix = model(input_ids=head, past_key_values=DynamicCache(), use_cache=True)
        for _ in range(2):
            cache = copy.deepcopy(prefix.past_key_values)
            got = model.generate(**inputs, past_key_values=cache, **SAMPLED)
            runs.append((session.last, logits(got)))
        session.reset()
        for _ in range(2):
            whole = model.generate(**inputs, **SAMPLED)
        assert torch.equal(session.last.kept_mask, runs[-1][0].kept_mask)
    same(runs[-1][1], logits(whole))
    assert runs[-1][0].visual_kept == KEEP
    if method == "fastv":
        same(runs[-1][1], logits(reference(model, inputs, runs[-1][0])))


def test_a_second_image_in_a_later_turn(model, inputs):
    """Both images are pruned, and what is written sees what is left of both."""
    first = {**inputs, "past_key_values": DynamicCache(), "use_cache": True}
    more = torch.tensor([[11, *[IMAGE] * M, 12, 13]])
    mask = torch.ones(1, inputs["input_ids"].shape[1] + more.shape[1], dtype=torch.long)
    later = {"input_ids": more, "attention_mask": mask, "pixel_values": inputs["pixel_values"] + 1}

    def talk(session=None):
        output, gone, start = model(**first), [], 0
        cache = output.past_key_values
        if session is not None:
            gone.append(dropped(session.last, inputs["input_ids"] == IMAGE)[0])
            start = inputs["input_ids"].shape[1]
        output = model(**later, past_key_values=cache, use_cache=True)
        if session is not None:
            gone.append(start + dropped(session.last, more == IMAGE)[0])
            assert session.last.visual_full == M and session.last.visual_kept == KEEP
            assert session.last.steps == (1,)
        end = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        token = {"input_ids": torch.tensor([[21]]), "attention_mask": end}
        answer = model(**token, past_key_values=cache, use_cache=True)
        return torch.cat([output.logits[:, -2:], answer.logits], dim=1), gone

    with prune(model) as session:
        got, gone = talk(session)
    first["past_key_values"] = DynamicCache()
    with hidden_behind(model.model.language_model, CUT, [torch.cat(gone)]):
        expected, _ = talk()
    same(got, expected)


def test_copies_of_caches_continue_what_they_are_copies_of(model, inputs):
    """Two padded batches of one shape; a copy of the first goes on after the second was read."""
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values"] + 1])
    token = torch.tensor([[20], [21]])

    def batch(pads):
        words = [7, 8, 9, 10]
        rows = [[0] * p + [1, 5, *[IMAGE] * M, *words[: 4 - p]] for p in pads]
        ids = torch.tensor(rows)
        return ids, (ids != 0).long()

    def read(ids, mask, images):
        places = (mask.cumsum(1) - 1).clamp_min(0)
        call = dict(input_ids=ids, attention_mask=mask, pixel_values=images, position_ids=places)
        return model(**call, past_key_values=DynamicCache(), use_cache=True).past_key_values

    one, other = batch((0, 3)), batch((3, 0))

    def run(session=None):
        cache = read(*one, pixels)
        report = None if session is None else session.last
        copied = copy.deepcopy(cache)
        read(*other, pixels + 0.3)
        mask = torch.cat([one[1], torch.ones(2, 1, dtype=torch.long)], 1)
        call = dict(attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1)
        return model(input_ids=token, past_key_values=copied, **call).logits, report

    with prune(model) as session:
        got, report = run(session)
    with hidden_behind(model.model.language_model, CUT, dropped(report, one[0] == IMAGE)):
        expected, _ = run()
    same(got, expected)


@pytest.mark.parametrize("method", ["fastv", "vla-pruner"])
@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_rows_of_different_episodes_may_not_change_places(model, inputs, method, mode, kind):
    """Each row keeps its own tokens and its own padding, which the masks of later passes go by."""
    text = model.config.text_config
    short = [9, 9, 1, *[IMAGE] * M, 7]  # Two tokens of padding on the left.
    ids = torch.tensor([[1, 5, 4, *[IMAGE] * M, 7], short])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values"].flip(-1)])
    other = torch.tensor([1, 0])

    def prefill():
        cache = DynamicCache() if kind is DynamicCache else StaticCache(text, max_cache_len=48)
        model(input_ids=ids, attention_mask=mask, pixel_values=pixels, past_key_values=cache)
        return cache

    def go_on(cache, mask):
        long = F.pad(mask, (0, 1), value=1)
        return model(input_ids=ids[:, -1:], attention_mask=long, past_key_values=cache).logits

    options = {"window": 1} if method == "vla-pruner" else {}
    with prune(model, method, mode=mode, **options) as session, torch.no_grad():
        for step in range(2):
            cache = prefill()
            twin = copy.deepcopy(cache)
            twin.reorder_cache(other)
            by_hand = copy.deepcopy(cache)
            by_hand.layers[-1].keys[:] = by_hand.layers[-1].keys[other]
            for moved in (twin, by_hand):
                with pytest.raises(RuntimeError, match="rows of this cache stand in another order"):
                    go_on(moved, mask[other])
            same(go_on(copy.deepcopy(cache), mask), go_on(cache, mask))  # A copy in order is one.
            cache.reorder_cache(torch.tensor([0, 1]))
            go_on(cache, mask)
            assert bool(session.last.warm_up.all()) == (step == 0 and method == "vla-pruner")
            cache.reorder_cache(other)
            with pytest.raises(RuntimeError, match="rows of this cache stand in another order"):
                go_on(cache, mask[other])


def test_rows_of_one_episode_may_change_places(model, inputs):
    """Beams: the same tokens stay in each, so that nothing tells them apart but what they say."""
    call = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    with prune(model) as session, torch.no_grad():
        session.episodes(["one", "one"])
        cache = DynamicCache()
        model(**call, past_key_values=cache)
        words, mask = torch.tensor([[4], [6]]), F.pad(call["attention_mask"], (0, 1), value=1)
        plain = copy.deepcopy(cache)
        model(input_ids=words, attention_mask=mask, past_key_values=plain)
        got = model(input_ids=words.flip(0), attention_mask=mask, past_key_values=cache).logits
        plain.reorder_cache(torch.tensor([1, 0]))
        ends, mask = torch.tensor([[8], [8]]), F.pad(mask, (0, 1), value=1)
        same(
            model(input_ids=ends, attention_mask=mask, past_key_values=plain).logits,
            model(input_ids=ends, attention_mask=mask, past_key_values=cache).logits,
        )
        assert got.isfinite().all()


def test_a_cropped_cache_is_refused(model, inputs):
    with prune(model):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(-1)
        with pytest.raises(RuntimeError, match="cropped or rebuilt"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_an_image_that_is_split_over_calls_is_refused(make):
    plain = make()
    adapter = vp.models.Decoder("model.layers", visual=slice(4, 20))
    with vp.prune(plain, "fastv", tokens=4, layer=CUT, adapter=adapter):
        cache = plain(input_ids=torch.arange(10, 14)[None], use_cache=True).past_key_values
        with pytest.raises(NotImplementedError, match="split over several passes"):
            plain(input_ids=torch.arange(14, 24)[None], past_key_values=cache)


# ---------------------------------------------------------------------- embeddings, videos
def test_embeddings_are_pruned_where_places_are_known_and_else_left_alone_aloud(model, inputs):
    seen = {}
    decoder = model.model.language_model
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    merged = {"inputs_embeds": seen["embeds"], "attention_mask": inputs["attention_mask"]}
    with prune(model) as session:
        expected = model.generate(**inputs, **SAMPLED)
        kept = session.last.kept_mask
        with pytest.warns(UserWarning, match=r"left a prefill alone.*session\.visual_places"):
            model.generate(**merged, **SAMPLED)
        assert "visual_places" in session.last.left_alone
        assert str(session.last).startswith("left alone: LlavaForConditionalGeneration was called")
        with pytest.raises(ValueError, match="got a list"):
            session.visual_places((inputs["input_ids"] == IMAGE).tolist())
        session.visual_places(inputs["input_ids"] == IMAGE)
        got = model.generate(**merged, **SAMPLED)
        assert torch.equal(session.last.kept_mask, kept) and session.last.left_alone is None
        same(logits(got), logits(expected))
        words = model.get_input_embeddings()(inputs["input_ids"])
        text = {**merged, "inputs_embeds": words, "pixel_values": inputs["pixel_values"]}
        prefill = model(**text, logits_to_keep=1)
        assert torch.equal(session.last.kept_mask, kept)
        same(prefill.logits[:, -1], expected.logits[0])


@pytest.mark.parametrize("version", ["2", "2.5", "3"])
def test_tokens_of_videos_are_visual_tokens(version):
    model = randomise(qwen(version)[0])
    ids = torch.tensor([[5, 92, *[91] * M, 93, 7, 8, 9]])
    call = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=torch.randn(64, 3 * 2 * 14 * 14),
        video_grid_thw=torch.tensor([[1, 8, 8]]),
        mm_token_type_ids=2 * (ids == 91).int(),
    )
    with prune(model) as session:
        got = model.generate(**call, **SAMPLED)
        report = session.last
    assert (report.visual_full, report.visual_kept) == (M, KEEP)
    with hidden_behind(model.model.language_model, CUT, dropped(report, ids == 91)):
        same(logits(got), logits(model.generate(**call, **SAMPLED)))


# ---------------------------------------------------------------------- copies, threads, removal
def test_an_attached_model_is_not_copied(model, inputs, tmp_path):
    before = fingerprint(model)
    with prune(model):
        for attempt in (copy.deepcopy, lambda m: torch.save(m, tmp_path / "model.pt")):
            with pytest.raises(RuntimeError, match=r"has a pruning session.*vp\.remove"):
                attempt(model)
        weights = model.state_dict()
    twin = copy.deepcopy(model)
    assert fingerprint(model) == before and twin.state_dict().keys() == weights.keys()
    same(twin(**inputs).logits, model(**inputs).logits)
    with prune(twin) as session:
        twin(**inputs)
        assert session.last.visual_kept == KEEP


def test_two_threads_are_exact_or_refused(model, inputs):
    other = {**inputs, "pixel_values": 0.3 * inputs["pixel_values"] + 1}
    with prune(model):
        wanted = [logits(model.generate(**x, **SAMPLED)) for x in (inputs, other)]
    found: Counter[str] = Counter()

    def work(number, call):
        for _ in range(12):
            try:
                with torch.no_grad():
                    got = logits(model.generate(**call, **SAMPLED))
                close = (got - wanted[number]).abs().max() < 1e-4
                found["right" if close else "wrong"] += 1
            except RuntimeError as error:
                found["refused" if "one call at a time" in str(error) else str(error)] += 1

    with prune(model):
        threads = [threading.Thread(target=work, args=pair) for pair in enumerate((inputs, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        got = logits(model.generate(**inputs, **SAMPLED))
    assert set(found) <= {"right", "refused"} and found["right"] and found.total() == 24
    same(got, wanted[0])


def test_a_reset_from_another_thread_is_safe(model, inputs):
    stop, errors = threading.Event(), []
    with prune(model, "vla-pruner", window=1) as session:

        def resetting():
            while not stop.is_set():
                session.reset()
                session.motion(0.1, "somebody")

        thread = threading.Thread(target=resetting)
        thread.start()
        try:
            for _ in range(25):
                model(**inputs)
        except Exception as error:
            errors.append(error)
        stop.set()
        thread.join()
    assert not errors


def test_a_session_that_nobody_kept_can_be_removed(model, inputs):
    expected = model(**inputs).logits
    before = fingerprint(model)
    assert not vp.remove(model)
    prune(model)
    assert not torch.equal(model(**inputs).logits, expected)
    with pytest.raises(RuntimeError, match=r"vp\.remove\(model\)"):
        prune(model)
    second = prune(model, "divprune", replace=True)
    model(**inputs)
    assert second.last.visual_kept == KEEP and second.attached
    assert vp.remove(model) and not second.attached
    assert fingerprint(model) == before and torch.equal(model(**inputs).logits, expected)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        vp.remove("llava")


class Tuner(torch.nn.Module):
    """Built like peft's wrapper: it calls `forward` of the model inside, past its hooks."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.peft_config = model, {}

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model.forward(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [
        Tuner,
        pytest.param(
            lambda m: torch.compile(m, backend="eager"), id="compiled", marks=pytest.mark.slow
        ),
    ],
)
def test_wrapped_models_are_pruned_inside(model, inputs, wrap):
    wrapped, expected = wrap(model), model(**inputs).logits
    same(wrapped(**inputs).logits, expected)
    with prune(model):
        pruned = model(**inputs).logits
    with prune(wrapped) as session:
        assert session.model is model
        for _ in range(2):
            same(wrapped(**inputs).logits, pruned)
            assert session.last.visual_kept == KEEP
    same(wrapped(**inputs).logits, expected)
    assert "forward" not in vars(model)


def test_copies_in_threads_are_explained(model):
    with pytest.raises(TypeError, match=r"prune `model\.module`"):
        prune(torch.nn.DataParallel(model))


# ---------------------------------------------------------------------- interrupted calls
@pytest.mark.parametrize("method", ["fastv", "vla-pruner", "random"])
@pytest.mark.parametrize("where", ["prefill", "decode", "head"])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_call_that_did_not_finish_never_was(model, inputs, method, where, kind):
    def session():
        return prune(model, method, **({"window": 2} if method == "vla-pruner" else {}))

    def go():
        return logits(model.generate(**inputs, **SAMPLED))

    with session() as kept:
        expected = [go() for _ in range(4)][-1]
        report = kept.last
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == {"prefill": 1, "decode": 3, "head": 2}[where]:
            raise kind("stopped")

    with session() as kept:
        for _ in range(3):
            go()
        module = model.lm_head if where == "head" else model.model.language_model.layers[3]
        for _ in range(2):
            calls, handle = 0, module.register_forward_pre_hook(fail)
            with pytest.raises(kind):
                go()
            handle.remove()
        assert torch.equal(go(), expected)
        assert kept.last.steps == (3,) and torch.equal(kept.last.kept_mask, report.kept_mask)


def test_a_warm_up_that_broke_is_no_observation(make, embeds):
    model = make()
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    with vp.prune(model, tokens=6, adapter=adapter) as session:
        handle = model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                model(inputs_embeds=embeds())
        handle.remove()
        for step in range(4):
            model(inputs_embeds=embeds(step))
            assert session.last.steps == (step,) and bool(session.last.warm_up) == (step < 3)
        assert float(session.last.forecast.min()) > 0


def test_a_broken_frame_is_forgotten(make, embeds):
    model, broken = make(), embeds(1).clone()
    broken[0, -1, 0] = float("nan")
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    with vp.prune(model, tokens=6, window=2, adapter=adapter) as session:
        for step in range(6):
            frame = broken if step == 1 else embeds(step)
            if step == 1:
                assert not model(inputs_embeds=frame).logits[:, -1].isfinite().all()
                continue
            model(inputs_embeds=frame)
            assert session.last.forecast.isfinite().all()
        with pytest.raises(ValueError, match="NaN"):
            model(inputs_embeds=broken)
        model(inputs_embeds=embeds(7))
        assert session.last.kept_mask.sum() == 6


# ---------------------------------------------------------------------- long use
def test_inference_mode_then_training(make, embeds):
    model = make()
    for method in ("fastv", "vla-pruner", "divprune"):
        adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
        options = {} if method == "divprune" else {"layer": CUT}
        with vp.prune(model, method, tokens=6, adapter=adapter, **options):
            with torch.inference_mode():
                for step in range(4):
                    model(inputs_embeds=embeds(step))
            with torch.enable_grad():
                x = embeds().requires_grad_()
                model(inputs_embeds=x).logits[:, -1].pow(2).mean().backward()
            assert x.grad is not None and float(x.grad.abs().max()) > 0


def test_episodes_and_motion_are_bounded(make, embeds):
    from vla_pruner.core import episodes

    model, most = make(num_hidden_layers=3), 4
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes, "MOST_EPISODES", most)
        with vp.prune(model, tokens=6, layer=1, window=1, adapter=adapter) as session:
            for number in range(9):
                session.episodes([f"robot {number}"])
                model(inputs_embeds=embeds(number))
                for _ in range(300):
                    session.motion(0.1)
            known = session._passes.episodes._known
            assert list(known) == [f"robot {number}" for number in range(5, 9)]
            assert all(len(episode.motion) == 256 for episode in known.values())
            session.episodes(["robot 0"])
            model(inputs_embeds=embeds(0))
            assert session.last.steps == (0,), "forgotten, and so it begins anew"


def test_an_episode_as_a_block(make, embeds):
    model = make()
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    with vp.prune(model, tokens=6, window=1, adapter=adapter) as session:
        for _ in range(2):
            with session.episode("left arm"):
                for step in range(2):
                    model(inputs_embeds=embeds(step))
                    assert session.last.episodes == ("left arm",)
                    assert session.last.steps == (step,)
        line = str(session.last)
        assert "6 of 20 visual tokens kept before layer 3" in line and line.endswith(" ms")
        assert session.last.ms > 0
        model(inputs_embeds=embeds())
        assert session.last.episodes == (0,)


def alone(session, call, name, steps=4):
    """Outputs of an episode that nobody interrupts."""
    with session.episode(name):
        return [call(step) for step in range(steps)]


@pytest.mark.parametrize("tasks", [False, True], ids=["threads", "tasks"])
def test_blocks_of_threads_and_tasks_are_their_own(make, embeds, tasks):
    model, found, seen = make(), {}, {}
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    turns = {"left": threading.Event(), "right": threading.Event()}
    with vp.prune(model, tokens=6, window=1, adapter=adapter) as session:

        def of(name):
            return lambda step: model(inputs_embeds=embeds(10 * (name == "left") + step)).logits

        expected = {name: alone(session, of(name), name) for name in turns}

        def call(name, step):
            found[name].append(of(name)(step))
            seen[name].append((session.last.episodes, session.last.steps))

        def work(name, other):
            with session.episode(name):
                for step in range(4):
                    assert turns[name].wait(60)
                    turns[name].clear()
                    call(name, step)
                    turns[other].set()

        async def task(name):
            with session.episode(name):
                for step in range(4):
                    call(name, step)
                    await asyncio.sleep(0)

        async def both():
            await asyncio.gather(task("left"), task("right"))

        found, seen = {name: [] for name in turns}, {name: [] for name in turns}
        if tasks:
            asyncio.run(both())
        else:
            turns["left"].set()
            pairs = [("left", "right"), ("right", "left")]
            threads = [threading.Thread(target=work, args=pair) for pair in pairs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    for name in turns:
        assert seen[name] == [((name,), (step,)) for step in range(4)]
        assert all(map(torch.equal, found[name], expected[name]))


def test_a_call_outside_of_several_blocks_is_refused(make, embeds):
    model = make()
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    said = []

    def elsewhere():
        try:
            model(inputs_embeds=embeds())
            said.append(session.last.episodes)
        except RuntimeError as error:
            said.append(str(error))

    def in_a_thread(work):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with vp.prune(model, "fastv", tokens=6, adapter=adapter) as session:
        with session.episode("left"):
            in_a_thread(elsewhere)  # It calls for the one that is open.
            entered, go_on = threading.Event(), threading.Event()

            def another():
                with session.episode("right"):
                    entered.set()
                    go_on.wait(60)

            thread = threading.Thread(target=another)
            thread.start()
            assert entered.wait(60)
            in_a_thread(elsewhere)
            model(inputs_embeds=embeds())
            assert session.last.episodes == ("left",)
            go_on.set()
            thread.join()
        model(inputs_embeds=embeds())
        assert session.last.episodes == (0,)
    assert said[0] == ("left",)
    assert "episodes are open ('left', 'right')" in said[1]


# ---------------------------------------------------------------------- compiled
def test_compiling_a_removed_session_touches_nothing(make):
    model = make()
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    first = vp.prune(model, "fastv", tokens=6, adapter=adapter)
    first.remove()
    second = vp.prune(model, "fastv", tokens=6, adapter=adapter)
    with pytest.raises(RuntimeError, match="removed"):
        first.compile(backend="eager")
    first.remove()
    assert second.attached
    second.remove()
    assert "forward" not in vars(model.model)


@pytest.mark.parametrize(
    "method", [pytest.param("fastv"), pytest.param("vla-pruner", marks=pytest.mark.slow)]
)
def test_a_few_graphs_serve_every_length_of_prompt(make, method):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = make(num_hidden_layers=2)
    adapter = vp.models.Decoder(visual=slice(1, 25), action_rows=slice(-4, None))
    options = {"window": 1} if method == "vla-pruner" else {}
    frames = [torch.randn(1, length, 32) for length in range(36, 56, 2)]
    runs = []
    for compiled in (False, True):
        with vp.prune(model, method, tokens=6, layer=1, adapter=adapter, **options) as session:
            if compiled:
                session.compile(backend="eager")
            runs.append([model(inputs_embeds=f, use_cache=False).logits[:, -1] for f in frames])
    same(torch.cat(runs[1]), torch.cat(runs[0]))
    assert counters["stats"]["unique_graphs"] <= 4
