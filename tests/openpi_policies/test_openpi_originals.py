"""openpi's own PI0Pytorch, pruned unmodified, and the port against it: `make test-openpi`."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vla_pruner as vp
from checks import fingerprint, randomise
from vla_pruner.models.pi0 import Inputs, StackConfig, VisionConfig, from_pretrained

if find_spec("openpi") is None or find_spec("openpi.models_pytorch") is None:
    pytest.skip("needs a checkout of openpi; see `make test-openpi`", allow_module_level=True)

from openpi.models_pytorch import gemma_pytorch, pi0_pytorch

CHUNK, DIM, WORDS, STEPS, M = 6, 32, 12, 4, 16
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
STACK = StackConfig(width=64, mlp=128, depth=4, heads=8, kv_heads=1, head_dim=16)
VISION = VisionConfig(width=48, depth=2, heads=4, mlp=4304, patch=56)


@pytest.fixture(scope="module")
def revision():
    """The commit of the checkout, or what it calls itself."""
    folder = Path(pi0_pytorch.__file__).parents[3]
    found = subprocess.run(
        ["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return found.stdout.strip() or "without git"


@pytest.fixture(scope="module")
def policies():
    """openpi's smallest stacks around a smaller vision tower, for which it has no setting."""
    made, mapping = {}, gemma_pytorch.CONFIG_MAPPING

    def paligemma():
        config = mapping["paligemma"]()
        vision = config.vision_config
        vision.hidden_size, vision.num_hidden_layers = VISION.width, VISION.depth
        vision.num_attention_heads, vision.patch_size = VISION.heads, VISION.patch
        return config

    class Small(dict):
        def __getitem__(self, name):
            return paligemma if name == "paligemma" else mapping[name]

    def get(kind):
        if kind not in made:
            config = SimpleNamespace(
                pi05=kind == "pi05",
                paligemma_variant="dummy",
                action_expert_variant="dummy",
                action_horizon=CHUNK,
                action_dim=DIM,
                dtype="float32",
                pytorch_compile_mode=None,
            )
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                patch.setattr(gemma_pytorch, "CONFIG_MAPPING", Small())
                model = pi0_pytorch.PI0Pytorch(config)
                projector = model.paligemma_with_expert.paligemma.model.multi_modal_projector
                projector.linear = nn.Linear(VISION.width, STACK.width)
                made[kind] = randomise(model)
        return made[kind]

    return get


def observation(seed):
    """Three cameras; the second row has one less, and a shorter instruction."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(2, 3, 224, 224, generator=generator) * 2 - 1 for _ in CAMERAS]
    masks = [torch.ones(2, dtype=torch.bool) for _ in CAMERAS]
    masks[-1][1] = False
    return SimpleNamespace(
        images=dict(zip(CAMERAS, images, strict=True)),
        image_masks=dict(zip(CAMERAS, masks, strict=True)),
        tokenized_prompt=torch.randint(1, 90, (2, WORDS), generator=generator),
        tokenized_prompt_mask=torch.arange(WORDS) < torch.tensor([[WORDS], [8]]),
        state=torch.randn(2, DIM, generator=generator),
        token_ar_mask=None,
        token_loss_mask=None,
    )


def act(policy, seed):
    noise = torch.randn(2, CHUNK, DIM, generator=torch.Generator().manual_seed(5))
    return policy.sample_actions("cpu", observation(seed), noise=noise, num_steps=STEPS)


KINDS = pytest.mark.parametrize("kind", ["pi0", "pi05"])


@KINDS
def test_openpi_with_tokens_removed(policies, kind, proves, revision):
    policy = policies(kind)
    act(policy, 0)
    before, found, reports = fingerprint(policy), {}, {}
    for mode in ("drop", "mask"):
        with vp.prune(policy, keep=0.25, layer=2, window=1, mode=mode) as session:
            found[mode] = torch.stack([act(policy, seed) for seed in (1, 2)])
        reports[mode] = session.last
    dropped, masked = reports["drop"], reports["mask"]
    assert dropped.views == (M, M, M) and dropped.visual_kept == 3 * M // 4
    assert dropped.tokens_full == 3 * M + WORDS
    assert torch.equal(dropped.kept_mask, masked.kept_mask)
    assert not dropped.kept_mask[1, 2 * M :].any()
    assert float(dropped.action.sum()) > 0
    torch.testing.assert_close(found["drop"], found["mask"], rtol=0, atol=1e-5)
    full = torch.stack([act(policy, seed) for seed in (1, 2)])
    assert torch.equal(full[0], found["drop"][0])  # the warm-up step
    assert (full[1] - found["drop"][1]).abs().max() > 1e-4
    assert fingerprint(policy) == before
    checks = ("reference", "undo", "batch", "padding", "cameras", "missing", "dynamic")
    proves("pi0-policies", type(policy), *checks, openpi=revision)


@KINDS
def test_keeping_everything_changes_nothing(policies, kind, proves, revision):
    policy = policies(kind)
    expected = act(policy, 1)
    with vp.prune(policy, keep=1.0, window=1):
        found = [act(policy, 1) for _ in range(2)]
    assert all(torch.equal(one, expected) for one in found)
    proves("pi0-policies", type(policy), "keep=1.0", openpi=revision)


@KINDS
def test_the_port_equals_it(policies, kind, tmp_path):
    """Read from its own tensors, by the names under which openpi publishes them."""
    policy = policies(kind)
    state = {name: value.contiguous() for name, value in policy.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    settings = {
        "action_horizon": CHUNK,
        "action_dim": DIM,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = from_pretrained(tmp_path, vision=VISION, prefix=STACK, expert=STACK, flow_steps=STEPS)
    assert model.config.kind == kind
    shown = observation(1)
    inputs = Inputs(
        images=torch.stack(list(shown.images.values()), dim=1),
        image_mask=torch.stack(list(shown.image_masks.values()), dim=1),
        tokens=shown.tokenized_prompt,
        token_mask=shown.tokenized_prompt_mask,
        state=shown.state,
    )
    noise = torch.randn(2, CHUNK, DIM, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(model.sample(inputs, noise), act(policy, 1), rtol=0, atol=1e-4)
