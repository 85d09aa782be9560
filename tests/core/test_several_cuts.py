"""Behind several cuts a decoder computes what it computes when nobody sees the removed tokens."""

from __future__ import annotations

import copy
import dataclasses
from itertools import product

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vla_pruner as vp
from checks import near
from ladder import SEMANTIC, VISUAL, Ladder, M, slow
from vla_pruner.methods import Choice

TOKENS = [5, 6, 7]


def prune(model, method=None, *, mode="drop", visual=VISUAL, **options):
    adapter = vp.models.Decoder("model.layers", visual=visual, **options.pop("where", {}))
    return vp.prune(model, method or Ladder(**options), adapter=adapter, mode=mode)


def kept_at(session, row=0):
    """For each cut, the visual tokens of a row that were left."""
    return [stage.kept_mask[row].nonzero()[:, 0].tolist() for stage in session.last.stages]


def check(session, logits, reference, *, row=0, length=30, pad=0):
    """Rows that stayed to the end, and every decode step, agree with the slow decoder."""
    stays = torch.ones(length, dtype=torch.bool)
    stays[VISUAL] = session.last.kept_mask[row]
    rows = stays.nonzero()[:, 0]
    near(logits[0][row, pad + rows], reference.logits[rows])
    for step, later in enumerate(logits[1:]):
        near(later[row, 0], reference.logits[length + step])


@pytest.mark.parametrize(("family", "attention"), [*product(("llama", "qwen3"), ("sdpa", "eager"))])
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_equals_the_slow_decoder(decoders, embeds, rollout, family, attention, mode):
    model, eager = decoders(family, attention), decoders(family, "eager")
    with prune(model, mode=mode) as session:
        logits = rollout(model, embeds())
    kept = kept_at(session)
    assert [len(tokens) for tokens in kept] == [12, 5] and set(kept[1]) < set(kept[0])
    reference = slow(eager, embeds()[0], TOKENS, cuts=(2, 4), kept=kept)
    check(session, logits, reference)
    plain = rollout(model, embeds())
    assert (logits[-1] - plain[-1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("at", "left"),
    [
        ((1, 2, 3, 4, 5), (15, 9, 8, 4, 1)),
        ((0, 3), (10, 5)),
        ((3,), (0,)),
        ((2, 4), (7, 0)),
        ((2, 3, 4), (6, 0, 0)),
        ((2, 4), (20, 20)),
        ((2, 4), (8, 8)),
    ],
)
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_any_schedule(decoders, embeds, rollout, at, left, mode):
    model, eager = decoders(), decoders("llama", "eager")
    spec = (("kind", "logits"),) if at[0] == 0 else ()
    options = dict(score_layer=0) if at[0] == 0 else {}
    with prune(model, at=at, left=left, spec=spec, mode=mode, **options) as session:
        logits = rollout(model, embeds())
    kept = kept_at(session)
    assert [len(tokens) for tokens in kept] == list(left)
    check(session, logits, slow(eager, embeds()[0], TOKENS, cuts=at, kept=kept))
    report = session.last
    if mode == "drop":
        lengths = [30 - M + [M, *left][sum(cut <= layer for cut in at)] for layer in range(6)]
        assert report.tokens_per_layer == tuple(lengths)
        assert (report.tokens_kept, report.visual_kept) == (lengths[-1], left[-1])
    else:
        assert report.tokens_per_layer == (30,) * 6
    assert [stage.layer for stage in report.stages] == list(at)
    assert torch.equal(report.kept_mask, report.stages[-1].kept_mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("first", [0, 2])
def test_exact_when_nothing_is_removed(decoders, embeds, rollout, attention, first):
    model = decoders("llama", attention)
    untouched = rollout(model, embeds())
    spec = (("kind", "logits"),)
    with prune(model, at=(first, 4), left=(M, M), score_layer=0, spec=spec):
        inside = rollout(model, embeds())
    after = rollout(model, embeds())
    for a, b, c in zip(untouched, inside, after, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_a_cut_before_the_first_layer(
    decoders, embeds, rollout, attention, static, padded, compact
):
    """Layer 0 answers for the length of the cache, and still counts every token."""
    model, eager = decoders("qwen2", attention), decoders("qwen2", "eager")
    cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache()
    mask = torch.ones(2, 33, dtype=torch.long) if padded else None
    inputs = embeds(3, batch=2, length=33) if padded else embeds(3)
    if padded:
        mask[1, :3] = 0
    options = dict(at=(0, 3), left=(10, 4), score_layer=0, spec=(("kind", "logits"),))
    options["places"] = "compact" if compact else "keep"
    with prune(model, watch=(0, 2), **options) as session:
        logits = rollout(model, inputs, cache=cache, mask=mask)
    row, pad = (1, 3) if padded else (0, 0)
    kept, x = kept_at(session, row), inputs[row, pad:]
    reference = slow(eager, x, TOKENS, cuts=(0, 3), kept=kept, compact=compact)
    check(session, logits, reference, row=row, pad=pad)
    seen = [sum(reference.attention[layer].mean(0)[29:, VISUAL]) / 4 for layer in (0, 2)]
    expected = torch.zeros(M).index_copy(
        0, torch.tensor(kept[0]), ((seen[0] + seen[1]) / 2)[kept[0]]
    )
    near(session.last.action[row], expected)
    assert int(cache.get_seq_length()) == len(inputs[0]) + 3
    if not static:
        assert [cache.get_seq_length(i) - len(inputs[0]) - 3 for i in range(6)] == [
            0, -10, -10, -16, -16, -16
        ]  # fmt: skip


@pytest.mark.parametrize("static", [False, True])
def test_caches_of_each_layer(decoders, embeds, rollout, static):
    model, eager = decoders("qwen2"), decoders("qwen2", "eager")
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
    with prune(model) as session:
        for seed in range(2):
            cache.reset() if static else None
            cache = cache if static else DynamicCache()
            logits = rollout(model, embeds(seed), cache=cache)
    reference = slow(eager, embeds(1)[0], TOKENS, cuts=(2, 4), kept=kept_at(session))
    check(session, logits, reference)
    assert int(cache.get_seq_length()) == 33
    if not static:
        assert [cache.get_seq_length(i) for i in range(6)] == [33, 33, 25, 25, 18, 18]


def test_copied_cache_continues_the_same_prompt(decoders, embeds):
    model = decoders("llama", "eager")
    with prune(model):
        cache = model(inputs_embeds=embeds(), use_cache=True).past_key_values
        copied, token = copy.deepcopy(cache), torch.tensor([[5]])
        one = model(input_ids=token, past_key_values=cache).logits
        assert torch.equal(one, model(input_ids=token, past_key_values=copied).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"merging": True}, {"places": "compact"}, {"spec": (("rows", "weighted"),)}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_padded_batch_equals_single_runs(decoders, embeds, rollout, attention, options):
    model, pads = decoders("llama", attention), (0, 3, 7)
    mask = torch.ones(3, 37, dtype=torch.long)
    batch = embeds(9, batch=3, length=37)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    tokens = torch.arange(9).view(3, 3)
    with prune(model, **options) as session:
        logits = rollout(model, batch, mask=mask, tokens=tokens)
        together = session.last
        for row, pad in enumerate(pads):
            single = rollout(model, batch[row : row + 1, pad:], tokens=tokens[row : row + 1])
            for one, other in zip(together.stages, session.last.stages, strict=True):
                assert torch.equal(one.kept_mask[row], other.kept_mask[0])
            for a, b in zip(logits, single, strict=True):
                near(a[row, -1], b[0, -1])
    assert not torch.equal(together.kept_mask[0], together.kept_mask[1])


@pytest.mark.parametrize("options", [{}, {"merging": True}, {"places": "compact"}])
def test_rows_on_all_tokens_share_a_batch(decoders, embeds, rollout, options):
    """One episode is at its first step, which is full, the other one is not."""
    model = decoders()
    with prune(model, first_full=1, **options) as session:
        session.episodes(["old"])
        rollout(model, embeds(0))
        rollout(model, embeds(1))
        alone = rollout(model, embeds(2))
        kept = session.last.stages
        session.reset(["old"])
        rollout(model, embeds(0))
        session.episodes(["old", "new"])
        logits = rollout(model, torch.cat([embeds(2), embeds(3)]))
    report = session.last
    assert report.warm_up.tolist() == [False, True]
    for one, other in zip(report.stages, kept, strict=True):
        assert torch.equal(one.kept_mask[0], other.kept_mask[0]) and one.kept_mask[1].all()
    plain = rollout(model, embeds(3))
    for a, b, c in zip(logits, alone, plain, strict=True):
        near(a[0, -1], b[0, -1])
        near(a[1, -1], c[0, -1])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("at", [(2, 4), (0, 4)])
def test_beams_keep_the_same_tokens(decoders, cache, at):
    model, found = decoders(), []
    options = dict(at=at, score_layer=0, spec=(("kind", "logits"),))
    for mode in ("drop", "mask"):
        with prune(model, merging=True, places="compact", mode=mode, **options) as session:
            made = model.generate(
                input_ids=torch.arange(10, 40)[None],
                attention_mask=torch.ones(1, 30, dtype=torch.long),
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                num_beams=3,
                cache_implementation=cache,
            )
        assert all((stage.kept_mask == stage.kept_mask[0]).all() for stage in session.last.stages)
        found.append(made)
    assert torch.equal(*found)


def test_prefills_of_one_step_follow_the_first(decoders, embeds):
    model = decoders()
    with prune(model, merging=True, where=dict(action_rows=slice(-5, None))) as session:
        with session.step():
            first = model(inputs_embeds=embeds(0), use_cache=False).logits
            decided = session.last
            words = torch.cat([embeds(0)[:, :21], embeds(1)[:, 21:]], dim=1)
            model(inputs_embeds=words, use_cache=False)
            followed = session.last
            again = model(inputs_embeds=embeds(0), use_cache=False).logits
        model(inputs_embeds=embeds(1), use_cache=False)
    for one, other in zip(decided.stages, followed.stages, strict=True):
        assert torch.equal(one.kept_mask, other.kept_mask)
    assert torch.equal(first, again)
    assert not torch.equal(decided.kept_mask, session.last.kept_mask)


# ---------------------------------------------------------------------- what a method is shown
def test_evidence_at_each_cut(decoders, embeds):
    model, log = decoders("llama", "eager"), []
    with prune(model, seen=(log,), watch=(3,), first_full=1, spec=(("rows", "text"),)) as session:
        model(inputs_embeds=embeds(7))
        model(inputs_embeds=embeds())
    first, second = log
    kept = kept_at(session)
    assert (first.number, first.layer, first.keep_count, first.views) == (0, 2, 12, (M,))
    assert (second.number, second.layer, second.keep_count, second.views) == (1, 4, 5, (12,))
    assert first.tokens.tolist() == [list(range(M))] and second.tokens.tolist() == [kept[0]]
    assert torch.equal(first.features, embeds()[:, VISUAL])
    assert torch.equal(second.features, embeds()[:, VISUAL][:, kept[0]])
    assert torch.equal(second.forecast, first.forecast[:, kept[0]]) and first.forecast.any()
    reference = slow(model, embeds()[0], [], cuts=(2, 4), kept=kept)
    for evidence, left in ((first, list(range(M))), (second, kept[0])):
        hidden = reference.inputs[evidence.layer][VISUAL][left]
        near(evidence.hidden[0], hidden)
        assert torch.equal(evidence.text, embeds()[:, 21:])
        assert evidence.text_valid.all() and evidence.text_valid.shape == (1, 9)
        assert evidence.semantic is evidence.scores["semantic"]


@pytest.mark.parametrize("rows", ["all", "last", "text", "visual", "weighted"])
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_attention_scores_at_each_cut(decoders, embeds, rows, heads, mode):
    model, eager, log = decoders(), decoders("llama", "eager"), []
    spec = (("rows", rows), ("heads", heads))
    with prune(model, seen=(log,), spec=spec, mode=mode) as session:
        model(inputs_embeds=embeds())
    kept = kept_at(session)
    reference = slow(eager, embeds()[0], [], cuts=(2, 4), kept=kept)
    visual, text = embeds()[0, VISUAL], embeds()[0, 21:]
    for evidence, left in zip(log, ([*range(M)], kept[0]), strict=True):
        columns = [1 + token for token in left]
        real = [0, *columns, *range(21, 30)]
        weight = {row: 1.0 for row in real}
        if rows != "all":
            weight = {
                "last": {29: 1.0},
                "text": {row: 1.0 for row in range(21, 30)},
                "visual": {row: 1.0 for row in columns},
                "weighted": {
                    21 + i: float(torch.sigmoid(word @ visual.mean(0)))
                    for i, word in enumerate(text)
                },
            }[rows]
        seen = reference.attention[evidence.layer - 1]
        joined = seen.mean(0) if heads == "mean" else seen.amax(0)
        expected = sum(w * joined[row, columns] for row, w in weight.items()) / sum(weight.values())
        near(evidence.semantic[0], expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", ["all", "last", "text", "visual", "weighted"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_logits_at_each_cut(decoders, embeds, family, rows, heads):
    """Read in the very layer that is about to run, before tokens are cut there."""
    model, eager, log = decoders(family), decoders(family, "eager"), []

    class Ahead(Ladder):
        def scores(self, cut):
            (name, spec) = next(iter(super().scores(cut).items()))
            return {name: dataclasses.replace(spec, layer=cut)}

    spec = (("rows", rows), ("heads", heads), ("kind", "logits"))
    with prune(model, Ahead(seen=(log,), spec=spec)) as session:
        model(inputs_embeds=embeds())
    kept = kept_at(session)
    reference = slow(eager, embeds()[0], [], cuts=(2, 4), kept=kept)
    visual, text = embeds()[0, VISUAL], embeds()[0, 21:]
    for evidence, left in zip(log, ([*range(M)], kept[0]), strict=True):
        layer = model.model.layers[evidence.layer]
        x = layer.input_layernorm(reference.inputs[evidence.layer])
        query = layer.self_attn.q_proj(x).view(30, 4, 8)
        key = layer.self_attn.k_proj(x).view(30, 2, 8)
        if family == "qwen3":
            query, key = layer.self_attn.q_norm(query), layer.self_attn.k_norm(key)
        columns = [1 + token for token in left]
        voting = {
            "all": [0, *columns, *range(21, 30)],
            "last": [29],
            "text": [*range(21, 30)],
            "visual": columns,
            "weighted": [*range(21, 30)],
        }[rows]
        total, weights = torch.zeros(len(columns)), 0.0
        for row in voting:
            per_head = torch.stack([key[columns, h // 2] @ query[row, h] for h in range(4)])
            joined = (per_head.mean(0) if heads == "mean" else per_head.amax(0)) * 8**-0.5
            w = float(torch.sigmoid(text[row - 21] @ visual.mean(0))) if rows == "weighted" else 1.0
            total, weights = total + w * joined, weights + w
        near(evidence.semantic[0], total / weights)


def test_a_score_of_an_earlier_stage_follows_its_tokens(decoders, embeds):
    model, log = decoders(), []
    with prune(model, seen=(log,), score_layer=1) as session:
        model(inputs_embeds=embeds())
    first, second = log
    assert torch.equal(second.semantic, first.semantic[:, kept_at(session)[0]])
    assert torch.equal(session.last.semantic, first.semantic)


def test_padding_and_missing_cameras_do_not_vote(decoders, embeds):
    model, log = decoders(), []

    class Halved(vp.models.Decoder):
        def layout(self, inputs, kwargs):
            there = torch.arange(M)[None] < 8
            return dataclasses.replace(super().layout(inputs, kwargs), visual_valid=there)

    adapter = Halved("model.layers", visual=VISUAL)
    method = Ladder(seen=(log,), spec=(("rows", "visual"),), at=(2,), left=(5,))
    with vp.prune(model, method, adapter=adapter):
        model(inputs_embeds=embeds())
    seen = slow(decoders("llama", "eager"), embeds()[0], []).attention[1].mean(0)
    near(log[0].semantic[0], seen[1:9, VISUAL].mean(0))
    assert log[0].valid.tolist() == [[True] * 8 + [False] * 12]


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("where", [{}, {"action_rows": slice(-5, -1)}])
def test_action_scores_behind_several_cuts(decoders, embeds, rollout, mode, where):
    """Layers 1 (all tokens), 3 (12 of them) and 5 (5 of them), at the places of all 20."""
    model, eager = decoders(), decoders("llama", "eager")
    with prune(model, watch=(1, 3, 5), mode=mode, where=where) as session:
        rollout(model, embeds())
    kept = kept_at(session)
    reference = slow(eager, embeds()[0], TOKENS, cuts=(2, 4), kept=kept)
    queries = [*range(25, 29)] if where else [29]
    expected = torch.zeros(M)
    for layer, left in ((1, [*range(M)]), (3, kept[0]), (5, kept[1])):
        for row in [*queries, 30, 31, 32]:
            seen = reference.attention[layer].mean(0)[row]
            for token in left:
                expected[token] += seen[1 + token] / 3 / (len(queries) + 3)
    near(session.last.action[0], expected)


# ---------------------------------------------------------------------- merging, renumbering
@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_merged_and_renumbered(decoders, embeds, rollout, mode, compact, merge, attention):
    model, eager = decoders("llama", attention), decoders("llama", "eager")
    options = dict(places="compact" if compact else "keep", merging=merge)
    with prune(model, mode=mode, **options) as session:
        logits = rollout(model, embeds())
    how = dict(cuts=(2, 4), kept=kept_at(session))
    check(session, logits, slow(eager, embeds()[0], TOKENS, merge=merge, compact=compact, **how))
    if merge or compact:
        other = slow(eager, embeds()[0], TOKENS, **how)
        assert (logits[-1][0, 0] - other.logits[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("static", [False, True])
def test_renumbered_positions_go_on_for_long(decoders, embeds, rollout, static):
    """More decode steps than tokens were removed, past the prefill's own positions."""
    model, tokens = decoders(), [5 + i % 7 for i in range(22)]
    cache = StaticCache(config=model.config, max_cache_len=60) if static else None
    with prune(model, places="compact") as session:
        logits = rollout(model, embeds(), steps=22, tokens=torch.tensor([tokens]), cache=cache)
    eager = decoders("llama", "eager")
    kept = kept_at(session)
    check(session, logits, slow(eager, embeds()[0], tokens, cuts=(2, 4), kept=kept, compact=True))


# ---------------------------------------------------------------------- layers that do not run
@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("skip", [(1,), (3,), (2, 4), (4, 5), (5,)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_skipped_layers(decoders, embeds, rollout, mode, skip, attention):
    model, eager, cache = decoders("llama", attention), decoders("llama", "eager"), DynamicCache()
    layer = 0
    with prune(model, skip=skip, score_layer=layer, mode=mode) as session:
        logits = rollout(model, embeds(), cache=cache)
    kept = kept_at(session)
    reference = slow(eager, embeds()[0], TOKENS, cuts=(2, 4), kept=kept, skipped=skip)
    check(session, logits, reference)
    assert int(cache.get_seq_length()) == 33
    assert [i for i, n in enumerate(session.last.tokens_per_layer) if n == 0] == list(skip)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_skipping_without_cutting(decoders, embeds, rollout):
    model, eager = decoders(), decoders("llama", "eager")
    with prune(model, at=(), left=(), skip=(2, 4)) as session:
        logits = rollout(model, embeds())
        static = StaticCache(config=model.config, max_cache_len=40)
        again = rollout(model, embeds(), cache=static)
        beams = model.generate(
            input_ids=torch.arange(10, 40)[None], max_new_tokens=3, num_beams=2, do_sample=False
        )
    check(session, logits, slow(eager, embeds()[0], TOKENS, skipped=(2, 4)))
    near(again[-1], logits[-1])
    assert beams.shape == (1, 33)
    assert session.last.tokens_per_layer[2] == 0 and session.last.stages == ()


def test_text_alone_skips_nothing(decoders, embeds):
    model = decoders()

    class ImageOrText(vp.models.Decoder):
        def layout(self, inputs, kwargs):
            return super().layout(inputs, kwargs) if inputs.shape[1] == 30 else None

    plain = model(inputs_embeds=embeds(4, length=12)).logits
    adapter = ImageOrText("model.layers", visual=VISUAL)
    with vp.prune(model, Ladder(skip=(3,), score_layer=0), adapter=adapter):
        model(inputs_embeds=embeds())
        assert torch.equal(model(inputs_embeds=embeds(4, length=12)).logits, plain)


def test_range_of_action_layers_leaves_out_skipped_ones(decoders, embeds):
    model, eager = decoders(), decoders("llama", "eager")
    with prune(model, watch="latter-half", skip=(4,), at=(), left=()) as session:
        model(inputs_embeds=embeds())
    seen = slow(eager, embeds()[0], [], skipped=(4,)).attention
    expected = (seen[3].mean(0)[29, VISUAL] + seen[5].mean(0)[29, VISUAL]) / 2
    near(session.last.action[0], expected)


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(at=(4, 2)), r"\(4, 2\).*ascending"),
        (dict(at=(2, 2)), "ascending"),
        (dict(at=(2, 6)), "before layer 6, but the decoder has 6 layers"),
        (dict(skip=(0,)), r"skips layers \[0\]; only layers 1\.\.5"),
        (dict(skip=(6,)), r"only layers 1\.\.5"),
        (dict(skip=(3,)), "reads its 'semantic' score in layer 3, which it skips"),
        (dict(score_layer=2), "layer 2, which runs after tokens are cut before layer 2"),
        (dict(watch=(3, 4), skip=(4,), score_layer=0), r"layers \(3, 4\), of which \[4\]"),
        (dict(spec=(("rows", "some"),)), "ScoreSpec.rows='some'"),
    ],
)
def test_what_does_not_fit_is_refused_when_attached(decoders, options, message):
    with pytest.raises(ValueError, match=message):
        prune(decoders(), **options)
    prune(decoders()).remove()


@pytest.mark.parametrize("left", [(12,), (12, 13), (21, 5), (5, -1)])
def test_impossible_schedules_are_refused(decoders, embeds, left):
    with prune(decoders(), left=left), pytest.raises(ValueError, match="plans to leave"):
        decoders()(inputs_embeds=embeds())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda kept: kept[:, :-1], r"chose \(1, 11\) at cut 0; expected \[B, k\] = \(1, 12\)"),
        (lambda kept: Choice(kept, torch.zeros(1, 12, 5)), r"gave merge \(1, 12, 5\)"),
        (lambda kept: kept.float(), r"chose, at cut 0, tokens as torch.float32; expected int64"),
        (lambda kept: kept.flip(1), "out of order or of range, or one twice"),
        (lambda kept: kept + 20, "out of order or of range, or one twice"),
        (lambda kept: kept - 20, "out of order or of range, or one twice"),
        (lambda kept: kept[:, :1].expand(-1, 12), "out of order or of range, or one twice"),
    ],
)
def test_choices_of_the_wrong_shape_are_refused(decoders, embeds, made, message):
    class Wrong(Ladder):
        def select(self, evidence):
            return made(super().select(evidence))

    with prune(decoders(), Wrong()), pytest.raises(ValueError, match=message):
        decoders()(inputs_embeds=embeds())


def test_query_weights_have_to_be_defined(decoders):
    class Mute(Ladder):
        query_weights = vp.methods.Method.query_weights

    with pytest.raises(ValueError, match="does not define `query_weights`"):
        prune(decoders(), Mute(spec=(("rows", "weighted"),)))


def test_text_that_is_not_named_is_refused(decoders, embeds):
    """It shows at the first call; the model is as it was afterwards."""
    model = decoders()
    before = model(inputs_embeds=embeds()).logits
    with prune(model, spec=(("rows", "text"),), visual=slice(1, 30)) as session:
        with pytest.raises(ValueError, match=r"Layout\.text_rows"):
            model(inputs_embeds=embeds())
        assert session.last is None
    assert torch.equal(model(inputs_embeds=embeds()).logits, before)


def test_renumbering_needs_rotary_tables(decoders):
    model = decoders()
    rotary = model.model.rotary_emb
    try:
        model.model.rotary_emb = None
        with pytest.raises(NotImplementedError, match=r'positions="keep"'):
            prune(model, places="compact")
    finally:
        model.model.rotary_emb = rotary


@pytest.mark.parametrize("broken", ["select", "layer"])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(
    decoders, embeds, rollout, broken, monkeypatch
):
    model = decoders()
    plain = rollout(model, embeds())

    class Fails(Ladder):
        def select(self, evidence):
            if evidence.number == 1 and broken == "select":
                raise RuntimeError("no luck")
            return super().select(evidence)

    with prune(model, Fails(skip=(3,), score_layer=0)):
        hook = None
        if broken == "layer":
            hook = model.model.layers[5].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            model(inputs_embeds=embeds())
        if hook is not None:
            hook.remove()
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    assert all(torch.equal(a, b) for a, b in zip(plain, rollout(model, embeds()), strict=True))


def test_default_options_are_the_ones_of_a_score():
    assert Ladder().scores(2)["semantic"] == vp.methods.ScoreSpec(layer=1, **SEMANTIC)
