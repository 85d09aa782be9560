"""Policies with one prefix of camera tokens, then the instruction: what they share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.core.hooks import replace
from vla_pruner.core.layout import Adapter, Layout
from vla_pruner.core.session import Session
from vla_pruner.models.adapters.patching import reset_with, run_uncompiled


class PrefixAdapter(Adapter):
    """Learns where things are from the policy's own `embed_prefix` and `embed_image`.

    Subclasses set `decoder` (and `reader`), and say which object embeds an image.

    Args:
        policy: what was given to `vp.prune`: a policy with a `reset`, or its inner model.
        core: the inner model, which has the method `embed_prefix`.
        embedder: the module whose `embed_image` makes the tokens `[B, n, D]` of one camera.
    """

    embed_prefix = "embed_prefix"
    """Name of the core's method; its arguments begin with images, their masks, words, theirs."""

    samplers: tuple[str, ...] = ("sample_actions",)
    """Methods of the core that may have been compiled."""

    oldest_transformers = (4, 53)
    """openpi and lerobot 0.4 pin this one; their loops make no use of what came later."""

    special_before: int = 0
    """Tokens that the policy puts before each camera, and behind it."""
    special_behind: int = 0

    def __init__(self, policy: nn.Module, core: nn.Module, embedder: nn.Module) -> None:
        self.policy, self.core, self.embedder = policy, core, embedder
        self._cameras: list[Tensor] = []
        self._layout: Layout | None = None
        self._verified = False

    def attach(self, undo: ExitStack) -> None:
        """Listen to the embedding of images and of the prefix."""
        for name in self.samplers:
            run_uncompiled(self.core, name, undo)
        embed_image, embed_prefix = (
            getattr(self.embedder, "embed_image"),  # noqa: B009 - a method, not a module
            getattr(self.core, self.embed_prefix),
        )

        def noted_image(*args: Any, **kwargs: Any) -> Tensor:
            tokens = embed_image(*args, **kwargs)
            self._cameras.append(tokens.detach())
            return tokens

        def noted_prefix(
            images: Any, image_masks: Any, words: Tensor, word_masks: Tensor, *args: Any, **kw: Any
        ) -> Any:
            self._cameras = []
            result = embed_prefix(images, image_masks, words, word_masks, *args, **kw)
            self._layout = self._find(result[0], result[1], image_masks, words.shape[1])
            self._cameras = []
            return result

        replace(self.embedder, "embed_image", noted_image, undo)
        replace(self.core, self.embed_prefix, noted_prefix, undo)

    def follow(self, session: Session, undo: ExitStack) -> None:
        """The policy's `reset` begins a new episode."""
        if hasattr(self.policy, "reset"):
            reset_with(self.policy, session, undo)

    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """What the last `embed_prefix` made; None for any other sequence."""
        found = self._layout
        if found is None or found.valid_rows is None or inputs.ndim != 3:
            return None
        prefix = found.valid_rows.shape[1]
        return found if inputs.shape[1] == prefix else None

    def _find(self, prefix: Tensor, valid: Tensor, image_masks: Any, words: int) -> Layout:
        """Layout of a prefix `[B, S, D]` with padding mask `valid` `[B, S]`.

        Raises:
            ValueError: the prefix is not built as expected.
        """
        views = tuple(tokens.shape[1] for tokens in self._cameras)
        starts, end = [], 0
        for size in views:
            starts.append(end + self.special_before)
            end = starts[-1] + size + self.special_behind
        if not views or end + words > prefix.shape[1]:
            raise ValueError(
                f"{type(self.core).__name__}.{self.embed_prefix} made {prefix.shape[1]} tokens of "
                f"{len(views)} images ({views} tokens) and {words} words; expected the images "
                "first, then the words. This version of the policy is not known."
            )
        if not self._verified:
            self._verify(prefix, starts)
            self._verified = True
        device = prefix.device
        spans = [
            torch.arange(start, start + size, device=device)
            for start, size in zip(starts, views, strict=True)
        ]
        masks = [mask[:, None].expand(-1, n) for mask, n in zip(image_masks, views, strict=False)]
        return Layout(
            visual=torch.cat(spans)[None],
            views=views,
            valid_rows=valid.bool(),
            visual_valid=torch.cat(masks, dim=1).bool(),
            text_rows=torch.arange(end, end + words, device=device)[None],
        )

    def _verify(self, prefix: Tensor, starts: list[int]) -> None:
        """The image tokens are where they should be, up to a factor that policies scale them by."""
        for camera, (tokens, start) in enumerate(zip(self._cameras, starts, strict=True)):
            found = prefix[:, start : start + tokens.shape[1]].float()
            tokens = tokens.float()
            factor = found.norm() / tokens.norm().clamp_min(1e-12)
            if not torch.allclose(found, tokens * factor, rtol=1e-2, atol=1e-4 * float(factor)):
                raise ValueError(
                    f"the tokens of camera {camera} are not at {start}.."
                    f"{start + tokens.shape[1] - 1} of the prefix that "
                    f"{type(self.core).__name__}.{self.embed_prefix} makes; this version of the "
                    "policy is not known."
                )
