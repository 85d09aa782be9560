"""The rows of a summary for a terminal of 80 columns."""

from __future__ import annotations

from rich.table import Table

from vla_pruner.reports.latency import pace
from vla_pruner.reports.summary import Summary, percent


def table(summary: Summary, title: str | None = None) -> Table:
    """The rows for a terminal of 80 columns."""
    result = Table(show_lines=True, title=title, title_justify="left")
    for column in ("", "success", "visual\ntokens", "prefill\nFLOPs", "latency, ms", "speed-up"):
        result.add_column(column, justify="right" if column else "left")
    for row in summary.rows:
        speed, success = pace(summary, row), row.success_interval
        latency, speedup = f"{speed.median_ms:.1f}\np95 {speed.p95_ms:.1f}", "-"
        if speed.speedup is not None:
            speedup = f"{speed.speedup:.2f}"
        if speed.interval is not None:
            speedup += f"\n{speed.interval.low:.2f} to {speed.interval.high:.2f}"
        if speed.pruned_ms is not None:
            latency += f"\npruned {speed.pruned_ms:.1f}"
        if speed.pruned_speedup is not None:
            speedup += f"\npruned {speed.pruned_speedup:.2f}"
        result.add_row(
            row.label.replace(", ", "\n"),
            f"{row.successes} of {row.episodes}\n{percent(success.low)} to {percent(success.high)}",
            f"{row.visual_kept}\nof {row.visual}",
            percent(row.prefill_ratio),
            latency,
            speedup,
        )
    return result
