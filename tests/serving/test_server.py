"""Over the wire: a served policy answers as the policy does, and episodes stay apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import numpy as np
import pytest

pytest.importorskip("vla_eval", reason="vla-eval is missing: pip install 'vla-pruner[serve]'")

from wire import act, ask, client, lone_run, message, start

STEPS = [1, 2, 3, 4, 5]
"""More than the three steps that `vla-pruner` takes on all tokens."""
OTHERS = [11, 12, 13, 14, 15]


def same(got: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return np.allclose(np.stack(got), np.stack(wanted), rtol=0, atol=1e-5)


def test_answers_are_those_of_the_policy_itself(open_server: Callable) -> None:
    server = open_server()

    async def talk(url: str) -> list[np.ndarray]:
        async with client(url) as connection:
            return await act(connection, STEPS)

    assert same(ask(server, talk), lone_run(server, STEPS))


def test_a_new_episode_forgets_the_one_before(open_server: Callable) -> None:
    server = open_server()

    async def talk(url: str) -> list[list[np.ndarray]]:
        async with client(url) as connection:
            first = await act(connection, STEPS)
            continued = await act(connection, STEPS)
            await start(connection)
            return [first, continued, await act(connection, STEPS)]

    first, continued, anew = ask(server, talk)
    assert same(anew, first)
    assert not same(continued, first)


def test_interleaved_clients_are_as_if_alone(open_server: Callable) -> None:
    server = open_server()

    async def talk(url: str) -> list[np.ndarray]:
        async with client(url) as one, client(url, "another task") as other:
            pairs = [
                await act(one, [left]) + await act(other, [right])
                for left, right in zip(STEPS, OTHERS, strict=True)
            ]
        return [action for pair in pairs for action in pair]

    answers = ask(server, talk)
    assert same(answers[::2], lone_run(server, STEPS))
    assert same(answers[1::2], lone_run(server, OTHERS))


def test_clients_that_share_passes_are_as_if_alone(open_server: Callable) -> None:
    server = open_server(max_batch_size=3, max_wait_time=1.0)
    sizes: list[int] = []
    step = server.served.step
    server.served.step = lambda keys, rows: sizes.append(len(rows)) or step(keys, rows)
    runs = [STEPS, OTHERS, [*OTHERS[:2], *STEPS]]
    answers: dict[int, list[np.ndarray]] = {}

    async def talk(url: str) -> None:
        async def one(number: int) -> None:
            async with client(url, episode=number) as connection:
                answers[number] = await act(connection, runs[number])

        async with anyio.create_task_group() as group:
            for number in range(len(runs)):
                group.start_soon(one, number)

    ask(server, talk)
    assert max(sizes) > 1
    for number, steps in enumerate(runs):
        assert same(answers[number], lone_run(server, steps))


def test_a_batch_equals_single_calls(open_server: Callable) -> None:
    served = open_server().served
    rows = [
        {
            "images": list(message(seed)["images"].values()),
            "instruction": text,
            "proprio": message(seed)["states"],
        }
        for seed, text in [(1, "pick up the can"), (2, "lift the milk now"), (3, "lift the can")]
    ]
    together = [served.start(f"task/{row}") for row in range(3)]
    apart = [served.start(f"task/{row}") for row in range(3)]
    for _ in range(5):
        batch = served.act(together, rows)
        singles = [
            served.act([episode], [row])[0] for episode, row in zip(apart, rows, strict=True)
        ]
        assert batch.shape == (3, 4, 7)
        assert same(list(batch), singles)
    assert served.session.last.visual_kept < served.session.last.visual_full


def test_rows_may_come_and_go_between_calls(open_server: Callable) -> None:
    served = open_server(policy=None).served
    row = {
        "images": list(message(1)["images"].values()),
        "instruction": "pick up the can",
        "proprio": message(1)["states"],
    }
    early, late, alone = (served.start("task/0") for _ in range(3))
    wanted = [served.act([alone], [row])[0] for _ in range(5)]
    got = [served.act([early], [row])[0]]
    got += [served.act([late, early], [row, row])[1] for _ in range(2)]
    served.end(late)
    got += [served.act([early], [row])[0], served.act([early], [row])[0]]
    assert same(got, wanted)


def test_an_episode_takes_one_step_at_a_time(open_server: Callable) -> None:
    served = open_server().served
    episode = served.start("task/0")
    with pytest.raises(ValueError, match="one step at a time"):
        served.act([episode, episode], [{}, {}])


def test_the_same_episode_draws_the_same_random_tokens(open_server: Callable) -> None:
    server = open_server(method="random")

    async def talk(url: str) -> list[list[np.ndarray]]:
        runs = []
        for episode in (0, 0, 1):
            async with client(url, episode=episode) as connection:
                runs.append(await act(connection, STEPS[:2]))
        return runs

    first, again, other = ask(server, talk)
    assert same(again, first)
    assert not same(other, first)


def test_a_chunk_is_handed_out_action_by_action(open_server: Callable) -> None:
    server = open_server(chunk_size=2)

    calls: list[int] = []
    server.served.policy.language_model.model.register_forward_hook(lambda *_: calls.append(1))

    async def talk(url: str) -> list[np.ndarray]:
        calls.clear()  # Those of the warm-up.
        async with client(url) as connection:
            return await act(connection, [1, 2, 3, 4])

    answers = ask(server, talk)
    assert len(calls) == 2
    assert all(action.shape == (7,) for action in answers)


def test_a_policy_with_one_camera_and_one_action(open_server: Callable, openvla: Any) -> None:
    server = open_server(openvla, chunk_size=None)
    assert server.chunk_size == 1

    async def talk(url: str) -> list[np.ndarray]:
        async with client(url) as connection:
            return await act(connection, STEPS)

    answers = ask(server, talk)
    session = server.served.session
    session.reset()
    session.episodes(None)
    wanted = [
        openvla.predict_action(
            message(seed)["images"]["agentview"],
            message(seed)["task_description"],
            unnorm_key="pick_place",
        )
        for seed in STEPS
    ]
    assert same(answers, list(server.translator.actions(np.stack(wanted))))


# -- faults --------------------------------------------------------------------------------------


def test_an_observation_needs_an_episode(open_server: Callable) -> None:
    async def talk(url: str) -> None:
        async with client(url, task=None) as connection:
            with pytest.raises(RuntimeError, match="before EPISODE_START"):
                await connection.act(message(1))

    ask(open_server(), talk)


def test_a_bad_message_is_an_error_for_its_sender_alone(open_server: Callable) -> None:
    server = open_server(max_batch_size=2, max_wait_time=0.05)
    bad = message(1)
    del bad["images"]["wrist"]

    async def talk(url: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        async with client(url) as one, client(url) as other:
            answers = await act(other, STEPS[:2])
            with pytest.raises(RuntimeError, match=r"no image of wrist.*send_wrist_image=True"):
                await one.act(bad)
            answers += await act(other, STEPS[2:])
            return answers, await act(one, STEPS)

    answers, after_error = ask(server, talk)
    wanted = lone_run(server, STEPS)
    assert same(answers, wanted)
    assert same(after_error, wanted)


def test_a_client_that_dies_leaves_the_server_alive(open_server: Callable) -> None:
    server = open_server()

    async def talk(url: str) -> list[np.ndarray]:
        async with client(url) as other:
            answers = await act(other, STEPS[:2])
            async with client(url) as doomed:
                await act(doomed, OTHERS)
                assert server.engine.metrics.get("episodes") == 2
                doomed._ws.transport.abort()
            with anyio.fail_after(30):
                while server.engine.metrics.get("episodes") > 1:
                    await anyio.sleep(0.01)
            return answers + await act(other, STEPS[2:])

    assert same(ask(server, talk), lone_run(server, STEPS))
    assert server.engine.metrics.get("episodes") == 0


@pytest.mark.parametrize("ids", [("s", "e", "s", "e"), ("1", "x", "2", "x"), ("s", "1", "s", "2")])
def test_ids_that_clients_share_mix_nothing(open_server: Callable, ids: tuple[str, ...]) -> None:
    server = open_server(chunk_size=2)

    async def begin(connection: Any, sid: str, eid: str) -> None:
        task = {"name": "a task", "episode_idx": 0}
        await connection.start_episode({"task": task, "recording": {"sid": sid, "eid": eid}})

    async def talk(url: str) -> list[np.ndarray]:
        async with client(url, task=None) as one, client(url, task=None) as other:
            await begin(one, *ids[:2])
            await begin(other, *ids[2:])
            answers = []
            for left, right in zip(STEPS, OTHERS, strict=True):
                answers += await act(one, [left]) + await act(other, [right])
            await other.end_episode({})
            return answers + await act(one, [6, 7])

    answers = ask(server, talk)

    async def alone(url: str) -> list[np.ndarray]:
        async with client(url) as one:
            first = await act(one, [*STEPS, 6, 7])
        async with client(url) as one:
            return first + await act(one, OTHERS)

    wanted = ask(server, alone)
    assert same(answers[:10:2] + answers[10:], wanted[:7])
    assert same(answers[1:10:2], wanted[7:])
