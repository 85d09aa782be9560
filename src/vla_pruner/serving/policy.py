"""A policy with a pruning method attached that acts for several episodes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from vla_pruner._short import short
from vla_pruner.episodes.condition import make_method
from vla_pruner.models.prune import prune


@dataclass(frozen=True, eq=False)
class EpisodeKey:
    """One episode of one client.

    Two keys are never the same episode, whatever their labels. The label (task and initial state)
    is all that a method sees which draws tokens at random: the same episode draws the same ones
    whenever, and next to whomever, it runs.
    """

    label: str


class ServedPolicy:
    """A policy whose batches hold rows of different episodes, each with its own history.

    Episodes come and go between calls. `act` is not for two threads at once; `start` and `end` may
    be called while it runs.
    """

    def __init__(
        self,
        policy: nn.Module,
        method: str = "vla-pruner",
        *,
        unnorm_key: str | None = None,
        center_crop: bool | None = None,
        **options: Any,
    ) -> None:
        """Attach the method until `close`.

        Args:
            policy: has `predict_actions(observations, unnorm_key=, center_crop=)`, as the ports in
                `vla_pruner.models` have.
            method, options: name of a method, or MODULE:CLASS, and its options, `keep` and `layer`
                among them.
            unnorm_key: dataset whose statistics scale the actions.
            center_crop: overrides the policy's configuration.

        Raises:
            ValueError: the policy cannot act on a batch of observations, the method needs what no
                client reports, or `prune` refuses.
        """
        if not callable(getattr(policy, "predict_actions", None)):
            raise ValueError(
                f"a {type(policy).__name__} has no `predict_actions(observations)`; only policies "
                "that give actions can be served"
            )
        chosen = make_method(method, **options)
        if "motion" in chosen.needs:
            raise ValueError(
                f"method {short(method)} decides by the robot's motion, which clients do not "
                "report; use another method, or an option that does without (vla-adp: gate=none)"
            )
        self.policy: Any = policy
        self.session = prune(policy, chosen)
        given = {"unnorm_key": unnorm_key, "center_crop": center_crop}
        self._options = {name: value for name, value in given.items() if value is not None}

    def start(self, label: str) -> EpisodeKey:
        """A new episode, with nothing remembered."""
        return EpisodeKey(label)

    def act(
        self, episodes: Sequence[EpisodeKey], observations: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Actions of one step in each of these episodes, from one pass of the policy.

        Args:
            episodes: one per row, each at most once.
            observations: one per row, as `predict_actions` takes them.

        Returns:
            float32 `[B, dim]` or `[B, chunk, dim]`, in robot units.

        Raises:
            ValueError, TypeError: an observation that the policy refuses.
        """
        if len(set(episodes)) < len(observations):
            raise ValueError(
                f"{len(observations)} observations of {len(set(episodes))} episodes; an episode "
                "takes one step at a time"
            )
        self.session.episodes(episodes)
        return self.policy.predict_actions(observations, **self._options)

    def end(self, episode: EpisodeKey) -> None:
        """Forget an episode; one that is forgotten already is no error."""
        self.session.reset([episode])

    def close(self) -> None:
        """Detach the method: the policy is what it was before."""
        self.session.remove()
