"""vla-eval's door: any policy with any pruning method, for several of its clients at once.

For vla-eval it is `vla_pruner.serving.server:PolicyServer`; `python -m vla_pruner.serving.server
--config FILE.yaml` reads the same files as `vla-eval serve`, whose `script:` may be this file.

Non-obvious behaviours
----------------------
* vla-eval's own listener has no limits and lets anybody reconfigure it (`GET /config`). It is never
  used: a script that hands a `PolicyServer` to it is answered by `listening` all the same, on this
  machine alone unless there is a token.
* An episode belongs to its connection, whatever ids a client sends. A client that comes back after
  a lost connection starts its episode anew, and cannot end, or continue, anybody else's.
* Actions of a chunk are kept here and sent one by one; the policy is asked when they are used up.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from vla_eval.model_servers.base import ModelServer, SessionContext
from vla_eval.protocol.messages import make_hello_payload
from vla_eval.specs import DimSpec
from vla_eval.types import Observation

from vla_pruner._short import cut, short
from vla_pruner.episodes.control import gripper_of, said_by, statistics_of
from vla_pruner.models.loading import load, locate
from vla_pruner.runs.job import fingerprint
from vla_pruner.serving.conventions import CONVENTIONS, Gripper, Translator
from vla_pruner.serving.engine import Engine, EpisodeKey, Failed, Reply
from vla_pruner.serving.ladder import Ladder
from vla_pruner.serving.limits import Limits, Refused
from vla_pruner.serving.listen import leave, listening, read_token, serve_async
from vla_pruner.serving.policy import ServedPolicy

logger = logging.getLogger(__name__)

EVERYWHERE = ("0.0.0.0", "::", "")
"""Addresses that stand for every network interface."""


class PolicyServer(ModelServer):
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
        max_batch_size: int = 16,
        max_wait_time: float = 0.003,
        deadline_ms: float | None = None,
        ladder: str | None = None,
        replicas: int = 0,
        watchdog_s: float = 30.0,
        limits: dict[str, Any] | None = None,
        token_file: str | None = None,
        engine: Any = None,
    ) -> None:
        """Load, attach, and check that policy and benchmark fit.

        Args:
            policy: name of a policy that ships with the package, a folder, a hub id, or a module.
            method: name of a pruning method; "none" keeps every token.
            keep: fraction of the visual tokens in (0, 1], or their number; None: the method's own.
            benchmark: whose messages to understand, see `conventions.CONVENTIONS`.
            options: further options of the method.
            unnorm_key: dataset whose statistics scale actions; needed if there are several.
            gripper: how the policy writes it; None: as its config.json or the range of its
                statistics says, else "robosuite" if that file says how it is driven, else "rlds".
            jpeg: pass images through JPEG, as the original evaluation of published checkpoints.
            center_crop: overrides the policy's configuration.
            device, dtype: where to put the weights, and as what; None: as stored.
            chunk_size: actions of a chunk that are carried out; None: what config.json says, else
                all of them.
            max_batch_size, max_wait_time: most rows of a pass; seconds that a pass waits for
                clients that are known to come back at once.
            deadline_ms: every observation is answered within this time, if need be with the rest of
                the last chunk; None: as long as it takes.
            ladder: receipt of `vla-pruner tune`: budgets to step through near the deadline.
            replicas: processes that run the policy, each replaced when it hangs; 0: a thread.
            watchdog_s: seconds after which a pass in a process counts as hung.
            limits: what clients may send, see `limits.Limits`.
            token_file: file with a token that clients have to show; None: nobody is asked.
            engine: an `Engine` that other doors use as well, and that runs `policy`.

        Raises:
            ValueError: an unknown name, or a policy that does not fit the benchmark.
        """
        if benchmark not in CONVENTIONS:
            raise ValueError(
                f"no benchmark is called {short(benchmark)}; there are {', '.join(CONVENTIONS)}"
            )
        if max_batch_size < 1 or (chunk_size is not None and chunk_size < 1):
            raise ValueError("chunk_size and max_batch_size are at least 1")
        named = isinstance(policy, str)
        if replicas and not named:
            raise ValueError("replicas load the policy themselves: give its name or folder")
        name = policy if named else type(policy).__name__
        model = load(policy, device=device, dtype=dtype) if named else policy
        folder = Path(locate(policy)) if named else None
        control = said_by(folder)
        config = getattr(model, "config", None)
        chunk = getattr(config, "chunk", 1)
        if chunk_size is not None and chunk_size > chunk:
            raise ValueError(f"chunk_size={chunk_size}: {name} gives {chunk} action(s) at a time")
        self.chunk_size = chunk_size or int(control.get("execute", chunk))
        self.max_batch_size = max_batch_size
        unnorm_key = statistics_of(model, unnorm_key, folder=folder)
        usual: Gripper = "robosuite" if control else "rlds"
        self.translator = Translator(
            CONVENTIONS[benchmark],
            cameras=getattr(config, "num_images", 1),
            state_dim=getattr(config, "proprio_dim", None),
            gripper=gripper or gripper_of(model, control, unnorm_key, otherwise=usual),
            jpeg=jpeg,
        )
        settings = {
            "method": method,
            "keep": keep,
            "unnorm_key": unnorm_key,
            "center_crop": center_crop,
            **(options or {}),
        }
        self.token = None if token_file is None else read_token(Path(token_file))
        deadline = None if deadline_ms is None else deadline_ms / 1000
        if ladder is not None and deadline is None:
            raise ValueError("ladder: say with deadline_ms what answers must not exceed, too")
        if engine is None:
            served = ServedPolicy(model, **settings)
            if replicas:
                served.close()  # What fits here, fits there; they load their own.
            else:
                self.served = served
            engine = Engine(
                partial(make_served, policy, device, dtype, settings) if replicas else served,
                Limits(**(limits or {})),
                deadline_s=deadline,
                ladder=None
                if ladder is None
                else Ladder.read(ladder, deadline or 0.0, weights=fingerprint(model)),
                batch=max_batch_size,
                wait_s=max_wait_time,
                execute=self.chunk_size,
                watchdog_s=watchdog_s,
                replicas=max(replicas, 1),
            )
        self.engine: Engine = engine
        self.description = f"{name} for {benchmark}, method {method}"
        if keep is not None:
            self.description += f", keep {keep}"

    # -- what vla-eval asks once -----------------------------------------------------------------
    def get_action_spec(self) -> dict[str, DimSpec]:
        return self.translator.action_spec()

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return self.translator.observation_spec()

    def get_observation_params(self) -> dict[str, Any]:
        return self.translator.observation_params()

    # -- vla-eval's own listener, which is not used ----------------------------------------------
    async def on_serve_start(self, tg: Any) -> None:
        """vla-eval is about to listen by itself: `listening` does it instead."""
        from vla_eval.model_servers import serve as theirs

        original = theirs.ws_serve

        @contextlib.asynccontextmanager
        async def instead(_: Any, host: str, port: int, **__: Any) -> AsyncIterator[Any]:
            theirs.ws_serve = original
            if host in EVERYWHERE and self.token is None:
                logger.warning(
                    "listening on 127.0.0.1, not on every network interface as vla-eval would: "
                    "give the server a token_file, or start it with `vla-pruner serve --host`"
                )
                host = "127.0.0.1"
            async with listening(self, host, port, ended=tg.cancel_scope.cancel) as server:
                yield server

        theirs.ws_serve = instead

    def talk(self) -> Talk:
        """What answers the messages of one connection."""
        return Talk(self)

    async def on_observation(self, obs: Observation, ctx: SessionContext) -> None:
        """Never called: connections are answered by `Talk`."""
        raise RuntimeError("this server answers its connections itself; start it with `listening`")


class Late(Failed):
    """The deadline passed, and there is nothing that could be carried out instead."""


class Talk:
    """One connection: its episode, and what is left of the chunk that it was given."""

    def __init__(self, server: PolicyServer) -> None:
        self.server = server
        self._episode: EpisodeKey | None = None
        self._chunk: deque[np.ndarray] = deque()
        self._reply: Reply | None = None
        self._came = 0.0
        self._hand = server.translator.hand()

    async def answer(self, kind: Any, payload: dict[str, Any]) -> tuple[str, dict] | None:
        """Type and payload of what is sent back; None: nothing is.

        Raises:
            Refused, Busy, Hung, Failed: what the client is told instead.
        """
        if kind == "observation":
            return "action", await self._observed(payload)
        if kind == "hello":
            return "hello", self._hello()
        if kind == "episode_start":
            await self._start(payload)
        elif kind == "episode_end":
            await self.end()
        elif kind == "error":
            logger.info("a client reports an error: %s", short(payload.get("error")))
        else:
            raise Refused(f"no message is of type {short(kind)}")
        return None

    def _hello(self) -> dict[str, Any]:
        server = self.server
        said: dict[str, Any] = {"model_server": type(server).__name__, "capabilities": {}}
        for name in ("action_spec", "observation_spec"):
            spec = getattr(server, f"get_{name}")()
            said[name] = {entry: dim.to_dict() for entry, dim in spec.items()}
        return make_hello_payload(**said, observation_params=server.get_observation_params())

    async def _start(self, config: dict[str, Any]) -> None:
        """A new history; the episode before, if its client never ended it, is over."""
        await self.end()
        task = config.get("task") or {}
        if not isinstance(task, dict):
            raise Refused(f"`task` must map names to values; got {short(task)}")
        name, number = task.get("name", ""), task.get("episode_idx", 0)
        label = f"{cut(str(name), 150) if isinstance(name, str) else short(name)}/{short(number)}"
        self._episode = self.server.engine.open(label)
        logger.info("episode %s", short(label))

    async def end(self) -> None:
        """Forget the episode; also for a client that went away."""
        episode, self._episode = self._episode, None
        self._chunk.clear()
        self._hand = self.server.translator.hand()
        if episode is not None:
            await self.server.engine.end(episode)

    async def _observed(self, payload: dict[str, Any]) -> dict[str, Any]:
        if self._episode is None:
            raise Refused("an observation came before EPISODE_START; start the episode first")
        if not self._chunk:
            server, came = self.server, time.monotonic()
            server.engine.limits.check_text("task_description", payload.get("task_description"))
            try:
                seen = server.translator.observation(payload)
            except ValueError as error:
                raise Refused(str(error)) from None
            reply = await server.engine.act(self._episode, seen)
            if not reply.valid:
                took = 1000 * (time.monotonic() - came)
                raise Late(f"no answer within {took:.0f} ms, and nothing is left of the last chunk")
            self._reply, self._came = reply, time.monotonic() - reply.age_s
            self._chunk.extend(server.translator.actions(reply.actions[: server.chunk_size]))
        action = self._hand(self._chunk.popleft())
        return {"actions": action, "server": self._told()}

    def _told(self) -> dict[str, Any]:
        """What the action is worth, for clients that look at it."""
        reply = self._reply
        assert reply is not None
        return {
            "late": reply.late,
            "age_ms": round(1000 * (time.monotonic() - self._came), 1),
            "valid": len(self._chunk) + 1,
            "keep": reply.keep,
            "tokens": reply.tokens,
            "warm_up": reply.warm_up,
            "infer_ms": round(reply.infer_ms, 1),
            "method": reply.method,
        }


def make_served(
    policy: str, device: str, dtype: str | None, settings: dict[str, Any]
) -> ServedPolicy:
    """A policy from its name, for a process of its own."""
    return ServedPolicy(load(policy, device=device, dtype=dtype), **settings)


def run_server() -> None:
    """What `vla-eval serve` and `python -m` start: `--config FILE.yaml`, `--args.NAME=VALUE`.

    As vla-eval's own, but it listens on 127.0.0.1 unless told otherwise, and ends with SIGTERM.
    """
    import argparse
    import asyncio

    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(description="a pruned policy behind vla-eval's protocol")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of the server")
    parser.add_argument("--address", default=None, help="host:port to listen on")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: a free one")
    parser.add_argument("--verbose", "-v", action="store_true", help="log everything")
    parser.add_argument("--script", default=None, help=argparse.SUPPRESS)
    parser.add_class_arguments(
        PolicyServer, nested_key="args", fail_untyped=False, sub_configs=True, skip={"engine"}
    )
    said = parser.parse_args()
    logging.basicConfig(
        level=logging.DEBUG if said.verbose else logging.INFO,
        format="%(asctime)s %(levelname)-8s %(name)s: %(message)s",
    )
    host, port = said.host, said.port
    if said.address is not None:
        before, _, number = said.address.rpartition(":")
        if not number.isdecimal():
            raise SystemExit(f"--address {said.address}: expected host:port")
        host, port = before or host, int(number)
    server = PolicyServer(**said.args.as_dict())
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve_async(server, host, port))
    finally:
        leave(server.engine)


if __name__ == "__main__":
    run_server()
