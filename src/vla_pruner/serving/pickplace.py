"""The task of the reference policies as a vla-eval benchmark: evaluate without downloads.

In a vla-eval configuration: `benchmark: vla_pruner.serving.pickplace:PickPlaceBenchmark`. It and
`LiveLIBERO` also run in vla-eval's live mode, in which the simulator does not wait.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
from vla_eval.render import configure_mujoco_render
from vla_eval.specs import (
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    ROTATION_AA,
    STATE_EEF_POS_AA_GRIP,
    DimSpec,
)
from vla_eval.types import Action, EpisodeResult, Observation, Task

from vla_pruner._short import short
from vla_pruner.scenes.pick_place_task import (
    ACTION_DIM,
    CAMERAS,
    INSTRUCTION_TEMPLATES,
    OBJECT_NAMES,
)
from vla_pruner.scenes.scene import hold_delta

SUITE = "robosuite_pickplace"


def hold_action(last_action: Action | None) -> Action:
    """What is commanded in live mode while no action has come: the arm stays, the gripper, too.

    For benchmarks whose actions are differences of poses, with the gripper last, -1 open.
    """
    last = None if last_action is None else np.asarray(last_action["actions"], dtype=np.float64)
    return {"actions": hold_delta(last).tolist()}


class LiveLIBERO(LIBEROBenchmark):
    """vla-eval's LIBERO for its live mode, which that class cannot run in.

    Raises:
        ValueError: `absolute_action`, for which holding still is another command.
    """

    def get_hold_action(self, last_action: Action | None) -> Action:
        if self.absolute_action:
            raise ValueError("LiveLIBERO: live mode is for differences; drop `absolute_action`")
        return hold_action(last_action)


class PickPlaceBenchmark(StepBenchmark):
    """robosuite's PickPlace with four groceries, of which the instruction names one.

    Non-obvious behaviors:
        - Episode e of object k is held-out scene number 4 e + k of the reference task; no
          policy was trained on it. There are 250 episodes of each object.
        - Everything in an episode follows from that number.
        - An episode ends with success, or without it after 60 steps of 0.2 s.
        - With `render: cpu` MuJoCo draws with OSMesa; otherwise with EGL, which also runs on a CPU.

    Args:
        send_wrist_image, send_state: also send the wrist camera, or the robot's state `[8]`;
            policies that need them ask for them.
    """

    _ALL_RECORD_FIELDS = frozenset({"success", "action", "state"})

    render_backends = frozenset({"gpu", "cpu"})

    @classmethod
    def configure_render(cls, mode: str) -> dict[str, str]:
        return configure_mujoco_render(mode)

    def __init__(self, send_wrist_image: bool = False, send_state: bool = False) -> None:
        super().__init__()
        self._cameras = CAMERAS if send_wrist_image else CAMERAS[:1]
        self._send_state = send_state
        self._scene: Any = None

    def get_tasks(self) -> list[Task]:
        return [
            {"name": INSTRUCTION_TEMPLATES[0].format(object=name), "suite": SUITE, "target": target}
            for target, name in enumerate(OBJECT_NAMES)
        ]

    def reset(self, task: Task) -> Any:
        """Start the episode.

        Raises:
            ValueError: there are not that many held-out scenes.
            ImportError: the simulator is not installed.
        """
        from vla_pruner.scenes.pick_place import EVALUATION_SEEDS, PickPlaceScene

        number = len(OBJECT_NAMES) * int(task.get("episode_idx", 0)) + task["target"]
        if number not in range(len(EVALUATION_SEEDS)):
            raise ValueError(
                f"episode {task.get('episode_idx')} of {short(task['name'])}: there are "
                f"{len(EVALUATION_SEEDS) // len(OBJECT_NAMES)} held-out episodes of each object"
            )
        if self._scene is None:
            self._scene = PickPlaceScene()
        return self._scene.reset(EVALUATION_SEEDS[number], task["target"])

    def step(self, action: Action) -> StepResult:
        """Apply one action `[7]`: dx, dy, dz, rotation, gripper (+1 close, -1 open).

        Raises:
            ValueError: an action of another shape, or not finite.
        """
        values = np.asarray(action.get("actions"), dtype=np.float32)
        if values.shape != (ACTION_DIM,) or not np.isfinite(values).all():
            raise ValueError(f"an action is {ACTION_DIM} finite numbers; got {values.tolist()}")
        self._scene.step(values)
        success = self._scene.success()
        self._recorder.record_step(success=success, action=values, state=self._scene.proprio())
        return StepResult(obs=None, reward=float(success), done=success, info={})

    def make_obs(self, raw_obs: Any, task: Task) -> Observation:
        images = self._scene.observe(self._cameras)
        self._recorder.record_video(images[CAMERAS[0]])
        observation: Observation = {"images": images, "task_description": task["name"]}
        if self._send_state:
            observation["states"] = self._scene.proprio()
        return observation

    def get_hold_action(self, last_action: Action | None) -> Action:
        return hold_action(last_action)

    def get_step_result(self, step_result: StepResult) -> EpisodeResult:
        return {"success": step_result.done}

    def get_metadata(self) -> dict[str, Any]:
        from vla_pruner.scenes.pick_place import EVALUATION_SEEDS, STEP_LIMIT

        each = len(EVALUATION_SEEDS) // len(OBJECT_NAMES)
        return {"max_steps": STEP_LIMIT, "max_episodes_per_task": each, "suite": SUITE}

    def get_action_spec(self) -> dict[str, DimSpec]:
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        spec = {**dict.fromkeys(self._cameras, IMAGE_RGB), "language": LANGUAGE}
        return {**spec, "state": STATE_EEF_POS_AA_GRIP} if self._send_state else spec

    def cleanup(self) -> None:
        if self._scene is not None:
            self._scene.close()
            self._scene = None
