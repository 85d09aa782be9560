"""The expert's feature cache: what is reused, when, and that nothing is left behind."""

import pytest
import torch
from tiny_pi0 import make, observation

import vla_pruner as vp
from checks import near
from vla_pruner.models.pi0 import feature_cache

KINDS = pytest.mark.parametrize("kind", ["pi0", "pi05"])


def slow_sample(model, inputs, every):
    """Euler steps whose layers add what they added in the last computed step."""
    prefix, x, steps = model.read_prefix(inputs), model.make_noise(2), model.config.flow_steps
    blocks = [b for layer in model.expert.layers for b in (layer.self_attn, layer.mlp)]
    kept = {}
    for step in range(steps):
        handles = []
        for block in blocks:
            if step % every == 0:

                def note(module, args, output):
                    kept[module] = output

                handles.append(block.register_forward_hook(note))
            else:
                handles.append(block.register_forward_hook(lambda m, a, o: kept[m]))
        time = torch.full((2,), 1 - step / steps)
        x = x - model.velocity(prefix, inputs.state, x, time) / steps
        for handle in handles:
            handle.remove()
    return x


@KINDS
@pytest.mark.parametrize("every", [1, 2, 3])
def test_reused_steps_add_what_was_added_before(kind, every):
    model = make(kind)
    inputs = model.prepare([observation(0), observation(1)])
    untouched = model.sample(inputs)
    with feature_cache(model, every=every):
        found, again = model.sample(inputs), model.sample(inputs)
    assert torch.equal(found, again)
    near(found, slow_sample(model, inputs, every))
    assert torch.equal(found, untouched) == (every == 1)
    assert torch.equal(model.sample(inputs), untouched), "something was left behind"


@KINDS
@pytest.mark.parametrize("cache_first", [True, False])
def test_with_pruning_dropped_still_equals_masked(kind, cache_first):
    model = make(kind)
    inputs = model.prepare([observation()])
    found = []
    for mode in ("drop", "mask"):
        cache, session = (
            feature_cache(model, every=2),
            lambda mode=mode: vp.prune(model, "vla-pruner", tokens=5, layer=2, window=1, mode=mode),
        )
        if cache_first:
            with cache, session():
                found.append([model.sample(inputs) for _ in range(3)])
        else:
            with session(), cache:
                found.append([model.sample(inputs) for _ in range(3)])
    for one, other in zip(*found, strict=True):
        near(one, other)


@KINDS
def test_efficientvla_brings_it_along(kind):
    model = make(kind)
    inputs = model.prepare([observation()])
    untouched = model.sample(inputs)
    with feature_cache(model, every=2):
        expected = model.sample(inputs)
    with vp.prune(model, "efficientvla", keep=1.0, flow_interval=2):
        found = model.sample(inputs)
    assert torch.equal(found, expected) and not torch.equal(found, untouched)
    assert torch.equal(model.sample(inputs), untouched), "something was left behind"


@pytest.mark.parametrize("every", [0, 2.0, True])
def test_other_intervals_are_refused(every):
    with (
        pytest.raises(ValueError, match="integer of at least 1"),
        feature_cache(make(), every=every),
    ):
        pass
