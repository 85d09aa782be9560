"""Counters, gauges and histograms of a server, as text that Prometheus reads."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict

PREFIX = "vla_pruner_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

HELP = {
    "answers_total": "Answers sent, by kind: fresh, late.",
    "errors_total": "Observations without an answer, by kind: refused, busy, hung, failed.",
    "warm_up_total": "Answers worked out on all visual tokens because the history was short.",
    "passes_total": "Passes of the policy.",
    "worker_restarts_total": "Workers that hung or died and were replaced.",
    "rung_changes_total": "Steps on the ladder of budgets, by direction.",
    "connections_total": "Connections, by outcome: accepted, refused.",
    "bad_messages_total": "Messages that were refused before they reached the policy.",
    "log_lines_dropped_total": "Lines of log that were left out, because there were too many.",
    "episodes": "Episodes that are open.",
    "connections": "Connections that are open.",
    "waiting": "Observations that wait for a pass.",
    "keep_ratio": "Share of the visual tokens that the last pass kept.",
    "rung": "Rung of the ladder in use; 0 keeps most tokens.",
    "ready": "Whether the warm-up is over and observations are taken.",
    "answer_seconds": "From the arrival of an observation to its answer.",
    "pass_seconds": "One pass of the policy.",
    "pass_rows": "Observations that shared a pass.",
}
_BUCKETS = {"answer_seconds": SECONDS, "pass_seconds": SECONDS, "pass_rows": ROWS}


class Metrics:
    """Numbers by name and label; safe to call from any thread.

    Names are those of `HELP`; another one raises KeyError.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._seen: dict[str, list[int]] = {
            name: [0] * (len(bounds) + 1) for name, bounds in _BUCKETS.items()
        }
        self._sums: dict[str, float] = defaultdict(float)

    def add(self, name: str, kind: str = "", value: float = 1.0) -> None:
        """Count up."""
        HELP[name]
        with self._lock:
            self._values[name][kind] += value

    def put(self, name: str, value: float) -> None:
        """Set a gauge."""
        HELP[name]
        with self._lock:
            self._values[name][""] = float(value)

    def observe(self, name: str, value: float) -> None:
        """One more value of a histogram."""
        with self._lock:
            self._seen[name][bisect_left(_BUCKETS[name], value)] += 1
            self._sums[name] += value

    def get(self, name: str, kind: str | None = None) -> float:
        """A counter or gauge; the sum of all kinds, if none is named."""
        HELP[name]
        with self._lock:
            values = self._values.get(name, {})
            return sum(values.values()) if kind is None else values.get(kind, 0.0)

    def text(self) -> str:
        """Everything, in Prometheus' text format (version 0.0.4)."""
        with self._lock:
            lines: list[str] = []
            for name, said in HELP.items():
                full = PREFIX + name
                sort = "counter" if name.endswith("_total") else "gauge"
                sort = "histogram" if name in _BUCKETS else sort
                lines += [f"# HELP {full} {said}", f"# TYPE {full} {sort}"]
                if name in _BUCKETS:
                    lines += self._histogram(name, full)
                    continue
                for kind, value in sorted(self._values.get(name, {"": 0.0}).items()):
                    label = f'{{kind="{kind}"}}' if kind else ""
                    lines.append(f"{full}{label} {value:.12g}")
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str, full: str) -> list[str]:
        lines, total = [], 0
        for bound, seen in zip((*_BUCKETS[name], float("inf")), self._seen[name], strict=True):
            total += seen
            shown = "+Inf" if bound == float("inf") else f"{bound:g}"
            lines.append(f'{full}_bucket{{le="{shown}"}} {total}')
        return [*lines, f"{full}_sum {self._sums[name]:.6f}", f"{full}_count {total}"]
