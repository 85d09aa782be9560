"""The `smol-oft` stages: a pretrained language model learns to act, with LoRA on all its matrices.

1. `smol-vision`: mini-oft's towers, on smaller patches, learn to point again, and the projector
   learns to say in the language model's own words which object a patch shows.
2. `smol-oft`: the whole policy; L1 on the action chunk. mini-oft fills in the actions that no
   demonstration knows (the other steps after an instruction that was not followed).

The second stage begins coarse: `pool` x `pool` visual tokens of a camera are averaged into one, at
the middle of their positions and with log(pool^2) added to every attention logit towards it, as if
all of them were there. So `pool` may change during training, and ends at 1: all visual tokens.
Nothing is ever dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.loading import load
from ..models.openvla import base
from ..models.openvla.checkpoint import own_tensors, write
from ..models.openvla.lora import add_lora, change_scale
from ..models.openvla.modeling import insert_after_bos, left_padding, widen_mask
from ..models.openvla.oft import OpenVLAOFT
from ..scenes.pick_place_task import OBJECT_NAMES
from . import policies
from .dataset import Batch
from .training import RELATION_SCALE_M, Helpers, Settings, Trainer, normalised, quantiles

STAGES = ("smol-vision", "smol-oft")
RANK = 32
MIDDLE_LAYER = 8
"""Decoder layers after which it should be known where the named object is."""
GAIN = 24.0
"""How much larger than words visual tokens and the state enter the decoder.

Its first layers add vectors forty times as long as a word's embedding: what is only as long as a
word is hardly there in the middle. A factor while training, folded into the weights on export.
"""
_ENLARGED = ("projector.fc3.", "proprio_projector.fc2.")
_WORD_SHARPNESS = 12.0
_TEACHER_PIXELS = 140
_NEAR = 0.09
"""How far from an object's middle a patch shows it, as a share of the image."""


@dataclass(frozen=True)
class SmolSettings(Settings):
    """Adds what the second stage needs.

    Attributes
    ----------
    pool : so many visual tokens a side are averaged into one.
    lora_rate : learning rate of LoRA's `b` over the rest's.
    tower_rate : that of towers and projector, once they have learnt to point; 0: they stay.
    layers : of the language model.
    """

    grid: int = 16
    pool: int = 1
    lora_rate: float = 1.0
    tower_rate: float = 0.3
    layers: int = policies.SMOL_LAYERS


class SmolHelpers(Helpers):
    """Also knows the words of the objects, and what mini-oft's action rows hold."""

    def __init__(self, hidden: int, teacher_hidden: int) -> None:
        super().__init__(hidden)
        self.nothing = nn.Parameter(torch.tensor(3.0))
        self.copied = nn.Linear(hidden, teacher_hidden)
        self.place = nn.Linear(hidden, 6)

    def word_loss(self, visual: Tensor, words: Tensor, points: Tensor, grid: int) -> Tensor:
        """Cross-entropy of naming the object that a patch shows, or nothing.

        `visual` [N, grid * grid, D], `words` [4, D] unit vectors, `points` [N, 5, 2] in [0, 1].
        """
        said = _WORD_SHARPNESS * F.normalize(visual.float(), dim=-1) @ words.t()
        said = torch.cat([said, self.nothing.expand(*said.shape[:-1], 1)], dim=-1)
        known = points[:, : len(words)]
        inside = ((known > 0) & (known < 1)).all(-1)
        cell = (known.clamp(0, 0.999) * grid).long()
        patch = cell[..., 1] * grid + cell[..., 0]  # [N, 4]
        own = said.gather(1, patch[..., None].expand(-1, -1, said.shape[-1]))
        label = torch.arange(len(words), device=said.device).expand_as(patch)
        named = F.cross_entropy(own.flatten(0, 1), label.flatten(), reduction="none")
        named = (named * inside.flatten()).sum() / inside.sum().clamp_min(1)
        # Patches farther than 15 % of the image from every object show none.
        axis = (torch.arange(grid, device=said.device) + 0.5) / grid
        centres = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)
        away = (centres[None, :, None] - known[:, None]).abs().amax(-1).amin(-1) > 0.15
        none = -torch.log_softmax(said, -1)[..., -1]
        return named + (none * away).sum() / away.sum().clamp_min(1)

    def place_loss(
        self, visual: Tensor, words: Tensor, points: Tensor, objects: Tensor, grid: int
    ) -> tuple[Tensor, Tensor]:
        """What the patches near an object say: which it is, and where.

        Cross-entropy of its word, and L1 of its place and of the vector to it from the gripper
        (in units of 0.2 m), over patches at most 9 % of the image from its middle. `visual`
        [N, grid * grid, D], `points` [N, 5, 2] in [0, 1], `objects` [N, 4, 6] (m).
        """
        known = points[:, : len(words)]
        axis = (torch.arange(grid, device=points.device) + 0.5) / grid
        centres = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)
        away = (centres[None, :, None] - known[:, None]).norm(dim=-1)  # [N, patches, 4]
        near, which = away.min(-1)
        shown = (near < _NEAR).float()
        said = _WORD_SHARPNESS * F.normalize(visual.float(), dim=-1) @ words.t()
        said = torch.cat([said, self.nothing.expand(*said.shape[:-1], 1)], dim=-1)
        names = F.cross_entropy(said.transpose(1, 2), which, reduction="none")
        origin = objects.new_tensor([0.0, 0.0, 0.9, 0.0, 0.0, 0.0])
        wanted = ((objects - origin) / RELATION_SCALE_M).gather(
            1, which[..., None].expand(-1, -1, objects.shape[-1])
        )
        miss = (self.place(visual).float() - wanted).abs().mean(-1)
        total = shown.sum().clamp_min(1)
        return (names * shown).sum() / total, (miss * shown).sum() / total


class SmolTrainer(Trainer):
    """The stages of `smol-oft`; the first begins from mini-oft's towers, the second from it."""

    stages = STAGES
    report_every = 20
    warm_up = 40
    settings: SmolSettings

    def _build(self) -> int:
        settings = self.settings
        self.config = policies.smol_config(settings.layers)
        acting = settings.stage == "smol-oft"
        layers = settings.layers if acting else 1
        self.model: Any = OpenVLAOFT.build(self.config.with_text(num_hidden_layers=layers))
        decoder = self.model.language_model.to(torch.bfloat16)
        decoder.load_state_dict(base.read(base.SMOLLM2, layers), strict=False)
        decoder.tie_weights()
        decoder.requires_grad_(False)
        if acting:
            add_lora(decoder, RANK)
        self.model.to(self.device)
        for module in (self.model.projector, self.model.proprio_projector):
            module.register_forward_hook(_enlarge)
        self.model.projector.register_forward_hook(self._keep_visual)
        if acting:
            layer = decoder.model.layers[MIDDLE_LAYER - 1]
            layer.register_forward_hook(self._keep_middle)
        self.colours = [
            torch.tensor(
                [getattr(tower, name) for tower in self.config.towers],
                dtype=torch.float32,
                device=self.device,
            )
            for name in ("mean", "std")
        ]
        self.teacher: Any = load("mini-oft", device=self.device, dtype=torch.float32)
        self.teacher.tokenizer = policies.tokenizer("mini-oft")  # one that pads
        table = decoder.get_input_embeddings().weight.detach().float()
        self.size = GAIN * float(table.square().mean().sqrt())
        self.words = F.normalize(self._words(table), dim=-1)
        return int(self.config.text["hidden_size"])

    def _words(self, table: Tensor) -> Tensor:
        """What sets the words of the four objects apart in the embeddings: [4, D]."""
        rows = [
            table[self.tokenizer(f" {name}", add_special_tokens=False)["input_ids"]].mean(0)
            for name in OBJECT_NAMES
        ]
        return torch.stack(rows) - table.mean(0)

    def _begin(self, start: Path | None) -> None:
        """Load what the stage starts from, and take mini-oft's normalisation."""
        statistics = self.teacher.config.norm_stats["pick_place"]
        self.action_bounds, self.proprio_bounds = (
            (np.array(statistics[name]["q01"]), np.array(statistics[name]["q99"]))
            for name in ("action", "proprio")
        )
        self.helpers = SmolHelpers(
            self.words.shape[1], int(self.teacher.config.text["hidden_size"])
        ).to(self.device)
        if self.settings.stage == "smol-vision" and start is None:
            take_towers(self.model, self.teacher)
            with torch.no_grad():  # so that visual tokens begin at their size
                self.model.projector.fc3.weight.mul_(self.size / GAIN / 1.15)
        elif start is not None and Path(start).is_dir():
            self.load_policy(start)
        else:
            self.load_weights(start or self.folder / "smol-vision.pt")

    def load_policy(self, folder: Path) -> None:
        """Start from an exported smol-oft; helpers are new."""
        found = own_tensors(folder)
        weights = self._weights()
        wrong = {n: list(v.shape) for n, v in found.items()} != {
            n: list(v.shape) for n, v in weights.items()
        }
        if wrong:
            raise ValueError(
                f"{folder} holds no policy that stage `{self.settings.stage}` trains; start from a "
                "checkpoint, or from a smol-oft of as many layers."
            )
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(found[name].float() / self._factor(name))

    def _factor(self, name: str) -> float:
        """By how much an exported tensor is larger than the trained one."""
        if name.endswith(".b"):
            return self.model.get_submodule(name.removesuffix(".b")).scale
        return GAIN if name.startswith(_ENLARGED) else 1.0

    def _tokenizer(self) -> Any:
        return policies.smol_tokenizer()

    def _match_words(self, source: dict[str, int]) -> None:
        """Nothing: the words are the language model's."""

    def _optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Muon for matrices, LoRA at a rate of its own; AdamW for the rest."""
        weights, settings = self._weights(), self.settings
        ups = {id(p) for name, p in weights.items() if name.endswith(".b")}
        downs = {id(p) for name, p in weights.items() if name.endswith(".a")}
        seeing = {id(p) for name, p in weights.items() if name.startswith(("vision", "projector"))}
        rate = settings.tower_rate if settings.stage == "smol-oft" else 1.0
        rates: dict[str, Any] = {
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
        }

        def groups(matrices: bool) -> list[dict[str, Any]]:
            """Parameters by their share of the learning rate."""
            shares: dict[tuple[float, float], list[nn.Parameter]] = {}
            for parameter in self.parameters:
                low_rank = id(parameter) in ups or id(parameter) in downs
                tower = id(parameter) in seeing
                if ((tower and parameter.ndim == 2) or low_rank) != matrices:
                    continue
                share = settings.lora_rate if id(parameter) in ups else rate if tower else 1.0
                decay = 0.0 if low_rank else settings.weight_decay
                shares.setdefault((share, decay), []).append(parameter)
            return [
                {"params": found, "share": share, "weight_decay": decay}
                for (share, decay), found in shares.items()
            ]

        return (
            torch.optim.Muon(groups(True), adjust_lr_fn="match_rms_adamw", **rates),
            torch.optim.AdamW(groups(False), betas=(0.9, 0.98), **rates),
        )

    # ------------------------------------------------------------------ losses
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Total loss of a batch and its parts for the log."""
        helpers: Any = self.helpers
        grid, count = self.settings.grid, self.config.num_images
        points = self._tensor(batch.points)
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        acting = self.settings.stage == "smol-oft"
        learns = not acting or self.settings.tower_rate > 0
        with torch.set_grad_enabled(learns):
            visual = self.model.visual_embeds(self.pixels(batch.images))
        if acting:
            total, parts = self._acting_loss(batch, visual)
            if not learns:
                return total, {name: float(value.detach()) for name, value in parts.items()}
        by_camera = visual.unflatten(1, (count, -1)).flatten(0, 1)
        points = points.flatten(0, 1)
        pointing, error = helpers.point_loss(by_camera / self.size, points, grid)
        naming = helpers.word_loss(by_camera, self.words, points, grid)
        assert batch.objects is not None
        objects = self._tensor(batch.objects).repeat_interleave(count, 0)
        near, place = helpers.place_loss(by_camera / self.size, self.words, points, objects, grid)
        large = (by_camera.float().square().mean(-1).sqrt() / self.size).log()
        share = 0.3 if acting else 1.0
        total = total + share * (pointing + naming + near + 3 * place + large.square().mean())
        parts |= {"points": pointing, "error": error, "words": naming, "size": large.exp().mean()}
        parts |= {"near": near, "place": place}
        return total, {name: float(value.detach()) for name, value in parts.items()}

    def _acting_loss(self, batch: Batch, visual: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 over the chunk; pointing at the named object half-way; mini-oft's action rows."""
        settings, count = self.settings, self.config.num_images
        helpers: Any = self.helpers
        actions = self._tensor(normalised(batch.actions, self.action_bounds))
        proprio = self._tensor(normalised(batch.proprio, self.proprio_bounds))
        taught, teaching = self._taught(batch, proprio)
        valid = self._tensor(batch.action_valid)[..., None]
        actions = torch.where(valid, actions, taught)
        ids, mask = self.prompts(batch.instructions)
        hidden = self.hidden(visual, proprio, ids, mask)
        rows = hidden[:, self.config.action_rows]
        said = self.model.action_head(rows.reshape(len(ids), self.config.chunk, -1)).float()
        error = (said - actions).abs()
        single: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        near_first = torch.linspace(1.5, 0.5, actions.shape[1], **single)[:, None]
        weight = near_first * (0.5 + 0.5 * valid.float())
        chunk = (error * weight).sum() / (weight.sum() * error.shape[-1])
        copied = F.smooth_l1_loss(helpers.copied(rows.float()), teaching)
        relation = helpers.relation_loss(rows[:, 0], self._tensor(batch.relation))
        side = settings.grid // settings.pool
        middle = F.layer_norm(self._middle_visual(mask).float(), (rows.shape[-1],))
        middle = middle.unflatten(1, (count, -1))
        place = self._tensor(batch.named)
        named = helpers.named_loss(middle, None, place, side)
        closing = self._middle[0][:, -self.config.slots - 2].float()
        asked = helpers.named_loss(middle, closing, place, side)
        loss = 3.0 * chunk + 1.5 * relation + 0.3 * named + 0.2 * asked + 0.5 * copied
        first = error[:, 0]
        return loss, {
            "l1_chunk": chunk,
            "l1": first[:, :6].mean(),
            "gripper": (first[:, 6] > 1).float().mean(),
            "relation": relation,
            "named": named,
            "asked": asked,
            "copied": copied,
        }

    @torch.no_grad()
    def _taught(self, batch: Batch, proprio: Tensor) -> tuple[Tensor, Tensor]:
        """mini-oft's actions [B, 8, 7] and what its action rows hold [B, 56, D], unit variance."""
        teacher = self.teacher
        images = self._tensor(batch.images).flatten(0, 1).permute(0, 3, 1, 2).float()
        size = (_TEACHER_PIXELS, _TEACHER_PIXELS)
        small = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        both = (small / 255).unflatten(0, (-1, self.config.num_images)).repeat(1, 1, 2, 1, 1)
        mean, std = (values.reshape(1, 6, 1, 1) for values in self.colours)
        pixels = ((both - mean) / std).flatten(1, 2)
        ids, mask = self.prompts(batch.instructions, teacher)
        hidden = teacher.action_hidden(ids, pixels, proprio, mask)
        actions = teacher.action_head(hidden).float().clamp(-1, 1)
        rows = hidden.unflatten(2, (self.config.action_dim, -1)).flatten(1, 2).float()
        return actions, F.layer_norm(rows, rows.shape[-1:])

    def hidden(self, visual: Tensor, proprio: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [B, S, D]; visual tokens [B, V, D] are pooled as the settings say.

        With `pool` 1 these are the rows that `OpenVLAOFT.action_hidden` reads.
        """
        model, config, pool = self.model, self.config, self.settings.pool
        visual = pooled(visual, config.num_images, self.settings.grid, pool)
        count = visual.shape[1]
        table = model.language_model.get_input_embeddings()
        words = table(ids)
        stop = table(ids.new_full((len(ids), 1), config.stop_token_id))
        embeds = torch.cat(
            [words, words.new_zeros(len(ids), config.slots, words.shape[2]), stop], 1
        )
        state = model.proprio_projector(proprio).to(words.dtype)[:, None]
        wide = widen_mask(mask, config.slots + 1)
        assert wide is not None
        embeds = insert_after_bos(embeds, torch.cat([visual.to(words.dtype), state], 1), wide)
        valid = widen_mask(wide, count + 1)
        assert valid is not None
        order = (valid.cumsum(1) - 1).clamp_min(0)  # 0 is BOS
        place = positions(config.num_images, self.settings.grid, pool, embeds.shape[1])
        place = place.to(self.device)[order]
        bias = torch.zeros_like(place).masked_fill(
            (order > 0) & (order <= count), math.log(pool**2)
        )
        bias = bias.masked_fill(valid == 0, torch.finfo(torch.bfloat16).min).to(embeds.dtype)
        return model.language_model.model(
            inputs_embeds=embeds,
            attention_mask=bias[:, None, None, :].expand(-1, -1, embeds.shape[1], -1),
            position_ids=place,
            use_cache=False,
        ).last_hidden_state

    def _middle_visual(self, mask: Tensor) -> Tensor:
        """Visual tokens [B, V, D] as they leave the middle layer, pooled or not."""
        hidden = self._middle[0]
        count = self.config.num_images * (self.settings.grid // self.settings.pool) ** 2
        first = (left_padding(mask) + 1)[:, None]
        index = first + torch.arange(count, device=hidden.device)
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def _enlarge(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return GAIN * output


def pooled(visual: Tensor, cameras: int, grid: int, pool: int) -> Tensor:
    """Means [B, V / pool^2, D] of neighbouring visual tokens [B, V, D], row by row per camera."""
    if pool == 1:
        return visual
    side = grid // pool
    batch, _, width = visual.shape
    blocks = visual.reshape(batch, cameras, side, pool, side, pool, width)
    return blocks.mean((3, 5)).reshape(batch, -1, width)


def positions(cameras: int, grid: int, pool: int, length: int) -> Tensor:
    """Position of every entry of a sequence [length] whose visual tokens are pooled."""
    each = torch.arange(grid * grid, dtype=torch.float32).view(1, -1, 1).expand(cameras, -1, 1)
    each = each + (torch.arange(cameras) * grid * grid).view(-1, 1, 1)
    visual = 1 + pooled(each.reshape(1, -1, 1), cameras, grid, pool).flatten()
    end = 1 + cameras * grid * grid
    rest = torch.arange(end, end + length - 1 - len(visual), dtype=torch.float32)
    return torch.cat([torch.zeros(1, dtype=torch.float32), visual, rest])


@torch.no_grad()
def take_towers(model: OpenVLAOFT, policy: OpenVLAOFT) -> None:
    """Copy a policy's towers into one with other patches: positions and patches are resampled."""
    found = policy.vision_backbone.state_dict()
    wanted = model.vision_backbone.state_dict()
    for name, value in found.items():
        value, like = value.float(), wanted[name]
        if name.endswith("pos_embed") and value.shape != like.shape:
            old, new = (math.isqrt(v.shape[1]) for v in (value, like))
            square = value.transpose(1, 2).unflatten(2, (old, old))
            square = F.interpolate(square, (new, new), mode="bicubic", align_corners=False)
            value = square.flatten(2).transpose(1, 2)
        elif name.endswith("patch_embed.proj.weight") and value.shape != like.shape:
            share = value.shape[-1] ** 2 / like.shape[-1] ** 2
            value = F.interpolate(value, like.shape[-2:], mode="bilinear", antialias=True) * share
        found[name] = value
    model.vision_backbone.load_state_dict(found)
    model.projector.fc1.load_state_dict(policy.projector.fc1.state_dict())


def export(checkpoint: Path, folder: Path) -> None:
    """Write the averaged weights of a checkpoint as a policy folder without its language model."""
    if not Path(checkpoint).exists():
        raise FileNotFoundError(f"There is no checkpoint {checkpoint}; train that stage first.")
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    action_low, action_high, proprio_low, proprio_high = state["bounds"]
    layers = state["settings"]["layers"]
    statistics = {
        policies.STATISTICS["smol-oft"]: {
            "action": quantiles(action_low, action_high) | {"mask": [True] * 6 + [False]},
            "proprio": quantiles(proprio_low, proprio_high),
        }
    }
    config = replace(policies.smol_config(layers), norm_stats=statistics)
    frozen = base.read(base.SMOLLM2, layers)
    tensors: dict[str, Tensor] = {}
    for name, value in zip(state["model"], state["average"], strict=False):
        if name.endswith(".b"):
            matrix = name.removeprefix("language_model.").removesuffix(".b")
            value = value * change_scale(frozen[f"{matrix}.weight"])
        elif name.startswith(_ENLARGED):
            value = GAIN * value
        tensors[name] = value.to(torch.bfloat16).contiguous()
    write(folder, tensors, config, torch.bfloat16, policies.smol_tokenizer())
    policies.write_control("smol-oft", folder)
