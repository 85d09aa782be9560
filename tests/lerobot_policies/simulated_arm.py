"""A robot for lerobot's commands: seven joints that go where they are sent, and two cameras."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from lerobot.robots import Robot, RobotConfig

JOINTS = [f"j{number}.pos" for number in range(8)]


@RobotConfig.register_subclass("simulated_arm")
@dataclass(kw_only=True)
class SimulatedArmConfig(RobotConfig):
    """`--robot.type=simulated_arm`."""

    views: str = "a,b"
    size: int = 56


class SimulatedArm(Robot):
    """The eighth joint is read and never sent."""

    config_class = SimulatedArmConfig
    name = "simulated_arm"
    sent: ClassVar[list[dict[str, float]]] = []

    def __init__(self, config: SimulatedArmConfig) -> None:
        super().__init__(config)
        self.config, self.cameras, self.on = config, {}, False
        self.joints, self.views = np.zeros(8), config.views.split(",")
        self.random = np.random.default_rng(0)

    @property
    def observation_features(self) -> dict[str, Any]:
        shape = (self.config.size, self.config.size, 3)
        return dict.fromkeys(JOINTS, float) | dict.fromkeys(self.views, shape)

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(JOINTS[:7], float)

    @property
    def is_connected(self) -> bool:
        return self.on

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self.on = True

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Nothing to do."""

    def get_observation(self) -> dict[str, Any]:
        shape = (self.config.size, self.config.size, 3)
        images = {n: self.random.integers(0, 256, shape, np.uint8) for n in self.views}
        return dict(zip(JOINTS, map(float, self.joints), strict=True)) | images

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.joints[:7] = [action[name] for name in JOINTS[:7]]
        SimulatedArm.sent.append(dict(action))
        return action

    def disconnect(self) -> None:
        self.on = False
