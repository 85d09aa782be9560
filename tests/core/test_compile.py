"""The pruned decoder compiles into whole graphs, which later steps use again."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import transformers
from test_contract import at, gemma3, talk
from torch._dynamo.utils import counters
from transformers import StaticCache

import vla_pruner as vp
from checks import near
from ladder import Ladder

WARM_UP, STEPS = 1, 3


def graphs():
    return counters["stats"].get("unique_graphs", 0)


@pytest.mark.parametrize(("attention", "cached"), [("eager", False), ("sdpa", True)])
def test_whole_graphs_that_are_used_again(make, embeds, attention, cached, proves):
    if cached and transformers.__version__ < "5":
        pytest.skip("with a static cache, transformers 4 reads lengths back while it is traced")
    torch._dynamo.reset()
    counters.clear()
    model, runs = make("llama", attention, num_hidden_layers=3), []
    action_rows = "decode" if cached else slice(-6, None)
    adapter = vp.models.Decoder(visual=slice(1, 21), action_rows=action_rows)
    for compiled in (False, True):
        logits, made = [], []
        with vp.prune(model, tokens=6, layer=1, window=WARM_UP, adapter=adapter) as session:
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
    near(*runs)
    assert not counters["graph_break"]
    kinds = 2 if cached else 1  # prefill and decode, or one forward
    assert made == [kinds] + [2 * kinds] * (STEPS - 1), "one set while warming up, one afterwards"
    assert "forward" not in vars(model.model)
    proves("decoder", type(model), "compile", "static" if cached else "no cache")


@pytest.mark.slow
@pytest.mark.parametrize("at", [(1, 2), (0, 2)])
def test_everything_at_once_in_one_graph(make, embeds, at):
    """Several cuts, merging, renumbering, a skipped layer, weighted voters, a static cache."""
    if transformers.__version__ < "5":
        pytest.skip("with a static cache, transformers 4 reads lengths back while it is traced")
    torch._dynamo.reset()
    counters.clear()
    model, runs = make("llama", "sdpa", num_hidden_layers=4), []
    method = Ladder(
        at=at,
        left=(9, 4),
        skip=(3,),
        merging=True,
        places="compact",
        score_layer=0,
        spec=(("rows", "weighted"), ("kind", "logits" if at[0] == 0 else "attention")),
        watch=(2,),
        first_full=WARM_UP,
    )
    adapter = vp.models.Decoder(visual=slice(1, 21))
    for compiled in (False, True):
        logits, made = [], []
        with vp.prune(model, method, adapter=adapter) as session:
            if compiled:
                session.compile(backend="eager")
            for step in range(STEPS):
                cache = StaticCache(config=model.config, max_cache_len=40)
                output = model(inputs_embeds=embeds(step), past_key_values=cache, use_cache=True)
                logits.append(output.logits[:, -1])
                for token in (5, 6):
                    output = model(input_ids=torch.tensor([[token]]), past_key_values=cache)
                    logits.append(output.logits[:, -1])
                made.append(graphs())
            logits.append(session.last.action)
            assert session.last.tokens_per_layer[-2:] == (14, 0)
        runs.append(logits)
    for one, other in zip(*runs, strict=True):
        near(one, other)
    assert not counters["graph_break"]
    assert made == [2] + [4] * (STEPS - 1), "prefill and decode, on all tokens and pruned"


@pytest.mark.slow
def test_kinds_of_layers_with_tables_of_their_own():
    torch._dynamo.reset()
    model = gemma3(["sliding_attention", "full_attention"] * 2, window=64).eval()
    with vp.prune(model, "fastv", tokens=6, layer=1, adapter=at()) as session:
        plain = talk(model)
        session.compile(backend="eager")
        near(talk(model), plain)


def test_a_budget_that_depends_on_what_is_seen_is_refused(make):
    class Adaptive(Ladder):
        adaptive = True

    adapter = vp.models.Decoder(visual=slice(1, 21))
    with (
        vp.prune(make(), Adaptive(), adapter=adapter) as session,
        pytest.raises(NotImplementedError, match="fixed budget"),
    ):
        session.compile()
