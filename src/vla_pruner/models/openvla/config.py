"""Sizes and conventions of an OpenVLA policy; the defaults are the published 7B model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..given.checks import MOST, flag, number, numbers, shown, whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One vision transformer of the fused backbone.

    `depth` counts the blocks of the published model. The last one is never computed: OpenVLA reads
    the patch features that leave the second-to-last block, so `depth - 1` blocks exist here.
    `layer_scale` is the initial LayerScale value, None for a tower without it. `mean` and `std`
    normalise the pixels (0..1) of this tower.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int = 14
    image_size: int = 224
    class_token: bool = False
    register_tokens: int = 0
    layer_scale: float | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("width", "heads", "mlp", "patch", "image_size"):
            whole(name, getattr(self, name))
        whole("depth", self.depth, 2, 1024)  # the last one is never computed
        whole("register_tokens", self.register_tokens, 0)
        flag("class_token", self.class_token)
        if self.layer_scale is not None:
            number("layer_scale", self.layer_scale)
        for name in ("mean", "std"):
            values = numbers(name, getattr(self, name), 3)
            if name == "std" and (values <= 0).any():
                raise ValueError(f"std={values.tolist()} must be above 0")
            object.__setattr__(self, name, tuple(values.tolist()))
        if self.width % self.heads:
            raise ValueError(f"tower width {self.width} must be a multiple of heads={self.heads}")
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of patch={self.patch}"
            )

    @property
    def patches(self) -> int:
        """Visual tokens of one image."""
        return (self.image_size // self.patch) ** 2


DINOV2_LARGE = TowerConfig(
    width=1024,
    depth=24,
    heads=16,
    mlp=4096,
    class_token=True,
    register_tokens=4,
    layer_scale=1e-5,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
SIGLIP_SO400M = TowerConfig(width=1152, depth=27, heads=16, mlp=4304)

# The tower names found in published config.json files (`timm_model_ids`).
PUBLISHED_TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": DINOV2_LARGE,
    "vit_so400m_patch14_siglip_224": SIGLIP_SO400M,
}
# What the published text_config holds; every other field is the default of `LlamaConfig` (7B).
PUBLISHED_TEXT = {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000}


@dataclass(frozen=True, kw_only=True)
class OpenVLAConfig:
    """An OpenVLA policy (Kim et al., 2024, arXiv:2406.09246).

    `text` holds the keyword arguments of `transformers.LlamaConfig`. The last `n_action_bins` ids
    below `text["vocab_size"] - pad_to_multiple_of` are the action tokens. `empty_token_id` is the
    token that closes the prompt (the lone space after "Out:" in Llama's vocabulary), `norm_stats`
    the per-dataset statistics as published: `{key: {"action": {"q01": [...], "q99": ..., ...}}}`.
    `center_crop` says whether images are cropped to 90 % of their area before acting (policies
    fine-tuned on random crops), `crop_first` whether that happens before any resize; see
    `processing`. `base` names the language model whose weights a policy folder does not hold: it
    holds low-rank changes of them (see `base`).
    """

    towers: tuple[TowerConfig, TowerConfig] = (DINOV2_LARGE, SIGLIP_SO400M)
    text: dict[str, Any] = field(default_factory=lambda: dict(PUBLISHED_TEXT))
    n_action_bins: int = 256
    pad_to_multiple_of: int = 64
    action_dim: int = 7
    empty_token_id: int = 29871
    stop_token_id: int = 2
    pad_token_id: int = 32000
    num_images: int = 1
    center_crop: bool = True
    crop_first: bool = False
    norm_stats: dict[str, Any] = field(default_factory=dict)
    base: str | None = None

    def __post_init__(self) -> None:
        check_text(self.text)
        whole("n_action_bins", self.n_action_bins, 2)
        whole("action_dim", self.action_dim)
        whole("num_images", self.num_images, 0)
        if self.num_images < 1:
            raise ValueError(f"num_images={self.num_images}: a policy sees at least one camera")
        most = self.text["vocab_size"] - self.n_action_bins
        whole("pad_to_multiple_of", self.pad_to_multiple_of, 0, most)
        for name in ("empty_token_id", "stop_token_id", "pad_token_id"):
            whole(name, getattr(self, name), 0)
        flag("center_crop", self.center_crop)
        flag("crop_first", self.crop_first)
        if len(self.towers) != 2:
            raise ValueError(f"OpenVLA fuses two vision towers, got {len(self.towers)}")
        if self.towers[0].patches != self.towers[1].patches:
            raise ValueError(
                "both towers must give the same number of patches, got "
                f"{self.towers[0].patches} and {self.towers[1].patches}"
            )
        if self.towers[0].image_size != self.towers[1].image_size:
            raise ValueError(
                "both towers must read the same image size, got "
                f"{self.towers[0].image_size} and {self.towers[1].image_size}"
            )

    @property
    def image_size(self) -> int:
        """Side of the square input image in pixels."""
        return self.towers[0].image_size

    @property
    def views(self) -> tuple[int, ...]:
        """Visual tokens per camera."""
        return (self.towers[0].patches,) * self.num_images

    @property
    def tied(self) -> bool:
        """Whether the language model reads and writes words with the same matrix."""
        return bool(self.text.get("tie_word_embeddings", False))

    @property
    def action_vocab_end(self) -> int:
        """One past the last action token: bin `i` (from 0) is token `action_vocab_end - 1 - i`."""
        return int(self.text["vocab_size"]) - self.pad_to_multiple_of

    def with_text(self, **changes: Any) -> OpenVLAConfig:
        """The same policy with other language-model sizes."""
        return replace(self, text={**self.text, **changes})


@dataclass(frozen=True, kw_only=True)
class OpenVLAOFTConfig(OpenVLAConfig):
    """An OpenVLA-OFT policy with the L1 head (Kim, Finn and Liang, 2025, arXiv:2502.19645).

    One pass gives `chunk` actions. `proprio_dim` is None for a policy without a robot state.
    `read` says which hidden state feeds the head for an action slot: "previous", the row before the
    slot (the original), or "slot", the row itself (several forks). `bounds` names the statistics
    that span [-1, 1]: "q99" (LIBERO) or "min-max" (ALOHA).
    """

    num_images: int = 2
    chunk: int = 8
    proprio_dim: int | None = 8
    head_blocks: int = 2
    head_width: int | None = None
    read: Literal["previous", "slot"] = "previous"
    bounds: Literal["q99", "min-max"] = "q99"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("chunk", self.chunk)
        whole("head_blocks", self.head_blocks, 0, 1024)
        for name in ("proprio_dim", "head_width"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        if self.read not in ("previous", "slot"):
            raise ValueError(f"read={self.read!r}: choose 'previous' or 'slot'")
        if self.bounds not in ("q99", "min-max"):
            raise ValueError(f"bounds={self.bounds!r}: choose 'q99' or 'min-max'")

    @property
    def slots(self) -> int:
        """Action slots in the sequence, `chunk * action_dim`."""
        return self.chunk * self.action_dim

    @property
    def action_rows(self) -> slice:
        """Sequence rows whose hidden states feed the head, counted from the end.

        The sequence ends with the slots and the stop token.
        """
        end = -2 if self.read == "previous" else -1
        return slice(end - self.slots, end)


def check_text(text: Any) -> None:
    """Refuse sizes of the language model that are none. Errors: ValueError."""
    if not isinstance(text, Mapping):
        raise ValueError(f"the sizes of the language model must be an object; got {shown(text)}")
    if text.get("model_type", "llama") != "llama":
        raise ValueError(f"model_type={shown(text['model_type'])}: the language model is a llama")
    if "vocab_size" not in text:
        raise ValueError("the sizes of the language model lack vocab_size")
    for name in _TEXT_SIZES:
        if name in text and not (text[name] is None and name in _TEXT_OPTIONAL):
            whole(name, text[name], 1, 1024 if name == "num_hidden_layers" else MOST)
    if "rms_norm_eps" in text:
        number("rms_norm_eps", text["rms_norm_eps"], above=0.0)


_TEXT_OPTIONAL = ("num_key_value_heads", "head_dim")
_TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", *_TEXT_OPTIONAL),
)

PUBLISHED = {"openvla-7b": OpenVLAConfig(), "openvla-oft-7b": OpenVLAOFTConfig()}
"""Sizes of the published models: OpenVLA, and OpenVLA-OFT as fine-tuned on LIBERO."""


def tower_to_dict(tower: TowerConfig) -> dict[str, Any]:
    """A tower's sizes as JSON-ready values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(tower).items()}
