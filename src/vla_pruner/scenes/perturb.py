"""PickPlace as no policy has seen it: camera, light, texture, distractors, wording.

The categories are those of LIBERO-plus; the changes are this package's own. Each is drawn from the
number of the scene: every condition meets the same one, and physics is that of the untouched scene,
so that an episode has a twin without it.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import numpy as np

from vla_pruner.scenes.pick_place_task import OBJECT_NAMES

PERTURBATIONS = {
    "camera": "the scene's camera stands and aims elsewhere, up to 4 and 2 cm, and zooms by 2 deg",
    "light": "the lamp moves, and is 0.5 to 1.6 times as bright, with a tint",
    "texture": "table, bins, floor and walls have other colours",
    "distractors": "two coloured bodies lie in the bin, four around; the arm passes through them",
    "wording": "the instruction is put in words that no training sentence used",
}
"""Name and what it does."""

WORDINGS = (
    "bring the {object} to its bin",
    "could you drop the {object} off in its bin",
    "I want the {object} inside its bin",
    "the {object} belongs in its bin, move it there",
    "lift the {object} and lower it into its bin",
    "store the {object} in the matching bin",
)
"""None of them is a template of training."""

_EYE_M, _AIM_M, _ZOOM_DEG = 0.04, 0.02, 2.0
_BRIGHTNESS = (0.5, 1.6)
_TINT = 0.2
_LAMP_M = 0.8
_COLOUR = (0.35, 1.0)
_FIXTURES = ("bin", "table", "world", "floor", "wall")
_SIZE_M = (0.015, 0.035)
_AROUND_M = np.array(
    [[x, y] for x in (-0.26, 0.26) for y in (-0.42, -0.25, -0.05, 0.12, 0.28, 0.45)]
)
_WITHIN_M = np.array([[0.02, y] for y in (-0.40, -0.25, -0.10)])
"""Places around the two bins, and between the objects, in the world."""
_TOP_M = 0.86


class PerturbedScene:
    """A `PickPlaceScene` with one thing changed; everything else is asked of it.

    Args:
        name: which of `PERTURBATIONS`.
    """

    def __init__(self, name: str) -> None:
        from vla_pruner.scenes.pick_place import PickPlaceScene

        if name not in PERTURBATIONS:
            raise ValueError(f"no perturbation {name!r}; there are {', '.join(PERTURBATIONS)}")
        self._name = name
        self._scene = PickPlaceScene()
        self._model: Any = self._scene._model
        names = ("cam_pos", "cam_quat", "cam_fovy", "light_pos", "light_diffuse", "mat_rgba")
        self._untouched = {name: getattr(self._model, name).copy() for name in names}
        self._lamps = {
            name: getattr(self._model.vis.headlight, name).copy() for name in ("ambient", "diffuse")
        }

    def __getattr__(self, name: str) -> Any:
        if name == "_scene":
            raise AttributeError(name)
        return getattr(self._scene, name)

    def reset(self, seed: int, target: int) -> dict[str, Any]:
        """Start the episode of `seed`, changed as that seed draws it."""
        for name, values in self._untouched.items():
            getattr(self._model, name)[:] = values
        for name, values in self._lamps.items():
            getattr(self._model.vis.headlight, name)[:] = values
        self._scene.decorate = None
        found = self._scene.reset(seed, target)
        rng = np.random.default_rng([seed, crc32(self._name.encode())])
        getattr(self, f"_{self._name}")(rng)
        if self._name == "wording":
            wording = WORDINGS[rng.integers(len(WORDINGS))]
            found["instruction"] = wording.format(object=OBJECT_NAMES[target])
        return found

    def _wording(self, rng: np.random.Generator) -> None:
        """Nothing of the scene changes."""

    def _camera(self, rng: np.random.Generator) -> None:
        shift, aim = (reach * _direction(rng) for reach in (_EYE_M, _AIM_M))
        self._scene.aim(shift, aim, rng.uniform(-_ZOOM_DEG, _ZOOM_DEG))

    def _light(self, rng: np.random.Generator) -> None:
        tint = rng.uniform(*_BRIGHTNESS) * rng.uniform(1 - _TINT, 1 + _TINT, 3)
        self._model.light_pos[:] += _LAMP_M * _direction(rng)
        self._model.light_diffuse[:] *= tint
        for name in self._lamps:
            getattr(self._model.vis.headlight, name)[:] *= tint

    def _texture(self, rng: np.random.Generator) -> None:
        model = self._model
        for geom in range(model.ngeom):
            body = model.body(model.geom_bodyid[geom]).name
            if model.geom_matid[geom] >= 0 and body.startswith(_FIXTURES):
                model.mat_rgba[model.geom_matid[geom], :3] = rng.uniform(*_COLOUR, 3)

    def _distractors(self, rng: np.random.Generator) -> None:
        import mujoco

        kinds = (mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_SPHERE)
        bodies = [
            (
                kinds[rng.integers(len(kinds))],
                rng.uniform(*_SIZE_M, 3),
                np.array([*place, _TOP_M]),
                np.append(rng.uniform(0, 1, 3), 1).astype(np.float32),
            )
            for place in [*rng.permutation(_AROUND_M)[:4], *rng.permutation(_WITHIN_M)[:2]]
        ]

        def draw(drawn: Any) -> None:
            for kind, size, place, colour in bodies:
                geom = drawn.geoms[drawn.ngeom]
                mujoco.mjv_initGeom(geom, kind, size, place, np.eye(3).ravel(), colour)
                drawn.ngeom += 1

        self._scene.decorate = draw


def _direction(rng: np.random.Generator) -> np.ndarray:
    """A unit vector `[3]`, scaled by a share in [0.5, 1]."""
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector) * rng.uniform(0.5, 1)
