"""The pruned decoder compiles into whole graphs, which later steps use again."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import transformers
from torch._dynamo.utils import counters
from transformers import StaticCache

import vla_pruner as vp

WARM_UP, STEPS = 1, 3


def graphs():
    return counters["stats"].get("unique_graphs", 0)


@pytest.mark.parametrize(("attention", "cached"), [("eager", False), ("sdpa", True)])
def test_whole_graphs_that_are_used_again(make, embeds, attention, cached):
    if cached and transformers.__version__ < "5":
        pytest.skip("with a static cache, transformers 4 reads lengths back while it is traced")
    torch._dynamo.reset()
    counters.clear()
    model, runs = make("llama", attention, num_hidden_layers=3), []
    action_rows = "decode" if cached else slice(-6, None)
    adapter = vp.models.Decoder(visual=slice(1, 21), action_rows=action_rows)
    for compiled in (False, True):
        logits, made = [], []
        with vp.prune(model, keep=6, layer=1, window=WARM_UP, adapter=adapter) as session:
            if compiled:
                session.compile(backend="eager")
            for step in range(STEPS):
                cache = StaticCache(config=model.config, max_cache_len=40) if cached else None
                output = model(inputs_embeds=embeds(step), past_key_values=cache, use_cache=cached)
                logits.append(output.logits[:, -1])
                for token in (5, 6) if cached else ():
                    output = model(input_ids=torch.tensor([[token]]), past_key_values=cache)
                    logits.append(output.logits[:, -1])
                made.append(graphs())
            assert session.last.kept_mask.sum() == 6
        runs.append(torch.cat(logits))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-5)
    assert not counters["graph_break"]
    kinds = 2 if cached else 1  # prefill and decode, or one forward
    assert made == [kinds] + [2 * kinds] * (STEPS - 1), "one set while warming up, one afterwards"
    assert "forward" not in vars(model.model)
