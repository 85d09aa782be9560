"""What a run found, in sentences: solved as often, so many times as fast, or why not."""

from __future__ import annotations

from dataclasses import dataclass

from vla_pruner.episodes.condition import ALL_TOKENS
from vla_pruner.reports.latency import Pace, WholeEpisodes, pace, whole_episodes
from vla_pruner.reports.summary import ConditionRow, Summary, percent

SMALL = 512
"""Width of a decoder below which choosing tokens weighs as much as computing them."""
WORTH = 1.05
"""A speed-up that is worth a word."""


def is_worse(row: ConditionRow) -> bool:
    """Whether a condition solves fewer scenes than all tokens, by the test that the row holds."""
    p_value = row.p_value if row.p_holm is None else row.p_holm
    if row.difference is None or row.difference >= 0 or p_value is None:
        return False
    return p_value < 0.05


@dataclass(frozen=True)
class Finding:
    """One condition against all tokens.

    Args:
        row, full: the two.
        speed: how fast the first is.
        whole: in whole episodes; None: no scene that both solved.
    """

    row: ConditionRow
    full: ConditionRow
    speed: Pace
    whole: WholeEpisodes | None

    @property
    def share(self) -> str:
        """Of the visual tokens, those that stay."""
        return percent(self.row.visual_kept / self.row.visual)

    @property
    def solved(self) -> str:
        """Success as a clause that follows "it"; rates where the two ran in different scenes."""
        row, full = self.row, self.full
        here, there = f"{row.successes} of {row.episodes}", f"{full.successes} of {full.episodes}"
        if row.difference is None:
            return f"solves {here} scenes; all tokens solve {there}"
        if is_worse(row):
            return f"solves fewer scenes: {here}, with all of them {there}"
        if row.difference == 0:
            return f"solves as many scenes, {here}"
        return f"solves {here} scenes instead of {there}"

    @property
    def pays(self) -> bool:
        """Whether it is faster: beyond the interval, and worth a word."""
        speedup, interval = self.speed.speedup, self.speed.interval
        if speedup is None or speedup < WORTH:
            return False
        return interval is None or interval.low > 1

    @property
    def sentence(self) -> str:
        """Success and speed."""
        speedup, pruned = self.speed.speedup, self.speed.pruned_speedup
        start = f"With {self.share} of its visual tokens the policy {self.solved}"
        if speedup is None:
            return f"{start}."
        if not self.pays:
            return f"{start}. It is no faster here: {times(speedup)}."
        name, overall = "the median call", speedup
        if self.whole is not None:
            name, overall = "a whole episode", self.whole.speedup
        if pruned is None or f"{pruned:.1f}" == f"{overall:.1f}":
            return f"{start}, and is {overall:.1f} times as fast."
        return f"{start}. A pruned call is {pruned:.1f} times as fast, {name} {overall:.1f} times."

    def reason(self, decoder: tuple[int, int] | None) -> str:
        """Why it does not pay, from what was measured; "" where it does.

        Args:
            decoder: its width and its number of layers; None: unknown.
        """
        if self.pays or self.speed.speedup is None:
            return ""
        pruned_ratio = percent(self.row.pruned_prefill_ratio)
        pruned = self.speed.pruned_speedup
        measured = f"Pruned calls compute {pruned_ratio} of the language model's prefill"
        if pruned is not None:
            measured += f" and are {times(pruned)}"
        if decoder is None:
            return f"{measured}: choosing the tokens costs about what leaving them out saves."
        width, layers = decoder
        if width < SMALL:
            return (
                f"{measured}. The decoder is small, {layers} layers of width {width}: choosing the "
                "tokens costs about what leaving them out saves, and image towers and action head "
                "take the rest. Where the decoder is a language model of ordinary width, pruning "
                "pays."
            )
        return (
            f"{measured}. The decoder has {layers} layers of width {width}; on this machine "
            "choosing the tokens costs about what leaving them out saves."
        )


def times(speedup: float) -> str:
    """0.94 as "0.94 times as fast"."""
    return f"{speedup:.2f} times as fast"


def best_of(summary: Summary) -> Finding | None:
    """The condition to speak of: the fastest of those that solve no fewer scenes, if any does.

    Otherwise the one that loses least. None: nothing to compare.
    """
    full = next((row for row in summary.rows if row.name == ALL_TOKENS), None)
    pruned = [row for row in summary.rows if row.name != ALL_TOKENS]
    if full is None or not pruned:
        return None
    paces = {row.name: pace(summary, row) for row in pruned}
    level = [row for row in pruned if row.difference is not None and row.difference >= 0]

    def rank(row: ConditionRow) -> tuple[float, float, int]:
        gap = row.difference if row.difference is not None else row.success - full.success
        return (0.0 if level else gap, paces[row.name].speedup or 0.0, -row.visual_kept)

    row = max(level or pruned, key=rank)
    return Finding(row, full, paces[row.name], whole_episodes(summary, row))


def overview(summary: Summary) -> tuple[str, str]:
    """How many conditions hold up against all tokens, and which of these is fastest."""
    best = best_of(summary)
    if best is None:
        rows = (f"{row.label}: {row.successes} of {row.episodes}" for row in summary.rows)
        return "Nothing to compare with all tokens yet", "; ".join(rows)
    pruned = [row for row in summary.rows if row.difference is not None]
    worse = [row for row in pruned if is_worse(row)]
    row, full, speed = best.row, best.full, best.speed.speedup
    if len(pruned) == 1:
        return best.sentence, ""
    said = f"{len(worse)} of {len(pruned)}" if worse else f"None of {len(pruned)}"
    verb = "solves" if len(worse) == 1 or not worse else "solve"
    first = f"{said} pruned conditions {verb} fewer scenes than all tokens"
    rest = (
        f"All tokens solve {full.successes} of {full.episodes}. Fewer: on the same scenes, by the "
        "exact test corrected for all of these rows (Holm), p below 0.05. "
    )
    level = row.difference is not None and row.difference >= 0
    rest += "The fastest that loses none" if level else "The one that loses least"
    rest += f" is {row.label}: {row.successes} of {row.episodes}"
    return first, f"{rest}, {times(speed)}." if speed is not None else f"{rest}."
