"""The protocols' own clients, in an environment of theirs, get what the policy itself would say."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "models" / "openvla"))
sys.path.append(str(Path(__file__).parents[1] / "doors"))

pytest.importorskip("zmq", reason="pip install 'vla-pruner[doors]'")

from talking import ROBOT, near, opened
from tiny_openvla import make_oft, picture

from vla_pruner.doors.act import ActDoor
from vla_pruner.doors.door import Listen
from vla_pruner.doors.gr00t import Gr00tDoor
from vla_pruner.doors.keys import KEYS, with_gripper
from vla_pruner.doors.openpi import OpenpiDoor
from vla_pruner.serving.engine import Engine
from vla_pruner.serving.policy import ServedPolicy

PYTHON = os.environ.get("CLIENTS_PYTHON")
EPISODES, STEPS = 4, 50
DOORS: dict[str, Any] = {
    "openpi": lambda engine: OpenpiDoor(engine, Listen(), ROBOT, KEYS["libero"]),
    "act": lambda engine: ActDoor(engine, Listen(), ROBOT),
    "gr00t": lambda engine: Gr00tDoor(engine, Listen(), ROBOT),
}


@pytest.fixture(scope="module")
def served() -> Any:
    policy = make_oft(num_images=2, proprio_dim=8)
    made = ServedPolicy(policy, "vla-pruner", keep=0.25, unnorm_key="pick_place")
    yield made
    made.close()


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """200 observations, by episode."""
    count = EPISODES * STEPS
    images = [[picture(2 * number), picture(2 * number + 1)] for number in range(count)]
    state = np.random.default_rng(0).uniform(-0.4, 0.4, (count, 8)).astype(np.float32)
    episode = np.repeat(np.arange(EPISODES), STEPS)
    return {"images": np.array(images), "state": state, "episode": episode}


@pytest.fixture(scope="module")
def direct(served: Any, rows: dict[str, np.ndarray]) -> np.ndarray:
    """What the policy says to them, without engine and door."""
    keys = [served.start(str(number)) for number in range(EPISODES)]
    made = []
    for number, images, state in zip(rows["episode"], rows["images"], rows["state"], strict=True):
        seen = {"images": list(images), "instruction": "pick up the can"}
        seen["proprio"] = state.astype(np.float64)
        made.append(served.act([keys[number]], [seen])[0])
    return np.stack(made)


@pytest.mark.skipif(
    PYTHON is None, reason="their clients need their own environment: make test-clients"
)
@pytest.mark.parametrize("protocol", ["openpi", "act-openvla", "act-oft", "act-encoded", "gr00t"])
def test_200_answers_are_those_of_the_policy(
    served: Any, rows: dict[str, np.ndarray], direct: np.ndarray, protocol: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "rows.npz", **rows)
    script = Path(__file__).with_name("ask.py")

    async def run() -> int:
        engine = Engine(served)
        await engine.start()
        door = DOORS[protocol.partition("-")[0]](engine)
        async with opened(door) as address:
            files = str(tmp_path / "rows.npz"), str(tmp_path / "answers.npy")
            environment = {**os.environ, "PYTHONPATH": ""}
            client = await asyncio.create_subprocess_exec(
                str(PYTHON), str(script), protocol, address, *files, env=environment
            )
            return await client.wait()

    assert asyncio.run(run()) == 0
    answers = np.load(tmp_path / "answers.npy")
    wanted = with_gripper(direct, "rlds", "robosuite") if protocol == "openpi" else direct
    assert len(answers) == 200 and near(answers, wanted)


def test_200_answers_of_vla_eval(
    served: Any, rows: dict[str, np.ndarray], direct: np.ndarray
) -> None:
    """Its client is in our own environment."""
    pytest.importorskip("vla_eval", reason="vla-eval is missing: pip install 'vla-pruner[serve]'")
    from vla_eval.connection import Connection

    from vla_pruner.doors.run import VlaEvalDoor
    from vla_pruner.serving.server import PolicyServer

    server = PolicyServer(
        served.policy, chunk_size=1, unnorm_key="pick_place", engine=Engine(served)
    )

    async def run() -> list[np.ndarray]:
        made = []
        async with opened(VlaEvalDoor(server, Listen())) as address:
            connection = Connection(address, timeout=60, max_retries=1)
            await connection.connect()
            for number, (images, state) in enumerate(
                zip(rows["images"], rows["state"], strict=True)
            ):
                if number % STEPS == 0:
                    task = {"name": "a task", "episode_idx": number // STEPS}
                    await connection.start_episode({"task": task})
                views = {"agentview": images[0], "wrist": images[1]}
                seen = {"images": views, "task_description": "pick up the can"}
                reply = await connection.act(seen | {"states": state.astype(np.float64)})
                made.append(reply["actions"])
            await connection.close()
        return made

    assert near(asyncio.run(run()), with_gripper(direct[:, 0], "rlds", "robosuite"))


PAGES = {
    "client": ("openpi", sys.executable, "ws://127.0.0.1:8000"),
    "gr00t": ("gr00t", sys.executable, "tcp://127.0.0.1:5555"),
    "openpi": ("openpi", PYTHON, "ws://127.0.0.1:8000"),
    "act": ("act", PYTHON, "http://127.0.0.1:8000/act"),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_example_of_its_page_runs(served: Any, page: str) -> None:
    root = Path(__file__).parents[2]
    door, python, usual = PAGES[page]
    if python is None:
        pytest.skip("this client needs its own environment: make test-clients")
    text = (root / "docs" / "serve" / f"{page}.md").read_text("utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert usual in code

    async def run() -> tuple[int, str]:
        engine = Engine(served)
        await engine.start()
        async with opened(DOORS[door](engine)) as address:
            client = await asyncio.create_subprocess_exec(
                python,
                "-c",
                code.replace(usual, address),
                env={**os.environ, "PYTHONPATH": str(root / "clients/python/src")},
                stdout=asyncio.subprocess.PIPE,
            )
            said, _ = await client.communicate()
            return client.returncode or 0, said.decode()

    status, said = asyncio.run(run())
    assert status == 0
    assert {"client": "vla-pruner", "gr00t": "(1, 4, 1) 1.0"}.get(page, " 1.0") in said
