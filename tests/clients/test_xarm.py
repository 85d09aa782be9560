"""The xArm6 driver against an object that refuses what the SDK and its controller refuse."""

from __future__ import annotations

import inspect
import math
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "clients" / "python" / "src"))
pytest.importorskip("websockets", reason="pip install 'vla-pruner[doors]'")

from vla_pruner_client import Answer, Client, Lost
from vla_pruner_client.xarm import (
    GRIPPER_OPEN,
    SDK_JOINT_LIMITS,
    Api,
    ArmError,
    Limits,
    XArm6,
    drive,
)

OUT_OF_RANGE, NOT_READY, HAS_ERROR = -8, 9, 1  # API codes of the SDK
SPEED_ERROR, FENCE_ERROR = 24, 35  # of the controller
HOME = np.array([0.0, -0.5, -0.8, 0.0, 1.0, 0.0])
TO_POSE = np.diag([200.0, 150.0, 120.0, 1.0, 1.0, 1.0])
BASE = np.array([300.0, 75.0, 300.0, math.pi, 0.0, 0.0])
ROOM = ((150.0, 500.0), (-300.0, 300.0), (100.0, 500.0))
"""mm."""


class Controller:
    """As `XArmAPI`: the pose is a linear function of the joints, everything else is strict."""

    def __init__(self, hz: float = 30.0) -> None:
        self.hz, self.angles = hz, HOME.copy()
        self.mode = self.state = self.error = 0
        self.enabled = self.gripping = False
        self.fence: list[float] | None = None
        self.box: list[float] | None = None
        self.sent: list[np.ndarray] = []
        self.grips: list[float] = []
        self.gone = False

    def get_err_warn_code(self) -> Any:
        return 0, [self.error, 0]

    def motion_enable(self, enable: bool = True) -> int:
        self.enabled = enable
        return 0

    def set_mode(self, mode: int = 0) -> int:
        self.mode, self.state = mode, 5  # a new mode waits for a new state
        return 0

    def set_state(self, state: int = 0) -> int:
        self.state = state
        return 0 if not self.gone else -1

    def get_servo_angle(self, *, is_radian: bool) -> Any:
        assert is_radian
        return (-1, []) if self.gone else (0, [*self.angles, 0.0])

    def get_forward_kinematics(
        self, angles: Any, *, input_is_radian: bool, return_is_radian: bool
    ) -> Any:
        assert input_is_radian and return_is_radian
        return 0, (TO_POSE @ np.asarray(angles[:6]) + BASE).tolist()

    def get_inverse_kinematics(
        self, pose: Any, *, input_is_radian: bool, return_is_radian: bool
    ) -> Any:
        assert input_is_radian and return_is_radian
        assert max(map(abs, pose[3:])) <= math.pi + 1e-9
        angles = np.linalg.solve(TO_POSE, np.asarray(pose) - BASE)
        return (0, angles.tolist()) if np.abs(angles).max() < 7 else (-6, [])

    def set_servo_angle_j(self, angles: Any, *, is_radian: bool) -> int:
        assert is_radian and isinstance(angles, list) and len(angles) == 6
        if self.gone:
            return -1
        if any(
            not low <= a <= high for a, (low, high) in zip(angles, SDK_JOINT_LIMITS, strict=True)
        ):
            return OUT_OF_RANGE
        if self.error:
            return HAS_ERROR
        if not (self.enabled and self.mode == 1 and self.state == 0):
            return NOT_READY
        if np.abs(np.asarray(angles) - self.angles).max() * self.hz > math.pi:
            self.error = SPEED_ERROR
            return HAS_ERROR
        self.angles = np.asarray(angles)
        tool = (TO_POSE @ self.angles + BASE)[:3]
        if self.fence is not None:
            high, low = np.array(self.fence[::2]), np.array(self.fence[1::2])
            if (tool > high).any() or (tool < low).any():
                self.error = FENCE_ERROR
                return HAS_ERROR
        self.sent.append(self.angles)
        return 0

    def set_reduced_tcp_boundary(self, boundary: Any) -> int:
        assert len(boundary) == 6 and all(a > b for a, b in zip(*[iter(boundary)] * 2, strict=True))
        self.box = list(boundary)
        return 0

    def set_fence_mode(self, on: bool) -> int:
        self.fence = self.box if on else None
        return 0

    def set_gripper_enable(self, enable: bool) -> int:
        self.gripping = enable
        return 0

    def set_gripper_mode(self, mode: int) -> int:
        return 0 if mode == 0 else 12

    def get_gripper_position(self) -> Any:
        return 0, self.grips[-1] if self.grips else GRIPPER_OPEN

    def set_gripper_position(self, pos: float, wait: bool = False) -> int:
        assert not wait, "the loop would stand still"
        if not self.gripping or not 0 <= pos <= GRIPPER_OPEN:
            return 12
        self.grips.append(pos)
        return 0


def cameras() -> Mapping[str, np.ndarray]:
    image = np.zeros((8, 8, 3), np.uint8)
    return {"observation/image": image, "observation/wrist_image": image}


class InTime(XArm6):
    """Each `send` comes a tick after the one before it."""

    def send(self, action: Any) -> None:
        self._sent -= 1 / self.hz
        super().send(action)


def made(**options: Any) -> tuple[Controller, XArm6]:
    api = Controller()
    arm = InTime(api, cameras, Limits(ROOM), **options)
    arm.start()
    return api, arm


def test_the_limits_are_those_of_the_sdk() -> None:
    config = pytest.importorskip("xarm.core.config.x_config", reason="pip install xarm-python-sdk")
    known = config.XCONF.Robot.JOINT_LIMITS[6]
    kinds = [known[kind] for kind in sorted(known) if kind in (6, 61305)]
    for joint, (low, high) in enumerate(SDK_JOINT_LIMITS):
        assert low == max(kind[joint][0] for kind in kinds)
        assert high == min(kind[joint][1] for kind in kinds)


def test_what_is_used_is_in_the_sdk() -> None:
    wrapper = pytest.importorskip("xarm.wrapper", reason="pip install xarm-python-sdk")
    for name, used in vars(Api).items():
        if name.startswith(("get_", "set_", "motion_")):
            there = inspect.signature(getattr(wrapper.XArmAPI, name)).parameters
            takes_any = any(each.kind is each.VAR_KEYWORD for each in there.values())
            wanted = set(inspect.signature(used).parameters)
            assert takes_any or wanted <= set(there), name


def test_a_far_target_is_reached_at_the_speed_that_is_allowed() -> None:
    api, arm = made()
    target = HOME + np.array([0.5, 0.1, -0.2, 0.3, 0.2, -0.4])
    for _ in range(40):
        arm.send([*target, 1.0])
    steps = np.diff([HOME, *api.sent], axis=0)
    assert np.abs(steps).max() <= 1 / 30 + 1e-9  # 1 rad/s at 30 Hz
    assert np.abs(api.angles - target).max() < 1e-9
    moving = steps[:10]
    assert np.allclose(moving / moving[:, :1], moving[0] / moving[0, 0])  # straight


def test_joint_limits_are_kept_with_a_margin() -> None:
    api, arm = made()
    for _ in range(200):
        arm.send([0, 9.0, 9.0, 0, 9.0, 0, 0.0])
    assert api.error == 0
    high = np.array(SDK_JOINT_LIMITS)[:, 1]
    assert (api.angles <= high - 0.02 + 1e-9).all()


@pytest.mark.parametrize("actions", ["joints", "delta"])
def test_it_holds_at_the_edge_of_the_workspace(actions: Any) -> None:
    api, arm = made(actions=actions)
    action = [1.5, *HOME[1:], 1.0] if actions == "joints" else [0.05, 0, 0, 0, 0, 0, 1.0]
    for _ in range(120):
        arm.send(action)
    tools = np.array([TO_POSE @ angles + BASE for angles in api.sent])
    assert 490 < tools[-1, 0] <= 500 and tools[:, 0].max() <= 500
    assert arm.refused > 10 and api.error == 0 and len(api.sent) == 120


def test_differences_move_the_tool() -> None:
    api, arm = made(actions="delta", gripper="robosuite")
    before = TO_POSE @ api.angles + BASE
    arm.send([0.002, -0.001, 0.001, 0.01, 0, 0, 1.0])
    moved = TO_POSE @ api.angles + BASE - before
    assert np.allclose(moved, [2, -1, 1, 0.01, 0, 0])
    assert api.grips == [0.0]
    arm.send([0, 0, 0, 0, 0, 0, 1.0])
    arm.send([0, 0, 0, 0, 0, 0, -1.0])
    assert api.grips == [0.0, GRIPPER_OPEN]
    arm.send([9.0, 0, 0, 0, 0, 0, -1.0])  # far out of reach
    assert arm.refused == 1 and np.allclose(api.sent[-1], api.sent[-2])


def test_what_is_no_action_is_not_sent() -> None:
    api, arm = made()
    for wrong in ([0.0] * 6, [math.nan] + [0.0] * 6, [math.inf] * 7):
        with pytest.raises(ValueError, match="7 finite numbers"):
            arm.send(wrong)
    assert api.sent == [] and api.state == 0


def test_an_arm_with_an_error_is_not_started_and_a_refusal_stops_it() -> None:
    api = Controller()
    api.error = 11
    arm = XArm6(api, cameras, Limits(ROOM))
    with pytest.raises(ArmError, match="error 11"):
        arm.start()
    assert api.mode == 0 and not api.enabled
    api, arm = made()
    api.error = 31  # a collision
    with pytest.raises(ArmError, match="set_servo_angle_j answered 1"):
        arm.send([*HOME, 1.0])
    assert api.state == 4
    with pytest.raises(ArmError, match=r"answered 1 .*told to stop; call start\(\) first"):
        arm.send([*HOME, 1.0])
    api, arm = made()
    api.gone = True
    with pytest.raises(ArmError, match=r"get_servo_angle answered -1 .*THE ARM MAY STILL MOVE"):
        arm.observe("x")
    with pytest.raises(ArmError, match=r"set_state\(4\) answered -1: THE ARM MAY STILL MOVE"):
        arm.end()


def test_a_tick_that_comes_early_does_not_go_as_far() -> None:
    """The limit is one of speed: after a tick that was late, the next one comes at once."""
    api = Controller()
    arm = XArm6(api, cameras, Limits(ROOM))
    arm.start()
    for _ in range(5):
        arm.send([*(HOME + 1.0), 1.0])
    assert np.isclose(np.abs(api.sent[0] - HOME).max(), 1 / 30)
    took = arm._sent  # the first tick is free, the others go as far as time has gone on
    arm.send([*(HOME + 1.0), 1.0])
    assert np.abs(api.sent[-1] - api.sent[-2]).max() <= arm._sent - took + 1e-9
    assert np.isfinite(api.angles).all()


def test_a_tool_that_looks_down_may_turn_either_way() -> None:
    api, arm = made(actions="delta")
    arm.send([0, 0, 0, 0.01, 0, 0, 1.0])  # beyond pi
    arm.send([0, 0, 0, -0.02, 0, 0, 1.0])
    assert arm.refused == 0
    assert np.allclose([a[3] for a in api.sent], [0.01, -0.01])


def test_without_actions_it_stays_on_its_way() -> None:
    """A target that was far away is not gone to when the server is lost."""
    api = Controller()
    arm = XArm6(api, cameras, Limits(ROOM))
    client = Scripted(np.array([0.8, *HOME[1:], 1.0]))
    told: list[Any] = []
    drive(arm, client, "wave", seconds=2, max_age_s=60, ticked=lambda *b: told.append(b[1]))
    stopped = [
        n for n, command in enumerate(told) if command.stopped and command.action is not None
    ]
    moving = [command for command in told if not command.stopped]
    assert len(moving) == 15 and stopped and told[-1].stopped
    assert 0 < api.angles[0] < 0.55  # 15 ticks of 1/30 rad
    at = api.angles
    arm.start()
    arm.hold()
    assert np.array_equal(api.sent[-1], at) and api.state == 0


def test_the_arm_stops_before_the_client_has_its_answer() -> None:
    """Ctrl-C: nobody waits for a server that is away while the arm still listens."""
    api = Controller()
    arm = XArm6(api, cameras, Limits(ROOM))
    states: list[int] = []

    class Slow(Scripted):
        def infer(self, observation: Mapping[str, Any], **options: Any) -> Answer:
            time.sleep(0.5)
            states.append(api.state)
            raise Lost("nobody")

    def ticked(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive(arm, Slow(np.zeros(7)), "wave", seconds=2, ticked=ticked)
    assert states == [4] and api.state == 4


def test_limits_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="joint_speed=4"):
        Limits(ROOM, joint_speed=4)
    with pytest.raises(ValueError, match="within"):
        Limits(ROOM, joints=((-9.0, 9.0), *SDK_JOINT_LIMITS[1:]))
    wrong: tuple[Any, ...] = (
        ((1.0, 0.0), *ROOM[1:]),
        ROOM[:1],
        (*ROOM, ROOM[0]),
        ((-math.inf, math.inf), *ROOM[1:]),
        ((math.nan, 1.0), *ROOM[1:]),
    )
    for room in wrong:
        with pytest.raises(ValueError, match="workspace"):
            Limits(room)
    for hz in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="hz > 0"):
            XArm6(Controller(), cameras, Limits(ROOM), hz=hz)
    with pytest.raises(ValueError, match="joints or delta"):
        XArm6(Controller(), cameras, Limits(ROOM), actions="pose")  # type: ignore[arg-type]


def test_an_arm_that_stands_outside_is_not_started() -> None:
    api = Controller()
    api.angles = HOME + np.array([2.0, 0, 0, 0, 0, 0])
    arm = XArm6(api, cameras, Limits(ROOM))
    with pytest.raises(ArmError, match=r"the tool is at \[700.0, .*outside of the workspace"):
        arm.start()
    assert api.state == 4 and api.sent == []


def test_a_turn_of_the_inverse_kinematics_is_not_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pose a whole turn away moves no joint by a turn; another elbow moves none."""
    api, arm = made(actions="delta")
    found = HOME + np.array([0.01, 0, 0, 2 * math.pi, 0, -2 * math.pi])
    answers: dict[str, Any] = {"angles": found.tolist()}
    monkeypatch.setattr(api, "get_inverse_kinematics", lambda *_, **__: (0, answers["angles"]))
    arm.send([0.002, 0, 0, 0, 0, 0, 1.0])
    assert np.allclose(api.sent[-1], HOME + np.array([0.01, 0, 0, 0, 0, 0])) and arm.refused == 0
    for other in (HOME + np.array([0, 0.9, -0.9, 0, 0, 0]), np.full(6, np.nan)):
        answers["angles"] = other.tolist()
        arm.send([0.002, 0, 0, 0, 0, 0, 1.0])
        assert np.allclose(api.sent[-1], HOME + np.array([0.01, 0, 0, 0, 0, 0]))
    assert arm.refused == 2


def test_angles_that_are_no_numbers_stop_the_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    api, arm = made()
    bad: list[list[float]] = [[math.nan] * 7, [0.0] * 3]
    for angles in bad:
        monkeypatch.setattr(api, "get_servo_angle", lambda angles=angles, **_: (0, angles))
        api.state = 0
        with pytest.raises(ArmError, match="instead of numbers"):
            arm.observe("x")
        assert api.state == 4


def test_a_recorder_closes_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lerobot itself is in `make test-lerobot`; here only what is asked of it, and when."""
    asked: list[str] = []

    class Dataset:
        @classmethod
        def create(cls, **_: Any) -> Dataset:
            asked.append("create")
            return cls()

        def __getattr__(self, name: str) -> Any:
            return lambda *_: asked.append(name)

    for name in ("lerobot", "lerobot.datasets", "lerobot.datasets.lerobot_dataset"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lerobot.datasets.lerobot_dataset"].LeRobotDataset = Dataset  # type: ignore[attr-defined]
    from vla_pruner_client.recording import Recorder

    api = Controller()
    arm = XArm6(api, cameras, Limits(ROOM))
    with pytest.raises(ArmError), Recorder(tmp_path / "new", fps=30) as recorder:

        def ticked(*both: Any) -> None:
            recorder.add(*both)
            api.error = 31 if len(api.sent) == 4 else api.error

        drive(arm, Scripted(np.array([*HOME, 1.0])), "wave", seconds=2, ticked=ticked)
    assert asked == ["create", *["add_frame"] * 4, "save_episode", "finalize"]
    recorder.close()
    assert asked[-1] == "finalize" and asked.count("finalize") == 1
    with pytest.raises(FileExistsError, match="is there already"):
        Recorder(tmp_path, fps=30)


class Scripted(Client):
    """Three chunks, then no server."""

    def __init__(self, target: np.ndarray) -> None:
        super().__init__("ws://127.0.0.1:9", timeout_s=0.1)
        self.target, self.seen = target, []  # type: ignore[var-annotated]

    def infer(self, observation: Mapping[str, Any], *, deadline_s: float | None = None) -> Answer:
        self.seen.append(observation)
        if len(self.seen) > 3:
            raise Lost("nobody")
        return Answer(np.tile(self.target, (5, 1)).astype(np.float32), False, 5)


def test_it_drives_and_holds_when_the_server_is_lost() -> None:
    api = Controller()
    arm = XArm6(api, cameras, Limits(ROOM))
    client = Scripted(np.array([*(HOME + 0.3), 1.0]))
    told: list[Any] = []
    stood = drive(
        arm, client, "wave", seconds=3, max_age_s=60, ticked=lambda *both: told.append(both)
    )
    assert api.state == 4 and api.error == 0  # stopped at the end
    assert stood > 20 and 50 < len(told) <= 90
    assert set(client.seen[0]) == {
        "observation/image",
        "observation/wrist_image",
        "observation/joint_position",
        "observation/gripper_position",
        "observation/state",
        "prompt",
    }
    assert np.allclose(client.seen[0]["observation/state"], [*HOME, 1.0])
    moving = [command for _, command in told if not command.stopped]
    assert len(moving) == 15
    # After the last action the arm stands: it came as far as 15 ticks let it.
    assert (np.abs(api.sent[-1] - HOME - 0.3) < 0.1).all()
    assert np.array_equal(api.sent[-1], api.sent[-10])


def test_an_error_in_the_middle_stops_the_arm() -> None:
    api = Controller()
    arm = XArm6(api, cameras, Limits(ROOM))

    def ticked(*_: Any) -> None:
        api.error = 31 if len(api.sent) == 4 else api.error

    with pytest.raises(ArmError, match="set_servo_angle_j"):
        drive(arm, Scripted(np.array([*HOME, 1.0])), "wave", seconds=2, ticked=ticked)
    assert api.state == 4 and len(api.sent) == 4
