"""The simulated scene: four groceries, two bins and a Panda arm that obeys an instruction.

Non-obvious behaviours
----------------------
* One `step` lasts 0.2 s. robosuite's own `env.step` computes every position twice or three times
  per physics step and refreshes observations nobody reads, so `step` runs the loop itself.
* The gripper command acts at once (robosuite ramps it with hidden state). What the fingers do next
  therefore depends only on what can be observed.
* Nothing is rendered unless `observe` is called.
* The translucent ghosts that robosuite draws in the target bin are hidden: they look like the
  objects and carry no information (the bins never move).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from . import rendering
from .pick_place_task import (
    ACTION_DIM,
    CAMERAS,
    IMAGE_SIZE,
    INSTRUCTION_TEMPLATES,
    OBJECT_NAMES,
)
from .scene import hold_delta

rendering.settle()
logging.disable(logging.WARNING)  # robosuite warns about an optional file on every import
try:
    import mujoco
    import robosuite
    from robosuite import load_controller_config, macros
except ImportError as error:
    raise ImportError(
        f"The reference task needs a simulator that could not be imported ({error}). "
        'Install it with `pip install "vla-pruner[sim]"`.'
    ) from error
except (AttributeError, AssertionError, RuntimeError) as error:  # a library for drawing is broken
    raise RuntimeError(rendering.explain(error)) from error
finally:
    logging.disable(logging.NOTSET)

CONTROL_HZ = 5
STEP_LIMIT = 60
"""An episode that has not succeeded after this many steps has failed."""

TRAINING_SEEDS = range(0, 1_000_000)
EVALUATION_SEEDS = range(1_000_000, 1_001_000)
"""Frozen, and disjoint from the training seeds: never record a demonstration here."""

FULL_STEP_M = 0.10
"""Displacement that a translation action of 1 commands."""
FULL_TURN_RAD = 0.5
"""Rotation that a rotation action of 1 commands."""

BIN_FLOOR_M = 0.82
BIN_WALL_TOP_M = 0.90

_PHYSICS_STEP_S = 0.004
SUBSTEPS = round(1 / (CONTROL_HZ * _PHYSICS_STEP_S))
"""Steps of the physics in one step of the scene."""
_STIFFNESS = 300.0
_CLEARANCE_M = 0.05
_ROBOSUITE_NAMES = ("Milk", "Bread", "Cereal", "Can")
_CAMERA_NAMES = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
_AGENTVIEW_EYE = np.array([0.02, -0.74, 1.36])
_AGENTVIEW_TARGET = np.array([0.02, -0.11, 0.88])
_AGENTVIEW_FOVY_DEG = 48.0
_HIDDEN_BODIES = ("mount0", "Visual", "robot0_link0", "robot0_link1")
_HIDDEN_GROUP = 4
_SOURCE_BIN = (0.02, -0.25, 0.8)
_TARGET_BINS = (0.02, 0.28, 0.8)
"""8 cm nearer to the arm than in robosuite: a stretched arm locks its elbow and stays stuck."""
_WORKSPACE_M = [[-0.22, -0.50, 0.825], [0.20, 0.50, 1.20]]
_CELL_CENTRES_M = np.array([[x, y] for x in (-0.085, 0.075) for y in (-0.11, 0.11)])
"""Middles of the places of the four objects, from the centre of the source bin."""
_CELL_JITTER_M = np.array([0.025, 0.035])
_YAW_JITTER_RAD = np.deg2rad(15.0)
_LOW_OBJECT_M = 0.06
_LOW_OBJECT_MAX_Y_M = 0.115
"""An object this low must lie this near the middle: the palm would rest on the bin's wall."""


def instruction_for(target: int, template: int = 0) -> str:
    """The sentence that asks for object `target` (an index into `OBJECT_NAMES`)."""
    return INSTRUCTION_TEMPLATES[template].format(object=OBJECT_NAMES[_checked_target(target)])


@dataclass(frozen=True)
class SceneState:
    """What the scripted expert is allowed to know; lengths in metres, world frame.

    Attributes
    ----------
    eef_position : `[3]`, the point between the finger pads.
    eef_rotation : `[3, 3]`, columns are the gripper's axes; column 0 is the closing direction.
    finger_opening : free distance between the finger pads.
    held : both fingers touch the named object.
    vertices : `[N, 3]`, collision mesh of the named object.
    bin_centre : `[2]`, centre of the bin where the named object belongs.
    bin_half_size : `[2]`, half of that bin's inner extent.
    """

    eef_position: np.ndarray
    eef_rotation: np.ndarray
    finger_opening: float
    held: bool
    vertices: np.ndarray
    bin_centre: np.ndarray
    bin_half_size: np.ndarray

    def object_in_bin(self) -> bool:
        """Whether the object is inside its bin and below the rim, whoever holds it."""
        centre = (self.vertices.min(axis=0) + self.vertices.max(axis=0)) / 2
        inside = np.all(np.abs(centre[:2] - self.bin_centre) < self.bin_half_size)
        return bool(inside and self.vertices[:, 2].min() < BIN_WALL_TOP_M - 0.02)

    def gripper_clearance(self) -> float:
        """Distance from the grasp point to the object's bounding box."""
        nearest = np.clip(self.eef_position, self.vertices.min(axis=0), self.vertices.max(axis=0))
        return float(np.linalg.norm(self.eef_position - nearest))


class _ForwardedSim:
    """The simulator as robosuite's controller sees it: positions are already up to date."""

    def __init__(self, sim: Any) -> None:
        self._sim = sim

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sim, name)

    def forward(self) -> None:
        """Do nothing: `PickPlaceScene.step` has just run the kinematics."""


class PickPlaceScene:
    """robosuite's PickPlace as a language task: "pick up the milk and place it in its bin".

    Actions are `[7]` in [-1, 1]: dx, dy, dz, droll, dpitch, dyaw, gripper (+1 close, -1 open).
    Everything an episode contains follows from the seed given to `reset`.
    """

    def __init__(self) -> None:
        controller = load_controller_config(default_controller="OSC_POSE")
        reach = [FULL_STEP_M] * 3 + [FULL_TURN_RAD] * 3
        controller["output_max"], controller["output_min"] = reach, [-value for value in reach]
        controller["kp"] = _STIFFNESS
        controller["position_limits"] = _WORKSPACE_M
        stock_timestep = macros.SIMULATION_TIMESTEP
        macros.SIMULATION_TIMESTEP = _PHYSICS_STEP_S
        try:
            self._env = robosuite.make(
                "PickPlace",
                robots="Panda",
                controller_configs=controller,
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                use_object_obs=False,
                bin1_pos=_SOURCE_BIN,
                bin2_pos=_TARGET_BINS,
                control_freq=CONTROL_HZ,
                horizon=10**9,
                ignore_done=True,
                hard_reset=False,
            )
        finally:
            macros.SIMULATION_TIMESTEP = stock_timestep
        self._model = self._env.sim.model._model
        self._renderer: mujoco.Renderer | None = None
        self.decorate: Callable[[mujoco.MjvScene], None] | None = None
        """Adds bodies that are drawn and nothing else."""
        self._target = 0
        self._started_in_bin = False
        self._find_parts()
        self._prepare_looks()

    @property
    def _data(self) -> mujoco.MjData:
        return self._env.sim.data._data

    def reset(self, seed: int, target: int) -> dict[str, np.ndarray | str]:
        """Start an episode; returns `{"proprio": [8], "instruction": str}`.

        The same seed gives the same objects at the same places whatever the target is.
        """
        self._target = _checked_target(target)
        rng = np.random.RandomState(seed)
        global_state = np.random.get_state()
        np.random.seed(seed)  # robosuite draws the arm's initial joints from the global generator
        try:
            self._env.reset()
        finally:
            np.random.set_state(global_state)
        controller = self._env.robots[0].controller
        controller.sim = _ForwardedSim(self._env.sim)
        self._place_objects(rng)
        mujoco.mj_forward(self._model, self._data)
        drift = rng.uniform(-0.5, 0.5, size=2)
        self.step(np.array([*drift, 1.0, 0, 0, 0, -1.0]))
        self.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        self._started_in_bin = self.state().object_in_bin()
        return {"proprio": self.proprio(), "instruction": instruction_for(target)}

    def step(self, action: np.ndarray) -> None:
        """Apply one action, `[7]` in [-1, 1], for 0.2 s.

        It is rounded to float32, the precision of recordings, so that they replay exactly.
        """
        self.advance(action, SUBSTEPS)

    def advance(self, action: np.ndarray, substeps: int, *, again: bool = False) -> None:
        """Apply an action for so many of the `SUBSTEPS` of a step.

        Args:
            action: `[7]` in [-1, 1].
            substeps: each lasts 4 ms.
            again: the action is under way; its goal is not set anew from where the arm is now.
        """
        action = np.asarray(action, dtype=np.float32).astype(np.float64)
        if action.shape != (ACTION_DIM,) or not np.all(np.isfinite(action)):
            raise ValueError(
                f"An action is {ACTION_DIM} finite numbers (dx, dy, dz, droll, dpitch, dyaw, "
                f"gripper), but got an array of shape {action.shape}: {action}."
            )
        action = np.clip(action, -1.0, 1.0)
        gripper = self._env.robots[0].gripper
        for substep in range(substeps):
            gripper.current_action = np.array([-1.0, 1.0]) * np.sign(action[6])
            mujoco.mj_step1(self._model, self._data)
            self._env._pre_action(action, policy_step=substep == 0 and not again)
            mujoco.mj_step2(self._model, self._data)
        mujoco.mj_forward(self._model, self._data)

    def observe(self, cameras: tuple[str, ...] = CAMERAS) -> dict[str, np.ndarray]:
        """Render `cameras`; each image is uint8 `[160, 160, 3]`, right side up."""
        if self._renderer is None:
            self._renderer = rendering.open_renderer(self._model, IMAGE_SIZE, IMAGE_SIZE)
        images = {}
        for camera in cameras:
            self._renderer.update_scene(self._data, _camera_name(camera), self._visible)
            if self.decorate is not None:
                self.decorate(self._renderer.scene)
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            images[camera] = self._renderer.render().copy()
        return images

    def proprio(self) -> np.ndarray:
        """float32 `[8]`: gripper xyz (m), orientation as axis-angle (rad), two fingers (m)."""
        axis_angle = Rotation.from_matrix(self._eef_rotation()).as_rotvec()
        fingers = self._data.qpos[self._finger_qpos]
        return np.concatenate([self._eef_position(), axis_angle, fingers]).astype(np.float32)

    def show(self, state: np.ndarray) -> None:
        """Put everything where `simulator_state` found it, to be drawn."""
        positions = len(self._data.qpos)
        self._data.qpos[:], self._data.qvel[:] = state[:positions], state[positions:]
        mujoco.mj_forward(self._model, self._data)

    def pose(self) -> tuple[np.ndarray, np.ndarray]:
        """The gripper's position `[3]` (m), and the arm's joints `[7]` (rad)."""
        return self._eef_position(), np.array(self._env.robots[0]._joint_positions)

    def hold(self, last: np.ndarray | None) -> np.ndarray:
        """The command that leaves the arm where it is, and the gripper as it was told last."""
        return hold_delta(last)

    def success(self) -> bool:
        """The named object lies in its bin, was not there before, and the gripper let go."""
        state = self.state()
        return (
            not self._started_in_bin
            and not state.held
            and state.object_in_bin()
            and state.gripper_clearance() > _CLEARANCE_M
        )

    def state(self, target: int | None = None) -> SceneState:
        """The privileged state that the scripted expert acts on.

        `target` is the object to ask about; by default the one that was named at `reset`. The
        recorder asks about all four: one image then teaches four instructions.
        """
        target = self._target if target is None else _checked_target(target)
        geom = self._object_geoms[target]
        rotation = self._data.geom_xmat[geom].reshape(3, 3)
        touching = self._fingers_touching(geom)
        return SceneState(
            eef_position=self._eef_position(),
            eef_rotation=self._eef_rotation(),
            finger_opening=float(np.abs(self._data.qpos[self._finger_qpos]).sum()),
            held=all(touching),
            vertices=self._object_meshes[target] @ rotation.T + self._data.geom_xpos[geom],
            bin_centre=self._env.target_bin_placements[target, :2].copy(),
            bin_half_size=self._env.bin_size[:2] / 4,
        )

    def object_positions(self) -> np.ndarray:
        """float32 `[4, 3]`: centres of mass of the four objects in the world (m)."""
        return self._data.geom_xpos[self._object_geoms].astype(np.float32)

    def project(self, points: np.ndarray, camera: str) -> np.ndarray:
        """Pixel coordinates (column, row) of world points `[..., 3]` in a camera: `[..., 2]`.

        Row 0 is the top of the image. Points outside the image give coordinates outside
        [0, 160]; points behind the camera give NaN.
        """
        camera_id = self._model.camera(_camera_name(camera)).id
        axes = self._data.cam_xmat[camera_id].reshape(3, 3)
        local = (np.asarray(points, dtype=np.float64) - self._data.cam_xpos[camera_id]) @ axes
        focal = IMAGE_SIZE / 2 / np.tan(np.deg2rad(self._model.cam_fovy[camera_id]) / 2)
        depth = np.where(local[..., 2] < -1e-3, -local[..., 2], np.nan)
        column = IMAGE_SIZE / 2 + focal * local[..., 0] / depth
        row = IMAGE_SIZE / 2 - focal * local[..., 1] / depth
        return np.stack([column, row], axis=-1)

    def simulator_state(self) -> np.ndarray:
        """Positions and velocities of everything that moves, for bitwise comparison."""
        return np.concatenate([self._data.qpos, self._data.qvel])

    def close(self) -> None:
        """Free the renderer and the simulator."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._env.close()

    def __enter__(self) -> PickPlaceScene:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _eef_position(self) -> np.ndarray:
        return self._data.site_xpos[self._eef_site].copy()

    def _eef_rotation(self) -> np.ndarray:
        return self._data.site_xmat[self._eef_site].reshape(3, 3).copy()

    def _find_parts(self) -> None:
        """Look up the indices of the gripper and of the objects in the MuJoCo model."""
        model = self._model
        self._eef_site = model.site("gripper0_grip_site").id
        self._finger_qpos = [
            int(model.joint(f"gripper0_finger_joint{side}").qposadr[0]) for side in (1, 2)
        ]
        self._finger_geoms = [
            {
                model.geom(f"gripper0_finger{side}_collision").id,
                model.geom(f"gripper0_finger{side}_pad_collision").id,
            }
            for side in (1, 2)
        ]
        self._object_geoms = [model.geom(f"{name}_g0").id for name in _ROBOSUITE_NAMES]
        self._object_qpos = [
            int(model.joint(f"{name}_joint0").qposadr[0]) for name in _ROBOSUITE_NAMES
        ]
        self._object_meshes = [self._mesh(geom) for geom in self._object_geoms]

    def _mesh(self, geom: int) -> np.ndarray:
        """Vertices `[N, 3]` of a mesh geom, in the geom's own frame."""
        mesh = self._model.geom_dataid[geom]
        start = self._model.mesh_vertadr[mesh]
        count = self._model.mesh_vertnum[mesh]
        return self._model.mesh_vert[start : start + count].astype(np.float64)

    def _prepare_looks(self) -> None:
        """Aim the camera and leave out what costs time to draw and shows nothing."""
        model = self._model
        for geom in range(model.ngeom):
            body = model.body(model.geom_bodyid[geom]).name
            if body.startswith(_HIDDEN_BODIES):
                model.geom_group[geom] = _HIDDEN_GROUP
        model.vis.global_.offwidth = model.vis.global_.offheight = IMAGE_SIZE
        model.vis.quality.offsamples = 4
        model.vis.quality.shadowsize = 0
        self._visible = mujoco.MjvOption()
        self._visible.geomgroup[:] = 0
        self._visible.geomgroup[1] = 1
        self._visible.sitegroup[:] = 0
        self.aim(np.zeros(3), np.zeros(3), 0.0)

    def aim(self, shift: np.ndarray, aim: np.ndarray, zoom: float) -> None:
        """Move the camera by `shift` and where it looks by `aim`, `[3]` in m, and zoom, in deg."""
        camera = self._model.camera("agentview").id
        eye = _AGENTVIEW_EYE + shift
        self._model.cam_pos[camera] = eye
        self._model.cam_quat[camera] = _look_at(eye, _AGENTVIEW_TARGET + aim)
        self._model.cam_fovy[camera] = _AGENTVIEW_FOVY_DEG + zoom

    def _place_objects(self, rng: np.random.RandomState) -> None:
        """Stand the objects upright in the four quarters of the source bin, one in each."""
        for index, cell in enumerate(rng.permutation(4)):
            jitter = rng.uniform(-1, 1, size=2) * _CELL_JITTER_M
            yaw = rng.uniform(-1, 1) * _YAW_JITTER_RAD
            offset = _CELL_CENTRES_M[cell] + jitter
            geom = self._object_geoms[index]
            to_body = Rotation.from_quat(self._model.geom_quat[geom], scalar_first=True)
            shape = to_body.apply(self._object_meshes[index]) + self._model.geom_pos[geom]
            extent = np.ptp(shape, axis=0)
            if extent[0] < extent[1]:  # the gripper closes along y: turn the narrow side there
                yaw += np.pi / 2
            if extent[2] < _LOW_OBJECT_M:
                offset[1] = np.clip(offset[1], -_LOW_OBJECT_MAX_Y_M, _LOW_OBJECT_MAX_Y_M)
            xy = self._env.bin1_pos[:2] + offset
            z = BIN_FLOOR_M + 0.001 - shape[:, 2].min()
            turn = Rotation.from_euler("z", yaw).as_quat(scalar_first=True)
            start = self._object_qpos[index]
            self._data.qpos[start : start + 7] = [*xy, z, *turn]

    def _fingers_touching(self, geom: int) -> list[bool]:
        """For each finger, whether it touches `geom`."""
        pairs = self._data.contact.geom
        touched = set(pairs[pairs[:, 0] == geom, 1]) | set(pairs[pairs[:, 1] == geom, 0])
        return [bool(finger & touched) for finger in self._finger_geoms]


def _look_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Quaternion (w, x, y, z) of a MuJoCo camera at `eye` that looks at `target`, z up."""
    back = (eye - target) / np.linalg.norm(eye - target)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(back, right), back], axis=1)
    return Rotation.from_matrix(axes).as_quat(scalar_first=True)


def _camera_name(camera: str) -> str:
    if camera not in _CAMERA_NAMES:
        raise ValueError(f"There is no camera `{camera}`; choose from {', '.join(CAMERAS)}.")
    return _CAMERA_NAMES[camera]


def _checked_target(target: int) -> int:
    if target not in range(len(OBJECT_NAMES)):
        raise ValueError(
            f"target={target} names no object; use 0 to {len(OBJECT_NAMES) - 1} "
            f"for {', '.join(OBJECT_NAMES)}."
        )
    return int(target)
