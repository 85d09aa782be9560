"""`lerobot-eval --policy.type=pruned`: lerobot's own command, a tiny policy, no glue."""

from __future__ import annotations

import json
import sys

import pytest
import torch

pytest.importorskip("lerobot.policies", reason="needs lerobot; run `make test-lerobot`")
pytest.importorskip("datasets", reason="lerobot's eval command needs lerobot[dataset]")

from lerobot.scripts import lerobot_eval
from tiny_env import STEPS

import vla_pruner.lerobot
from vla_pruner.lerobot import PrunedConfig, PrunedPolicy


@pytest.fixture
def sessions(monkeypatch):
    """What the plug-in attached."""
    made = []

    def noted(*args, original=vla_pruner.lerobot.prune, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(vla_pruner.lerobot, "prune", noted)
    return made


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    def run(*options):
        """Rewards of two episodes, from the command that a user types."""
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        command = [
            "lerobot-eval",
            *options,
            "--policy.device=cpu",
            "--env.type=tiny",
            "--eval.n_episodes=2",
            "--eval.batch_size=1",
            f"--output_dir={out}",
        ]
        monkeypatch.setattr(sys, "argv", command)
        with torch.enable_grad():
            lerobot_eval.main()
        found = json.loads((out / "eval_info.json").read_text())
        return found["per_task"][0]["metrics"]["sum_rewards"]

    return run


PLUGIN = ("--policy.discover_packages_path=vla_pruner.lerobot", "--policy.type=pruned")


def test_evaluates_a_pruned_policy(checkpoint, evaluate, sessions):
    whole = evaluate(f"--policy.path={checkpoint}")
    assert sessions == []
    same = evaluate(*PLUGIN, f"--policy.pretrained_path={checkpoint}", "--policy.keep=1.0")
    pruned = evaluate(
        *PLUGIN,
        f"--policy.pretrained_path={checkpoint}",
        "--policy.method=fastv",
        "--policy.keep=8",
        "--policy.layer=2",
        "--policy.overrides={n_action_steps: 2}",
    )
    assert same == whole and pruned != whole
    last = sessions[-1].last
    assert last.visual_kept == 8 and last.tokens_full - last.tokens_kept == 32 - 8
    assert last.steps == (STEPS // 2 - 1,)  # every second step makes a chunk; a reset per episode


def test_needs_a_checkpoint():
    with pytest.raises(ValueError, match="pretrained_path=FOLDER_OR_HUB_ID"):
        PrunedPolicy(config=PrunedConfig(device="cpu"))


def test_is_for_inference():
    with pytest.raises(NotImplementedError, match="cannot be trained"):
        PrunedConfig(device="cpu").get_optimizer_preset()
