"""The report as one page that opens anywhere: numbers, videos, scores; nothing is loaded."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.episodes.episode import Episode
from vla_pruner.measure.statistics import Interval
from vla_pruner.reports.files import write_text
from vla_pruner.reports.latency import Pace, pace, pace_notes
from vla_pruner.reports.summary import (
    ConditionRow,
    Summary,
    episodes_csv,
    giga,
    percent,
    rows_csv,
)

Recordings = Mapping[tuple[str, int], dict[str, Any]]

COLUMNS = (
    "",
    "Success",
    "Against all tokens",
    "Visual tokens",
    "Prefill FLOPs",
    "Latency of a call",
    "Speed-up",
)


def write_page(
    path: Path,
    summary: Summary,
    conditions: Sequence[Condition],
    recordings: Recordings,
    *,
    command: str,
    objects: Sequence[str],
    hz: float,
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
    """
    parts = {
        "title": "VLA-Pruner: " + escape(summary.settings["policy"]),
        "eyebrow": escape(
            f"VLA-Pruner demo · {summary.settings['policy']} · {summary.environment['date'][:10]}"
            + (" · stand-in assets" if summary.settings.get("stand_in_assets") else "")
        ),
        "headline": escape(headline(summary)),
        "lead": escape(_LEAD),
        "notice": _notice(summary),
        "columns": "".join(f"<th scope='col'>{escape(column)}</th>" for column in COLUMNS),
        "rows": "".join(_row(row, pace(summary, row)) for row in summary.rows),
        "notes": escape(pace_notes(summary)),
        "scenes_note": escape(_SCENES_NOTE),
        "reading": "".join(f"<p>{escape(text)}</p>" for text in _READING),
        "numbers": "".join(f"<p>{escape(text)}</p>" for text in _NUMBERS),
        "command": escape(command),
        "facts": _facts(summary),
        "files": _files(summary),
        "data": _script_json(_data(summary, conditions, recordings, objects, hz)),
    }
    template = files("vla_pruner.reports").joinpath("demo_page.html").read_text("utf-8")
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template))


def headline(summary: Summary) -> str:
    """The result in one sentence: the fewest tokens against all of them, on the same scenes."""
    baseline = next((row for row in summary.rows if row.name == ALL_TOKENS), None)
    pruned = [row for row in summary.rows if row.name != ALL_TOKENS]
    if baseline is None:
        return "No episode has finished yet."
    if not pruned:
        return f"With all its visual tokens: {baseline.successes} of {baseline.episodes} scenes."
    fewest = min(pruned, key=lambda row: row.visual_kept)
    share = percent(fewest.visual_kept / fewest.visual)
    speed = pace(summary, fewest).speedup
    faster = f" Its calls are {speed:.2f} times as fast." if speed else ""
    return (
        f"With {share} of its visual tokens the policy solves {fewest.successes} of "
        f"{fewest.episodes} scenes; with all of them, {baseline.successes} of "
        f"{baseline.episodes}.{faster}"
    )


_LEAD = (
    "A robot arm is told in words what to do. The same trained policy runs in "
    "the same scenes again and again; all that changes is how many image patches its language "
    "model may look at."
)
_SCENES_NOTE = (
    "Every scene has a filled dot for each run that succeeded, an open one for each that did not."
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
    "Few scenes leave wide intervals: a difference that lies inside them is none that this report "
    "can show. More episodes narrow them.",
)


def _notice(summary: Summary) -> str:
    if summary.complete:
        return ""
    return (
        f"<p class='notice'>Partial report: {len(summary.episodes)} of {summary.planned} episodes "
        "have finished. The same command with <code>--resume</code> continues.</p>"
    )


def _row(row: ConditionRow, speed: Pace) -> str:
    interval = row.success_interval
    latency = f"95th percentile {speed.p95_ms:.1f}"
    if speed.pruned_ms is not None:
        latency += f"<br>pruned calls {speed.pruned_ms:.1f}"
    cells = [
        (
            f"<b>{row.successes} of {row.episodes}</b>{_interval_plot(row.success, interval)}"
            f"<small>{percent(interval.low)} to {percent(interval.high)}</small>"
        ),
        _difference(row),
        (
            f"<b>{row.visual_kept} of {row.visual}</b>"
            f"<small>{percent(row.visual_kept / row.visual)}</small>"
        ),
        (
            f"<b>{percent(row.prefill_ratio)}</b>"
            f"<small>{giga(row.prefill_macs)} per call"
            + (
                f"<br>{percent(row.pruned_prefill_ratio)} in pruned calls"
                if row.pruned_calls
                else ""
            )
            + "</small>"
        ),
        f"<b>{speed.median_ms:.1f} ms</b><small>{latency}</small>",
        _speedup(row, speed),
    ]
    body = "".join(
        f"<td data-label='{escape(label)}'>{cell}</td>"
        for label, cell in zip(COLUMNS[1:], cells, strict=True)
    )
    return f"<tr><td class='name'>{escape(row.label)}</td>{body}</tr>"


def _difference(row: ConditionRow) -> str:
    if row.difference is None or row.difference_interval is None:
        return "<small>the baseline</small>" if row.name == ALL_TOKENS else "<small>-</small>"
    low, high = row.difference_interval.low, row.difference_interval.high
    return (
        f"<b>{_signed(row.difference)} points</b>"
        f"<small>{_signed(low)} to {_signed(high)}<br>"
        f"gained {row.gained}, lost {row.lost}, p = {row.p_value:.2g}</small>"
    )


def _signed(share: float) -> str:
    points = round(100 * share)
    return f"{'−' if points < 0 else '+' if points > 0 else '±'}{abs(points)}"  # noqa: RUF001


def _speedup(row: ConditionRow, speed: Pace) -> str:
    if row.name == ALL_TOKENS:
        return "<small>the baseline</small>"
    if speed.speedup is None:
        return "<small>-</small>"
    lines = []
    if speed.interval is not None:
        lines.append(f"{speed.interval.low:.2f} to {speed.interval.high:.2f}")
    if speed.pruned_speedup is not None:
        lines.append(f"pruned calls {speed.pruned_speedup:.2f}")
    return f"<b>{speed.speedup:.2f}</b><small>{'<br>'.join(lines)}</small>"


def _interval_plot(share: float, interval: Interval) -> str:
    """A line from 0 to 100 %, the interval on it, and the rate."""
    low, high, rate = (2 + 116 * value for value in (interval.low, interval.high, share))
    return (
        "<svg class='interval' viewBox='0 0 120 12' aria-hidden='true'>"
        "<line class='axis' x1='2' x2='118' y1='6' y2='6'/>"
        f"<line class='range' x1='{low:.1f}' x2='{high:.1f}' y1='6' y2='6'/>"
        f"<circle cx='{rate:.1f}' cy='6' r='4'/></svg>"
    )


def _facts(summary: Summary) -> str:
    settings, environment = summary.settings, summary.environment
    control = settings["control"]
    facts = {
        "policy": f"{settings['policy']}, weights {settings['weights']}",
        "cameras": ", ".join(control["cameras"]),
        "control": f"{control['execute']} actions per call, at most {settings['step_limit']} steps",
        "seeds": f"{settings['seeds'][0]} to {settings['seeds'][-1]}, never trained on",
        **{name: value for name, value in environment.items() if value is not None},
    }
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())


def _files(summary: Summary) -> str:
    contents = {
        "results.json": ("application/json", json.dumps(summary.as_dict())),
        "results.csv": ("text/csv", rows_csv(summary)),
        "episodes.csv": ("text/csv", episodes_csv(summary)),
    }
    links = []
    for name, (kind, text) in contents.items():
        encoded = base64.b64encode(text.encode()).decode()
        links.append(f"<a download='{name}' href='data:{kind};base64,{encoded}'>{name}</a>")
    return "".join(links)


def _data(
    summary: Summary,
    conditions: Sequence[Condition],
    recordings: Recordings,
    objects: Sequence[str],
    hz: float,
) -> dict[str, Any]:
    """What the players need: every scene with the run of each condition."""
    scenes: dict[int, list[Episode]] = {}
    for episode in summary.episodes:
        scenes.setdefault(episode.seed, []).append(episode)
    return {
        "hz": hz,
        "conditions": [{"name": c.name, "label": c.label} for c in conditions],
        "scenes": [
            {
                "seed": seed,
                "name": objects[runs[0].target],
                "instruction": runs[0].instruction,
                "runs": {
                    run.condition: {
                        "success": run.success,
                        "steps": run.steps,
                        "recording": recordings.get((run.condition, seed)),
                    }
                    for run in runs
                },
            }
            for seed, runs in sorted(scenes.items())
        ],
    }


def _script_json(values: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
