"""The FLOPs that the paper prints, beside what its own formulas give: `python -m` this module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vla_pruner.pruning.flops import prefill_flops, pruned_prefill_flops

SIZES: dict[str, Any] = {"layers": 32, "hidden": 4096, "ffn": 11008}
"""Llama 2 7B, the decoder of OpenVLA and OpenVLA-OFT."""


@dataclass(frozen=True)
class Printed:
    """A cell of arXiv 2511.16449v2: what is printed for a method at a budget.

    Args:
        table: where it stands.
        method: row.
        tokens, visual, kept: length of the prefill, visual tokens in it, those that stay.
        cut_layer: K that the text gives.
        tera: multiply-accumulates / 1e12, None where only the ratio is printed.
        percent: ratio to the unpruned prefill.
    """

    table: str
    method: str
    tokens: int
    visual: int
    kept: int
    cut_layer: int
    tera: float | None
    percent: float

    def formula(self, cut_layer: int | None = None) -> tuple[float, float]:
        """Multiply-accumulates / 1e12 and percent by Eq. 12 and 13, gated network."""
        layer = self.cut_layer if cut_layer is None else cut_layer
        full = prefill_flops(self.tokens, **SIZES)
        shape = (self.tokens, self.visual, self.kept)
        pruned = pruned_prefill_flops(*shape, cut_layer=layer, **SIZES)
        return pruned / 1e12, 100 * pruned / full

    def full_layers(self) -> float:
        """How many full layers would make Eq. 13 the printed ratio; a real number."""
        low, high = self.formula(0)[1], self.formula(SIZES["layers"])[1]
        return SIZES["layers"] * (self.percent - low) / (high - low)


_OPENVLA = (291, 256)
"""291 tokens make Eq. 11 the printed 1.906 T."""
_OFT = (588, 512)
"""588 tokens make it the printed 3.903 T as nearly as a whole number can."""


_TABLE_1 = """
FastV       1.136 59.60 2.219 56.85  0.757 39.72 1.401 35.89  0.568 29.80 1.082 27.72
SparseVLM   1.155 60.60 2.289 58.65  0.772 40.50 1.459 37.38  0.581 30.48 1.136 29.11
DivPrune    1.105 57.97 2.126 54.47  0.743 38.98 1.389 35.58  0.569 29.28 1.059 27.13
VLA-Pruner  1.139 59.76 2.234 57.24  0.758 39.77 1.420 36.38  0.571 29.96 1.096 28.08
"""
"""At 50, 25 and 12.5 %: T and percent of OpenVLA, T and percent of OpenVLA-OFT."""


def _table_1() -> list[Printed]:
    rows = []
    for column, (name, shape) in enumerate({"OpenVLA": _OPENVLA, "OFT": _OFT}.items()):
        for budget, divisor in enumerate((2, 4, 8)):
            for line in _TABLE_1.strip().splitlines():
                method, *cells = line.split()
                first = 4 * budget + 2 * column
                tera, percent = map(float, cells[first : first + 2])
                kept = shape[1] // divisor
                rows.append(Printed(f"1, {name}", method, *shape, kept, 3, tera, percent))
    return rows


def _table_6() -> list[Printed]:
    printed = {2: 37.90, 3: 39.77, 4: 41.98, 5: 43.08}
    return [
        Printed("6, OpenVLA", f"VLA-Pruner, K = {layer}", *_OPENVLA, 64, layer, None, percent)
        for layer, percent in printed.items()
    ]


PRINTED = (*_table_1(), *_table_6())


def table() -> str:
    """Every cell in Markdown: printed, by formula, and the number of full layers it stands for."""
    lines = [
        "| table | method | kept | printed T | printed % | formula T | formula % | full layers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in PRINTED:
        tera, percent = cell.formula()
        printed = "-" if cell.tera is None else f"{cell.tera:.3f}"
        lines.append(
            f"| {cell.table} | {cell.method} | {cell.kept} of {cell.visual} | {printed} | "
            f"{cell.percent:.2f} | {tera:.3f} | {percent:.2f} | {cell.full_layers():.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
