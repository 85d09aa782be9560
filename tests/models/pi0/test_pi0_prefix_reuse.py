"""Prefix reuse: who reads a prefix, what the others compute, and nothing left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_pi0 import make, observation
from transformers import LlamaConfig, LlamaForCausalLM

import vla_pruner as vp
from checks import near
from vla_pruner.models.pi0 import prefix_reuse

KINDS = pytest.mark.parametrize("kind", ["pi0", "pi05"])


def seen(step: int, brighter: int = 0, instruction: str | None = None) -> dict:
    """The same scene at each step, in another state; one camera may be brighter."""
    found = observation(0)
    found["images"][1] = (found["images"][1] // 2 + brighter).astype(np.uint8)
    found["proprio"] = observation(step)["proprio"]
    return found | ({} if instruction is None else {"instruction": instruction})


def slowly(model, then: dict, now: dict) -> torch.Tensor:
    """The flow steps of one call on the prefix of another, in a model without any gate."""
    there, here = model.prepare([then]), model.prepare([now])
    prefix, x, steps = model.read_prefix(there), model.make_noise(1), model.config.flow_steps
    for step in range(steps):
        time = torch.full((1,), 1 - step / steps)
        x = x - model.velocity(prefix, here.state, x, time) / steps
    return x


@KINDS
def test_a_reused_call_is_the_expert_on_the_prefix_of_then(kind):
    model, plain, ages = make(kind), make(kind), []
    with prefix_reuse(model, calls=3) as gate:
        for step in range(5):
            found = model.sample(model.prepare([seen(step)]))
            near(found, slowly(plain, seen(3 * (step // 3)), seen(step)))
            ages.append(gate.age)
    assert ages == [0, 1, 2, 0, 1]
    assert (gate.computed, gate.reused) == (2, 3)


def reads(model, gate, *observations: dict) -> list[bool]:
    """Which calls read their own prefix."""
    ages = []
    for one in observations:
        model.predict_actions([one] if isinstance(one, dict) else one)
        ages.append(gate.age == 0)
    return ages


@KINDS
def test_the_gate_opens_for_another_image_instruction_or_batch(kind):
    model = make(kind)
    with prefix_reuse(model, calls=100, threshold=4.0) as gate:
        assert reads(model, gate, seen(0), seen(1), seen(2, brighter=3)) == [True, False, False]
        assert gate.change == pytest.approx(3, abs=1e-3)
        # Changes are counted from the images that the prefix was read from.
        assert reads(model, gate, seen(2, brighter=6)) == [True]
        assert gate.change == pytest.approx(6, abs=1e-3)
        say = "put the cereal box in its bin"
        assert reads(model, gate, seen(3, 6, say), seen(4, 6, say)) == [True, False]
        assert gate.change == 0
        assert reads(model, gate, [seen(0), seen(1)], [seen(2), seen(3)]) == [True, False]
        gone = seen(0)
        gone["images"][0] = None
        assert reads(model, gate, seen(0), gone, gone) == [True, True, False]
        gate.reset()
        assert reads(model, gate, gone) == [True]
    with prefix_reuse(model, calls=3, threshold=float("inf")) as gate:
        assert reads(model, gate, seen(0), seen(0, 99)) == [True, False]


def test_one_row_that_changed_opens_the_gate_for_all():
    model = make()
    with prefix_reuse(model, calls=9) as gate:
        both = [[seen(0), seen(0)], [seen(0), seen(0, brighter=9)]]
        assert reads(model, gate, *both) == [True, True]


def test_tensors_that_are_filled_again_are_seen_to_change():
    model = make()
    inputs = model.prepare([seen(0)])
    with prefix_reuse(model, calls=9) as gate:
        model.sample(inputs)
        model.sample(inputs)
        assert gate.age == 1
        inputs.images.mul_(-1)
        model.sample(inputs)
        assert gate.age == 0
        inputs.tokens.add_(1)
        model.sample(inputs)
        assert gate.age == 0


@KINDS
def test_one_call_per_prefix_changes_nothing_and_nothing_is_left_behind(kind):
    model = make(kind)
    expected, own = model.predict_action(**seen(1)), dict(vars(model))
    with prefix_reuse(model, calls=1) as gate:
        for _ in range(2):
            assert np.array_equal(model.predict_action(**seen(1)), expected)
    assert (gate.computed, gate.reused) == (2, 0) and gate._held is None
    assert vars(model) == own


@KINDS
def test_with_a_session_the_pruned_prefix_is_reused(kind):
    model = make(kind)
    with vp.prune(model, "fastv", keep=0.5, layer=2) as session:
        whole = [model.predict_action(**seen(0)), model.predict_action(**seen(1))]
        with prefix_reuse(model) as gate:
            first, second = model.predict_action(**seen(0)), model.predict_action(**seen(1))
            assert (gate.computed, gate.reused) == (1, 1)
        assert session.last.visual_kept == 9
    assert np.array_equal(first, whole[0])
    if kind == "pi0":  # The images are the same, and the state is not in the prompt.
        near(second, whole[1])
    else:  # The state is the prompt's, and of then; the noise is the same.
        assert np.array_equal(second, first)
    assert np.abs(whole[1] - first).max() > 1e-4


def test_as_a_method_it_ends_with_the_episode():
    model = make()
    with vp.prune(model, "prefix-reuse", calls=3) as session:
        gate = session._cut.gate
        assert reads(model, gate, seen(0), seen(1)) == [True, False]
        session.reset()
        assert reads(model, gate, seen(2), seen(3)) == [True, False]
        with session.episode("another"):
            assert reads(model, gate, seen(4)) == [True]
        assert session.last.visual_kept == session.last.visual_full
    assert "read_prefix" not in vars(model)


@pytest.mark.parametrize(
    ("options", "message"), [({"calls": 0}, "calls=0"), ({"threshold": 0.0}, "threshold=0.0")]
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message), prefix_reuse(make(), **options):
        pass
    with pytest.raises(ValueError, match=message):
        vp.prune(make(), "prefix-reuse", **options)


def test_other_families_are_refused():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    where = vp.models.Decoder("model.layers", visual=slice(1, 9))
    with pytest.raises(ValueError, match="holds the prefix of a flow policy"):
        vp.prune(LlamaForCausalLM(config), "prefix-reuse", adapter=where)
