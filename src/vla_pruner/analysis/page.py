"""The analysis as one page that opens anywhere: plots, tables, films; nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_pruner.analysis.pictures import scenes_of
from vla_pruner.analysis.record import Trace
from vla_pruner.analysis.tables import Rows
from vla_pruner.pages.engine import download, render
from vla_pruner.pages.plots import lines
from vla_pruner.pages.report_page import shown
from vla_pruner.reports.document import Table
from vla_pruner.reports.files import to_csv, write_text
from vla_pruner.reports.summary import percent

PICTURE_BYTES = 2_300_000
"""Films are left out once a page's pictures are this large, so that it stays below 3 MB."""

_MEASURES = {
    "prefill_action": "prefill and action, within a step",
    "consecutive": "action and action, of consecutive steps",
    "pool_ratio": "|C_dual| / |C_vl|",
    "prefill_visual": "attention that the prefill gives to visual tokens",
    "action_visual": "attention that actions give to visual tokens",
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
    overlaps, forecasts, agreement = (tables[k] for k in ("overlaps", "forecasts", "agreement"))
    data, left_out = scenes_of(traces, cameras, PICTURE_BYTES)
    policy = str(facts.get("policy", "")).partition(",")[0]
    page = render(
        "analysis.html",
        title="VLA-Pruner analysis",
        eyebrow=" · ".join(part for part in ("VLA-Pruner analysis", policy) if part),
        headline=headline(overlaps),
        notices=_notices(len(traces), planned),
        overlap_heading=overlap_heading(overlaps),
        overlap_table=shown(_overlap_table(overlaps)),
        plots=_plots(traces, tables["steps"]),
        forecast_heading=forecast_heading(forecasts),
        forecast_tables=[
            (f"keep {keep}", shown(_forecast_table(forecasts, keep))) for keep in _keeps(forecasts)
        ],
        agreement_heading=agreement_heading(agreement),
        agreement_tables=[
            (f"keep {keep}", shown(agreement_table(agreement, keep))) for keep in _keeps(agreement)
        ],
        left_out=left_out,
        command=command,
        facts=facts,
        files={f"{name}.csv": download(to_csv(rows)) for name, rows in tables.items()},
        data=data,
    )
    write_text(path, page)


# -- headings, from the data ---------------------------------------------------------------------


def headline(overlaps: Rows) -> str:
    """What prompt and actions have in common, at the smallest budget."""
    found = [row for row in _of(overlaps, "prefill_action") if row["mean"] is not None]
    if not found:
        return "What the policy looks at"
    row = min(found, key=lambda row: row["keep"])
    return (
        f"Of the patches that the prompt looks at most, the actions look at {percent(row['mean'])} "
        f"most, too (keep {row['keep']})"
    )


def overlap_heading(overlaps: Rows) -> str:
    """Overlap within a step against that of consecutive ones."""
    within, between = (
        {row["keep"]: row["mean"] for row in _of(overlaps, measure)}
        for measure in ("prefill_action", "consecutive")
    )
    pairs = [
        (keep, within[keep], between[keep])
        for keep in within
        if within[keep] is not None and between.get(keep) is not None
    ]
    if not pairs:
        return "Overlap of prefill and action attention"
    keep, own, next_ = min(pairs)
    more = "more" if next_ > own else "less" if next_ < own else "as much"
    than = "as" if more == "as much" else "than"
    return (
        f"Consecutive actions share {percent(next_)} of their best patches, {more} {than} prefill "
        f"and action, {percent(own)} (keep {keep})"
    )


def forecast_heading(forecasts: Rows) -> str:
    """The best predictor, and what it misses."""
    found = [row for row in forecasts if row["missed"] is not None]
    if not found:
        return "How well the next step's attention can be forecast"
    keep = min(row["keep"] for row in found)
    best = min((row for row in found if row["keep"] == keep), key=lambda row: row["missed"])
    return (
        f"The best forecast, {best['predictor']}, misses {percent(best['missed'])} of the patches "
        f"that the next action looks at most (keep {keep})"
    )


def agreement_heading(agreement: Rows) -> str:
    """The two methods that agree most."""
    found = [row for row in agreement if row["mean"] is not None]
    if not found:
        return "Agreement of the methods"
    keep = min(row["keep"] for row in found)
    best = max((row for row in found if row["keep"] == keep), key=lambda row: row["mean"])
    return (
        f"{best['a']} and {best['b']} keep most in common: Jaccard index {best['mean']:.2f} "
        f"(keep {keep})"
    )


# -- tables and plots ----------------------------------------------------------------------------


def _overlap_table(rows: Rows) -> Table:
    header = ("measure", "keep", "mean", "lowest episode", "highest episode", "calls")
    ordered = sorted(rows, key=lambda row: list(_MEASURES).index(row["measure"]))
    return Table(
        "Overlap of attention",
        header,
        [
            [
                _MEASURES[row["measure"]],
                str(row["keep"]),
                *(_number(row[name]) for name in ("mean", "lowest", "highest")),
                str(row["calls"]),
            ]
            for row in ordered
        ],
    )


def _forecast_table(rows: Rows, keep: Any) -> Table:
    header = ("predictor", "missed", "lowest episode", "highest episode", "distance", "calls")
    own = [row for row in rows if row["keep"] == keep]
    return Table(
        f"Errors of forecasts, keep {keep}",
        header,
        [
            [
                row["predictor"],
                *(_number(row[name]) for name in ("missed", "lowest", "highest", "distance")),
                str(row["calls"]),
            ]
            for row in sorted(own, key=lambda row: row["missed"])
        ],
    )


def agreement_table(rows: Rows, keep: Any) -> Table:
    """Means of one budget as a square, shaded by their size; the diagonal is left empty."""
    means = {(row["a"], row["b"]): row["mean"] for row in rows if row["keep"] == keep}
    means |= {(b, a): mean for (a, b), mean in means.items()}
    names = list(dict.fromkeys(name for name, _ in means))
    found = [[means.get((name, other)) for other in names] for name in names]
    return Table(
        f"Agreement, keep {keep}",
        ["", *names],
        [
            [name, *("" if mean is None else f"{mean:.2f}" for mean in row)]
            for name, row in zip(names, found, strict=True)
        ],
        found,
    )


def _plots(traces: Sequence[Trace], steps: Rows) -> list[tuple[str, Any]]:
    if not traces:
        return []
    seed = traces[0].seed
    keeps = _keeps(steps)

    def of(keep: Any, measure: str) -> list[float | None]:
        return [row[measure] for row in steps if row["seed"] == seed and row["keep"] == keep]

    overlaps = {
        f"{_MEASURES[measure]}, keep {keeps[0]}": of(keeps[0], measure)
        for measure in ("prefill_action", "consecutive")
    }
    pools = {f"keep {keep}": of(keep, "pool_ratio") for keep in keeps}
    label = "call of the policy"
    return [
        (f"Overlap, scene {seed}", lines(overlaps, x_label=label)),
        (f"|C_dual| / |C_vl|, scene {seed}", lines(pools, x_label=label, low=1.0, high=2.0)),
    ]


def _notices(finished: int, planned: int) -> list[str]:
    if finished >= planned:
        return []
    return [
        f"Partial: {finished} of {planned} episodes have finished. The same command with --resume "
        "continues."
    ]


def _keeps(rows: Rows) -> list[Any]:
    return list(dict.fromkeys(row["keep"] for row in rows))


def _of(rows: Rows, measure: str) -> Rows:
    return [row for row in rows if row["measure"] == measure]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
