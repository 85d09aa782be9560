"""Found by lerobot through its name; registers the policy type "pruned"."""

from vla_pruner.lerobot import PrunedConfig, PrunedPolicy

__all__ = ["PrunedConfig", "PrunedPolicy"]
