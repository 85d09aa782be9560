"""`vla-pruner doctor`: passes healthy models, names the fault of sick ones."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from vla_pruner.cli import main
from vla_pruner.measure.doctor import _same_kernels, _spans, act_of, examine
from vla_pruner.models import Decoder, load
from vla_pruner.models.openvla import OpenVLA, OpenVLAOFT, oft

CHECKS = [
    "model family",
    "visual tokens are where expected",
    "the image reaches the action",
    "same attention kernel when pruned",
    "keep=1.0 changes nothing",
    "dropping equals hiding",
    "undone without a trace",
]


def load_policy(folder: Path) -> OpenVLA:
    policy = load(folder)
    assert isinstance(policy, OpenVLA)
    return policy


def faults(model: nn.Module, act, **options) -> dict[str, str]:
    """What is wrong, by name of the check."""
    return {f.check: f.found for f in examine(model, act, **options) if f.well is False}


@pytest.mark.parametrize("kind", ["oft_folder", "openvla_folder"])
def test_a_healthy_policy_passes_every_check(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(kind)
    policy = load_policy(folder)
    findings = examine(policy, act_of(policy, str(folder), "pick up the can"))
    assert [finding.check for finding in findings] == CHECKS
    assert all(finding.well for finding in findings), findings

    assert main(["doctor", str(folder)]) == 0
    assert "nothing wrong found" in capsys.readouterr().out


def test_an_unmodified_vlm_of_transformers_is_examined_with_its_own_processor(
    llava_folder: Path,
) -> None:
    model = load(llava_folder)
    findings = examine(model, act_of(model, str(llava_folder), "pick up the can"))
    assert [finding.check for finding in findings if finding.well] == CHECKS
    assert findings[1].found == "4 (4) at 1-4"


def test_an_image_that_attention_never_looks_at_is_found(
    oft_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = load_policy(oft_folder)
    visual = sum(policy.config.views)

    def blind(embeds: Tensor, valid: Tensor | None) -> Tensor:
        mask = embeds.new_zeros(len(embeds), 1, embeds.shape[1], embeds.shape[1])
        mask[..., 1 : 1 + visual] = torch.finfo(embeds.dtype).min
        return mask

    monkeypatch.setattr(oft, "bidirectional_mask", blind)
    assert main(["doctor", str(oft_folder)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "by 0 %" in shown
    assert re.search(r"1 of \d+ checks failed", shown)


def test_an_input_that_ignores_the_frame_is_found(openvla_folder: Path) -> None:
    policy = load_policy(openvla_folder)
    constant = policy.visual_embeds(torch.zeros(1, 6, 56, 56))
    policy.visual_embeds = lambda pixels: constant  # type: ignore[method-assign]
    act = act_of(policy, "", "pick up the can")
    assert faults(policy, act) == {
        "visual tokens are where expected": "black and white frames give the same input"
    }


def test_a_prompt_that_was_trimmed_to_one_token_is_found(openvla_folder: Path) -> None:
    policy = load_policy(openvla_folder)
    decoder = policy.language_model.model

    def act(frame: np.ndarray) -> None:
        decoder(inputs_embeds=torch.randn(1, 1, 32))

    found = faults(policy, act)
    assert found == {
        "visual tokens are where expected": "no pass of the decoder showed visual tokens"
    }


def test_visual_tokens_at_other_positions_are_found(oft_folder: Path) -> None:
    policy = load_policy(oft_folder)
    shifted = Decoder("language_model.model.layers", visual=slice(2, 34))
    found = faults(policy, act_of(policy, "", "pick up the can"), adapter=shifted)
    assert found == {
        "visual tokens are where expected": "expected 32 at 2-33; the image moves 1-32"
    }


def test_a_policy_that_cannot_act_says_why(oft_folder: Path) -> None:
    policy = load_policy(oft_folder)
    policy.tokenizer = None
    found = faults(policy, act_of(policy, "", "pick up the can"))
    assert "no tokenizer" in found["acts on a frame"]


def test_an_unknown_family_is_pointed_to_the_adapter() -> None:
    (finding,) = examine(nn.Linear(2, 2), lambda frame: None)
    assert finding.well is False
    assert "vp.models.Decoder" in finding.found


def test_a_model_that_cannot_be_pruned_is_found(oft_folder: Path) -> None:
    policy = load_policy(oft_folder)
    for layer in policy.language_model.model.layers:
        layer.self_attn.sliding_window = 8
    found = faults(policy, act_of(policy, "", "pick up the can"))
    assert "sliding window" in found["can be pruned"]


def test_a_model_with_randomness_is_not_called_exact(oft_folder: Path) -> None:
    policy = load_policy(oft_folder)
    assert isinstance(policy, OpenVLAOFT)
    for layer in policy.language_model.model.layers:
        layer.mlp.register_forward_hook(lambda *call: call[-1] * (1 + 0.1 * torch.rand(())))
    found = faults(policy, act_of(policy, "", "pick up the can"))
    assert {"keep=1.0 changes nothing", "undone without a trace"} <= set(found)


def test_a_kernel_that_changes_is_named_with_its_layers() -> None:
    finding = _same_kernels(["sdpa"] * 4, ["sdpa", "eager", "eager", "sdpa"])
    assert finding.well is False
    assert finding.found == "layers 1-2 change from sdpa to eager"


def test_a_missing_model_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "no-such-policy"]) == 2
    assert "owner/name" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_spans_are_short() -> None:
    assert _spans([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
    assert _spans(list(range(0, 20, 2))).endswith(", ...")


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llava")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    frames = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    transformers.LlavaProcessor(
        frames,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu", "cpu:x", "mps"])
def test_a_device_that_is_not_there_is_a_sentence(
    device: str, oft_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["doctor", str(oft_folder), "--device", device]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --device {device}: ") and "use " in said
