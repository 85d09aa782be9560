"""The engine keeps its promises: passes of one kind, in time, typed errors, nothing mixed up."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from scripted import DIM, HORIZON, WARM_UP, Scripted, seen, stops_in_its_answer

from vla_pruner.serving import worker
from vla_pruner.serving.engine import Busy, Engine, Failed, Hung, Refused, Reply
from vla_pruner.serving.ladder import Ladder, Rung
from vla_pruner.serving.limits import Limits
from vla_pruner.serving.options import engine_from, engine_options
from vla_pruner.serving.scheduler import kind, next_pass
from vla_pruner.serving.worker import Apart


def run(talk: Callable[[], Awaitable[Any]], seconds: float = 300) -> Any:
    return asyncio.run(asyncio.wait_for(talk(), seconds))


async def steps(engine: Engine, markers: list[float], label: str = "a") -> list[Reply]:
    episode = engine.open(label)
    done = [await engine.act(episode, seen(marker)) for marker in markers]
    await engine.end(episode)
    return done


@contextlib.contextmanager
def impatient(engine: Engine) -> Iterator[None]:
    """A pass that begins in the block may take a second; others a minute: the machine is busy."""
    apart: Any = engine._lanes[0].worker
    patient, apart._watchdog_s = apart._watchdog_s, 1.0
    try:
        yield
    finally:
        apart._watchdog_s = patient


# -- answers -------------------------------------------------------------------------------------


def test_an_answer_says_what_it_is_worth() -> None:
    async def talk() -> list[Reply]:
        engine = Engine(Scripted())
        await engine.start()
        assert engine.ready
        return await steps(engine, [1, 2, 3, 4, 5])

    replies = run(talk)
    for number, reply in enumerate(replies):
        full = number < WARM_UP
        assert reply.actions.shape == (HORIZON, DIM) and reply.actions.dtype == np.float32
        assert (reply.warm_up, reply.keep, reply.tokens) == (
            full,
            1.0 if full else 0.25,
            100 if full else 25,
        )
        assert not reply.late and reply.valid == HORIZON
        assert reply.age_s >= 0 and reply.method == "scripted" and reply.infer_ms > 0
    assert [reply.actions[0, 0] for reply in replies] == [1, 3, 6, 10, 15]


def test_warm_up_rows_and_pruned_rows_never_share_a_pass() -> None:
    served = Scripted(seconds=0.002)

    async def client(engine: Engine, number: int, starts: float) -> None:
        await asyncio.sleep(starts)
        await steps(engine, [number] * 12, str(number))

    async def talk() -> None:
        engine = Engine(served, batch=8)
        await engine.start()
        served.passes.clear()
        random = np.random.default_rng(0)
        await asyncio.gather(*(client(engine, n, random.uniform(0, 0.1)) for n in range(16)))

    run(talk)
    assert all(len(set(rows)) == 1 for rows in served.passes)
    assert max(len(rows) for rows in served.passes) > 1
    assert max(len(rows) for rows in served.passes) <= 8
    assert sum(len(rows) for rows in served.passes) == 16 * 12


def test_the_oldest_row_is_in_the_next_pass_and_long_prompts_are_by_themselves() -> None:
    class Waiting:
        def __init__(self, number: int, warm_up: bool, text: int) -> None:
            self.number, self.warm_up, self.text = number, warm_up, text

    random = np.random.default_rng(0)
    for _ in range(50):
        rows = [
            Waiting(n, bool(random.integers(2)), int(random.choice([5, 30, 900])))
            for n in range(int(random.integers(1, 30)))
        ]
        chosen = next_pass(rows, 4)
        assert chosen[0] is rows[0] and len(chosen) <= 4
        assert len({kind(row) for row in chosen}) == 1
        assert [row.number for row in chosen] == sorted(row.number for row in chosen)
    assert next_pass([], 4) == []


def test_two_hundred_episodes_at_once_are_as_if_alone() -> None:
    """By value: every action holds the sum of its own episode's markers, and no other's."""
    served = Scripted(seconds=0.001)
    random = np.random.default_rng(1)
    plans = [random.integers(1, 10_000, random.integers(1, 9)).tolist() for _ in range(200)]

    async def client(engine: Engine, number: int) -> None:
        await asyncio.sleep(float(random.uniform(0, 0.3)))
        for _ in range(2):
            replies = await steps(engine, plans[number], str(number))
            got = [float(reply.actions[0, 0]) for reply in replies]
            assert got == np.cumsum(plans[number]).tolist(), number

    async def talk() -> Engine:
        engine = Engine(served, batch=16)
        await engine.start()
        await asyncio.gather(*(client(engine, number) for number in range(200)))
        await asyncio.sleep(0.05)
        return engine

    engine = run(talk)
    assert engine.metrics.get("episodes") == 0
    assert not served.memory, "episodes that ended are forgotten"


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("nan", Failed, "NaN or infinite"),
        ("raise", Failed, "the policy failed"),
        ("refuse", Refused, "does not do that"),
    ],
)
def test_a_bad_row_is_an_error_for_its_client_alone(text: str, kind: type, said: str) -> None:
    async def talk() -> None:
        engine = Engine(Scripted(seconds=0.01), batch=8)
        await engine.start()
        episodes = [engine.open(str(n)) for n in range(6)]
        for turn in range(1, 4):
            told = [text if n == 2 and turn == 2 else "go" for n in range(6)]
            found = await asyncio.gather(
                *(engine.act(e, seen(1, t)) for e, t in zip(episodes, told, strict=True)),
                return_exceptions=True,
            )
            for number, reply in enumerate(found):
                if told[number] != "go":
                    assert isinstance(reply, kind), reply
                    assert said in str(reply) and len(str(reply)) < 600
                else:
                    assert np.isfinite(reply.actions).all()
                    if number != 2:
                        assert reply.actions[0, 0] == turn

    run(talk)


def test_what_the_limits_refuse_never_reaches_the_policy() -> None:
    served = Scripted()

    async def talk() -> None:
        engine = Engine(served, Limits(text=10, episodes=3))
        await engine.start()
        served.passes.clear()
        episode = engine.open()
        with pytest.raises(Refused, match="at most 10"):
            await engine.act(episode, seen(1, "a" * 11))
        with pytest.raises(Refused, match="finite"):
            await engine.act(episode, seen(float("nan")))
        engine.open(), engine.open()
        with pytest.raises(Busy, match="3 episodes are open"):
            engine.open()
        await engine.end(episode)
        engine.open("x" * 10**6)
        with pytest.raises(Refused, match="is over"):
            await engine.act(episode, seen(1))
        assert engine.metrics.get("errors_total", "refused") == 3

    run(talk)
    assert served.passes == []


def test_an_episode_takes_one_observation_at_a_time() -> None:
    async def talk() -> None:
        engine = Engine(Scripted(seconds=0.05))
        await engine.start()
        episode = engine.open()
        first = asyncio.create_task(engine.act(episode, seen(1)))
        await asyncio.sleep(0.01)
        with pytest.raises(Refused, match="one observation at a time"):
            await engine.act(episode, seen(2))
        assert (await first).actions[0, 0] == 1

    run(talk)


# -- deadlines -----------------------------------------------------------------------------------


def test_a_late_answer_is_the_rest_of_the_last_chunk_with_its_age() -> None:
    async def talk() -> None:
        engine = Engine(Scripted(warm_up=0), deadline_s=0.15, execute=1)
        await engine.start()
        episode = engine.open()
        fresh = await engine.act(episode, seen(1))
        assert not fresh.late and fresh.valid == HORIZON
        began = asyncio.get_running_loop().time()
        late = await engine.act(episode, seen(2, "sleep 0.4"))
        took = asyncio.get_running_loop().time() - began
        assert late.late and took < 0.15 + 2  # Loose: machines that test are busy.
        assert np.array_equal(late.actions, fresh.actions[1:]) and late.valid == HORIZON - 1
        assert late.age_s >= 0.15
        # The slow answer has come meanwhile: what is left of it counts from its own observation.
        await asyncio.sleep(0.6)
        again = await engine.act(episode, seen(3, "sleep 0.4"))
        assert again.late and again.actions[0].tolist() == [3, 1] and again.valid == HORIZON - 1
        assert engine.metrics.get("answers_total", "late") == 2

    run(talk)


def test_a_late_first_answer_holds_nothing_rather_than_something_wrong() -> None:
    async def talk() -> None:
        engine = Engine(Scripted())
        await engine.start()
        late = await engine.act(engine.open(), seen(1, "sleep 0.3"), deadline_s=0.02)
        assert late.late and late.valid == 0 and late.actions.shape == (0, DIM)

    run(talk)


def test_chunks_run_out_when_the_policy_stays_late() -> None:
    async def talk() -> None:
        engine = Engine(Scripted(), execute=2)
        await engine.start()
        episode = engine.open()
        await engine.act(episode, seen(1))
        got = [await engine.act(episode, seen(2, "sleep 0.5"), deadline_s=0.03) for _ in range(4)]
        assert [reply.valid for reply in got] == [2, 0, 0, 0]
        assert all(reply.late for reply in got)

    run(talk)


def test_the_newest_observation_replaces_one_that_still_waits() -> None:
    served = Scripted(warm_up=0)

    async def talk() -> None:
        engine = Engine(served, batch=1)
        await engine.start()
        blocker, episode = engine.open("blocker"), engine.open("episode")
        slow = asyncio.create_task(engine.act(blocker, seen(100, "sleep 0.3")))
        await asyncio.sleep(0.05)
        for marker in (1, 2, 3):
            assert (await engine.act(episode, seen(marker), deadline_s=0.02)).late
        await slow
        reply = await engine.act(episode, seen(10))
        assert reply.actions[0, 0] in (13, 10), "observations 1 and 2 were never worth a pass"

    run(talk)


# -- the ladder ----------------------------------------------------------------------------------


def test_the_engine_keeps_fewer_tokens_when_it_would_be_late() -> None:
    rungs = [Rung("none", 1.0, 100.0), Rung("vla-pruner", 0.5, 60.0)]

    async def talk(served: Scripted, deadline: float) -> Engine:
        engine = Engine(
            served, deadline_s=deadline, ladder=Ladder(rungs, deadline, least=4, patience=20)
        )
        await engine.start()
        await steps(engine, [1.0] * 12)
        return engine

    slow = Scripted(seconds=0.1)
    engine = run(lambda: talk(slow, 0.1))
    assert slow.budgets[0] == ("none", 1.0) and slow.budgets[1] == ("vla-pruner", 0.5)
    assert engine.metrics.get("rung_changes_total", "down") == 1
    quick = Scripted()
    run(lambda: talk(quick, 60.0))
    assert quick.budgets == [("none", 1.0)]


# -- the end -------------------------------------------------------------------------------------


def test_draining_answers_what_runs_and_refuses_what_comes() -> None:
    async def talk() -> None:
        engine = Engine(Scripted())
        await engine.start()
        episode, other = engine.open(), engine.open()
        running = asyncio.create_task(engine.act(episode, seen(1, "sleep 0.2")))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(engine.drain(10))
        await asyncio.sleep(0.01)
        assert not engine.ready
        with pytest.raises(Busy, match="closing"):
            await engine.act(other, seen(1))
        with pytest.raises(Busy, match="closing"):
            engine.open()
        assert (await running).actions[0, 0] == 1
        await closing

    run(talk)


def test_draining_ends_in_time_even_if_a_pass_does_not() -> None:
    async def talk() -> None:
        engine = Engine(Scripted(), batch=1)
        await engine.start()
        slow, waits = (
            asyncio.create_task(engine.act(engine.open(), seen(1, text)))
            for text in ("sleep 1.5", "go")
        )
        await asyncio.sleep(0.05)
        await engine.drain(0.1)
        for either in (waits, slow):  # a client that waited for ever would keep its door open
            with pytest.raises(Busy, match="closing"):
                await either

    run(talk)


def test_an_engine_starts_again_in_another_loop() -> None:
    engine = Engine(Scripted())

    async def talk() -> float:
        await engine.start()
        return float((await steps(engine, [5]))[0].actions[0, 0])

    assert [run(talk), run(talk)] == [5, 5]


@pytest.mark.parametrize(
    "options",
    [{"batch": 0}, {"replicas": 0}, {"execute": 0}, {"deadline_s": 0.0}, {"wait_s": -1.0}]
    + [{name: float("nan")} for name in ("deadline_s", "wait_s", "watchdog_s")],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least|above 0"):
        Engine(Scripted(), **options)


def test_replicas_need_to_be_made_in_their_processes() -> None:
    with pytest.raises(ValueError, match="give what makes the policy"):
        Engine(Scripted(), replicas=2)


# -- processes -----------------------------------------------------------------------------------


def test_a_hung_pass_is_a_typed_error_and_the_others_go_on() -> None:
    async def talk() -> None:
        engine = Engine(Scripted, watchdog_s=60, batch=1)
        await engine.start()
        one, other = engine.open("one"), engine.open("other")
        for marker in (1, 2, 3, 4):
            await engine.act(other, seen(marker))
        assert (await engine.act(one, seen(100))).warm_up
        with impatient(engine), pytest.raises(Hung, match=r"did not answer within 1 s"):
            await engine.act(one, seen(7, "hang"))
        reply = await engine.act(other, seen(50))
        assert reply.actions[0, 0] == 50 and reply.warm_up, "a new history, nobody else's"
        assert (await engine.act(one, seen(9))).actions[0, 0] == 9
        assert engine.metrics.get("worker_restarts_total") == 1
        await engine.drain(5)

    run(talk)


def test_a_client_that_was_told_late_hears_that_its_worker_hung() -> None:
    async def talk() -> None:
        engine = Engine(Scripted, watchdog_s=60, deadline_s=0.1)
        await engine.start()
        episode = engine.open()
        await engine.act(episode, seen(1), deadline_s=100)
        with impatient(engine):
            assert (await engine.act(episode, seen(7, "hang"))).late
            while engine._episodes[episode].lost is None:
                await asyncio.sleep(0.02)
        with pytest.raises(Hung, match="start the episode anew"):
            await engine.act(episode, seen(8))
        assert (await engine.act(episode, seen(9), deadline_s=100)).actions[0, 0] == 9
        await engine.drain(5)

    run(talk)


def test_a_replica_that_dies_costs_its_own_episodes_alone() -> None:
    async def talk() -> None:
        engine = Engine(Scripted, replicas=2, watchdog_s=20)
        await engine.start()
        one, other = engine.open("one"), engine.open("other")
        for marker in (1, 2, 3, 4):
            await asyncio.gather(engine.act(one, seen(marker)), engine.act(other, seen(marker)))
        with pytest.raises(Hung, match="died"):
            await engine.act(one, seen(1, "die"))
        living = engine._episodes[other].lane
        assert engine._episodes[one].lane is living, "it need not wait for the new process"
        assert engine._episodes[engine.open("new")].lane is living
        reply = await engine.act(other, seen(5))
        assert reply.actions[0, 0] == 15 and not reply.warm_up, "its history is where it was"
        again = await engine.act(one, seen(6))
        assert again.actions[0, 0] == 6 and again.warm_up
        await engine.drain(5)

    run(talk)


def test_a_worker_that_dies_while_the_server_ends_is_not_replaced() -> None:
    async def talk() -> None:
        engine = Engine(Scripted, replicas=1, watchdog_s=60, batch=1)
        await engine.start()
        one, other = engine.open("one"), engine.open("other")
        dying = asyncio.create_task(engine.act(one, seen(1, "die")))
        behind = asyncio.create_task(engine.act(other, seen(7)))
        await asyncio.sleep(0)
        await engine.drain(60)
        with pytest.raises(Hung, match="died"):
            await dying
        with pytest.raises(Busy, match="closing"):
            await behind
        assert engine.metrics.get("worker_restarts_total") == 0
        assert engine.ended(60)

    run(talk)


def test_what_waits_at_a_replica_that_is_gone_is_asked_elsewhere() -> None:
    async def talk() -> None:
        engine = Engine(Scripted, replicas=2, watchdog_s=60, batch=1)
        await engine.start()
        keys = [engine.open(str(number)) for number in range(4)]  # 0 and 2 at one, 1 and 3
        dying = asyncio.create_task(engine.act(keys[0], seen(1, "die")))
        behind = asyncio.create_task(engine.act(keys[2], seen(7)))
        with pytest.raises(Hung, match="died"):
            await dying
        reply = await behind
        assert reply.actions[0, 0] == 7 and reply.warm_up
        await engine.drain(5)
        assert engine.ended(60)

    run(talk)


def test_a_worker_that_does_not_even_read_is_replaced() -> None:
    async def talk() -> None:
        engine = Engine(Scripted, watchdog_s=60)
        await engine.start()
        episode = engine.open()
        await engine.act(episode, seen(1))
        apart: Any = engine._lanes[0].worker
        os.kill(apart._process.pid, signal.SIGSTOP)
        large = seen(2) | {"images": [np.zeros((512, 512, 3), np.uint8)]}
        with impatient(engine), pytest.raises(Hung, match="is replaced"):
            await engine.act(episode, large)
        assert (await engine.act(episode, seen(3))).actions[0, 0] == 3
        await engine.drain(5)

    run(talk)


def test_a_process_that_does_not_begin_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of all waits until what it is a copy of has imported its packages."""
    go_on = threading.Event()
    apart = Apart(Scripted)
    begin = apart._context.Process.start
    monkeypatch.setattr(worker, "START_S", 0.2)
    monkeypatch.setattr(apart._context.Process, "start", lambda _: go_on.wait(60))
    with pytest.raises(Hung, match=r"no process began within 0\.2 s"):
        apart.start()
    go_on.set()
    monkeypatch.setattr(apart._context.Process, "start", begin)
    monkeypatch.setattr(worker, "START_S", 300.0)
    assert apart.start() == (True, DIM)
    apart.close()


def test_a_worker_that_stops_within_its_answer_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_apart", stops_in_its_answer)
    apart = Apart(Scripted, watchdog_s=0.5)
    with pytest.raises(Hung, match="died"):
        apart.start()


def broken() -> Scripted:
    raise ValueError("there is no such policy")


def test_a_policy_that_cannot_be_made_is_said_at_the_start() -> None:
    with pytest.raises(RuntimeError, match="there is no such policy"):
        run(lambda: Engine(broken).start())


def test_a_start_that_fails_is_not_ready_and_says_so_again() -> None:
    async def talk() -> None:
        engine = Engine(broken)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no such policy"):
                await engine.start()
        assert not engine.ready

    run(talk)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--ray-gpus 1", "--ray-gpus: say with --ray"),
        ("--ray auto --ray-gpus 1.5", "--ray-gpus 1.5: Ray reserves a share of one GPU, or whole"),
        ("--watchdog-s 9", "nothing can replace the thread of this process"),
        ("--ladder nowhere", "--ladder: say with --deadline-ms"),
        ("--ladder nowhere --deadline-ms 9", "nowhere cannot be read as a receipt"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_policy_is_made(words: str, said: str) -> None:
    parser = argparse.ArgumentParser()
    engine_options(parser)
    with pytest.raises(ValueError, match=said):
        engine_from(parser.parse_args(words.split()), broken)
