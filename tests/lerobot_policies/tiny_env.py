"""A scene for lerobot's evaluation command: random pictures, a reward that tells actions apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

SIZE, STEPS = 56, 6


class Scene(gym.Env):
    """Two cameras and a robot of eight joints that nothing moves."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    task = task_description = "pick up the can"
    _max_episode_steps = STEPS

    def __init__(self, render_mode: str = "rgb_array") -> None:
        self.render_mode = render_mode
        image = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        joints = gym.spaces.Box(-10.0, 10.0, (8,), np.float32)
        pixels = gym.spaces.Dict({"a": image, "b": image})
        self.observation_space = gym.spaces.Dict({"pixels": pixels, "agent_pos": joints})
        self.action_space = gym.spaces.Box(-10.0, 10.0, (7,), np.float32)

    def _observation(self) -> dict[str, Any]:
        pictures = self.np_random.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
        joints = self.np_random.normal(size=8).astype(np.float32)
        return {"pixels": {"a": pictures[0], "b": pictures[1]}, "agent_pos": joints}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> Any:
        self.steps += 1
        done = self.steps == STEPS
        reward = float(action @ np.arange(1, 8))
        return self._observation(), reward, done, False, {"is_success": done}

    def render(self) -> np.ndarray:
        return np.zeros((SIZE, SIZE, 3), np.uint8)


# Without gymnasium's wrappers, which hide the task from lerobot 0.4.
gym.register("gym_tiny/Scene", Scene, order_enforce=False, disable_env_checker=True)


@EnvConfig.register_subclass("tiny")
@dataclass
class TinyEnv(EnvConfig):
    """`--env.type=tiny`."""

    task: str | None = "Scene"
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (7,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (8,)),
            "a": PolicyFeature(FeatureType.VISUAL, (SIZE, SIZE, 3)),
            "b": PolicyFeature(FeatureType.VISUAL, (SIZE, SIZE, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            "a": "observation.images.a",
            "b": "observation.images.b",
        }
    )

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}
