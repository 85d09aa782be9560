"""Who acts in an episode: a policy under one condition, asked call by call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import torch

from vla_pruner.core.session import Session, StepReport
from vla_pruner.episodes.condition import ALL_TOKENS
from vla_pruner.episodes.picture import picture_of, visible_side
from vla_pruner.measure.timing import time_ms
from vla_pruner.models.pi0.chunking import Guide
from vla_pruner.models.prune import prune
from vla_pruner.pruning.flops import layered_prefill_flops, prefill_flops


@dataclass
class Call:
    """One call of the policy.

    Args:
        step: steps of the scene that had been taken before.
        latency_ms: duration of `predict_action`, images in, actions out.
        warm_up: whether a pruning method still ran on all tokens.
        tokens: length of the prefill, before pruning.
        visual: visual tokens among them.
        visual_kept: visual tokens that stay after the last cut.
        prefill_macs: multiply-accumulates of the decoder's prefill by formula (Eq. 12), layer by
            layer.
        full_macs: the same without pruning (Eq. 11).
        saw, did: digests of the images and the state that the policy was given, and of the actions
            that it answered: two episodes with the same ones are the same. Empty: not kept.
        delay: steps of the scene that went by until its actions were there.
    """

    step: int
    latency_ms: float
    warm_up: bool
    tokens: int
    visual: int
    visual_kept: int
    prefill_macs: int
    full_macs: int
    saw: str = ""
    did: str = ""
    delay: int = 0


@dataclass
class Answer:
    """What a policy did with an observation.

    Args:
        actions: `[dim]` or a chunk `[chunk, dim]`.
        call: what it cost; its step is not known here.
        picture: what a recording shows of it, see `picture.picture_of`; None: not asked for.
    """

    actions: np.ndarray
    call: Call
    picture: dict[str, Any] | None = None


class PolicyRunner(Protocol):
    """What an episode asks for actions.

    Args:
        side: share of an image's height and width that the policy sees.
        wants_motion: whether `moved` is to be called.
    """

    side: float
    wants_motion: bool

    def begin(self, seed: int) -> None:
        """Start an episode: nothing is remembered."""

    def act(
        self,
        images: Sequence[np.ndarray],
        instruction: str,
        state: Any,
        *,
        picture: bool,
        guide: Guide | None = None,
    ) -> Answer:
        """Actions for one image per camera; with `picture` also what a recording shows.

        With `guide` they continue a chunk that is being carried out.
        """

    def moved(self, distance: float) -> None:
        """How far the hand got with the last actions, in m."""


class _Name:
    """Name of an episode in a session: its own, though a method draws tokens by its number."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __repr__(self) -> str:
        return repr(self._seed)


class LocalPolicyRunner:
    """A policy in this process.

    Without a session the model is timed untouched: not even a hook is attached. Its tokens are
    counted in one extra, untimed call. Before every call torch is seeded by the scene and the
    number of the call: a policy that draws noise draws the same one again, under every condition.

    Args:
        policy: a `torch.nn.Module` with `predict_action(images, instruction, proprio=None)`.
        session: the pruning session attached to it. Several runners may share it, each with a
            history of its own.
        arguments: further ones of `predict_action`, such as `unnorm_key`.
    """

    def __init__(
        self,
        policy: Any,
        session: Session | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.side = visible_side(policy)
        self.wants_motion = session is not None and "motion" in session.method.needs
        self._policy, self._session = policy, session
        self._arguments = dict(arguments or {})
        self._meter: Session | None = session
        self._name: _Name | None = None
        self._calls = 0

    def begin(self, seed: int) -> None:
        """Start an episode: nothing is remembered."""
        self.end()
        self._name, self._calls = _Name(seed), 0

    def end(self) -> None:
        """Forget the episode."""
        if self._session is not None and self._name is not None:
            self._session.reset([self._name])

    def act(
        self,
        images: Sequence[np.ndarray],
        instruction: str,
        state: Any,
        *,
        picture: bool = False,
        guide: Guide | None = None,
    ) -> Answer:
        """Actions for one image per camera; see `PolicyRunner.act`."""
        if self._session is not None:
            self._session.episodes([self._name])

        arguments = self._arguments if guide is None else {**self._arguments, "guide": guide}

        def predict() -> np.ndarray:
            return self._policy.predict_action(images, instruction, proprio=state, **arguments)

        if self._meter is None:
            with prune(self._policy, ALL_TOKENS) as self._meter:
                predict()
        seed_call(self._name, self._calls)
        self._calls += 1
        found: list[np.ndarray] = []
        device = next(self._policy.parameters()).device
        latency_ms = time_ms(lambda: found.append(predict()), device)
        actions, report = found[0], report_of(self._meter)
        call = describe_call(0, latency_ms, report, self._meter)
        call.saw = _digest(*images, *([] if state is None else [state]))
        call.did = _digest(actions)
        return Answer(actions, call, picture_of(report) if picture else None)

    def moved(self, distance: float) -> None:
        """How far the hand got with the last actions, in m."""
        if self._session is not None:
            self._session.motion(distance, self._name)


def seed_call(episode: object, number: int) -> None:
    """Seed torch for a call of an episode: a policy that draws noise then draws the same again."""
    torch.manual_seed(crc32(f"{episode!r}/{number}".encode()))


def _digest(*arrays: np.ndarray) -> str:
    digest = sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


class Reporting(Protocol):
    """A session, or an instrument that reports like one."""

    @property
    def last(self) -> StepReport | None:
        """What the last step did; None: there was none."""


def report_of(session: Reporting) -> StepReport:
    """What the last step did.

    Raises:
        RuntimeError: there was none.
    """
    if session.last is None:
        raise RuntimeError(
            "no image reached the language model in a call of `predict_action`; run "
            "`vla-pruner doctor` on this policy"
        )
    return session.last


def describe_call(step: int, latency_ms: float, report: StepReport, session: Session) -> Call:
    """Counts and cost of a call, from what the session saw."""
    config: Any = session.decoder.config
    sizes = {"hidden": config.hidden_size, "ffn": config.intermediate_size}
    tokens, visual, kept = report.tokens_full, report.visual_full, report.visual_kept
    full_macs = prefill_flops(tokens, layers=config.num_hidden_layers, **sizes)
    keys = report.keys_per_layer
    macs = layered_prefill_flops(report.tokens_per_layer, keys_per_layer=keys, **sizes)
    return Call(
        step=step,
        latency_ms=latency_ms,
        warm_up=bool(report.warm_up[0]),
        tokens=tokens,
        visual=visual,
        visual_kept=kept,
        prefill_macs=macs,
        full_macs=full_macs,
    )
