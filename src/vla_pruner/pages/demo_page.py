"""The page of `vla-pruner demo`: solved as often, so many times as fast; films; numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_pruner.episodes.condition import Condition
from vla_pruner.pages.dots import chart
from vla_pruner.pages.engine import download, render
from vla_pruner.pages.films import Recordings, film_data
from vla_pruner.pages.findings import Finding, best_of
from vla_pruner.reports.files import write_text
from vla_pruner.reports.latency import pace_notes
from vla_pruner.reports.summary import Summary, episodes_csv, rows_csv


def write_page(
    path: Path,
    summary: Summary,
    conditions: Sequence[Condition],
    recordings: Recordings,
    *,
    command: str,
    objects: Sequence[str],
    hz: float,
    decoder: tuple[int, int] | None = None,
) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        summary: the numbers; conditions without a finished episode have no row.
        conditions: all that were planned, in the order to show them.
        recordings: by condition name and seed; an episode may lack one.
        command: what to type to make this report again.
        objects: what an instruction may name, by target.
        hz: steps of the scene in a second.
        decoder: width and number of layers of the policy's; None: unknown.
    """
    settings, best = summary.settings, best_of(summary)
    page = render(
        "demo.html",
        title=f"VLA-Pruner: {settings['policy']}",
        eyebrow=_eyebrow(summary),
        headline=headline(summary),
        notices=_notices(summary),
        answers=answers(best) if best else [],
        reason=best.reason(decoder) if best else "",
        lead=_LEAD,
        chart=chart("Success and speed of every condition", summary, conditions),
        notes=pace_notes(summary),
        scenes_note=_SCENES_NOTE,
        reading=_READING,
        numbers=_NUMBERS,
        command=command,
        facts=_facts(summary),
        files={
            "results.json": download(json.dumps(summary.as_dict()), "application/json"),
            "results.csv": download(rows_csv(summary)),
            "episodes.csv": download(episodes_csv(summary)),
        },
        data=film_data(summary.episodes, conditions, recordings, objects, hz),
    )
    write_text(path, page)


def headline(summary: Summary) -> str:
    """The result in a sentence or two, on the same scenes."""
    best = best_of(summary)
    if best is not None:
        return best.sentence
    if not summary.rows:
        return "No episode has finished yet."
    row = summary.rows[0]
    return f"{row.label}: {row.successes} of {row.episodes} scenes are solved so far."


def answers(best: Finding) -> list[tuple[str, str]]:
    """The numbers that people look for, each with what it is."""
    row, full, speed = best.row, best.full, best.speed
    found = [
        (
            f"{row.successes} of {row.episodes}",
            f"scenes solved with {best.share} of the visual tokens; with all of them "
            f"{full.successes} of {full.episodes}",
        )
    ]
    if speed.pruned_speedup is not None:
        found.append(
            (f"{speed.pruned_speedup:.2f}x", "speed of a pruned call, images in, actions out")
        )
    whole = best.whole
    if speed.speedup is not None and (whole is None or whole.scenes is not None):
        found.append((f"{speed.speedup:.2f}x", "speed of the median call"))
    if whole is not None:
        where = "one episode, replayed" if whole.scenes is None else _scenes(whole.scenes)
        found.append(
            (
                f"{whole.speedup:.2f}x",
                f"speed of whole episodes, warm-up calls included ({where})",
            )
        )
    return found


def _scenes(count: int) -> str:
    return f"{count} scenes that both solve" if count > 1 else "one scene that both solve"


def _eyebrow(summary: Summary) -> str:
    parts = ["VLA-Pruner demo", summary.settings["policy"], summary.environment["date"][:10]]
    if summary.settings.get("stand_in_assets"):
        parts.append("stand-in assets")
    return " · ".join(parts)


def _notices(summary: Summary) -> list[str]:
    if summary.complete:
        return []
    return [
        f"Partial report: {len(summary.episodes)} of {summary.planned} episodes have finished. "
        "The same command with --resume continues."
    ]


def _facts(summary: Summary) -> dict[str, Any]:
    settings, environment = summary.settings, summary.environment
    control = settings["control"]
    return {
        "policy": f"{settings['policy']}, weights {settings['weights']}",
        "cameras": ", ".join(control["cameras"]),
        "control": f"{control['execute']} actions per call, at most {settings['step_limit']} steps",
        "seeds": f"{settings['seeds'][0]} to {settings['seeds'][-1]}, never trained on",
        **{name: value for name, value in environment.items() if value is not None},
    }


_LEAD = (
    "A robot arm is told in words what to do. The same trained policy runs in "
    "the same scenes again and again; all that changes is how many image patches its language "
    "model may look at."
)
_SCENES_NOTE = (
    "Every scene has a filled dot for each run that succeeded, an open one for each that did not. "
    "The films wait at the first call that drops tokens. A title opens one run alone, with its "
    "time line."
)
_READING = (
    "Each square is one visual token, a patch of the camera image. Dark squares are dropped "
    "inside the language model, after its first layers. Blue: among the best by semantic score, "
    "the attention of all prompt tokens. Orange: among the best by the action score, forecast from "
    "what the last actions looked at. A square with both colours is among the best of both.",
    "The first calls of an episode run on all tokens, since there are no actions to look back on. "
    "Between two calls the arm carries out the actions of the last one; the squares are those of "
    "that call.",
    "The small maps show both scores before the cut, stronger is higher (square-root scale, one "
    "scale for all cameras of a call). A score can be high where the square is dropped: among "
    "similar candidates the least redundant ones stay.",
)
_NUMBERS = (
    "All runs use the same weights and start from the same states. A call of the policy is timed "
    "as a whole: image processing, vision towers, language model, action head. Pruning "
    "shortens the language model's share alone, so the speed-up is smaller than that of FLOPs.",
    "Whole episodes: the policy's time from the first call to the last. The first calls run on all "
    "tokens, so short episodes gain less than a pruned call does; more calls count against a row.",
    "Few scenes leave wide intervals: a difference that lies inside them is none that this report "
    "can show. More episodes narrow them.",
)
