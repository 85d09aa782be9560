"""The adapter for any decoder: positions, padding and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vla_pruner as vp
from checks import near
from hidden_columns import hidden_behind, same
from vla_pruner.models.base import built_in

Decoder = vp.models.Decoder


def bound(model, **options):
    adapter = Decoder(**{"visual": slice(1, 6), **options})
    adapter.bind(model)
    return adapter


def test_layers_by_path_and_by_object(decoders):
    model = decoders()
    for layers in ("model.layers", model.model.layers):
        adapter = bound(model, layers=layers)
        assert adapter.decoder is model.model and list(adapter.layers) == list(model.model.layers)
    assert bound(model.model, layers="layers").decoder is model.model
    assert "LlamaModel, 6 layers" in adapter.describe()


def test_unknown_layers(decoders):
    with pytest.raises(ValueError, match=r"'model\.layers'"):
        bound(decoders(), layers="transformer.h")
    with pytest.raises(ValueError, match="not part of this"):
        bound(decoders(), layers=nn.ModuleList([nn.Linear(1, 1)]))


def test_layout_is_computed_once(decoders):
    adapter = bound(decoders(), views=(2, 3), action_rows=slice(-3, None))
    layout = adapter.layout(torch.zeros(2, 12, 4), {})
    assert layout.visual.tolist() == [[1, 2, 3, 4, 5]]
    assert layout.views == (2, 3) and layout.action_rows == slice(-3, None)
    assert layout.valid_rows is None
    assert adapter.layout(torch.zeros(2, 12, 4), {}) is layout
    assert adapter.layout(torch.zeros(2, 13, 4), {}) is not layout


def test_padding_moves_positions(decoders):
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])
    layout = bound(decoders()).layout(torch.zeros(2, 8, 4), {"attention_mask": mask})
    assert layout.visual.tolist() == [[1, 2, 3, 4, 5], [3, 4, 5, 6, 7]]
    assert torch.equal(layout.valid_rows, mask)


def test_text_is_what_stands_behind_the_image(decoders):
    adapter = bound(decoders())
    assert adapter.layout(torch.zeros(2, 9, 4), {}).text_rows.tolist() == [[6, 7, 8]]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    padded = adapter.layout(torch.zeros(2, 9, 4), {"attention_mask": mask})
    assert padded.text_rows.tolist() == [[6, 7, 8], [-1, -1, 8]]
    assert adapter.layout(torch.zeros(2, 6, 4), {}).text_rows is None


def test_positions_that_are_not_contiguous(decoders, embeds):
    visual = torch.tensor([2, 5, 6, 9, 20])
    model, logits = decoders(), []
    for mode in ("drop", "mask"):
        with vp.prune(
            model, "fastv", tokens=2, adapter=Decoder(visual=visual), mode=mode
        ) as session:
            logits.append(model(inputs_embeds=embeds()).logits[:, -1])
        assert session.last.kept_mask.sum() == 2
    near(*logits)


def test_positions_of_each_row(decoders, embeds):
    model, logits = decoders(), []
    visual = torch.tensor([[1, 2, 3, 4], [11, 12, 13, 20]])
    for mode in ("drop", "mask"):
        with vp.prune(model, "fastv", tokens=2, adapter=Decoder(visual=visual), mode=mode):
            logits.append(model(inputs_embeds=embeds(batch=2)).logits[:, -1])
    near(*logits)
    with (
        vp.prune(model, "fastv", tokens=2, adapter=Decoder(visual=visual)),
        pytest.raises(ValueError, match="B=3"),
    ):
        model(inputs_embeds=embeds(batch=3))


def test_decoder_called_with_token_ids(decoders):
    model, ids = decoders(), torch.arange(10, 40)[None]
    results = []
    for arguments in ((ids,), ()):
        adapter = Decoder("layers", visual=slice(1, 6))
        with vp.prune(model.model, "fastv", tokens=2, adapter=adapter) as session:
            results.append(model.model(*arguments, **({} if arguments else {"input_ids": ids}))[0])
        assert session.last.kept_mask.sum() == 2
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(visual=slice(-5, None)), ValueError, "start and a stop"),
        (dict(visual=slice(5, 5)), ValueError, "at least one"),
        (dict(visual=[1, 2]), TypeError, "slice or a tensor"),
        (dict(visual=torch.tensor([3, 2])), ValueError, "ascending"),
        (dict(visual=torch.tensor([2, 2])), ValueError, "ascending"),
        (dict(visual=torch.tensor([0.5])), ValueError, "integers"),
        (dict(views=(2, 2)), ValueError, "sum to the 5"),
        (dict(views=(5, 0)), ValueError, "positive"),
        (dict(action_rows="prefill"), TypeError, '"decode" or a slice'),
        (dict(visual=slice("a", "b")), TypeError, "whole numbers"),
        (dict(visual=torch.arange(9) < 5), TypeError, r"use `mask\.nonzero"),
        (dict(views=5), TypeError, "whole numbers"),
        (dict(views=("a",)), TypeError, "whole numbers"),
        (dict(views=(2.0, 3.0)), TypeError, "whole numbers"),
        (dict(action_rows=slice(-4.0, None)), TypeError, "whole numbers"),
    ],
)
def test_impossible_descriptions(options, error, message):
    with pytest.raises(error, match=message):
        Decoder(**{"visual": slice(1, 6), **options})


@pytest.mark.parametrize("rows", [slice(40, 50), slice(0, 5), slice(20, 26), slice(9, 9)], ids=str)
def test_action_rows_that_a_cut_would_move(decoders, embeds, rows):
    model, where = decoders(), Decoder(visual=slice(1, 21), action_rows=rows)
    with (
        vp.prune(model, tokens=6, window=1, adapter=where),
        pytest.raises(ValueError, match=r"behind the visual tokens, which end at 20 of 30"),
    ):
        model(inputs_embeds=embeds())


@pytest.mark.parametrize(
    "adapter", [Decoder, object(), "model.layers"], ids=["class", "object", "name"]
)
def test_an_adapter_that_is_none(decoders, adapter):
    with pytest.raises(TypeError, match="`adapter` must be an instance of"):
        vp.prune(decoders(), "fastv", adapter=adapter)


def test_layers_that_are_numbers(decoders):
    where = Decoder("model.embed_tokens.weight", visual=slice(1, 6))
    with pytest.raises(ValueError, match=r"no layer list at .*it has 'model\.layers'"):
        vp.prune(decoders(), "fastv", adapter=where)


@pytest.mark.parametrize(
    ("asked", "stay"),
    [
        (torch.tensor([5, 29]), {4}),
        (torch.arange(30) % 7 == 3, {2, 9, 16}),
        (12, {17, 18, 19}),
        (1, set()),
    ],
    ids=str,
)
def test_rows_whose_logits_are_asked_for_are_computed(make, asked, stay):
    model, ids = make(), torch.arange(10, 40)[None]
    with vp.prune(model, "fastv", tokens=6, layer=2, adapter=Decoder(visual=slice(1, 21))) as s:
        got = model(ids, logits_to_keep=asked).logits
        kept = s.last.kept_indices[0].tolist()
    assert stay <= set(kept) and len(kept) == 6
    gone = [torch.tensor([1 + i for i in range(20) if i not in kept])]
    with hidden_behind(model.model, 2, gone):
        same(got, model(ids, logits_to_keep=asked).logits)


def test_labels_by_position(make):
    model, ids = make(), torch.arange(10, 40)[None]
    labels = torch.full_like(ids, -100)
    labels[:, [9, 15, 28]] = ids[:, [9, 15, 28]]
    with vp.prune(model, "fastv", tokens=6, layer=2, adapter=Decoder(visual=slice(1, 21))) as s:
        got = model(ids, None, None, None, None, labels).loss
        kept = s.last.kept_indices[0].tolist()
    assert {7, 13} <= set(kept)
    gone = [torch.tensor([1 + i for i in range(20) if i not in kept])]
    with hidden_behind(model.model, 2, gone):
        same(got[None], model(ids, labels=labels).loss[None])


# ---------------------------------------------------------------------- the registry
class Entry:
    def __init__(self, name, loaded):
        self.name, self.value, self.loaded = name, f"package:{name}", loaded

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def installed(monkeypatch):
    def install(*entries):
        monkeypatch.setattr(
            "vla_pruner.models.base.entry_points",
            lambda group: entries if group == "vla_pruner.models" else (),
        )

    return install


def test_families_of_other_packages(installed, decoders, embeds):
    family = vp.models.Family(
        name="llama-robot",
        summary="a test",
        matches=lambda model: type(model).__name__ == "LlamaForCausalLM",
        make=lambda model: Decoder(visual=slice(1, 6)),
    )
    installed(Entry("llama-robot", family))
    assert vp.list_models()["llama-robot"] is family
    with vp.prune(decoders(), "fastv", tokens=2) as session:
        decoders()(inputs_embeds=embeds())
    assert session.last.visual_kept == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry("broken", ImportError("no such file")), "no such file"),
        (Entry("strange", 3), "not a vla_pruner.models.Family"),
        (Entry("openvla", vp.models.Family("openvla", "", bool, Decoder)), "taken"),
    ],
)
def test_families_that_cannot_be_used(installed, entry, message):
    installed(entry)
    before = {family.name for family in built_in()}
    with pytest.warns(UserWarning, match=message):
        assert before == set(vp.list_models())
