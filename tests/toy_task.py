"""A scene without a simulator, and a tiny policy with random weights that acts in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Episode, run_episode
from vla_pruner.episodes.observations import record_observations
from vla_pruner.episodes.policy_runner import LocalPolicyRunner
from vla_pruner.episodes.recording import Recorder
from vla_pruner.models.openvla import OpenVLAOFT, OpenVLAOFTConfig, TowerConfig, save_pretrained
from vla_pruner.scenes.scene import Suite

CAMERAS = ("front", "hand")
OBJECTS = ("cup", "plate")
STEP_LIMIT = 12
VISUAL = 32


class ToyScene:
    """Solved after 7 steps by seeds that 3 does not divide; its images follow the actions."""

    def __init__(self) -> None:
        self.resets: list[tuple[int, int]] = []
        self.actions: list[np.ndarray] = []
        self.closed = False

    def reset(self, seed: int, target: int) -> dict[str, Any]:
        self.resets.append((seed, target))
        self.seed, self.actions = seed, []
        return {"instruction": f"pick up the {OBJECTS[target]}"}

    def observe(self, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
        moved = float(np.sum(self.actions)) if self.actions else 0.0
        images = {}
        for number, camera in enumerate(cameras):
            rng = np.random.default_rng([self.seed, number])
            noise = rng.integers(0, 200, (40, 40, 3))
            images[camera] = ((noise + 10 * moved) % 256).astype(np.uint8)
        return images

    def proprio(self) -> np.ndarray:
        return np.full(8, 0.01 * len(self.actions), dtype=np.float32)

    def step(self, action: np.ndarray) -> None:
        assert action.shape == (7,)
        self.actions.append(action)

    def success(self) -> bool:
        return self.seed % 3 != 0 and len(self.actions) >= 7

    def close(self) -> None:
        self.closed = True


def toy_task(scene: ToyScene | None = None) -> Suite:
    return Suite(
        name="toy_task:toy_task",
        open_scene=ToyScene if scene is None else lambda: scene,
        cameras=CAMERAS,
        seeds=range(100, 110),
        tasks=OBJECTS,
        step_limit=STEP_LIMIT,
        hz=5,
    )


def rollout(
    policy: Any,
    scene: Any,
    seed: int,
    target: int,
    *,
    session: Any = None,
    record: bool = False,
    **options: Any,
) -> Episode:
    """An episode of a policy of this process, perhaps recorded."""
    recorder = Recorder() if record else None
    subscribers = [recorder] if recorder else []
    runner = LocalPolicyRunner(policy, session)
    episode = run_episode(runner, scene, seed, target, subscribers=subscribers, **options)
    if recorder is not None:
        episode.recording = recorder.finish()
    return episode


def tiny_policy(**changes: Any) -> OpenVLAOFT:
    """OpenVLA-OFT with 2 x 16 visual tokens, 4 layers, chunks of 4 actions."""
    torch.manual_seed(0)
    tower = TowerConfig(width=32, depth=2, heads=2, mlp=32, patch=8, image_size=32)
    text = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "pad_token_id": 3,
    }
    bounds = {"q01": [-1.0] * 8, "q99": [1.0] * 8, "mask": [True] * 8}
    statistics = {
        "toy": {"action": {key: value[:7] for key, value in bounds.items()}, "proprio": bounds}
    }
    settings: dict[str, Any] = {
        "towers": (tower, tower),
        "text": text,
        "empty_token_id": 4,
        "pad_token_id": 3,
        "chunk": 4,
        "head_blocks": 1,
        "norm_stats": statistics,
    }
    policy = OpenVLAOFT.build(OpenVLAOFTConfig(**{**settings, **changes}))
    words = ["<unk>", "<s>", "</s>", "<pad>", "<empty>", "pick", "up", "the", *OBJECTS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    policy.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    return policy


def save_policy(folder: Path) -> str:
    """The tiny policy as a folder; returns its name."""
    save_pretrained(tiny_policy(), folder)
    return str(folder)


def record_toys(
    folder: Path, seeds: list[int], scene: ToyScene | None = None, **options: Any
) -> list[ToyScene]:
    """Record what the tiny policy sees; returns the scenes that were opened."""
    policy = tiny_policy()
    task = toy_task()
    control = Control(cameras=task.cameras, execute=2, reads_state=True)
    opened = []

    def open_scene():
        opened.append(scene or ToyScene())
        return opened[-1]

    record_observations(policy, open_scene, folder, seeds, suite=task, control=control, **options)
    return opened
