"""Visual tokens whose own output the caller reads, and methods that look at more than a ranking."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from test_hf_vlm import IMAGE, M, inputs_for, llava

import vla_pruner as vp
from checks import randomise
from hidden_columns import dropped, hidden_behind, same


@pytest.fixture
def model():
    return randomise(llava()[0])


@pytest.fixture
def inputs(model):
    """Two images, each with a word behind it."""
    _, ids, pixels = llava()
    one = inputs_for(model, ids, pixels)["pixel_values"]
    ids = torch.tensor([[1, 5, *[IMAGE] * M, 7, *[IMAGE] * M, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([one, one.flip(-1)]),
    }


def rows(inputs):
    """Rows before which no image ends, and those at which one does."""
    is_visual = inputs["input_ids"][0] == IMAGE
    return ~is_visual | ~is_visual.roll(-1)


def frames(session):
    generator = torch.Generator().manual_seed(3)
    session.frame(torch.rand(1, 2, 3, 16, 16, generator=generator) * 255)


@pytest.mark.parametrize("amp", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_token_that_is_read_is_not_recalled(model, inputs, amp):
    """VLA-Cache computes it, though it stands still; also where keys were of another dtype."""
    found, labels = [], torch.where(inputs["input_ids"] == IMAGE, -100, inputs["input_ids"])
    for mode in ("drop", "mask"):
        options = dict(tokens=1, layers=(1, 2, 3), threshold=-1.0, order="similarity", mode=mode)
        with vp.prune(model, "vla-cache", **options) as session:
            for context in (nullcontext, amp):
                frames(session)
                with context():
                    output = model(**inputs, labels=labels)
            assert not session.last.kept_mask.all()
            assert bool(session.last.kept_mask[0, [M - 1, 2 * M - 1]].all())
        found.append((output.logits[:, rows(inputs)].float(), output.loss[None]))
    rel = 1e-5 if amp is nullcontext else 3e-2
    assert float(found[0][0].abs().amax(-1).min()) > 1e-3
    for got, expected in zip(*found, strict=True):
        same(got, expected, rel)


@pytest.mark.parametrize("tau", [9.0, 0.0])
def test_neighbourhoods_keep_their_grid(model, inputs, tau):
    """TEAM-VLA sees the squares of both cameras, whatever is read of them."""
    options = dict(keep=0.25, layer=1, context=0.0, chance=0.0, tau=tau)
    found, kept = [], []
    for mode in ("drop", "mask"):
        with vp.prune(model, "team-vla", mode=mode, **options) as session:
            found.append(model(**inputs).logits[:, rows(inputs)])
            kept.append(session.last.kept_mask)
    assert torch.equal(*kept) and bool(kept[0][0, [M - 1, 2 * M - 1]].all())
    assert int(kept[0].sum()) == M // 2
    same(*found)


@pytest.mark.parametrize("merging", [False, True])
def test_a_method_that_names_a_token_that_stays_anyway(model, inputs, merging):
    """It may not know `Evidence.valid`: the first of the others takes its place."""
    from ladder import Ladder

    method = Ladder(at=(2, 3), left=(12, 5), merging=merging)
    with vp.prune(model, method, mode="mask"):
        hidden = model(**inputs).logits[:, rows(inputs)]
    with vp.prune(model, method) as session:
        got, report = model(**inputs).logits[:, rows(inputs)], session.last
    same(got, hidden)
    assert [int(stage.kept_mask.sum()) for stage in report.stages] == [12, 5]
    assert all(bool(s.kept_mask[0, [M - 1, 2 * M - 1]].all()) for s in report.stages)
    if not merging:
        is_visual, decoder = inputs["input_ids"] == IMAGE, model.model.language_model
        gone = [(dropped(stage, is_visual), stage.layer) for stage in report.stages]
        with hidden_behind(decoder, gone[0][1], gone[0][0]), hidden_behind(decoder, *gone[1][::-1]):
            same(got, model(**inputs).logits[:, rows(inputs)])


def test_tokens_that_are_named_one_by_one(model, inputs):
    named = (1, 4, M - 1, 20, 2 * M - 1)
    with vp.prune(model, "fixed", layer=2, indices=named) as session:
        got = model(**inputs).logits[:, rows(inputs)]
        assert session.last.kept_indices[0].tolist() == list(named)
        report = session.last
    gone = dropped(report, inputs["input_ids"] == IMAGE)
    with hidden_behind(model.model.language_model, 2, gone):
        same(got, model(**inputs).logits[:, rows(inputs)])
    with vp.prune(model, "fixed", layer=2, indices=(1, 4, 7)) as session:
        with pytest.raises(ValueError, match=r"have to name tokens \[15, 31\], too"):
            model(**inputs)
        model(**inputs, logits_to_keep=1)
        assert session.last.kept_indices[0].tolist() == [1, 4, 7]
