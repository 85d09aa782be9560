"""What a quarter of the visual tokens saves in a call of published policies, by formula.

    python experiments/published.py

Multiply-accumulates of towers, prefix and all flow steps, from the sizes in their configurations:
pi0 and pi0.5 (openpi: Gemma 2B and 300M, SigLIP So400m at 224 pixels, chunks of 50 actions, ten
flow steps, prompts of 48 and 200 tokens), SmolVLA (lerobot: 16 layers of SmolVLM2-500M, SigLIP at
512 pixels). Tokens leave before layer 3; choosing them is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

CUT, FLOW_STEPS, CHUNK = 3, 10, 50


@dataclass(frozen=True)
class Stack:
    """Layers: width, and widths of queries, of keys and values, of the feed-forward network."""

    layers: int
    width: int
    queries: int
    keys: int
    ffn: int
    gated: bool = True

    def layer(self, tokens: int, seen: int) -> int:
        """Of one layer that computes `tokens` and sees `seen`."""
        projections = 2 * self.width * (self.queries + self.keys)
        network = (3 if self.gated else 2) * self.width * self.ffn
        return tokens * (projections + network) + 2 * tokens * seen * self.queries


@dataclass(frozen=True)
class Policy:
    """Cameras, patches of a tower and tokens of a camera, words, state tokens, three stacks."""

    cameras: int
    patches: int
    tokens: int
    words: int
    state: int
    tower: Stack
    prefix: Stack
    expert: Stack

    def parts(self, keep: float) -> tuple[int, int, int]:
        """Towers, prefix, flow steps."""
        visual, suffix = self.cameras * self.tokens, self.state + CHUNK
        towers = self.cameras * self.tower.layers * self.tower.layer(self.patches, self.patches)
        prefix = flow = 0
        for layer in range(self.prefix.layers):
            seen = self.words + (visual if layer < CUT else int(keep * visual))
            prefix += self.prefix.layer(seen, seen)
            flow += FLOW_STEPS * self.expert.layer(suffix, suffix + seen)
        return towers, prefix, flow

    def saved(self, keep: float) -> float:
        """Share of a call."""
        return 1 - sum(self.parts(keep)) / sum(self.parts(1.0))


SO400M = Stack(27, 1152, 1152, 1152, 4304, gated=False)
GEMMA = Stack(18, 2048, 2048, 256, 16384), Stack(18, 1024, 2048, 256, 4096)
POLICIES = {
    "pi0": Policy(3, 256, 256, 48, 1, SO400M, *GEMMA),
    "pi0.5": Policy(3, 256, 256, 200, 0, SO400M, *GEMMA),
    "SmolVLA": Policy(
        2,
        1024,
        64,
        49,
        0,
        Stack(12, 768, 768, 768, 3072, gated=False),
        Stack(16, 960, 960, 320, 2560),
        Stack(16, 720, 960, 320, 2048),
    ),
}


def main() -> None:
    for name, policy in POLICIES.items():
        towers, *others = policy.parts(1.0)
        print(
            f"{name}: {100 * policy.saved(0.25):.0f} % saved at a quarter of the tokens; "
            f"towers are {100 * towers / (towers + sum(others)):.0f} % of a full call"
        )


if __name__ == "__main__":
    main()
