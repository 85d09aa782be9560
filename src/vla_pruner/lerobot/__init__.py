"""A plug-in of lerobot: the policy type "pruned", any checkpoint with a pruning method attached.

    lerobot-eval --policy.type=pruned \\
        --policy.pretrained_path=lerobot/smolvla_base --policy.keep=0.25 ...

lerobot finds the type through the distribution `lerobot_policy_pruned`, or with
`--policy.discover_packages_path=vla_pruner.lerobot`. See docs/lerobot.md.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from torch import nn

from vla_pruner._short import short
from vla_pruner.methods import Method, build
from vla_pruner.models.prune import prune

__all__ = ["PrunedConfig", "PrunedPolicy"]

_SHOWN = ("input_features", "output_features", "n_obs_steps")
"""What a robot, a scene or a dataset is compared with: those of the policy that is pruned."""


def _written(value: Any) -> str:
    """A value as lerobot's command line reads it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


@PreTrainedConfig.register_subclass("pruned")
@dataclass
class PrunedConfig(PreTrainedConfig):
    """Options `--policy.NAME=...` of the policy type "pruned"; `pretrained_path` is required.

    Features, the order of actions (`action_feature_names`) and whatever else lerobot asks for are
    those of the policy that is pruned.

    Args:
        method: a name, see `vp.list_methods()`.
        keep: fraction of the visual tokens in (0, 1], or their number above 1.
        layer: layers that still see every token; None: the method's default.
        options: further options of the method, as in `{window: 1}`.
        overrides: options of the policy that is pruned, as in `{n_action_steps: 10}`.
    """

    method: str = "vla-pruner"
    keep: float | None = None
    layer: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the configuration of the policy that is pruned, where it is named already.

        Raises:
            ValueError: no such method or option, an impossible budget, or overrides of options
                that the policy does not have.
        """
        super().__post_init__()
        self.build()
        if self.pretrained_path is not None:
            self._take(self.read(self.pretrained_path, getattr(self, "pretrained_revision", None)))

    def read(self, name: str | Path, revision: str | None = None) -> PreTrainedConfig:
        """The configuration of a policy, with `device` and `overrides` of this one.

        Raises:
            ValueError: it is of the type "pruned" itself, or has none of the options to override.
        """

        def read(**options: Any) -> PreTrainedConfig:
            said = [f"--{option}={_written(value)}" for option, value in options.items()]
            found: PreTrainedConfig = PreTrainedConfig.from_pretrained(
                name, revision=revision, cli_overrides=said
            )
            return found

        found = read(device=self.device)
        if isinstance(found, PrunedConfig):
            raise ValueError(
                f'{short(str(name))} is a configuration of the type "pruned"; name the policy that '
                "it prunes"
            )
        if self.overrides:
            known = [each.name for each in fields(found)]
            if unknown := [option for option in self.overrides if option not in known]:
                raise ValueError(
                    f"overrides: {found.type} has no option {short(unknown[0])}; it has "
                    f"{', '.join(known)}"
                )
            found = read(**{"device": self.device, **self.overrides})
        found.pretrained_path = Path(name)
        return found

    def build(self) -> Method:
        """The method, as the options say. Errors: ValueError, see `vp.methods.build`."""
        keep = self.keep
        if keep == 1:
            keep = 1.0  # all of them, also where it was not read from a command line
        elif isinstance(keep, float) and keep > 1 and keep.is_integer():
            keep = int(keep)
        return build(self.method, keep=keep, layer=self.layer, **self.options)

    def _take(self, inner: PreTrainedConfig) -> None:
        self.__dict__["_inner"] = inner
        for name in _SHOWN:
            setattr(self, name, copy.deepcopy(getattr(inner, name)))
        self.use_amp: bool = bool(self.use_amp or inner.use_amp)
        if hasattr(inner, "use_peft"):  # lerobot 0.4 has none
            self.use_peft: bool = bool(self.use_peft or inner.use_peft)

    def inner(self, name: str | Path, revision: str | None = None) -> PreTrainedConfig:
        """What the policy that is pruned is made from, with what lerobot has set here since."""
        if self.__dict__.get("_inner") is None:
            self._take(self.read(name, revision))
        found: PreTrainedConfig = copy.deepcopy(self.__dict__["_inner"])
        own = {each.name for each in fields(self)} | {"_inner"}
        for option, value in vars(self).items():
            if option not in own and hasattr(found, option):
                setattr(found, option, value)
        found.device = self.device
        for option in ("input_features", "output_features"):  # lerobot fills in those of a scene
            if not getattr(found, option):
                setattr(found, option, getattr(self, option))
        return found

    def __getattr__(self, name: str) -> Any:
        """What this type does not have, the policy that is pruned may."""
        inner = self.__dict__.get("_inner")
        if inner is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(inner, name)

    @property
    def observation_delta_indices(self) -> Any:
        """Of the policy that is pruned."""
        return self._of("observation_delta_indices")

    @property
    def action_delta_indices(self) -> Any:
        """Of the policy that is pruned."""
        return self._of("action_delta_indices")

    @property
    def reward_delta_indices(self) -> Any:
        """Of the policy that is pruned."""
        return self._of("reward_delta_indices")

    def _of(self, name: str) -> Any:
        return getattr(self.__dict__.get("_inner"), name, None)

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
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PrunedConfig | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Load a policy as lerobot does and prune it for good; its `reset` begins an episode.

        Args:
            pretrained_name_or_path: folder or hub id of the policy.
            config: how to prune it; None: with the defaults.
            kwargs: passed on to the policy's own `from_pretrained`.

        Raises:
            ValueError, TypeError, NotImplementedError: see `vp.prune`.
        """
        if config is None:
            config = PrunedConfig()
        config.build()  # Raises before anything is loaded: options may have been set since.
        inner = config.inner(pretrained_name_or_path, kwargs.get("revision"))
        policy: nn.Module = get_policy_class(inner.type).from_pretrained(
            pretrained_name_or_path, config=inner, **kwargs
        )
        prune(policy.eval(), config.build())
        return policy
