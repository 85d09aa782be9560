"""What benchmarks send becomes what policies read, and back; what does not fit is refused."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("vla_eval", reason="vla-eval is missing: pip install 'vla-pruner[serve]'")
pytest.importorskip("scipy", reason="scipy comes with the simulator: pip install 'vla-pruner[sim]'")

from scipy.spatial.transform import Rotation
from tiny_openvla import make_oft
from vla_eval.benchmarks.libero import LIBEROBenchmark
from vla_eval.benchmarks.simpler import SimplerEnvBenchmark
from vla_eval.specs import DimSpec, check_specs
from wire import act, ask, client, message

from vla_pruner.serving.conventions import CONVENTIONS, Translator, through_jpeg
from vla_pruner.serving.pickplace import PickPlaceBenchmark

SIMPLER_INSTRUCTIONS = {
    "google_robot_move_near_v0": "move coke can near apple",
    "google_robot_pick_coke_can": "pick coke can",
    "google_robot_open_drawer": "open top drawer",
    "google_robot_close_drawer": "close middle drawer",
}


def translator(name: str, cameras: int = 1, state_dim: int | None = None, **more: Any) -> Any:
    return Translator(CONVENTIONS[name], cameras, state_dim, more.pop("gripper", "rlds"), **more)


def simpler_message(task: str, seed: int = 0) -> dict[str, Any]:
    """As vla-eval's SIMPLER class makes it for the Google robot: one 640 x 512 camera."""
    image = np.random.default_rng(seed).integers(0, 256, (512, 640, 3), dtype=np.uint8)
    return {
        "images": {"primary": image},
        "task_description": SIMPLER_INSTRUCTIONS[task],
        "task_name": task,
    }


# -- declared ------------------------------------------------------------------------------------


def mismatches(spoken: Translator, benchmark: Any) -> list[str]:
    def travelled(spec: dict[str, DimSpec]) -> dict[str, DimSpec]:
        return {name: DimSpec.from_dict(entry.to_dict()) for name, entry in spec.items()}

    return check_specs(
        travelled(spoken.action_spec()),
        benchmark.get_action_spec(),
        travelled(spoken.observation_spec()),
        benchmark.get_observation_spec(),
    )


@pytest.mark.parametrize(("cameras", "state_dim"), [(1, None), (2, None), (2, 8)])
@pytest.mark.parametrize(
    ("name", "benchmark"), [("libero", LIBEROBenchmark), ("pickplace", PickPlaceBenchmark)]
)
def test_the_benchmark_sends_what_the_server_asks_for(
    name: str, benchmark: Any, cameras: int, state_dim: int | None
) -> None:
    spoken = translator(name, cameras, state_dim)
    assert mismatches(spoken, benchmark(**spoken.observation_params())) == []
    if cameras > 1:
        assert any("wrist" in found for found in mismatches(spoken, benchmark()))


@pytest.mark.parametrize("name", ["simpler-google", "simpler-widowx"])
def test_simpler_agrees_with_the_server(name: str) -> None:
    spoken = translator(name)
    benchmark = SimplerEnvBenchmark("google_robot_pick_coke_can", **spoken.observation_params())
    assert mismatches(spoken, benchmark) == []


@pytest.mark.parametrize(
    ("name", "cameras", "state_dim", "said"),
    [
        ("libero", 3, None, "sees 3 cameras; libero shows 2: agentview, wrist"),
        ("simpler-google", 2, None, "sees 2 cameras; simpler-google shows 1"),
        ("simpler-google", 1, 8, "simpler-google sends none"),
        ("libero", 1, 14, "state of 14 numbers; libero sends 8"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(
    name: str, cameras: int, state_dim: int | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        translator(name, cameras, state_dim)


# -- observations --------------------------------------------------------------------------------


def test_cameras_come_in_the_order_of_the_policy() -> None:
    sent = message(3)
    sent["images"] = dict(reversed(sent["images"].items()))
    seen = translator("libero", 2, 8).observation(sent)
    assert np.array_equal(seen["images"][0], sent["images"]["agentview"])
    assert np.array_equal(seen["images"][1], sent["images"]["wrist"])
    assert np.array_equal(seen["proprio"], sent["states"])
    assert "proprio" not in translator("libero", 2).observation(sent)


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    sent = message(1)
    change(sent)
    return sent


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sent: sent.pop("images"), "must map camera names to images; got NoneType"),
        (lambda sent: sent["images"].pop("wrist"), "no image of wrist.*send_wrist_image=True"),
        (lambda sent: sent.pop("states"), "no 'states'; run the benchmark with send_state=True"),
        (lambda sent: sent.update(states=np.zeros(7)), r"shape \(7,\); expected \(8,\)"),
        (lambda sent: sent.update(states=np.full(8, np.nan)), "not finite"),
        (lambda sent: sent.update(states={}), "must be a list of numbers"),
        (lambda sent: sent.update(states=["1.5"] * 8), "must be a list of numbers"),
        (lambda sent: sent.update(states=[[1.0], 2.0]), "must be a list of numbers"),
        (lambda sent: sent.update(states=[10**400] * 8), "must be a list of numbers"),
        (lambda sent: sent.update(states=np.zeros(8, bool)), "must be a list of numbers"),
        (lambda sent: sent.update(task_description=" "), "must be a sentence"),
        (
            lambda sent: sent["images"].update(wrist=np.zeros((48, 48, 3))),
            "'wrist' must be uint8; got float64",
        ),
        (
            lambda sent: sent["images"].update(wrist=np.zeros((3, 48, 48), np.uint8)),
            r"'wrist' has shape \(3, 48, 48\); expected \(height, width, 3\)",
        ),
    ],
)
def test_a_message_that_does_not_fit_is_refused(change: Callable, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        translator("libero", 2, 8).observation(broken(change))


def test_a_side_that_jpeg_does_not_hold_is_the_clients_fault() -> None:
    with pytest.raises(ValueError, match="1 x 65501 pixels: JPEG holds sides of at most 65500"):
        through_jpeg(np.zeros((1, 65_501, 3), np.uint8))
    assert through_jpeg(np.zeros((1, 65_500, 3), np.uint8)).shape == (1, 65_500, 3)


def test_jpeg_changes_pixels_a_little_and_only_on_request() -> None:
    image = np.random.default_rng(0).integers(120, 136, (64, 64, 3), dtype=np.uint8)
    stored = through_jpeg(image)
    assert stored.shape == image.shape
    assert 0 < np.abs(stored.astype(int) - image).mean() < 8
    sent = message(1) | {"images": {"agentview": image}}
    assert np.array_equal(translator("libero").observation(sent)["images"][0], image)
    seen = translator("libero", jpeg=True).observation(sent)["images"][0]
    assert np.array_equal(seen, stored)


# -- actions -------------------------------------------------------------------------------------


def gripper(name: str, written: str, values: list[float]) -> list[float]:
    actions = np.zeros((len(values), 7))
    actions[:, 6] = values
    return translator(name, gripper=written).actions(actions)[:, 6].tolist()


def test_the_gripper_is_sent_as_the_benchmark_reads_it() -> None:
    assert gripper("libero", "rlds", [0.0, 1.0]) == [1.0, -1.0]
    assert gripper("libero", "robosuite", [1.0, -1.0]) == [1.0, -1.0]
    assert gripper("pickplace", "robosuite", [1.0, -1.0]) == [1.0, -1.0]
    assert gripper("simpler-google", "rlds", [0.0, 1.0]) == [0.0, 1.0]
    assert gripper("simpler-widowx", "robosuite", [1.0, -1.0]) == [0.0, 1.0]


def test_simpler_gets_axis_angle_and_the_others_what_the_policy_wrote() -> None:
    action = np.array([0.1, 0.2, 0.3, 0.4, -0.5, 0.6, 1.0])
    turned = translator("simpler-google").actions(action)[3:6]
    wanted = Rotation.from_euler("xyz", action[3:6]).as_rotvec()
    assert np.allclose(turned, wanted, atol=1e-6)
    assert not np.allclose(turned, action[3:6], atol=1e-2)
    assert np.allclose(translator("libero").actions(action)[:6], action[:6])


def test_actions_of_another_robot_are_refused() -> None:
    with pytest.raises(ValueError, match="actions of 14 values; libero takes 7"):
        translator("libero").actions(np.zeros((4, 14)))


# -- SIMPLER over the wire -----------------------------------------------------------------------


class Arm:
    """Stands in for the simulator behind SIMPLER's class: keeps the actions that reach it."""

    def __init__(self) -> None:
        self.actions: list[np.ndarray] = []

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        self.actions.append(action)
        return None, 0.0, False, False, {}


@pytest.mark.parametrize("task", SIMPLER_INSTRUCTIONS)
def test_simpler_messages_are_answered_with_actions_that_its_class_carries_out(
    open_server: Callable, openvla: Any, task: str
) -> None:
    server = open_server(openvla, benchmark="simpler-google", chunk_size=None)
    benchmark = SimplerEnvBenchmark(task, **server.get_observation_params())
    benchmark._env, benchmark._recorder = Arm(), _NoRecorder()
    sent = [simpler_message(task, seed) for seed in range(5)]

    async def talk(url: str) -> list[np.ndarray]:
        async with client(url, task) as connection:
            return [(await connection.act(seen))["actions"] for seen in sent]

    answers = ask(server, talk)
    for answer in answers:
        benchmark.step({"actions": answer})
    session, last = server.served.session, None
    session.reset()
    session.episodes(None)
    for seen, answer, done in zip(sent, answers, benchmark._env.actions, strict=True):
        wanted = openvla.predict_action(
            seen["images"]["primary"], seen["task_description"], unnorm_key="pick_place"
        )
        turn = Rotation.from_euler("xyz", wanted[3:6]).as_rotvec()
        opening = np.clip(wanted[6], 0, 1)
        change = 0.0 if last is None else last - opening
        last = opening
        assert np.allclose(answer, [*wanted[:3], *turn, (1 - change) / 2], atol=1e-5)
        assert np.allclose(done[:6], answer[:6])


class _NoRecorder:
    def record_video(self, frame: Any) -> None: ...

    def record_step(self, **fields: Any) -> None: ...


def through_simpler(openings: np.ndarray) -> np.ndarray:
    """What reaches the arm of the Google robot, for what an RLDS policy writes step by step."""
    benchmark = SimplerEnvBenchmark("google_robot_pick_coke_can", gripper_mode="sticky")
    benchmark._env, benchmark._recorder = Arm(), _NoRecorder()
    spoken = translator("simpler-google")
    hand = spoken.hand()
    for opening in openings:
        (sent,) = spoken.actions(np.array([[0, 0, 0, 0, 0, 0, opening]]))
        benchmark.step({"actions": hand(sent)})
    return np.array([done[6] for done in benchmark._env.actions])


def simpler_rule(openings: np.ndarray) -> np.ndarray:
    """SIMPLER's own: the jump from the last opening to this one; above 0.5 it lasts 15 steps."""
    last, latched, left, commands = None, 0.0, 0, []
    for opening in openings:
        jump = 0.0 if last is None else last - opening
        last = opening
        if left == 0 and abs(jump) > 0.5:
            latched, left = jump, 15
        commands.append(latched if left else jump)
        left = max(left - 1, 0)
    return np.array(commands)


@pytest.mark.parametrize("kind", ["noise", "runs", "analogue", "one close"])
def test_the_sticky_gripper_does_what_simpler_does(kind: str) -> None:
    random = np.random.default_rng(len(kind))
    for trial in range(0, 60, 5):
        openings = {
            "noise": random.choice([0.0, 0.996], 80),
            "runs": np.repeat(random.choice([0.0, 0.996], 16), 5),
            "analogue": random.uniform(-0.2, 1.2, 80),
            "one close": np.where(np.arange(80) < 1 + trial, 0.996, 0.0),
        }[kind]
        wanted = simpler_rule(np.clip(openings, 0, 1))
        assert np.allclose(through_simpler(openings), wanted, atol=1e-6), trial


def test_a_chunk_s_gripper_is_the_change_since_what_was_carried_out(
    open_server: Callable, oft: Any
) -> None:
    """Two actions of four are carried out: the two that are not leave no trace."""
    one_camera = make_oft(num_images=1, proprio_dim=None)
    server = open_server(one_camera, benchmark="simpler-google", chunk_size=2)
    written: list[np.ndarray] = []
    step = server.served.step

    def spy(keys: list[Any], rows: list[Any]) -> Any:
        done = step(keys, rows)
        written.extend(row.actions for row in done)
        return done

    async def talk(url: str) -> list[np.ndarray]:
        server.served.step = spy
        async with client(url) as connection:
            seen = [simpler_message("google_robot_pick_coke_can", seed) for seed in range(6)]
            return [(await connection.act(each))["actions"][6] for each in seen]

    got = ask(server, talk)
    openings = np.clip(np.concatenate([chunk[:2, 6] for chunk in written]), 0, 1)
    assert np.allclose(got, (1 - np.append(0, openings[:-1] - openings[1:])) / 2, atol=1e-6)


@pytest.mark.parametrize("name", list(CONVENTIONS))
@pytest.mark.parametrize("written", ["rlds", "robosuite"])
def test_the_gripper_is_clipped(name: str, written: str) -> None:
    low = 0.0 if CONVENTIONS[name].wants_open else -1.0
    sent = gripper(name, written, [-7.0, -0.3, 0.5, 1.3, 2.99])
    assert min(sent) >= low and max(sent) <= 1
    ends = gripper(name, written, [-7.0, 7.0])
    assert sorted(ends) == [low, 1.0]
    assert np.allclose(gripper(name, "rlds", [0.25]), gripper(name, "robosuite", [0.5]))


def test_libero_messages_of_one_camera_reach_a_policy_of_one_camera(
    open_server: Callable, openvla: Any
) -> None:
    server = open_server(openvla)
    assert "send_wrist_image" not in server.get_observation_params()

    async def talk(url: str) -> list[np.ndarray]:
        async with client(url) as connection:
            return await act(connection, [1])

    assert ask(server, talk)[0].shape == (7,)


def test_the_yaml_of_the_documentation_gives_different_episodes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    entries = [
        entry
        for block in blocks
        for entry in (yaml.safe_load(block) or {}).get("benchmarks", [])
        if entry["benchmark"].endswith("SimplerEnvBenchmark")
    ]
    assert len(entries) == 3
    for entry in entries:
        benchmark = SimplerEnvBenchmark(**entry["params"])
        count = entry["episodes_per_task"]
        places = [benchmark._build_va_reset_kwargs({"episode_idx": n}) for n in range(count)]
        assert len({str(place) for place in places}) == count
        assert entry["params"]["env_build_kwargs"]["robot"] == "google_robot_static"
        turn = benchmark._va_grid[0][1]["robot_rot_quat"]
        assert np.isclose(np.linalg.norm(turn), 1, atol=1e-4) and turn[3] > 0.99
