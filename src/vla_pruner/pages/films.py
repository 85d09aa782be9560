"""What the film player of a page is given, and the pages that show one scene of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.episode import Episode
from vla_pruner.pages.engine import render
from vla_pruner.reports.compare import Group
from vla_pruner.reports.files import write_text
from vla_pruner.runs.video import folder_name, kept_recording, video_path

Recordings = Mapping[tuple[str, int], dict[str, Any]]
"""By condition and scene."""

SPEED = 2
"""Times simulated time."""
FOLDER = "films"
"""Of pages of scenes, beside the report."""
NO_SCORES = "No scores: every visual token stays."


def film_data(
    episodes: Iterable[Episode],
    conditions: Sequence[Condition],
    recordings: Recordings,
    tasks: Sequence[str],
    hz: float,
) -> dict[str, Any]:
    """Every scene with the run of each condition.

    Args:
        episodes: finished ones.
        conditions: in the order to show them.
        recordings: an episode may lack one.
        tasks: what an instruction may name, by target.
        hz: steps of the scene in a second.
    """
    scenes: dict[int, list[Episode]] = {}
    for episode in episodes:
        scenes.setdefault(episode.seed, []).append(episode)
    return {
        "unit": "s",
        "hz": hz,
        "speed": hz * SPEED,
        "no_scores": NO_SCORES,
        "focus": None,
        "conditions": [{"name": c.name, "label": c.label} for c in conditions],
        "scenes": [
            {
                "seed": seed,
                "name": tasks[runs[0].target],
                "instruction": runs[0].instruction,
                "start": first_pruned(recordings.get((run.condition, seed)) for run in runs),
                "runs": {
                    run.condition: _run(run, recordings.get((run.condition, seed))) for run in runs
                },
            }
            for seed, runs in sorted(scenes.items())
        ],
    }


def _run(episode: Episode, recording: dict[str, Any] | None) -> dict[str, Any]:
    """How it ended; where it was played again for its film, how that ended."""
    own = recording or {}
    return {
        "success": own.get("success", episode.success),
        "steps": own.get("steps", episode.steps),
        "recording": recording,
    }


def first_pruned(recordings: Iterable[Mapping[str, Any] | None]) -> int:
    """The first step at which every run that drops tokens has dropped some; 0: none does."""
    starts = [
        next((call["step"] for call in recording["calls"] if "0" in call["kept"]), 0)
        for recording in recordings
        if recording is not None
    ]
    return max(starts, default=0)


def write_films(group: Group, runs: Sequence[Path], out: Path) -> dict[tuple[str, int], str]:
    """A page for each scene of which something was recorded, with all its recorded runs.

    Args:
        group: of the report.
        runs: folders that may hold recordings of it.
        out: folder of the report.

    Returns:
        Addresses relative to the report, by condition and scene.
    """
    found = {key: recording for key, (_, recording) in recordings_of(group, runs).items()}
    folder = Path(FOLDER, folder_name(group.setup))
    addresses = {}
    for seed in sorted({seed for _, seed in found}):
        recorded = {key: recording for key, recording in found.items() if key[1] == seed}
        page = folder / f"{seed}.html"
        back = Path(os.path.relpath("report.html", folder)).as_posix()
        write_text(out / page, scene_page(group, recorded, back))
        for condition, _ in recorded:
            place = quote(page.as_posix())
            addresses[condition, seed] = f"{place}#run={quote(condition, safe='')}"
    return addresses


def recordings_of(
    group: Group, runs: Sequence[Path]
) -> dict[tuple[str, int], tuple[Path, dict[str, Any]]]:
    """What was recorded of a group, by condition and scene, and where its video is or would be."""
    found = {}
    for episode in group.episodes:
        for run in runs:
            path = video_path(run, group.setup, episode.condition, episode.seed)
            if (recording := kept_recording(path)) is not None:
                found[episode.condition, episode.seed] = path, recording
                break
    return found


def scene_page(group: Group, recordings: Recordings, back: str) -> str:
    """The recorded runs of one scene: one alone with its time line, or all side by side.

    Args:
        group: which they belong to.
        recordings: of one scene, one or more, each with its `hz`.
        back: address of the report.
    """
    episodes = [one for one in group.episodes if (one.condition, one.seed) in recordings]
    names = {one.condition for one in episodes}
    conditions = [one for one in group.conditions if one.name in names]
    hz = next(iter(recordings.values()))["hz"]
    data = film_data(episodes, conditions, recordings, group.setup.tasks, hz)
    pruned = [one.name for one in conditions if one.keep is not None]
    seed = episodes[0].seed
    return render(
        "films.html",
        title=f"Scene {seed}: {group.title}",
        eyebrow=f"VLA-Pruner · {group.title} · scene {seed}",
        headline=f"Scene {seed}",
        notices=[
            f"{condition}: played again for this film, it is not the episode of the run: "
            f"{recording['differs']}. Processors round differently."
            for (condition, _), recording in recordings.items()
            if recording.get("differs")
        ],
        note="Frames as the policy saw them, the visual tokens that it kept, the scores that "
        "chose them, and what it did, call by call. Drag along the time line.",
        back=back,
        data={**data, "focus": (pruned or [conditions[0].name])[0]},
    )
