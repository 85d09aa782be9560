"""Layers that run more than once in a call, and caches that a decoder makes: exact or refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import transformers as T
from test_contract import SIZES, VISUAL, at, embeds
from torch import nn
from transformers import DynamicCache, StaticCache

import vla_pruner as vp
from checks import randomise
from hidden_columns import hidden_behind, same
from hidden_in_softmax import hidden_in_softmax

M = 24


def prune(model, method="random", layers="model.layers", **options):
    options = {"tokens": 6, "layer": 2, **options}
    if method == "vla-pruner":
        options["window"] = 1
    return vp.prune(model, method, adapter=at(layers), **options)


def gone(session):
    return [1 + (~row).nonzero()[:, 0] for row in session.last.kept_mask]


# ---------------------------------------------------------------------- stacks that run again
def hrm(high=2, low=2):
    config = T.HrmTextConfig(
        **{**SIZES, "num_hidden_layers": 4 * high * (low + 1)},
        head_dim=8,
        num_layers_per_stack=4,
        H_cycles=high,
        L_cycles=low,
    )
    return randomise(T.HrmTextForCausalLM(config))


@pytest.mark.parametrize("cache", ["none", "own", "dynamic", "static"])
@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("method", ["random", "fastv", "vla-pruner"])
@pytest.mark.parametrize("stack", ["H_module", "L_module"])
def test_a_stack_that_runs_again_on_what_it_gave(stack, method, mode, cache):
    model, call = hrm(), {"inputs_embeds": embeds(), "use_cache": cache != "none"}
    plain = model(**call).logits
    made = {"dynamic": DynamicCache, "static": lambda: StaticCache(model.config, 44)}.get(cache)
    with prune(model, method, f"model.{stack}.layers", mode=mode) as session:
        for inner in (False, True):  # Also where only what holds the stack is called.
            given = call if made is None else {**call, "past_key_values": made()}
            with pytest.raises(
                NotImplementedError,
                match=r"ran more than once over 36|first layer of this cache|reads all 36 rows",
            ):
                (model.model if inner else model)(**given)
        assert session.full_next(0) == (method == "vla-pruner")
    assert torch.equal(model(**call).logits, plain)


def test_a_stack_that_runs_once_behind_one_that_loops():
    """What runs before the decoder may do as it likes."""
    model, call = hrm(high=1, low=3), {"inputs_embeds": embeds(), "use_cache": False}
    with prune(model, "fastv", "model.H_module.layers") as session:
        got, columns = model(**call).logits[:, -1], gone(session)
    with hidden_in_softmax(model.model.H_module.layers, 2, columns):
        same(got, model(**call).logits[:, -1])


@pytest.mark.parametrize("method", ["random", "fastv", "vla-pruner"])
def test_layers_behind_the_decoder_that_read_its_prompt(method):
    """They would read zeros where rows were cut: refused at once, also while all tokens stay."""
    model, call = hrm(high=1, low=1), {"inputs_embeds": embeds(), "use_cache": False}
    plain = model(**call).logits
    with prune(model, method, "model.L_module.layers"):
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="reads all 36 rows of a prompt behind"):
                model(**call)
    with prune(model, "fastv", "model.L_module.layers", mode="mask"):
        assert model(**call).logits.shape == plain.shape
    with vp.prune(model, "none", adapter=at("model.L_module.layers")):
        assert torch.equal(model(**call).logits, plain)
    assert torch.equal(model(**call).logits, plain)


class Looped(nn.Module):
    """A decoder whose layers run in the order that it is told; `model.layers` are its layers."""

    def __init__(self, order, depth=4):
        super().__init__()
        self.model = T.LlamaModel(T.LlamaConfig(**{**SIZES, "num_hidden_layers": depth}))
        self.model.forward = self.run
        self.order = order
        randomise(self)

    def run(self, inputs_embeds):
        places = torch.arange(inputs_embeds.shape[1])[None]
        tables = self.model.rotary_emb(inputs_embeds, places)
        for index in self.order:
            inputs_embeds = self.model.layers[index](inputs_embeds, position_embeddings=tables)
        return inputs_embeds

    def forward(self, x):
        return self.model(inputs_embeds=x)


@pytest.mark.parametrize("method", ["random", "fastv", "vla-pruner"])
@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize(
    ("order", "layer"),
    [
        ((0, 1, 2, 3) * 2, 0),
        ((0, 0, 1, 2, 3), 0),
        ((0, 1, 0, 1, 2, 3), 0),
        ((0, 1, 2, 2, 3), 2),
        ((0, 1, 2, 3, 3), 3),
        ((0, 1, 3, 2), 2),
    ],
)
def test_layers_that_run_again_or_in_another_order(order, layer, method, mode):
    model = Looped(order)
    with prune(model, method, mode=mode):
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=f"layer {layer} of LlamaModel ran more"):
                model(embeds())
    model.order = (0, 1, 2, 3)
    with prune(model, method, mode=mode) as session:
        for _ in range(2):
            got = model(embeds())[:, -1]
        columns = gone(session)
    assert len(columns[0]) == M - 6
    with hidden_in_softmax(model.model.layers, 2, columns):
        same(got, model(embeds())[:, -1])


@pytest.mark.parametrize("method", ["random", "fastv", "divprune", "vla-cache"])
def test_layers_that_stand_in_the_list_twice(method):
    model = Looped((0, 1, 2, 3))
    model.model.layers[3] = model.model.layers[1]
    options = {"positions": "keep"} if method == "divprune" else {}
    options = {"layers": (2,)} if method == "vla-cache" else options
    with pytest.raises(NotImplementedError, match="layers 1, 3 are one module, which runs several"):
        if method == "vla-cache":
            vp.prune(model, method, keep=0.5, adapter=at(), **options)
        else:
            prune(model, method, **options)
    assert not model.model.layers[1]._forward_pre_hooks


@pytest.mark.parametrize(("method", "refused"), [("random", False), ("fastv", True)])
def test_an_attention_that_several_layers_share(method, refused):
    model = Looped((0, 1, 2, 3))
    model.model.layers[0].self_attn = model.model.layers[1].self_attn
    if refused:
        with pytest.raises(NotImplementedError, match="attentions of layers 0, 1 are one module"):
            prune(model, method)
        return
    with prune(model, method) as session:
        got, columns = model(embeds())[:, -1], gone(session)
    with hidden_in_softmax(model.model.layers, 2, columns):
        same(got, model(embeds())[:, -1])


class Again(nn.Module):
    """Feeds what a whole decoder gave into it again, or asks it about several prompts."""

    def __init__(self, feeds, cached=False):
        super().__init__()
        self.model, self.feeds = T.LlamaModel(T.LlamaConfig(**SIZES)), feeds
        self.cached = cached
        randomise(self)

    def forward(self, x):
        found = []
        for _ in range(2):
            x = self.model(inputs_embeds=x, use_cache=self.cached).last_hidden_state
            found.append(x[:, -1])
            x = FEEDS[self.feeds](x)
        return torch.stack(found)


FEEDS = {
    "output": lambda hidden: hidden,
    "output added": lambda hidden: embeds() + hidden,
    "output mixed": lambda hidden: (embeds() + hidden.flip(-1)) / 3,
    "image": lambda hidden: embeds() / 2,
    "words": lambda hidden: torch.cat([embeds()[:, : M + 1], embeds()[:, M + 1 :] / 2], dim=1),
    "time": lambda hidden: embeds() + torch.arange(embeds().shape[-1]) / 8,
}
LOOPS = ("output", "output added", "output mixed")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("feeds", FEEDS)
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_a_decoder_that_one_call_runs_again_over_as_many_rows(mode, feeds, cached):
    model = Again(feeds, cached)
    with prune(model, "fastv", mode=mode) as session:
        with pytest.raises(NotImplementedError, match=r"ran more than once over 36 rows in one ca"):
            model(embeds())
        # Somebody says that it is one step, whose first pass decides.
        if mode == "drop" and feeds in (*LOOPS, "image"):
            with session.step(), pytest.raises(ValueError, match=r"recurrent depth.*of its own"):
                model(embeds())
            return
        with session.step():
            got = model(embeds())
        columns = gone(session)
    with hidden_behind(model.model, 2, columns):
        same(got, model(embeds()))


@pytest.mark.parametrize("method", ["fastv", "vla-pruner"])
@pytest.mark.parametrize("feeds", LOOPS)
def test_a_loop_around_calls_of_one_step(method, feeds):
    """Also while all tokens stay; what was refused never was."""
    model = Again(feeds).model
    with prune(model, method, "layers") as session:
        for _ in range(2):
            with session.step(), pytest.raises(ValueError, match=r"LlamaModel ran over other vis"):
                x = model(inputs_embeds=embeds()).last_hidden_state
                model(inputs_embeds=FEEDS[feeds](x))
            model(inputs_embeds=embeds())


# ---------------------------------------------------------------------- caches that are made inside
class Named(NamedTuple):
    last: Any
    extra: Any


@dataclass
class Held:
    rest: Any


class Slots:
    """An output that shows nothing."""

    __slots__ = ("__weakref__", "state")

    def __init__(self, state):
        self.state = state


FORMS = {
    "tuple": lambda o: (o.last_hidden_state, o.past_key_values),
    "list": lambda o: [o.last_hidden_state, o.past_key_values],
    "dict": lambda o: {"state": o.last_hidden_state, "cache": o.past_key_values},
    "nested": lambda o: (o.last_hidden_state, ({"all": [o.past_key_values]},)),
    "named": lambda o: Named(o.last_hidden_state, o.past_key_values),
    "object": lambda o: Held((o.last_hidden_state, Held(o.past_key_values))),
    "nothing": lambda o: o.last_hidden_state,
    "slots": lambda o: Slots(o.last_hidden_state),
}


class Gives(nn.Module):
    """A decoder whose forward makes a cache and gives it in some form; `seen` is that cache."""

    def __init__(self, form):
        super().__init__()
        self.model = T.LlamaModel(T.LlamaConfig(**SIZES))
        randomise(self)
        inner = self.model.forward

        def forward(inputs_embeds, past_key_values=None):
            out = inner(
                inputs_embeds=inputs_embeds, past_key_values=past_key_values, use_cache=True
            )
            self.seen, self.state = out.past_key_values, out.last_hidden_state
            return FORMS[form](out)

        self.model.forward = forward

    def talk(self):
        rows = []
        for number in range(4):
            cache = self.seen if number else None
            x = embeds(length=1 if number else 36) / (1 + number)
            self.model(inputs_embeds=x, past_key_values=cache)
            rows.append(self.state[:, -1])
        return torch.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("method", ["random", "fastv", "vla-pruner"])
def test_a_cache_in_whatever_the_decoder_returns(form, mode, method):
    model, steps = Gives(form), 3 if method == "vla-pruner" else 1
    with prune(model, method, mode=mode) as session:
        full = session.full_next(0)
        if full and form in ("nothing", "slots"):
            with pytest.raises(RuntimeError, match="LlamaModel goes on from keys and values of a"):
                model.talk()
            return
        for _ in range(steps):
            got = model.talk()
        columns, action = gone(session), session.last.action
    assert len(columns[0]) == M - 6
    with hidden_behind(model.model, 2, columns):
        same(got, model.talk())
    if method == "vla-pruner":  # Decode steps were watched, as with a cache of the caller's.
        model.model.forward = type(model.model).forward.__get__(model.model)
        with prune(model, method, mode=mode) as session:
            for _ in range(steps):
                cache = DynamicCache()
                for number in range(4):
                    x = embeds(length=1 if number else 36) / (1 + number)
                    model.model(inputs_embeds=x, past_key_values=cache, use_cache=True)
        same(action, session.last.action)


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("inner", [False, True])
def test_tuples_instead_of_outputs_with_names(mode, inner):
    model = randomise(T.LlamaForCausalLM(T.LlamaConfig(**SIZES)))
    called, options = model.model if inner else model, {"use_cache": True, "return_dict": False}

    def talk():
        found, cache, states = called(inputs_embeds=embeds(), output_hidden_states=True, **options)
        later = called(input_ids=torch.tensor([[5]]), past_key_values=cache, **options)[0]
        return torch.cat([found[:, VISUAL.stop :], later], dim=1), states

    with prune(model, "fastv", mode=mode) as session:
        got, states = talk()
        columns = gone(session)
    with hidden_behind(model.model, 2, columns):
        expected, plain = talk()
    same(got, expected)
    assert len(states) == len(plain) == 5
    for mine, theirs in zip(states, plain, strict=True):
        same(mine[:, VISUAL.stop :], theirs[:, VISUAL.stop :])


class Keeps(nn.Module):
    """A decoder that keeps its cache to itself."""

    def __init__(self):
        super().__init__()
        self.model = T.LlamaModel(T.LlamaConfig(**SIZES))
        randomise(self)
        inner = self.model.forward

        def forward(inputs_embeds, position_ids):
            start = not int(position_ids[0, 0])
            self.cache = DynamicCache() if start else self.cache
            options = {"position_ids": position_ids, "past_key_values": self.cache}
            return inner(inputs_embeds=inputs_embeds, **options).last_hidden_state

        self.model.forward = forward


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("method", ["random", "vla-pruner"])
def test_a_decoder_that_keeps_its_cache_to_itself(mode, method):
    model, where = Keeps(), torch.arange(37)[None]
    with prune(model, method, mode=mode):
        for _ in range(2):
            model.model(inputs_embeds=embeds(), position_ids=where[:, :36])
        with pytest.raises(RuntimeError, match="showed where that prompt left them"):
            model.model(inputs_embeds=embeds(length=1), position_ids=where[:, 36:])


def test_keys_and_values_in_plain_tuples():
    model = randomise(T.LlamaForCausalLM(T.LlamaConfig(**SIZES)))
    keys = torch.zeros(1, 4, 36, 8)
    with prune(model), pytest.raises(NotImplementedError, match="`past_key_values` is a tuple tha"):
        model(input_ids=torch.tensor([[5]]), past_key_values=((keys, keys),) * 4)
