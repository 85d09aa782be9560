"""vla-eval model server: any policy with any pruning method, for several clients at once.

For vla-eval it is `vla_pruner.serving.server:PolicyServer`; `python -m vla_pruner.serving.server
--config FILE.yaml` reads the same files as `vla-eval serve`, whose `script:` may be this file.

Non-obvious behaviours
----------------------
* A message is checked before it enters a batch: a bad one is an error for its own client alone.
* Histories belong to episodes, not to connections: a client that comes back after a lost connection
  starts its episode anew and cannot end, or continue, anybody else's.
* A batch with warmed-up and fresh episodes runs on all tokens, with hidden instead of dropped ones
  in the warmed-up rows: as exact, not faster. Clients that start together do not meet this.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import DimSpec
from vla_eval.types import Action, Observation

from vla_pruner._short import short
from vla_pruner.episodes.control import said_by, statistics_of
from vla_pruner.models.loading import load, locate
from vla_pruner.serving.conventions import CONVENTIONS, Gripper, Translator
from vla_pruner.serving.policy import EpisodeKey, ServedPolicy

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


class PolicyServer(PredictModelServer):
    """A policy that `vla_pruner.models.load` gives, pruned, behind vla-eval's protocol."""

    def __init__(
        self,
        policy: Any = "mini-oft",
        method: str = "vla-pruner",
        keep: int | float | None = None,
        benchmark: str = "libero",
        options: dict[str, Any] | None = None,
        unnorm_key: str | None = None,
        gripper: Gripper | None = None,
        jpeg: bool = False,
        center_crop: bool | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        *,
        chunk_size: int | None = None,
        action_ensemble: str = "newest",
        ema_alpha: float = 0.5,
        max_batch_size: int = 1,
        max_wait_time: float = 0.01,
    ) -> None:
        """Load, attach, and check that policy and benchmark fit.

        Args:
            policy: name of a policy that ships with the package, a folder, a hub id, or a module.
            method: name of a pruning method; "none" keeps every token.
            keep: fraction of the visual tokens in (0, 1], or their number; None: the method's own.
            benchmark: whose messages to understand, see `conventions.CONVENTIONS`.
            options: further options of the method.
            unnorm_key: dataset whose statistics scale actions; needed if there are several.
            gripper: how the policy writes it; None: "robosuite" for a policy whose config.json
                says how it is driven, which those that ship with the package do, else "rlds".
            jpeg: pass images through JPEG, as the original evaluation of published checkpoints.
            center_crop: overrides the policy's configuration.
            device, dtype: where to put the weights, and as what; None: as stored.
            chunk_size: actions of a chunk that are carried out; None: what config.json says, else
                all of them.
            action_ensemble, ema_alpha, max_batch_size, max_wait_time: as in vla-eval.

        Raises:
            ValueError: an unknown name, or a policy that does not fit the benchmark.
        """
        if benchmark not in CONVENTIONS:
            raise ValueError(
                f"no benchmark is called {short(benchmark)}; there are {', '.join(CONVENTIONS)}"
            )
        if max_batch_size < 1 or (chunk_size is not None and chunk_size < 1):
            raise ValueError("chunk_size and max_batch_size are at least 1")
        name = policy if isinstance(policy, str) else type(policy).__name__
        model = _load(policy, device, dtype) if isinstance(policy, str) else policy
        control = said_by(Path(locate(policy))) if isinstance(policy, str) else {}
        config = getattr(model, "config", None)
        chunk = getattr(config, "chunk", 1)
        if chunk_size is not None and chunk_size > chunk:
            raise ValueError(f"chunk_size={chunk_size}: {name} gives {chunk} action(s) at a time")
        super().__init__(
            chunk_size=chunk_size or int(control.get("execute", chunk)),
            action_ensemble=action_ensemble,
            ema_alpha=ema_alpha,
            max_batch_size=max_batch_size,
            max_wait_time=max_wait_time,
        )
        self.translator = Translator(
            CONVENTIONS[benchmark],
            cameras=getattr(config, "num_images", 1),
            state_dim=getattr(config, "proprio_dim", None),
            gripper=gripper or ("robosuite" if control else "rlds"),
            jpeg=jpeg,
        )
        unnorm_key = statistics_of(
            model, unnorm_key, folder=Path(locate(policy)) if isinstance(policy, str) else None
        )
        self.served = ServedPolicy(
            model,
            method,
            keep=keep,
            unnorm_key=unnorm_key,
            center_crop=center_crop,
            **(options or {}),
        )
        self.description = f"{name} for {benchmark}, method {method}"
        if keep is not None:
            self.description += f", keep {keep}"
        self._episodes: dict[str, EpisodeKey] = {}
        self._latest: dict[str, str] = {}

    # -- what vla-eval asks once -----------------------------------------------------------------
    def get_action_spec(self) -> dict[str, DimSpec]:
        return self.translator.action_spec()

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return self.translator.observation_spec()

    def get_observation_params(self) -> dict[str, Any]:
        return self.translator.observation_params()

    # -- episodes --------------------------------------------------------------------------------
    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """A new history; the connection's episode before, if its client never ended it, is over."""
        self._forget(self._latest.get(ctx.session_id))
        await super().on_episode_start(config, ctx)
        task = config.get("task") or {}
        label = f"{task.get('name', '')}/{task.get('episode_idx', 0)}"
        self._episodes[ctx.episode_id] = self.served.start(label)
        self._latest[ctx.session_id] = ctx.episode_id
        logger.info("episode %s of session %s", label, ctx.session_id[:8])

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Forget the history; also called for a client that went away."""
        self._forget(ctx.episode_id)
        if self._latest.get(ctx.session_id) == ctx.episode_id:
            del self._latest[ctx.session_id]
            await super().on_episode_end(result, ctx)

    def _forget(self, episode_id: str | None) -> None:
        episode = self._episodes.pop(episode_id, None) if episode_id is not None else None
        if episode is not None:
            self.served.end(episode)

    # -- steps -----------------------------------------------------------------------------------
    async def on_observation(self, obs: Observation, ctx: SessionContext) -> None:
        """Check a message, then let vla-eval put it into a batch."""
        episode = self._episodes.get(ctx.episode_id)
        if episode is None:
            raise ValueError("an observation came before EPISODE_START; start the episode first")
        observation = self.translator.observation(obs)
        await super().on_observation({"episode": episode, "observation": observation}, ctx)

    def predict_batch(
        self, obs_batch: list[Observation], ctx_batch: list[SessionContext]
    ) -> list[Action]:
        """Actions of each row, from one pass of the policy."""
        actions = self.served.act(
            [row["episode"] for row in obs_batch], [row["observation"] for row in obs_batch]
        )
        return [{"actions": row} for row in self.translator.actions(actions)]


def _load(name: str, device: str, dtype: str | None) -> Any:
    import torch

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={short(dtype)} is unknown; use one of {', '.join(DTYPES)}")
    return load(name, device=device, dtype=None if dtype is None else getattr(torch, dtype))


if __name__ == "__main__":
    from vla_eval.model_servers.serve import run_server

    run_server(PolicyServer)
