"""Recorded episodes to replay: .npz files, a LeRobotDataset, or recorded on the spot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vla_pruner._short import short
from vla_pruner.episodes.observations import episode_path
from vla_pruner.models.loading import locate
from vla_pruner.runs.job import Setup
from vla_pruner.runs.replay import Recorded, read_recorded, record
from vla_pruner.scenes.scene import Suite
from vla_pruner.scenes.suites import PICK_PLACE

RECORDED_FIRST = 900_000
"""PickPlace is recorded from this scene on; the policies that ship here did not learn from them."""
_INFO = Path("meta") / "info.json"


@dataclass(frozen=True)
class Source:
    """Episodes to replay.

    Args:
        kind: where they come from: "npz", "lerobot v2.1", "lerobot v3.0", or a suite's name.
        episodes: in order.
        actions: what was done at each moment `[n, dim]`, by episode; empty: not recorded.
        digest: of all images, states and instructions.
    """

    kind: str
    episodes: tuple[Recorded, ...]
    actions: tuple[np.ndarray, ...] = ()

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change when anything does that a policy is shown."""
        found = hashlib.sha256()
        for episode in self.episodes:
            for seen in episode.observations:
                found.update(seen["instruction"].encode())
                for array in [*seen["images"], seen.get("proprio")]:
                    if array is not None:
                        found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:12]

    @property
    def calls(self) -> int:
        """Moments of all episodes."""
        return sum(len(episode.observations) for episode in self.episodes)


def open_source(
    path: Path,
    policy: Any,
    *,
    episodes: int,
    calls: int,
    execute: int,
    cameras: Sequence[str] | None = None,
    instruction: str | None = None,
) -> Source:
    """The first recorded episodes of a folder, checked against what the policy reads.

    Args:
        path: a folder with .npz files (format: docs/methods/fitprune.md; every moment at which the
            policy was asked, in order), one such file, or a LeRobotDataset v2.1 or v3.0.
        policy: its `config` says how many cameras and state numbers it reads.
        episodes: at most so many, spread evenly over those that there are.
        calls: at most so many moments of each, from its beginning.
        execute: actions between two calls: of a dataset, every so-manieth frame is shown.
        cameras: of a dataset, in the policy's order; None: all of them, in the dataset's order.
        instruction: for datasets that do not say what was asked for.

    Raises:
        FileNotFoundError: there is nothing to replay.
        ValueError: what is there is damaged, or not for this policy.
    """
    if is_dataset(path, cameras):
        from vla_pruner.tuning.lerobot_dataset import read_dataset

        source = read_dataset(
            path, episodes=episodes, calls=calls, stride=execute, cameras=cameras, task=instruction
        )
    else:
        source = Source("npz", tuple(read_recorded(_files(path, episodes), calls)))
    check_fit(source, policy)
    return source


def is_dataset(path: Path, cameras: Sequence[str] | None = None) -> bool:
    """Whether `path` is a LeRobotDataset; else it is a folder of .npz files, or one.

    Raises:
        FileNotFoundError: there is nothing to replay.
        ValueError: cameras are named where files hold them in order.
    """
    if not path.exists():
        raise FileNotFoundError(f"--observations {short(str(path))}: there is no such folder")
    if (path / _INFO).exists():
        return True
    if cameras is not None:
        raise ValueError("--cameras is for LeRobotDatasets; .npz files hold them in order")
    _files(path, 1)
    return False


def spread_out(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 0 to `count` - 1, evenly spread; all of them if there are fewer."""
    return [int(n) for n in np.unique(np.linspace(0, count - 1, min(wanted, count)).round())]


def _files(path: Path, episodes: int) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.npz"))
    if not files:
        below = sorted({str(found.parent) for found in path.glob("*/**/*.npz")})
        hint = f"; there are some in {short(below[0])}" if below else ""
        raise FileNotFoundError(
            f"{short(str(path))} holds neither .npz files nor meta/info.json of a LeRobotDataset"
            f"{hint}. Leave out --observations to record some where the policy has a simulator"
        )
    return [files[number] for number in spread_out(len(files), episodes)]


def check_fit(source: Source, policy: Any) -> None:
    """Refuse observations that the policy cannot read, or that hold no numbers.

    Raises:
        ValueError: no moments, a camera too many or too few, another size of the state, a state
            that is missing or not finite, or actions of another size.
    """
    config = getattr(policy, "config", None)
    views = getattr(config, "num_images", None)
    size = getattr(config, "proprio_dim", None)
    for episode in source.episodes:
        where = f"episode {episode.scene}"
        if not episode.observations:
            raise ValueError(f"{where} has no moments; take it out")
        for number, seen in enumerate(episode.observations):
            state = seen.get("proprio")
            if views is not None and len(seen["images"]) != views:
                raise ValueError(
                    f"{where} has {_cameras(len(seen['images']))}, the policy reads {views}; "
                    "choose them with --cameras, or record those that the policy reads"
                )
            if state is not None and not np.isfinite(state).all():
                raise ValueError(
                    f"{where}, moment {number}: the state holds NaN or infinite numbers "
                    f"({short(np.asarray(state).tolist())}); take the episode out, or repair it"
                )
            if size is not None and (state is None or np.shape(state) != (size,)):
                found = "none" if state is None else f"shape {np.shape(state)}"
                raise ValueError(
                    f"{where}, moment {number}: the policy reads a state of {size} numbers, "
                    f"recorded is {found}"
                )
    dim = getattr(config, "action_dim", None)
    for actions in source.actions:
        if dim is not None and actions.shape[-1] != dim:
            raise ValueError(
                f"recorded actions have {actions.shape[-1]} numbers, the policy's have {dim}: the "
                "recording is of another robot or action space"
            )


def _cameras(count: int) -> str:
    return f"{count} camera{'s' if count != 1 else ''}"


def with_key(source: Source, key: str | None) -> Source:
    """The same observations with the dataset whose statistics scale the actions."""
    if key is None:
        return source
    return replace(
        source,
        episodes=tuple(
            replace(one, observations=tuple({**o, "unnorm_key": key} for o in one.observations))
            for one in source.episodes
        ),
    )


# -- recorded on the spot --------------------------------------------------------------------------


def record_source(
    policy: nn.Module,
    name: str,
    suite: Suite,
    folder: Path,
    *,
    episodes: int,
    calls: int,
    first: int | None = None,
    tick: Callable[[], None] = lambda: None,
    **control: Any,
) -> Source:
    """Let the unpruned policy act, and keep what it sees; what was recorded before is taken again.

    PickPlace is recorded on scenes that are kept for no evaluation; other suites have none, and
    their last scenes are taken.

    Args:
        policy: acts.
        name: of the policy.
        suite: where.
        folder: where the files go, one per scene.
        episodes, calls: how many, at most so many calls of each.
        first: first scene; None: as above.
        tick: called after each episode.
        control: overrides how the policy is driven, see `Control.of`.

    Raises:
        ValueError: the policy was made for other suites, or the folder is of other weights.
    """
    setup = Setup.of(name, policy, suite, **control)
    if first is None:
        first = RECORDED_FIRST if suite.name == PICK_PLACE else suite.seeds[-1] + 1 - episodes
    seeds = range(first, first + episodes)
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "weights"
    if mark.exists() and mark.read_text().strip() != setup.weights:
        raise ValueError(f"{folder} was recorded by other weights of {name}; name another --out")
    mark.write_text(setup.weights + "\n")
    missing = [seed for seed in seeds if not episode_path(folder, seed).exists()]
    if missing:
        with closing(suite.open_scene()) as scene:
            for seed in missing:
                path = episode_path(folder, seed)
                record(policy, scene, seed, suite.task_of(seed), setup, path)
                tick()
    paths = [episode_path(folder, seed) for seed in seeds]
    return Source(suite.name, tuple(read_recorded(paths, calls)))


def suite_of(name: str, said: Any) -> str:
    """The suite that a policy was made for, by what its config.json says under `control`.

    Raises:
        ValueError: it does not say.
    """
    suites = said.get("suites") or ([PICK_PLACE] if locate(name) != name else [])
    if not suites:
        raise ValueError(
            f"{name} does not say which scenes it was made for, so nothing can be recorded here: "
            "give --observations FOLDER with recorded episodes (.npz files or a LeRobotDataset)"
        )
    return str(suites[0])
