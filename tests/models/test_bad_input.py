"""What happens when a policy is called in ways that pruning could trip over."""

from __future__ import annotations

import pytest
import torch

import vla_pruner as vp

M, KEEP = 20, 6


def attach(model, **options):
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 1 + M))
    return vp.prune(
        model, **{"tokens": KEEP, "layer": 2, "window": 1, "adapter": adapter, **options}
    )


def show(model, image, words=9):
    """One call: an image of 20 tokens and an instruction of some words."""
    text = model.get_input_embeddings()(torch.arange(5, 5 + words))[None]
    return model(inputs_embeds=torch.cat([image[:, : 1 + M], text], dim=1)).logits


def test_an_instruction_that_changes_in_mid_episode_keeps_the_history(decoders, embeds):
    """What was looked at belongs to the episode, not to the words; the text may change length."""
    model, forecasts = decoders(), []
    for words in (9, 4):
        with attach(model) as session:
            show(model, embeds(1))
            seen = session.last.action[0]
            show(model, embeds(2), words)
            assert session.last.steps == (1,) and not session.last.warm_up.any()
            assert session.last.tokens_kept == 1 + KEEP + words
            forecasts.append(session.last.forecast[0])
            torch.testing.assert_close(forecasts[-1] / forecasts[-1].sum(), seen / seen.sum())
    assert torch.equal(*forecasts)


def test_a_second_episode_that_the_caller_names_starts_anew(decoders, embeds):
    model = decoders()
    with attach(model) as session:
        for name, first in (("a", True), ("a", False), ("b", True), ("a", False)):
            session.episodes([name])
            show(model, embeds(1))
            assert bool(session.last.warm_up.all()) == first
    with attach(model) as session:
        session.episodes(["b"])
        fresh = show(model, embeds(3)), show(model, embeds(4))
    with attach(model) as session:
        session.episodes(["a"])
        show(model, embeds(1)), show(model, embeds(2))
        session.episodes(["b"])
        later = show(model, embeds(3)), show(model, embeds(4))
    assert all(torch.equal(a, b) for a, b in zip(fresh, later, strict=True))


def test_a_second_episode_without_reset_goes_on_with_the_history(decoders, embeds):
    """Nothing in the images says that an episode is over: the caller has to."""
    model = decoders()
    with attach(model) as session:
        show(model, embeds(1))
        show(model, embeds(9))
        assert session.last.steps == (1,) and not session.last.warm_up.any()


def test_fewer_visual_tokens_than_the_budget(decoders, embeds):
    model = decoders()
    with attach(model, tokens=M + 1), pytest.raises(ValueError, match=rf"{M + 1} tokens.*{M}"):
        show(model, embeds(1))


def test_a_call_without_an_image_is_left_alone(decoders):
    model = decoders()
    ids = torch.tensor([[1, 7, 8]])
    expected = model(input_ids=ids).logits
    adapter = Imageless(visual=slice(1, 1 + M))
    with attach(model, adapter=adapter) as session:
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert session.last is None


class Imageless(vp.models.Decoder):
    """A policy whose calls show no image."""

    def layout(self, inputs, kwargs):
        return None


def test_flow_steps_are_left_out_of_action_experts_alone(decoders, embeds):
    """Refused where there is none, and the model stays free for another session."""
    model = decoders()
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 1 + M))
    with pytest.raises(ValueError, match="action expert"):
        vp.prune(model, "efficientvla", tokens=KEEP, adapter=adapter, flow_interval=2)
    with attach(model):
        show(model, embeds(1))


def test_a_transformers_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.53.2")
    policy = vp.models.load("mini-oft")
    with pytest.raises(NotImplementedError, match=r"transformers 4\.53\.2 .* 4\.57 or newer"):
        vp.prune(policy, "fastv")
    monkeypatch.setattr(transformers, "__version__", "5.0.0.dev0")
    vp.prune(policy, "fastv").remove()
