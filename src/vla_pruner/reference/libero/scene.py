"""A LIBERO task with privileged eyes: what the expert may know and what a policy will see.

Non-obvious behaviours
----------------------
* Images are what vla-eval's LIBERO benchmark sends: drawn at 256 pixels and turned by 180 degrees.
  They are stored at `IMAGE_SIZE`. Nothing is drawn unless `observe` is called.
* Proprioception follows the same benchmark with `quat_no_antipodal`, as published checkpoints do:
  the axis-angle of the quaternion as it comes, whose angle may exceed pi.
* A state of the suite's official list does not hold the poses of fixtures: they are drawn again at
  every reset, from the seed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...scenes import rendering
from ...scenes.pick_place_task import ACTION_DIM, CAMERAS, IMAGE_SIZE
from .suites import SETTLE_STEPS, check_task

RENDER_SIZE = 256
"""Resolution at which vla-eval draws."""

_CAMERA_NAMES = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
_RESET_STREAM = 11160
_TABLES = ("main_table", "living_room_table", "kitchen_table", "study_table", "coffee_table")
_GRID_M = 0.02
_WAIT = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])


class LiberoScene:
    """One task of a LIBERO suite, started from random placements or from official states.

    Actions are `[7]` in [-1, 1]: dx, dy, dz, droll, dpitch, dyaw, gripper (+1 close, -1 open), at
    20 Hz. Lengths are metres in the world frame.
    """

    def __init__(self, suite: str, task: int) -> None:
        """Build task `task` (0 to 9) of `suite`.

        Raises
        ------
        ValueError: unknown suite or task.
        ImportError: LIBERO, or a package that it needs, is not installed.
        FileNotFoundError: LIBERO's assets are missing.
        """
        check_task(suite, task)
        self.suite, self.task = suite, task
        benchmark, self._folder, control_env = _import_libero()
        entry = benchmark.get_benchmark_dict()[suite]().get_task(task)
        self.instruction: str = entry.language
        self._states_file = (
            Path(self._folder("init_states")) / entry.problem_folder / entry.init_states_file
        )
        bddl = Path(self._folder("bddl_files")) / entry.problem_folder / entry.bddl_file
        with _random_stream([0, task]):
            try:
                self._env = control_env(
                    bddl_file_name=str(bddl),
                    has_renderer=False,
                    has_offscreen_renderer=True,
                    use_camera_obs=False,
                )
            except OSError as error:
                raise FileNotFoundError(
                    f"{suite} task {task} could not be built: {error}. LIBERO's meshes and "
                    f"textures belong into {self._folder('assets')}; hf-libero downloads them "
                    "when it is first used with network access."
                ) from error
        self._official: np.ndarray | None = None
        self._observation: dict[str, Any] = {}
        self._find_parts()

    # ------------------------------------------------------------------ episodes
    def reset(self, seed: int) -> str:
        """Start from placements drawn from the task's BDDL file; returns the instruction.

        The stream of random numbers is one that an integer seed of numpy cannot give, so that no
        `seed` repeats the draw behind an official initial state.
        """
        with _random_stream([_RESET_STREAM, self.task, seed]):
            self._env.reset()
        return self._begin()

    def reset_official(self, state: int, seed: int = 0) -> str:
        """Start from official initial state `state`, as evaluations do; returns the instruction."""
        if self._official is None:
            self._official = _load_states(self._states_file)
        if state not in range(len(self._official)):
            raise ValueError(
                f"{self.suite} task {self.task} has no initial state {state}; "
                f"use 0 to {len(self._official) - 1}."
            )
        with _random_stream([seed]):
            self._env.reset()
        self._env.set_init_state(self._official[state])
        return self._begin()

    def step(self, action: np.ndarray) -> None:
        """Apply one action `[7]` for 0.05 s; rounded to float32, the precision of recordings."""
        action = np.asarray(action, dtype=np.float32).astype(np.float64)
        if action.shape != (ACTION_DIM,) or not np.all(np.isfinite(action)):
            raise ValueError(
                f"An action is {ACTION_DIM} finite numbers (dx, dy, dz, droll, dpitch, dyaw, "
                f"gripper), but got an array of shape {action.shape}: {action}."
            )
        self._observation = self._env.step(np.clip(action, -1.0, 1.0))[0]

    def success(self) -> bool:
        """Whether the goal of the BDDL file holds."""
        return bool(self._env.check_success())

    def close(self) -> None:
        """Free the simulator and its renderer."""
        self._env.close()

    def __enter__(self) -> LiberoScene:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ what a policy sees
    def observe(self) -> dict[str, np.ndarray]:
        """Images of both cameras, uint8 `[160, 160, 3]`, turned as in evaluations."""
        images = {}
        for camera in CAMERAS:
            drawn = self._env.sim.render(
                camera_name=_CAMERA_NAMES[camera], width=RENDER_SIZE, height=RENDER_SIZE
            )
            turned = Image.fromarray(np.ascontiguousarray(drawn[::-1, ::-1]))
            size = (IMAGE_SIZE, IMAGE_SIZE)
            images[camera] = np.asarray(turned.resize(size, Image.Resampling.LANCZOS))
        return images

    def proprio(self) -> np.ndarray:
        """float32 `[8]`: gripper xyz (m), axis-angle (rad), two fingers (m)."""
        seen = self._observation
        turn = _axis_angle(seen["robot0_eef_quat"])
        parts = [seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"]]
        return np.concatenate(parts).astype(np.float32)

    def project(self, points: np.ndarray, camera: str) -> np.ndarray:
        """Pixels (column, row) of world points `[..., 3]` in an image of `observe`: `[..., 2]`.

        Outside [0, 160] when out of view, NaN behind the camera.
        """
        model, data = self._model, self._data
        index = model.camera(_CAMERA_NAMES[camera]).id
        axes = data.cam_xmat[index].reshape(3, 3)
        local = (np.asarray(points, dtype=np.float64) - data.cam_xpos[index]) @ axes
        focal = IMAGE_SIZE / 2 / np.tan(np.deg2rad(model.cam_fovy[index]) / 2)
        depth = np.where(local[..., 2] < -1e-3, -local[..., 2], np.nan)
        right, up = focal * local[..., 0] / depth, focal * local[..., 1] / depth
        # `observe` turns what robosuite draws upside down: rows are right, columns are mirrored.
        return np.stack([IMAGE_SIZE / 2 - right, IMAGE_SIZE / 2 - up], axis=-1)

    # ------------------------------------------------------------------ what the expert knows
    @property
    def goals(self) -> list[tuple[str, ...]]:
        """The predicates of the BDDL goal, such as `("on", "bowl_1", "plate_1")`."""
        return [tuple(goal) for goal in self._env.env.parsed_problem["goal_state"]]

    def eef(self) -> tuple[np.ndarray, np.ndarray]:
        """Point between the finger pads `[3]` and the gripper's axes as columns `[3, 3]`."""
        data = self._data
        return (
            data.site_xpos[self._eef_site].copy(),
            data.site_xmat[self._eef_site].reshape(3, 3).copy(),
        )

    def position(self, name: str) -> np.ndarray:
        """Origin `[3]` of an object or fixture."""
        return self._data.xpos[self._env.env.obj_body_id[name]].copy()

    def points(self, name: str, *, dense: bool = False) -> np.ndarray:
        """Points `[N, 3]` on the collision shapes of an object or fixture, where it is now.

        Boxes give their corners, or with `dense` a grid of about 2 cm.
        """
        key = (name, dense)
        if key not in self._shapes:
            geoms = self._collision_geoms(self._env.env.obj_body_id[name])
            self._shapes[key] = [(geom, self._shape(geom, dense)) for geom in geoms]
        return np.concatenate([self._placed(*part) for part in self._shapes[key]])

    def obstacles(self, name: str) -> np.ndarray:
        """Points `[N, 3]` of everything that stands on the table, except `name`."""
        others = [other for other in self.names if other != name]
        shapes = [self.points(other, dense=True) for other in others]
        return np.concatenate(shapes) if shapes else np.zeros((0, 3))

    def base_of(self, place: str) -> str:
        """The object, fixture or table to which a place of a goal predicate belongs."""
        owners = [name for name in (*self.names, *_TABLES) if place.startswith(name)]
        if not owners:
            raise ValueError(f"{self.suite} task {self.task}: nothing here owns `{place}`.")
        return max(owners, key=len)

    def site(self, name: str) -> np.ndarray:
        """Centre `[3]` of a named region."""
        return self._data.site_xpos[self._model.site(name).id].copy()

    def joint(self, name: str) -> Joint:
        """A hinge or slide of a fixture."""
        return Joint(self, self._model.joint(name).id)

    # ------------------------------------------------------------------ inside
    @property
    def _model(self) -> Any:
        return self._env.sim.model._model

    @property
    def _data(self) -> Any:
        return self._env.sim.data._data

    def _begin(self) -> str:
        self._find_parts()
        for _ in range(SETTLE_STEPS):
            self.step(_WAIT)
        return self.instruction

    def _find_parts(self) -> None:
        """Look up indices in the MuJoCo model, which a reset builds anew."""
        environment = self._env.env
        self._eef_site = self._model.site("gripper0_grip_site").id
        self._shapes: dict[tuple[str, bool], list[tuple[int, np.ndarray]]] = {}
        fixtures = [n for n in environment.fixtures_dict if "table" not in n and n != "floor"]
        names = [*environment.objects_dict, *fixtures]
        self.names = [n for n in names if self._collision_geoms(environment.obj_body_id[n])]

    def _collision_geoms(self, body: int) -> list[int]:
        """Geoms that can touch something, of `body` and of the bodies attached to it."""
        model = self._model
        family = {body}
        for child in range(body + 1, model.nbody):  # a parent comes before its children
            if model.body_parentid[child] in family:
                family.add(child)
        return [
            g for g in range(model.ngeom) if model.geom_bodyid[g] in family and _solid(model, g)
        ]

    def _shape(self, geom: int, dense: bool) -> np.ndarray:
        """Points `[N, 3]` on a geom, in its own frame."""
        import mujoco

        model, kind, size = self._model, self._model.geom_type[geom], self._model.geom_size[geom]
        if kind == mujoco.mjtGeom.mjGEOM_MESH:
            mesh = model.geom_dataid[geom]
            start, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
            return model.mesh_vert[start : start + count].astype(np.float64)
        if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
            angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
            ring = size[0] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            return np.concatenate([np.c_[ring, np.full(16, end * size[1])] for end in (-1, 1)])
        if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
            return _box(np.full(3, size[0] / 3**0.5), dense=False)
        return _box(np.maximum(size, 1e-3), dense)

    def _placed(self, geom: int, shape: np.ndarray) -> np.ndarray:
        return shape @ self._data.geom_xmat[geom].reshape(3, 3).T + self._data.geom_xpos[geom]


class Joint:
    """A hinge or slide of a fixture: a drawer, a knob, a door."""

    def __init__(self, scene: LiberoScene, index: int) -> None:
        self._scene, self._index = scene, index

    @property
    def position(self) -> float:
        """How far it is from its closed position (m or rad), never negative."""
        return float(abs(self._scene._data.qpos[self._scene._model.jnt_qposadr[self._index]]))

    @property
    def opening_axis(self) -> np.ndarray:
        """Unit vector `[3]` along which, or about which, it opens."""
        axis = self._scene._data.xaxis[self._index].copy()
        closes_forwards = self._scene._model.jnt_range[self._index][0] < -0.05
        return (-axis if closes_forwards else axis) / np.linalg.norm(axis)

    @property
    def anchor(self) -> np.ndarray:
        """Where the joint is `[3]`."""
        return self._scene._data.xanchor[self._index].copy()

    def handle(self) -> int:
        """The geom that stands out the most along the opening axis."""
        geoms = self.geoms()
        centres = self._scene._data.geom_xpos[geoms]
        return geoms[int(np.argmax(centres @ self.opening_axis))]

    def geoms(self) -> list[int]:
        """Collision geoms that move with the joint."""
        return self._scene._collision_geoms(self._scene._model.jnt_bodyid[self._index])

    def centre_of(self, geom: int) -> np.ndarray:
        """Where a geom is now `[3]`."""
        return self._scene._data.geom_xpos[geom].copy()

    def points_of(self, geom: int) -> np.ndarray:
        """Corners `[N, 3]` of a geom where it is now."""
        return self._scene._placed(geom, self._scene._shape(geom, False))


def _solid(model: Any, geom: int) -> bool:
    return bool(model.geom_contype[geom] != 0)


def _box(half_size: np.ndarray, dense: bool) -> np.ndarray:
    """Corners `[8, 3]` of a box, or with `dense` a grid over its faces."""
    counts = [min(16, max(2, int(2 * half / _GRID_M) + 2)) if dense else 2 for half in half_size]
    axes = [np.linspace(-1, 1, count) for count in counts]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return grid[(np.abs(grid) > 0.999).any(axis=1)] * half_size


def _axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle `[3]` of a quaternion (x, y, z, w), without choosing its sign."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if sine < 1e-8:
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * 2.0 * np.arccos(w) / sine


def _load_states(path: Path) -> np.ndarray:
    """Official initial states `[50, S]`; only plain arrays are unpickled."""
    import torch

    if not path.exists():
        raise FileNotFoundError(f"There are no initial states at {path}; reinstall hf-libero.")
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    arrays_alone: list[Any] = [
        np.ndarray,
        np.dtype,
        np.dtypes.Float64DType,
        (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
        (multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    ]
    with torch.serialization.safe_globals(arrays_alone):
        return np.asarray(torch.load(path, weights_only=True))


@contextlib.contextmanager
def _random_stream(seed: list[int]) -> Iterator[None]:
    """Seed numpy's global generator, which LIBERO draws from, and put it back afterwards."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _import_libero() -> tuple[Any, Any, Any]:
    """`benchmark`, `get_libero_path` and `ControlEnv` of LIBERO, imported without their chatter."""
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    if not (folder / "config.yaml").exists():  # LIBERO would ask for one on the standard input.
        raise FileNotFoundError(
            f"LIBERO has no config.yaml in {folder}; `make libero` writes one, or point "
            "LIBERO_CONFIG_PATH at a folder that has it."
        )
    rendering.settle()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from libero.libero import benchmark, get_libero_path
            from libero.libero.envs.env_wrapper import ControlEnv
    except ImportError as error:
        raise ImportError(
            f"LIBERO could not be imported ({error}). `docs/libero.md` names what to install."
        ) from error
    except (AttributeError, AssertionError, RuntimeError) as error:  # drawing cannot be set up
        raise RuntimeError(rendering.explain(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    rendering.check_device()
    return benchmark, get_libero_path, ControlEnv
