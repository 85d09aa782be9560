"""Does it help to choose the budget call by call, and spend tokens where the deviation is large?

    python experiments/budget.py scope "vla-pruner:window=1" ...

For each rule every bucket is replayed on search.py's two sets. On the search set log deviation is
regressed (ridge) on what is known before a call's prefill; then each call gets the bucket that an
exchange rate of tokens for deviation makes best, by what is predicted. The rate is chosen to spend,
on the search set, as many tokens as a fixed budget. On the confirm set the deviation is compared
with that of fixed budgets, interpolated to the tokens that were really used. Beside it stands the
same allocation by the deviations themselves, the most that any predictor could reach. A rule whose
history depends on the budget (VLA-Pruner) is replayed at fixed budgets: its line is an
approximation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from search import DRAWS, Recordings

import vla_pruner as vp

BUCKETS = (0.0625, 0.125, 0.25, 0.5)
FIXED = (0.125, 0.25)
KNOWN = (
    "frame change",
    "hand moved",
    "last chunk",
    "last jump",
    "gripper",
    "call",
    "concentration",
)


class Replayed:
    """Deviation of every call of a set under every bucket, and what is known before it."""

    def __init__(self, recordings: Recordings, rule: str) -> None:
        name, _, options = rule.partition(":")
        tail = f":{options}" if options else ""
        table = [recordings.replay(f"{name}@{keep}{tail}") for keep in BUCKETS]
        self.off = [
            np.stack([bucket[e][0] for bucket in table]) for e in range(len(recordings.episodes))
        ]
        self.left = [
            np.stack([bucket[e][1] for bucket in table]) for e in range(len(recordings.episodes))
        ]
        self.known = [known(recordings, e) for e in range(len(recordings.episodes))]


def known(recordings: Recordings, number: int) -> np.ndarray:
    """What is known before each call `[calls, len(KNOWN)]`; zeros where there is no call before."""
    episode, full = recordings.episodes[number], recordings.full[number]
    spread = recordings.spread
    found = np.zeros((len(episode), len(KNOWN)))
    where = concentration(recordings, number)
    for c in range(len(episode)):
        found[c, 5] = min(c, 10)
        if c == 0:
            continue
        before, now = episode[c - 1], episode[c]
        found[c, 0] = max(
            np.abs(np.float64(a) - np.float64(b)).mean()
            for a, b in zip(images(before), images(now), strict=True)
        )
        if now.get("proprio") is not None:
            moved = np.float64(now["proprio"]) - np.float64(before["proprio"])
            found[c, 1] = np.abs(moved).mean()
        found[c, 2] = np.abs(full[c - 1] / spread).mean()
        if c > 1:
            found[c, 3] = np.abs((full[c - 1] - full[c - 2]) / spread).mean()
        found[c, 4] = float(np.ptp(np.sign(full[c - 1][..., -1])) > 0)
        found[c, 6] = where[c - 1]
    return found


def images(seen: dict[str, Any]) -> list[Any]:
    """Camera images of an observation."""
    given = seen["images"]
    return list(given.values()) if isinstance(given, dict) else list(given)


def concentration(recordings: Recordings, number: int) -> list[float]:
    """Share of the deep action attention on its 25 best tokens, call by call, all tokens there."""
    found = []
    with vp.prune(recordings.policy, "vla-pruner", keep=1.0, window=1) as session:
        for seen in recordings.episodes[number]:
            recordings.act(seen)
            score = session.last.action  # type: ignore[union-attr]
            score = score[0] / score[0].sum()
            found.append(float(score.topk(25).values.sum()))
    return found


def regression(sets: Replayed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and scale of what is known, and weights `[buckets, 1 + known]` of the log deviation."""
    x = np.concatenate(sets.known)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-9
    x = np.column_stack([np.ones(len(x)), (x - mean) / scale])
    y = np.log(np.concatenate(sets.off, axis=1) + 1e-3)
    ridge = np.eye(x.shape[1])
    ridge[0, 0] = 0
    return mean, scale, np.linalg.solve(x.T @ x + ridge, x.T @ y.T).T


def predicted(fit: tuple[np.ndarray, np.ndarray, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Expected deviation under each bucket `[buckets, calls]`."""
    mean, scale, weights = fit
    return np.exp(weights @ np.column_stack([np.ones(len(x)), (x - mean) / scale]).T)


def choose(expected: np.ndarray, rate: float) -> np.ndarray:
    """The bucket of each call at an exchange rate of deviation per token share."""
    return (expected + rate * np.array(BUCKETS)[:, None]).argmin(axis=0)


def rate_for(expected: list[np.ndarray], share: float) -> float:
    """The rate at which all calls together use this mean share."""
    low, high = 1e-6, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        used = np.concatenate([np.array(BUCKETS)[choose(e, middle)] for e in expected]).mean()
        low, high = (low, middle) if used < share else (middle, high)
    return high


def report(rule: str, search: Replayed, confirm: Replayed) -> None:
    """A line for each fixed budget."""
    fit = regression(search)
    x, y = np.concatenate(search.known), np.concatenate(search.off, axis=1)
    fresh = np.concatenate([predicted(fit, one) for one in confirm.known], axis=1)
    true = np.concatenate(confirm.off, axis=1)
    for share in FIXED:
        b = BUCKETS.index(share)
        alone = [spearman(x[:, i], y[b]) for i in range(len(KNOWN))]
        print(
            f"{rule} at {share}: rank correlation with a call's deviation (search set): "
            + ", ".join(f"{n} {r:+.2f}" for n, r in zip(KNOWN, alone, strict=True))
            + f"; of all together (fresh calls): {spearman(fresh[b], true[b]):+.2f}"
        )
        for who, of_search, of_confirm in (
            (
                "predicted",
                [predicted(fit, one) for one in search.known],
                [predicted(fit, one) for one in confirm.known],
            ),
            ("known afterwards", search.off, confirm.off),
        ):
            rate = rate_for(of_search, share)
            picks = [choose(one, rate) for one in of_confirm]
            got = [o[p, np.arange(len(p))] for o, p in zip(confirm.off, picks, strict=True)]
            used = [np.array(BUCKETS)[p] for p in picks]
            print(f"  {who}: {compared(got, used, confirm)}")


def compared(got: list[np.ndarray], used: list[np.ndarray], sets: Replayed) -> str:
    """Deviation, tokens, and the difference from a fixed budget of as many tokens."""
    n = np.array([len(one) for one in got])
    sums = np.array([one.sum() for one in got])
    shares = np.array([one.sum() for one in used])
    fixed = np.array([[o.sum() for o in off] for off in sets.off])  # [episodes, buckets]
    drawn = np.random.default_rng(0).integers(len(n), size=(DRAWS, len(n)))

    def apart(at: np.ndarray) -> float:
        calls = n[at].sum()
        curve = fixed[at].sum(axis=0) / calls
        same = np.interp(shares[at].sum() / calls, BUCKETS, curve)
        return float(sums[at].sum() / calls - same)

    everything = np.arange(len(n))
    low, high = np.quantile([apart(at) for at in drawn], [0.025, 0.975])
    mean = sums.sum() / n.sum()
    return (
        f"deviation {mean:.3f} with {shares.sum() / n.sum():.3f} of the tokens, "
        f"{apart(everything):+.3f} ({low:+.3f} to {high:+.3f}) against a fixed budget of as many; "
        f"buckets {np.unique(np.concatenate(used), return_counts=True)[1].tolist()}"
    )


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if np.ptp(x) > 0 else 0.0


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        folder = Path(__file__).parents[1] / "runs" / "search-observations"
        sets = {which: Recordings(which, folder) for which in ("search", "confirm")}
        for rule in sys.argv[1:]:
            report(rule, *(Replayed(sets[which], rule) for which in ("search", "confirm")))
