"""A policy with a pruning method attached that acts for several episodes at once."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from vla_pruner._short import short
from vla_pruner.episodes.condition import make_method
from vla_pruner.episodes.picture import picture_of
from vla_pruner.methods import Method
from vla_pruner.models.capture import capture_policy
from vla_pruner.models.prune import prune


@dataclass(frozen=True, eq=False)
class EpisodeKey:
    """One episode of one client.

    Two keys are never the same episode, whatever their labels. The label (task and initial state)
    is all that a method sees which draws tokens at random: the same episode draws the same ones
    whenever, and next to whomever, it runs.
    """

    label: str


@dataclass(frozen=True, eq=False)
class Step:
    """What a pass did in one row.

    Args:
        actions: float32 `[H, dim]`, in robot units.
        keep, tokens: share and number of visual tokens behind the last cut; None: not known.
        warm_up: whether it ran on all tokens, as its method asked.
        warm_up_next: whether the episode's next step will.
        seconds: of the whole pass.
        method: that chose the tokens.
        picture: of the tokens, for a log, see `episodes.picture`; None: nobody asked.
    """

    actions: np.ndarray
    keep: float
    tokens: int | None
    warm_up: bool
    warm_up_next: bool
    seconds: float
    method: str
    picture: dict[str, Any] | None = None


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
        capture: str = "",
        show: bool = False,
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
            capture: backend that compiles whole steps; the method then stays as it is. Empty:
                nothing is compiled.
            show: steps have a picture of their tokens.

        Raises:
            TypeError, NotImplementedError: this policy or method cannot be captured.
            ValueError: the policy cannot act on a batch of observations, the method needs what no
                client reports, or `prune` refuses.
        """
        if not callable(getattr(policy, "predict_actions", None)):
            raise ValueError(
                f"a {type(policy).__name__} has no `predict_actions(observations)`; only policies "
                "that give actions can be served"
            )
        chosen = _servable(make_method(method, **options))
        self.policy: Any = policy
        self.session = prune(policy, chosen)
        self.captured = bool(capture)
        if capture:
            capture_policy(policy, capture)
        given = {"unnorm_key": unnorm_key, "center_crop": center_crop}
        self._show = show
        self._options = {name: value for name, value in given.items() if value is not None}

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.session.method.name

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

    def step(
        self, episodes: Sequence[EpisodeKey], observations: Sequence[Mapping[str, Any]]
    ) -> list[Step]:
        """As `act`, with what the pass did in each row."""
        began = time.perf_counter()
        actions = np.asarray(self.act(episodes, observations), dtype=np.float32)
        seconds = time.perf_counter() - began
        if actions.ndim == 2:
            actions = actions[:, None]
        last, keep, tokens = self.session.last, 1.0, None
        full = [False] * len(episodes)
        if last is not None and last.left_alone is None:
            full = last.warm_up.tolist()
            keep, tokens = last.visual_kept / max(last.visual_full, 1), last.visual_kept
        return [
            Step(
                actions=row,
                keep=keep,
                tokens=tokens,
                warm_up=warm_up,
                warm_up_next=self.warm_up(episode),
                seconds=seconds,
                method=self.name,
                picture=self._picture(number),
            )
            for number, (row, warm_up, episode) in enumerate(
                zip(actions, full, episodes, strict=True)
            )
        ]

    def _picture(self, row: int) -> dict[str, Any] | None:
        """Of the last pass; None: not asked for, nothing was cut, or cameras have no grid."""
        last = self.session.last
        if not self._show or last is None or last.left_alone is not None:
            return None
        with contextlib.suppress(ValueError):
            return picture_of(last, row)
        return None

    def warm_up(self, episode: EpisodeKey) -> bool:
        """Whether the episode's next step runs on all tokens."""
        return self.session.full_next(episode)

    def change(
        self, method: str, keep: float | int, options: Mapping[str, Any] | None = None
    ) -> None:
        """Go on with another budget; episodes keep what they remember if the method is the same.

        Args:
            method: "none" keeps all tokens and goes on remembering.
            keep: share of the visual tokens, in (0, 1], or their number.
            options: of the method; those that are not named stay, if the method does.

        Raises:
            ValueError: no such method, or one that does not fit this policy; nothing is changed.
        """
        before, given = self.session, dict(options or {})
        if method == before.method.name and method != "none":
            chosen = dataclasses.replace(before.method, **given, keep=keep)
        elif method == "none":
            chosen = dataclasses.replace(before.method, keep=1.0)
        else:
            chosen = _servable(make_method(method, keep=keep, **given))
        if chosen == before.method:
            return
        if self.captured:
            raise ValueError(
                "a captured policy keeps its method and its budget; serve it without --capture to "
                "change them"
            )
        before.remove()
        try:
            self.session = prune(self.policy, chosen)
        except Exception:
            self.session = prune(self.policy, before.method)
            raise
        with contextlib.suppress(ValueError):  # Another method: its episodes start anew.
            self.session.inherit(before)

    def blank(self) -> dict[str, Any] | None:
        """An observation that shows nothing; None for a policy that does not say what it reads."""
        config = getattr(self.policy, "config", None)
        cameras = getattr(config, "cameras", None) or getattr(config, "num_images", None)
        if config is None or cameras is None:
            return None
        views = cameras if isinstance(cameras, int) else len(cameras)
        image = np.zeros((64, 64, 3), np.uint8)
        seen: dict[str, Any] = {"images": [image] * views, "instruction": "wait"}
        if (state := getattr(config, "proprio_dim", None)) is not None:
            seen["proprio"] = np.zeros(state)
        return seen

    def end(self, episode: EpisodeKey) -> None:
        """Forget an episode; one that is forgotten already is no error."""
        self.session.reset([episode])

    def close(self) -> None:
        """Detach the method: the policy is what it was before."""
        self.session.remove()


def _servable(method: Method) -> Method:
    if "motion" in method.needs:
        raise ValueError(
            f"method {short(method.name)} decides by the robot's motion, which clients do not "
            "report; use another method, or an option that does without (vla-adp: gate=none)"
        )
    return method
