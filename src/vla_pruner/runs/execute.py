"""Running a matrix: what is missing of it, each episode kept as soon as it has finished."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from vla_pruner.episodes.episode import Episode
from vla_pruner.measure.environment import stamp
from vla_pruner.runs.job import Job, Planned
from vla_pruner.runs.matrix import Cell
from vla_pruner.runs.plan import missing_jobs, plan
from vla_pruner.runs.processes import Executor
from vla_pruner.runs.store import Store
from vla_pruner.runs.video import encoder, keep_recording, video_path, write_video
from vla_pruner.scenes.suites import open_suite


class Progress:
    """Hears how a run goes on; a subclass shows it."""

    def planned(self, cells: Sequence[Planned], missing: Sequence[Job]) -> None:
        """Everything that was asked for, and the episodes of it that are going to be run."""

    def finished(self, job: Job, episode: Episode) -> None:
        """An episode has been kept."""

    def cell_finished(self, item: Planned, solved: int, episodes: int) -> None:
        """The last missing episode of a cell has been kept; what the folder holds of it."""


def run_cells(
    cells: Sequence[Cell],
    out: str | Path,
    executor: Executor,
    *,
    control: Mapping[str, Any] | None = None,
    videos: int = 0,
    drop: Sequence[str] = (),
    progress: Progress | None = None,
) -> bool:
    """Run what is missing of the cells, and keep each episode as soon as it has finished.

    Everything is checked before the first episode: suites, policies, and that every method can
    prune every policy. After Ctrl-C the episodes in progress are finished; after a second one they
    are not.

    Args:
        cells: the matrix.
        out: run folder; run again with the same one, it continues.
        executor: what runs the episodes.
        control: overrides how policies are driven, see `Control.of`.
        videos: write a video of the first so many episodes of each cell.
        drop: names of conditions whose episodes in the folder are deleted first.
        progress: told what is planned and what has finished.

    Returns:
        Whether everything was run; False after Ctrl-C.

    Raises:
        ValueError: impossible cells, or a folder with episodes that do not compare.
        RuntimeError: another process writes to the folder, or episodes could not be run.
        ModuleNotFoundError: videos are asked for, and nothing is installed to write them with.
        OSError: the disk is full.
    """
    progress = progress or Progress()
    if videos < 0:
        raise ValueError(f"--video {videos}: write the videos of 0 or more episodes of a condition")
    if videos:
        encoder()
    if both := sorted({cell.condition.name for cell in cells} & set(drop)):
        raise ValueError(f"--drop {' '.join(both)}: this is among what is to be run")
    suites = {cell.suite: open_suite(cell.suite) for cell in cells}
    planned = plan(cells, suites, control=control)
    with Store(out, write=True) as store:
        where = {"threads": 1, "workers": executor.workers}
        store.begin(list(planned), {**stamp(executor.device), **where})
        if drop:
            store.drop(drop)
        missing = missing_jobs(planned, store, record=videos)
        left = Counter(job.planned for job in missing)
        progress.planned(list(planned), missing)
        with _Interruption() as interruption:
            for job, episode in executor.run(interruption.until(missing)):
                if episode.recording is not None:
                    film = video_path(Path(out), job.setup, job.condition.name, job.seed)
                    write_video(film, episode.recording, job.suite.hz)
                    keep_recording(film, episode.recording, job.suite.hz)
                store.add(job, episode)
                progress.finished(job, episode)
                left[job.planned] -= 1
                if not left[job.planned]:
                    progress.cell_finished(job.planned, *store.tally(job.planned))
        return not interruption.asked


class _Interruption:
    """Ctrl-C as a wish to stop: the first one is noted, the second one is raised."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def until(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """The jobs, up to the first Ctrl-C."""
        for job in jobs:
            if self.asked:
                return
            yield job

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
