"""The attention probe shows queries and keys and changes nothing else."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from vla_pruner.core import hooks, scores


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_same_kernel_and_same_numbers(decoders, embeds, family, attention):
    model, seen = decoders(family, attention), []
    module, before = model.model.layers[1].self_attn, model(inputs_embeds=embeds()).logits
    shared = module.config
    with ExitStack() as undo:
        scores.watch(module, lambda _, query, key, mask, kwargs: seen.append((query, key)), undo)
        assert module.config is not shared and shared._attn_implementation == attention
        assert hooks.implementation(module) == attention
        probed = model(inputs_embeds=embeds()).logits
    assert torch.equal(before, probed)
    (query, key) = seen[0]
    assert len(seen) == 1 and query.shape == (1, 4, 30, 8) and key.shape == (1, 2, 30, 8)
    assert module.config is shared and "_vla_pruner_observer" not in vars(module)
    model(inputs_embeds=embeds())
    assert len(seen) == 1


def test_other_layers_are_not_touched(decoders, embeds):
    model, seen = decoders(), []
    with ExitStack() as undo:
        scores.watch(model.model.layers[1].self_attn, lambda *_: seen.append(1), undo)
        assert model.model.layers[0].self_attn.config is model.config
        assert model.config._attn_implementation == "sdpa"


def test_unnamed_attention():
    with pytest.raises(TypeError, match="scores cannot be read there"):
        hooks.implementation(nn.Linear(2, 2))


def test_flex_attention_is_refused(make):
    module = make().model.layers[0].self_attn
    module.config._attn_implementation = "flex_attention"
    with ExitStack() as undo, pytest.raises(NotImplementedError, match="sdpa"):
        scores.watch(module, lambda *_: None, undo)


def test_eager_attention_without_a_function():
    class Homeless(nn.Module):
        class config:
            _attn_implementation = "eager"

    with ExitStack() as undo, pytest.raises(NotImplementedError, match="eager_attention_forward"):
        scores.watch(Homeless(), lambda *_: None, undo)
