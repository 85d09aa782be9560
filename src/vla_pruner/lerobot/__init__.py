"""A plug-in of lerobot: the policy type "pruned", any checkpoint with a pruning method attached.

    lerobot-eval --policy.discover_packages_path=vla_pruner.lerobot \\
        --policy.type=pruned --policy.pretrained_path=lerobot/smolvla_base --policy.keep=0.25 ...

lerobot imports this package because of the first option, and finds `PrunedPolicy` beside the
configuration. See docs/lerobot.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from torch import nn

from vla_pruner.methods import build
from vla_pruner.models.prune import prune

__all__ = ["PrunedConfig", "PrunedPolicy"]


@PreTrainedConfig.register_subclass("pruned")
@dataclass
class PrunedConfig(PreTrainedConfig):
    """Options `--policy.NAME=...` of the policy type "pruned"; `pretrained_path` is required.

    Args:
        method: a name, see `vp.list_methods()`.
        keep: fraction of the visual tokens in (0, 1], or their number above 1.
        layer: layers that still see every token; None: the method's default.
        overrides: options of the policy that is pruned, as in `{n_action_steps: 10}`.
    """

    method: str = "vla-pruner"
    keep: float | None = None
    layer: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    observation_delta_indices: None = field(default=None, init=False, repr=False)
    action_delta_indices: None = field(default=None, init=False, repr=False)
    reward_delta_indices: None = field(default=None, init=False, repr=False)

    def get_optimizer_preset(self) -> NoReturn:
        """Refuse: this type is for inference."""
        raise NotImplementedError('policy type "pruned" cannot be trained; train the policy itself')

    def get_scheduler_preset(self) -> None:
        """Nothing is trained."""

    def validate_features(self) -> None:
        """The policy that is pruned has its own features, and checks them."""


class PrunedPolicy:
    """What lerobot asks for a policy of the type "pruned"; it gets the class of the pruned one."""

    config_class = PrunedConfig
    name = "pruned"

    def __init__(self, config: PrunedConfig, **_: Any) -> None:
        """Refuse to start from random weights.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            'policy type "pruned" prunes a policy that exists; name it with '
            "--policy.pretrained_path=FOLDER_OR_HUB_ID."
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PrunedConfig, **kwargs: Any
    ) -> nn.Module:
        """Load a policy as lerobot does and prune it for good; its `reset` begins an episode.

        Args:
            pretrained_name_or_path: folder or hub id of the policy.
            config: how to prune it.
            kwargs: passed on to the policy's own `from_pretrained`.

        Raises:
            ValueError, TypeError, NotImplementedError: see `vp.prune`.
        """
        options = {"device": config.device, **config.overrides}
        inner = PreTrainedConfig.from_pretrained(
            pretrained_name_or_path,
            revision=kwargs.get("revision"),
            cli_overrides=[f"--{name}={value}" for name, value in options.items()],
        )
        inner.pretrained_path = Path(pretrained_name_or_path)
        policy: nn.Module = get_policy_class(inner.type).from_pretrained(
            pretrained_name_or_path, config=inner, **kwargs
        )
        keep = config.keep
        if keep is not None and keep > 1 and keep == int(keep):
            keep = int(keep)
        prune(policy.eval(), build(config.method, keep=keep, layer=config.layer))
        return policy
