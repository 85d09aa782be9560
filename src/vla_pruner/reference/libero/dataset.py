"""Training samples from recorded LIBERO episodes: a frame and the actions that follow it."""

from __future__ import annotations

import numpy as np

from ..dataset import CHUNK, Demonstrations

_FOCUS, _GRIPPER = 0, 1


class LiberoDemonstrations(Demonstrations):
    """Frames of LIBERO episodes of any suites in one folder.

    A sample's chunk holds the actions of the next `CHUNK` steps at 20 Hz, whatever the stride of
    the frames. Only the gripper has a place among the points that are found without words (the
    fifth), because objects differ from task to task; `named` and `relation` are about the thing or
    place that the expert is busy with.
    """

    def _one(
        self, rng: np.random.Generator, other_target: float, reaching: float, shift: float
    ) -> tuple:
        number, frame = self._draw(rng, reaching)
        episode = self._episodes[number]
        step = frame * int(episode["stride"])
        future = np.minimum(np.arange(step, step + CHUNK), len(episode["action"]) - 1)
        # An action is the expert's plan only while the arm did what the expert said.
        disturbed = np.cumsum(episode["perturbed"][future[:-1]])
        images, corners = self._crops(rng, episode, frame, shift)
        points = np.full((len(self.cameras), 5, 2), -1.0, dtype=np.float32)
        named = np.empty((len(self.cameras), 2), dtype=np.float32)
        for view, (camera, corner) in enumerate(zip(self.cameras, corners, strict=True)):
            pixel = episode[f"{camera}_points"][frame] * self.scale - corner
            place = np.nan_to_num(pixel / self.pixels, nan=-1.0)
            points[view, 4], named[view] = place[_GRIPPER], place[_FOCUS]
        proprio = episode["proprio"][frame].astype(np.float32)
        relation = np.concatenate([proprio[:3], episode["focus"][frame] - proprio[:3]])
        return (
            images,
            str(episode["instruction"]),
            proprio,
            episode["action"][future].astype(np.float32),
            np.concatenate([[True], disturbed == 0]),
            points,
            relation.astype(np.float32),
            named,
        )

    def _reaching_steps(self, episode: dict[str, np.ndarray]) -> np.ndarray:
        return episode["reaching"]
