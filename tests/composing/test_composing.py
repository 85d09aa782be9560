"""What people put around a policy besides pruning: dropped tokens are still as hidden ones.

The rows of docs/composing.md. Packages that are not installed are skipped by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vla_pruner as vp

STEPS = 5


@pytest.fixture(scope="module")
def observations() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (2, 160, 160, 3), dtype=np.uint8) for _ in range(STEPS)]


def policy(dtype: torch.dtype = torch.float32) -> Any:
    return vp.models.load("mini-oft", dtype=dtype)


def episode(model: Any, observations: list[np.ndarray], *, mode: str = "drop") -> np.ndarray:
    """Actions [STEPS, 8, 7] of a pruned episode whose last steps keep 50 of 200 tokens."""
    with vp.prune(model, "vla-pruner", keep=0.25, mode=mode) as session:
        session.reset()
        actions = [
            model.predict_action(list(images), "pick up the milk", np.zeros(8))
            for images in observations
        ]
        assert int(session.last.kept_mask.sum()) == 50
    return np.stack(actions)


def difference(model: Any, observations: list[np.ndarray]) -> float:
    """Largest difference between dropping and hiding, over the size of the actions."""
    dropped, hidden = (episode(model, observations, mode=mode) for mode in ("drop", "mask"))
    assert np.abs(dropped).max() > 0.1
    return float(np.abs(dropped - hidden).max() / np.abs(dropped).max())


def lora(model: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, model.language_model)
    assert any("lora_A" in name for name, _ in model.named_parameters())


def int8_of_torchao(model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model.language_model, quantization.Int8WeightOnlyConfig())


def int8_of_quanto(model: Any) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quanto.quantize(model.language_model, weights=quanto.qint8)
    quanto.freeze(model.language_model)


@pytest.mark.parametrize("change", [lora, int8_of_torchao, int8_of_quanto])
def test_changed_weights(change: Callable[[Any], None], observations: list[np.ndarray]) -> None:
    model = policy()
    before = episode(model, observations)
    change(model)
    assert difference(model, observations) < 1e-4
    assert not np.array_equal(episode(model, observations), before)  # the change is in effect


def test_lora_that_comes_while_a_session_is_attached(observations: list[np.ndarray]) -> None:
    first, second = policy(), policy()
    lora(first)
    with vp.prune(second, "vla-pruner", keep=0.25) as session:
        lora(second)
        late = [
            second.predict_action(list(images), "pick up the milk", np.zeros(8))
            for images in observations
        ]
        assert session.last.visual_kept == 50
    np.testing.assert_allclose(np.stack(late), episode(first, observations), rtol=1e-4, atol=1e-4)


def test_dynamic_int8_depends_on_the_tokens_that_are_there(observations: list[np.ndarray]) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = policy()
    config = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(model.language_model, config)
    assert 0 < difference(model, observations) < 0.2  # not exact: ranges are those of all rows


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=["bf16", "fp16"]
)
def test_half_precision(dtype: torch.dtype, bound: float, observations: list[np.ndarray]) -> None:
    assert difference(policy(dtype), observations) < bound


def test_autocast(observations: list[np.ndarray]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(policy(), observations) < 0.05


def test_offloaded_weights(observations: list[np.ndarray]) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = policy()
    expected = episode(model, observations)
    accelerate.cpu_offload(model.language_model, execution_device="cpu")
    np.testing.assert_array_equal(episode(model, observations), expected)


@torch.enable_grad()
def test_gradients_reach_the_image() -> None:
    model = policy()
    found = {}
    for mode in ("drop", "mask"):
        torch.manual_seed(0)
        pixels = torch.randn(1, 12, 140, 140, requires_grad=True)
        with vp.prune(model, "fastv", keep=0.25, mode=mode):
            actions = model(torch.randint(5, 70, (1, 12)), pixels, torch.zeros(1, 8))
        (found[mode],) = torch.autograd.grad(actions.square().sum(), pixels)
    largest = found["drop"].abs().max()
    assert largest > 0
    assert (found["drop"] - found["mask"]).abs().max() < 1e-4 * largest


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_of_generate(cache: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    embeds = torch.randn(1, 40, 64)
    words = {}
    for mode in ("drop", "mask"):
        where = vp.models.Decoder("model.layers", visual=slice(1, 33))
        with vp.prune(model, "fastv", keep=0.25, layer=2, adapter=where, mode=mode) as session:
            given = {} if cache == "dynamic" else {"cache_implementation": cache}
            words[mode] = model.generate(
                inputs_embeds=embeds, max_new_tokens=8, do_sample=False, min_new_tokens=8, **given
            )
            assert int(session.last.kept_mask.sum()) == 8
    assert words["drop"].shape[1] == 8
    torch.testing.assert_close(words["drop"], words["mask"])
