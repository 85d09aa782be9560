"""The analysis as one page that opens anywhere: plots, tables, films; nothing is loaded."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vla_pruner.analysis.pictures import film, strip
from vla_pruner.analysis.record import Trace
from vla_pruner.analysis.tables import Rows, to_csv
from vla_pruner.reports.document import html_page
from vla_pruner.reports.files import write_text
from vla_pruner.reports.plots import lines

PICTURE_BYTES = 2_300_000
"""Films are left out once a page's pictures are this large, so that it stays below 3 MB."""

_MEASURES = {
    "prefill_action": "prefill and action, within a step",
    "consecutive": "action and action, of consecutive steps",
    "pool_ratio": "|C_dual| / |C_vl|",
}


def write_page(
    path: Path,
    traces: Sequence[Trace],
    tables: Mapping[str, Rows],
    *,
    cameras: Sequence[str],
    facts: Mapping[str, Any],
    command: str,
    planned: int,
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        traces: finished episodes.
        tables: "steps", "overlaps", "forecasts", "agreement".
        cameras: names, in the order of the views.
        facts: what was run, and on what.
        command: what to type to make this page again.
        planned: episodes that were to be run.
    """
    parts = ["<h1>What the policy looks at</h1>"]
    if len(traces) < planned:
        parts.append(
            f"<p class='notice'>Partial: {len(traces)} of {planned} episodes have finished. The "
            "same command with <code>--resume</code> continues.</p>"
        )
    parts.append(
        "<p>Every episode was run on all visual tokens, so that the attention below is what the "
        "untouched policy pays. The methods were then shown the same images, in order. Means are "
        "over calls; lowest and highest are the means of single episodes.</p>"
    )
    parts += _overlaps(traces, tables)
    parts += _forecasts(tables["forecasts"])
    parts += _agreement(tables["agreement"])
    parts += _pictures(traces, cameras)
    parts += ["<h2>How it was made</h2>", f"<pre>{escape(command)}</pre>", "<dl>"]
    parts += [f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items()]
    parts += ["</dl><p>"]
    for name, rows in tables.items():
        encoded = base64.b64encode(to_csv(rows).encode()).decode()
        uri = f"data:text/csv;base64,{encoded}"
        parts.append(f"<a download='{name}.csv' href='{uri}'>{name}.csv</a> ")
    body = "\n".join([*parts, "</p>"])
    write_text(path, html_page("VLA-Pruner analysis", body))


def _overlaps(traces: Sequence[Trace], tables: Mapping[str, Rows]) -> list[str]:
    parts = [
        "<h2>Prefill and action look at different patches</h2>",
        "<p>Share of the k most attended patches that two scores have in common, k being the "
        "budget (paper, Fig. 2), and how much larger the pool of both levels is than the budget "
        "(Fig. 11; 1: both levels want the same, 2: nothing in common). The prefill score is read "
        "in layer K-1, the action score in the latter half of the layers, where the method reads "
        "them; the paper's figure averages over all layers.</p>",
        _table(
            ("keep", "measure", "mean", "lowest", "highest", "calls"),
            [{**row, "measure": _MEASURES[row["measure"]]} for row in tables["overlaps"]],
        ),
    ]
    if not traces:
        return parts
    seed = traces[0].seed
    keeps = list(dict.fromkeys(row["keep"] for row in tables["steps"]))

    def of(keep: Any, measure: str) -> list[float | None]:
        return [
            row[measure] for row in tables["steps"] if row["seed"] == seed and row["keep"] == keep
        ]

    overlaps = {
        f"{_MEASURES[m]}, keep {keeps[0]}": of(keeps[0], m)
        for m in ("prefill_action", "consecutive")
    }
    parts += [f"<h3>Overlap, scene {seed}</h3>", lines(overlaps, x_label="call of the policy")]
    pools = {f"keep {keep}": of(keep, "pool_ratio") for keep in keeps}
    parts += [
        f"<h3>|C_dual| / |C_vl|, scene {seed}</h3>",
        lines(pools, x_label="call of the policy", low=1.0, high=2.0),
    ]
    return parts


def _forecasts(rows: Rows) -> list[str]:
    return [
        "<h2>How well the next step's attention can be forecast</h2>",
        "<p>Missed: share of the k patches that actions looked at most which the forecast does "
        "not name. Distance: total variation between forecast and observation, 0 to 1. Predictors "
        "without a method's name see every token at every step; the others remember what a "
        "pruning session leaves them, with different ideas of what to assume of cut tokens. All "
        "are compared at the same calls.</p>",
        _table(
            ("keep", "predictor", "missed", "lowest", "highest", "distance", "calls"),
            sorted(rows, key=lambda row: (-row["keep"], row["missed"])),
        ),
    ]


def _agreement(rows: Rows) -> list[str]:
    return [
        "<h2>Agreement of the methods</h2>",
        "<p>Jaccard index of the sets that two methods keep of the same images: 1, the same; 0, "
        "nothing in common; two random sets of a share p of the patches have about p / (2 - p). "
        "Only calls that both prune; agreement.csv also has the lowest and highest episode.</p>",
        *(_matrix(keep, rows) for keep in dict.fromkeys(row["keep"] for row in rows)),
    ]


def _matrix(keep: Any, rows: Rows) -> str:
    """Means of one budget as a square, shaded by their size; the diagonal is left empty."""
    means = {(row["a"], row["b"]): row["mean"] for row in rows if row["keep"] == keep}
    means |= {(b, a): mean for (a, b), mean in means.items()}
    names = list(dict.fromkeys(name for name, _ in means))
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in ("", *names))
    lines = []
    for name in names:
        cells = [f"<th scope='row'>{escape(name)}</th>"]
        for other in names:
            mean = means.get((name, other))
            shade = f" style='background:rgb(56 132 255/{mean:.2f})'" if mean is not None else ""
            cells.append(f"<td{shade}>{'' if mean is None else f'{mean:.2f}'}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table class='square'><tr>{head}</tr>{''.join(lines)}</table>"
    return f"<h3>keep {keep}</h3><div class='scroll'>{table}</div>"


def _pictures(traces: Sequence[Trace], cameras: Sequence[str]) -> list[str]:
    """Strips of the first scene, then films, scene by scene, while there is room."""
    parts, left = ["<h2>Step by step</h2>"], PICTURE_BYTES
    for number, trace in enumerate(traces):
        names = _shown(trace.replays)
        panels = ["camera", "prefill score", "action score", *names]
        for camera, title in enumerate(cameras):
            made = [film(trace, camera, names)]
            if number == 0:
                made.insert(0, strip(trace, camera, names))
            size = sum(map(len, made))
            if size > left:
                parts.append("<p>Further films are left out to keep this page small.</p>")
                return parts
            left -= size
            alt = escape(f"{title}: {', '.join(panels)}")
            pictures = "".join(f"<img src='{uri}' alt='{alt}'>" for uri in made)
            parts.append(
                f"<h3>Scene {trace.seed}, {escape(title)}: {escape(trace.instruction)}</h3>"
                f"<p>From left to right: {escape(', '.join(panels))}.</p>{pictures}"
            )
    return parts


def _shown(names: Iterable[str]) -> list[str]:
    """The replays to draw: of the first budget, and of VLA-Pruner without the kinds of memory."""
    plain = [name for name in names if "(" not in name]
    return [name for name in plain if name.endswith("@" + plain[0].partition("@")[2])]


def _table(columns: Sequence[str], rows: Rows) -> str:
    if not rows:
        return "<p>No call to compare: episodes were too short, or there is one method.</p>"
    head = "".join(f"<th scope='col'>{column}</th>" for column in columns)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_cell(row[column])}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else escape(str(value))
