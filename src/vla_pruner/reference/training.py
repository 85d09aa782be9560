"""Training of the reference policies: behaviour cloning with resumable checkpoints.

Stages, each on all visual tokens:

1. `vision`: both towers and the projector learn to point at the four objects and at the gripper.
2. `mini-openvla`: starts from stage 1; next-token prediction of the seven action tokens.
3. `mini-oft`: starts from stage 2, as OpenVLA-OFT starts from OpenVLA; L1 on the action chunk.
4. `mini-pi0`: see `flow.py`.

`mini-oft-libero` is the third stage on LIBERO's demonstrations; it starts from a finished mini-oft.

Small auxiliary heads (where the objects are, where the named one is) shorten the training and are
thrown away afterwards. They never look at attention weights, which pruning measures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.loading import load
from ..models.openvla.modeling import OpenVLA, insert_after_bos, widen_mask
from ..models.openvla.oft import OpenVLAOFT
from ..models.openvla.processing import PROMPT
from ..scenes.pick_place_task import CAMERAS
from . import policies
from .dataset import Batch, Demonstrations

Bounds = tuple[np.ndarray, np.ndarray]
"""What is normalised to -1 and to 1, per dimension."""

STAGES = ("vision", "mini-openvla", "mini-oft", "mini-oft-libero")
_POINTS = 5
RELATION_SCALE_M = 0.2
MIDDLE = 4
"""Decoder layers after which it should be known where the named object is."""
_SMALLEST_REACH = 0.1
"""Action dimensions that hardly move are not blown up to the full range."""


@dataclass(frozen=True)
class Settings:
    """What a training run depends on.

    Attributes
    ----------
    minutes : wall-clock length of the stage; the learning rate decays to zero at its end.
    steps : if given, the length in optimiser steps instead.
    other_target, reaching, shift : see `Demonstrations.sample`.
    """

    stage: str
    minutes: float = 60.0
    steps: int | None = None
    batch: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    average: float = 0.998
    other_target: float = 0.4
    reaching: float = 0.6
    shift: float = 4.0
    seed: int = 0
    grid: int = 10
    device: str = "cpu"


class Helpers(nn.Module):
    """Auxiliary heads used in training alone.

    `where` scores every visual token for each of the four objects and the gripper and gives the
    point's offset inside the token's patch; `relation` reads gripper position and the vector to
    the named object from the last prompt row.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.where = nn.Linear(hidden, 3 * _POINTS)
        self.norm = nn.LayerNorm(hidden)
        self.relation = nn.Linear(hidden, 6)
        self.named = nn.Linear(hidden, 1)
        self.pointer = nn.Linear(hidden, hidden)

    def point_loss(self, visual: Tensor, points: Tensor, grid: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy over patches plus L1 of the offset, and the mean pixel error.

        `visual` [N, grid * grid, D]; `points` [N, 5, 2] in [0, 1], outside where out of view.
        """
        logits, offsets = self.where(visual).float().split([_POINTS, 2 * _POINTS], dim=-1)
        inside = ((points > 0) & (points < 1)).all(-1)  # [N, 5]
        cell = (points.clamp(0, 0.999) * grid).long()
        patch = cell[..., 1] * grid + cell[..., 0]
        choose = F.cross_entropy(
            logits.transpose(1, 2).reshape(-1, grid * grid), patch.reshape(-1), reduction="none"
        ).reshape_as(inside)
        centre = (cell.float() + 0.5) / grid
        index = patch[..., None, None].expand(-1, -1, 1, 2)  # [N, 5, 1, 2]
        own = offsets.unflatten(-1, (_POINTS, 2)).transpose(1, 2).gather(2, index)[:, :, 0]
        miss = (own / grid + centre - points).abs().sum(-1)
        seen = inside.float()
        total = seen.sum().clamp_min(1)
        loss = ((choose + 10 * miss) * seen).sum() / total
        guess = logits.argmax(1)  # [N, 5]
        column, row = guess % grid, guess // grid
        best = torch.stack([column, row], -1).float().add(0.5) / grid
        picked = offsets.unflatten(-1, (_POINTS, 2)).transpose(1, 2)
        picked = picked.gather(2, guess[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
        error = ((best + picked / grid - points).norm(dim=-1) * seen).sum() / total
        return loss, error.detach()

    def named_loss(self, visual: Tensor, row: Tensor | None, points: Tensor, grid: int) -> Tensor:
        """Cross-entropy of pointing at the named object in a middle layer.

        With `row` [B, D], the last prompt row points at one of the visual tokens
        `visual` [B, C, grid * grid, D]; without it (bidirectional attention: the tokens have seen
        the words) they say themselves. `points` [B, C, 2] in [0, 1], outside where out of view.
        """
        inside = ((points > 0) & (points < 1)).all(-1)
        cell = (points.clamp(0, 0.999) * grid).long()
        patch = cell[..., 1] * grid + cell[..., 0]
        if row is None:
            scores = self.named(visual.float()).squeeze(-1)  # [B, C, patches]
        else:
            query = self.pointer(self.norm(row.float()))
            scores = torch.einsum("bd,bcnd->bcn", query, visual.float()) / query.shape[-1] ** 0.5
        miss = F.cross_entropy(scores.flatten(0, 1), patch.flatten(), reduction="none")
        seen = inside.flatten().float()
        return (miss * seen).sum() / seen.sum().clamp_min(1)

    def relation_loss(self, row: Tensor, relation: Tensor) -> Tensor:
        """L1 between what the row `[B, D]` says and `relation` `[B, 6]` (m)."""
        said = self.relation(self.norm(row.float()))
        origin = relation.new_tensor([0.0, 0.0, 0.9, 0.0, 0.0, 0.0])
        return (said - (relation - origin) / RELATION_SCALE_M).abs().mean()


class Trainer:
    """One stage: model, helpers, optimiser and averaged weights; saved and resumed as one file."""

    stages: ClassVar[tuple[str, ...]] = STAGES
    report_every: ClassVar[int] = 50
    warm_up: ClassVar[int] = 100

    def __init__(
        self,
        settings: Settings,
        data: Demonstrations,
        folder: Path,
        start: Path | None = None,
    ) -> None:
        """Prepare a stage; `start`, a checkpoint or a policy folder, is where it begins.

        Without `start` a stage begins from the one before.
        """
        if settings.stage not in self.stages:
            raise ValueError(
                f"There is no stage `{settings.stage}`; choose from {', '.join(self.stages)}."
            )
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(f"training needs torch >= 2.9 (Muon); this is {torch.__version__}")
        torch.manual_seed(settings.seed)
        self.settings, self.data, self.folder = settings, data, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(settings.device)
        self.tokenizer = self._tokenizer()
        self._visual: list[Tensor] = []
        self._middle: list[Tensor] = []
        hidden = self._build()
        self.model.train()
        self.helpers = Helpers(hidden).to(self.device)
        self.action_bounds = _wide_enough(*data.action_quantiles())
        self.proprio_bounds = data.proprio_quantiles()
        self._begin(start)
        self.parameters = [*self._weights().values(), *self.helpers.parameters()]
        self.optimizers = self._optimizers()
        self.average: list[Tensor] = [p.detach().clone() for p in self.parameters]
        self.step, self.elapsed_s = 0, 0.0
        self.rng = np.random.default_rng(settings.seed)

    def _tokenizer(self) -> Any:
        stage = self.settings.stage
        return policies.tokenizer("mini-openvla" if stage == "vision" else stage)

    def _weights(self) -> dict[str, nn.Parameter]:
        """What is trained of the model, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Muon for the matrices inside transformer blocks, AdamW for the rest."""
        matrices = [p for name, p in self._weights().items() if _is_matrix(name, p)]
        taken = {id(parameter) for parameter in matrices}
        others = [p for p in self.parameters if id(p) not in taken]
        rates: dict[str, Any] = {
            "lr": self.settings.learning_rate,
            "weight_decay": self.settings.weight_decay,
        }
        return (
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **rates),
            torch.optim.AdamW(others, betas=(0.9, 0.98), **rates),
        )

    def _build(self) -> int:
        """Make configuration and model, listen to what the helpers read; its hidden size."""
        stage = self.settings.stage
        name = "mini-openvla" if stage == "vision" else stage
        self.config: Any = policies.config(name, self.settings.grid)
        self.model: Any = _model_class(name).build(self.config, device=self.device)
        self.model.projector.register_forward_hook(self._keep_visual)
        self.model.language_model.model.layers[MIDDLE - 1].register_forward_hook(self._keep_middle)
        self.colours = [
            torch.tensor(values, dtype=torch.float32, device=self.device)
            for values in zip(*((t.mean, t.std) for t in self.config.towers), strict=True)
        ]
        return int(self.config.text["hidden_size"])

    def _begin(self, start: Path | None) -> None:
        """Load what the stage starts from."""
        before = {"mini-openvla": "vision.pt", "mini-oft": "mini-openvla.pt"}
        if start is not None and Path(start).is_dir():
            self.load_policy(start)
        elif start is not None:
            self.load_weights(start)
        elif self.settings.stage == "mini-oft-libero":
            raise ValueError(
                "Stage `mini-oft-libero` starts from a trained mini-oft; name one with --start, "
                "such as src/vla_pruner/reference/weights/mini-oft."
            )
        elif self.settings.stage in before:
            self.load_weights(self.folder / before[self.settings.stage])

    # ------------------------------------------------------------------ losses
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Total loss of a batch and its parts for the log."""
        pixels = self.pixels(batch.images)
        model, points = self.model, self._tensor(batch.points)
        if self.settings.stage == "vision":
            count = len(CAMERAS)
            visual = model.visual_embeds(pixels.unflatten(1, (count, 6)).flatten(0, 1))
            loss, error = self.helpers.point_loss(visual, points.flatten(0, 1), self.settings.grid)
            return loss, {"points": loss.item(), "error": error.item()}

        actions = self._tensor(normalised(batch.actions, self.action_bounds))
        ids, mask = self.prompts(batch.instructions)
        if isinstance(model, OpenVLAOFT):
            row, acting, parts = self._chunk_loss(batch, pixels, ids, mask, actions)
        else:
            row, acting, parts = self._token_loss(pixels, ids, mask, actions[:, 0])
        visual, cameras = self._visual[0], self.config.num_images
        pointing, error = self.helpers.point_loss(
            visual.unflatten(1, (cameras, -1)).flatten(0, 1),
            points[:, :cameras].flatten(0, 1),
            self.settings.grid,
        )
        relation = self.helpers.relation_loss(row, self._tensor(batch.relation))
        loss = acting + 0.1 * pointing + 0.3 * relation
        middle = self._middle_visual(mask).unflatten(1, (cameras, -1))
        # Causal visual tokens have not seen the words: there the last prompt row has to point.
        pointing_row = None if isinstance(model, OpenVLAOFT) else self._middle[0][:, -7]
        place = self._tensor(batch.named[:, :cameras])
        named = self.helpers.named_loss(middle, pointing_row, place, self.settings.grid)
        loss = loss + 0.3 * named
        return loss, {
            **parts,
            "named": named.item(),
            "points": pointing.item(),
            "error": error.item(),
            "relation": relation.item(),
        }

    def _middle_visual(self, mask: Tensor) -> Tensor:
        """Visual tokens [B, V, D] as they leave layer `MIDDLE`; they follow padding and BOS."""
        hidden, count = self._middle[0], sum(self.config.views)
        first = (mask.shape[1] - mask.sum(1) + 1)[:, None]
        index = first + torch.arange(count, device=hidden.device)
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))

    def _keep_middle(self, module: nn.Module, inputs: object, output: Tensor | tuple) -> None:
        self._middle = [output[0] if isinstance(output, tuple) else output]

    def _keep_visual(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._visual = [output]

    def _token_loss(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Cross-entropy of the seven action tokens against bins blurred over their neighbours."""
        model = self.model
        tokens = self._tensor(model.encode_actions(action.cpu().numpy()))  # [B, 7]
        ids = torch.cat([ids, tokens[:, :-1]], dim=1)
        mask = torch.cat([mask, mask.new_ones(tokens[:, :-1].shape)], dim=1)
        table = model.language_model.get_input_embeddings()
        visual = model.visual_embeds(pixels)
        embeds = insert_after_bos(table(ids), visual, mask)
        wide = widen_mask(mask, visual.shape[1])
        assert wide is not None
        hidden = model.language_model.model(
            inputs_embeds=embeds,
            attention_mask=wide,
            position_ids=(wide.cumsum(1) - 1).clamp_min(0),
            use_cache=False,
        ).last_hidden_state[:, -tokens.shape[1] :]
        end = self.config.action_vocab_end
        logits = model.language_model.lm_head(hidden).float()
        # Action token `end - 1 - b` holds bin b.
        bins = torch.arange(self.config.n_action_bins)
        centres = self._tensor(model.decode_actions((end - 1 - bins).numpy())).float()
        away = (action[..., None] - centres) / 0.012
        wanted = torch.softmax(-0.5 * away.square(), dim=-1)  # [B, 7, bins]
        scores = torch.log_softmax(logits, dim=-1)[..., end - self.config.n_action_bins : end]
        loss = -(wanted * scores.flip(-1)).sum(-1).mean()
        guess = centres[scores.flip(-1).argmax(-1)]
        error = (guess - action).abs()
        return (
            hidden[:, 0],
            loss,
            {
                "tokens": loss.item(),
                "l1": error[:, :6].mean().item(),
                "gripper": (error[:, 6] > 1).float().mean().item(),
            },
        )

    def _chunk_loss(
        self, batch: Batch, pixels: Tensor, ids: Tensor, mask: Tensor, actions: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """L1 over the known actions of the chunk."""
        model = self.model
        assert isinstance(model, OpenVLAOFT)
        proprio = self._tensor(normalised(batch.proprio, self.proprio_bounds))
        hidden = model.action_hidden(ids, pixels, proprio, mask)
        said = model.action_head(hidden).float()
        valid = self._tensor(batch.action_valid).float()[..., None]
        error = (said - actions).abs()
        near_first = torch.linspace(
            1.5, 0.5, actions.shape[1], dtype=torch.float32, device=self.device
        )
        weight = valid * near_first[None, :, None]
        loss = (error * weight).sum() / (weight.sum() * error.shape[-1])
        first = error[:, 0]
        row = hidden[:, 0, : int(self.config.text["hidden_size"])]
        return (
            row,
            3.0 * loss,
            {
                "l1_chunk": loss.item(),
                "l1": first[:, :6].mean().item(),
                "gripper": (first[:, 6] > 1).float().mean().item(),
            },
        )

    # ------------------------------------------------------------------ inputs
    def pixels(self, images: np.ndarray) -> Tensor:
        """uint8 `[B, C, P, P, 3]` to `[B, 6 C, P, P]`, with random brightness and contrast."""
        if self.settings.stage == "mini-openvla":
            images = images[:, :1]
        x = self.lit(images)
        both = torch.cat([x, x], dim=2)  # [B, C, 6, P, P]
        mean, std = (values.reshape(1, 6, 1, 1) for values in self.colours)
        return ((both - mean) / std).flatten(1, 2)

    def lit(self, images: np.ndarray) -> Tensor:
        """uint8 `[B, C, P, P, 3]` to `[B, C, 3, P, P]` in [0, 1] at random light and contrast."""
        batch = images.shape[0]
        x = self._tensor(np.ascontiguousarray(images)).permute(0, 1, 4, 2, 3).float() / 255
        single, device = torch.float32, self.device
        contrast = 1 + 0.15 * (2 * torch.rand(batch, 1, 1, 1, 1, dtype=single, device=device) - 1)
        light = 0.1 * (2 * torch.rand(batch, 1, 3, 1, 1, dtype=single, device=device) - 1)
        return ((x - 0.5) * contrast + 0.5 + light).clamp(0, 1)

    def prompts(self, instructions: list[str], policy: Any = None) -> tuple[Tensor, Tensor]:
        """Token ids `[B, P]`, closed by the empty token, and their mask; padded on the left.

        As this stage's policy reads them, or another one.
        """
        texts = [PROMPT.format(instruction=text.lower()) for text in instructions]
        tokenizer = self.tokenizer if policy is None else policy.tokenizer
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        config = self.config if policy is None else policy.config
        closing = torch.full((len(texts), 1), config.empty_token_id, dtype=torch.int64)
        ids = torch.cat([encoded["input_ids"], closing], dim=1)
        mask = torch.cat([encoded["attention_mask"], torch.ones_like(closing)], dim=1)
        return ids.to(self.device), mask.to(self.device)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    # ------------------------------------------------------------------ loop
    def run(self, *, checkpoint_every_s: float = 240.0) -> None:
        """Train to the end of the stage.

        A run that was interrupted continues from its checkpoint, which Ctrl-C writes before it
        leaves.
        """
        if self.checkpoint.exists():
            self.restore(self.checkpoint)
        saved = started = time.monotonic()
        before = self.elapsed_s
        parts: dict[str, list[float]] = {}
        try:
            while (progress := self.progress()) < 1:
                for key, value in self._update(progress).items():
                    parts.setdefault(key, []).append(value)
                self.elapsed_s = before + time.monotonic() - started
                if self.step % self.report_every == 0:
                    self._report(parts)
                if time.monotonic() - saved > checkpoint_every_s:
                    self.save(self.checkpoint)
                    self.data.refresh()
                    saved = time.monotonic()
        finally:
            self.save(self.checkpoint)

    def _update(self, progress: float) -> dict[str, float]:
        """One optimiser step; returns the parts of its loss."""
        settings = self.settings
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                rate = settings.learning_rate * group.get("share", 1.0)
                group["lr"] = rate * _schedule(self.step, progress, self.warm_up)
        batch = self.data.sample(
            self.rng,
            settings.batch,
            other_target=settings.other_target,
            reaching=settings.reaching,
            shift=settings.shift,
        )
        with torch.autocast(self.device.type, dtype=torch.bfloat16), plain_attention(self.device):
            loss, parts = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        share = min(settings.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list[Tensor](self.parameters), 1 - share)
        return parts

    def _report(self, parts: dict[str, list[float]]) -> None:
        """Print the means of the last steps, and add them to the stage's log."""
        row = {"step": self.step, "minutes": round(self.elapsed_s / 60, 2)}
        row |= {key: round(float(np.mean(values)), 4) for key, values in parts.items()}
        parts.clear()
        with (self.folder / f"{self.settings.stage}.log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.settings.stage}.pt"

    def progress(self) -> float:
        """Share of the stage that is done, from 0 to 1."""
        if self.settings.steps is not None:
            return self.step / self.settings.steps
        return self.elapsed_s / (60 * self.settings.minutes)

    def save(self, path: Path) -> None:
        """Write everything that resuming needs; the old file stays until the new one is whole."""
        state = {
            "model": {name: value.detach() for name, value in self._weights().items()},
            "helpers": self.helpers.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "settings": asdict(self.settings),
            "bounds": [torch.from_numpy(x) for x in (*self.action_bounds, *self.proprio_bounds)],
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        """Continue the run whose checkpoint is at `path`."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        weights = self._weights()
        if set(weights) != set(state["model"]):
            raise ValueError(f"{path} does not hold the weights of stage `{self.settings.stage}`.")
        self.model.load_state_dict(state["model"], strict=False)
        self.helpers.load_state_dict(state["helpers"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average = state["average"]
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.rng = np.random.default_rng([self.settings.seed, self.step])
        self.action_bounds, self.proprio_bounds = _bounds(state)

    def _adopt(self, action: Bounds, proprio: Bounds) -> None:
        """Go on from weights that were trained with these bounds."""
        if isinstance(self.model, OpenVLAOFT):
            renormalise(self.model, (action, proprio), (self.action_bounds, self.proprio_bounds))
        else:
            self.action_bounds, self.proprio_bounds = action, proprio

    def load_policy(self, folder: Path) -> None:
        """Start from an exported policy of this size.

        Its normalisation is taken over or converted, see `load_weights`, where it has the same
        statistics as this stage. Words that both tokenizers know keep their embeddings.
        """
        policy: Any = load(folder)
        found = policy.state_dict()
        wanted = self.model.state_dict()
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
            raise ValueError(
                f"{folder} holds a policy of another size than stage `{self.settings.stage}` "
                f"trains with grid {self.settings.grid}; start from a policy that this stage wrote."
            )
        self.model.load_state_dict({name: value.float() for name, value in found.items()})
        self._match_words(policy.tokenizer.get_vocab())
        ((name, statistics),) = policy.config.norm_stats.items()
        if name != policies.STATISTICS.get(self.settings.stage):
            return
        self._adopt(
            *(
                (np.array(values["q01"]), np.array(values["q99"]))
                for values in (statistics["action"], statistics["proprio"])
            )
        )

    @torch.no_grad()
    def _match_words(self, source: dict[str, int]) -> None:
        """Reorder the embeddings `[vocabulary, D]`, sorted by the ids `source`, to the tokenizer's.

        A word that `source` does not know starts as the mean of the known ones.
        """
        wanted = self.tokenizer.get_vocab()
        if source == wanted:
            return
        table = self.model.language_model.get_input_embeddings().weight
        before = table.clone()
        mean = before[list(source.values())].mean(0)
        for word, row in wanted.items():
            table[row] = before[source[word]] if word in source else mean

    def load_weights(self, path: Path) -> None:
        """Start from the averaged weights of a checkpoint, as far as names agree.

        One of the same stage also hands on its normalisation. OpenVLA-OFT's heads, linear in
        actions and state, are converted to that of this stage's data instead.
        """
        if not path.exists():
            raise FileNotFoundError(
                f"Stage `{self.settings.stage}` starts from {path.name}, which is not in "
                f"{path.parent}; train that stage first."
            )
        state = torch.load(path, weights_only=True, map_location=self.device)
        names = [*state["model"], *state["helpers"]]
        averaged = dict(zip(names, state["average"], strict=True))
        model = {name: averaged[name] for name in state["model"]}
        self.model.load_state_dict(model, strict=False)
        helpers = {name: averaged[name] for name in state["helpers"]}
        self.helpers.load_state_dict(helpers, strict=False)
        self._match_words(policies.tokenizer(state["settings"]["stage"]).get_vocab())
        if state["settings"]["stage"] == self.settings.stage:
            self._adopt(*_bounds(state))


@torch.no_grad()
def renormalise(
    model: OpenVLAOFT,
    before: tuple[Bounds, Bounds],
    after: tuple[Bounds, Bounds],
) -> None:
    """Make a policy that was trained with bounds `before` say the same with bounds `after`.

    Bounds are (low, high) of actions `[7]` and of the state `[8]`. The first layer that reads the
    state and the last one that gives actions are linear, so this is exact, but for what is clipped.
    """

    def tensors(values: Bounds) -> list[Tensor]:
        """Middle and reach."""
        low, high = (torch.from_numpy(np.asarray(v)).to(model.device).float() for v in values)
        return [(low + high) / 2, ((high - low) / 2).clamp_min(5e-7)]

    (old_middle, old_reach), (middle, reach) = tensors(before[0]), tensors(after[0])
    last = model.action_head.model.fc2
    last.weight.mul_((old_reach / reach)[:, None])
    last.bias.mul_(old_reach / reach).add_((old_middle - middle) / reach)
    (old_middle, old_reach), (middle, reach) = tensors(before[1]), tensors(after[1])
    first = model.proprio_projector.fc1
    first.bias.add_(first.weight @ ((middle - old_middle) / old_reach))
    first.weight.mul_(reach / old_reach)


def export(checkpoint: Path, folder: Path) -> None:
    """Write the averaged weights of a checkpoint as a policy folder: published layout, bf16."""
    if not Path(checkpoint).exists():
        raise FileNotFoundError(f"There is no checkpoint {checkpoint}; train that stage first.")
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    name = state["settings"]["stage"]
    config = policies.config(name, state["settings"]["grid"])
    model = _model_class(name).build(config)
    trained = dict(zip(dict(model.named_parameters()), state["average"], strict=False))
    model.load_state_dict(trained, strict=False)
    action_low, action_high, proprio_low, proprio_high = state["bounds"]
    statistics = {
        policies.STATISTICS[name]: {
            "action": quantiles(action_low, action_high) | {"mask": [True] * 6 + [False]},
            "proprio": quantiles(proprio_low, proprio_high),
        }
    }
    model.export(folder, tokenizer=policies.tokenizer(name), norm_stats=statistics)
    policies.write_control(name, folder)


@contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On the CPU, compute attention inside as two matrix products and a softmax.

    With heads this narrow the fused kernel's backward pass takes two to five times as long.
    """
    if device.type != "cpu":
        yield
        return
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` computes, in the dtype of `value`; no dropout."""
    if dropout_p or enable_gqa:
        raise ValueError("the reference policies train without dropout and grouped queries.")
    with torch.autocast(query.device.type, enabled=False):
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        query, key = (query * factor).to(value.dtype), key.to(value.dtype)
        logits = torch.matmul(query, key.transpose(-1, -2))
        if is_causal:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(hidden, float("-inf"))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, torch.finfo(logits.dtype).min)
        elif attn_mask is not None:
            logits = logits + attn_mask.to(logits.dtype)
        return torch.matmul(logits.softmax(-1), value)


def _model_class(policy: str) -> type[OpenVLA] | type[OpenVLAOFT]:
    return OpenVLAOFT if policy.startswith("mini-oft") else OpenVLA


def _bounds(state: dict[str, Any]) -> tuple[Bounds, Bounds]:
    """Those of actions and of the state in a checkpoint."""
    low, high, proprio_low, proprio_high = (x.cpu().numpy() for x in state["bounds"])
    return (low, high), (proprio_low, proprio_high)


def _schedule(step: int, progress: float, warm_up: int) -> float:
    """Warm-up over so many steps, then a cosine to zero."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + float(np.cos(np.pi * min(progress, 1.0))))


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes the parameter: the weight matrices inside the transformer blocks."""
    return parameter.ndim == 2 and ("blocks." in name or "layers." in name or "projector" in name)


def _wide_enough(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Action bounds `[7]` whose hardly used dimensions are not blown up to the full range."""
    middle, reach = (low + high) / 2, np.maximum((high - low) / 2, _SMALLEST_REACH)
    middle[6], reach[6] = 0.0, 1.0  # the gripper command spans [-1, 1] already
    return middle - reach, middle + reach


def normalised(values: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """float32 values `[..., n]` with `bounds` on [-1, 1], clipped."""
    low, high = bounds
    span = np.maximum(high - low, 1e-6)
    return np.clip(2 * (values - low) / span - 1, -1, 1).astype(np.float32)


def quantiles(low: Tensor, high: Tensor) -> dict[str, list[float]]:
    return {"q01": low.tolist(), "q99": high.tolist()}
