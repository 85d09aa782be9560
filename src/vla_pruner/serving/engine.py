"""Between doors and a policy: passes of many episodes, in time, each answer with what it is worth.

A door turns bytes into an episode and an observation; this runs the policy and knows nothing of
bytes. All methods but `metrics` belong to one event loop; the policy runs in a thread, or in
processes of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from vla_pruner._short import cut
from vla_pruner.reports.rerun_log import RerunLog, Shown
from vla_pruner.serving.ladder import Ladder
from vla_pruner.serving.limits import Limits, Refused, limit_logs
from vla_pruner.serving.metrics import Metrics
from vla_pruner.serving.policy import EpisodeKey, ServedPolicy
from vla_pruner.serving.scheduler import Chunk, Episode, Lane, Reply, Row, linger, next_pass
from vla_pruner.serving.worker import Apart, Failed, Here, Hung, Worker

__all__ = ["Busy", "Engine", "EpisodeKey", "Failed", "Hung", "Limits", "Refused", "Reply"]

logger = logging.getLogger(__name__)


class Busy(RuntimeError):
    """The server takes no more: it is closing, or too many episodes are open."""


class Engine:
    """One policy and one method for many episodes at once."""

    def __init__(
        self,
        served: ServedPolicy | Callable[[], ServedPolicy],
        limits: Limits | None = None,
        *,
        deadline_s: float | None = None,
        ladder: Ladder | None = None,
        batch: int = 16,
        wait_s: float = 0.003,
        execute: int | None = None,
        watchdog_s: float = 30.0,
        replicas: int = 1,
        log: RerunLog | None = None,
        apart: Callable[[Callable[[], ServedPolicy], float], Worker] = Apart,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            served: a policy, run by a thread of this process; or what makes one, picklable: then
                each replica makes its own in a process, which is replaced when it hangs.
            limits: what clients may send.
            deadline_s: seconds within which every observation is answered; None: as long as it
                takes.
            ladder: budgets to step through when answers come close to the deadline.
            batch: most rows of a pass.
            wait_s: how long a pass waits for clients that are known to come back at once.
            execute: steps of a chunk that clients carry out before they ask again; None: all.
            watchdog_s: seconds after which a pass in a process counts as hung.
            replicas: processes; each holds a whole policy.
            log: is handed every answer; closed when the engine drains.
            apart: makes a replica's worker: a process, or `partial(OnRay, address=ADDRESS)`.

        Raises:
            ValueError: a number that makes no sense, or several replicas of a policy in a thread.
        """
        if batch < 1 or replicas < 1 or (execute is not None and execute < 1):
            raise ValueError("batch, replicas and execute are at least 1")
        if not (0 <= wait_s < math.inf and _is_time(watchdog_s)):
            raise ValueError("wait_s is at least 0, watchdog_s above 0; both are finite")
        if deadline_s is not None and not _is_time(deadline_s):
            raise ValueError(f"deadline_s={deadline_s}: expected seconds above 0")
        here = isinstance(served, ServedPolicy)
        if here and replicas > 1:
            raise ValueError(
                "replicas run in processes of their own: give what makes the policy, not the policy"
            )
        self.served = served
        self.limits = limits or Limits()
        self.deadline_s, self.ladder, self.log = deadline_s, ladder, log
        self.metrics = Metrics()
        limit_logs(self.metrics)
        self._batch, self._wait_s, self._execute = batch, wait_s, execute
        workers: list[Worker] = [
            Here(served) if isinstance(served, ServedPolicy) else apart(served, watchdog_s)
            for _ in range(replicas)
        ]
        self._lanes = [
            Lane(worker, ThreadPoolExecutor(1, f"policy-{number}"))
            for number, worker in enumerate(workers)
        ]
        self._episodes: dict[EpisodeKey, Episode] = {}
        self._numbers = itertools.count()
        self._width = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: list[Future[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._draining = False

    # -- life ------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Load what runs in processes, warm up, and take observations.

        Raises:
            RuntimeError, ValueError: the policy cannot be made, or does not run.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # The first start, or the loop before is over.
            self._loop, self._draining, self._starting = loop, False, None
            self._tasks = []
            self._episodes.clear()
            for lane in self._lanes:
                lane.ended += lane.episodes
                lane.episodes.clear()
                lane.waiting.clear()
                lane.wake, lane.running, lane.alive = asyncio.Event(), [], True
        if self._starting is None:
            self._starting = loop.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(self._start_lane(lane) for lane in self._lanes))
        self._tasks = [loop.create_task(self._run(lane)) for lane in self._lanes]
        self.metrics.put("ready", 1)

    async def _start_lane(self, lane: Lane) -> None:
        loop = asyncio.get_running_loop()
        lane.warm_up, self._width = await loop.run_in_executor(lane.thread, lane.worker.start)

    @property
    def ready(self) -> bool:
        """Whether observations are taken: warmed up, and not closing."""
        return bool(self._tasks) and not self._draining

    async def drain(self, timeout_s: float) -> None:
        """Take no more observations, let what runs finish, at most so long; then end."""
        self._draining = True
        self.metrics.put("ready", 0)
        until = time.monotonic() + timeout_s
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()  # Nobody waits for a warm-up any more.
            for lane in self._lanes:
                lane.worker.abandon()
        while any(lane.busy for lane in self._lanes):
            if time.monotonic() > until:
                for lane in self._lanes:
                    lane.worker.abandon()
                break
            await asyncio.sleep(0.005)
        for task in self._tasks:
            task.cancel()
        for lane in self._lanes:
            if not lane.alive:
                lane.worker.abandon()
            for row in lane.waiting + lane.running:
                self._fail(row, Busy("the server is closing"))
            lane.waiting.clear()
            self._closing.append(lane.thread.submit(lane.worker.close))
        self._tasks = []
        if self.log is not None:
            self.log.close()

    def ended(self, timeout_s: float) -> bool:
        """Whether, within a time after `drain`, no pass runs; one that hangs in a thread may."""
        return not wait(self._closing, timeout_s).not_done

    # -- episodes --------------------------------------------------------------------------------
    def open(self, label: str = "") -> EpisodeKey:
        """A new episode, with nothing remembered.

        Args:
            label: task and initial state, for methods that draw at random.

        Raises:
            Busy: the server is closing, or too many are open.
        """
        if self._draining:
            raise Busy("the server is closing")
        if len(self._episodes) >= self.limits.episodes:
            raise Busy(f"{len(self._episodes)} episodes are open, and no more are taken")
        key = EpisodeKey(cut(label, 200))
        lanes = [lane for lane in self._lanes if lane.alive] or self._lanes
        lane = min(lanes, key=lambda lane: len(lane.episodes))
        episode = Episode(next(self._numbers), key.label, lane, lane.warm_up)
        self._episodes[key] = lane.episodes[episode.number] = episode
        self.metrics.put("episodes", len(self._episodes))
        return key

    async def end(self, episode: EpisodeKey) -> None:
        """Forget an episode; one that is forgotten already is no error."""
        found = self._episodes.pop(episode, None)
        if found is None:
            return
        lane = found.lane
        lane.episodes.pop(found.number, None)
        if found.row is not None and found.row in lane.waiting:
            lane.waiting.remove(found.row)
            self._fail(found.row, Refused("the episode has ended"))
        lane.ended.append(found.number)
        lane.wake.set()
        self.metrics.put("episodes", len(self._episodes))

    # -- observations ----------------------------------------------------------------------------
    async def act(
        self,
        episode: EpisodeKey,
        observation: Mapping[str, Any],
        *,
        deadline_s: float | None = None,
    ) -> Reply:
        """The answer to one observation.

        Args:
            episode: that `open` gave.
            observation: as the policy's `predict_actions` takes it.
            deadline_s: of this observation; None: the engine's.

        Raises:
            Refused: the observation, or an episode that is over or has one under way.
            Busy: the server is closing.
            Hung: the worker was replaced, and with it went the episode's history.
            Failed: the policy gave no usable answer.
        """
        arrived = time.monotonic()
        try:
            if self._draining:
                raise Busy("the server is closing")
            if not self.ready:
                await self.start()
            found = self._episodes.get(episode)
            if found is None:
                raise Refused("the episode is over, or was never begun; start it first")
            if deadline_s is not None and not _is_time(deadline_s):
                raise Refused(f"the deadline is {deadline_s} s; expected seconds above 0")
            if found.waited_for:
                raise Refused("an episode takes one observation at a time; wait for the answer")
            self.limits.check(observation)
            if found.lost is not None:
                error, found.lost = found.lost, None
                raise error
            deadline = self.deadline_s if deadline_s is None else deadline_s
            reply = await self._answer(found, observation, arrived, deadline)
        except (Refused, Busy, Hung, Failed) as error:
            self.metrics.add("errors_total", type(error).__name__.lower())
            raise
        self.metrics.add("answers_total", "late" if reply.late else "fresh")
        if reply.warm_up and not reply.late:
            self.metrics.add("warm_up_total")
        took = time.monotonic() - arrived
        self.metrics.observe("answer_seconds", took)
        if self.log is not None:
            self.log.put(_shown(found, observation, reply, took))
        found.asked += 1
        if deadline_s is None:  # A client's own deadline says nothing about ours.
            self._climb(took)
        return reply

    async def _answer(
        self, episode: Episode, seen: Mapping[str, Any], arrived: float, deadline: float | None
    ) -> Reply:
        episode.think = arrived - episode.replied
        episode.position += episode.handed
        episode.handed = 0
        row = self._put(episode, seen, arrived)
        left = None if deadline is None else deadline - (time.monotonic() - arrived)
        episode.waited_for = True
        try:
            async with asyncio.timeout(left):
                step = await asyncio.shield(row.done)
            reply = Chunk(step, arrived, row.position).reply(row.position)
        except TimeoutError:
            reply = self._late(episode)
        except asyncio.CancelledError:
            if row in episode.lane.waiting:
                episode.lane.waiting.remove(row)
                row.done.cancel()
            raise
        finally:
            episode.waited_for = False
            episode.replied = time.monotonic()
        steps = len(reply.actions)
        episode.handed = steps if self._execute is None else min(steps, self._execute)
        return reply

    def _put(self, episode: Episode, seen: Mapping[str, Any], arrived: float) -> Row:
        """An observation in its place: that of an older one of its episode, if that still waits."""
        lane, loop = episode.lane, asyncio.get_running_loop()
        text = len(seen["instruction"].encode())
        row = Row(episode, seen, arrived, episode.position, text, loop.create_future())
        row.done.add_done_callback(row.over)
        before = episode.row
        if before is not None and before in lane.waiting:
            lane.waiting[lane.waiting.index(before)] = row
        else:
            lane.waiting.append(row)
        episode.row = row
        lane.wake.set()
        return row

    def _late(self, episode: Episode) -> Reply:
        chunk = episode.chunk
        if chunk is None:
            nothing = np.zeros((0, self._width), np.float32)
            now = time.monotonic()
            age = 0.0 if episode.row is None else now - episode.row.arrived
            return Reply(nothing, True, age, 0, 1.0, None, False, 0.0, self._method())
        return chunk.reply(episode.position, late=True)

    def _method(self) -> str:
        if self.ladder is not None:
            return self.ladder.rung.method
        served = self.served
        return served.name if isinstance(served, ServedPolicy) else ""

    def _climb(self, took: float) -> None:
        """Tell the ladder how long an answer took."""
        ladder = self.ladder
        if ladder is None or not (went := ladder.observe(took)):
            return
        self.metrics.add("rung_changes_total", "up" if went > 0 else "down")
        self.metrics.put("rung", ladder.at)
        logger.warning(
            "budget %s: rung %d of %d, %s",
            "up" if went > 0 else "down",
            ladder.at + 1,
            len(ladder.rungs),
            ladder.rung.name,
        )

    # -- passes ----------------------------------------------------------------------------------
    async def _run(self, lane: Lane) -> None:
        """Pass after pass, as long as there is something to do."""
        while True:
            if not lane.waiting and not lane.ended:
                lane.wake.clear()
                await lane.wake.wait()
            await linger(lane, self._batch, self._wait_s)
            rows = next_pass(lane.waiting, self._batch)
            for row in rows:
                lane.waiting.remove(row)
            ended, lane.ended = lane.ended, []
            self.metrics.put("waiting", len(lane.waiting))
            lane.running = rows
            try:
                await self._pass(lane, rows, ended)
            except Exception as error:
                logger.exception("a pass ended in an error of the engine")
                for row in rows:
                    self._fail(row, Failed(f"the engine failed: {type(error).__name__}"))
            finally:
                lane.running = []

    async def _pass(self, lane: Lane, rows: list[Row], ended: list[int]) -> None:
        loop = asyncio.get_running_loop()
        rung = None if self.ladder is None else self.ladder.rung
        sent = [(row.episode.number, row.episode.label, row.seen) for row in rows]
        began = time.monotonic()
        try:
            found = await loop.run_in_executor(lane.thread, lane.worker.step, sent, rung, ended)
        except Exception as error:
            told = error if isinstance(error, Hung | Refused | Failed) else Failed(str(error))
            for row in rows:
                if isinstance(error, Hung) and not row.episode.waited_for:
                    row.episode.lost = error  # Its client was told `late`, and has to hear of it.
                self._fail(row, told)
            if isinstance(error, Hung):
                await self._replace(lane)
            return
        if not rows:
            return
        self.metrics.add("passes_total")
        self.metrics.observe("pass_rows", len(rows))
        self.metrics.observe("pass_seconds", time.monotonic() - began)
        for row, step in zip(rows, found, strict=True):
            if isinstance(step, Exception):
                self._fail(row, step)
                continue
            row.episode.warm_up = step.warm_up_next
            row.episode.chunk = Chunk(step, row.arrived, row.position)
            self.metrics.put("keep_ratio", step.keep)
            if not row.done.done():
                row.done.set_result(step)

    async def _replace(self, lane: Lane) -> None:
        """A new worker; episodes of the old one warm up again, with another where there is one."""
        lane.alive = False
        if others := [other for other in self._lanes if other.alive]:
            lane.leave_to(others)
        if self._draining:  # Nobody will ask a new one.
            for row in lane.waiting:
                self._fail(row, Busy("the server is closing"))
            lane.waiting.clear()
            return
        self.metrics.add("worker_restarts_total")
        logger.error("a worker hung or died; it is replaced, its episodes warm up again")
        for episode in lane.episodes.values():
            episode.warm_up = lane.warm_up
        while True:
            try:
                await self._start_lane(lane)
                lane.alive = True
                return
            except Exception as error:
                logger.error("the new worker did not start: %s", cut(str(error), 300))
                for row in lane.waiting:
                    self._fail(row, Hung("the policy's process does not start again"))
                lane.waiting.clear()
                await asyncio.sleep(1.0)

    def _fail(self, row: Row, error: Exception) -> None:
        if not row.done.done():
            row.done.set_exception(error)


def _shown(episode: Episode, seen: Mapping[str, Any], reply: Reply, took: float) -> Shown:
    """An answer for the log. A late one repeats tokens of an older image: no picture."""
    picture = None if reply.late or episode.chunk is None else episode.chunk.step.picture
    numbers = {"latency_ms": 1000 * took, "infer_ms": reply.infer_ms, "keep": reply.keep}
    numbers |= {"late": float(reply.late), "warm_up": float(reply.warm_up)}
    if reply.tokens is not None:
        numbers["tokens"] = reply.tokens
    where = f"{episode.number} {episode.label}".strip()
    images = list(seen.get("images", ()))
    return Shown(where, episode.asked, images, picture, reply.actions, numbers, time.time())


def _is_time(seconds: float) -> bool:
    return 0 < seconds < math.inf
