"""Sizes and conventions of a pi0 or pi0.5 policy; the defaults are the published models'."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..given.checks import flag, number, shown, whole

Scaling = Literal["quantiles", "mean-std", "min-max", "identity"]
SCALINGS = ("quantiles", "mean-std", "min-max", "identity")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The SigLIP tower of PaliGemma (So400m/14 at 224 pixels)."""

    width: int = 1152
    depth: int = 27
    heads: int = 16
    mlp: int = 4304
    patch: int = 14
    image_size: int = 224

    def __post_init__(self) -> None:
        for name in ("width", "heads", "mlp", "patch", "image_size"):
            whole(name, getattr(self, name))
        whole("depth", self.depth, 1, 1024)
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} must be a multiple of heads={self.heads}")
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of patch={self.patch}"
            )

    @property
    def patches(self) -> int:
        """Visual tokens of one image."""
        return (self.image_size // self.patch) ** 2


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """One of the two Gemma stacks."""

    width: int
    mlp: int
    depth: int = 18
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256

    def __post_init__(self) -> None:
        for name in ("width", "mlp", "heads", "kv_heads", "head_dim"):
            whole(name, getattr(self, name))
        whole("depth", self.depth, 1, 1024)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")


GEMMA_2B = StackConfig(width=2048, mlp=16384)
GEMMA_300M = StackConfig(width=1024, mlp=4096)
VARIANTS = {"gemma_2b": GEMMA_2B, "gemma_300m": GEMMA_300M}
"""Names of the stacks in published config.json files."""


@dataclass(frozen=True, kw_only=True)
class Pi0Config:
    """A pi0 (arXiv:2410.24164) or pi0.5 (arXiv:2504.16054) policy.

    Args:
        kind: "pi0" has a state token in the suffix, "pi05" writes the state into the prompt and
            tells the time to the expert's norms.
        vision, prefix, expert: sizes. The expert reads keys and values of the prefix layer by
            layer, so that depth, key-value heads and head size of the two agree.
        cameras: names of the cameras, in the order of their tokens.
        chunk: actions of one call.
        max_action_dim, max_state_dim: what actions and states are padded to with zeros.
        action_dim, proprio_dim: what the robot has.
        flow_steps: Euler steps from noise (time 1) to actions (time 0).
        max_tokens: prompts are padded to this length on the right, or cut off; None: to the longest
            of a batch.
        pad_state: whether pi0.5 writes the padded state into its prompt.
        action_scaling, state_scaling: statistics that relate robot units to the policy's.
        epsilon: added to spans, against division by zero.
        norm_stats: `{"action": {"mean": [...], "std": ..., "q01": ..., "q99": ...}, "state": ...}`.
        crop_area: share of the image's area, around its middle, that the policy is shown.
        resample: filter that resizes images, "bilinear" or "lanczos".
        noise_seed: the same noise starts every call; None: fresh noise from torch's generator.
    """

    kind: Literal["pi0", "pi05"] = "pi0"
    vision: VisionConfig = VisionConfig()
    prefix: StackConfig = GEMMA_2B
    expert: StackConfig = GEMMA_300M
    vocab_size: int = 257152
    activation: str = "gelu_pytorch_tanh"
    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    chunk: int = 50
    max_action_dim: int = 32
    max_state_dim: int = 32
    action_dim: int = 32
    proprio_dim: int = 32
    flow_steps: int = 10
    min_period: float = 4e-3
    max_period: float = 4.0
    max_tokens: int | None = 48
    pad_state: bool = True
    action_scaling: Scaling = "mean-std"
    state_scaling: Scaling = "mean-std"
    epsilon: float = 1e-8
    norm_stats: dict[str, Any] = field(default_factory=dict)
    crop_area: float = 1.0
    resample: Literal["bilinear", "lanczos"] = "bilinear"
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(self.cameras))
        names = [name for name in self.cameras if isinstance(name, str) and name]
        if not len(set(names)) == len(names) == len(self.cameras):
            raise ValueError(f"cameras={shown(self.cameras)} must be different names")
        for name in ("vocab_size", "max_action_dim", "max_state_dim", "action_dim", "proprio_dim"):
            whole(name, getattr(self, name))
        whole("flow_steps", self.flow_steps, 1, 10_000)
        whole("chunk", self.chunk, 1, 100_000)
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens)
        if self.noise_seed is not None:
            whole("noise_seed", self.noise_seed, 0, (1 << 63) - 1)
        number("min_period", self.min_period, above=0.0)
        number("max_period", self.max_period, above=0.0)
        number("epsilon", self.epsilon, 0.0)
        number("crop_area", self.crop_area)
        flag("pad_state", self.pad_state)
        _one_of("kind", self.kind, ("pi0", "pi05"))
        _one_of("action_scaling", self.action_scaling, SCALINGS)
        _one_of("state_scaling", self.state_scaling, SCALINGS)
        _one_of("resample", self.resample, ("bilinear", "lanczos"))
        for name in ("depth", "kv_heads", "head_dim"):
            if getattr(self.prefix, name) != getattr(self.expert, name):
                raise ValueError(
                    f"prefix and expert share keys and values, but their {name} differ: "
                    f"{getattr(self.prefix, name)} and {getattr(self.expert, name)}"
                )
        if not self.cameras:
            raise ValueError("a policy sees at least one camera; name it in `cameras`")
        if self.action_dim > self.max_action_dim or self.proprio_dim > self.max_state_dim:
            raise ValueError(
                f"action_dim={self.action_dim} and proprio_dim={self.proprio_dim} must not exceed "
                f"max_action_dim={self.max_action_dim} and max_state_dim={self.max_state_dim}"
            )
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop_area={self.crop_area} must lie in (0, 1]")

    @property
    def num_images(self) -> int:
        """Cameras."""
        return len(self.cameras)

    @property
    def views(self) -> tuple[int, ...]:
        """Visual tokens per camera."""
        return (self.vision.patches,) * self.num_images

    @property
    def image_size(self) -> int:
        """Side of the square input image in pixels."""
        return self.vision.image_size


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={shown(value)} is unknown; choose one of {', '.join(known)}")
