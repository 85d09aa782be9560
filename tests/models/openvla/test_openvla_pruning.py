"""Pruned OpenVLA and OpenVLA-OFT equal themselves with the dropped columns hidden."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_openvla import make_oft, make_openvla, observation

import vla_pruner as vp
from checks import near
from ladder import Ladder
from vla_pruner.models import find_adapter
from vla_pruner.models.openvla import OpenVLA

SENTENCES = ["pick up the can", "lift the milk slowly now"]
FAMILIES = pytest.mark.parametrize("family", ["openvla", "oft-previous", "oft-slot"])
BATCHES = pytest.mark.parametrize("sentences", [SENTENCES[:1], SENTENCES], ids=["one", "two"])


def make(family: str, attention: str = "sdpa", sharp: float = 20) -> OpenVLA:
    if family == "openvla":
        model = make_openvla(attn_implementation=attention)
    else:
        model = make_oft(attn_implementation=attention, read=family.removeprefix("oft-"))
    with torch.no_grad():  # attention far from uniform
        for layer in model.language_model.model.layers:
            layer.self_attn.q_proj.weight.mul_(sharp)
            layer.self_attn.k_proj.weight.mul_(sharp)
    return model


def seen(model: OpenVLA, sentences: list[str], step: int = 0) -> list[dict[str, Any]]:
    cameras = model.config.num_images
    return [observation(step + 7 * i, cameras, text) for i, text in enumerate(sentences)]


def outputs(model: OpenVLA) -> list[torch.Tensor]:
    """Rows that the actions are read from, in every pass of the decoder to come."""
    rows = getattr(model.config, "action_rows", slice(-1, None))
    found: list[torch.Tensor] = []
    model.language_model.model.register_forward_hook(
        lambda module, args, output: found.append(output.last_hidden_state[:, rows])
    )
    return found


@FAMILIES
@BATCHES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropping_equals_hiding(
    family: str, sentences: list[str], attention: str, proves: Callable[..., None]
) -> None:
    runs = []
    for mode in ("drop", "mask"):
        model = make(family, attention)
        found = outputs(model)
        with vp.prune(model, "fastv", keep=0.25, layer=2, mode=mode) as session:  # type: ignore
            actions = model.predict_actions(seen(model, sentences))
            assert session.last is not None
            runs.append((found, actions, session.last.kept_indices))
            kept = session.last.visual_kept
        assert kept == (0.25 if mode == "drop" else 1) * sum(model.config.views)
    (dropped, first, indices), (hidden, second, others) = runs
    assert torch.equal(indices, others)
    assert len(dropped) == len(hidden) == (7 if family == "openvla" else 1)
    for a, b in zip(dropped, hidden, strict=True):
        near(a, b)
    near(first, second)
    several = ("batch", "padding") if len(sentences) > 1 else ()
    how = ("dynamic",) if family == "openvla" else ("no cache", "cameras")
    proves("openvla", type(model), "reference", *several, *how)


@FAMILIES
def test_the_paper_method_warms_up_then_drops_what_it_would_hide(family: str) -> None:
    options = {"keep": 0.25, "layer": 2, "window": 2}
    runs = []
    for mode in ("drop", "mask"):
        model = make(family)
        found, reports = outputs(model), []
        with vp.prune(model, "vla-pruner", mode=mode, **options) as session:  # type: ignore
            for step in range(4):
                model.predict_actions(seen(model, SENTENCES, step))
                reports.append(session.last)
        runs.append((found, reports))
    (dropped, first), (hidden, second) = runs
    for a, b in zip(dropped, hidden, strict=True):
        near(a, b)
    visual = sum(make(family).config.views)
    assert [report.visual_kept for report in first] == [visual] * 2 + [visual // 4] * 2
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.kept_mask, b.kept_mask)
        near(a.action, b.action)
        assert (a.action.sum(1) > 0).all()


@FAMILIES
@BATCHES
def test_keeping_everything_and_leaving_are_bit_exact(family: str, sentences: list[str]) -> None:
    model = make(family)
    found = outputs(model)
    model.predict_actions(seen(model, sentences))
    with vp.prune(model, "vla-pruner", keep=1.0, layer=2, window=1):
        for _ in range(2):
            model.predict_actions(seen(model, sentences))
    model.predict_actions(seen(model, sentences))
    passes = len(found) // 4
    for run in range(1, 4):
        later = found[run * passes : (run + 1) * passes]
        assert all(torch.equal(a, b) for a, b in zip(found, later, strict=False))


@FAMILIES
def test_rows_of_a_padded_batch_keep_what_they_keep_alone(family: str) -> None:
    model = make(family)
    both = seen(model, SENTENCES)
    with vp.prune(model, "fastv", keep=0.25, layer=2) as session:
        together = model.predict_actions(both)
        assert session.last is not None
        kept = session.last.kept_indices
        for row, one in enumerate(both):
            alone = model.predict_actions([one])
            assert torch.equal(session.last.kept_indices[0], kept[row])
            near(alone[0], together[row], rel=5e-5)  # other kernels for a single row


@FAMILIES
@BATCHES
def test_the_adapter_finds_visual_tokens_and_action_rows(family: str, sentences: list[str]) -> None:
    model = make(family)
    adapter, calls = find_adapter(model), []
    adapter.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    inputs = model.prepare(seen(model, sentences))
    model.infer(inputs)
    embeds = calls[0]["inputs_embeds"]
    layout = adapter.layout(embeds, calls[0])
    assert layout is not None
    visual = model.visual_embeds(inputs.pixel_values)
    for row in range(len(sentences)):
        positions = layout.visual[row % len(layout.visual)]
        assert torch.equal(embeds[row, positions], visual[row])
        if inputs.attention_mask is None:
            assert layout.valid_rows is None
        else:
            assert layout.valid_rows is not None
            pad = int((inputs.attention_mask[row] == 0).sum())
            assert (~layout.valid_rows[row].bool()).nonzero()[:, 0].tolist() == list(range(pad))
    assert layout.views == model.config.views
    if family == "openvla":
        assert layout.action_rows is None
        assert adapter.layout(calls[1]["input_ids"], calls[1]) is None
    else:
        assert layout.action_rows == (
            slice(-30, -2) if family == "oft-previous" else slice(-29, -1)
        )


@FAMILIES
@BATCHES
def test_the_adapter_finds_the_instruction(family: str, sentences: list[str]) -> None:
    model = make(family)
    adapter, calls = find_adapter(model), []
    adapter.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    inputs = model.prepare(seen(model, sentences))
    model.infer(inputs)
    embeds = calls[0]["inputs_embeds"]
    layout = adapter.layout(embeds, calls[0])
    assert layout is not None and layout.text_rows is not None
    table = model.language_model.get_input_embeddings()
    for row in range(len(sentences)):
        words = inputs.input_ids[row]
        if inputs.attention_mask is not None:
            words = words[inputs.attention_mask[row] == 1]
        rows = layout.text_rows[row % len(layout.text_rows)]
        found = embeds[row, rows[rows >= 0]]
        assert torch.equal(found, table(words[1:])), "all words behind BOS, nothing else"


def test_an_unpadded_layout_is_one_object() -> None:
    model = make("oft-previous")
    adapter = find_adapter(model)
    first, second = (adapter.layout(torch.zeros(batch, 70, 64), {}) for batch in (1, 3))
    assert first is second is not None


def test_text_alone_is_left_alone() -> None:
    model = make("openvla")
    ids = torch.randint(5, 20, (1, 40))
    expected = model.language_model(ids).logits
    with vp.prune(model, "fastv", keep=0.25, layer=2) as session:
        assert torch.equal(model.language_model(ids).logits, expected)
        assert session.last is None


@FAMILIES
@BATCHES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_several_cuts_equal_hiding(family: str, sentences: list[str], attention: str) -> None:
    """Ranked by what the words look at, with merging, from before the first layer on."""
    left = (7, 3)
    options: dict[str, Any] = dict(merging=True, score_layer=0)
    for at, kind, rows in (((0, 2), "logits", "text"), ((1, 2), "attention", "weighted")):
        method = Ladder(at=at, left=left, spec=(("rows", rows), ("kind", kind)), **options)
        runs = []
        for mode in ("drop", "mask"):
            model = make(family, attention, sharp=5)
            found = outputs(model)
            with vp.prune(model, method, mode=mode) as session:  # type: ignore[arg-type]
                model.predict_actions(seen(model, sentences))
                assert session.last is not None
                runs.append((found, session.last))
        (dropped, first), (hidden, second) = runs
        for one, other in zip(first.stages, second.stages, strict=True):
            assert torch.equal(one.kept_mask, other.kept_mask)
        assert [int(stage.kept_mask[0].sum()) for stage in first.stages] == list(left)
        for a, b in zip(dropped, hidden, strict=True):
            near(a, b)
