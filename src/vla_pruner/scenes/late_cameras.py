"""Camera images of a robosuite simulator, drawn when somebody looks instead of at every step.

A policy that gives eight actions looks at every eighth step. Without a GPU, drawing two cameras
takes about ten times as long as the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np

_SUFFIX = "_image"


class LateCameras:
    """Postpones the drawing of all cameras of a robosuite environment.

    Where robosuite would draw, the state of the simulation is kept instead (some 20 microseconds),
    with the colours that LIBERO switches, such as those of a burner. `drawn` draws from that state,
    so that its images are those that robosuite would have given, bit by bit.

    Args:
        environment: robosuite's, just built; its observations hold black images from now on.
    """

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._sensors: dict[str, Callable[[dict], np.ndarray]] = {}
        self._model: Any = None
        self._kept: Any = None
        self._spare: Any = None
        self._colours: list[np.ndarray] = []
        for name, observable in environment._observables.items():
            if name.endswith(_SUFFIX):
                self._postpone(name, observable)

    def drawn(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """`observation`, the newest one, with its images."""
        self._swap()
        try:
            images = {name: np.array(sensor({})) for name, sensor in self._sensors.items()}
        finally:
            self._swap()
        return {**observation, **{name: images[name] for name in images if name in observation}}

    def _postpone(self, name: str, observable: Any) -> None:
        """Replace the sensor of a camera, now and whenever a reset sets a new one."""
        set_sensor = observable.set_sensor

        def set_late_sensor(sensor: Callable[[dict], np.ndarray]) -> None:
            self._sensors[name] = sensor
            black = np.zeros(observable._data_shape, dtype=np.uint8)

            @wraps(sensor)  # keeps what robosuite notes on a sensor
            def keep(_: dict) -> np.ndarray:
                self._keep()
                return black

            set_sensor(keep)

        observable.set_sensor = set_late_sensor
        set_late_sensor(observable._sensor)

    def _keep(self) -> None:
        """Note what an image of this moment would show."""
        import mujoco

        simulation = self._environment.sim
        if self._model is not simulation.model._model:  # a reset builds another one
            self._model = simulation.model._model
            self._kept, self._spare = mujoco.MjData(self._model), mujoco.MjData(self._model)
        mujoco.mj_copyData(self._kept, self._model, simulation.data._data)
        self._colours = [colours.copy() for colours in self._switched()]

    def _swap(self) -> None:
        """Exchange the state of the simulation and the one that was kept."""
        import mujoco

        now = self._environment.sim.data._data
        mujoco.mj_copyData(self._spare, self._model, now)
        mujoco.mj_copyData(now, self._model, self._kept)
        mujoco.mj_copyData(self._kept, self._model, self._spare)
        for place, kept in zip(self._switched(), self._colours, strict=True):
            place[:], kept[:] = kept.copy(), place.copy()

    def _switched(self) -> tuple[np.ndarray, np.ndarray]:
        """Colours that may change within an episode."""
        return self._model.site_rgba, self._model.geom_rgba
